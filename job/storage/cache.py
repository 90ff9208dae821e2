"""`DataCache`: complete, immutable copies of a data set on this machine's disk.

    lock                 held while a set is gathered or looked up
    incoming/            the set that is being gathered
    incoming.jsonl       which of its files are complete; so a killed process's work is not lost
    archives/, unpacked/ tar and zip files on their way
    sets/ID/             a set: appears by one rename, complete and verified, and never changes
    sets/ID.json         what is in it; written before
    sets/ID.lock         readers hold a shared lock on it; a set that nobody holds may be deleted

Knows nothing of where the files come from: a file is what its tag says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from job.errors import Preempted
from job.heartbeat import beat
from job.storage.digests import file_has
from job.storage.large import JOURNAL, boot_id
from job.storage.units import PART, explained_write, part_of

FORMAT = 1
POLL_S = 0.2
_INCOMING = "incoming"
_JOURNAL = "incoming.jsonl"
_SETS = "sets"
_FILES = ', "files": [\n'
_END = "]}"
_ENTRY = ("path", "size", "mtime_ns", "tag", "check")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a set. There may be a million: hence the slots."""

    path: str
    """Below the set, with slashes."""
    size: int
    mtime_ns: int
    tag: str
    """Says which content it is, in the words of where it came from; compared, never computed."""
    check: str
    """See `digests.check_of`."""

    def values(self) -> tuple[str, int, int, str, str]:
        """All of it, in order."""
        return self.path, self.size, self.mtime_ns, self.tag, self.check


@dataclass(frozen=True)
class ArchiveEntry:
    """An archive whose files are in a set."""

    key: str
    tag: str
    paths: tuple[str, ...]


@dataclass
class SetContent:
    """What a set, or the part of one that has been gathered, consists of."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    archives: dict[str, ArchiveEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """A complete set."""

    id: str
    fingerprint: str
    """Of the listing it was made from."""
    boot: str
    content: SetContent


class DataCache:
    """All sets of one data URI.

    Args:
        folder: of this URI alone; made by `locked`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.incoming = folder / _INCOMING
        self.archives = folder / "archives"
        self.unpacked = folder / "unpacked"
        self._journal_path = folder / _JOURNAL
        self._sets = folder / _SETS
        self._journal: IO[str] | None = None

    @contextlib.contextmanager
    def locked(self, *, stopped: Callable[[], bool], waiting: Callable[[], None]) -> Iterator[int]:
        """Be the only one who gathers or looks up; yields the lock's descriptor.

        Args:
            stopped: asked while waiting for another process.
            waiting: told once if there is one.

        Raises:
            StorageError: the folder cannot be written.
            Preempted: stopped.
        """
        with explained_write(self.folder):
            self._sets.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            told = False
            while not try_lock(lock, fcntl.LOCK_EX):
                if not told:
                    waiting()
                    told = True
                if stopped():
                    raise Preempted("stopped while another process brought the data")
                beat()  # to wait for who is at work is no stall
                time.sleep(POLL_S)
            yield lock
        finally:
            self._close_journal()
            # Explicitly: a worker that is just ending may still have its copy of the descriptor.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    # ------------------------------------------------------------ sets

    def path_of(self, data: DataSet) -> Path:
        """Folder of a set."""
        return self._sets / data.id

    def sets(self) -> list[DataSet]:
        """Complete sets, the newest first."""
        found = []
        for path in self._sets.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                data = _read_index(path)
                if self.path_of(data).is_dir():
                    found.append((path.stat().st_mtime_ns, data))
        return [data for _, data in sorted(found, key=lambda item: item[0], reverse=True)]

    def intact_files(self, data: DataSet) -> dict[str, FileEntry]:
        """Those files of a set that are still what was put there, by size and time.

        After a restart of the machine also by content: the power may have gone before the disk had
        it all.
        """
        again = data.boot != boot_id()
        folder = self.path_of(data)
        return {
            path: entry
            for path, entry in data.content.files.items()
            if _is_same(folder / path, entry) and (not again or _has(folder / path, entry.check))
        }

    def hold(self, data: DataSet) -> int:
        """Keep a set from being deleted as long as the returned descriptor is open."""
        with explained_write(self.folder):
            lock = os.open(self._lock_path(data.id), os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_SH)
        return lock

    def confirm(self, data: DataSet) -> None:
        """Note that all of a set has been looked at since the machine started."""
        if data.boot != boot_id():
            self._write_index(data.id, data.fingerprint, data.content)

    def delete_others(self, wanted: DataSet) -> None:
        """Delete sets that nobody reads, and what is left of earlier deletions."""
        ids = {path.stem for path in self._sets.iterdir()} - {wanted.id}
        for id_ in ids:
            with explained_write(self._sets):
                lock = os.open(self._lock_path(id_), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if try_lock(lock, fcntl.LOCK_EX):
                    self._index_path(id_).unlink(missing_ok=True)
                    shutil.rmtree(self._sets / id_, ignore_errors=True)
                    self._lock_path(id_).unlink(missing_ok=True)
            finally:
                os.close(lock)

    # ------------------------------------------------------------ gathering

    def resume(self) -> SetContent:
        """What of the incoming set is complete, from an earlier attempt."""
        content, again = SetContent(), True
        # A last line cut off by a kill ends the reading, which is right.
        with (
            contextlib.suppress(OSError, ValueError, TypeError, KeyError),
            open(self._journal_path) as journal,
        ):
            for line in journal:
                raw = json.loads(line)
                if "boot" in raw:
                    again = raw["boot"] != boot_id()
                elif "paths" in raw:
                    content.archives[raw["key"]] = _archive_from(raw)
                else:
                    content.files[raw["path"]] = FileEntry(**raw)
        content.files = {
            path: entry
            for path, entry in content.files.items()
            if _is_same(self.incoming / path, entry)
            and (not again or _has(self.incoming / path, entry.check))
        }
        return content

    def begin(self, kept: SetContent, *, expected: Iterable[str]) -> None:
        """Keep these files of `resume`, delete all others, and write down what comes now.

        Args:
            kept: complete files.
            expected: paths that may have been begun, in parts.
        """
        with explained_write(self.incoming):
            self.incoming.mkdir(parents=True, exist_ok=True)
            left = {path for path in _files_below(self.incoming) if path not in kept.files}
            if left:  # else the names of ten thousand parts would be made for nothing
                for path in expected:
                    for ending in (PART, JOURNAL):
                        left.discard(part_of(Path(path), ending).as_posix())
            for path in left:
                (self.incoming / path).unlink()
            _remove_empty_folders(self.incoming)
            shutil.rmtree(self.unpacked, ignore_errors=True)
            self._close_journal()
            self._journal_path.unlink(missing_ok=True)
            self._journal = open(self._journal_path, "a")  # noqa: SIM115  # until `complete`
        self._write_lines([{"boot": boot_id()}])
        self.record(kept.files.values())
        for archive in kept.archives.values():
            self.record_archive(archive)

    def link(self, data: DataSet, entry: FileEntry) -> FileEntry:
        """Take a file of a complete set over into the incoming one; copied where links fail."""
        source, target = self.path_of(data) / entry.path, self.incoming / entry.path
        with explained_write(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)
            return replace(entry, mtime_ns=target.stat().st_mtime_ns)

    def record(self, entries: Iterable[FileEntry]) -> None:
        """These files are complete in `incoming`."""
        self._write_lines(dict(zip(_ENTRY, entry.values(), strict=True)) for entry in entries)

    def record_archive(self, archive: ArchiveEntry) -> None:
        """The files of this archive, recorded before, are all there."""
        self._write_lines([vars(archive)])

    def complete(self, fingerprint: str, content: SetContent) -> DataSet:
        """Make the incoming files a set, by one rename."""
        id_ = f"{fingerprint[:16]}-{secrets.token_hex(3)}"
        with explained_write(self._sets):
            _remove_empty_folders(self.incoming)
            data = self._write_index(id_, fingerprint, content)
            os.replace(self.incoming, self._sets / id_)
            self._close_journal()
            self._journal_path.unlink()
        return data

    def _write_index(self, id_: str, fingerprint: str, content: SetContent) -> DataSet:
        data = DataSet(id_, fingerprint, boot_id(), content)
        head = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "boot": data.boot,
            "archives": [vars(archive) for archive in content.archives.values()],
        }
        path = self._index_path(id_)
        temporary = path.with_suffix(".tmp")
        with explained_write(path):
            with open(temporary, "w") as file:
                # Entry by entry: all of them as lists take as much memory as the set itself.
                file.write(json.dumps(head)[:-1] + _FILES)
                for number, entry in enumerate(content.files.values()):
                    file.write((",\n" if number else "") + json.dumps(entry.values()))
                file.write("\n" + _END)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        return data

    def _write_lines(self, lines: Iterable[dict[str, Any]]) -> None:
        assert self._journal is not None
        with explained_write(self._journal_path):
            self._journal.writelines(json.dumps(line) + "\n" for line in lines)
            self._journal.flush()

    def _close_journal(self) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError):  # of a full disk, which has been raised before
                self._journal.close()
            self._journal = None

    def _index_path(self, id_: str) -> Path:
        return self._sets / f"{id_}.json"

    def _lock_path(self, id_: str) -> Path:
        return self._sets / f"{id_}.lock"


def _read_index(path: Path) -> DataSet:
    content = SetContent()
    with open(path) as file:
        head = file.readline()
        in_lines = head.endswith(_FILES)  # as `_write_index` does it, once it was all in one
        raw = json.loads(head + _END if in_lines else head)
        if raw["format"] != FORMAT:
            raise ValueError(f"{path}: format {raw['format']}")
        for values in _entries(file) if in_lines else raw["files"]:
            entry = FileEntry(*values)
            content.files[entry.path] = entry
    content.archives = {one["key"]: _archive_from(one) for one in raw["archives"]}
    return DataSet(path.stem, raw["fingerprint"], raw["boot"], content)


def _entries(lines: Iterable[str]) -> Iterator[list[Any]]:
    """What `_write_index` has written of each file.

    Raises:
        ValueError: the end is missing.
    """
    for line in lines:
        if line == _END:
            return
        if line != "\n":  # there is no file at all
            yield json.loads(line.rstrip(",\n"))
    raise ValueError("an index breaks off")


def _archive_from(raw: Mapping[str, Any]) -> ArchiveEntry:
    return ArchiveEntry(raw["key"], raw["tag"], tuple(raw["paths"]))


def _is_same(path: Path, entry: FileEntry) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_size == entry.size and status.st_mtime_ns == entry.mtime_ns


def _has(path: Path, check: str) -> bool:
    try:
        return file_has(path, check)
    except OSError:
        return False


def try_lock(descriptor: int, kind: int) -> bool:
    """Lock an open file or folder (fcntl.LOCK_EX or LOCK_SH) at once; whether that worked."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _files_below(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, from there, with slashes."""
    for parent, _, names in os.walk(folder):
        inner = os.path.relpath(parent, folder)
        for name in names:
            yield name if inner == "." else f"{inner}/{name}"


def _remove_empty_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        if parent != str(folder):
            with contextlib.suppress(OSError):
                os.rmdir(parent)
