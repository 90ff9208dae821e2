"""The rules over a run after the fact, or while it goes on: from its ledger or its console log."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import run
from job.config import Config, config_from_yaml
from job.errors import ConfigError, ExitCode, ObjectNotFound, StorageError
from job.monitor.attempts import lines_that_count
from job.monitor.console_log import (
    classes_said,
    events_of_console,
    printed_text,
    scores_as_shares,
)
from job.monitor.health import OUT_OF_MEMORY
from job.monitor.ledger import best_of, parse_ledger
from job.monitor.verdict import Verdict, verdict
from job.storage import ObjectStore, open_store
from job.storage.files import text_of

STDIN = "-"
"""As other commands call standard input."""
PAST_THE_BEST = 0.05
"""By which a validation mIoU is more below the best than evaluations of a healthy run swing."""
GZIP = b"\x1f\x8b"
"""How a packed file begins."""
_GIVE = "give a run, its metrics.jsonl, or what s4gan train has printed"


@dataclass(frozen=True)
class Diagnosis:
    """What is known to be wrong with a run."""

    source: str
    iteration: int
    """Last one that is told of; 0 if none is."""
    iterations: int
    """Of the whole run."""
    verdict: Verdict
    train_miou: float | None
    """Of the last evaluation; None if it is no number, as the other one."""
    val_miou: float | None
    best: tuple[int, float] | None = None
    """Iteration and validation mIoU of the best evaluation; None before the first."""
    ended: str = ""
    """How its last attempt ended otherwise; empty if it goes on, or nothing tells."""
    assumed: str = ""
    """Why it is judged as a run of the preset guide; empty if its configuration is known."""
    in_percent: bool = False
    """So the log has its scores; here they are shares of 1, as everywhere."""
    has_losses: bool = True
    """False: there were only scores to judge by."""
    is_supervised: bool = False
    """So its losses say; nothing else does."""

    @property
    def is_beyond_end(self) -> bool:
        """Whether it is longer than it is said to be, so that its length is not known."""
        return self.iteration > self.iterations

    @property
    def is_past_its_best(self) -> bool:
        """Whether the last model is clearly worse than the best one."""
        if self.best is None or self.val_miou is None:
            return False
        return self.val_miou < self.best[1] - PAST_THE_BEST

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing that should be done now."""
        return self.verdict.is_healthy

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "source": self.source,
            "iteration": self.iteration,
            "iterations": self.iterations,
            "beyond_end": self.is_beyond_end,
            **self.verdict.to_dict(),
            "train_miou": self.train_miou,
            "val_miou": self.val_miou,
            "best_val_miou": self.best[1] if self.best else None,
            "best_iteration": self.best[0] if self.best else None,
            "ended": self.ended or None,
            "assumed_preset": "guide" if self.assumed else None,
            "scores_in_percent": self.in_percent,
            "has_losses": self.has_losses,
        }

    def text(self) -> str:
        """For the user."""
        lines = [self.source, f"iteration {self.iteration} of {self.iterations}"]
        if self.assumed:
            lines.append(
                f"{self.assumed}: judged as a run of the preset guide; say another one with "
                "--config"
            )
        if self.is_beyond_end:
            lines.append(
                "that is beyond its end: no phase can be told, and what depends on its length may "
                "be judged wrongly; if it is a ledger, say with --config what it was trained with"
            )
        if self.in_percent:
            lines.append("the scores are percent, and judged as shares of 1")
        if not self.has_losses:
            lines.append("no line of losses of s4gan is in it: only the rest is judged")
        if self.is_supervised:
            lines.append(
                "Loss_FM, Loss_ST, Loss_D and ST_Count are 0 in every line: judged as trained with "
                "train.supervised_only"
            )
        found = self.verdict
        if found.standing is not None:
            lines.append(found.standing.line())
        if found.fit is not None:
            lines.append(
                f"training mIoU {self.train_miou:.4f}, validation mIoU {self.val_miou:.4f}: "
                f"{found.fit}"
            )
        if self.is_past_its_best:
            assert self.best is not None
            lines.append(
                f"the best validation mIoU was {self.best[1]:.4f} at iteration {self.best[0]}: use "
                f"{run.BEST_MODEL}"
            )
        lines += found.done
        lines += ["", *(finding.line() for finding in found.findings)]
        if self.ended and not found.failed:
            lines.append(self.ended)
        lines.append(found.conclusion())
        return "\n".join(lines)


def diagnose(source: str, config: Config | None = None) -> Diagnosis:
    """Run the rules over a run.

    Args:
        source: the run, its `metrics.jsonl`, or what it has printed; a path, also of a pipe, or
            s3://; "-" is standard input.
        config: that it was trained with; None: as the run says, and of a file alone the guide's.

    Raises:
        ConfigError: there is nothing to judge.
        StorageError: it cannot be read.
    """
    given = _read(source)
    text = text_of(given.content, errors="replace")
    printed = printed_text(text)
    in_percent = False
    if printed is None:
        events = parse_ledger(text.encode(), given.shown)
    else:
        events = list(events_of_console(printed))
        if not events:
            packed = given.content.startswith(GZIP)
            mend = f"unpack it: s4gan diagnose <(zcat {source})" if packed else _GIVE
            raise ConfigError(f"{given.shown}: has no lines of losses", mend=mend)
        in_percent = scores_as_shares(events, given.shown)
    own = None if config is not None else _config_of(given)
    known = config or own
    chosen = _as_long_as_said(known or Config(), events)
    classes = next((len(e["class_iou"]) for e in events if e.get("class_iou")), None)
    if classes is None and printed is not None:
        classes = classes_said(printed)
    is_said = own is not None or chosen.train.supervised_only
    is_supervised = not is_said and _had_no_discriminator(events)
    if is_supervised:
        train = chosen.train.model_copy(update={"supervised_only": True})
        chosen = chosen.model_copy(update={"train": train})
    best = best_of(events)
    scores = next((event for event in reversed(events) if event["event"] == "eval"), None)
    return Diagnosis(
        source=given.shown if source == STDIN else source,
        iteration=max((event.get("iteration", 0) for event in events), default=0),
        iterations=chosen.train.iterations,
        verdict=verdict(events, chosen, classes),
        best=(best["iteration"], best["val_miou"]) if best is not None else None,
        is_supervised=is_supervised,
        train_miou=_finite(scores["train_miou"]) if scores else None,
        val_miou=_finite(scores["val_miou"]) if scores else None,
        ended=_ended(events),
        assumed=_assumed(given) if known is None else "",
        in_percent=in_percent,
        has_losses=any(event["event"] == "train" for event in events),
    )


def _ended(events: Sequence[Mapping[str, Any]]) -> str:
    """What became of the last attempt, as long as it has not failed; "" if it goes on."""
    kinds = ("attempt_started", "train", "attempt_ended")
    own = reversed(lines_that_count(events))
    last = next((event for event in own if event["event"] in kinds), None)
    if last is None or last["event"] != "attempt_ended" or OUT_OF_MEMORY in last["reason"]:
        return ""  # of what it ran out of memory for, a finding tells
    if last["exit_code"] == ExitCode.OK:
        early = next((e["reason"] for e in reversed(events) if e["event"] == "stopped_early"), "")
        return f"training is over: {'stopped, as ' * bool(early)}{early or last['reason']}"
    said = last["reason"].partition(". ")[0]
    return f"training was interrupted: {said}; the same s4gan train goes on where it was"


@dataclass(frozen=True)
class _Given:
    """A ledger or a log."""

    shown: str
    """What to call it in an error."""
    content: bytes
    store: ObjectStore | None
    """That it lies in, maybe with the run's configuration; None: nothing lies beside it."""
    is_run: bool = False
    """It was named by the run, not by itself."""


def _read(source: str) -> _Given:
    if source == STDIN:
        return _Given("standard input", sys.stdin.buffer.read(), None)
    path = Path(source)
    if source.startswith("s3://"):
        head, _, name = source.rstrip("/").rpartition("/")
        is_file = name.endswith((".jsonl", ".log", ".txt"))
    else:
        # A pipe, too, as `<(zcat log.gz)` is one.
        head, name, is_file = str(path.parent), path.name, os.path.exists(path)
        is_file &= not os.path.isdir(path)
    store = open_store(head if is_file else source)
    key = name if is_file else run.LEDGER
    try:
        content = store.read(key)
    except ObjectNotFound:
        raise ConfigError(f"{source}: there is no {key}", mend=_GIVE) from None
    shown = str(store.local_path(key) or f"{store.uri}/{key}")
    return _Given(shown, content, store, is_run=not is_file)


def _config_of(given: _Given) -> Config | None:
    """Of the run that a ledger lies in; None if there is none.

    Raises:
        ConfigError: it is damaged.
        StorageError: the run's cannot be read.
    """
    store = given.store
    if store is None:
        return None
    try:
        text = store.read(run.CONFIG).decode(errors="replace")
    except ObjectNotFound:
        return None
    except StorageError:
        if given.is_run:
            raise
        return None  # beside a log there may be nothing that one may look for
    return config_from_yaml(text, source=f"{store.uri}/{run.CONFIG}")


def _had_no_discriminator(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all of its numbers are exactly 0, the first one too, as no loss of one is."""
    of_it = ("loss_fm", "loss_st", "loss_d", "st_count")
    lines = [event for event in events if event["event"] == "train"]
    return bool(lines) and not any(line[name] for line in lines for name in of_it)


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _assumed(given: _Given) -> str:
    """Why there is no configuration."""
    if given.is_run:
        return f"there is no {run.CONFIG}, as of a run that failed before it was written"
    return f"there is no {run.CONFIG} beside it"


def _as_long_as_said(config: Config, events: Sequence[Mapping[str, Any]]) -> Config:
    """With as many iterations as a console log says itself, and as many lines as it has."""
    said = next((event["of"] for event in reversed(events) if "of" in event), None)
    if said is None:
        return config
    lines = [event["iteration"] for event in events if event["event"] == "train"]
    steps = [b - a for a, b in itertools.pairwise(lines) if b > a]
    every = statistics.median_low(steps) if steps else config.train.log_every
    train = config.train.model_copy(update={"iterations": said, "log_every": every})
    return config.model_copy(update={"train": train})
