"""The monitoring guide's numbers: what a healthy run looks like, by iteration.

All iterations are those of the guide's own run: 50,000 of them, self-training after the first
1,000. `Scale` brings them to a run of another length.

Source: S4GAN Training Monitoring Guide, "What to Watch During Training" and "Expected Progress
Timeline".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

ITERATIONS = 50_000
ST_START = 1_000
LOG_EVERY = 100
"""Iterations from one line of losses to the next."""
MAX_ST_COUNT = 16
"""Images of the guide's iteration: batches of 4, 4 of them."""
MAX_GAP = 0.15
"""Largest train/val gap that is no severe overfitting. Source: the guide's closing checklist."""
END = 47_500
"""Where what the guide says of the end of training begins."""


@dataclass(frozen=True)
class Scale:
    """Brings the guide's iterations and counts to a run's.

    The guide's warm-up ends where self-training begins; the rest is stretched or shortened.
    """

    iterations: int = ITERATIONS
    """Of the run."""
    st_start: int = ST_START
    """Last iteration without self-training; as many as `iterations`, or more: there is none."""
    max_st_count: int = MAX_ST_COUNT
    """Unlabeled images of one iteration."""

    def at(self, iteration: float) -> int:
        """The run's iteration for one of the guide's."""
        if not 0 < self.st_start < self.iterations:
            return round(iteration * self.iterations / ITERATIONS)
        if iteration <= ST_START:
            return round(iteration * self.st_start / ST_START)
        rest = (self.iterations - self.st_start) / (ITERATIONS - ST_START)
        return round(self.st_start + (iteration - ST_START) * rest)

    def length(self, iterations: float) -> int:
        """As many of the guide's iterations after its warm-up, in the run's."""
        return self.at(ST_START + iterations) - self.at(ST_START)

    def of_guide(self, iteration: int) -> float:
        """The guide's iteration for one of the run's."""
        if not 0 < self.st_start < self.iterations:
            return iteration * ITERATIONS / self.iterations
        if iteration <= self.st_start:
            return iteration * ST_START / self.st_start
        rest = (ITERATIONS - ST_START) / (self.iterations - self.st_start)
        return ST_START + (iteration - self.st_start) * rest

    def count(self, of_guide: float) -> float:
        """The run's ST_Count for one of the guide's."""
        return of_guide * self.max_st_count / MAX_ST_COUNT


@dataclass(frozen=True)
class Band:
    """Where a metric should be within some iterations."""

    begin: int
    end: int
    low: float
    high: float
    good: Literal["within", "low", "high"]
    """On which side of the band nothing is wrong either."""

    def holds(self, value: float) -> bool:
        """Whether a value is where it should be."""
        return (value >= self.low or self.good == "low") and (
            value <= self.high or self.good == "high"
        )

    def scaled(self, metric: str, scale: Scale) -> Band:
        """The same for a run of another length and of other batches."""
        count = scale.count if metric == "st_count" else float
        return Band(
            scale.at(self.begin), scale.at(self.end), count(self.low), count(self.high), self.good
        )


TARGETS: Mapping[str, Sequence[Band]] = {
    "loss_ce": (
        Band(0, 1_000, 3.0, 5.0, "low"),
        Band(5_000, 20_000, 1.0, 2.0, "low"),
        Band(20_000, END, 0.5, 1.0, "low"),
        Band(END, 50_000, 0.0, 0.5, "low"),
    ),
    "loss_fm": (
        Band(0, 1_000, 0.001, 0.01, "within"),
        Band(10_000, END, 0.005, 0.02, "within"),
        Band(END, 50_000, 0.01, 0.05, "within"),
    ),
    "loss_st": (
        Band(0, 1_000, 0.0, 0.0, "within"),
        Band(1_000, 20_000, 1.0, 3.0, "low"),
        Band(20_000, END, 0.3, 1.0, "low"),
        Band(END, 50_000, 0.0, 0.5, "low"),
    ),
    "loss_d": (
        Band(0, 1_000, 0.5, 0.7, "within"),
        Band(5_000, 20_000, 0.3, 0.6, "within"),
        Band(20_000, 50_000, 0.2, 0.5, "within"),
    ),
    "st_count": (
        Band(0, 1_000, 0, 2, "high"),
        Band(5_000, 20_000, 2, 8, "high"),
        Band(20_000, END, 5, 16, "high"),
        Band(END, 50_000, 10, 16, "high"),
    ),
}
"""The guide's "Target values", for the charts; the timeline's own numbers are in `PHASES`."""

MIOU_TARGETS: Mapping[str, Sequence[tuple[int, float, float]]] = {
    "train_miou": (
        (500, 0.25, 0.40),
        (5_000, 0.45, 0.60),
        (10_000, 0.55, 0.70),
        (25_000, 0.65, 0.80),
        (50_000, 0.70, 0.85),
    ),
    "val_miou": (
        (500, 0.20, 0.35),
        (5_000, 0.40, 0.55),
        (10_000, 0.50, 0.65),
        (25_000, 0.60, 0.75),
        (50_000, 0.65, 0.80),
    ),
}
"""(iteration, lowest, highest) of what to expect there."""


@dataclass(frozen=True)
class Phase:
    """A part of the guide's timeline."""

    name: str
    begin: int
    end: int
    """Its last iteration."""
    what: str
    """What happens in it."""
    bands: Mapping[str, tuple[float, float, Literal["within", "low", "high"]]]
    """By metric: lowest, highest, and on which side nothing is wrong either."""


PHASES: Sequence[Phase] = (
    Phase(
        "warm-up",
        0,
        1_000,
        "basic features are learned",
        {
            "loss_ce": (3.0, 5.0, "low"),
            "loss_d": (0.5, 0.7, "within"),
            "st_count": (0, 2, "high"),
            "val_miou": (0.20, 0.35, "high"),
        },
    ),
    Phase(
        "early learning",
        1_000,
        5_000,
        "self-training begins",
        {
            "loss_ce": (1.5, 2.5, "low"),
            "loss_d": (0.3, 0.6, "within"),
            "st_count": (2, 8, "high"),
            "val_miou": (0.35, 0.55, "high"),
        },
    ),
    Phase(
        "main training",
        5_000,
        20_000,
        "predictions are refined with the unlabeled images",
        {
            "loss_ce": (0.8, 1.5, "low"),
            "loss_st": (0.5, 2.0, "low"),
            "loss_d": (0.2, 0.5, "within"),
            "st_count": (5, 12, "high"),
            "val_miou": (0.55, 0.70, "high"),
        },
    ),
    Phase(
        "convergence",
        20_000,
        50_000,
        "the last refinement",
        {
            "loss_ce": (0.3, 0.8, "low"),
            "loss_st": (0.2, 1.0, "low"),
            "loss_d": (0.2, 0.4, "within"),
            "st_count": (8, 16, "high"),
            "val_miou": (0.65, 0.80, "high"),
        },
    ),
)


HIGHEST_FM = 0.05
"""The highest that the guide has for Loss_FM anywhere; its timeline does not speak of it."""


def phase_at(iteration: int, scale: Scale) -> Phase:
    """The phase that an iteration of a run is in."""
    for phase in PHASES[:-1]:
        if iteration <= scale.at(phase.end):
            return phase
    return PHASES[-1]


Fit = Literal[
    "excellent",
    "good",
    "slight overfit",
    "overfitting",
    "underfitting",
    "too early to tell",
    "unclear",
]
"""The guide's five; what low scores are while everybody's are low; and a validation score that is
so far above the training score that the two do not measure the same."""

EXCELLENT_GAP = 0.05
"""Between the guide's examples 0.03 (excellent) and 0.06 (good)."""
NORMAL_GAP = 0.10
"""Source: the guide, "Validation mIoU": 0.02 to 0.10 is normal."""
OVERFIT_GAP = 0.20
"""Source: the guide, Problem 4."""
MAX_LEAD = 0.20
"""Of validation over training. The guide wants validation slightly lower; in healthy runs of few
labeled images it was up to 0.10 higher. Ours: twice that, as far as overfitting is on the other
side."""
LOW_MIOU = 0.40
"""Both below: underfitting. The guide's example is 0.35 and 0.33; nothing else it calls low."""


LOW_FROM = 25_000
"""The guide's iteration where low scores are a fault; in its timeline, training has converged."""


def fit_of(train_miou: float, val_miou: float, *, is_early: bool = False) -> Fit:
    """The guide's status of a pair of scores, each 0..1.

    Args:
        train_miou: on training images.
        val_miou: on validation images.
        is_early: before `LOW_FROM` scores may be low.

    Source: the guide, "Overfitting Detection".
    """
    gap = train_miou - val_miou
    if gap > OVERFIT_GAP:
        return "overfitting"
    if gap > NORMAL_GAP:
        return "slight overfit"
    if -gap > MAX_LEAD:
        return "unclear"
    if max(train_miou, val_miou) < LOW_MIOU:
        return "too early to tell" if is_early else "underfitting"
    return "excellent" if gap <= EXCELLENT_GAP else "good"


def miou_band(metric: str, iteration: float) -> tuple[float, float]:
    """What a score should be at one of the guide's iterations, between its five by a line.

    Args:
        metric: `train_miou` or `val_miou`.
        iteration: before the first of the five it is as there.
    """
    points = MIOU_TARGETS[metric]
    if iteration <= points[0][0]:
        return points[0][1:]
    for (begin, *low_high), (end, *after) in itertools.pairwise(points):
        if iteration <= end:
            share = (iteration - begin) / (end - begin)
            low, high = (a + share * (b - a) for a, b in zip(low_high, after, strict=True))
            return low, high
    return points[-1][1:]


def chance_ce(num_classes: int) -> float:
    """Cross-entropy of guessing all classes alike."""
    return math.log(num_classes)
