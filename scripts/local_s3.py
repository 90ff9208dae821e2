"""A real S3 server on this machine, for trying things out; objects stay in its folder.

    python scripts/local_s3.py [FOLDER]

Prints what to paste into another terminal, and serves until Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path

from job.drill.seaweed import SeaweedServer
from job.errors import JobError

BUCKETS = ("s4gan-data", "s4gan-runs")
EXAMPLE = "s4gan train --config demo --data demo/data --run s3://s4gan-runs/demo"


def main() -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo/s3"))
    folder = parser.parse_args().folder
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # even where a shell has it ignored
    try:
        with SeaweedServer(folder, buckets=BUCKETS) as server:
            print(f"An S3 server with its objects in {folder}. In another terminal:\n")
            for name, value in server.environment().items():
                print(f"export {name}={value}")
            print(f"\nand for example:\n\n{EXAMPLE}\n\nCtrl-C stops it; the objects stay.")
            sys.stdout.flush()
            with contextlib.suppress(KeyboardInterrupt):
                status = server.wait()
                print(f"error: the server ended by itself ({status})", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        return 130  # before it was ready
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
