"""The rules run over a run: what is wrong with it, since when, and what phase it is in.

Works on ledger lines, one after the other, so that a run that is being trained and one that is
over are judged alike. What it knows is a function of the lines: a run that is resumed feeds it the
ledger's again, and no state has to be kept elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from job.errors import ExitCode
from job.monitor.conditions import Points
from job.monitor.guide import (
    HIGHEST_FM,
    LOW_FROM,
    PHASES,
    Band,
    Fit,
    Phase,
    fit_of,
    miou_band,
    phase_at,
)
from job.monitor.rules import RULES, Rule, Severity
from job.monitor.setting import Setting

LOSSES = ("loss_ce", "loss_fm", "loss_st", "loss_d")
_TRAIN = (*LOSSES, "st_count", "lr_g", "lr_d")
_EVAL = ("train_miou", "val_miou")
_RATES = ("lr_g", "lr_d")
OUT_OF_MEMORY = "CUDA out of memory"
"""How the reason of an attempt that ended by it begins."""
ENDS_THE_ATTEMPT = ("non_finite", "out_of_memory")
"""Rules whose finding nothing comes after, unless the run is gone on with."""
DEAD = 0.005
"""IoU below which a class is not learned at all."""
LABELS: Mapping[str, str] = {
    "loss_ce": "Loss_CE",
    "loss_fm": "Loss_FM",
    "loss_st": "Loss_ST",
    "loss_d": "Loss_D",
    "st_count": "ST_Count",
    "train_miou": "training mIoU",
    "val_miou": "validation mIoU",
}
"""The guide's names."""
_SMOOTHED = 5
"""Lines of losses whose median is compared with the timeline."""


@dataclass(frozen=True)
class Finding:
    """A warning sign in a run: an episode, from when it was seen until it was over."""

    rule: str
    severity: Severity
    iteration: int
    """Where it was told of."""
    since: int
    """Where it began."""
    value: float
    """That showed it; NaN where there is none."""
    message: str
    remedies: tuple[str, ...]
    ended: int | None = None
    """Iteration where it was over; None if it is not."""
    unseen_since: int | None = None
    """Iteration from which on it has not been seen, though too shortly to be over."""

    @property
    def counts(self) -> bool:
        """Whether something should be done about it now."""
        return self.ended is None and self.severity != "note"

    def line(self) -> str:
        """For the console: what, since when, what to try."""
        if self.ended is not None:
            return f"over: {self.message} ({self.when()}, {self.rule})"
        tried = f"; try: {' | '.join(self.remedies)}" if self.remedies else ""
        return f"{self.severity}: {self.message} ({self.when()}, {self.rule}){tried}"

    def when(self) -> str:
        """From where to where it was seen."""
        if self.ended is not None:
            return f"iteration {self.since} to {self.ended}"
        if self.unseen_since is not None:
            return f"since iteration {self.since}, not seen from {self.unseen_since} on"
        return f"since iteration {self.since}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **vars(self),
            "value": self.value if math.isfinite(self.value) else None,
            "remedies": list(self.remedies),
        }


@dataclass(frozen=True)
class Standing:
    """Where a run is on the guide's timeline, and whether it is where it should be."""

    iteration: int
    phase: Phase
    number: int
    """Of the phase, from 1."""
    off: tuple[str, ...]
    """What is not as the timeline has it: "Loss_CE 2.310 (0.8 to 1.5)"."""

    @property
    def on_track(self) -> bool:
        """Whether all is as the timeline has it."""
        return not self.off

    def line(self) -> str:
        """For the console."""
        said = "on track" if self.on_track else "off the guide's timeline: " + ", ".join(self.off)
        return f"Phase {self.number} of {len(PHASES)}, {self.phase.name}: {said}"


@dataclass
class _Episode:
    """A rule that has found something."""

    finding: Finding
    told: Finding
    """As it began: what ends it must not stand in the line that says it is over."""
    place: int
    """Of it among all findings."""
    calm: int
    """Points in a row without the sign that end it."""
    quiet: int = 0
    """Of those there have been so many."""


class _Lines:
    """Lines of losses as seldom as the guide's, in proportion to the run's length.

    The rules count lines, and a window of ten must not be shorter where more of them are logged. A
    line that stands for several has their median; of what is mostly 0 and counts when it is not,
    the mean.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._before = 0
        self._step = 0

    def add(self, at: int, values: Mapping[str, float]) -> Mapping[str, float]:
        """Take a line; the one that stands for it and those before it, if it is the last of them.

        Args:
            at: its iteration.
            values: by metric.
        """
        if at > self._before:
            self._step = at - self._before
        else:  # trained again
            self._waiting = [one for one in self._waiting if one[0] < at]
        self._before = at
        if self._waiting and self._number(self._waiting[-1][0]) != self._number(at):
            self._waiting.clear()  # the rest of it has never been logged
        self._waiting.append((at, values))
        if self._number(at + self._step) == self._number(at):
            return {}
        lines = [values for _, values in self._waiting]
        self._waiting.clear()
        return {
            name: _AS_ONE.get(name, statistics.median)(
                [line[name] for line in lines if name in line]
            )
            for name in lines[-1]
        }

    def _number(self, at: int) -> int:
        """Of the guide's line that stands for an iteration."""
        return int((at - 1) / self._every)


_AS_ONE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "loss_st": statistics.fmean,
    "st_count": statistics.fmean,
    "lr_g": lambda rates: rates[-1],
    "lr_d": lambda rates: rates[-1],
}


class Watch:
    """Runs the rules over ledger lines.

    Args:
        setting: of the run.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.findings: list[Finding] = []
        """All, in the order in which they were told of, the ended ones too."""
        self._rules = [rule for rule in RULES if rule.applies(setting)]
        self._series: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        # What each rule looks at, so that nothing is cut out of a series at every line.
        self._firsts = {rule.id: rule.first_iteration(setting) for rule in self._rules}
        self._counting: dict[tuple[str, int, bool], list[tuple[int, float]]] = {
            self._watched(rule): [] for rule in self._rules
        }
        self._open: dict[str, _Episode] = {}
        self._lines = _Lines(setting.line_every)
        self._iteration = 0
        self._is_crashed = False

    @property
    def open(self) -> list[Finding]:
        """Those that are not over."""
        return [episode.finding for episode in self._open.values()]

    def observe(self, event: Mapping[str, Any]) -> list[Finding]:
        """Take in a ledger line; what has begun or ended with it.

        Args:
            event: any kind of line; those that no rule watches change nothing.
        """
        kind = event["event"]
        self._iteration = max(self._iteration, event.get("iteration", 0))
        if kind == "attempt_started":
            self._is_crashed = False
        if kind == "train":
            return self._observe_losses(event)
        if kind == "eval":
            return self._observe_scores(event)
        if kind == "configuration_changed":
            # More iterations raise the learning rates, as they should.
            for rate in _RATES:
                self._series[rate].clear()
            for (watched, *_), points in self._counting.items():
                if watched in _RATES:
                    points.clear()
        if kind == "attempt_ended":
            return self._observe_end(event)
        return []

    def standing(self) -> Standing | None:
        """Where the run is on the timeline; None before there is anything to tell it by.

        Nor is there beyond the end: the run is longer than its configuration has it.
        """
        scale = self.setting.scale
        if not 0 < self._iteration <= scale.iterations:
            return None
        phase = phase_at(self._iteration, scale)
        number = 1 + [one.name for one in PHASES].index(phase.name)
        off = ["a loss is NaN or infinite"] if self._is_crashed else []
        at = scale.of_guide(self._iteration)
        wanted = dict(phase.bands)
        # The guide's table of scores lets them rise within a phase.
        low, high, good = wanted["val_miou"]
        wanted["val_miou"] = (min(low, miou_band("val_miou", at)[0]), high, good)
        wanted["train_miou"] = (*miou_band("train_miou", at), "high")
        wanted["loss_fm"] = (0.0, HIGHEST_FM, "low")
        for metric, (low, high, good) in wanted.items():
            band = Band(phase.begin, phase.end, low, high, good).scaled(metric, scale)
            value = self._now(metric, band.begin)
            if value is not None and not band.holds(value):
                digits = 4 if metric in _EVAL else 3
                off.append(
                    f"{LABELS[metric]} {value:.{digits}f} ({band.low:.3g} to {band.high:.3g})"
                )
        return Standing(self._iteration, phase, number, tuple(off))

    def scores(self, of: int = 1) -> tuple[float, float] | None:
        """Training and validation mIoU; None if there are none, or no numbers.

        Args:
            of: the last evaluations whose medians they are.
        """
        bad = self._open.get("score_non_finite")
        if not self._series["val_miou"] or (bad is not None and not bad.quiet):
            return None
        train, val = (
            statistics.median([value for _, value in self._series[name][-of:]]) for name in _EVAL
        )
        return train, val

    def fit(self, of: int = 1) -> Fit | None:
        """The guide's status of the scores, or what a rule says of them that is not over.

        Args:
            of: as `scores`.
        """
        scores = self.scores(of)
        if scores is None:
            return None
        said: Sequence[Fit] = ("overfitting", "underfitting")
        open_ = next((name for name in said if name in self._open), None)
        is_early = self._iteration < self.setting.scale.at(LOW_FROM)
        return open_ or fit_of(*scores, is_early=is_early)

    def _now(self, metric: str, since: int) -> float | None:
        """What a metric is now, without its noise; None if the run does not have it."""
        adversarial = metric in ("loss_d", "loss_fm", "loss_st", "st_count")
        if adversarial and not self.setting.is_adversarial:
            return None
        points = [value for at, value in self._series[metric] if at > since]
        if metric == "loss_st":
            points = [value for value in points if value > 0]  # it is one only if images pass
        if not points:
            return None
        return points[-1] if metric in _EVAL else statistics.median(points[-_SMOOTHED:])

    def _observe_losses(self, event: Mapping[str, Any]) -> list[Finding]:
        at = event["iteration"]
        values = {name: float(event[name]) for name in _TRAIN if event.get(name) is not None}
        self._is_crashed = not all(math.isfinite(values[name]) for name in LOSSES if name in values)
        if self._is_crashed:
            return self._happened("non_finite", at)
        shown = self._lines.add(at, values)
        for some, each_line in ((values, True), (shown, False)):
            for name, value in some.items():
                self._add(name, at, value, each_line)
        ended = [over for name in ENDS_THE_ATTEMPT for over in self._passed(name, at)]
        return ended + self._run(values, each_line=True) + self._run(shown)

    def _observe_scores(self, event: Mapping[str, Any]) -> list[Finding]:
        at = event["iteration"]
        values = {name: float(event[name]) for name in _EVAL}
        if not all(math.isfinite(value) for value in values.values()):
            return self._happened("score_non_finite", at)
        values["gap"] = values["train_miou"] - values["val_miou"]
        values["lead"] = -values["gap"]
        known = [iou for iou in event.get("class_iou") or () if iou is not None]
        if known:
            values["dead_classes"] = float(sum(iou < DEAD for iou in known))
        for name, value in values.items():
            self._add(name, at, value)
        return self._passed("score_non_finite", at) + self._run(values)

    def _observe_end(self, event: Mapping[str, Any]) -> list[Finding]:
        reason = str(event.get("reason", ""))
        reached = event.get("reached", self._iteration)
        # Or Loss_CE had jumped, of which its own rule tells.
        if event["exit_code"] == ExitCode.DIVERGED and "Loss_CE is" not in reason:
            self._is_crashed = True
            return self._happened("non_finite", reached, calm=1)
        if reason.startswith(OUT_OF_MEMORY):
            return self._happened("out_of_memory", reached, calm=1)
        if event["exit_code"] == ExitCode.OK:  # it got past all that
            return [self._end(name) for name in ENDS_THE_ATTEMPT if name in self._open]
        return []

    def _happened(self, what: str, at: int, calm: int | None = None) -> list[Finding]:
        """Something that is told of in a word, and over after `calm` points without it."""
        self._add(what, at, math.nan)
        found = self._run({what: math.nan})
        if what in self._open and calm is not None:
            self._open[what].calm = calm
        return found

    def _passed(self, what: str, at: int) -> list[Finding]:
        """A point without it, which may be the one that ends it."""
        episode = self._open.get(what)
        # Not before the run is past where it happened: it may happen there again.
        if episode is None or at <= episode.finding.since:
            return []
        return self._calmed(episode)

    def _watched(self, rule: Rule) -> tuple[str, int, bool]:
        """Which points a rule looks at: metric, first iteration, whether of each line."""
        return rule.metric, self._firsts[rule.id], rule.each_line

    def _add(self, metric: str, at: int, value: float, each_line: bool = False) -> None:
        if not each_line:
            _put(self._series[metric], at, value)
        for (watched, first, each), points in self._counting.items():
            if watched == metric and at >= first and each == each_line:
                _put(points, at, value)

    def _run(self, metrics: Iterable[str], each_line: bool = False) -> list[Finding]:
        """Those rules whose metric has a new point."""
        changed = []
        for rule in self._rules:
            if rule.metric in metrics and rule.each_line == each_line:
                finding = self._judge(rule)
                if finding is not None:
                    changed.append(finding)
        return changed

    def _judge(self, rule: Rule) -> Finding | None:
        points: Points = self._counting[self._watched(rule)]
        episode = self._open.get(rule.id)
        seen = rule.condition(
            points,
            self._series.__getitem__,
            self.setting,
            open_since=episode.finding.since if episode is not None else None,
        )
        if episode is not None:
            if seen is None:
                return next(iter(self._calmed(episode)), None)
            episode.quiet, episode.calm = 0, rule.calm
            self._renew(episode, replace(episode.finding, **self._what(rule, seen[1])))
            return None
        if seen is None or any(other in self._open for other in rule.unless):
            return None
        since, value = seen
        finding = Finding(
            rule=rule.id,
            severity=rule.severity,
            iteration=max(self._iteration, since),
            since=since,
            **self._what(rule, value),
        )
        self._open[rule.id] = _Episode(finding, finding, len(self.findings), rule.calm)
        self.findings.append(finding)
        return finding

    def _what(self, rule: Rule, value: float) -> dict[str, Any]:
        """What is seen, and what to do about it now."""
        return {
            "value": value,
            "unseen_since": None,
            "message": rule.says.format(value=value),
            "remedies": tuple(rule.advice(self.setting, self._iteration)),
        }

    def _calmed(self, episode: _Episode) -> list[Finding]:
        """A point without its sign, which may be the one that ends it."""
        episode.quiet += 1
        if episode.quiet >= episode.calm:
            return [self._end(episode.finding.rule)]
        if episode.quiet == 1:
            self._renew(episode, replace(episode.finding, unseen_since=self._iteration))
        return []

    def _renew(self, episode: _Episode, finding: Finding) -> None:
        episode.finding = self.findings[episode.place] = finding

    def _end(self, rule_id: str) -> Finding:
        episode = self._open.pop(rule_id)
        self._renew(episode, replace(episode.told, ended=self._iteration))
        return episode.finding


def _put(points: list[tuple[int, float]], at: int, value: float) -> None:
    """Add a point; of what was trained twice, as in ledgers that were joined, the second counts."""
    while points and points[-1][0] >= at:
        points.pop()
    points.append((at, value))
