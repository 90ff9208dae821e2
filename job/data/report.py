"""What `s4gan data check` found, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.balance import Balance
from job.data.dataset import DatasetInfo, Item
from job.data.formats import reading_of

LABELED, SET_ASIDE, UNLABELED, VAL = "labeled", "set_aside", "unlabeled", "val"
PARTS = (LABELED, SET_ASIDE, UNLABELED, VAL)
"""Of a data set that is split; a mask that the ratio or a list sets aside makes its own."""
PROBLEMS_SHOWN = 20
"""Problems that are printed; `--json` and the page have all of them."""


@dataclass(frozen=True)
class Place:
    """An image and the part it is in."""

    item: Item
    part: str
    """One of PARTS."""


@dataclass(frozen=True)
class Finding:
    """Something to say of one or two images."""

    text: str
    places: tuple[Place, ...] = ()

    @property
    def headline(self) -> str:
        """Without the mend."""
        return self.text.split("\n", 1)[0]


@dataclass(frozen=True)
class Pair:
    """Two images that are, or look, the same."""

    first: Place
    second: Place

    @property
    def is_leak(self) -> bool:
        """Whether exactly one of them is a validation image."""
        return (self.first.part == VAL) != (self.second.part == VAL)

    def __str__(self) -> str:
        return f"{self.first.item.image} and {self.second.item.image}"


def named_as(text: str, root: Path, uri: str) -> str:
    """Text about files of a data set, by the place the user gave instead of that of a copy.

    Args:
        text: names files below `root`.
        root: where they lie on this machine.
        uri: what the user calls it.
    """
    # A relative folder is the user's own, and may be a word that the text has elsewhere.
    return text.replace(str(root), uri.rstrip("/")) if root.is_absolute() else text


@dataclass(frozen=True)
class CheckReport:
    """All that was found in a data set."""

    uri: str
    """What the user calls it."""
    root: Path
    """Where it lies on this machine."""
    info: DatasetInfo
    problems: Sequence[Finding]
    """What keeps it from being trained on."""
    warnings: Sequence[str]
    counts: Mapping[str, int]
    """Images of each part."""
    balances: Mapping[str, Balance]
    """Of each part that has masks."""
    kinds: Mapping[str, int]
    """Images of each kind (`job.data.formats.kind_of`)."""
    exact: Sequence[tuple[Place, ...]]
    """Groups of images that are the same pixel for pixel."""
    near: Sequence[Pair]
    """Pairs that look the same, the first ones of each kind."""
    near_counts: Mapping[str, int]
    """How many there are: "train_val", "labeled"."""
    notable: Sequence[Finding]
    """Files that are worth a look as pictures."""
    ordinary: Sequence[Place]
    """Some others, to see whether masks fit."""
    set_aside_by: str = "data.labeled_ratio"
    """What says which masks are not used."""

    @property
    def is_good(self) -> bool:
        """Whether it can be trained on."""
        return not self.problems

    @property
    def all_masks(self) -> Balance:
        """Of every mask, whatever part it is in."""
        return self.balances[LABELED] + self.balances[SET_ASIDE] + self.balances[VAL]

    def shown(self, text: object) -> str:
        """Text as the user knows it: the original's place instead of the copy's, printable."""
        text = named_as(str(text), self.root, self.uri)
        # File names need not be UTF-8.
        return text.encode("utf-8", "backslashreplace").decode()

    @property
    def headline(self) -> str:
        """One line: that it is good, and how many images of which kind; or what is wrong."""
        if self.problems:  # counts would look like success
            count = len(self.problems)
            first = f"{count} problems, the first: " if count > 1 else ""
            return self.shown(
                f"{self.uri}: cannot be trained on: {first}{self.problems[0].headline}"
            )
        aside = self.counts[SET_ASIDE]
        unlabeled = self.counts[UNLABELED] + aside
        note = f" ({aside} with a mask that {self.set_aside_by} sets aside)" if aside else ""
        return self.shown(
            f"{self.uri}: good; {self.counts[LABELED]} labeled, {unlabeled} unlabeled{note}, "
            f"{self.counts[VAL]} validation images, classes {', '.join(self.info.classes)}"
        )

    def text(self) -> str:
        """For people."""
        lines = [f"problem: {finding.text}" for finding in self.problems[:PROBLEMS_SHOWN]]
        more = len(self.problems) - PROBLEMS_SHOWN
        if more > 0:
            lines.append(f"... and {more} more problems")
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [*self._class_table(), *self._kind_lines()]
        return self.shown("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        masks = self._columns()
        return {
            "uri": self.shown(self.uri),
            "good": self.is_good,
            "problems": [self.shown(finding.text) for finding in self.problems],
            "warnings": [self.shown(warning) for warning in self.warnings],
            "images": dict(self.counts),
            "masks": {name: balance.masks for name, balance in masks.items()},
            "classes": [
                {
                    "name": self.shown(name),
                    **{
                        part: {
                            "share": float(balance.shares[index]),
                            "images": int(balance.images[index]),
                        }
                        for part, balance in masks.items()
                    },
                }
                for index, name in enumerate(self.info.classes)
            ],
            "ignored_share": {name: balance.ignored_share for name, balance in masks.items()},
            "formats": dict(self.kinds),
            "duplicates": {
                "exact": [[self.shown(p.item.image) for p in group] for group in self.exact],
                "near": [
                    [self.shown(p.item.image) for p in (pair.first, pair.second)]
                    for pair in self.near
                ],
                "near_pairs": dict(self.near_counts),
            },
        }

    def _columns(self) -> dict[str, Balance]:
        return {
            "labeled": self.balances[LABELED],
            "all": self.all_masks,
            "val": self.balances[VAL],
        }

    def _class_table(self) -> list[str]:
        columns = list(self._columns().values())
        names = [*self.info.classes, "(ignored)"]
        width = max(len("class"), *(len(name) for name in names))
        titles = ("labeled", "all masks", "validation")
        lines = [
            f"{'':<{width}}" + "".join(f"  {title:<16}" for title in titles).rstrip(),
            f"{'class':<{width}}" + "  pixels    images" * 3,
        ]
        for index, name in enumerate(names):
            cells = []
            for balance in columns:
                if index < len(self.info.classes):
                    cells.append(f"  {balance.shares[index]:>7.3%} {balance.images[index]:>8}")
                else:
                    cells.append(f"  {balance.ignored_share:>7.3%} {'':>8}")
            lines.append((f"{name:<{width}}" + "".join(cells)).rstrip())
        lines.append(
            f"{'(masks)':<{width}}" + "".join(f"  {balance.masks:>16}" for balance in columns)
        )
        return lines

    def _kind_lines(self) -> list[str]:
        """Only of kinds that are not read just as they are."""
        return [
            f"{count} images are {kind}: {reading_of(kind)}"
            for kind, count in sorted(self.kinds.items())
            if reading_of(kind)
        ]
