"""Looking at every file before the first iteration, so that bad data costs seconds and no hours.

`check_data` is what training does at its start: labeled and validation images and masks are decoded
whole; of unlabeled images, which may be very many, only the header is read, and what hides behind a
good one is found in training and skipped. `inspect` takes its time: it decodes everything, also
masks that are set aside, and looks for near duplicates.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from job.config import Config
from job.data.balance import Balance, balance_warnings, has_background
from job.data.dataset import IGNORE, UNKNOWN, Dataset, DatasetInfo, Item
from job.data.duplicates import (
    Fingerprint,
    Fingerprints,
    fingerprint,
    near_pairs,
    pixel_digest,
    rows_digest,
)
from job.data.formats import Formats
from job.data.images import ImageFacts, read_facts, read_index_mask, read_rgb_and_facts
from job.data.report import (
    LABELED,
    PARTS,
    SET_ASIDE,
    UNLABELED,
    VAL,
    CheckReport,
    Finding,
    Pair,
    Place,
)
from job.data.splits import SplitItems, items_of, make_splits, split_warnings
from job.errors import DataError, Preempted
from job.heartbeat import beat
from job.storage.progress import Silent, TransferProgress

MAX_SHOWN = 5
"""Problems listed in one error message."""
WRONG_NAMED = 5
"""Unexpected labels of one mask that are named."""
MAX_PAIRS = 1000
"""Near duplicates listed of one kind; all are counted."""
MAX_EXAMPLES = 4
"""Files of one kind of finding that are shown as pictures."""
MAX_ORDINARY = {LABELED: 12, VAL: 6}
"""Images without a finding that are shown, spread evenly over the names."""


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
    seen = _Seen(info)
    for place, look in _looked_at(_places(items), info, stopped, thorough=False):
        seen.add(place, look)
        beat()
    seen.confirm_copies(stopped)
    problems = [finding.text for finding in seen.problems]
    if problems:
        shown = "\n".join([*map(str, seen.common_fault()), *problems[:MAX_SHOWN]])
        more = len(problems) - MAX_SHOWN
        raise DataError(shown + (f"\n... and {more} more files" if more > 0 else ""))
    if nothing := seen.nothing_to_learn():
        raise nothing[0]
    return seen.warnings()


def inspect(
    dataset: Dataset,
    config: Config,
    *,
    uri: str,
    progress: TransferProgress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> CheckReport:
    """Look at all of a data set, and at the split that a configuration makes of it.

    Args:
        dataset: what was found.
        config: says the split.
        uri: what the user calls the data, for naming files.
        progress: told how far it is.
        stopped: asked between files.

    Raises:
        DataError: no image has a mask.
        Preempted: `stopped` said so.
    """
    split_problem = None
    few: list[str] = []
    try:
        splits = make_splits(dataset, config)
        few = split_warnings(dataset, splits)
        items = items_of(dataset, splits)
    except DataError as error:
        labeled = tuple(item for item in dataset.train if item.mask is not None)
        if not labeled:
            raise
        split_problem = error
        items = SplitItems(
            labeled, tuple(i for i in dataset.train if i.mask is None), dataset.val, ()
        )
    places = _places(items, dataset)
    seen = _Seen(dataset.info)
    progress = progress or Silent()
    progress.begin("checking", len(places), sum(_size(place.item) for place in places))
    try:
        for place, look in _looked_at(places, dataset.info, stopped, thorough=True):
            seen.add(place, look)
            beat()
            progress.advance(1, _size(place.item))
    finally:
        progress.end()
    near, near_counts = seen.near_duplicates(stopped)
    if stopped():
        raise Preempted("stopped while the data was checked")
    problems = [Finding(str(split_problem))] if split_problem else []
    problems += [Finding(str(error)) for error in seen.common_fault()]
    problems += seen.problems
    problems += [Finding(str(error)) for error in seen.nothing_to_learn()]
    return CheckReport(
        uri=uri,
        root=dataset.root,
        info=dataset.info,
        problems=problems,
        warnings=[
            *dataset.warnings,
            *few,
            *seen.warnings(thorough=True),
            *_near_warnings(near, near_counts),
        ],
        counts={part: sum(place.part == part for place in places) for part in PARTS},
        balances=seen.balances,
        kinds=seen.formats.kinds,
        exact=seen.exact_duplicates(),
        near=near,
        near_counts=near_counts,
        notable=[*seen.problem_examples, *seen.notable],
        ordinary=_ordinary(places),
        set_aside_by="data.labeled_ratio"
        if dataset.labeled is None and dataset.unlabeled is None
        else "a list",
    )


def _ordinary(places: Sequence[Place]) -> list[Place]:
    """Some of each part that has masks, evenly spread."""
    chosen = []
    for part, wanted in MAX_ORDINARY.items():
        of_part = [place for place in places if place.part == part]
        number = min(wanted, len(of_part))
        chosen += [of_part[index * len(of_part) // number] for index in range(number)]
    return chosen


# ---------------------------------------------------------------- one file


@dataclass
class _Look:
    """What one image and its mask turned out to be."""

    facts: ImageFacts | None = None
    problem: str = ""
    digest: bytes = b""
    """Of the decoded pixels, or of some rows of them; empty if they were not decoded."""
    mask_digest: bytes = b""
    print: Fingerprint | None = None
    pixels: NDArray[np.int64] | None = None
    """Of each class; (K,)."""
    ignored: int = 0
    labels: frozenset[int] = frozenset()
    """Values that the mask holds."""


def _places(items: SplitItems, dataset: Dataset | None = None) -> list[Place]:
    """What there is to look at; with the masks that are set aside, if the data set is given."""
    masks = {item.id: item for item in dataset.train if item.mask} if dataset else {}
    places = [Place(item, LABELED) for item in items.labeled]
    places += [Place(item, VAL) for item in items.val]
    places += [Place(masks[item.id], SET_ASIDE) for item in items.unlabeled if item.id in masks]
    places += [Place(item, UNLABELED) for item in items.unlabeled if item.id not in masks]
    return places


def _looked_at(
    places: Sequence[Place], info: DatasetInfo, stopped: Callable[[], bool], *, thorough: bool
) -> Iterator[tuple[Place, _Look]]:
    """Look at files on threads (decoding releases the GIL); keeps their order.

    Few files are ahead of the caller at any time, so that 100,000 take no more memory than 100.
    """
    threads = min(16, 2 * (os.cpu_count() or 1))
    pool = ThreadPoolExecutor(threads)
    ahead: deque[tuple[Place, Future[_Look]]] = deque()
    try:
        for place in places:
            if stopped():
                break
            ahead.append((place, pool.submit(_look, place, info, thorough)))
            if len(ahead) >= 4 * threads:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead and not stopped():
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    if stopped():
        raise Preempted("stopped while the data was checked, before training began")


def _look(place: Place, info: DatasetInfo, thorough: bool) -> _Look:
    item = place.item
    look = _Look()
    try:
        if item.mask is None:
            look.facts = read_facts(item.image)
            if not thorough:
                return look
        image, look.facts = read_rgb_and_facts(item.image)
        look.digest = pixel_digest(image) if thorough else rows_digest(image)
        if thorough:
            look.print = fingerprint(image)
        if item.mask is not None:
            _look_at_mask(item, info, look, thorough)
    except DataError as error:
        look.problem = str(error)
    return look


def _look_at_mask(item: Item, info: DatasetInfo, look: _Look, thorough: bool) -> None:
    """Decode the mask and compare it with its image and the classes."""
    assert item.mask is not None
    assert look.facts is not None
    mask = read_index_mask(item.mask)
    if look.facts.size != mask.size:
        raise _other_size(item, look.facts, mask.size)
    counts = np.array(mask.histogram(), np.int64)  # twice as fast as bincount
    look.labels = frozenset(np.flatnonzero(counts).tolist())
    of_meaning = np.bincount(info.meanings + 1, counts, IGNORE + 2).astype(np.int64)
    if of_meaning[UNKNOWN + 1]:
        wrong = np.flatnonzero((info.meanings == UNKNOWN) & (counts > 0))
        wrong = wrong[np.argsort(-counts[wrong], kind="stable")]  # most pixels first
        named = ", ".join(f"{value} ({counts[value]} pixels)" for value in wrong[:WRONG_NAMED])
        if len(wrong) > WRONG_NAMED:
            named += f" and {len(wrong) - WRONG_NAMED} more"
        values = [value for value, _ in info.file_labels] or range(info.num_classes)
        raise DataError(
            f"{item.mask}: holds the label{'s' * (len(wrong) > 1)} {named}, the classes "
            f"are {min(values)}..{max(values)} and ignore_index {info.ignore_index}",
            mend="correct the mask, or the classes in dataset.yaml",
        )
    look.ignored = int(of_meaning[IGNORE + 1])
    look.pixels = of_meaning[1 : 1 + info.num_classes]
    if thorough:
        look.mask_digest = hashlib.sha256(mask.tobytes()).digest()


def _other_size(item: Item, facts: ImageFacts, mask_size: tuple[int, int]) -> DataError:
    (width, height), (mask_width, mask_height) = facts.size, mask_size
    message = (
        f"{item.mask}: is {mask_width}x{mask_height}, its image {item.image.name} {width}x{height}"
    )
    if facts.turned_size == mask_size:
        return DataError(
            f"{message} as stored, and {mask_width}x{mask_height} only when turned as its EXIF "
            f"orientation {facts.orientation} says, which is not followed",
            mend="turn the image's pixels for good: mogrify -auto-orient, or "
            "PIL.ImageOps.exif_transpose",
        )
    if mask_size == (height, width):
        return DataError(
            f"{message}: one of the two is turned by a quarter",
            mend="turn it back; then look whether they fit: s4gan data check",
        )
    return DataError(message, mend="save the mask in its image's size (nearest neighbour)")


def _size(item: Item) -> int:
    """Bytes of the files, for showing progress."""
    try:
        return item.image.stat().st_size + (item.mask.stat().st_size if item.mask else 0)
    except OSError:
        return 0


# ---------------------------------------------------------------- all files


class _Seen:
    """What all looks add up to; holds no picture."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self.problems: list[Finding] = []
        self._passed_over: dict[str, list[Finding]] = {SET_ASIDE: [], UNLABELED: []}
        """What training does not read, or skips."""
        self.formats = Formats()
        self.balances = {part: Balance(info.num_classes) for part in PARTS if part != UNLABELED}
        self._empty: dict[str, list[Place]] = {part: [] for part in self.balances}
        self._by_digest: dict[bytes, list[tuple[Place, bytes]]] = {}
        self._prints: list[tuple[Place, bytes, Fingerprint]] = []
        self._examples: dict[str, int] = {}
        self.problem_examples: list[Finding] = []
        self.notable: list[Finding] = []
        """Other files that are worth a look, as pictures."""
        self._labels: set[int] = set()
        self._masks = 0

    def add(self, place: Place, look: _Look) -> None:
        if look.labels:
            self._labels |= look.labels
            self._masks += 1
        if look.facts is not None:
            self.formats.add(place.item, place.part, look.facts, has_problem=bool(look.problem))
            if not look.problem:
                self._note_format(place, look.facts)
        if look.problem:
            finding = Finding(look.problem, (place,))
            # Of images that train without a mask only the header matters, which was read.
            if place.part in self._passed_over and look.facts is not None:
                self._passed_over[place.part].append(finding)
                self._note(f"passed over, {place.part}", finding)
            else:
                self.problems.append(finding)
                self._note("problem", finding, self.problem_examples)
        if look.digest:
            self._by_digest.setdefault(look.digest, []).append((place, look.mask_digest))
        if look.print is not None:
            self._prints.append((place, look.digest, look.print))
        if look.pixels is not None:
            self.balances[place.part].add(place.item, look.pixels, look.ignored)
            if not look.pixels.any():
                self._empty[place.part].append(place)
                self._note("empty", Finding("the mask is empty: all of it is ignored", (place,)))
            elif has_background(self._info.classes) and not look.pixels[1:].any():
                said = f"the mask holds nothing but {self._info.classes[0]}"
                self._note("background", Finding(said, (place,)))

    def _note_format(self, place: Place, facts: ImageFacts) -> None:
        if facts.orientation != 1:
            self._note(
                f"turned-{place.item.mask is None}",
                Finding(
                    f"EXIF orientation {facts.orientation}: shown as stored, as the network sees "
                    "it; a viewer turns or mirrors it",
                    (place,),
                ),
            )
        if facts.is_transparent:
            self._note(
                "transparent",
                Finding("transparent pixels: shown without, as the network sees it", (place,)),
            )

    def _note(self, kind: str, finding: Finding, where: list[Finding] | None = None) -> None:
        self._examples[kind] = self._examples.get(kind, 0) + 1
        if self._examples[kind] <= MAX_EXAMPLES:
            (self.notable if where is None else where).append(finding)

    def common_fault(self) -> list[DataError]:
        """What is wrong with all masks alike, if their labels say so; one error, or none."""
        count = self._info.num_classes
        labels = sorted(self._labels - {self._info.ignore_index})
        if self._info.file_labels or self._masks < 2 or not labels or labels[-1] < count:
            return []
        if labels[0] == 1 and labels[-1] == count:
            return [
                DataError(
                    f"the masks hold the labels 1 to {count}, and none holds 0: they seem to count "
                    f"from 1, where the {count} classes are 0 to {count - 1}",
                    mend="subtract 1 from every label that is a class",
                )
            ]
        # Every class but the first is a number that no class has.
        if len(labels) <= count and all(label == 0 or label >= count for label in labels):
            named = ", ".join(map(str, sorted(self._labels)))
            return [
                DataError(
                    f"the masks hold the labels {named}: they seem to be grey levels, not the "
                    f"numbers 0 to {count - 1} of the classes",
                    mend="replace each level by the number of its class",
                )
            ]
        return []

    def nothing_to_learn(self) -> list[DataError]:
        """Of each part whose masks are all empty, an error; and of labels of one class."""
        held = np.flatnonzero(self.balances[LABELED].images)
        if len(held) == 1 < self._info.num_classes:
            name = self._info.classes[held[0]]
            return [
                DataError(
                    f"all training masks hold one class alone, {name}: there is nothing to learn",
                    mend="check how the masks were made, and ignore_index in dataset.yaml (255 "
                    "without one): pixels of that value count for nothing",
                )
            ]
        return [
            DataError(
                f"every {name} mask is empty: all of it is ignore_index",
                mend="check ignore_index in dataset.yaml, and how the masks were made",
            )
            for name, part in (("training", LABELED), ("validation", VAL))
            if self.balances[part].masks and len(self._empty[part]) == self.balances[part].masks
        ]

    def warnings(self, *, thorough: bool = False) -> list[str]:
        """What is worth a look; `thorough`: masks that are set aside were looked at, too."""
        warnings = []
        for name, part in (("training", LABELED), ("validation", VAL), ("set aside", SET_ASIDE)):
            empty, masks = self._empty[part], self.balances[part].masks
            if empty:
                warnings.append(
                    f"{len(empty)} of {masks} {name} masks are empty (all ignore_index), "
                    f"first: {empty[0].item.mask}"
                )
        warnings += balance_warnings(
            self._info.classes,
            self.balances[LABELED],
            self.balances[VAL],
            self.balances[SET_ASIDE] if thorough else None,
        )
        warnings += self._copy_warnings()
        warnings += self.formats.warnings()
        for part, said in (
            (SET_ASIDE, "wrong masks or images, of those whose masks are set aside"),
            (UNLABELED, "unlabeled images that cannot be decoded, which training skips"),
        ):
            found = self._passed_over[part]
            if found:
                warnings.append(f"{said}: {len(found)} (first: {found[0].headline})")
        return warnings

    def confirm_copies(self, stopped: Callable[[], bool]) -> None:
        """Look again, thoroughly, at what was the same in the rows that were compared."""
        again = [
            place for group in self._by_digest.values() if len(group) > 1 for place, _ in group
        ]
        self._by_digest = {}
        for place, look in _looked_at(again, self._info, stopped, thorough=True):
            beat()
            if look.digest:
                self._by_digest.setdefault(look.digest, []).append((place, look.mask_digest))

    def exact_duplicates(self) -> list[tuple[Place, ...]]:
        """Groups of images that are the same, pixel for pixel, of any parts."""
        return [
            tuple(place for place, _ in group)
            for group in self._by_digest.values()
            if len(group) > 1
        ]

    def _copy_warnings(self) -> list[str]:
        leaks: list[Pair] = []
        copies: list[Pair] = []
        contradicting: list[Pair] = []
        for group in self._by_digest.values():
            if len(group) == 1:
                continue
            train = [place for place, _ in group if place.part != VAL]
            val = [place for place, _ in group if place.part == VAL]
            labeled = [place for place in train if place.part == LABELED]
            if train and val:
                leaks += [Pair((labeled or train)[0], place) for place in val]
            copies += [Pair(labeled[0], place) for place in labeled[1:]]
            masked = [(place, mask) for place, mask in group if mask]
            contradicting += [
                Pair(masked[0][0], place) for place, mask in masked[1:] if mask != masked[0][1]
            ]
        warnings = []
        if leaks:
            warnings.append(
                f"{len(leaks)} of {self.formats.images[VAL]} validation images are training "
                f"images, too, pixel for pixel (first: {leaks[0]}): validation mIoU flatters; "
                "remove one of the two"
            )
        if copies:
            warnings.append(
                f"{len(copies)} of {self.formats.images[LABELED]} labeled images are copies of "
                f"another, pixel for pixel (first: {copies[0]}): they count twice; remove one of "
                "the two"
            )
        if contradicting:
            warnings.append(
                f"copies of one image with different masks: {len(contradicting)} (first: "
                f"{contradicting[0]}); at most one of the masks is right"
            )
        return warnings

    def near_duplicates(self, stopped: Callable[[], bool]) -> tuple[list[Pair], dict[str, int]]:
        """Pairs that look the same but are not: train with val, labeled with labeled.

        Returns:
            The first MAX_PAIRS of each kind, and how many there are of it.
        """
        val = [one for one in self._prints if one[0].part == VAL]
        train = [one for one in self._prints if one[0].part != VAL]
        labeled = [one for one in train if one[0].part == LABELED]
        found: list[Pair] = []
        counts = {}
        for kind, left, right in (("train_val", train, val), ("labeled", labeled, None)):
            pairs, counts[kind] = near_pairs(
                _fingerprints(left),
                None if right is None else _fingerprints(right),
                limit=MAX_PAIRS,
                stopped=stopped,
            )
            found += [Pair(left[i][0], (right or left)[j][0]) for i, j in pairs]
        return found, counts


def _near_warnings(pairs: Sequence[Pair], counts: Mapping[str, int]) -> list[str]:
    warnings = []
    first = next((pair for pair in pairs if pair.is_leak), None)
    if first:
        warnings.append(
            f"pairs of a training and a validation image that look the same: {counts['train_val']} "
            f"(first: {first}); validation mIoU flatters: keep a scene in one of the two"
        )
    first = next((pair for pair in pairs if not pair.is_leak), None)
    if first:
        warnings.append(
            f"pairs of labeled images that look the same: {counts['labeled']} (first: {first}); "
            "the second of a pair teaches little, and their masks should agree"
        )
    return warnings


def _fingerprints(prints: Sequence[tuple[Place, bytes, Fingerprint]]) -> Fingerprints:
    return Fingerprints([one for _, _, one in prints], [digest for _, digest, _ in prints])
