"""How long an attempt took to begin, and where the time went."""

from __future__ import annotations

import pytest

from job.events import Notice
from job.monitor import start
from job.monitor.start import PaceTracker, StartClock, StartTracker, about


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is set."""
    told = [100.0]
    monkeypatch.setattr(start.time, "monotonic", lambda: told[0])
    return told


def test_the_first_iteration_is_told_once_with_its_stages(now: list[float]) -> None:
    told: list[Notice] = []
    clock = StartClock(age_s=7.25)
    clock.done("imports")
    now[0] += 2.5
    clock.done("data")
    tracker = StartTracker(clock, told.append)
    now[0] += 0.5
    tracker.step_done(41)
    now[0] += 60
    tracker.step_done(42)
    (notice,) = told
    assert notice.kind == "first_iteration"
    assert notice.message == "first iteration after 10.2 s (imports 7.2, data 2.5, iteration 0.5)"
    # Not of an iteration: runs that were interrupted elsewhere are compared without it.
    assert notice.fields == {
        "after_s": 10.25,
        "stages_s": {"imports": 7.25, "data": 2.5, "iteration": 0.5},
    }


def test_the_clock_of_the_process_has_run_since_before() -> None:
    clock = StartClock.of_process()
    clock.done("imports")
    assert clock.stages["imports"] == clock.total_s > 0


def test_where_the_system_does_not_tell_the_clock_begins_now(
    monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    monkeypatch.delattr(start.os, "sysconf")
    clock = StartClock.of_process()
    clock.done("imports")
    assert clock.total_s == 0


# ---------------------------------------------------------------- how long the rest takes


def test_the_rest_is_foretold_once_from_what_was_seen(now: list[float]) -> None:
    said: list[str] = []
    tracker = PaceTracker(50_000, said.append, advice="take a GPU")
    for iteration in range(101, 200):
        tracker.step_done(iteration)
        now[0] += 0.5
    (line,) = said
    assert line == (
        "0.5 s an iteration: the 49,859 to come take about 6.9 hours, without evaluations"
    )


def test_a_run_of_days_is_advised(now: list[float]) -> None:
    said: list[str] = []
    tracker = PaceTracker(50_000, said.append, advice="take a GPU")
    tracker.step_done(1)
    now[0] += 200
    tracker.step_done(2)
    assert said == [
        "200 s an iteration: the 49,998 to come take about 116 days, without evaluations; "
        "take a GPU"
    ]


def test_an_evaluation_in_between_is_no_iteration(now: list[float]) -> None:
    said: list[str] = []
    tracker = PaceTracker(1000, said.append)
    for iteration in range(1, 50):
        if iteration == 10:
            tracker.evaluation_started(9)
            now[0] += 300
        tracker.step_done(iteration)
        now[0] += 1
    assert len(said) == 1
    assert said[0].startswith("1 s an iteration")


def test_a_run_that_is_over_is_not_foretold(now: list[float]) -> None:
    said: list[str] = []
    tracker = PaceTracker(2, said.append)
    tracker.step_done(1)
    now[0] += 100
    tracker.step_done(2)
    assert said == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (50, "50 seconds"),
        (150, "2.5 minutes"),
        (3600, "60 minutes"),
        (7300, "2.0 hours"),
        (86_400 * 12.4, "12 days"),
    ],
)
def test_a_length_of_time_has_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert about(seconds) == text
