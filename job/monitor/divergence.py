"""Divergence, acted upon: how far back to go, and with which learning rates and batches then.

What was done before is read from the ledger, where every step is a line: a run that is resumed, on
whatever machine, trains on with what it had come to. The configuration stays what the user gave.

Source: S4GAN Training Monitoring Guide, "Problem 5" and the warning signs of Loss_CE.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from job.config import Config
from job.errors import Diverged
from job.events import TrainEvent
from job.monitor.conditions import RUINED, Spike

MAX_ROLLBACKS = 3
ROLLED_BACK = "rolled_back"
BATCH_HALVED = "batch_halved"
"""Kinds of ledger lines."""
CERTAIN = 3
"""Log lines in a row that are a spike: a single one is one bad batch."""
_SPIKE = Spike()


@dataclass(frozen=True)
class Remedies:
    """What has been done about a run so far."""

    rollbacks: int = 0
    """Each has halved both learning rates."""
    halvings: int = 0
    """Each has halved the batch and doubled the accumulation."""

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Remedies:
        """By a run's ledger.

        Somebody who goes on with other learning rates, or other batches, has taken over.
        """
        rollbacks = halvings = 0
        before: set[str] = set()
        for event in events:
            if event["event"] == ROLLED_BACK:
                rollbacks += 1
            elif event["event"] == BATCH_HALVED:
                halvings += 1
            elif event["event"] == "configuration_changed":
                changes = set(map(str, event.get("changes", ())))
                if changes == before:  # the same again, after a rollback to before it
                    continue
                before = changes
                changed = {line.partition(":")[0] for line in changes}
                if changed & {"train.learning_rate", "train.learning_rate_D"}:
                    rollbacks = 0
                if changed & {"train.batch_size", "train.accumulate"}:
                    halvings = 0
        return cls(rollbacks, halvings)

    def applied(self, config: Config) -> Config:
        """The configuration that is trained with.

        Args:
            config: the user's.
        """
        train = config.train
        less, smaller = 0.5**self.rollbacks, 2**self.halvings
        changes = {
            "learning_rate": train.learning_rate * less,
            "learning_rate_D": train.learning_rate_D * less,
            "batch_size": train.batch_size // smaller,
            "accumulate": train.accumulate * smaller,
        }
        return config.model_copy(update={"train": train.model_copy(update=changes)})

    def can_halve(self, config: Config) -> bool:
        """Whether a batch of half the images, twice as often, has the same images in all."""
        halves, rest = divmod(self.applied(config).train.batch_size, 2)
        return rest == 0 and halves >= (2 if config.model.head == "deeplabv3plus" else 1)


class Guard:
    """Ends a training whose Loss_CE has jumped and stays up; a NaN the loop sees by itself.

    Args:
        config: that is trained with; without `monitor.on_divergence: rollback` it only listens.
        before: lines of the ledger up to where the run goes on from.
    """

    def __init__(self, config: Config, before: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._acts = config.monitor.on_divergence == "rollback"
        self._usual: deque[float] = deque(maxlen=_SPIKE.swings)
        self._above: list[tuple[int, float]] = []
        for event in before:
            if event["event"] == "train":
                self._take(event["iteration"], event["loss_ce"])

    @property
    def suspects(self) -> bool:
        """Whether it may be a spike: what is saved now may not be worth going back to."""
        return self._acts and bool(self._above)

    @property
    def since(self) -> int | None:
        """Where it began, if it is one; the last checkpoint before that is good."""
        return self._above[0][0] if self._above else None

    def train(self, event: TrainEvent) -> None:
        """Take a line of losses in.

        Raises:
            Diverged: Loss_CE has jumped, and stays up.
        """
        self._take(event.iteration, event.loss_ce)
        if self._acts and len(self._above) >= CERTAIN:
            usual = list(self._usual)[-_SPIKE.points :]
            was = (
                f"was {statistics.median(usual):.3f} before iteration {self.since}"
                if usual
                else "has been far above what guessing costs from the beginning"
            )
            raise Diverged.with_rates(
                f"training diverged: Loss_CE is {event.loss_ce:.3f}, and {was}",
                self._config.train.learning_rate,
                self._config.train.learning_rate_D,
                rolls_back=True,
            )

    def _take(self, iteration: int, loss_ce: float) -> None:
        if math.isfinite(loss_ce) and not self._is_high(loss_ce):
            self._usual.append(loss_ce)
            self._above.clear()
        else:
            self._above.append((iteration, loss_ce))

    def _is_high(self, loss_ce: float) -> bool:
        return loss_ce > RUINED or _SPIKE.is_above(loss_ce, list(self._usual))
