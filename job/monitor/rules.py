"""The monitoring guide's warning signs as data: what is watched, when, and what to do about it.

A rule has a condition on one series of numbers. `health` runs the rules over a run; nothing here
knows where the numbers come from.

Source: S4GAN Training Monitoring Guide. Where it gives a sign without a number ("increases
continuously"), the number is ours and its reason stands beside it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from job.config import Config
from job.monitor.guide import (
    LOW_FROM,
    LOW_MIOU,
    MAX_GAP,
    MAX_LEAD,
    NORMAL_GAP,
    OVERFIT_GAP,
    Scale,
    chance_ce,
)

Points = Sequence[tuple[int, float]]
"""(iteration, value), oldest first."""
Severity = Literal["note", "warning", "problem"]


@dataclass(frozen=True)
class Setting:
    """What the rules need to know of a run."""

    config: Config = field(default_factory=Config)
    num_classes: int | None = None
    """None if it is not known: a console log does not say."""

    @property
    def scale(self) -> Scale:
        """From the guide's iterations to the run's."""
        train = self.config.train
        return Scale(
            train.iterations,
            train.iterations if train.supervised_only else self.config.loss.warm_up,
            train.batch_size * train.accumulate,
        )

    @property
    def is_adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return not self.config.train.supervised_only

    @property
    def self_trains(self) -> bool:
        """Whether self-training ever begins."""
        return self.is_adversarial and self.config.loss.warm_up < self.config.train.iterations

    def words(self) -> dict[str, Any]:
        """For the remedies."""
        train, data, loss = self.config.train, self.config.data, self.config.loss
        scale = self.scale
        # The same images in all: of 3, not 1 and twice as often.
        smaller = next((n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0), 1)
        return {
            "lr": f"{train.learning_rate:g}",
            "half_lr": f"{train.learning_rate / 2:g}",
            "half_lr_D": f"{train.learning_rate_D / 2:g}",
            "more_lr_D": f"{train.learning_rate_D * 2 or 1e-4:g}",
            "lr_D": f"{train.learning_rate_D:g}",
            "threshold": f"{loss.threshold_st:g}",
            "less_threshold": f"{min(loss.threshold_st / 2, Config().loss.threshold_st):g}",
            "more_threshold": f"{min(0.9, loss.threshold_st * 2 or 0.2):g}",
            "wait_until": scale.at(5_000),
            "more_weight_decay": f"{train.weight_decay * 2 or 5e-4:g}",
            "more_iterations": train.iterations * 2,
            "half_batch": train.batch_size // smaller,
            "more_accumulate": train.accumulate * smaller,
            "more_val_split": f"{min(0.5, max(0.3, data.val_split * 1.5)):g}",
        }


class Condition(Protocol):
    """Something that a series of numbers may show."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """Since which iteration it holds, and the value that shows it; None if it does not.

        Args:
            points: of the rule's metric, within the rule's iterations.
            series: gives the points of other metrics.
            setting: of the run.
            is_open: it held a moment ago; what swings around a limit should not flicker.
        """


Seen = tuple[int, float] | None
Series = Callable[[str], Points]


@dataclass(frozen=True)
class Rule:
    """One warning sign."""

    id: str
    guide: str
    """The guide's row that it covers."""
    metric: str
    condition: Condition
    severity: Severity
    says: str
    """A sentence; `{value}` and `{since}` are what was seen."""
    remedies: Sequence[Remedy]
    begins: int = 0
    """First of the guide's iterations that counts."""
    needs: Literal["", "adversarial", "self-training"] = ""
    unless: Sequence[str] = ()
    """Rules that say the same already while they hold."""
    only_self_training: bool = False
    """Only iterations after self-training has begun count."""
    calm: int = 3
    """Points in a row without the sign that end it."""

    def first_iteration(self, setting: Setting) -> int:
        """Of a run, the first one that counts."""
        first = setting.scale.at(self.begins)
        if self.only_self_training:
            first = max(first, setting.config.loss.warm_up + 1)
        return first

    def applies(self, setting: Setting) -> bool:
        """Whether the run has what it watches."""
        if self.needs == "self-training":
            return setting.self_trains
        return self.needs == "" or setting.is_adversarial

    def advice(self, setting: Setting, iteration: int) -> list[str]:
        """The remedies that are left for a run at an iteration, with its own numbers."""
        words = setting.words()
        return [
            one.text.format(**words)
            for one in self.remedies
            if one.is_left(setting.config)
            and (one.until is None or iteration < setting.scale.at(one.until))
        ]


@dataclass(frozen=True)
class Remedy:
    """Something to try."""

    text: str
    """With the names of `Setting.words` in braces."""
    is_left: Callable[[Config], bool] = lambda config: True
    """False if the run does it already."""
    until: int | None = None
    """The guide's iteration from which on it is of no use."""


# ---------------------------------------------------------------- conditions

RUINED = 20.0
"""Loss_CE of networks that nothing is to be hoped of: guessing among 1,000 classes costs 6.9."""
GAP_SLACK = 0.03
"""By which a gap has to come back before its sign ends: twice the standard deviation of the median
of three gaps, where an evaluation swings by 0.015."""
GAP_CALM = 5
"""Evaluations in a row without that end it: the medians of neighbours share two of three."""


def _values(points: Points) -> list[float]:
    return [value for _, value in points]


@dataclass(frozen=True)
class Median:
    """The median of the last points is above or below a limit."""

    above: float | None = None
    below: float | None = None
    points: int = 5
    slack: float = 0.1
    """Share of the limit by which it has to come back before the sign ends."""
    lasts: int = 1
    """Times as many points tell whether it has: losses of one batch are noisy."""
    no_more_than_chance: bool = False
    """Of a cross-entropy: the limit is no higher than what guessing costs."""
    not_rising_by: float | None = None
    """It is no sign in a series that has risen by as much within the points before."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series
        last = points[-self.points * (self.lasts if is_open else 1) :]
        if len(last) < self.points:
            return None
        median = statistics.median(_values(last))
        slack = self.slack if is_open else 0.0
        if self.above is not None:
            limit = self.above
            if self.no_more_than_chance and setting.num_classes is not None:
                limit = min(limit, chance_ce(setting.num_classes))
            holds = median > limit * (1 - slack)
        else:
            assert self.below is not None
            holds = median < self.below * (1 + slack)
        if holds and self.not_rising_by is not None:
            before = points[-2 * self.points : -self.points]
            risen = (
                median - statistics.median(_values(before)) if before else last[-1][1] - last[0][1]
            )
            holds = risen < self.not_rising_by * (2 if is_open else 1)
        return (last[0][0], median) if holds else None


@dataclass(frozen=True)
class Stays:
    """The last points are at a value: their median, and none is far from it.

    Once told, the median alone decides, or one line of noise would end it.
    """

    at: float
    within: float
    points: int = 10

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting
        last = points[-self.points :]
        if len(last) < self.points:
            return None
        distances = [abs(value - self.at) for _, value in last]
        if not is_open and max(distances) > 2 * self.within:
            return None
        if statistics.median(distances) > self.within * (2 if is_open else 1):
            return None
        return last[0][0], statistics.median(_values(last))


@dataclass(frozen=True)
class Spike:
    """The last point is several times what the ones before it were."""

    ratio: float = 5.0
    """The guide's examples are 10 and 20 times; half of the smaller one."""
    rise: float = 1.0
    """And by as much, so that a small loss may double and double again."""
    noise: float = 6.0
    """And by so many standard deviations of the logarithm of those before."""
    points: int = 10
    remembers: int = 500
    """Points after which a level that has stayed up is the usual one."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting
        if not points:
            return None
        if is_open:
            # What came before a jump is no measure where it was ruined already.
            return points[-1] if points[-1][1] > RUINED or self._is_up(points) else None
        return points[-1] if self._jumps(points, len(points) - 1) else None

    def _jumps(self, points: Points, index: int) -> bool:
        before = _values(points[max(0, index - self.points) : index])
        return self.is_above(points[index][1], before)

    def _is_up(self, points: Points) -> bool:
        """Whether it has not come back to what it was before it last jumped."""
        end = len(points) - 1
        for index in range(end, max(0, end - self.remembers), -1):
            if self._jumps(points, index):
                before = _values(points[max(0, index - self.points) : index])
                usual = statistics.median(before)
                now = statistics.median(_values(points[max(index, end - 2) :]))
                return now > usual * self.ratio / 2 and now > usual + self.rise / 2
        return False

    def is_above(self, value: float, before: Sequence[float]) -> bool:
        """Whether a value is far above those before it, of which there are enough to say so."""
        if len(before) < 3:
            return False
        usual = statistics.median(before)
        ratio = self.ratio
        if len(before) >= self.points:  # enough to tell how much it swings
            ratio = max(ratio, math.exp(self.noise * _swing(_logs(before))))
        return value > usual * ratio and value > usual + self.rise


@dataclass(frozen=True)
class Rises:
    """Block after block of the last points is higher than the one before, and all is high."""

    above: float
    """The last block is."""
    blocks: int = 4
    points: Sequence[int] = (5, 10, 20, 40, 100)
    """Of each block; what rises slowly, or in noise, shows in the longer ones."""
    ratio: float = 1.2
    """Of a block to the one before."""
    noise: float = 5.0
    """The last block is above the first by so many standard errors of the logarithm of that ratio:
    what only swings may rise four times in a row."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting
        sizes = (self._seen(points, size, is_open=is_open) for size in self.points)
        return next((seen for seen in sizes if seen is not None), None)

    def _seen(self, points: Points, size: int, *, is_open: bool) -> Seen:
        last = points[-self.blocks * size :]
        if len(last) < self.blocks * size:
            return None
        medians = [
            statistics.median(_values(last[first : first + size]))
            for first in range(0, len(last), size)
        ]
        ratio = 1.0 if is_open else self.ratio
        rising = all(b > a * ratio for a, b in itertools.pairwise(medians))
        if rising and not is_open:
            error = math.sqrt(math.pi / size) * _swing(_logs(_values(last)))
            rising = math.log(medians[-1] / max(medians[0], _TINY)) > self.noise * error
        return (last[0][0], medians[-1]) if rising and medians[-1] > self.above else None


_MANY = 500


@dataclass(frozen=True)
class DropsToZero:
    """Nothing in the last points, where there was mostly something: too many zeros for chance."""

    points: int = 6
    """At least."""
    before: int = 40
    """Points before the zeros that tell how often there is something; a quarter is enough."""
    share: float = 0.5
    """Of them, that were not 0."""
    chance: float = 1e-6
    """Probability of as many zeros in a row, from which on they are none. With one unlabeled
    image in an iteration, of which the gate lets two thirds pass, that takes 17 lines."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting
        # More than enough; in a run that has nothing else they need not all be counted each time.
        last = itertools.islice(reversed(points), _MANY)
        zeros = sum(1 for _ in itertools.takewhile(lambda one: one[1] == 0, last))
        if zeros == 0 or (zeros < self.points and not is_open):
            return None
        first = len(points) - zeros
        if is_open:
            return points[first][0], 0.0
        before = points[max(0, first - self.before) : first]
        active = sum(value > 0 for _, value in before)
        if 4 * len(before) < self.before or active < self.share * len(before):
            return None
        # Rule of succession, for each zero after those before it: how often there is something
        # is only known as well as so many points tell.
        chance = math.prod(
            (len(before) - active + 1 + k) / (len(before) + 2 + k) for k in range(zeros)
        )
        return (points[first][0], 0.0) if chance < self.chance else None


@dataclass(frozen=True)
class NeverActive:
    """Not one point so far is above 0, and there are enough to say so."""

    points: int = 10
    images: int = 60
    """Unlabeled images of those points together, at least: where an iteration has one or two, ten
    of them may all fail the gate by chance."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series
        enough = max(self.points, math.ceil(self.images / setting.scale.max_st_count))
        if is_open:  # the first that is not 0 ends it
            return (points[0][0], 0.0) if not points[-1][1] else None
        if len(points) < enough:
            return None
        return (points[0][0], 0.0) if not any(value for _, value in points) else None


@dataclass(frozen=True)
class FallsFromBest:
    """The median of the last scores is well below the best that scores have been."""

    by: float = 0.05
    """Evaluations of a healthy run swing by 0.01 to 0.03."""
    noise: float = 5.0
    """Or by so many times the standard deviation of one evaluation, if that is more: the best of
    many that only swing is far above the last, too."""
    points: int = 3

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting
        if len(points) < 2 * self.points:
            return None
        values = _values(points)
        # Of neighbours the middle one, so that one lucky evaluation is no best.
        smooth = [
            statistics.median(values[first : first + self.points])
            for first in range(len(values) - self.points + 1)
        ]
        fall = max(self.by, self.noise * _swing(values))
        by = fall / 2 if is_open else fall
        best = max(smooth)
        holds = smooth[-1] < best - by and max(values[-self.points :]) < best - by / 2
        if not holds:
            return None
        # It began where it was last near the best, not where the best was.
        near = max(index for index, value in enumerate(smooth) if value >= best - fall / 4)
        return points[near + self.points // 2][0], smooth[-1]


_TINY = 1e-12


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(max(value, _TINY)) for value in values]


def _swing(values: Sequence[float]) -> float:
    """Standard deviation of a point about a curve that rises or falls, by its second differences.

    Robust: of a normal distribution the median distance is 0.6745 deviations, and a second
    difference has the square root of 6 times that of a point.
    """
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return statistics.median(bends) / (0.6745 * math.sqrt(6))


@dataclass(frozen=True)
class Stuck:
    """A low score that has not improved for some time."""

    below: float
    span: int
    """Of the guide's iterations without improvement."""
    improvement: float = 0.01
    points: int = 4
    """Evaluations within that time, at least."""
    slack: float = 0.1
    """Share of the limit above which the best has to be before the sign ends."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        everything = series(_VAL)
        if not points:
            return None
        now = points[-1][0]
        begin = now - setting.scale.at(self.span)
        before = [value for at, value in everything if at <= begin]
        span = [(at, value) for at, value in everything if at > begin]
        if len(span) < self.points or not before:
            return None
        best = max(_values(span))
        below = self.below * (1 + self.slack) if is_open else self.below
        improvement = self.improvement * (2 if is_open else 1)
        holds = best < below and best < max(before) + improvement
        return (span[0][0], span[-1][1]) if holds else None


@dataclass(frozen=True)
class Stagnant:
    """A training score that rises while the validation score does not."""

    span: int
    """Of the guide's iterations."""
    rise: float = 0.03
    """Of the training score from the first third of that time to the last, at least."""
    improvement: float = 0.01
    """Of the validation score likewise, at most."""
    noise: float = 5.0
    """One must rise above the other by so many standard errors of that difference, too: of few
    evaluations on a plateau one score may rise by chance."""
    points: int = 8
    """Evaluations within that time, at least."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        if not points:
            return None
        begin = points[-1][0] - setting.scale.at(self.span)
        if points[0][0] > begin:
            return None
        everything = {name: series(name) for name in ("train_miou", _VAL)}
        train, val = ([value for at, value in all_ if at > begin] for all_ in everything.values())
        if min(len(val), len(train)) < self.points:
            return None
        # Of a whole run the noise is known better than of the last few evaluations.
        swing = math.hypot(*(_swing(_values(all_)) for all_ in everything.values()))
        risen, risen_val = _risen(train), _risen(val)
        sure = max(self.rise, self.noise * _error_of_rise(len(val)) * swing)
        share = 0.5 if is_open else 1.0
        holds = risen > share * self.rise and risen - risen_val > share * sure
        if not holds or risen_val > self.improvement * (2 if is_open else 1):
            return None
        return next(at for at, _ in points if at > begin), statistics.median(val[-3:])


def _risen(values: Sequence[float]) -> float:
    """From the first third of them to the last, without their noise."""
    third = _third(len(values))
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def _error_of_rise(count: int) -> float:
    """Standard error of `_risen` of so many values with a standard deviation of 1.

    The median of n normally distributed values has one of sqrt(pi / 2n).
    """
    return math.sqrt(math.pi / _third(count))


def _third(count: int) -> int:
    return max(3, count // 3)


@dataclass(frozen=True)
class Level:
    """A learning rate that does not fall."""

    points: int = 10

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting, is_open
        if len(points) >= 2 and points[-1][1] > points[-2][1] * (1 + 1e-9):
            return points[-1]
        last = points[-self.points :]
        if len(last) < self.points or last[0][1] == 0 or last[-1][1] < last[0][1]:
            return None
        return last[0][0], last[-1][1]


@dataclass(frozen=True)
class Within:
    """The median of the last points is above one limit, and not above another."""

    above: float
    upto: float
    points: int = 3
    slack: float = GAP_SLACK

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting
        last = points[-self.points :]
        if len(last) < self.points:
            return None
        median = statistics.median(_values(last))
        above = self.above - self.slack if is_open else self.above
        return (last[0][0], median) if above < median <= self.upto else None


@dataclass(frozen=True)
class BothLow:
    """Training and validation scores are both low, and close to each other."""

    below: float
    gap: float
    points: int = 3

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del setting
        last = points[-self.points :]
        if len(last) < self.points:
            return None
        below = self.below * 1.05 if is_open else self.below
        gap = self.gap + GAP_SLACK if is_open else self.gap
        train = statistics.median(_values(series("train_miou")[-self.points :]))
        val = statistics.median(_values(last))
        return (last[0][0], val) if max(train, val) < below and train - val <= gap else None


@dataclass(frozen=True)
class Happened:
    """It was told of; one word is enough."""

    def __call__(self, points: Points, series: Series, setting: Setting, *, is_open: bool) -> Seen:
        """See `Condition`."""
        del series, setting, is_open
        return points[-1] if points else None


# ---------------------------------------------------------------- remedies

_VAL = "val_miou"
_LABELS = Remedy("check that the labels are right: s4gan data check, predictions.png")
_LOW_RATE = 2.5e-6
"""A hundredth of the guide's."""
_HALF_LR = Remedy(
    "--learning-rate {half_lr}", lambda config: config.train.learning_rate > _LOW_RATE
)
_MORE_LR = Remedy(
    "--learning-rate 2.5e-4 (it is {lr})", lambda config: config.train.learning_rate <= _LOW_RATE
)
_HALF_LR_D = Remedy(
    "--learning-rate-D {half_lr_D}", lambda config: config.train.learning_rate_D > 0
)
_HALF_BOTH = (_HALF_LR, _HALF_LR_D)
_MORE_LR_D = Remedy("--learning-rate-D {more_lr_D} (it is {lr_D})")
_MIRROR = Remedy("--random-mirror", lambda config: not config.data.random_mirror)
_SCALE = Remedy("--random-scale", lambda config: not config.data.random_scale)
_LOWER_THRESHOLD = Remedy(
    "--threshold-st {less_threshold} (it is {threshold})",
    lambda config: config.loss.threshold_st > 0,
)
_SHARE = Remedy(
    "--set loss.gate_share=0.5, which lets the better half of them pass in any case",
    lambda config: config.loss.gate_share == 0,
)
_HIGHER_THRESHOLD = Remedy(
    "--threshold-st {more_threshold} (it is {threshold})",
    lambda config: config.loss.threshold_st < 0.9,
)
_MORE_DECAY = Remedy("--set train.weight_decay={more_weight_decay}")
_LEARNING_AT_ALL = Remedy("check that the validation mIoU rises at all")
_USE_BEST = Remedy("use best_model.pth, not final_model.pth, and stop earlier")
_BROKEN = Remedy("look for broken images and empty masks: s4gan data check")

# ---------------------------------------------------------------- the rules

RULES: Sequence[Rule] = (
    # -- cross-entropy
    Rule(
        "ce_not_learning",
        "Loss_CE stays > 4.0 after 5000 iterations",
        "loss_ce",
        Median(above=4.0, slack=0.2, lasts=2, no_more_than_chance=True),
        "problem",
        "Loss_CE stays at {value:.3f}: the model is not learning",
        (_LABELS, _HALF_LR, _MORE_LR),
        begins=5_000,
        unless=("ce_exploded",),
    ),
    Rule(
        "ce_exploded",
        "Problem 2: unstable training, from the beginning",
        "loss_ce",
        Median(above=RUINED, points=3),
        "problem",
        "Loss_CE is {value:.4g}, far above what guessing costs: training diverges",
        (*_HALF_BOTH, _BROKEN),
    ),
    Rule(
        "ce_spike",
        "Sudden spike (1.0 -> 10.0)",
        "loss_ce",
        Spike(),
        "problem",
        "Loss_CE has jumped, and is {value:.3f} now: training is unstable",
        (*_HALF_BOTH, _BROKEN, Remedy("start again from a checkpoint before it")),
    ),
    Rule(
        "non_finite",
        "NaN or inf",
        "non_finite",
        Happened(),
        "problem",
        "a loss or a weight is NaN or infinite: training has crashed",
        (*_HALF_BOTH, _BROKEN),
        calm=50,  # a log may go on, and have one in every few lines
    ),
    # -- feature matching
    Rule(
        "fm_zero",
        "Loss_FM stays at 0.000",
        "loss_fm",
        Stays(0.0, 0.0005),
        "warning",
        "Loss_FM stays at 0.000: the discriminator does not work",
        (_MORE_LR_D, Remedy("see whether Loss_D moves")),
        begins=1_000,
        needs="adversarial",
    ),
    Rule(
        "fm_rising",
        "Loss_FM increases continuously",
        "loss_fm",
        Rises(above=0.1),  # twice the highest of the guide's own targets, which rise too
        "warning",
        "Loss_FM keeps rising and is at {value:.3f}: the GAN is unstable",
        _HALF_BOTH,
        needs="adversarial",
    ),
    # -- self-training
    Rule(
        "st_count_zero",
        "ST_Count always 0",
        "st_count",
        NeverActive(),
        "warning",
        "ST_Count is always 0: no unlabeled image passes the threshold",
        (
            _LOWER_THRESHOLD,
            Remedy("or wait: it may begin by iteration {wait_until}", until=5_000),
            _SHARE,
            _LEARNING_AT_ALL,
        ),
        needs="self-training",
        only_self_training=True,
        calm=1,
    ),
    Rule(
        "st_never_active",
        "Loss_ST always 0.000 after iteration 1000",
        "loss_st",
        NeverActive(),
        "problem",
        "Loss_ST is always 0.000: self-training has never begun, the threshold is too high",
        (_LOWER_THRESHOLD, _SHARE, _LEARNING_AT_ALL),
        begins=5_000,  # up to there the guide advises to wait
        needs="self-training",
        only_self_training=True,
        calm=1,
    ),
    Rule(
        "st_count_dropped",
        "ST_Count suddenly drops to 0",
        "st_count",
        DropsToZero(),
        "problem",
        "ST_Count has dropped to 0: the model is degrading",
        (*_HALF_BOTH, Remedy("go back to a checkpoint before it")),
        needs="self-training",
    ),
    Rule(
        "st_high",
        "Loss_ST > 5.0",
        "loss_st",
        Median(above=5.0, slack=0.2, lasts=2),
        "warning",
        "Loss_ST is {value:.3f}: the pseudo-labels are poor",
        (_HIGHER_THRESHOLD, _HALF_LR),
        needs="self-training",
        only_self_training=True,
    ),
    # -- discriminator
    Rule(
        "d_stuck",
        "Loss_D stays at 0.693",
        "loss_d",
        Stays(0.693, 0.01),
        "problem",
        "Loss_D stays at {value:.3f}, which is guessing: the discriminator is not training",
        (_MORE_LR_D,),
        begins=1_000,
        needs="adversarial",
    ),
    Rule(
        "d_collapsed",
        "Loss_D drops to 0.0",
        "loss_d",
        Median(below=0.02, slack=1.5),
        "problem",
        "Loss_D has dropped to {value:.3f}: the discriminator is too strong",
        (_HALF_LR_D,),
        needs="adversarial",
    ),
    Rule(
        "d_unstable",
        "Loss_D above 1.0",
        "loss_d",
        Median(above=1.0, slack=0.2, lasts=2),
        "problem",
        "Loss_D is {value:.3f}: training is unstable",
        (_HALF_LR_D, _HALF_LR),
        needs="adversarial",
    ),
    # -- scores
    Rule(
        "score_non_finite",
        "Problem 2: NaN or inf values, of a score",
        "score_non_finite",
        Happened(),
        "problem",
        "training or validation mIoU is NaN or infinite: it is the best of nothing",
        (*_HALF_BOTH, _BROKEN),
    ),
    Rule(
        "train_not_learning",
        "Training mIoU < 0.20 after 5000 iterations",
        "train_miou",
        Median(below=0.20, slack=0.25, points=3, not_rising_by=0.02),
        "problem",
        "training mIoU is {value:.4f}: the model is not learning",
        (_LABELS, _HALF_LR, _MORE_LR),
        begins=5_000,
    ),
    Rule(
        "train_degrading",
        "Training mIoU decreases over time",
        "train_miou",
        FallsFromBest(),
        "problem",
        "training mIoU has fallen to {value:.4f}: the model is degrading",
        (*_HALF_BOTH, Remedy("go back to a checkpoint before it")),
    ),
    Rule(
        "val_not_learning",
        "Validation mIoU < 0.20 where 0.40 is expected (iteration 5000)",
        "val_miou",
        Median(below=0.20, slack=0.25, points=3, not_rising_by=0.02),
        "problem",
        "validation mIoU is {value:.4f}: nothing that is learned holds for new images",
        (_LABELS, _MIRROR, _SCALE, _HALF_LR, _MORE_LR, Remedy("check the balance of the classes")),
        begins=5_000,
        unless=("train_not_learning",),
    ),
    Rule(
        "val_stuck",
        "Problem 1: validation mIoU stuck at 0.20-0.30 after 10000 iterations",
        "val_miou",
        Stuck(below=0.30, span=5_000),
        "problem",
        "validation mIoU is stuck at {value:.4f}",
        (_LABELS, _MIRROR, _SCALE, _HALF_LR, Remedy("check the balance of the classes")),
        begins=10_000,
        unless=("train_not_learning", "val_not_learning"),
    ),
    Rule(
        "val_stagnant",
        "Problem 1: training mIoU increasing but validation stagnant",
        "val_miou",
        Stagnant(span=15_000),
        "warning",
        "validation mIoU stays at {value:.4f} while training mIoU rises",
        (_LABELS, _MIRROR, _SCALE, _HALF_LR, Remedy("check the balance of the classes")),
        begins=5_000,
        unless=("val_stuck", "val_not_learning", "val_degrading", "overfitting"),
    ),
    Rule(
        "val_degrading",
        "Validation mIoU decreases (overfitting)",
        "val_miou",
        FallsFromBest(),
        "problem",
        "validation mIoU has fallen to {value:.4f}",
        (_USE_BEST, _HALF_LR, _MIRROR, _SCALE),
    ),
    Rule(
        "overfitting",
        "Problem 4: train/val gap > 0.20",
        "gap",
        Median(above=OVERFIT_GAP, points=3, slack=GAP_SLACK / OVERFIT_GAP),
        "problem",
        "training mIoU is {value:.2f} above validation mIoU: overfitting",
        (
            _USE_BEST,
            _MORE_DECAY,
            _MIRROR,
            _SCALE,
            _HALF_LR,
            Remedy("more labeled images"),
            Remedy(
                "--val-split {more_val_split}, if there is no val/ folder",
                lambda config: config.data.val_split < 0.5,
            ),
        ),
        calm=GAP_CALM,
    ),
    Rule(
        "slight_overfit",
        "Table: slight overfit, gap 0.12",
        "gap",
        Within(above=NORMAL_GAP, upto=MAX_GAP),
        "note",
        "training mIoU is {value:.2f} above validation mIoU: a slight overfit, acceptable",
        (_MIRROR, _SCALE, Remedy("more labeled images")),
        unless=("overfitting", "large_gap"),
        calm=GAP_CALM,
    ),
    Rule(
        "large_gap",
        "Gap between Train/Val should stay < 0.15",
        "gap",
        Within(above=MAX_GAP, upto=OVERFIT_GAP),
        "warning",
        "training mIoU is {value:.2f} above validation mIoU, which should stay below 0.15",
        (_MIRROR, _SCALE, _MORE_DECAY, Remedy("more labeled images"), _USE_BEST),
        unless=("overfitting",),
        calm=GAP_CALM,
    ),
    Rule(
        "val_above_train",
        "Validation mIoU should be slightly lower than training mIoU",
        "lead",
        Median(above=MAX_LEAD, points=3, slack=GAP_SLACK / MAX_LEAD),
        "note",
        "validation mIoU is {value:.2f} above training mIoU: the two do not measure the same",
        (
            Remedy("look for validation images among those for training: s4gan data check"),
            Remedy("see whether they are easier, or hold fewer classes"),
            Remedy("the training score is of labeled images only: few of them tell little"),
        ),
        calm=GAP_CALM,
    ),
    Rule(
        "underfitting",
        "Table: underfitting, both low",
        "val_miou",
        BothLow(below=LOW_MIOU, gap=NORMAL_GAP),
        "warning",
        "training and validation mIoU are both low ({value:.4f}): underfitting",
        (
            Remedy("--set train.iterations={more_iterations}"),
            _LABELS,
            Remedy("a larger model.backbone, or pretrained weights"),
        ),
        begins=LOW_FROM,
        unless=("train_not_learning", "val_not_learning", "val_stuck"),
    ),
    # -- learning rates
    Rule(
        "lr_not_decaying",
        "Both learning rates decrease smoothly",
        "lr_g",
        Level(),
        "warning",
        "the generator's learning rate does not fall: {value:.2e}",
        (Remedy("--set train.power=0.9"),),
    ),
    Rule(
        "lr_D_not_decaying",
        "Both learning rates decrease smoothly",
        "lr_d",
        Level(),
        "warning",
        "the discriminator's learning rate does not fall: {value:.2e}",
        (Remedy("--set train.power=0.9"),),
        needs="adversarial",
    ),
    # -- memory
    Rule(
        "out_of_memory",
        "Problem 5: CUDA out of memory",
        "out_of_memory",
        Happened(),
        "problem",
        "the GPU's memory is not enough",
        (
            Remedy(
                "--batch-size {half_batch} --set train.accumulate={more_accumulate}",
                lambda config: config.train.batch_size > 1,
            ),
            Remedy("a smaller data.crop_size", lambda config: config.train.batch_size == 1),
            Remedy("close what else uses the GPU"),
        ),
    ),
)
"""In the guide's order."""


def rules_by_id() -> Mapping[str, Rule]:
    """Every rule by its id."""
    return {rule.id: rule for rule in RULES}
