"""Which training images count as labeled, unlabeled and held out; the same on every machine.

Every choice is made by a hash of the image's id, not by its place in a listing: adding images
never moves an old one into or out of the held-out part, and a smaller labeled subset lies inside
a larger one. Lists and permutations (`job.data.lists`) choose otherwise, where they are given.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

from job.config import Config
from job.data.dataset import FOLDER, Dataset, Item
from job.data.names import TRAINING
from job.errors import ConfigError, DataError

TRAIN_SAMPLE_IMAGES = 100
"""Labeled training images on which the training mIoU is measured."""


@dataclass(frozen=True)
class Splits:
    """Ids of each part; the content of `splits.json`."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    """Images without a mask, and those whose mask `data.labeled_ratio` or a list sets aside."""
    val: tuple[str, ...]
    train_sample: tuple[str, ...]
    """The labeled images on which the training mIoU is measured."""
    classes: tuple[str, ...] = ()
    """Names in index order: the same ids with other classes are other data."""

    def to_json(self) -> bytes:
        """Content of `splits.json`."""
        return json.dumps(asdict(self), indent=0).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Splits:
        """Inverse of `to_json`."""
        return cls(**{part: tuple(ids) for part, ids in json.loads(text).items()})


@dataclass(frozen=True)
class SplitItems:
    """The items of each part, in the order of the ids in `Splits`."""

    labeled: tuple[Item, ...]
    unlabeled: tuple[Item, ...]
    val: tuple[Item, ...]
    train_sample: tuple[Item, ...]


def make_splits(dataset: Dataset, config: Config) -> Splits:
    """Split a data set as the configuration says.

    Raises:
        DataError: no labeled image, fewer than a batch, or no unlabeled one.
    """
    called_unlabeled = set(dataset.unlabeled or ())
    with_mask = [
        item.id
        for item in dataset.train
        if item.mask is not None and item.id not in called_unlabeled
    ]
    if dataset.labeled is not None:
        with_mask = list(dataset.labeled)
    if not with_mask:
        raise _without_masks(dataset)
    if dataset.val:
        val = [item.id for item in dataset.val]
    else:
        val = _held_out(with_mask, config.data.val_split)
        held_out = set(val)
        with_mask = [id_ for id_ in with_mask if id_ not in held_out]
    # As a decimal fraction: in floating point 0.07 * 100 is a little more than 7.
    keep = math.ceil(Fraction(str(config.data.labeled_ratio)) * len(with_mask))
    if dataset.labeled is not None:  # a list says it, or a permutation, which took the ratio in
        keep = len(with_mask)
    seed = config.train.seed
    labeled = sorted(sorted(with_mask, key=lambda id_: _fraction(id_, f"labeled-{seed}"))[:keep])
    if len(labeled) < config.train.batch_size:
        raise DataError(
            f"only {len(labeled)} labeled training images, fewer than the batch of "
            f"{config.train.batch_size}",
            mend=_MEND_FEW[dataset.labeled is None]
            + (f", or use a --batch-size of at most {len(labeled)}" if labeled else ""),
        )
    taken = set(labeled) | (set() if dataset.val else set(val))
    others = dataset.unlabeled
    if others is None:
        others = tuple(item.id for item in dataset.train)
    unlabeled = [id_ for id_ in others if id_ not in taken]
    if not unlabeled and not config.train.supervised_only:
        raise DataError(
            f"{dataset.root}: every training image is labeled, so there is nothing to learn "
            "from unlabeled ones",
            mend="add images without masks, set data.labeled_ratio below 1, or train on the "
            "labels alone with --set train.supervised_only=true",
        )
    sample = sorted(labeled, key=lambda id_: _fraction(id_, "train-sample"))
    return Splits(
        labeled=tuple(labeled),
        unlabeled=tuple(unlabeled),
        val=tuple(val),
        train_sample=tuple(sorted(sample[:TRAIN_SAMPLE_IMAGES])),
        classes=dataset.info.classes,
    )


_MEND_FEW = {
    True: "label more images, raise data.labeled_ratio or lower --val-split",
    False: "name more images in data.labeled_list, raise data.labeled_ratio of a data.permutation",
}
"""By whether the ratio alone chooses the labeled images."""


def _without_masks(dataset: Dataset) -> DataError:
    if dataset.layout != FOLDER:
        return DataError(
            f"{dataset.root}: no training image has a mask", mend="add the data set's masks"
        )
    return DataError(
        f"{dataset.root / 'train' / 'masks'}: no image has a mask",
        mend="label some images: train/masks/NAME.png for train/images/NAME.jpg",
    )


FEW_VALIDATION_IMAGES = 4
"""With fewer there is a warning."""


def split_warnings(dataset: Dataset, splits: Splits) -> list[str]:
    """What a split is poor in.

    Args:
        dataset: that was split.
        splits: of it.
    """
    count = len(splits.val)
    if count >= FEW_VALIDATION_IMAGES:
        return []
    images = "image is all there is" if count == 1 else "images are all there are"
    more = "raise --val-split" if not dataset.val else "add some"
    return [
        f"{count} validation {images}: the best model is chosen by them, and scores of so few say "
        f"little; {more}, or name others with {TRAINING.val_list}"
    ]


def items_of(dataset: Dataset, splits: Splits) -> SplitItems:
    """Look the ids up again."""
    train = {item.id: item for item in dataset.train}
    val = {item.id: item for item in dataset.val} if dataset.val else train
    return SplitItems(
        labeled=tuple(train[id_] for id_ in splits.labeled),
        # A mask that labeled_ratio sets aside must not be seen by anything downstream.
        unlabeled=tuple(Item(id_, train[id_].image, None) for id_ in splits.unlabeled),
        val=tuple(val[id_] for id_ in splits.val),
        train_sample=tuple(train[id_] for id_ in splits.train_sample),
    )


def check_same(run: Splits, now: Splits) -> None:
    """Refuse to resume a run on other images than it began with.

    Raises:
        ConfigError: names the part, how many ids came and went, and one of each.
    """
    changes = []
    if run.classes != now.classes:
        changes.append(f"classes are {', '.join(now.classes)}, were {', '.join(run.classes)}")
    for part in ("labeled", "unlabeled", "val", "train_sample"):
        before, after = getattr(run, part), getattr(now, part)
        new, gone = sorted(set(after) - set(before)), sorted(set(before) - set(after))
        if new or gone:
            examples = ", ".join([f"+{id_}" for id_ in new[:1]] + [f"-{id_}" for id_ in gone[:1]])
            changes.append(f"{part} +{len(new)} -{len(gone)} ({examples}, ...)")
    if changes:
        raise ConfigError(
            "the data has changed since this run began: " + "; ".join(changes),
            mend="put the data back as it was, or start a new run with another --run",
        )


def _held_out(ids: Sequence[str], val_split: float) -> list[str]:
    """A share of about `val_split`, at least one, decided for each id by its own hash."""
    by_fraction = sorted(ids, key=lambda id_: _fraction(id_, "val"))
    chosen = [id_ for id_ in by_fraction if _fraction(id_, "val") < val_split]
    return sorted(chosen or by_fraction[:1])


def _fraction(id_: str, purpose: str) -> float:
    """A hash of the id, uniform in [0, 1)."""
    # surrogateescape: file names need not be UTF-8.
    digest = hashlib.sha256(f"{purpose}\0{id_}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
