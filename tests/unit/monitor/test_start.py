"""How long an attempt took to begin, and where the time went."""

from __future__ import annotations

import pytest

from job.events import Notice
from job.monitor import start
from job.monitor.start import StartClock, StartTracker


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
