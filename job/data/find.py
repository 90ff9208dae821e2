"""Which images a user means: those of a folder, a prefix, a pattern, or a single file."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from job.data.dataset import IMAGE_ENDINGS, files_below, other_pictures
from job.errors import DataError
from job.storage.files import local_copy
from job.storage.progress import TransferProgress
from job.storage.sync import data_folder

_WILD = "*?["
_ENDINGS = f"images end in {', '.join(sorted(IMAGE_ENDINGS))}"


@contextlib.contextmanager
def images_at(uri: str, progress: TransferProgress) -> Iterator[tuple[Path, list[Path]]]:
    """The folder that names are relative to, and the images; on this machine within the block.

    Images are what a data set takes for them; pictures of other formats are told of.

    Args:
        uri: a folder, an s3:// prefix, a file, or a pattern such as photos/*.jpg.
        progress: told how far those of a store are on their way here, and what is left out.

    Raises:
        DataError: there is none.
    """
    name = uri.rpartition("/")[2]
    if Path(uri).is_file() and PurePosixPath(name).suffix.lower() not in IMAGE_ENDINGS:
        raise DataError(f"--images {uri}: its name does not end as one of an image", mend=_ENDINGS)
    if _is_pattern(uri):
        pattern = uri[len(_fixed_part(uri)) :].lstrip("/")
        with data_folder(place_of(uri), progress=progress) as root:
            _require_folder(root, place_of(uri))
            files = [
                path
                for path in files_below(root)
                if _matches(path.relative_to(root).as_posix(), pattern)
            ]
            yield root, _images_of(files, uri, "no image has such a name", progress)
    elif _is_single(uri):
        with local_copy(uri, name="--images", mend="give an image, a folder or a prefix") as path:
            yield path.parent, [path]
    else:
        with data_folder(uri, progress=progress) as root:
            _require_folder(root, uri)
            yield root, _images_of(files_below(root), uri, "holds no image", progress)


def place_of(uri: str) -> str:
    """The folder or prefix that names of images are relative to."""
    if _is_pattern(uri):
        return _fixed_part(uri) or "."
    if _is_single(uri):
        return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")
    return uri


def _is_pattern(uri: str) -> bool:
    return any(sign in uri for sign in _WILD) and not Path(uri).exists()


def _is_single(uri: str) -> bool:
    """Whether it is one image, by its name."""
    name = uri.rpartition("/")[2]  # "a.png/" is a folder
    return PurePosixPath(name).suffix.lower() in IMAGE_ENDINGS and not Path(uri).is_dir()


def _fixed_part(uri: str) -> str:
    """The folder before the first part with a wildcard."""
    parts = uri.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in _WILD))
    if first == 0:
        return ""
    return "/".join(parts[:first]) or "/"


def _matches(path: str, pattern: str) -> bool:
    """As a shell does it: * stays within a folder, ** is any number of them, none too."""
    return _parts_match(path.split("/"), pattern.split("/"))


def _parts_match(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        rest = wanted[1:] or ["*"]  # at the end: all files below
        return any(_parts_match(parts[skipped:], rest) for skipped in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], wanted[0])
        and _parts_match(parts[1:], wanted[1:])
    )


def _require_folder(root: Path, uri: str) -> None:
    if not root.is_dir():
        raise DataError(
            f"--images {uri}: no such folder or image", mend="check the path; s3:// for a prefix"
        )


def _images_of(
    files: Sequence[Path], uri: str, said: str, progress: TransferProgress
) -> list[Path]:
    paths = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS and path.is_file()]
    others = other_pictures(files)
    left_out = f"{len(others)} pictures of other formats are left out" if others else ""
    if not paths:
        raise DataError(f"--images {uri}: {said}" + f"; {left_out}" * bool(others), mend=_ENDINGS)
    if others:
        progress.say(f"warning: {uri}: {left_out} (first: {others[0].name}): {_ENDINGS}")
    return paths
