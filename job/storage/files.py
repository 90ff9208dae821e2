"""Single files named by a path or a URI."""

from __future__ import annotations

import codecs
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from job.errors import ConfigError, ObjectNotFound
from job.storage import open_store


def text_of(content: bytes, *, errors: str = "strict") -> str:
    """Text in UTF-8, or in UTF-16 as some Windows shells write it; without the mark before it.

    Args:
        content: of a file.
        errors: as for `bytes.decode`.

    Raises:
        UnicodeDecodeError: it is no text, and `errors` is strict.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors)


def write_file(uri: str, data: bytes, *, name: str) -> None:
    """Write a file, whole or not at all.

    Args:
        uri: a path, or s3://BUCKET/KEY.
        data: its content.
        name: of the flag that holds the path, for the error.

    Raises:
        ConfigError: it names no file.
        StorageError: the storage failed.
    """
    folder, _, key = uri.rpartition("/")
    if not key or folder in ("s3:", "s3:/"):
        raise ConfigError(f"{name} {uri}: names no file", mend="give the name of a file")
    open_store(folder or ("/" if uri.startswith("/") else ".")).write(key, data)


@contextlib.contextmanager
def local_copy(uri: str, *, name: str, mend: str) -> Iterator[Path]:
    """A local file with what a path or URI names; a copy lasts as long as the block.

    Args:
        uri: a path, file:// or s3://BUCKET/KEY.
        name: of the flag or key that holds it, for the error.
        mend: likewise, what to give instead.

    Raises:
        ConfigError: there is no such file.
        StorageError: the storage failed.
    """
    folder, _, key = uri.rpartition("/")
    if not key:
        raise ConfigError(f"{name} {uri}: names no file", mend=mend)
    store = open_store(folder or ("/" if uri.startswith("/") else "."))
    with tempfile.TemporaryDirectory(prefix="s4gan-") as scratch:
        try:
            path = store.fetch(key, Path(scratch))
        except ObjectNotFound:
            raise ConfigError(f"{name} {uri}: no such file", mend=mend) from None
        yield path
