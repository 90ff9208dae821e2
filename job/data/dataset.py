"""What a data set is, and the layout of our own: which images there are, which have masks.

    DATA/dataset.yaml            classes, ignore_index, palette
    DATA/train/images/NAME.jpg   DATA/train/masks/NAME.png
    DATA/val/images/NAME.jpg     DATA/val/masks/NAME.png      (optional)

An image without a mask is unlabeled. Names may contain folders; an id is the path below `images/`
without its ending. Other layouts are in `job.data.layouts`.
"""

from __future__ import annotations

import colorsys
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from job.data.names import TRAINING, Names
from job.errors import DataError

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
MASK_ENDINGS = frozenset({".png"})
_UNREAD_ENDINGS = frozenset({".tif", ".tiff", ".bmp", ".gif"})
NOT_MASK_ENDINGS = (IMAGE_ENDINGS | _UNREAD_ENDINGS) - MASK_ENDINGS
"""Pictures that somebody took for masks; left out in silence they would cost labels."""
_OTHER_ENDINGS = _UNREAD_ENDINGS | {".heic", ".avif", ".jp2"}
MAX_CLASSES = 255
"""Masks are 8 bit, and one value must stay free for "ignore"."""

IGNORE = 255
"""Mask value of ignored pixels inside the program, whatever the files call it."""
UNKNOWN = -1
"""In `DatasetInfo.meanings`: a mask value that must not occur."""

MARK = "dataset.yaml"
FOLDER = "folder"
"""Our own layout, as `data.layout` calls it."""
_KEYS = ("classes", "ignore_index", "palette")


@dataclass(frozen=True)
class DatasetInfo:
    """The classes of a data set, and how its masks say them."""

    classes: tuple[str, ...]
    """Names in index order."""
    ignore_index: int
    """Mask value of pixels that count for nothing, 0..255."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB of each class, 0..255."""
    file_labels: tuple[tuple[int, int], ...] = ()
    """Where mask values are no class numbers: each value that may occur, and the class it means, or
    IGNORE. `ignore_index` counts besides. Empty: a value is the number of its class."""

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignored one."""
        return len(self.classes)

    @cached_property
    def meanings(self) -> NDArray[np.int16]:
        """What each mask value means: a class, IGNORE or UNKNOWN. Shape: (256,)."""
        meanings = np.full(256, UNKNOWN, np.int16)
        for value, meaning in self.file_labels or enumerate(range(self.num_classes)):
            meanings[value] = meaning
        meanings[self.ignore_index] = IGNORE
        return meanings

    @cached_property
    def lookup(self) -> bytes:
        """`meanings` for reading masks: 256 bytes, a class or IGNORE.

        What is UNKNOWN stays as it is, so that a network is never taught what nobody has said; the
        checks refuse such a mask before.
        """
        values = np.arange(256)
        return np.where(self.meanings == UNKNOWN, values, self.meanings).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Item:
    """One image, with its mask if it has one."""

    id: str
    image: Path
    mask: Path | None


@dataclass(frozen=True)
class Dataset:
    """Everything found under a data folder, sorted by id."""

    root: Path
    info: DatasetInfo
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    """Empty when there is no `val/` folder, and no list of them."""
    warnings: tuple[str, ...]
    layout: str = FOLDER
    """How it is laid out, as `data.layout` calls it."""
    labeled: tuple[str, ...] | None = None
    """Ids of the training images that a list or a permutation calls labeled; None: nothing does."""
    unlabeled: tuple[str, ...] | None = None
    """Ids of those that a list calls unlabeled; None: all the others are."""


def scan_folder(root: Path, names: Names = TRAINING, *, needs_train: bool = True) -> Dataset:
    """List a data folder of our own layout; opens no image.

    Args:
        root: the data folder.
        names: of the settings, for advice.
        needs_train: False: there may be no training images.

    Raises:
        DataError: no such folder, no images, a broken `dataset.yaml`, a mask without its image,
            or two images of one name.
    """
    info = load_dataset_info(root / MARK)
    has_train = (root / "train" / "images").is_dir()
    if needs_train and not has_train:
        raise DataError(
            f"{root / 'train' / 'images'}: no such folder",
            mend="put the training images there and their masks into train/masks",
        )
    warnings = _misnamed(root)
    train = _scan_split(root / "train", warnings) if has_train else ()
    if needs_train and not train:
        raise DataError(
            f"{root / 'train' / 'images'}: holds no image",
            mend=f"images end in {', '.join(sorted(IMAGE_ENDINGS))}",
        )
    val = _scan_split(root / "val", warnings) if (root / "val").is_dir() else ()
    unlabeled_val = [item for item in val if item.mask is None]
    if unlabeled_val:
        warnings.append(
            f"{len(unlabeled_val)} images in val/images have no mask and are left out "
            f"(first: {unlabeled_val[0].image.name})"
        )
        val = tuple(item for item in val if item.mask is not None)
    if (root / "val").is_dir() and not val:
        raise DataError(
            f"{root / 'val'}: holds no image with a mask",
            mend="add val/images and val/masks"
            + ", or remove val/ to hold out --val-split of train" * names.splits,
        )
    return Dataset(root=root, info=info, train=train, val=val, warnings=tuple(warnings))


_OTHERS = {
    "valid": "validation images are those in val/: rename it",
    "validation": "validation images are those in val/: rename it",
    "test": "s4gan evaluate looks at val/: make a data set of its own of it",
    "unlabeled": "images without a mask go to train/images, too",
    "unlabelled": "images without a mask go to train/images, too",
}
"""Folders that somebody may take to be read, and what is to be done."""


def _misnamed(root: Path) -> list[str]:
    """What lies beside train/ and val/ as if it counted."""
    there = [entry for entry in sorted(root.iterdir()) if entry.is_dir()]
    return [
        f"{entry.name}/ is not read; {_OTHERS[entry.name.lower()]}"
        for entry in there
        if entry.name.lower() in _OTHERS
    ]


def load_dataset_info(path: Path, known: DatasetInfo | None = None) -> DatasetInfo:
    """Read and check `dataset.yaml`.

    Args:
        path: of the file.
        known: what the layout says of the classes; the file may rename and recolour them.

    Raises:
        DataError: absent, unreadable, a wrong key or value, or not as many classes as are known.
    """
    example = "classes: [sky, road]\n        ignore_index: 255"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: not there", mend=f"write one beside train/, for example\n        {example}"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: must hold keys, for example\n        {example}")
    for key in raw:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else f" (valid: {', '.join(_KEYS)})"
            raise DataError(f"{path}: unknown key {key}{hint}")
    classes = raw.get("classes", list(known.classes) if known else None)
    if not isinstance(classes, list) or not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(f"{path}: classes must be a list of 2 to {MAX_CLASSES} names")
    for name in classes:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise DataError(
                f"{path}: {name!r} is no class name",
                mend="put names such as on, off, yes, no and null in quotes",
            )
    names = tuple(str(name) for name in classes)
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two classes have the same name")
    if known and len(names) != known.num_classes:
        raise DataError(
            f"{path}: has {len(names)} classes, the masks of this layout have {known.num_classes}",
            mend="name all of them, in their order, or leave classes out",
        )
    ignore_index = raw.get("ignore_index", known.ignore_index if known else 255)
    if not isinstance(ignore_index, int) or not 0 <= ignore_index <= 255:
        raise DataError(f"{path}: ignore_index must be 0..255, got {ignore_index!r}")
    if ignore_index < len(names):
        raise DataError(
            f"{path}: ignore_index {ignore_index} is also the class {names[ignore_index]}",
            mend=f"use a value from {len(names)} to 255 in the masks and here",
        )
    file_labels = known.file_labels if known else ()
    meant = dict(file_labels).get(ignore_index, IGNORE)
    if meant != IGNORE:
        raise DataError(
            f"{path}: ignore_index {ignore_index} is in these masks the class {names[meant]}",
            mend="leave ignore_index out",
        )
    if known and raw.get("palette") is None:
        return DatasetInfo(names, ignore_index, known.palette, file_labels)
    palette = _palette(raw.get("palette"), len(names), path)
    return DatasetInfo(names, ignore_index, palette, file_labels)


def _palette(raw: Any, num_classes: int, path: Path) -> tuple[tuple[int, int, int], ...]:
    if raw is None:
        return default_palette(num_classes)
    try:
        palette = tuple((r, g, b) for r, g, b in raw)
        whole = all(isinstance(channel, int) for colour in palette for channel in colour)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise DataError(
            f"{path}: palette must be a list of [red, green, blue] in whole numbers of 0..255"
        )
    if len(palette) < num_classes or any(not 0 <= c <= 255 for rgb in palette for c in rgb):
        raise DataError(f"{path}: palette needs {num_classes} colours of 0..255")
    return palette[:num_classes]


def default_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Well separated colours: hues by the golden angle, in two brightnesses."""
    colours = []
    for index in range(num_classes):
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.75, 0.95 if index % 2 else 0.7)
        colours.append((round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])))
    return tuple(colours)


def _scan_split(folder: Path, warnings: list[str]) -> tuple[Item, ...]:
    image_files, mask_files = files_below(folder / "images"), files_below(folder / "masks")
    images = _by_id(image_files, folder / "images", IMAGE_ENDINGS)
    masks = _by_id(mask_files, folder / "masks", MASK_ENDINGS)
    left_out = other_pictures(image_files)
    if left_out:
        warnings.append(
            f"{len(left_out)} files in {folder / 'images'} are left out (first: "
            f"{left_out[0].name}): images end in {', '.join(sorted(IMAGE_ENDINGS))}"
        )
    others = [path for path in mask_files if path.suffix.lower() in NOT_MASK_ENDINGS]
    if others:
        raise DataError(
            f"{others[0]}: masks must be PNG; {len(others)} such files",
            mend="save them as 8-bit index PNGs (JPEG changes the numbers)",
        )
    orphans = sorted(set(masks) - set(images))
    if orphans:
        near = difflib.get_close_matches(orphans[0], images, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(
            f"{masks[orphans[0]]}: no image of that name in {folder / 'images'}{hint}; "
            f"{len(orphans)} such masks",
            mend="give image and mask the same name, without a suffix such as _mask, and the image "
            f"a format of {', '.join(sorted(IMAGE_ENDINGS))}",
        )
    return tuple(Item(id_, path, masks.get(id_)) for id_, path in sorted(images.items()))


def files_by_id(folder: Path, endings: frozenset[str]) -> dict[str, Path]:
    """Files below a folder by their path below it without its ending, sorted by path.

    Raises:
        DataError: two differ in their ending only.
    """
    return _by_id(files_below(folder), folder, endings)


def _by_id(files: Sequence[Path], folder: Path, endings: frozenset[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        if path.suffix.lower() not in endings:
            continue
        id_ = path.relative_to(folder).with_suffix("").as_posix()
        if id_ in found:
            raise DataError(
                f"{path}: has the same name as {found[id_].name}", mend="remove one of the two"
            )
        found[id_] = path
    return found


def other_pictures(files: Iterable[Path]) -> list[Path]:
    """Pictures in formats that are not read; to leave them out in silence would mislead."""
    return [path for path in files if path.suffix.lower() in _OTHER_ENDINGS]


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, links followed, hidden files and folders left out."""
    found = []
    seen = {folder.resolve()}  # a link to a folder above would lead in circles
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in folders if Path(parent, name).resolve() not in seen]
        seen.update(Path(parent, name).resolve() for name in folders)
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)
