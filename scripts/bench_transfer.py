"""How long data takes to arrive, against s5cmd and the AWS command line, on a local S3 server.

    python scripts/bench_transfer.py --s5cmd PATH --aws PATH

Makes the objects, then lets all programs fetch them in turn, round after round, each into a new
folder; prints a Markdown table. Ratios are medians of the rounds' own, because other load on the
machine changes from round to round. Each program is a process of its own, its start included.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from job.drill.seaweed import SeaweedServer
from job.storage import open_store
from job.storage.pack import pack

BUCKET = "bench"
Command = Callable[[Path], list[str]]
OURS = """
import sys
from job.storage.sync import data_folder
with data_folder(sys.argv[1]):
    pass
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--s5cmd", default=shutil.which("s5cmd"), help="path of s5cmd")
    parser.add_argument("--aws", default=shutil.which("aws"), help="path of the AWS command line")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--file-bytes", type=int, default=50_000)
    parser.add_argument("--large-bytes", type=int, default=2_000_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="s4gan-bench-", dir=options.folder))
    try:
        with SeaweedServer(folder / "server", buckets=(BUCKET,)) as server:
            # s5cmd has a variable of its own for the endpoint.
            os.environ.update(server.environment() | {"S3_ENDPOINT_URL": server.endpoint})
            prepare(folder, options.files, options.file_bytes, options.large_bytes)
            times: dict[str, list[float]] = {}
            for number in range(1, options.rounds + 1):
                print(f"round {number}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
                for name, make in commands(options.s5cmd, options.aws):
                    to = folder / f"to-{number}" / name.replace(" ", "-")
                    times.setdefault(name, []).append(timed(make(to), to))
                    # Small files stay to the end: where this was written, making new ones took
                    # several times as long for a while after many had been deleted.
                    if name.startswith("large"):
                        shutil.rmtree(to)
    finally:
        shutil.rmtree(folder)
    count, size = options.files, options.file_bytes // 1000
    print(table(f"{count} files of {size} kB", times, "small"))
    print()
    print(table(f"one object of {options.large_bytes / 1e9:g} GB", times, "large"))


def prepare(folder: Path, files: int, file_bytes: int, large_bytes: int) -> None:
    """Upload small/, packed/ (the same packed) and large/."""
    rng = random.Random(1)
    source = folder / "source"
    for index in range(files):
        path = source / f"{index % 100:02d}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(file_bytes))
    store = open_store(f"s3://{BUCKET}")
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(
            lambda path: store.write(f"small/{path.relative_to(source)}", path.read_bytes()),
            sorted(source.rglob("*.jpg")),
        ):
            pass
    pack(str(source), f"s3://{BUCKET}/packed")
    with open(folder / "large", "wb") as file:
        for _ in range(large_bytes // 2**20):
            file.write(rng.randbytes(2**20))
    store.upload(folder / "large", "large/large.bin")
    (folder / "large").unlink()


def commands(s5cmd: str | None, aws: str | None) -> Iterator[tuple[str, Command]]:
    """Name and command line of each measurement; the name begins with its table."""
    root = f"s3://{BUCKET}"
    ours = [sys.executable, "-c", OURS]
    if s5cmd:
        yield "small s5cmd cp", lambda to: [s5cmd, "cp", f"{root}/small/*", f"{to}/"]
    yield "small s4gan, as they are", lambda to: [*ours, f"{root}/small"]
    yield "small s4gan, packed", lambda to: [*ours, f"{root}/packed"]
    if aws:
        yield (
            "small aws s3 sync",
            lambda to: [aws, "s3", "sync", "--quiet", f"{root}/small", f"{to}"],
        )
    if s5cmd:
        yield "large s5cmd cp", lambda to: [s5cmd, "cp", f"{root}/large/large.bin", f"{to}/"]
    yield "large s4gan", lambda to: [*ours, f"{root}/large"]
    if aws:
        large = f"{root}/large/large.bin"
        yield "large aws s3 cp", lambda to: [aws, "s3", "cp", "--quiet", large, f"{to}/"]


def timed(command: list[str], to: Path) -> float:
    """Seconds that a command takes to fill a new folder."""
    to.mkdir(parents=True)
    os.sync()  # nobody shall wait for what the one before has left to be written
    environment = {**os.environ, "S4GAN_SCRATCH": str(to)}
    began_s = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - began_s


def table(what: str, times: Mapping[str, list[float]], prefix: str) -> str:
    """The measurements of one table."""
    chosen = {
        name.removeprefix(f"{prefix} "): seconds
        for name, seconds in times.items()
        if name.startswith(prefix)
    }
    reference = chosen.get("s5cmd cp")
    lines = [f"| {what} | median s | least to most s | times s5cmd |", "|---|---|---|---|"]
    for name, seconds in chosen.items():
        ratio = ""
        if reference:
            pairs = zip(seconds, reference, strict=True)
            ratio = f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f}"
        lines.append(
            f"| {name} | {statistics.median(seconds):.1f} | "
            f"{min(seconds):.1f} to {max(seconds):.1f} | {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
