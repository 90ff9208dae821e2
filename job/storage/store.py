"""The `ObjectStore` protocol: what the program asks of a folder or a bucket, and nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ABSENT = ""
"""The version of an object that does not exist, for conditional writes."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object."""

    key: str
    size: int
    """Bytes."""
    version: str = ABSENT
    """Changes whenever the object is written; S3's ETag. Only ever compared, never computed."""


class ObjectStore(Protocol):
    """Objects under keys relative to one URI. Every write is atomic: all of it or nothing.

    All methods raise `StorageError` when the storage refuses or fails (`ConfigError` where keys or
    URI are wrong); "not there" is `ObjectNotFound` (or None, or no item), never anything else, and
    nothing else is "not there".
    """

    @property
    def uri(self) -> str:
        """Where the keys live, as the user would write it."""

    def below(self, path: str) -> ObjectStore:
        """The store of a folder or prefix within this one, over the same connections."""

    def read(self, key: str) -> bytes:
        """Content of a small object."""

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        """Content and version of a small object; (b"", ABSENT) if there is none."""

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        """Write a small object; returns its version.

        Args:
            key: where.
            data: its content. With `expected`, no other writer may write the same bytes: where a
                reply is lost, equal content is how a writer recognises its own success.
            expected: the version the object must have now (ABSENT: none); None writes anyway.

        Raises:
            PreconditionFailed: somebody else wrote in between; nothing was changed.
        """

    def upload(self, path: Path, key: str) -> None:
        """Store a local file of any size. The file stays where it is."""

    def fetch(self, key: str, directory: Path) -> Path:
        """A local file with the object's content, for reading only.

        In `directory` under the key's last part, or the stored file itself where it is local.
        """

    def stat(self, key: str) -> ObjectInfo | None:
        """Size and version of an object; None if it is not there."""

    def age_s(self, key: str) -> float:
        """Seconds since the object was last written, by the storage's own clock.

        The clocks of two machines may differ by minutes; the storage has only one.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, sorted by key."""

    def copy(self, source: str, target: str, *, expected: str | None = None) -> None:
        """Make `target` the same object as `source`, without moving data where possible.

        Args:
            source: an object.
            target: where.
            expected: as in `write`, with the version that `stat` gave.

        Raises:
            PreconditionFailed: as in `write`; or the reply to our own copy was lost, so look again.
        """

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is not there."""

    def local_path(self, key: str) -> Path | None:
        """The file an object is (or would be) kept in; None where storage is not a folder."""


def is_same_place(one: ObjectStore, other: ObjectStore) -> bool:
    """Whether two stores are one, however they are written: a folder by a link, or relative."""
    here, there = one.local_path(""), other.local_path("")
    if here is None or there is None:
        return here is there and one.uri == other.uri
    return here.resolve() == there.resolve()
