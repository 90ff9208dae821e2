"""What is to be said of a run, all in all: whether it is healthy, and what is wrong if not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.config import Config
from job.errors import ExitCode
from job.monitor.attempts import lines_that_count
from job.monitor.divergence import MAX_ROLLBACKS, Remedies
from job.monitor.guide import MAX_GAP, Fit
from job.monitor.health import Finding, Standing, Watch
from job.monitor.setting import Setting

_BAD_FITS: Sequence[Fit] = ("overfitting", "underfitting")
ERRORS = (
    ExitCode.SOFTWARE,
    ExitCode.DIVERGED,
    ExitCode.IO_ERROR,
    ExitCode.BAD_CONFIG,
    ExitCode.NO_PROGRESS,
)


def failure_of(events: Iterable[Mapping[str, Any]]) -> str:
    """Why a run's last attempt ended with an error that another one will not mend; "" if not.

    Args:
        events: lines of its ledger.
    """
    why = ""
    for event in lines_that_count(events):
        if event["event"] in ("attempt_started", "train"):
            why = ""
        elif event["event"] == "attempt_ended":
            failed = event["exit_code"] in ERRORS
            why = f"{event.get('reason')} (exit code {event['exit_code']})" if failed else ""
    return why


def why_nothing(events: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """Why a run has no line of losses, and the mend.

    Args:
        events: its ledger.
    """
    events = list(events)
    failed = failure_of(events)
    if failed:
        said = f"nothing was trained: the last attempt ended with an error: {failed}"
        return said, "mend that, and run the same s4gan train again"
    last = next((e for e in reversed(events) if e["event"].startswith("attempt_")), None)
    if last is not None and last["event"] == "attempt_ended":
        said = f"nothing was trained before the last attempt ended: {last['reason']}"
        return said, "run the same s4gan train again"
    mend = "wait for its first line of losses; if its process is gone, run the same s4gan train"
    return "nothing has been trained yet", f"{mend} again"


EVALUATIONS = 3
"""Of which the rules take the median, too."""
ENOUGH = 5
"""Lines of losses; with fewer no rule but those of NaN and the like can have told."""


def _what_healthy_means(standing: Standing | None, events: Iterable[Mapping[str, Any]]) -> str:
    """How much it says that no rule has found anything.

    Args:
        standing: on the timeline, which asks for more than the rules do.
        events: that were watched.
    """
    events = list(events)
    losses, scores = (sum(one["event"] == kind for one in events) for kind in ("train", "eval"))
    if losses < ENOUGH and scores < ENOUGH:
        return f"nothing is wrong yet, but it is too early to tell (lines of losses: {losses})"
    if not losses:
        return "nothing is wrong with the scores; of the losses there is no line"
    if standing is not None and not standing.on_track:
        return "nothing is wrong by the rules, but it is off the guide's timeline"
    return "nothing needs to be done"


@dataclass(frozen=True)
class Verdict:
    """On a run, or a part of one."""

    findings: Sequence[Finding]
    """Oldest first; those that are over, too."""
    fit: Fit | None
    """Of the last scores; None before the first evaluation, or if they are none."""
    steady_fit: Fit | None
    """Of the medians of the last few, which one unlucky evaluation does not change."""
    standing: Standing | None
    """None before the first line, and beyond the last."""
    gap: float | None
    """Of those medians, training less validation; None as `fit`."""
    failed: str
    """Why its last attempt ended with an error; empty if it did not."""
    remedies: Remedies
    """What the run has done about itself."""
    meaning: str
    """What it says that it is healthy, if it is."""
    done: Sequence[str] = ()
    """What the run has done about itself, in words."""

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing that should be done now."""
        is_bad = self.steady_fit in _BAD_FITS or self.has_large_gap
        return not self.failed and not is_bad and not self.counting

    @property
    def has_large_gap(self) -> bool:
        """Whether the guide's checklist would refuse them."""
        return self.gap is not None and self.gap >= MAX_GAP

    @property
    def counting(self) -> list[Finding]:
        """Those about which something should be done now."""
        return [finding for finding in self.findings if finding.counts]

    def conclusion(self) -> str:
        """In a word."""
        if self.is_healthy:
            return f"healthy: {self.meaning}"
        if self.failed:
            return f"the last attempt ended with an error: {self.failed}"
        if not self.counting:
            said = str(self.steady_fit)
            if self.has_large_gap and self.steady_fit not in _BAD_FITS:
                said = f"a gap of {self.gap:.3f}, which should stay below {MAX_GAP}"
            return f"too early for a finding, but the last evaluations say {said}"
        count = len(self.counting)
        said = "1 thing needs attention" if count == 1 else f"{count} things need attention"
        return f"{said}; other settings want another --run, or --resume-anyway with this one"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        standing = self.standing
        return {
            "healthy": self.is_healthy,
            "phase": standing.phase.name if standing else None,
            "on_track": standing.on_track if standing else None,
            "off_track": list(standing.off) if standing else [],
            "fit": self.fit,
            "findings": [finding.to_dict() for finding in self.findings],
            "failed": self.failed or None,
            "rolled_back": self.remedies.rollbacks,
            "batch_halved": self.remedies.halvings,
        }


def verdict(
    events: Sequence[Mapping[str, Any]], config: Config, num_classes: int | None
) -> Verdict:
    """Run the rules over a run's lines.

    Args:
        events: its ledger, or a part of it.
        config: the user's, without what the run has changed by itself.
        num_classes: None if it is not known.
    """
    remedies = Remedies.of(events)
    trained_with = remedies.applied(config)
    watch = Watch(Setting(trained_with, num_classes))
    for event in events:
        watch.observe(event)
    standing, scores = watch.standing(), watch.scores(EVALUATIONS)
    return Verdict(
        findings=tuple(watch.findings),
        fit=watch.fit(),
        steady_fit=watch.fit(EVALUATIONS),
        gap=scores[0] - scores[1] if scores is not None else None,
        standing=standing,
        failed=failure_of(events),
        remedies=remedies,
        meaning=_what_healthy_means(standing, events),
        done=_done(remedies, trained_with),
    )


def _done(remedies: Remedies, trained_with: Config) -> list[str]:
    train, said = trained_with.train, []
    if remedies.rollbacks:
        said.append(
            f"diverged and rolled back by itself, {remedies.rollbacks} of {MAX_ROLLBACKS} times; "
            f"each has halved both learning rates: --learning-rate {train.learning_rate:g} "
            f"--learning-rate-D {train.learning_rate_D:g} by now"
        )
    if remedies.halvings:
        said.append(
            f"ran out of memory and halved its batches, {remedies.halvings} times, to "
            f"{train.batch_size}; the images of an iteration are the same"
        )
    return said
