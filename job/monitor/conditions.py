"""What a series of numbers may show: that it is high, stays, rises, falls, drops, is stuck.

Robust to noise, and with a smaller limit for what is told of already, so that it does not flicker.
Where the guide gives a sign without a number ("increases continuously"), the number is ours and
its reason stands beside it.

Source: S4GAN Training Monitoring Guide.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from job.monitor.guide import LOG_EVERY, chance_ce
from job.monitor.setting import Setting

Points = Sequence[tuple[int, float]]
"""(iteration, value), oldest first."""
Series = Callable[[str], Points]
"""The points of a metric by its name."""
Seen = tuple[int, float] | None
"""Since which iteration, and the value that shows it."""


class Condition(Protocol):
    """Something that a series of numbers may show."""

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """Since which iteration it holds, and the value that shows it; None if it does not.

        Args:
            points: of the rule's metric, within the rule's iterations.
            series: gives the points of other metrics.
            setting: of the run.
            open_since: it held a moment ago, and began there; what swings around a limit should not
                flicker. None if it did not hold.
        """


RUINED = 20.0
"""Loss_CE of networks that nothing is to be hoped of: guessing among 1,000 classes costs 6.9."""
GAP_SLACK = 0.03
"""By which a gap has to come back before its sign ends: twice the standard deviation of the median
of three gaps, where an evaluation swings by 0.015."""

FALLEN = 0.2
"""Share of a limit: scores that have been so far above it are not stuck, they have fallen, of which
other rules tell."""


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
    from_the_first: bool = False
    """It is no sign in a series that has been on the other side of the limit: that is a fall or a
    rise, of which other rules tell."""

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series
        is_open = open_since is not None
        count = self.points
        if open_since is not None:  # what was before it began says nothing of whether it is over
            since = len(points) - bisect.bisect_left(points, (open_since, -math.inf))
            count = max(count, min(since, self.lasts * count))
        last = points[-count:]
        if len(last) < self.points:
            return None
        median = statistics.median(_values(last))
        slack = self.slack if is_open else 0.0
        if self.above is not None:
            limit = self.above
            if self.no_more_than_chance and setting.num_classes is not None:
                limit = min(limit, chance_ce(setting.num_classes))
            sign = 1.0
        else:
            assert self.below is not None
            limit, sign = self.below, -1.0
        holds = sign * median > sign * limit * (1 - sign * slack)
        if holds and self.from_the_first and not is_open:
            holds = not self._was_beyond(points, sign, limit)
        if holds and self.not_rising_by is not None:
            before = points[-2 * self.points : -self.points]
            risen = (
                median - statistics.median(_values(before)) if before else last[-1][1] - last[0][1]
            )
            holds = risen < self.not_rising_by * (2 if is_open else 1)
        if not holds:
            return None
        first = next((at for at, value in last if sign * value > sign * limit), last[0][0])
        return first, median

    def _was_beyond(self, points: Points, sign: float, limit: float) -> bool:
        """Whether the median has ever been on the good side, and clearly."""
        values = _values(points)
        clearly = sign * limit * (1 - sign * self.slack)
        return any(
            sign * statistics.median(values[end - self.points : end]) < clearly
            for end in range(self.points, len(values))
        )


@dataclass(frozen=True)
class Stays:
    """The last points are at a value: their median, and none is far from it.

    Once told, the median alone decides, or one line of noise would end it.
    """

    at: float
    within: float
    points: int = 10

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series
        is_open = open_since is not None
        count = setting.lines(self.points)
        last = points[-count:]
        if len(last) < count:
            return None
        distances = [abs(value - self.at) for _, value in last]
        if not is_open and max(distances) > 2 * self.within:
            return None
        if statistics.median(distances) > self.within * (2 if is_open else 1):
            return None
        return last[0][0], statistics.median(_values(last))


@dataclass(frozen=True)
class Spike:
    """The last point is several times what the ones before it were.

    Where losses are logged more often than the guide's are, the last two: of one bad batch more
    than one line in a hundred iterations is no more than that.
    """

    ratio: float = 5.0
    """The guide's examples are 10 and 20 times; half of the smaller one."""
    rise: float = 1.0
    """And by as much, so that a small loss may double and double again."""
    noise: float = 6.0
    """And by so many standard deviations of the logarithm of those before."""
    points: int = 10
    swings: int = 50
    """Points that tell how much it swings, if there are as many: ten tell it badly."""

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series, setting
        if not points:
            return None
        if open_since is not None:
            # What came before a jump is no measure where it was ruined already.
            is_up = points[-1][1] > RUINED or self._is_up(points, open_since)
            return points[-1] if is_up else None
        is_often = len(points) > 1 and points[-1][0] - points[-2][0] < LOG_EVERY
        count = 2 if is_often else 1
        before = _values(points[-count - self.swings : -count])
        if not all(self.is_above(value, before) for _, value in points[-count:]):
            return None
        return points[-count][0], points[-1][1]

    def _is_up(self, points: Points, jumped_at: int) -> bool:
        """Whether it has not come back to what it was before that jump."""
        index = bisect.bisect_left(points, (jumped_at, -math.inf))
        if not 0 < index < len(points):  # it is trained again, from before it
            return False
        usual = statistics.median(_values(points[max(0, index - self.points) : index]))
        now = statistics.median(_values(points[max(index, len(points) - 3) :]))
        return now > usual * self.ratio / 2 and now > usual + self.rise / 2

    def is_above(self, value: float, before: Sequence[float]) -> bool:
        """Whether a value is far above those before it, of which there are enough to say so."""
        if len(before) < 3:
            return False
        usual = statistics.median(before[-self.points :])
        ratio = self.ratio
        if len(before) >= self.points:  # enough to tell how much it swings
            ratio = max(ratio, math.exp(self.noise * _swing(_logs(before))))
        return value > usual * ratio and value > usual + self.rise


@dataclass(frozen=True)
class Rises:
    """Block after block of the last points is higher than the one before, and all is high.

    It is over when the last points are back at what they were before, or where nothing is wrong:
    what has risen and stays up is not mended.
    """

    above: float
    """The last block is."""
    fine: float
    """Up to here nothing is wrong, whatever it was before."""
    blocks: int = 4
    points: Sequence[int] = (5, 10, 20, 40, 100)
    """Of each block; what rises slowly, or in noise, shows in the longer ones."""
    ratio: float = 1.2
    """Of a block to the one before."""
    noise: float = 5.0
    """The last block is above the first by so many standard errors of the logarithm of that ratio:
    what only swings may rise four times in a row."""
    back: float = 1.2
    """Times what it was before, up to which it is back there."""

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series, setting
        if open_since is not None:
            return self._stays_up(points, open_since)
        sizes = (self._seen(points, size) for size in self.points)
        return next((seen for seen in sizes if seen is not None), None)

    def _seen(self, points: Points, size: int) -> Seen:
        last = points[-self.blocks * size :]
        if len(last) < self.blocks * size:
            return None
        first, *others = (
            statistics.median(_values(last[begin : begin + size]))
            for begin in range(0, len(last), size)
        )
        if not all(b > a * self.ratio for a, b in itertools.pairwise((first, *others))):
            return None
        error = math.sqrt(math.pi / size) * _swing(_logs(_values(last)))
        if others[-1] <= self.above or math.log(others[-1] / max(first, _TINY)) <= (
            self.noise * error
        ):
            return None
        # Where it last was what it had been: the window may begin long before the rise does.
        return max(at for at, value in last if value <= first), others[-1]

    def _stays_up(self, points: Points, risen_from: int) -> Seen:
        size = 2 * self.points[0]
        index = bisect.bisect_right(points, (risen_from, math.inf))
        if not index:  # it is trained again, from before it
            return None
        before = statistics.median(_values(points[max(0, index - size) : index]))
        now = statistics.median(_values(points[-size:]))
        return (risen_from, now) if now > max(self.back * before, self.fine) else None


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

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series, setting
        is_open = open_since is not None
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

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series
        is_open = open_since is not None
        enough = max(
            setting.lines(self.points), math.ceil(self.images / setting.scale.max_st_count)
        )
        if is_open:  # the first that is not 0 ends it
            return (points[0][0], 0.0) if not points[-1][1] else None
        if len(points) < enough:
            return None
        return (points[0][0], 0.0) if not any(value for _, value in points) else None


@dataclass(frozen=True)
class Seldom:
    """So small a share of the unlabeled images passes the gate that they hardly teach anything."""

    share: float = 1 / 16
    """Half of the guide's lowest target, 2 of 16 images."""
    points: int = 20
    images: int = 80
    """Unlabeled images of those points together, at least. Of as many, where the guide's lowest
    target is met, less than half of it passes by chance in 1 of 30 such stretches."""
    slack: float = 1.0
    """Share of the limit by which it has to come back before the sign ends: the guide's lowest
    target."""

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series
        most = setting.scale.max_st_count
        enough = max(setting.lines(self.points), math.ceil(self.images / most))
        last = points[-enough * (2 if open_since is not None else 1) :]
        if len(last) < enough:
            return None
        share = statistics.fmean(_values(last)) / most
        limit = self.share * (1 + (self.slack if open_since is not None else 0))
        return (last[0][0], share) if share < limit else None


@dataclass(frozen=True)
class FallsFromBest:
    """The median of the last scores is well below the best that scores have been."""

    by: float = 0.05
    """Evaluations of a healthy run swing by 0.01 to 0.03."""
    noise: float = 5.0
    """Or by so many times the standard deviation of one evaluation, if that is more: the best of
    many that only swing is far above the last, too."""
    certain: float = 0.15
    """Or all of the last by as much below the best of all: no evaluation is as lucky as that."""
    points: int = 3

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series, setting
        values = _values(points)
        last = values[-self.points :]
        if len(values) > self.points:
            top = max(values)
            by = self.certain / 2 if open_since is not None else self.certain
            if max(last) < top - by:
                return points[values.index(top) + 1][0], statistics.median(last)
        if len(values) < 2 * self.points:
            return None
        # Of neighbours the middle one, so that one lucky evaluation is no best.
        smooth = [
            statistics.median(values[first : first + self.points])
            for first in range(len(values) - self.points + 1)
        ]
        fall = max(self.by, self.noise * _swing(values))
        by = fall / 2 if open_since is not None else fall
        best = max(smooth)
        holds = smooth[-1] < best - by and max(last) < best - by / 2
        if not holds:
            return None
        # It began where it was last near the best, not where the best was.
        near = max(index for index, value in enumerate(smooth) if value >= best - fall / 4)
        return points[near + self.points // 2][0], smooth[-1]


@dataclass(frozen=True)
class Parts:
    """Validation falls from evaluation to evaluation, and training rises from each to the next."""

    points: int = 4
    falls: float = 0.05
    rises: float = 0.02
    """From the first of these points to the last, at least."""
    noise: float = 4.0
    """Or by so many standard deviations of one evaluation, if that is more."""

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del setting
        if len(points) < self.points:
            return None
        if open_since is not None:
            index = bisect.bisect_left(points, (open_since, -math.inf))
            before, now = points[min(index, len(points) - 1)][1], points[-1][1]
            return (open_since, now) if now < before - self.falls / 2 else None
        train, val = _values(series("train_miou")), _values(points)
        for values, sign, least in ((train, 1, self.rises), (val, -1, self.falls)):
            last = [sign * value for value in values[-self.points :]]
            enough = max(least, self.noise * _swing(values))
            if not all(b > a for a, b in itertools.pairwise(last)) or last[-1] - last[0] < enough:
                return None
        return points[-self.points][0], points[-1][1]


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

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        is_open = open_since is not None
        everything = series("val_miou")
        if not points:
            return None
        now = points[-1][0]
        begin = _begin(everything, now - setting.scale.length(self.span), self.points)
        before = [value for at, value in everything if at <= begin]
        span = [(at, value) for at, value in everything if at > begin]
        if len(span) < self.points or not before:
            return None
        best = max(_values(span))
        below = self.below * (1 + self.slack) if is_open else self.below
        improvement = self.improvement * (2 if is_open else 1)
        has_fallen = max(before) > self.below * (1 + FALLEN) and not is_open
        holds = best < below and best < max(before) + improvement and not has_fallen
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

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        is_open = open_since is not None
        if not points:
            return None
        everything = {name: series(name) for name in ("train_miou", "val_miou")}
        long = points[-1][0] - setting.scale.length(self.span)
        begin = _begin(everything["val_miou"], long, self.points)
        if points[0][0] > begin:
            return None
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


def _begin(points: Points, begin: int, count: int) -> int:
    """Of a stretch from there on; earlier, if less than so many points would lie in it."""
    return min(begin, points[-count - 1][0]) if len(points) > count else begin


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

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series, open_since
        if len(points) >= 2 and points[-1][1] > points[-2][1] * (1 + 1e-9):
            return points[-1]
        count = setting.lines(self.points)
        last = points[-count:]
        if len(last) < count or last[0][1] == 0 or last[-1][1] < last[0][1]:
            return None
        return last[0][0], last[-1][1]


@dataclass(frozen=True)
class Within:
    """The median of the last points is above one limit, and not above another."""

    above: float
    upto: float
    points: int = 3
    slack: float = GAP_SLACK

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series, setting
        is_open = open_since is not None
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

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del setting
        is_open = open_since is not None
        last = points[-self.points :]
        if len(last) < self.points:
            return None
        below = self.below * 1.05 if is_open else self.below
        gap = self.gap + GAP_SLACK if is_open else self.gap
        if not is_open and max(_values(series("val_miou"))) > self.below * (1 + FALLEN):
            return None
        train = statistics.median(_values(series("train_miou")[-self.points :]))
        val = statistics.median(_values(last))
        return (last[0][0], val) if max(train, val) < below and train - val <= gap else None


@dataclass(frozen=True)
class Happened:
    """It was told of; one word is enough."""

    def __call__(
        self, points: Points, series: Series, setting: Setting, *, open_since: int | None
    ) -> Seen:
        """See `Condition`."""
        del series, setting, open_since
        return points[-1] if points else None
