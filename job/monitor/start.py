"""How long an attempt takes to begin: from the start of its process to its first iteration.

A spot machine that is taken away often pays for it each time, so it is said where the time went.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from job.events import EvalEvent, Notice, TrainEvent

FIRST_ITERATION = "first_iteration"
"""Kind of the notice."""


class StartClock:
    """Takes the time of one stage of the start after the other.

    Args:
        age_s: seconds that have passed already.
    """

    def __init__(self, age_s: float = 0.0) -> None:
        self._began_s = time.monotonic() - age_s
        self._last_s = self._began_s
        self.stages: dict[str, float] = {}
        """Seconds, in their order."""

    @classmethod
    def of_process(cls) -> StartClock:
        """One that has been running since this process began, or, without Linux's /proc, from now.

        Source: proc(5), /proc/pid/stat: field 22 is the start in clock ticks since boot.
        """
        try:
            # The second field is the program's name, which may hold anything.
            fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
            began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
            return cls(max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began_s))
        except (OSError, ValueError, LookupError, AttributeError):
            return cls()

    def done(self, stage: str) -> None:
        """All since the stage before was this one."""
        now_s = time.monotonic()
        self.stages[stage] = now_s - self._last_s
        self._last_s = now_s

    @property
    def total_s(self) -> float:
        """From the beginning to the end of the last stage."""
        return self._last_s - self._began_s


class StartTracker:
    """A tracker that tells once, after the first iteration, how long it took to get there.

    On a GPU that iteration has been handed over then, and may still be computed.

    Args:
        clock: of this attempt.
        tell: takes the notice.
    """

    def __init__(self, clock: StartClock, tell: Callable[[Notice], None]) -> None:
        self._clock = clock
        self._tell = tell
        self._told = False

    def train(self, event: TrainEvent) -> None:
        """Nothing."""

    def evaluation_started(self, iteration: int) -> None:
        """Nothing."""

    def evaluation(self, event: EvalEvent) -> None:
        """Nothing."""

    def notice(self, notice: Notice) -> None:
        """Nothing."""

    def step_done(self, iteration: int) -> None:
        """Tell, the first time."""
        if self._told:
            return
        self._told = True
        clock = self._clock
        clock.done("iteration")
        where = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in clock.stages.items())
        self._tell(
            Notice(
                FIRST_ITERATION,
                f"first iteration after {clock.total_s:.1f} s ({where})",
                {
                    "after_s": round(clock.total_s, 3),
                    "stages_s": {name: round(value, 3) for name, value in clock.stages.items()},
                },
            )
        )


MEASURED_S = 20.0
"""How long iterations are watched before a run's end is foretold."""
LONG_S = 3 * 86_400
"""A run that takes longer was hardly meant to."""


class PaceTracker:
    """A tracker that tells once how long the rest of a run will take, soon after it began.

    Args:
        iterations: of the whole run.
        say: takes the line; it depends on the machine, so that it is in no file.
        advice: what to do about a run of days; "" if there is nothing.
    """

    def __init__(self, iterations: int, say: Callable[[str], None], advice: str = "") -> None:
        self._iterations = iterations
        self._say = say
        self._advice = advice
        self._first: tuple[int, float] | None = None
        self._told = False

    def train(self, event: TrainEvent) -> None:
        """Nothing."""

    def evaluation_started(self, iteration: int) -> None:
        """Begin anew: an evaluation is no iteration."""
        self._first = None

    def evaluation(self, event: EvalEvent) -> None:
        """Nothing."""

    def notice(self, notice: Notice) -> None:
        """Nothing."""

    def step_done(self, iteration: int) -> None:
        """Tell, once enough of them have been seen."""
        if self._told:
            return
        now_s = time.monotonic()
        if self._first is None:
            self._first = iteration, now_s
            return
        since, began_s = self._first
        if now_s - began_s < MEASURED_S:
            return
        self._told = True
        each_s = (now_s - began_s) / (iteration - since)
        left = self._iterations - iteration
        left_s = left * each_s
        if left == 0:
            return
        advice = f"; {self._advice}" if self._advice and left_s > LONG_S else ""
        self._say(
            f"{_number(each_s)} s an iteration: the {left:,} to come take about "
            f"{about(left_s)}, without evaluations{advice}"
        )


def _number(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def about(seconds: float) -> str:
    """A length of time in the unit that suits it, to two digits."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            value = seconds / length
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} seconds"
