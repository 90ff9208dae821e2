"""When to save: a fixed number of iterations, or the interval that loses the least time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

PRIOR_INTERRUPTION_S = 3 * 3600.0
"""Mean time between interruptions assumed before the run has been interrupted. Our choice: between
the hours of a busy spot pool and the days of a quiet one; one interruption soon outweighs it."""
MIN_INTERVAL_S = 30.0
MAX_INTERVAL_S = 1800.0
FIRST_SAVE_S = 60.0
"""Until a save has been measured: the first comes early, so that its cost is known."""


@dataclass(frozen=True)
class InterruptionHistory:
    """What a run has gone through so far."""

    trained_s: float = 0.0
    """Of all attempts before this one."""
    interruptions: int = 0

    def mean_time_between_s(self, now_trained_s: float) -> float:
        """Estimate of the mean time between interruptions, this attempt's time included.

        The posterior mean of a Gamma prior of one interruption in PRIOR_INTERRUPTION_S: with no
        data the prior, with much data time divided by interruptions.
        """
        total_s = PRIOR_INTERRUPTION_S + self.trained_s + now_trained_s
        return total_s / (1 + self.interruptions)


def save_interval_s(pause_s: float, durable_s: float, between_interruptions_s: float) -> float:
    """The interval between saves that loses the least time, bounded.

    Young's first-order optimum sqrt(2 C M), where C is what a save costs the training and M the
    mean time between interruptions. As publishing happens in the background C is only the pause;
    the seconds until a state is durable bound the interval from below, since a state that is not
    durable saves nothing.

    Args:
        pause_s: seconds the training stands still for a save.
        durable_s: seconds until it is durable.
        between_interruptions_s: M.

    Source: J. W. Young, A First Order Approximation to the Optimum Checkpoint Interval, CACM 17
    (1974); J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart
    dumps, FGCS 22 (2006), whose correction is below the noise of our estimates.
    """
    optimum_s = math.sqrt(2 * pause_s * between_interruptions_s)
    return min(MAX_INTERVAL_S, max(MIN_INTERVAL_S, 2 * durable_s, optimum_s))


class SaveSchedule:
    """Whether a recovery checkpoint is due.

    Args:
        every: iterations, or "auto".
        history: of the run, for "auto".
        clock: monotonic seconds.
    """

    def __init__(
        self,
        every: int | str,
        history: InterruptionHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every = every
        self._history = history or InterruptionHistory()
        self._clock = clock
        self._began_s = self._saved_s = clock()
        self._owed = False
        self.interval_s = FIRST_SAVE_S
        """Between two saves of "auto"."""

    def due(self, iteration: int) -> bool:
        """Whether to save now; stays True until `saved`."""
        if isinstance(self._every, int):
            self._owed = self._owed or iteration % self._every == 0
        else:
            self._owed = self._owed or self._clock() - self._saved_s >= self.interval_s
        return self._owed

    def ask(self) -> None:
        """Make a save due now."""
        self._owed = True

    def saved(self) -> None:
        """A state has been handed over for saving."""
        self._owed = False
        self._saved_s = self._clock()

    def measured(self, pause_s: float, durable_s: float) -> str | None:
        """Learn what a save cost; returns a sentence when "auto" has changed its mind markedly."""
        if isinstance(self._every, int):
            return None
        between_s = self._history.mean_time_between_s(self._clock() - self._began_s)
        before, self.interval_s = self.interval_s, save_interval_s(pause_s, durable_s, between_s)
        if 0.8 < self.interval_s / before < 1.25:
            return None
        return (
            f"checkpoints: every {self.interval_s:.0f} s from now on (a save stops the training "
            f"for {pause_s:.2f} s and is durable after {durable_s:.1f} s; interruptions are "
            f"expected every {between_s / 3600:.1f} h)"
        )
