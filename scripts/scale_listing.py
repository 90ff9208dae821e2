"""How listing a data set and planning its transfer scale: seconds and memory for many objects.

    python -m scripts.scale_listing                     # 10^4, 10^5 and 10^6 objects; 5 minutes
    python -m scripts.scale_listing --objects 20000

Runs what `s4gan train --data s3://...` runs before its first byte (list all objects, plan what to
fetch), then all its bookkeeping (a journal, an index), and then the next attempt, which finds
everything there; each in a process of its own. Only the bytes are not moved. A million real objects
would take hours to write, so the objects are those of a small server that makes up the pages of
ListObjectsV2; `--real` many are also written to a real S3 server, to see that its pages take no
more. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from job.drill.seaweed import SeaweedServer
from job.storage import cache, open_store, sync
from job.storage.progress import Silent
from job.storage.transfer import GROUP
from job.storage.units import Arrived, Span, Whole

BUCKET = "scale"
PREFIX = "data"
PAGE = 1000
"""Keys of a reply. Source: S3 API Reference, ListObjectsV2, max-keys."""
OBJECT_BYTES = range(1000, 2000)
"""So few that a disk with room for their names has room for them; nothing is done with them."""
OBJECTS = (10_000, 100_000, 1_000_000)
REAL_OBJECTS = 10_000


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, nargs="+", default=OBJECTS)
    parser.add_argument("--real", type=int, default=REAL_OBJECTS, help="on a real server; 0: none")
    parser.add_argument("--folder", type=Path, help="on the disk to use; a temporary one")
    parser.add_argument("--measure", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(STAGES[options.measure](f"s3://{BUCKET}/{PREFIX}")))
        return
    if any(count < 1 for count in options.objects) or options.real < 0:
        parser.error("a number of objects must be at least 1 (of --real: 0)")
    rows = []
    with tempfile.TemporaryDirectory(prefix="s4gan-scale-", dir=options.folder) as name:
        folder = Path(name)
        if options.real:
            with SeaweedServer(folder / "server", buckets=(BUCKET,)) as server:
                os.environ.update(server.environment())
                write_objects(options.real)
                rows.append((f"{options.real:,} (S3 server)", both_attempts(folder / "real")))
        for count in options.objects:
            with listing_server(count) as endpoint:
                os.environ.update(environment(endpoint))
                rows.append((f"{count:,}", both_attempts(folder / str(count))))
    print(table(rows))


# ---------------------------------------------------------------- the objects


def key_of(number: int) -> str:
    """As data sets have them: a folder for images, a name of a few words."""
    return f"{PREFIX}/train/images/{number // 1000:04d}/frame_{number:09d}_camera.jpg"


def size_of(number: int) -> int:
    """Bytes of an object."""
    return OBJECT_BYTES[number % len(OBJECT_BYTES)]


def page(count: int, token: str, keys: int = PAGE) -> bytes:
    """A reply of ListObjectsV2, with all that S3 says of each object.

    Args:
        count: objects of the bucket.
        token: of the reply before; empty for the first one.
        keys: at most so many.
    """
    first = int(token or 0)
    last = min(first + keys, count)
    contents = "".join(
        f"<Contents><Key>{key_of(number)}</Key><LastModified>2026-01-01T00:00:00.000Z"
        f"</LastModified><ETag>&quot;{number:032x}&quot;</ETag><ChecksumAlgorithm>CRC64NVME"
        f"</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType><Size>{size_of(number)}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for number in range(first, last)
    )
    more = last < count
    follows = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{PREFIX}/</Prefix><KeyCount>{last - first}</KeyCount>"
        f"<MaxKeys>{keys}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>"
        f"{follows}{contents}</ListBucketResult>"
    ).encode()


@contextlib.contextmanager
def listing_server(count: int) -> Iterator[str]:
    """The endpoint of a server, in a process of its own, whose bucket holds so many objects."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")  # a fork would take our threads' locks along
    server = context.Process(target=_serve, args=(count, theirs), daemon=True)
    server.start()
    try:
        if not ours.poll(60):
            raise RuntimeError("the server of made-up pages does not start")
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        server.kill()
        server.join()


def _serve(count: int, told: Connection) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            is_ours = query.get("list-type") == "2" and query.get("prefix") == f"{PREFIX}/"
            body = page(count, query.get("continuation-token", "")) if is_ours else b""
            self.send_response(200 if is_ours else 501)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not: there are a thousand requests."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.send(server.server_address[1])
        server.serve_forever()


def environment(endpoint: str) -> dict[str, str]:
    """Variables that point this program at the server; it looks at no key."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
    }


def write_objects(count: int) -> None:
    """The same objects, on the real server that the environment points at."""
    store = open_store(f"s3://{BUCKET}")
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda n: store.write(key_of(n), bytes(size_of(n))), range(count)):
            pass


# ---------------------------------------------------------------- the measurement


def both_attempts(scratch: Path) -> dict[str, Any]:
    """The measurements of an attempt that finds nothing, and of the next; see STAGES."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        # A process of its own, so that the peak of memory is its own.
        done = subprocess.run(
            [sys.executable, "-m", "scripts.scale_listing", "--measure", stage],
            env={**os.environ, sync.SCRATCH_VARIABLE: str(scratch)},
            stdout=subprocess.PIPE,
            check=True,
        )
        found[stage] = json.loads(done.stdout)
    return found


def first(uri: str) -> dict[str, float]:
    """Bring a data set but for its bytes.

    Returns:
        `objects`; `listed_s`, `planned_s` and `recorded_s` from the beginning; `before_bytes` and
        `peak_bytes`, of resident memory.
    """
    found: dict[str, float] = {"before_bytes": 0}
    list_all = sync.S3Source.listing

    def listing(source: sync.S3Source) -> list[sync.Listed]:
        found["before_bytes"] = peak_bytes()  # with all that is imported, and a client
        listed = list_all(source)
        found["listed_s"] = time.monotonic() - began_s
        return listed

    def fetch_nothing(*args: Any, **options: Any) -> None:
        found["objects"] = len(args[1])
        found["planned_s"] = time.monotonic() - began_s
        pretend(*args, **options)

    with (
        mock.patch.object(sync.S3Source, "listing", listing),
        mock.patch.object(sync, "transfer", fetch_nothing),
    ):
        began_s = time.monotonic()
        with sync.data_folder(uri, progress=Silent()):
            found["recorded_s"] = time.monotonic() - began_s
    return found | {"peak_bytes": peak_bytes()}


def again(uri: str) -> dict[str, float]:
    """The next attempt, on the same disk; `s`, and `peak_bytes` of resident memory."""

    def is_there(*_: object) -> bool:
        """None of them is. Not a mock, which would remember a million calls."""
        return True

    with (
        mock.patch.object(cache, "_is_same", is_there),
        mock.patch.object(sync, "transfer", None),  # would be an error: there is nothing to fetch
    ):
        began_s = time.monotonic()
        with sync.data_folder(uri, progress=Silent()):
            return {"s": time.monotonic() - began_s, "peak_bytes": peak_bytes()}


def pretend(
    _origin: Any,
    units: Sequence[Whole | Span],
    _folder: Path,
    *,
    arrived: Callable[[Sequence[Arrived]], None],
    **_: Any,
) -> None:
    """In place of `transfer`: say that all has arrived, as workers say it."""
    for first in range(0, len(units), GROUP):
        group = [
            Arrived(unit.path, unit.size, number, f"crc32:{number:08x}", "etag")
            for number, unit in enumerate(units[first : first + GROUP], start=first)
            if isinstance(unit, Whole)
        ]
        arrived(pickle.loads(pickle.dumps(group)))


STAGES = {"first": first, "again": again}


def peak_bytes() -> int:
    """The most memory that this process has had resident. Source: getrusage(2)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The measurements; the objects' memory is what was added to that of the program before."""
    lines = [
        "| objects | list, s | objects/s | plan, s | record, s | next attempt, s | peak memory | "
        "next attempt's | bytes an object |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in rows:
        one, other = found["first"], found["again"]
        more = one["peak_bytes"] - one["before_bytes"]
        # Of few objects nothing is seen: to import the program has taken more for a moment.
        each = f"{more / one['objects']:,.0f}" if more > one["before_bytes"] / 4 else ""
        lines.append(
            f"| {name} | {one['listed_s']:.1f} | {one['objects'] / one['listed_s']:,.0f} | "
            f"{one['planned_s'] - one['listed_s']:.1f} | "
            f"{one['recorded_s'] - one['planned_s']:.1f} | {other['s']:.1f} | "
            f"{one['peak_bytes'] / 1e6:,.0f} MB | {other['peak_bytes'] / 1e6:,.0f} MB | "
            f"{each} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
