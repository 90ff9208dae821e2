"""Who listens to training (console, ledger, W&B), and what is made from the ledger at the end."""

from collections.abc import Sequence

from job.events import EvalEvent, Notice, Tracker, TrainEvent


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def train(self, event: TrainEvent) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.train(event)

    def evaluation_started(self, iteration: int) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.evaluation_started(iteration)

    def evaluation(self, event: EvalEvent) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.evaluation(event)

    def step_done(self, iteration: int) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.step_done(iteration)

    def notice(self, notice: Notice) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.notice(notice)
