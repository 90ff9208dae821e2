"""Unpacking tar and zip files that somebody else made, without trusting them."""

from __future__ import annotations

import contextlib
import functools
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from job.errors import DataError, Preempted, StorageError
from job.heartbeat import beat
from job.storage.progress import megabytes
from job.storage.units import explained_write, open_new

ENDINGS = (".tar", ".tar.gz", ".tgz", ".zip")
FOREIGN = "__MACOSX/"
"""What macOS puts beside the files when it makes a zip."""
TEXTS = frozenset({"readme", "readme.md", "readme.txt", "license", "license.md", "license.txt"})
"""Names of files that each archive of a data set may have, as Cityscapes' do. They are no data, and
left out, so that several archives make one tree."""
MARK = "dataset.yaml"
"""A single folder at the top that holds this is left out of the names."""


@dataclass(frozen=True)
class _Entry:
    """A file in an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(name: str) -> bool:
    """By its ending."""
    return name.lower().endswith(ENDINGS)


def unpack(
    archive: Path, folder: Path, *, called: str, stopped: Callable[[], bool]
) -> dict[str, Path]:
    """Unpack an archive into an empty folder; returns the files by their names, with slashes.

    TEXTS are left out.

    Names that lead out of the folder, links and devices are refused, and so is a file larger than
    what is free on the disk (none can turn out larger than it says). A single folder at the top
    that holds dataset.yaml is left out of the names.

    Args:
        archive: a file.
        folder: made if absent.
        called: the archive's name for messages.
        stopped: asked before each file.

    Raises:
        DataError: it is damaged or contains what must not be.
        StorageError: the folder cannot be written.
        Preempted: stopped.
    """
    files: dict[str, Path] = {}
    folders: set[str] = set()
    try:
        with contextlib.closing(_entries(archive)) as entries:
            for entry in entries:
                beat()
                if stopped():
                    raise Preempted("stopped while data was unpacked; run the same command again")
                if PurePosixPath(entry.name).name.lower() in TEXTS:
                    continue
                parents = _parents(entry.name)
                if entry.name in folders or not files.keys().isdisjoint(parents):
                    raise _Refused(f"{entry.name} is a file and a folder in it")
                folders.update(parents)
                files[entry.name] = folder / entry.name
                _extract(entry, files[entry.name], called)
    except _Refused as refused:
        raise DataError(f"{called}: {refused}", mend="make the archive without it") from None
    except (NotImplementedError, RuntimeError) as error:  # zipfile: a method, a password
        raise DataError(
            f"{called}: cannot be unpacked ({error})", mend="make it as a plain zip or tar"
        ) from error
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{called}: is damaged ({error})", mend="make it again and upload it again"
        ) from error
    return _without_top(files)


class _Refused(Exception):
    """Something in an archive that must not be there."""


def _extract(entry: _Entry, target: Path, called: str) -> None:
    with explained_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    if entry.size > free:
        raise StorageError(
            f"{called}: {entry.name} needs {megabytes(entry.size)}, {megabytes(free)} are free in "
            f"{target.parent}",
            mend="set S4GAN_SCRATCH to a folder on a larger disk",
        )
    with entry.open() as content:
        with explained_write(target):
            out = open_new(target)
        try:
            while piece := content.read(2**20):
                with explained_write(target):
                    out.write(piece)
        finally:
            with explained_write(target):
                out.close()


def _entries(archive: Path) -> Generator[_Entry, None, None]:
    """The files of an archive, one after the other; links and devices are refused."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if info.is_dir() or info.filename.startswith(FOREIGN):
                    continue
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise _Refused(f"{info.filename} is a link")
                opener = functools.partial(file.open, info)
                yield _Entry(_safe(info.filename), info.file_size, opener)
        return
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would remember all of them
            if member.isdir():
                continue
            if not member.isreg():
                raise _Refused(f"{member.name} is a {'link' if _is_link(member) else 'device'}")
            yield _Entry(_safe(member.name), member.size, functools.partial(_content, tar, member))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None  # it is a regular file
    return content


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.issym() or member.islnk()


def _safe(name: str) -> str:
    parts = [part for part in name.split("/") if part != "."]
    if not parts or any(part in ("", "..") for part in parts) or "\0" in name:
        raise _Refused(f"the name {name!r} leads out of the data set")
    return "/".join(parts)


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def _without_top(files: dict[str, Path]) -> dict[str, Path]:
    tops = {name.partition("/")[0] for name in files}
    if len(tops) == 1 and f"{(top := next(iter(tops)))}/{MARK}" in files:
        return {name.removeprefix(f"{top}/"): path for name, path in files.items()}
    return files
