"""`LocalStore`: objects as plain files under a folder.

A write goes to a temporary file beside its target, is flushed to the disk and renamed, so a reader
(or the next attempt after a power cut) sees the old content or the new, never a mixture.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from job.errors import ObjectNotFound, PreconditionFailed, StorageError
from job.storage.store import ABSENT, ObjectInfo

_TEMPORARY = ".tmp-"
_LOCK = ".lock"


class LocalStore:
    """An `ObjectStore` in a folder, which is created at the first write.

    A conditional write compares and renames under a lock file, so it is atomic among the processes
    of all machines that share the folder (flock; on NFS too since version 4).
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._uri = str(root)

    @property
    def uri(self) -> str:
        """The folder, as it was named."""
        return self._uri

    def below(self, path: str) -> LocalStore:
        """See `ObjectStore`."""
        return LocalStore(Path(self._uri) / path)

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""
        with self._explained("read", key):
            return self._path(key).read_bytes()

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        """See `ObjectStore.read_versioned`; the version is a hash of the content."""
        try:
            data = self.read(key)
        except ObjectNotFound:
            return b"", ABSENT
        return data, _version(data)

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        """See `ObjectStore.write`."""
        with self._explained("write", key):
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() if expected is not None else contextlib.nullcontext():
                if expected is not None:
                    _, found = self.read_versioned(key)
                    if found != expected:
                        raise PreconditionFailed(f"{path}: changed by somebody else")
                with _replacing(path) as temporary, open(temporary, "wb") as file:
                    file.write(data)
                    os.fsync(file.fileno())
        return _version(data)

    def upload(self, path: Path, key: str) -> None:
        """See `ObjectStore.upload`; a link, not a copy, where the file system can."""
        with self._explained("write", key):
            target = self._path(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(target) as temporary:
                _link_or_copy(path, temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())

    def fetch(self, key: str, directory: Path) -> Path:
        """See `ObjectStore.fetch`; the stored file itself."""
        path = self._path(key)
        if not path.is_file():
            raise ObjectNotFound(f"{path}: no such file")
        return path

    def stat(self, key: str) -> ObjectInfo | None:
        """See `ObjectStore.stat`."""
        with self._explained("read", key):
            try:
                return _info(key, self._path(key).stat())
            except FileNotFoundError:
                return None

    def age_s(self, key: str) -> float:
        """See `ObjectStore.age_s`; by the clock that stamps a new file, a file server's own."""
        with self._explained("read", key):
            written = self._path(key).stat().st_mtime
            try:
                with tempfile.TemporaryFile(dir=self.root) as now:
                    now.write(b".")
                    now.flush()
                    return os.fstat(now.fileno()).st_mtime - written
            except OSError:  # a full disk, or somebody who may only look: our own clock has to do
                return time.time() - written

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        folder = self._path(prefix.rpartition("/")[0])
        found = []
        with self._explained("list", prefix):
            for path in folder.rglob("*"):
                key = path.relative_to(self.root).as_posix()
                ours = not path.name.startswith(_TEMPORARY) and path.name != _LOCK
                if ours and key.startswith(prefix) and path.is_file():
                    with contextlib.suppress(FileNotFoundError):  # deleted at this very moment
                        found.append(_info(key, path.stat()))
        return iter(sorted(found, key=lambda info: info.key))

    def copy(self, source: str, target: str, *, expected: str | None = None) -> None:
        """See `ObjectStore.copy`; a second link to the same file."""
        path = self.fetch(source, self.root)
        locked = self._locked() if expected is not None else contextlib.nullcontext()
        with self._explained("write", target), locked:
            if expected is not None:
                found = self.stat(target)
                if (found.version if found else ABSENT) != expected:
                    raise PreconditionFailed(f"{self._path(target)}: changed by somebody else")
            self.upload(path, target)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`; folders left empty go too."""
        path = self._path(key)
        with self._explained("delete", key):
            path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:
                break  # not empty: other objects live there

    def local_path(self, key: str) -> Path | None:
        """See `ObjectStore.local_path`."""
        return self._path(key)

    def remove_leftovers(self) -> None:
        """Delete temporary files of writers that were killed; for the sole owner of the folder."""
        for path in self.root.rglob(f"{_TEMPORARY}*"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if ".." in key.split("/"):
            raise StorageError(f"{key}: a key must not contain '..'")
        return self.root / key

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.root / _LOCK, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel even if we are killed
            yield

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turn the system's errors into ours, with a mend."""
        try:
            yield
        except FileNotFoundError:
            raise ObjectNotFound(f"{self._path(key)}: no such file") from None
        except OSError as error:
            raise StorageError.from_os(verb, self._path(key), error) from error


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    """The version of a file of any size: every write here makes a new inode."""
    version = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
    return ObjectInfo(key, status.st_size, version)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that replaces it if the block succeeds."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
