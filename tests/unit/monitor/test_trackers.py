"""Several trackers as one."""

from __future__ import annotations

from typing import Any

from job.events import EvalEvent, Notice, Tracker, TrainEvent
from job.monitor import Trackers

TRAIN = TrainEvent(1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
EVAL = EvalEvent(1, 0.5, 0.5, (0.5,), 0.5, 0.5, None)
NOTICE = Notice("note", "a note")


class Listener:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def train(self, event: TrainEvent) -> None:
        self.heard.append(("train", event))

    def evaluation_started(self, iteration: int) -> None:
        self.heard.append(("evaluation_started", iteration))

    def evaluation(self, event: EvalEvent) -> None:
        self.heard.append(("evaluation", event))

    def step_done(self, iteration: int) -> None:
        self.heard.append(("step_done", iteration))

    def notice(self, notice: Notice) -> None:
        self.heard.append(("notice", notice))


def tell_everything(tracker: Tracker) -> None:
    tracker.step_done(1)
    tracker.train(TRAIN)
    tracker.evaluation_started(1)
    tracker.evaluation(EVAL)
    tracker.notice(NOTICE)


def test_each_tracker_hears_everything_once_and_in_order() -> None:
    listeners = [Listener(), Listener()]
    tell_everything(Trackers(listeners))
    for listener in listeners:
        assert listener.heard == [
            ("step_done", 1),
            ("train", TRAIN),
            ("evaluation_started", 1),
            ("evaluation", EVAL),
            ("notice", NOTICE),
        ]


def test_no_tracker_at_all_is_fine() -> None:
    tell_everything(Trackers([]))
