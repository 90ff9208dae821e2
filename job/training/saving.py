"""When the loop saves, and how it leaves: within the time that is left, and saying what it did."""

from __future__ import annotations

import time
from collections.abc import Callable

from job.checkpoint.interval import SaveSchedule
from job.checkpoint.publisher import Publisher
from job.config import Config
from job.errors import STORAGE_FAILURES
from job.events import Notice, Tracker
from job.preemption import StopRequest
from job.training.state import TrainState

PATIENCE_S = 15.0
"""How long a last save may take before that is explained."""
RESERVE_S = 5.0
"""Of the time a spot notice leaves: for the last ledger line and W&B's."""


class NoSaving:
    """What the loop asks of a rank that is not the leader: nothing."""

    def due(self, iteration: int, *, hold: bool = False) -> bool:
        """Never."""
        return False

    def save(self, state: TrainState, *, last: bool = False) -> None:
        """The leader does."""

    def before_leaving(self, state: TrainState) -> bool:
        """The leader sees to it."""
        return True


class Saving:
    """The loop's side of the publisher.

    Args:
        config: of the run.
        publisher: of this attempt.
        schedule: of recovery checkpoints.
        stop: tells how much time is left.
        tracker: is told of what a user should know.
        resumed_at: iteration of the state as restored, which need not be saved again.
    """

    def __init__(
        self,
        config: Config,
        publisher: Publisher,
        schedule: SaveSchedule,
        stop: StopRequest,
        tracker: Tracker,
        resumed_at: int,
    ) -> None:
        self._config = config
        self._publisher = publisher
        self._schedule = schedule
        self._stop = stop
        self._tracker = tracker
        self._handed_over = resumed_at
        self._pause_s = 0.0
        self._cost = publisher.cost

    def due(self, iteration: int, *, hold: bool = False) -> bool:
        """Whether to save after this iteration.

        Args:
            iteration: that is done.
            hold: keep the recovery checkpoints that are there for now.

        A recovery checkpoint that falls due while the last one is still on its way comes with the
        first iteration after that; a numbered one belongs to its iteration and waits.

        Raises:
            Fenced: another attempt has taken over.
        """
        self._learn_cost()
        if self._stop.take_save_request():
            self._schedule.ask()
        # Asked at every iteration, so that a due save is not forgotten while it has to wait.
        due = self._schedule.due(iteration)
        return self._is_numbered(iteration) or (due and not hold and not self._publisher.busy)

    def save(self, state: TrainState, *, last: bool = False) -> None:
        """Hand the state over; the training goes on as soon as it is copied.

        Args:
            state: of the training.
            last: training ends with it, so it is kept for good.
        """
        self._pause_s = self._publisher.save(
            state.state_dict(),
            best=state.best,
            numbered=last or self._is_numbered(state.iteration),
        )
        self._handed_over = state.iteration
        self._schedule.saved()

    def before_leaving(self, state: TrainState) -> bool:
        """Make the state durable, if the time allows; say so if it does not. Whether it is durable.

        Without a known end of the machine this takes as long as it takes; a spot notice that comes
        meanwhile counts at once.

        Raises:
            Fenced: another attempt has taken over.
            StorageError: the storage refuses, and no notice tells of the machine's end.
        """
        if self._handed_over != state.iteration:
            left_s = self._stop.seconds_left
            if left_s is not None and not self._is_time_for_a_save(left_s):
                self._tell_skipped(
                    state, f"a save takes {self._needed_s:.0f} s, {left_s:.0f} s are left"
                )
                return False
            self.save(state)
        try:
            self._publisher.finish(self._telling_of_waits(state.iteration))
        except STORAGE_FAILURES as error:
            if self._stop.seconds_left is None:
                raise
            self._tell_skipped(state, error.message)
            return False
        left_s = self._stop.seconds_left
        if left_s is not None:
            self._tracker.notice(
                Notice(
                    "saved_in_time",
                    f"Saved after iteration {state.iteration}, {left_s:.0f} s before the machine "
                    "goes",
                    {"saved_at": state.iteration, "seconds_left": round(left_s, 1)},
                )
            )
        return True

    @property
    def _needed_s(self) -> float:
        """What a save takes, as far as is known."""
        return self._publisher.cost.seconds if self._publisher.cost else 0.0

    def _is_time_for_a_save(self, left_s: float) -> bool:
        """Whether it fits into the time that is left, after the one that is on its way."""
        spare_s = left_s - RESERVE_S - self._needed_s
        return spare_s > 0 and self._publisher.wait_until_free(spare_s)

    def _seconds_left(self) -> float | None:
        """For saving: without what is reserved for the last words."""
        left_s = self._stop.seconds_left
        return None if left_s is None else left_s - RESERVE_S

    def _telling_of_waits(self, iteration: int) -> Callable[[], float | None]:
        """As `_seconds_left`; asked again and again, it says once why it takes so long."""
        since_s = time.monotonic()
        told = False

        def seconds_left() -> float | None:
            nonlocal told
            left_s = self._seconds_left()
            waited_s = time.monotonic() - since_s
            if left_s is None and waited_s > PATIENCE_S and not told:
                told = True
                saved = self._publisher.saved_iteration
                lost = "all of this attempt" if saved is None else f"what came after {saved}"
                self._tracker.notice(
                    Notice(
                        "save_waits",
                        f"still waiting until iteration {iteration} is saved: the storage is slow, "
                        f"or does not answer; whoever stops it now trains {lost} again",
                        {"waited_s": round(waited_s, 1)},
                    )
                )
            return left_s

        return seconds_left

    def _is_numbered(self, iteration: int) -> bool:
        """Whether the checkpoint of an iteration is kept for good."""
        config = self._config
        return iteration % config.checkpoint.keep_every == 0 or iteration == config.train.iterations

    def _learn_cost(self) -> None:
        cost = self._publisher.cost
        if cost is None or cost is self._cost:
            return
        self._cost = cost
        sentence = self._schedule.measured(self._pause_s, cost.seconds)
        if sentence:
            self._tracker.notice(
                Notice("save_interval", sentence, {"seconds": round(self._schedule.interval_s, 1)})
            )

    def _tell_skipped(self, state: TrainState, why: str) -> None:
        saved = self._publisher.saved_iteration
        since = f"since iteration {saved}" if saved is not None else "of this attempt"
        self._tracker.notice(
            Notice(
                "save_skipped",
                f"warning: no time to save iteration {state.iteration} ({why}); the iterations "
                f"{since} will be trained again",
                {
                    "reached": state.iteration,
                    "saved_at": saved,
                    "seconds_left": round(self._stop.seconds_left or 0.0, 1),
                    "reason": why,
                },
            )
        )
