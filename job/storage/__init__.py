"""Where runs and data live. `open_store` is the only place that looks at a URI's scheme."""

import re
from pathlib import Path

from job.errors import ConfigError
from job.storage.local import LocalStore
from job.storage.store import ABSENT, ObjectInfo, ObjectStore, is_same_place

__all__ = ["ABSENT", "LocalStore", "ObjectInfo", "ObjectStore", "is_same_place", "open_store"]


def open_store(uri: str) -> ObjectStore:
    """The store behind a URI; nothing is read or written yet.

    Raises:
        ConfigError: a scheme this version does not know, or one that is misspelt.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if re.match("(s3|gs|file|https?):", uri):
            raise ConfigError(
                f"{uri}: a URI has two slashes after the colon",
                mend=f"write s3://BUCKET/PREFIX, or ./{uri} if it is a folder",
            )
        return LocalStore(Path(uri))
    if scheme == "file":
        return LocalStore(Path(rest))
    if scheme == "s3":
        from job.storage.s3 import S3Store  # boto3 takes a while to import

        return S3Store(uri)
    raise ConfigError(
        f"{uri}: this version reads and writes folders and s3://, not {scheme}://",
        mend="give the path of a folder, or s3://BUCKET/PREFIX",
    )
