"""What the monitoring guide's rules need to know of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from job.config import Config
from job.monitor.guide import ITERATIONS, LOG_EVERY, Scale

FEWEST_LINES = 4
"""Of losses; of fewer nothing is told but what one line shows."""


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

    @property
    def line_every(self) -> float:
        """Iterations that stand for those from one of the guide's lines of losses to the next."""
        return LOG_EVERY * self.config.train.iterations / ITERATIONS

    def lines(self, of_guide: int) -> int:
        """How many lines of losses it takes to tell what takes the guide's run so many.

        Fewer where the whole run has few: four lines of ten tell more of it than ten of 500.
        """
        train = self.config.train
        in_all = int(train.iterations / max(train.log_every, self.line_every))
        return min(of_guide, max(FEWEST_LINES, in_all // 4))

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
