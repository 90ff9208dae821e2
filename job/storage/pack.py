"""`s4gan data pack`: many small files as a few large tar files that are fetched much faster.

Any tool reads the tar files; `job.storage.sync` reads them by ranges along the index. The same
input gives the same bytes. Shards are cut where the names of the files say so, so that adding a
file changes one shard, not all that follow. One shard at a time lies on the local disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, cast

from job.errors import (
    AccessDenied,
    ConfigError,
    DataError,
    PreconditionFailed,
    Preempted,
    StorageError,
)
from job.storage import open_store
from job.storage.archives import is_archive
from job.storage.digests import file_digest
from job.storage.get import ObjectChanged
from job.storage.packindex import INDEX, PackedFile, PackIndex, Shard, is_shard, shard_name
from job.storage.progress import Silent, TransferProgress, megabytes
from job.storage.sync import Listed, S3Source, check_collisions, check_path, scratch_root
from job.storage.transfer import Origin, transfer
from job.storage.units import Whole, explained_write

if TYPE_CHECKING:
    from job.storage.s3 import S3Store

SHARD_MIN_BYTES = 192_000_000
SHARD_MAX_BYTES = 320_000_000
"""Of the files in a shard; a single file may be larger."""
CUT_EVERY_BYTES = 32_000_000
"""Mean distance of the places where a shard of the least size is cut."""
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Packed:
    """What `pack` did."""

    files: int
    size: int
    """Bytes of the files."""
    shards: int
    uploaded: int
    """Shards that were not there yet."""
    left: int = 0
    """Shards of an earlier pack that could not be deleted, for want of the right."""


def pack(
    source_uri: str,
    target_uri: str,
    *,
    progress: TransferProgress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Packed:
    """Pack a data set; packing the same again writes nothing.

    Args:
        source_uri: a folder or s3://BUCKET/PREFIX. Hidden files are left out.
        target_uri: another one, empty or with an earlier pack.
        progress: told how far it is.
        stopped: asked several times a second.

    Raises:
        ConfigError: the target is the source, or holds something else.
        DataError: the source has no files, or some that cannot be packed.
        StorageError: something cannot be read or written.
        Preempted: stopped; what has been written is used when it is run again.
    """
    progress = progress or Silent()
    store = open_store(target_uri)
    _refuse_overlap(source_uri, target_uri)
    there = {info.key: info.size for info in store.list("")}
    strangers = sorted(key for key in there if key != INDEX and not is_shard(key))
    if strangers:
        raise ConfigError(
            f"{target_uri}: holds {strangers[0]}, which is not of a pack",
            mend="choose an empty folder for the pack",
        )
    before, version = store.read_versioned(INDEX)
    source = _open_source(source_uri)
    files = source.files()
    _check(files, source_uri)
    size = sum(file.size for file in files)
    progress.begin("pack", len(files), size)
    shards: list[Shard] = []
    packed: list[PackedFile] = []
    uploaded = 0
    try:
        scratch_root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pack-", dir=scratch_root()) as scratch:
            for group in _cut(files):
                with source.local(group, Path(scratch), stopped) as folder:
                    tar, members = _write_tar(Path(scratch), folder, group, stopped)
                digest = file_digest(tar, "sha256").hex()
                shard = Shard(shard_name(digest), tar.stat().st_size, digest)
                if there.get(shard.name) != shard.size:
                    store.upload(tar, shard.name)
                    uploaded += 1
                tar.unlink()
                shards.append(shard)
                packed += [
                    PackedFile(file.path, file.size, sha256, shard.name, offset)
                    for file, (sha256, offset) in zip(group, members, strict=True)
                ]
                progress.advance(len(group), sum(file.size for file in group))
    except OSError as error:
        raise StorageError.from_os("write", scratch_root(), error) from error
    finally:
        progress.end()
    text = PackIndex(tuple(packed), tuple(shards)).to_json()
    if text != before:
        try:
            store.write(INDEX, text, expected=version)
        except PreconditionFailed:
            raise StorageError(
                f"{target_uri}: somebody else made a pack there at the same time",
                mend="run it again if theirs is not of the same data",
            ) from None
    old = sorted(there.keys() - {INDEX} - {shard.name for shard in shards})
    left = 0
    for number, key in enumerate(old):  # of an earlier pack, or of one that was killed
        try:
            store.delete(key)
        except AccessDenied:
            left = len(old) - number  # they only take space
            break
    return Packed(len(files), size, len(shards), uploaded, left)


# ---------------------------------------------------------------- sources


class _Folder:
    """Files below a folder."""

    def __init__(self, uri: str, folder: Path) -> None:
        self._folder = folder
        if not folder.is_dir():
            raise DataError(f"{uri}: no such folder", mend="check the first argument")

    def files(self) -> list[Listed]:
        """All files, sorted by path; links are followed, hidden ones left out.

        Raises:
            StorageError: a folder cannot be read.
            DataError: something is neither a file nor a folder.
        """

        def refuse(error: OSError) -> NoReturn:
            raise StorageError.from_os("read", error.filename, error) from error

        found = []
        seen = {self._folder.resolve()}  # a link to a folder above would lead in circles
        for parent, folders, names in os.walk(self._folder, onerror=refuse, followlinks=True):
            folders[:] = [n for n in folders if Path(parent, n).resolve() not in seen]
            seen.update(Path(parent, name).resolve() for name in folders)
            for name in names:
                path = Path(parent, name).relative_to(self._folder).as_posix()
                if not _is_hidden(path):
                    found.append(Listed(path, path, _size_of(Path(parent, name)), ""))
        return sorted(found, key=lambda file: file.path)

    @contextlib.contextmanager
    def local(
        self, files: Sequence[Listed], scratch: Path, stopped: Callable[[], bool]
    ) -> Iterator[Path]:
        """A folder with these files."""
        yield self._folder


def _size_of(path: Path) -> int:
    try:
        about = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: is a link to nothing", mend="remove it") from None
    except OSError as error:
        raise StorageError.from_os("read", path, error) from error
    if not stat.S_ISREG(about.st_mode):
        raise DataError(f"{path}: is neither a file nor a folder", mend="remove it")
    return about.st_size


class _Bucket:
    """Objects under a prefix."""

    def __init__(self, store: S3Store) -> None:
        self._source = S3Source(store)
        self._origin: Origin = self._source.origin

    def files(self) -> list[Listed]:
        """All objects, sorted by path; hidden ones left out."""
        found = [item for item in self._source.listing() if not _is_hidden(item.path)]
        return sorted(found, key=lambda file: file.path)

    @contextlib.contextmanager
    def local(
        self, files: Sequence[Listed], scratch: Path, stopped: Callable[[], bool]
    ) -> Iterator[Path]:
        """A folder with these files, as long as the block lasts."""
        folder = scratch / "files"
        units = [Whole(file.key, file.size, file.etag, file.path) for file in files]
        try:
            transfer(self._origin, units, folder, arrived=lambda _: None, stopped=stopped)
            yield folder
        except ObjectChanged as changed:
            raise DataError(
                f"{changed}: changed while it was packed", mend="run it again"
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _open_source(uri: str) -> _Folder | _Bucket:
    store = open_store(uri)
    folder = store.local_path("")
    return _Bucket(cast("S3Store", store)) if folder is None else _Folder(uri, folder)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _check(files: Sequence[Listed], uri: str) -> None:
    if not files:
        raise DataError(f"{uri}: holds no files", mend="check the first argument")
    for file in files:
        check_path(file.path, f"{uri}/{file.path}")
        if file.path == INDEX:
            raise DataError(f"{uri}: is a pack already", mend="give the data it was made of")
        if is_archive(file.path):
            raise DataError(
                f"{uri}/{file.path}: an archive in a pack would stay packed",
                mend="unpack it there first",
            )
    check_collisions([file.path for file in files], uri)


def _refuse_overlap(source_uri: str, target_uri: str) -> None:
    ends = []
    for uri in (source_uri, target_uri):
        folder = open_store(uri).local_path("")
        ends.append(f"{folder.resolve() if folder else uri.rstrip('/')}/")
    if ends[0].startswith(ends[1]) or ends[1].startswith(ends[0]):
        raise ConfigError(
            f"{target_uri}: lies in {source_uri}, or the other way round",
            mend="choose a folder beside the data",
        )


# ---------------------------------------------------------------- shards


def _cut(files: Sequence[Listed]) -> Iterator[list[Listed]]:
    """Share the files out to shards; where one ends depends on the files near its end only."""
    group: list[Listed] = []
    size = 0
    for file in files:
        if group and size + file.size > SHARD_MAX_BYTES:
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
        chance = zlib.crc32(file.path.encode()) / 2**32
        if size >= SHARD_MIN_BYTES and chance < file.size / CUT_EVERY_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_tar(
    scratch: Path, folder: Path, files: Sequence[Listed], stopped: Callable[[], bool]
) -> tuple[Path, list[tuple[str, int]]]:
    """Write a shard; returns it, and the SHA-256 and offset of each file in it."""
    path = scratch / "shard.tar"
    members = []
    with (
        explained_write(path),
        tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar,
    ):
        for file in files:
            if stopped():
                raise Preempted("stopped while data was packed; run the same command again")
            info = tarfile.TarInfo(file.path)  # time 0, owner 0, mode 644
            info.size = file.size
            with _open_to_read(folder / file.path) as content:
                hashing = _Hashing(content)
                try:
                    tar.addfile(info, hashing)
                except OSError as error:
                    if error.errno is not None:
                        raise
                    raise DataError(
                        f"{folder / file.path}: changed while it was packed", mend="run it again"
                    ) from None
            padded = -(-file.size // _BLOCK) * _BLOCK
            members.append((hashing.sha256.hexdigest(), tar.offset - padded))
    return path, members


def _open_to_read(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise StorageError.from_os("read", path, error) from error


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        data = self._file.read(size)
        self.sha256.update(data)
        return data


def describe(packed: Packed) -> str:
    """One line for the user."""
    return (
        f"{packed.files} files, {megabytes(packed.size)}, in {packed.shards} shards; "
        f"{packed.uploaded} of them written, {packed.shards - packed.uploaded} were there"
        + (
            f"\nnote: {packed.left} shards of an earlier pack stay, as they may not be deleted "
            "(s3:DeleteObject); nobody reads them, and they only take space"
            if packed.left
            else ""
        )
    )
