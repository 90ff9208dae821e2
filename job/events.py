"""What training reports, and the protocol of those who listen (console, ledger, W&B).

The protocol stands here, below both `training` (which speaks) and `monitor` (which listens), so
that neither imports the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class TrainEvent:
    """Losses of one iteration, as they were in that iteration (no average over the window)."""

    iteration: int
    loss_ce: float
    loss_fm: float
    loss_st: float
    loss_d: float
    loss_g: float
    """loss_ce + lambda_fm * loss_fm + lambda_st * loss_st, and lambda_mlmt * loss_mlmt if any."""
    st_count: int
    """Unlabeled images the gate accepted, 0..batch_size * accumulate."""
    lr_g: float
    lr_d: float
    images_per_s: float
    """Labeled and unlabeled images a second since the last event."""
    loss_mlmt: float | None = None
    """Of the branch that says which classes an image holds, if there is one."""

    def to_dict(self) -> dict[str, float]:
        """What is there, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class EvalEvent:
    """Result of one evaluation."""

    iteration: int
    train_miou: float
    """On a fixed sample of labeled training images, not augmented; 0..1."""
    val_miou: float
    """0..1."""
    class_iou: tuple[float | None, ...]
    """Validation, in class order; None where a class occurs in neither truth nor prediction."""
    pixel_accuracy: float
    """Validation, 0..1."""
    best_miou: float
    """Best validation mIoU so far, this evaluation included."""
    previous_best: float | None
    """Best validation mIoU before this evaluation; None at the first."""

    @property
    def is_best(self) -> bool:
        """Whether this evaluation set the best."""
        return self.previous_best is None or self.val_miou > self.previous_best


@dataclass(frozen=True)
class Notice:
    """Anything else worth a line: an attempt's start or end, a skipped image."""

    kind: str
    message: str
    """A sentence for the console."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """For the ledger; JSON values."""


class StopRule(Protocol):
    """Judges by the evaluations whether training should end before its last iteration."""

    reason: str
    """Why it should, by the last evaluation; empty if it should not."""

    def evaluation(self, event: EvalEvent) -> None:
        """Called after an evaluation."""


class NeverStop:
    """Trains to the last iteration."""

    reason = ""

    def evaluation(self, event: EvalEvent) -> None:
        """Nothing."""


class LossGuard(Protocol):
    """Judges by the losses whether a training is still worth going on with."""

    @property
    def suspects(self) -> bool:
        """Whether it doubts; nothing is saved meanwhile that would replace what is good."""

    def train(self, event: TrainEvent) -> None:
        """Called after a line of losses.

        Raises:
            Diverged: it is not.
        """


class NoGuard:
    """Goes on."""

    suspects = False

    def train(self, event: TrainEvent) -> None:
        """Nothing."""


class Tracker(Protocol):
    """A listener. No method may block training or raise for an outside failure."""

    def train(self, event: TrainEvent) -> None:
        """Called every `train.log_every` iterations."""

    def evaluation_started(self, iteration: int) -> None:
        """Called before an evaluation, which can take minutes."""

    def evaluation(self, event: EvalEvent) -> None:
        """Called after an evaluation."""

    def step_done(self, iteration: int) -> None:
        """Called after every iteration; must cost next to nothing."""

    def notice(self, notice: Notice) -> None:
        """Called for everything else."""
