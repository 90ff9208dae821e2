"""Bringing a data set to the attempt's own disk."""

from __future__ import annotations

from pathlib import Path

from job.errors import ConfigError
from job.storage import open_store


def bring_data(uri: str) -> Path:
    """A local folder with the data of `uri`; a folder is used where it lies, nothing is copied.

    Raises:
        ConfigError: the URI is not one this version can read.
    """
    folder = open_store(uri).local_path("")
    if folder is None:
        raise ConfigError(f"{uri}: not a local folder", mend="give the path of a folder")
    return folder
