"""Small data sets in the layouts that their makers hand them out in, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import IGNORE_INDEX, draw_scene

VOC_VALUES = {0: 0, 1: 15, 2: 7, IGNORE_INDEX: 255}
"""What `draw_scene` draws, as VOC numbers it: background, person, car, void."""
CITY_IDS = {0: 7, 1: 26, 2: 24, IGNORE_INDEX: 3}
"""The same as ids of Cityscapes: road, car, person, out of roi."""
CITY_TRAIN_IDS = {0: 0, 1: 13, 2: 11, IGNORE_INDEX: 255}
CONTEXT_VALUES = {0: 0, 1: 37, 2: 14, IGNORE_INDEX: 255}
"""background, person, car, void."""

SIZE = (40, 48)
"""Height and width."""


def translated(mask: np.ndarray, values: dict[int, int]) -> np.ndarray:
    """A mask with other numbers."""
    return np.vectorize(values.__getitem__, otypes=[np.uint8])(mask)


def save_scene(
    rng: np.random.Generator, image: Path, masks: dict[Path, dict[int, int]], *, palette: bool
) -> None:
    """Draw a scene; its masks are written with the numbers of each."""
    pixels, mask = draw_scene(rng, *SIZE)
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image, **({"quality": 95} if image.suffix == ".jpg" else {}))
    for path, values in masks.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(translated(mask, values))
        if palette:
            picture.putpalette([(channel * 77 + 31) % 256 for channel in range(768)])
        picture.save(path)


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    """A list file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def voc_ids(count: int, year: int = 2007, step: int = 3) -> list[str]:
    """Names as VOC has them."""
    return [f"{year}_{index * step + 27:06d}" for index in range(count)]


def write_voc(
    base: Path,
    *,
    train: int = 6,
    augmented: int = 0,
    val: int = 4,
    others: int = 2,
    train_aug: bool = True,
) -> Path:
    """Write VOC 2012; returns its folder, that of JPEGImages/.

    Ids of train are 2007_..., of those that SegmentationClassAug adds 2008_..., of val 2009_...;
    `others` are images of 2010 that no list names. train.txt is not sorted.
    """
    rng = np.random.default_rng(2)
    images, masks, more = base / "JPEGImages", base / "SegmentationClass", "SegmentationClassAug"
    lists = base / "ImageSets" / "Segmentation"
    parts = {2007: train, 2008: augmented, 2009: val, 2010: others}
    for year, count in parts.items():
        for id_ in voc_ids(count, year):
            folders = [masks] if year in (2007, 2009) else []
            if augmented and year != 2010:
                folders.append(base / more)
            save_scene(
                rng,
                images / f"{id_}.jpg",
                {folder / f"{id_}.png": VOC_VALUES for folder in folders},
                palette=True,
            )
    first = voc_ids(train)[::-1]
    write_lines(lists / "train.txt", first)
    write_lines(lists / "val.txt", voc_ids(val, 2009))
    write_lines(lists / "trainval.txt", [*first, *voc_ids(val, 2009)])
    if augmented and train_aug:
        write_lines(lists / "train_aug.txt", [*first, *voc_ids(augmented, 2008)])
    return base


def city_ids(city: str, count: int) -> list[str]:
    """Names as Cityscapes has them."""
    return [f"{city}_{index:06d}_000019" for index in range(count)]


def write_cityscapes(
    root: Path,
    *,
    train: int = 6,
    unlabeled: int = 2,
    val: int = 4,
    extra: int = 0,
    train_ids: bool = False,
    ids: bool = True,
) -> Path:
    """Write Cityscapes: aachen and bochum are train, ulm has no masks, munster is val."""
    rng = np.random.default_rng(3)
    parts = [
        ("train", "aachen", train - train // 2, True),
        ("train", "bochum", train // 2, True),
        ("train", "ulm", unlabeled, False),
        ("val", "munster", val, True),
        ("train_extra", "augsburg", extra, False),
    ]
    for part, city, count, has_mask in parts:
        for id_ in city_ids(city, count):
            folder = root / "gtFine" / part / city
            masks = {}
            if has_mask and ids:
                masks[folder / f"{id_}_gtFine_labelIds.png"] = CITY_IDS
            if has_mask and train_ids:
                masks[folder / f"{id_}_gtFine_labelTrainIds.png"] = CITY_TRAIN_IDS
            image = root / "leftImg8bit" / part / city / f"{id_}_leftImg8bit.png"
            save_scene(rng, image, masks, palette=False)
            if has_mask:  # what the archive holds besides
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGBA", SIZE[::-1]).save(folder / f"{id_}_gtFine_color.png")
                Image.new("I;16", SIZE[::-1]).save(folder / f"{id_}_gtFine_instanceIds.png")
                (folder / f"{id_}_gtFine_polygons.json").write_text("{}")
    return root


def write_context(base: Path, *, train: int = 6, val: int = 4) -> Path:
    """Write PASCAL-Context as MMSegmentation converts it; returns the folder of JPEGImages/."""
    rng = np.random.default_rng(4)
    lists = base / "ImageSets" / "SegmentationContext"
    for year, count, name in ((2008, train, "train"), (2009, val, "val")):
        ids = voc_ids(count, year)
        for id_ in ids:
            save_scene(
                rng,
                base / "JPEGImages" / f"{id_}.jpg",
                {base / "SegmentationClassContext" / f"{id_}.png": CONTEXT_VALUES},
                palette=True,
            )
        write_lines(lists / f"{name}.txt", ids[::-1])
    return base


WRITERS: dict[str, Callable[[Path], Path]] = {
    "voc": lambda root: write_voc(root / "VOCdevkit" / "VOC2012"),
    "cityscapes": write_cityscapes,
    "context": lambda root: write_context(root / "VOCdevkit" / "VOC2010"),
}
"""A data set of each layout below a data folder."""
