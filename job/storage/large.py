"""A large object into a file: in chunks, by several threads, to be continued after a kill.

The chunks are the parts it was uploaded in where it was (only they can be checked against the
server's checksum of such an object), otherwise ranges. They are written at their place in a `.part`
file; beside it a journal says which are there. The file gets its name when all is verified.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from job.errors import StorageError
from job.storage.digests import (
    Crc32,
    Promise,
    combine_crc32,
    file_digest,
    new_hash,
    parts_of,
    promise_of,
)
from job.storage.get import Getter, ReplyBroken
from job.storage.units import (
    ATTEMPTS,
    CHUNK_BYTES,
    Arrived,
    Whole,
    explained_write,
    part_of,
    stream,
    until_good,
)

JOURNAL = ".part.json"


@dataclass(frozen=True)
class _Chunk:
    """What one GET brings."""

    index: int
    part: int
    """Number of an uploaded part; 0 for a range."""
    first: int = 0
    length: int = 0
    """Of a range; a part says itself where it lies."""


@dataclass(frozen=True)
class _Piece:
    """A chunk that has arrived."""

    index: int
    first: int
    length: int
    crc32: int
    digest: str
    """Of the algorithm of the server's checksum over parts, in hexadecimal; "" if not needed."""


def fetch_large(
    getter: Getter,
    folder: Path,
    unit: Whole,
    pool: ThreadPoolExecutor,
    *,
    came: Callable[[int], None],
) -> Arrived:
    """Fetch one object; blocks until it is there, or `getter.stop` breaks it off.

    Args:
        getter: where from.
        folder: where to.
        unit: which.
        pool: for the chunks; not the one this runs in.
        came: told the bytes of each chunk that is there, also of those from an earlier attempt.

    Raises:
        ObjectChanged: it is not the listed one any more.
        StorageError: it cannot be fetched or does not verify, or the folder cannot be written. What
            is there stays for the next attempt.
    """
    path = folder / unit.path
    promise = promise_of(getter.head(unit.key, etag=unit.etag), unit.etag)
    chunks = _chunks(getter, unit)
    if promise and promise.parts and promise.parts != sum(chunk.part > 0 for chunk in chunks):
        promise = None  # over parts that this server does not give one by one
    for _ in range(ATTEMPTS):
        with _PartFile(path, unit, by_parts=bool(chunks and chunks[0].part)) as part_file:
            came(sum(piece.length for piece in part_file.pieces.values()))
            missing = [chunk for chunk in chunks if chunk.index not in part_file.pieces]
            algorithm = promise.algorithm if promise and promise.parts else ""
            _fetch_chunks(getter, unit, missing, algorithm, part_file, pool, came)
            pieces = [part_file.pieces[chunk.index] for chunk in chunks]
        if _verifies(part_file.path, unit, pieces, promise):
            break
        part_file.discard()
        came(-unit.size)
    else:
        wrong = promise.algorithm if promise else "length"
        raise StorageError(
            f"cannot read {unit.key}: its content does not have the {wrong} it should, "
            f"{ATTEMPTS} times in a row",
            mend="check the network; if it stays so, upload that object again",
        )
    mtime_ns = part_file.finish(path)
    crc32 = 0
    for piece in pieces:
        crc32 = combine_crc32(crc32, piece.crc32, piece.length)
    verified = promise.label if promise else "size"
    return Arrived(unit.path, unit.size, mtime_ns, f"crc32:{crc32:08x}", verified)


def _chunks(getter: Getter, unit: Whole) -> list[_Chunk]:
    parts = parts_of(unit.etag)
    if parts > 1:
        head = getter.head(unit.key, etag=unit.etag, part=1)
        if head.get("content-length") != str(unit.size):  # else this server knows no parts
            return [_Chunk(index, part=index + 1) for index in range(parts)]
    firsts = range(0, unit.size, CHUNK_BYTES)
    return [
        _Chunk(index, 0, first, min(CHUNK_BYTES, unit.size - first))
        for index, first in enumerate(firsts)
    ]


def _fetch_chunks(
    getter: Getter,
    unit: Whole,
    chunks: Sequence[_Chunk],
    algorithm: str,
    part_file: _PartFile,
    pool: ThreadPoolExecutor,
    came: Callable[[int], None],
) -> None:
    waiting = [
        pool.submit(_fetch_chunk, getter, unit, chunk, algorithm, part_file.path)
        for chunk in chunks
    ]
    try:
        for future in as_completed(waiting):
            piece = future.result()
            part_file.record(piece)
            came(piece.length)
    finally:
        for future in waiting:
            future.cancel()


def _fetch_chunk(getter: Getter, unit: Whole, chunk: _Chunk, algorithm: str, path: Path) -> _Piece:
    def attempt() -> _Piece:
        span = None if chunk.part else (chunk.first, chunk.length)
        with (
            getter.open(unit.key, etag=unit.etag, span=span, part=chunk.part) as reply,
            _opened(path) as descriptor,
        ):
            first, length = span or _content_range(reply.headers.get("content-range", ""))
            crc32, digest = Crc32(), new_hash(algorithm) if algorithm not in ("", "crc32") else None
            offset = first
            for view in stream(reply, length):
                crc32.update(view)
                if digest is not None:
                    digest.update(view)
                with explained_write(path):
                    offset += _write_at(descriptor, view, offset)
        value = crc32.digest() if digest is None else digest.digest()
        return _Piece(chunk.index, first, length, crc32.value, value.hex())

    return until_good(attempt, unit.key)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of its own for each chunk: one that fails must not close it under the others."""
    with explained_write(path):
        descriptor = os.open(path, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _content_range(text: str) -> tuple[int, int]:
    """First byte and length from "bytes 0-99/1000"."""
    try:
        first, _, last = text.removeprefix("bytes ").partition("/")[0].partition("-")
        return int(first), int(last) - int(first) + 1
    except ValueError:
        raise ReplyBroken(f"a reply about a part without its place ({text!r})") from None


def _write_at(descriptor: int, view: memoryview, offset: int) -> int:
    count = 0
    while count < len(view):
        count += os.pwrite(descriptor, view[count:], offset + count)
    return count


def _verifies(path: Path, unit: Whole, pieces: Sequence[_Piece], promise: Promise | None) -> bool:
    """Whether the pieces lie side by side, fill the object, and are what the server promised."""
    end = 0
    for piece in pieces:
        if piece.first != end:
            return False
        end += piece.length
    if end != unit.size:
        return False
    if promise is None:
        return True
    if promise.parts:
        digest = new_hash(promise.algorithm)
        for piece in pieces:
            digest.update(bytes.fromhex(piece.digest))
        return digest.digest() == promise.value
    if promise.algorithm == "crc32":
        crc32 = 0
        for piece in pieces:
            crc32 = combine_crc32(crc32, piece.crc32, piece.length)
        return crc32.to_bytes(4, "big") == promise.value
    return file_digest(path, promise.algorithm) == promise.value


class _PartFile:
    """A file's part and its journal; what an earlier attempt left of the same object is kept."""

    def __init__(self, final: Path, unit: Whole, *, by_parts: bool) -> None:
        self.path = part_of(final)
        self.pieces: dict[int, _Piece] = {}
        self._size = unit.size
        self._journal_path = part_of(final, JOURNAL)
        self._journal: IO[str] | None = None
        # After a power cut the journal may be on the disk and the data not: hence the boot's id.
        self._head = {
            "key": unit.key,
            "etag": unit.etag,
            "size": unit.size,
            "by_parts": by_parts,
            "boot": boot_id(),
        }

    def __enter__(self) -> _PartFile:
        with explained_write(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.pieces = self._left()
            if not self.pieces:
                self.discard()
            with open(self.path, "ab") as file:
                file.truncate(self._size)
            self._journal = open(self._journal_path, "a")  # closed in __exit__
            if not self.pieces:
                self._write_line(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal is not None:
            self._journal.close()

    def record(self, piece: _Piece) -> None:
        """This piece is in the file."""
        self.pieces[piece.index] = piece
        with explained_write(self._journal_path):
            self._write_line(asdict(piece))

    def discard(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)
        self.pieces = {}

    def finish(self, final: Path) -> int:
        """Give the file its name; returns its modification time in ns."""
        with explained_write(final):
            self.path.chmod(0o444)
            os.replace(self.path, final)
            self._journal_path.unlink(missing_ok=True)
            return final.stat().st_mtime_ns

    def _left(self) -> dict[int, _Piece]:
        """What the journal of an earlier attempt says; a last line cut off does not count."""
        pieces: dict[int, _Piece] = {}
        if not self.path.exists():
            return {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            lines = self._journal_path.read_text().splitlines()
            if not lines or json.loads(lines[0]) != self._head:
                return {}
            for line in lines[1:]:
                piece = _Piece(**json.loads(line))
                pieces[piece.index] = piece
        return pieces

    def _write_line(self, content: object) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(content) + "\n")
        self._journal.flush()


def boot_id() -> str:
    """Changes when the machine starts anew; what was written before may not be on the disk then."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: then by the time of the start, to the minute
        return str(round((time.time() - time.monotonic()) / 60))
