"""When a training is at its end before its last iteration.

A function of the evaluations so far, which are in the ledger: a run that is resumed decides as one
that was never stopped, and one that has ended this way ends again at once.

Source: S4GAN Training Monitoring Guide, "When to Stop Training".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from job.config import Config
from job.events import EvalEvent
from job.monitor.conditions import FallsFromBest
from job.monitor.setting import Setting

_DEGRADING = FallsFromBest()


class StopRules:
    """Judges after each evaluation whether it is time to end.

    Args:
        config: of the run; its `stop` says which rules hold.
        before: lines of the ledger up to where the run goes on from.
    """

    def __init__(self, config: Config, before: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._scores: list[tuple[int, float]] = []
        self.reason = ""
        """Why training should end here, by the last evaluation; empty if it should not."""
        for event in before:
            if event["event"] == "eval":
                self._take(event["iteration"], event["val_miou"])

    def evaluation(self, event: EvalEvent) -> None:
        """Take the next evaluation in."""
        self._take(event.iteration, event.val_miou)

    def _take(self, iteration: int, val_miou: float) -> None:
        if math.isfinite(val_miou):
            self._scores.append((iteration, val_miou))
        self.reason = self._judge(iteration) if self._scores else ""

    def _judge(self, iteration: int) -> str:
        stop = self._config.stop
        best_at, best = max(self._scores, key=lambda score: (score[1], -score[0]))
        told = f"the best is {best:.4f} at iteration {best_at}"
        now = self._scores[-1][1]
        if stop.target_miou is not None and now >= stop.target_miou:
            return f"validation mIoU {now:.4f} has reached the target of {stop.target_miou:g}"
        if stop.patience and iteration - best_at >= stop.patience:
            return f"validation mIoU has not improved for {iteration - best_at} iterations ({told})"
        seen = _DEGRADING(self._scores, lambda metric: (), Setting(self._config), open_since=None)
        if stop.degrading and seen is not None:
            return f"validation mIoU has been falling since iteration {seen[0]} ({told})"
        return ""
