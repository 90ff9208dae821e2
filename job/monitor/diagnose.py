"""The rules over a run after the fact, or while it goes on: from its ledger or its console log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job import run
from job.config import Config, config_from_yaml
from job.errors import ConfigError, ExitCode, ObjectNotFound, StorageError
from job.monitor.divergence import BATCH_HALVED, MAX_ROLLBACKS, ROLLED_BACK, Remedies
from job.monitor.guide import Fit
from job.monitor.health import (
    OUT_OF_MEMORY,
    Finding,
    Standing,
    Watch,
    failure_of,
    is_healthy,
)
from job.monitor.ledger import parse_ledger
from job.monitor.rules import Setting
from job.storage import ObjectStore, open_store
from job.storage.files import text_of

_NUMBER = r"([-+\w.]+)"
_LOSSES = re.compile(
    rf"Iter (\d+)/(\d+) \| Loss_CE: {_NUMBER} \| Loss_FM: {_NUMBER} \| Loss_ST: {_NUMBER} "
    rf"\| Loss_D: {_NUMBER} \| ST_Count: (\d+)"
)
_EVALUATING = re.compile(r"Evaluating at iteration (\d+)")
_ROLLED_BACK = re.compile(r"Rolled back \(\d+ of \d+\) to iteration \d+")
_HALVED = re.compile(r"going on with batches of \d+")
_SCORE = re.compile(rf"(Training|Validation) mIoU: {_NUMBER}")


@dataclass(frozen=True)
class Diagnosis:
    """What is known to be wrong with a run."""

    source: str
    iteration: int
    """Last one that is told of; 0 if none is."""
    iterations: int
    """Of the whole run."""
    standing: Standing | None
    """None before the first line."""
    fit: Fit | None
    """None before the first evaluation."""
    train_miou: float | None
    val_miou: float | None
    findings: Sequence[Finding]
    """Oldest first; those that are over, too."""
    remedies: Remedies = field(default_factory=Remedies)
    """What the run has done about itself."""
    failed: str = ""
    """Why its last attempt ended with an error; empty if it did not."""
    assumed: bool = False
    """The run's configuration is not known: it is judged as one of the preset guide."""

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing that should be done now."""
        return is_healthy(self.findings, self.fit, self.failed)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        standing = self.standing
        return {
            "source": self.source,
            "healthy": self.is_healthy,
            "iteration": self.iteration,
            "iterations": self.iterations,
            "phase": standing.phase.name if standing else None,
            "on_track": standing.on_track if standing else None,
            "off_track": list(standing.off) if standing else [],
            "fit": self.fit,
            "train_miou": self.train_miou,
            "val_miou": self.val_miou,
            "findings": [finding.to_dict() for finding in self.findings],
            "failed": self.failed or None,
            "rolled_back": self.remedies.rollbacks,
            "batch_halved": self.remedies.halvings,
            "assumed_preset": "guide" if self.assumed else None,
        }

    def text(self) -> str:
        """For the user."""
        lines = [self.source, f"iteration {self.iteration} of {self.iterations}"]
        if self.assumed:
            lines.append("judged as a run of the preset guide; say another one with --config")
        if self.standing is not None:
            lines.append(self.standing.line())
        if self.fit is not None:
            lines.append(
                f"training mIoU {self.train_miou:.4f}, validation mIoU {self.val_miou:.4f}: "
                f"{self.fit}"
            )
        if self.remedies.rollbacks:
            lines.append(
                f"diverged and rolled back by itself, {self.remedies.rollbacks} of "
                f"{MAX_ROLLBACKS} times; each has halved both learning rates"
            )
        if self.remedies.halvings:
            lines.append(
                f"ran out of memory and halved its batches, {self.remedies.halvings} times; the "
                "images of an iteration are the same"
            )
        lines += ["", *(finding.line() for finding in self.findings)]
        if self.failed:
            lines.append(f"the last attempt ended with an error: {self.failed}")
        if self.is_healthy:
            lines.append("healthy: nothing needs to be done")
        elif not self.failed and not any(finding.counts for finding in self.findings):
            lines.append(f"too few evaluations for a finding, but the last one says {self.fit}")
        return "\n".join(lines)


def diagnose(source: str, config: Config | None = None) -> Diagnosis:
    """Run the rules over a run.

    Args:
        source: the run, its `metrics.jsonl`, or what it has printed; a path or s3://.
        config: that it was trained with; None: as the run says, and of a file alone the guide's.

    Raises:
        ConfigError: there is nothing to judge.
        StorageError: it cannot be read.
    """
    store, key, text = _read(source)
    shown = str(store.local_path(key) or f"{store.uri}/{key}")
    decoded = text_of(text, errors="replace")
    if decoded.lstrip()[:1] == "{":
        events = parse_ledger(decoded.encode(), shown)
    else:
        events = list(_of_console(decoded))
        if not events:
            raise ConfigError(
                f"{shown}: has no lines of losses",
                mend="give a run, its metrics.jsonl, or what s4gan train has printed",
            )
    known = config or _config_of(store)
    chosen = _as_long_as_said(known or Config(), events)
    classes = next((len(e["class_iou"]) for e in events if e.get("class_iou")), None)
    remedies = Remedies.of(events)
    watch = Watch(Setting(remedies.applied(chosen), classes))
    for event in events:
        watch.observe(event)
    scores = next((event for event in reversed(events) if event["event"] == "eval"), None)
    return Diagnosis(
        source=source,
        iteration=max((event.get("iteration", 0) for event in events), default=0),
        iterations=chosen.train.iterations,
        standing=watch.standing(),
        fit=watch.fit(),
        train_miou=scores["train_miou"] if scores else None,
        val_miou=scores["val_miou"] if scores else None,
        findings=tuple(watch.findings),
        remedies=remedies,
        failed=failure_of(events),
        assumed=known is None,
    )


def _read(source: str) -> tuple[ObjectStore, str, bytes]:
    """The store that a ledger or a log is in, its key, and its content."""
    head, _, name = source.rstrip("/").rpartition("/")
    if source.startswith("s3://"):
        is_file = name.endswith((".jsonl", ".log", ".txt"))
    else:
        is_file = Path(source).is_file()
    store = open_store((head or ".") if is_file else source)
    key = name if is_file else run.LEDGER
    try:
        return store, key, store.read(key)
    except ObjectNotFound:
        raise ConfigError(
            f"{source}: there is no {key}",
            mend="give a run, its metrics.jsonl, or what s4gan train has printed",
        ) from None


def _config_of(store: ObjectStore) -> Config | None:
    """Of the run that a ledger lies in; None if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        text = store.read(run.CONFIG).decode(errors="replace")
    except StorageError:
        return None
    return config_from_yaml(text, source=f"{store.uri}/{run.CONFIG}")


def _as_long_as_said(config: Config, events: Sequence[Mapping[str, Any]]) -> Config:
    """With as many iterations as a console log says itself, in its last line."""
    said = next((event["of"] for event in reversed(events) if "of" in event), None)
    if said is None:
        return config
    train = config.train.model_copy(update={"iterations": said})
    return config.model_copy(update={"train": train})


def _of_console(text: str) -> Iterator[dict[str, Any]]:
    """The lines of a console log as a ledger's; of what was trained twice, the second time.

    Other text before, between and behind is passed over: `docker logs -t` puts a time before each
    line, and a progress bar leaves its own.
    """
    events: list[dict[str, Any]] = []
    evaluating: dict[str, Any] = {}
    for line in re.split(r"[\r\n]+", text):
        if found := _LOSSES.search(line):
            iteration, of, *losses, count = found.groups()
            values = [_float(one) for one in losses]
            if None in values or int(of) < 1:
                continue
            names = ("loss_ce", "loss_fm", "loss_st", "loss_d")
            event = {"event": "train", "iteration": int(iteration), "of": int(of)}
            _append(
                events, event | dict(zip(names, values, strict=True)) | {"st_count": int(count)}
            )
        elif found := _EVALUATING.search(line):
            evaluating = {"event": "eval", "iteration": int(found[1])}
        elif (found := _SCORE.search(line)) and evaluating:
            value = _float(found[2])
            if value is not None:
                evaluating["train_miou" if found[1] == "Training" else "val_miou"] = value
            if {"train_miou", "val_miou"} <= evaluating.keys():
                _append(events, evaluating)
                evaluating = {}
        elif (why := OUT_OF_MEMORY) in line or (why := "training diverged") in line:
            events.append(
                {
                    "event": "attempt_ended",
                    "exit_code": ExitCode.DIVERGED if why != OUT_OF_MEMORY else 0,
                    "reason": line[line.index(why) :],
                    "reached": next(
                        (one["iteration"] for one in reversed(events) if "iteration" in one), 0
                    ),
                }
            )
            if _HALVED.search(line):
                events.append({"event": BATCH_HALVED})
        elif _ROLLED_BACK.search(line):
            events.append({"event": ROLLED_BACK})
    yield from events


def _append(events: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """Drop what an attempt before had told of this iteration and later ones."""
    at, kind = event["iteration"], event["event"]
    stay = []
    while events and events[-1].get("iteration", at) >= at:  # from the end: a log may be long
        before = events.pop()
        if "iteration" not in before or (before["iteration"] == at and before["event"] != kind):
            stay.append(before)
    events += [*reversed(stay), event]


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
