"""What a Weights & Biases run shows, from ledger lines: charts, tables, the guide's targets.

Knows nothing of the wandb package. The run that is mirrored while it is trained and the one that
is made afterwards from the ledger both come from here, and are alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from job.monitor.guide import ITERATIONS, MIOU_TARGETS, TARGETS
from job.monitor.health import Finding, Standing, Watch
from job.monitor.setting import Setting

Kind = Literal["train", "eval", "health", "end"]
KINDS: Sequence[Kind] = ("train", "eval", "health", "end")
NOTHING = -1
"""Iteration of the last row where there is none."""

PREDICTIONS = "Best Model/Predictions"
CLASS_TABLE = "Best Model/IoU of each class"
FINDINGS_TABLE = "Health/Findings"
_TRAIN_CHARTS = {
    "loss_ce": "Training Loss/Cross Entropy",
    "loss_fm": "Training Loss/Feature Matching",
    "loss_st": "Training Loss/Self-Training",
    "loss_d": "Training Loss/Discriminator",
    "loss_g": "Training Loss/Total Generator",
    "loss_mlmt": "Training Loss/Multi-Label Mean Teacher",
    "st_count": "Self-Training/Confidence Count",
    "lr_g": "Learning Rate/Generator",
    "lr_d": "Learning Rate/Discriminator",
}
"""Source: the monitoring guide's names, but for the branch that it does not know."""
_TARGET_CHARTS = {
    "loss_ce": "Targets/Cross Entropy",
    "loss_fm": "Targets/Feature Matching",
    "loss_st": "Targets/Self-Training",
    "loss_d": "Targets/Discriminator",
    "st_count": "Targets/Confidence Count",
    "train_miou": "Targets/Training mIoU",
    "val_miou": "Targets/Validation mIoU",
}
_GENERATOR_ALONE = ("loss_ce", "train_miou", "val_miou")
"""What a run without a discriminator has targets for."""
_MAX_POINTS = 200
"""Of a series in a chart with targets, which is sent anew as a whole each time."""


@dataclass(frozen=True)
class Row:
    """One row of a W&B run's history."""

    kind: Kind
    iteration: int
    values: Mapping[str, float]
    time: float | None = None
    """Seconds since 1970 when it was; None: now."""

    def to_dict(self) -> dict[str, float]:
        """What is logged."""
        when = {} if self.time is None else {"_timestamp": self.time}
        return {
            "iteration": self.iteration,
            **self.values,
            sent_key(self.kind): self.iteration,
            **when,
        }


def sent_key(kind: Kind) -> str:
    """A metric that is hidden in W&B: its last value says up to where W&B has rows of a kind.

    W&B keeps the last value of each metric beside the rows, and sends it back when a run is
    resumed.
    """
    return f"sent/{kind}"


def sent_so_far(summary: Mapping[str, Any]) -> dict[Kind, int]:
    """Iteration of the last row that W&B has, by kind; `NOTHING` if there is none.

    Args:
        summary: the W&B run's, as it was when it was resumed.
    """
    # Runs that an earlier version began have only the one of all kinds.
    of_all = _whole(summary.get("iteration"))
    has_kinds = any(summary.get(sent_key(kind)) is not None for kind in KINDS)
    return {
        kind: _whole(summary.get(sent_key(kind)))
        if has_kinds
        else (NOTHING if kind == "end" else of_all)
        for kind in KINDS
    }


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else NOTHING


def train_row(event: Mapping[str, Any], time: float | None = None) -> Row:
    """The guide's charts of one line of losses.

    Args:
        event: a "train" line of the ledger; what it lacks is left out.
        time: see `Row`.
    """
    values = {name: event[key] for key, name in _TRAIN_CHARTS.items() if key in event}
    return Row("train", event["iteration"], values, time)


def eval_row(
    event: Mapping[str, Any], classes: Sequence[str] = (), time: float | None = None
) -> Row:
    """The guide's charts of one evaluation, and one for each class.

    Args:
        event: an "eval" line of the ledger.
        classes: names in index order; where there are none, numbers.
        time: see `Row`.
    """
    values = {
        "Metrics/Training mIoU": event["train_miou"],
        "Metrics/Validation mIoU": event["val_miou"],
        "Metrics/Train-Val Gap": event["train_miou"] - event["val_miou"],
    }
    for name, iou in class_scores(event, classes):
        if iou is not None:
            values[f"IoU/{name}"] = iou
    return Row("eval", event["iteration"], values, time)


def health_row(standing: Standing, open_findings: int, time: float | None = None) -> Row:
    """Where the run is on the guide's timeline."""
    values = {
        "Health/Phase": standing.number,
        "Health/On Track": int(standing.on_track),
        "Health/Open Findings": open_findings,
    }
    return Row("health", standing.iteration, values, time)


def rows_of(
    events: Iterable[Mapping[str, Any]], setting: Setting, classes: Sequence[str]
) -> Iterator[Row]:
    """All rows of a run, with the times they were trained at.

    Args:
        events: its ledger.
        setting: for the rules, which say how healthy it was.
        classes: names in index order.
    """
    watch = Watch(setting)
    for event in events:
        watch.observe(event)
        if event["event"] == "train":
            yield train_row(event, event["time"])
        elif event["event"] == "eval":
            yield eval_row(event, classes, event["time"])
            standing = watch.standing()
            if standing is not None:
                yield health_row(standing, len(watch.open), event["time"])


def class_scores(
    event: Mapping[str, Any], classes: Sequence[str]
) -> list[tuple[str, float | None]]:
    """(name, IoU) of each class in an "eval" line; None where it occurs nowhere."""
    scores = event.get("class_iou", ())
    if len(classes) != len(scores):
        classes = [f"class {index}" for index in range(len(scores))]
    return list(zip(classes, scores, strict=True))


def findings_of(events: Iterable[Mapping[str, Any]], setting: Setting) -> list[Finding]:
    """What the rules have found in a run, oldest first."""
    watch = Watch(setting)
    for event in events:
        watch.observe(event)
    return watch.findings


@dataclass(frozen=True)
class TargetChart:
    """A metric beside what the guide wants of it."""

    name: str
    measured: Sequence[tuple[int, float]]
    """(iteration, value)."""
    low: Sequence[tuple[int, float]]
    high: Sequence[tuple[int, float]]


def target_charts(events: Sequence[Mapping[str, Any]], setting: Setting) -> list[TargetChart]:
    """A chart for each metric that the guide has a target for and the run has points of.

    Args:
        events: the ledger.
        setting: says to what length the guide's iterations are scaled.
    """
    scale = setting.scale
    charts = []
    for metric, name in _TARGET_CHARTS.items():
        if not setting.is_adversarial and metric not in _GENERATOR_ALONE:
            continue
        kind = "eval" if metric in MIOU_TARGETS else "train"
        measured = _thinned(
            [
                (event["iteration"], event[metric])
                for event in events
                if event["event"] == kind and metric in event
            ]
        )
        if not measured:
            continue
        low: list[tuple[int, float]] = []
        high: list[tuple[int, float]] = []
        for at, lowest, highest in MIOU_TARGETS.get(metric, ()):
            low.append((scale.at(at), lowest))
            high.append((scale.at(at), highest))
        for band in TARGETS.get(metric, ()):
            if metric == "loss_st" and band.high == 0:
                continue  # before self-training there is nothing to be held against
            end = min(band.end, ITERATIONS)
            scaled = band.scaled(metric, scale)
            low += [(scaled.begin, scaled.low), (scale.at(end), scaled.low)]
            high += [(scaled.begin, scaled.high), (scale.at(end), scaled.high)]
        charts.append(TargetChart(name, measured, low, high))
    return charts


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every so many of them, with the last."""
    step = -(-len(points) // _MAX_POINTS)
    return list(points[::-step][::-1]) if points else []
