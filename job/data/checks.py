"""Looking at every file before the first iteration, so that bad data costs seconds and no hours.

Labeled and validation images and masks are decoded whole; of unlabeled images, which may be very
many, only the header is read. What hides behind a good header is found in training and skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from job.data.dataset import Dataset, DatasetInfo, Item
from job.data.images import UNREADABLE, read_index_mask, read_rgb
from job.data.splits import SplitItems
from job.errors import DataError, Preempted
from job.heartbeat import beat

MAX_SHOWN = 5
"""Problems listed in one error message."""


def check_data(
    items: SplitItems, info: DatasetInfo, *, stopped: Callable[[], bool] = lambda: False
) -> list[str]:
    """Check every file of a split data set.

    Args:
        items: the split.
        info: its classes.
        stopped: asked between files; True ends the check.

    Returns:
        Warnings: what can be trained on but deserves a look.

    Raises:
        DataError: lists the first files that cannot be trained on, and how many there are.
        Preempted: `stopped` said so.
    """
    labeled = {item.image: item for item in (*items.labeled, *items.val)}.values()
    empty_masks: list[Item] = []

    def labeled_problem(item: Item) -> str | None:
        try:
            if _check_pair(item, info):
                empty_masks.append(item)
        except DataError as error:
            return str(error)
        return None

    problems = _each(labeled_problem, labeled, stopped)
    problems += _each(_header_problem, items.unlabeled, stopped)
    if problems:
        shown = "\n".join(problems[:MAX_SHOWN])
        more = len(problems) - MAX_SHOWN
        raise DataError(shown + (f"\n... and {more} more files" if more > 0 else ""))
    return _empty_mask_warnings(items, empty_masks)


def check_everything(dataset: Dataset, *, stopped: Callable[[], bool] = lambda: False) -> list[str]:
    """`check_data` for all images of a data set, before anything is split.

    Raises:
        DataError: as `check_data`, or there is no labeled image.
    """
    labeled = tuple(item for item in dataset.train if item.mask is not None)
    if not labeled:
        raise DataError(
            f"{dataset.root / 'train' / 'masks'}: no image has a mask",
            mend="label some images: train/masks/NAME.png for train/images/NAME.jpg",
        )
    unlabeled = tuple(item for item in dataset.train if item.mask is None)
    everything = SplitItems(labeled, unlabeled, dataset.val, train_sample=())
    return [*dataset.warnings, *check_data(everything, dataset.info, stopped=stopped)]


def _each(
    check: Callable[[Item], str | None], items: Iterable[Item], stopped: Callable[[], bool]
) -> list[str]:
    """Run a check over all items on threads (decoding releases the GIL); keeps their order."""
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        problems = []
        for problem in pool.map(lambda item: None if stopped() else check(item), items):
            beat()
            if problem:
                problems.append(problem)
    if stopped():
        raise Preempted("stopped while the data was checked, before training began")
    return problems


def _check_pair(item: Item, info: DatasetInfo) -> bool:
    """Decode image and mask and compare them; whether all of the mask is ignored."""
    assert item.mask is not None
    image = read_rgb(item.image)
    mask = read_index_mask(item.mask)
    if image.size != mask.size:
        raise DataError(
            f"{item.mask}: is {mask.width}x{mask.height}, its image {item.image.name} "
            f"{image.width}x{image.height}",
            mend="save the mask in its image's size (nearest neighbour)",
        )
    counts = np.bincount(np.asarray(mask).ravel(), minlength=256)
    ignored = int(counts[info.ignore_index])
    counts[info.ignore_index] = 0
    wrong = np.flatnonzero(counts[info.num_classes :]) + info.num_classes
    if wrong.size:
        raise DataError(
            f"{item.mask}: holds the label {wrong[0]} ({counts[wrong[0]]} pixels), the classes "
            f"are 0..{info.num_classes - 1} and ignore_index {info.ignore_index}",
            mend="correct the mask, or the classes in dataset.yaml",
        )
    return ignored == mask.width * mask.height


def _header_problem(item: Item) -> str | None:
    try:
        with Image.open(item.image):
            return None
    except UNREADABLE as error:
        return f"{item.image}: cannot be read as an image ({error})\n  mend: replace or remove it"


def _empty_mask_warnings(items: SplitItems, empty: Sequence[Item]) -> list[str]:
    warnings = []
    empty_images = {item.image for item in empty}
    for name, part in (("training", items.labeled), ("validation", items.val)):
        hit = [item for item in part if item.image in empty_images]
        if part and len(hit) == len(part):
            raise DataError(
                f"every {name} mask is empty: all of it is ignore_index",
                mend="check ignore_index in dataset.yaml, and how the masks were made",
            )
        if hit:
            warnings.append(
                f"{len(hit)} of {len(part)} {name} masks are empty (all ignore_index), "
                f"first: {hit[0].mask}"
            )
    return warnings
