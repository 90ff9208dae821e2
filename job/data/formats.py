"""Kinds of image files: how many of each there are, what the program makes of them, what is odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from job.data.dataset import Item
from job.data.images import ImageFacts

DARK_PEAK = 15
"""An image of 16 bits whose brightest value, of 8 bits, is at most this uses 12 bits or fewer."""

_GREY_MODES = ("1", "L", "LA", "La")


@dataclass
class Hits:
    """How many images something holds for, and the first one."""

    count: int = 0
    first: Item | None = None

    def add(self, item: Item) -> None:
        """One more."""
        self.count += 1
        self.first = self.first or item


@dataclass
class Formats:
    """What kinds of images were seen; added one by one."""

    kinds: Counter[str] = field(default_factory=Counter)
    """Images of each `kind_of`."""
    grey: Counter[str] = field(default_factory=Counter)
    """Grey images of each part."""
    images: Counter[str] = field(default_factory=Counter)
    """Images of each part."""
    transparent: Hits = field(default_factory=Hits)
    cmyk: Hits = field(default_factory=Hits)
    dark: Hits = field(default_factory=Hits)
    turned: Hits = field(default_factory=Hits)
    """EXIF orientation other than 1, and no mask, or one that was made as the image is stored."""
    unclear: Hits = field(default_factory=Hits)
    """The same, and the mask's size does not say which way it was drawn."""

    def add(self, item: Item, part: str, facts: ImageFacts, *, has_problem: bool = False) -> None:
        """Count an image of a part ("labeled", ...).

        Of one that has a problem, a turned mask perhaps, the orientation is no warning, too.
        """
        self.kinds[kind_of(facts)] += 1
        self.images[part] += 1
        self.grey[part] += is_grey(facts)
        if facts.is_transparent:
            self.transparent.add(item)
        if facts.mode == "CMYK":
            self.cmyk.add(item)
        if facts.peak <= DARK_PEAK and facts.bits > 8:
            self.dark.add(item)
        if facts.orientation != 1 and not has_problem:
            unclear = item.mask is not None and facts.turned_size == facts.size
            (self.unclear if unclear else self.turned).add(item)

    def warnings(self) -> list[str]:
        """What is worth a look; a kind that is read as it looks is not."""
        images = self.images.total()
        said = (
            (
                self.transparent,
                "have transparent pixels",
                "the colours under them are trained on, whatever a viewer shows; save them as RGB",
            ),
            (
                self.cmyk,
                "are CMYK, for printing",
                "they become RGB without their colour profile, so colours are off; save them as "
                "RGB",
            ),
            (
                self.dark,
                "have 16 bits and use 12 of them or fewer",
                "they are nearly black for the network; stretch them to the full range",
            ),
            (
                self.unclear,
                "have an EXIF orientation that their mask's size cannot confirm",
                "they are read as stored, so masks drawn on what a viewer shows are wrong; look "
                "at them (s4gan data check), and turn the pixels for good (mogrify -auto-orient)",
            ),
            (
                self.turned,
                "have an EXIF orientation, and no mask or one that fits them as stored",
                "they are read as stored, so the network sees them turned or mirrored; turn the "
                "pixels for good (mogrify -auto-orient), and such masks with them",
            ),
        )
        warnings = [
            f"{hits.count} of {images} images {what} (first: {hits.first.image}): {why}"
            for hits, what, why in said
            if hits.first is not None
        ]
        all_grey = [part for part, count in self.images.items() if self.grey[part] == count]
        coloured = [part for part in self.images if self.grey[part] == 0]
        if all_grey and coloured:
            warnings.append(
                f"all {_and(all_grey)} images are grey, all {_and(coloured)} images in colour: "
                "what is learned from one may not hold for the other"
            )
        return warnings


def _and(parts: Sequence[str]) -> str:
    return " and ".join(part.replace("_", "-") for part in parts)


def is_grey(facts: ImageFacts) -> bool:
    """Whether a file holds one channel of brightness."""
    return facts.mode in _GREY_MODES or facts.mode.startswith("I")


def kind_of(facts: ImageFacts) -> str:
    """The name of a kind of image, for people."""
    if is_grey(facts):
        name = "black and white" if facts.mode == "1" else "grey"
    else:
        name = {"P": "palette", "PA": "palette", "RGBA": "RGB"}.get(facts.mode, facts.mode)
    deep = " of 16 bits" if facts.bits > 8 else ""
    return name + deep + (" with alpha" if facts.has_alpha else "")


def reading_of(kind: str) -> str:
    """What the program makes of a `kind_of`; empty for plain RGB."""
    said = []
    if kind.startswith(("grey", "black")):
        said.append("read as three equal channels")
    elif kind.startswith("palette"):
        said.append("read as its palette's colours")
    elif not kind.startswith("RGB"):
        said.append("converted to RGB, without a colour profile")
    if "16 bits" in kind:
        said.append("the upper 8 bits are used")
    if "alpha" in kind:
        said.append("alpha is dropped")
    return ", ".join(said)
