"""The units of work of a transfer, each a GET or a few, checked before anything is left behind.

* `Whole`: one small object, in memory, into one file.
* `Span`: a stretch of a pack's shard that holds many files; or one large file of it, streamed.
* a large object: in chunks (`job.storage.large`).

Runs in this process or in a worker's; knows nothing of who asked for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from job.errors import StorageError
from job.storage.digests import check_of, new_hash, parts_of, promise_of
from job.storage.get import Getter, Reply, ReplyBroken

PART = ".part"
CHUNK_BYTES = 16 * 2**20
"""An object up to this size is fetched by one GET into memory; times the threads of a process."""
STREAM_BYTES = 2**20
SPAN_BYTES = 4 * 2**20
ATTEMPTS = 4
"""To read a body that ends early or is not what its checksum says."""

_Result = TypeVar("_Result")


def part_of(path: Path, ending: str = PART) -> Path:
    """Where a file lies until it is whole: under a name that no data set has, of any length."""
    return path.with_name(
        f".s4gan-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:24]}{ending}"
    )


@dataclass(frozen=True, slots=True)
class Whole:
    """An object to be fetched into a file."""

    key: str
    """Of the bucket, in full."""
    size: int
    etag: str
    """As listed, with its quotes."""
    path: str
    """Of the file, below the target folder."""

    def __reduce__(self) -> tuple[type[Whole], tuple[str, int, str, str]]:
        """On its way to a worker; what dataclasses do for slots takes several times as long."""
        return Whole, (self.key, self.size, self.etag, self.path)

    @property
    def is_large(self) -> bool:
        """Whether it comes in chunks. What was uploaded in parts can only be checked so."""
        return self.size > CHUNK_BYTES or parts_of(self.etag) > 1


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard."""

    path: str
    size: int
    offset: int
    """Of its first byte in the shard."""
    check: str
    """See `digests.check_of`."""

    def __reduce__(self) -> tuple[type[Member], tuple[str, int, int, str]]:
        """As that of `Whole`."""
        return Member, (self.path, self.size, self.offset, self.check)


@dataclass(frozen=True)
class Span:
    """Files of a shard that lie close together, in order of their offsets."""

    key: str
    etag: str
    members: tuple[Member, ...]

    @property
    def first(self) -> int:
        """Where it begins in the shard."""
        return self.members[0].offset

    @property
    def length(self) -> int:
        """Bytes from the first member's to the last one's end."""
        last = self.members[-1]
        return last.offset + last.size - self.first


@dataclass(frozen=True)
class Arrived:
    """A file that lies in the target folder, complete and verified."""

    path: str
    size: int
    mtime_ns: int
    check: str
    """Of the content, to look at it again later."""
    verified: str
    """How it was verified: a checksum's name, "etag", or "size" if the server had nothing."""


def fetch_group(getter: Getter, folder: Path, group: tuple[Whole | Span, ...]) -> list[Arrived]:
    """Fetch small objects and spans, one after the other.

    Raises:
        ObjectChanged: one is not the listed one any more.
        StorageError: one cannot be fetched or does not verify, or the folder cannot be written.
    """
    arrived = []
    for unit in group:
        if isinstance(unit, Whole):
            arrived.append(_fetch_whole(getter, folder, unit))
        elif len(unit.members) == 1 and unit.length > SPAN_BYTES:
            arrived.append(_stream_member(getter, folder, unit))
        else:
            arrived += _fetch_span(getter, folder, unit)
    return arrived


def _fetch_whole(getter: Getter, folder: Path, unit: Whole) -> Arrived:
    def attempt() -> tuple[bytearray, str]:
        with getter.open(unit.key, etag=unit.etag) as reply:
            data = read_all(reply, unit.size)
            promise = promise_of(reply.headers, unit.etag)
        if promise is None or promise.parts > 1:
            return data, "size"
        if not promise.holds(data):
            raise ReplyBroken(f"its content does not have the {promise.algorithm} it should")
        return data, promise.label

    data, verified = until_good(attempt, unit.key)
    check = check_of("crc32", data)
    return Arrived(unit.path, unit.size, write_file(folder / unit.path, data), check, verified)


def _fetch_span(getter: Getter, folder: Path, span: Span) -> list[Arrived]:
    def attempt() -> bytearray:
        if not span.length:
            return bytearray()
        with getter.open(span.key, etag=span.etag, span=(span.first, span.length)) as reply:
            data = read_all(reply, span.length)
        for member, content in _contents(span, data):
            if check_of(member.check.partition(":")[0], content) != member.check:
                raise ReplyBroken(f"{member.path} in it is damaged")
        return data

    data = until_good(attempt, span.key, mend=_mend_shard(span))
    return [
        Arrived(
            member.path,
            member.size,
            write_file(folder / member.path, content),
            member.check,
            member.check.partition(":")[0],
        )
        for member, content in _contents(span, data)
    ]


def _mend_shard(span: Span) -> str:
    return f"delete {span.key}, and make the pack again: s4gan data pack"


def _contents(span: Span, data: bytearray) -> list[tuple[Member, memoryview]]:
    view = memoryview(data)
    return [(m, view[m.offset - span.first :][: m.size]) for m in span.members]


def _stream_member(getter: Getter, folder: Path, span: Span) -> Arrived:
    """A large file of a shard: straight to disk, under another name until it has proved right."""
    member = span.members[0]
    path = folder / member.path
    temporary = part_of(path)
    algorithm = member.check.partition(":")[0]

    def attempt() -> None:
        digest = new_hash(algorithm)
        with (
            explained_write(temporary),
            open_new(temporary) as file,
            getter.open(span.key, etag=span.etag, span=(span.first, span.length)) as reply,
        ):
            for view in stream(reply, span.length):
                digest.update(view)
                file.write(view)
        if f"{algorithm}:{digest.digest().hex()}" != member.check:
            raise ReplyBroken(f"{member.path} in it is damaged")

    try:
        until_good(attempt, span.key, mend=_mend_shard(span))
        with explained_write(path):
            os.replace(temporary, path)
            mtime_ns = path.stat().st_mtime_ns
    finally:
        temporary.unlink(missing_ok=True)
    return Arrived(member.path, member.size, mtime_ns, member.check, algorithm)


# ---------------------------------------------------------------- what all units share


def until_good(attempt: Callable[[], _Result], key: str, mend: str = "") -> _Result:
    """Repeat an attempt that raises ReplyBroken, then give up with an error that names the key."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except ReplyBroken as broken:
            if number == ATTEMPTS:
                raise StorageError(
                    f"cannot read {key}: {broken}, {ATTEMPTS} times in a row",
                    mend=mend or "check the network; if it stays so, upload that object again",
                ) from None
        time.sleep(0.1 * 2**number * random.random())
    raise AssertionError("unreachable")


def read_all(reply: Reply, size: int) -> bytearray:
    """The body of a reply that must have so many bytes."""
    expect_length(reply.headers, size)
    data = bytearray(size)
    view, count = memoryview(data), 0
    while count < size:
        got = reply.readinto(view[count:])
        if not got:
            raise ReplyBroken(f"only {count} of {size} bytes came")
        count += got
    return data


def stream(reply: Reply, size: int) -> Iterator[memoryview]:
    """The body of a reply that must have so many bytes, in pieces; each is gone with the next."""
    expect_length(reply.headers, size)
    buffer, count = memoryview(bytearray(STREAM_BYTES)), 0
    while count < size:
        wanted, filled = min(len(buffer), size - count), 0
        while filled < wanted:  # a socket gives little at a time; hashing and writing like more
            got = reply.readinto(buffer[filled:wanted])
            if not got:
                raise ReplyBroken(f"only {count + filled} of {size} bytes came")
            filled += got
        count += filled
        yield buffer[:filled]


def expect_length(headers: Mapping[str, str], size: int) -> None:
    """Refuse a reply of another length, for example the whole object where a range was asked."""
    if headers.get("content-length") != str(size):
        raise ReplyBroken(f"{headers.get('content-length')} bytes where {size} were expected")


def begun(path: Path) -> int:
    """Bytes of the disk that a file takes already, of which only a part has come."""
    try:
        return part_of(path).stat().st_blocks * 512
    except OSError:
        return 0


def write_file(path: Path, data: bytearray | memoryview) -> int:
    """Write a new read-only file; returns its modification time in ns.

    Read-only because the sets of a cache share files by hard links: an edit would change them all.
    """
    with explained_write(path):
        descriptor = _create(path)
        try:
            count = 0
            while count < len(data):
                count += os.write(descriptor, memoryview(data)[count:])
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)


def open_new(path: Path) -> BinaryIO:
    """A new read-only file, opened for writing."""
    return os.fdopen(_create(path), "wb")


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for _ in range(3):
        try:
            return os.open(path, flags, 0o444)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # of an attempt that was killed before it could say that it is good
            path.unlink()
    return os.open(path, flags, 0o444)


@contextlib.contextmanager
def explained_write(path: Path) -> Iterator[None]:
    """Turn the system's errors in writing a file into ours."""
    try:
        yield
    except OSError as error:
        raise StorageError.from_os("write", path, error) from error
