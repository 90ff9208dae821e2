"""Stores for tests that hold for a folder and a bucket, and stores that misbehave on purpose."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job import run
from job.storage import LocalStore, ObjectStore
from job.storage.s3 import S3Store

KINDS = ("folder", "bucket")


@contextlib.contextmanager
def open_kind(kind: str, request: pytest.FixtureRequest, name: str = "run") -> Iterator[Any]:
    """A new, empty store: a folder below tmp_path, or a prefix of the emptied bucket."""
    if kind == "folder":
        yield LocalStore(request.getfixturevalue("tmp_path") / name)
        return
    request.getfixturevalue("s3_env")
    store = S3Store(f"s3://{request.getfixturevalue('bucket')}/runs/{name}")
    with contextlib.closing(store.client):
        yield store


class Passing:
    """An `ObjectStore` that hands everything on to another; those that misbehave derive from it."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class MortalStore(Passing):
    """Dies before its n-th change from when `changes_left` is set; the lease does not count."""

    changes_left = -1

    def _change(self) -> None:
        if self.changes_left == 0:
            raise Killed
        self.changes_left -= 1

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        if key != run.LEASE:
            self._change()
        return self.inner.write(key, data, expected=expected)

    def upload(self, path: Path, key: str) -> None:
        self._change()
        self.inner.upload(path, key)

    def copy(self, source: str, target: str, *, expected: str | None = None) -> None:
        self._change()
        self.inner.copy(source, target, expected=expected)

    def delete(self, key: str) -> None:
        self._change()
        self.inner.delete(key)


class Slow(Passing):
    """Uploads wait at a gate and fail as told; everything else passes."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.failures: list[BaseException] = []
        self.uploads: list[str] = []

    def upload(self, path: Path, key: str) -> None:
        self.uploads.append(key)
        self.waiting.set()
        self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.inner.upload(path, key)

    def close_gate(self) -> None:
        self.waiting.clear()
        self.gate.clear()
