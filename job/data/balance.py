"""How often each class occurs in the masks, and which are too rare to learn or to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from job.data.dataset import Item

RARE_SHARE = 0.001
"""A class below this share of the labeled pixels is rare: of a crop of 321 x 321 pixels, the guide
preset's, that is a patch of 10 x 10 on average."""
MIN_ALONE, ALONE_SHARE = 4, 0.25
"""Masks of a single class, and share of all, from which on they look as if left empty."""
NAMES_SHOWN = 6
"""Classes named in one warning."""


@dataclass
class Balance:
    """What the masks of one part of the data hold; masks are added one by one."""

    num_classes: int
    masks: int = 0
    ignored: int = 0
    """Pixels of `ignore_index`."""
    pixels: NDArray[np.int64] = field(init=False)
    """Of each class; (K,)."""
    images: NDArray[np.int64] = field(init=False)
    """Masks that hold it; (K,)."""
    alone: NDArray[np.int64] = field(init=False)
    """Masks that hold it and no other class; (K,)."""
    first_alone: list[Item | None] = field(init=False)
    """The first of those, of each class."""
    largest: list[tuple[int, Item] | None] = field(init=False)
    """The mask that holds most of each class, with its pixels of it; for showing it."""

    def __post_init__(self) -> None:
        self.pixels = np.zeros(self.num_classes, np.int64)
        self.images = np.zeros(self.num_classes, np.int64)
        self.alone = np.zeros(self.num_classes, np.int64)
        self.first_alone = [None] * self.num_classes
        self.largest = [None] * self.num_classes

    def add(self, item: Item, pixels: NDArray[np.int64], ignored: int) -> None:
        """Count a mask: its pixels of each class, (K,), and those of `ignore_index`."""
        self.masks += 1
        self.ignored += ignored
        self.pixels += pixels
        self.images += pixels > 0
        if np.count_nonzero(pixels) == 1:
            self.alone += pixels > 0
            only = int(np.argmax(pixels))
            self.first_alone[only] = self.first_alone[only] or item
        for index in np.flatnonzero(pixels):
            best = self.largest[index]
            if best is None or pixels[index] > best[0]:
                self.largest[index] = (int(pixels[index]), item)

    @property
    def shares(self) -> NDArray[np.float64]:
        """Of the pixels that are not ignored, those of each class, 0..1; (K,)."""
        return self.pixels / max(1, int(self.pixels.sum()))

    @property
    def ignored_share(self) -> float:
        """Of all pixels, those that are ignored, 0..1."""
        return self.ignored / max(1, self.ignored + int(self.pixels.sum()))

    def __add__(self, other: Balance) -> Balance:
        both = Balance(self.num_classes, self.masks + other.masks, self.ignored + other.ignored)
        both.pixels = self.pixels + other.pixels
        both.images = self.images + other.images
        both.alone = self.alone + other.alone
        both.first_alone = [
            one or another for one, another in zip(self.first_alone, other.first_alone, strict=True)
        ]
        both.largest = [
            max((one for one in pair if one), key=lambda one: one[0], default=None)
            for pair in zip(self.largest, other.largest, strict=True)
        ]
        return both


def has_background(classes: Sequence[str]) -> bool:
    """Whether the first class is what is none of the others; a sky or a road may fill an image."""
    return classes[0].strip("_ ").lower() == "background"


def balance_warnings(
    classes: Sequence[str], labeled: Balance, val: Balance, set_aside: Balance | None = None
) -> list[str]:
    """What the balance says against training or measuring; nothing about a part without masks.

    Args:
        classes: names in index order.
        labeled: of the labeled images that are trained on.
        val: of the validation images.
        set_aside: of the masks that are set aside, if they were looked at.
    """
    warnings = []
    if labeled.masks:
        absent = labeled.images == 0
        if len(classes) == 2 and labeled.ignored and (absent & (val.images == 0))[1]:
            warnings.append(
                f"the masks hold {classes[0]} and ignored pixels, but no {classes[1]}; if it is "
                "written as the value that is ignored (ignore_index of dataset.yaml, 255 without "
                "one), write it as 1"
            )
            absent[1] = False
        if set_aside is not None:
            nowhere = absent & (set_aside.images == 0) & (val.images == 0)
            if nowhere.any():
                warnings.append(
                    f"no mask at all holds {_names(classes, nowhere)}; check the classes "
                    "(those of dataset.yaml, if there is one) and how the masks were made"
                )
            elsewhere = absent & (set_aside.images > 0)
            if elsewhere.any():
                warnings.append(
                    f"no labeled image holds {_names(classes, elsewhere)}, which is not learned "
                    "then; masks that are set aside do: raise data.labeled_ratio, or name "
                    "such images in data.labeled_list"
                )
            absent &= ~(nowhere | elsewhere)
        if absent.any():
            warnings.append(
                f"no labeled image holds {_names(classes, absent)}, which is not learned then; "
                "label images that do"
            )
        shares = labeled.shares
        rare = (labeled.images > 0) & (shares < RARE_SHARE)
        if rare.any():
            warnings.append(
                f"less than {RARE_SHARE:.1%} of the labeled pixels are "
                f"{_names(classes, rare, [f'{share:.3%}' for share in shares])}; "
                "label more images that hold it"
            )
        single = (labeled.images == 1) & ~rare
        if labeled.masks > 1 and single.any():
            first = labeled.largest[int(np.flatnonzero(single)[0])]
            assert first is not None
            warnings.append(
                f"only one of {labeled.masks} labeled images holds {_names(classes, single)} "
                f"(first: {first[1].image}); label more that do"
            )
    for called, part in (("labeled", labeled), ("validation", val)):
        empty = part.alone >= max(MIN_ALONE, ALONE_SHARE * part.masks)
        if has_background(classes):  # what a tool saves of an image that nobody has drawn on
            empty[0] |= part.alone[0] > 0
        if empty.any() and np.count_nonzero(part.images) > 1:
            index = int(np.flatnonzero(empty)[0])
            alone = part.first_alone[index]
            assert alone is not None
            warnings.append(
                f"{part.alone[index]} of {part.masks} {called} masks "
                f"{'holds' if part.alone[index] == 1 else 'hold'} nothing but {classes[index]} "
                f"(first: {alone.mask}); if something else is to be seen there, nobody has drawn it"
            )
    if val.masks and (val.images == 0).any():
        warnings.append(
            f"no validation mask holds {_names(classes, val.images == 0)}, "
            "whose IoU cannot be measured then"
        )
    return warnings


def _names(classes: Sequence[str], chosen: NDArray[np.bool_], told: Sequence[str] = ()) -> str:
    indices = [int(index) for index in np.flatnonzero(chosen)]
    names = [
        classes[index] + (f" ({told[index]})" if told else "") for index in indices[:NAMES_SHOWN]
    ]
    more = len(indices) - NAMES_SHOWN
    return ", ".join(names) + (f" and {more} more classes" if more > 0 else "")
