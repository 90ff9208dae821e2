"""Findings while training goes on: told once, to everybody, also after a kill."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from job.config import Config
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor.health import Finding, Standing, Watch
from job.monitor.health_tracker import HealthTracker
from job.monitor.setting import Setting
from tests.series import CLASSES, lines

UNSTABLE: Any = {"loss_d": lambda at: 1.5 if at > 1_000 else None}
TOLD_AT = 1_300
"""Three of the last five lines are above."""


class Listener:
    """All that a tracker tells, in order."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.said: list[str] = []
        self.findings: list[Finding] = []
        self.standings: list[tuple[Standing, int]] = []

    def tracker(self, before: Sequence[Any] = (), rolled_back: Sequence[Any] = ()) -> HealthTracker:
        return HealthTracker(
            Watch(Setting(Config(), CLASSES)),
            tell=self.notices.append,
            say=self.said.append,
            before=before,
            rolled_back=rolled_back,
            on_finding=[self.findings.append],
            on_standing=[lambda standing, count: self.standings.append((standing, count))],
        )

    def ledger(self) -> list[dict[str, Any]]:
        """What it has written there."""
        return [
            {"event": one.kind, "attempt": 1, "time": 0.0, **one.fields} for one in self.notices
        ]


def feed(tracker: HealthTracker, events: Sequence[Any]) -> None:
    for event in events:
        facts = {key: event[key] for key in event.keys() - {"event", "attempt", "time"}}
        if event["event"] == "train":
            tracker.train(TrainEvent(loss_g=0.0, **facts))
        else:
            rest = {"pixel_accuracy": 0.9, "best_miou": 0.5, "previous_best": None}
            tracker.evaluation(
                EvalEvent(**{**facts, "class_iou": tuple(facts["class_iou"])}, **rest)
            )


def test_a_finding_reaches_console_ledger_and_listeners() -> None:
    heard = Listener()
    tracker = heard.tracker()
    feed(tracker, list(lines(until=2_000, **UNSTABLE)))
    tracker.close()
    (notice,) = heard.notices
    assert notice.kind == "health"
    assert notice.message.startswith("problem: Loss_D is 1.500: training is unstable (since")
    assert (notice.fields["rule"], notice.fields["iteration"]) == ("d_unstable", TOLD_AT)
    assert [one.rule for one in heard.findings] == ["d_unstable"]


def test_every_evaluation_says_where_the_run_stands() -> None:
    heard = Listener()
    tracker = heard.tracker()
    feed(tracker, list(lines(until=2_000, **UNSTABLE)))
    tracker.close()
    assert [said.partition(",")[0] for said in heard.said] == [
        "Phase 1 of 4",
        "Phase 1 of 4",
        "Phase 2 of 4",
        "Phase 2 of 4",
    ]
    assert "Loss_D 1.500 (0.3 to 0.6)" in heard.said[-1]
    assert [count for _, count in heard.standings] == [0, 0, 1, 1]


def test_a_resumed_run_repeats_nothing() -> None:
    before = list(lines(until=2_000, **UNSTABLE))
    first = Listener()
    tracker = first.tracker()
    feed(tracker, before)
    tracker.close()
    heard = Listener()
    tracker = heard.tracker(before=[*before, *first.ledger()])
    feed(tracker, [line for line in lines(until=3_000, **UNSTABLE) if line["iteration"] > 2_000])
    tracker.close()
    assert heard.notices == []
    assert heard.findings == []


def test_what_a_kill_kept_from_the_ledger_is_made_up_for() -> None:
    """The lines were saved with the checkpoint, the finding's own line was not."""
    heard = Listener()
    heard.tracker(before=list(lines(until=2_000, **UNSTABLE))).close()
    assert [one.rule for one in heard.findings] == ["d_unstable"]
    assert heard.notices[0].fields["iteration"] == TOLD_AT


def test_what_is_trained_again_alarms_nobody_again_but_is_in_the_ledger() -> None:
    everything = list(lines(until=2_000, **UNSTABLE))
    first = Listener()
    tracker = first.tracker()
    feed(tracker, everything)
    tracker.close()
    kept = [line for line in everything if line["iteration"] <= 1_000]
    dropped = [line for line in everything if line["iteration"] > 1_000]
    heard = Listener()
    tracker = heard.tracker(before=kept, rolled_back=[*dropped, *first.ledger()])
    feed(tracker, dropped)
    tracker.close()
    (notice,) = heard.notices
    assert notice.message == ""
    assert notice.fields["rule"] == "d_unstable"
    assert heard.findings == []


def test_what_ends_the_attempt_alarms_but_leaves_the_words_to_the_error() -> None:
    heard = Listener()
    tracker = heard.tracker()
    feed(tracker, list(lines(until=500)))
    tracker.ended(70, "training diverged")
    tracker.close()
    assert [(one.kind, one.message) for one in heard.notices] == [("health", "")]
    assert [one.rule for one in heard.findings] == ["non_finite"]


def test_the_training_does_not_wait_for_who_is_told() -> None:
    """A listener may hang for minutes: the other end of a network."""
    release = threading.Event()
    heard = Listener()
    tracker = HealthTracker(
        Watch(Setting(Config(), CLASSES)),
        tell=heard.notices.append,
        say=lambda line: None,
        on_finding=[lambda finding: release.wait(60)],
    )
    feed(tracker, list(lines(until=5_000, **UNSTABLE)))  # comes back
    tracker.close(within_s=0.1)  # so does this
    assert len(heard.notices) == 1
    release.set()


def test_a_fault_in_watching_ends_nothing(caplog: Any) -> None:
    heard = Listener()
    tracker = heard.tracker()
    nothing: Any = None
    tracker._queue.put({"event": "train", "iteration": nothing, "loss_ce": "x"})
    feed(tracker, list(lines(until=2_000, **UNSTABLE)))
    tracker.close()
    assert [one.rule for one in heard.findings] == ["d_unstable"]
    assert "not watched at this point" in caplog.text


def test_what_is_over_in_a_stretch_that_is_trained_again_is_told() -> None:
    """It was told of before the kill; that it is over, to nobody."""
    events = list(lines(until=4_000, loss_d=lambda at: 1.5 if 1_000 < at < 2_500 else None))
    before = [event for event in events if event["iteration"] <= 1_000]
    rolled_back = [event for event in events if 1_000 < event["iteration"] <= 2_000]
    first = Listener()
    tracker = first.tracker()
    feed(tracker, before + rolled_back)
    tracker.close()
    second = Listener()
    tracker = second.tracker(before, [*rolled_back, *first.ledger()])
    feed(tracker, [event for event in events if event["iteration"] > 1_000])
    tracker.close()
    began, over = second.notices
    assert began.message == ""
    assert over.message.startswith("over: Loss_D is 1.500")
    assert second.findings == []
