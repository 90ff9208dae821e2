"""What a drill changes around it, and takes care not to change."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from job.errors import ConfigError

_MARK = ".made-by-s4gan-drill"


def empty_folder(folder: Path) -> None:
    """Make a folder, or empty one that was made here before.

    Raises:
        ConfigError: it holds something that is not ours to delete.
    """
    if folder.exists() and not (folder / _MARK).exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder}: is not empty, and was not made by a drill", mend="name a new folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


@contextlib.contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within the block these variables are set; afterwards all is as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
