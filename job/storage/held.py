"""Folders that are worth something only while a process works with them, whoever ends it how."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

DECODED = "decoded"
"""Below `scratch_root`: what `job.data.decoded` keeps there."""


@contextlib.contextmanager
def kept_within(folder: Path) -> Iterator[None]:
    """Hold a folder within this block, and remove those that nobody holds.

    At the beginning what killed processes have left beside it; at the end the folder itself, unless
    another run uses it. It is held by a lock on the folder, which the kernel takes from a process
    however that ends, also if it is another container's.
    """
    held = _hold(folder)
    remove_leftovers(folder.parent)
    try:
        yield
    finally:
        if held is None or _lock_alone(held):
            shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """A descriptor that holds a folder until it is closed; None where that cannot be."""
    with contextlib.suppress(OSError):  # a disk that takes nothing is told of when it is written to
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(held), os.stat(folder)):
                    return held
            except FileNotFoundError:
                pass  # removed by another process between the two
            except OSError:
                os.close(held)
                raise
            os.close(held)
    return None


def remove_leftovers(place: Path) -> None:
    """Remove the folders in `place` that no living process holds."""
    with contextlib.suppress(OSError):
        for folder in list(place.iterdir()):
            with contextlib.suppress(OSError):  # no folder, or gone by now
                held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if _lock_alone(held, if_unknown=False):
                        shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(held)


def _lock_alone(held: int, *, if_unknown: bool = True) -> bool:
    """Whether nobody else holds a folder; then nobody else can until the descriptor is closed."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no such locks
        return if_unknown
    return True
