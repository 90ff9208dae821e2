"""When to save: Young's formula by hand, its bounds, and what is owed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.checkpoint.interval import (
    FIRST_SAVE_S,
    MAX_INTERVAL_S,
    MIN_INTERVAL_S,
    PRIOR_INTERRUPTION_S,
    InterruptionHistory,
    SaveSchedule,
    save_interval_s,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("pause_s", "durable_s", "between_s", "expected_s"),
    [
        (2.0, 5.0, 3600.0, 120.0),  # sqrt(2 * 2 * 3600) = sqrt(14400)
        (0.5, 10.0, 10_000.0, 100.0),  # sqrt(10000)
        (8.0, 100.0, 40_000.0, 800.0),  # sqrt(640000)
        (0.5, 90.0, 10_000.0, 180.0),  # twice the time until durable
        (0.0, 0.0, 3600.0, MIN_INTERVAL_S),
        (0.01, 1.0, 3600.0, MIN_INTERVAL_S),  # sqrt(72) is less
        (60.0, 60.0, 360_000.0, MAX_INTERVAL_S),  # sqrt(43.2e6) is more
        (1.0, 5000.0, 3600.0, MAX_INTERVAL_S),
    ],
)
def test_the_interval_by_hand(pause_s, durable_s, between_s, expected_s):
    assert save_interval_s(pause_s, durable_s, between_s) == pytest.approx(expected_s)


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e7))
def test_the_interval_is_bounded(pause_s, durable_s, between_s):
    assert MIN_INTERVAL_S <= save_interval_s(pause_s, durable_s, between_s) <= MAX_INTERVAL_S


def test_the_time_between_interruptions_by_hand():
    assert InterruptionHistory().mean_time_between_s(0.0) == PRIOR_INTERRUPTION_S == 10_800
    # Nothing happened for an hour: a little longer than assumed.
    assert InterruptionHistory().mean_time_between_s(3600.0) == 14_400
    history = InterruptionHistory(trained_s=18_000.0, interruptions=5)
    assert history.mean_time_between_s(1200.0) == (10_800 + 18_000 + 1200) / 6 == 5000


def test_with_much_data_the_prior_hardly_counts():
    history = InterruptionHistory(trained_s=3.6e6, interruptions=1000)
    assert history.mean_time_between_s(0.0) == pytest.approx(3600, rel=0.01)


# ---------------------------------------------------------------- a number


def test_a_number_stays_a_number():
    schedule = SaveSchedule(5)
    due = []
    for iteration in range(1, 16):
        if schedule.due(iteration):
            due.append(iteration)
            schedule.saved()
    assert due == [5, 10, 15]
    assert schedule.measured(100.0, 100.0) is None


def test_a_save_that_is_put_off_stays_due():
    schedule = SaveSchedule(5)
    assert [schedule.due(iteration) for iteration in (4, 5, 6, 7)] == [False, True, True, True]
    schedule.saved()
    assert [schedule.due(iteration) for iteration in (8, 9, 10)] == [False, False, True]


@pytest.mark.parametrize("every", [1000, "auto"])
def test_who_asks_gets_a_save_once(every, clock):
    schedule = SaveSchedule(every, clock=clock)
    assert not schedule.due(1)
    schedule.ask()
    assert schedule.due(2)
    assert schedule.due(3)
    schedule.saved()
    assert not schedule.due(4)


# ---------------------------------------------------------------- auto


def test_auto_saves_first_after_a_minute_and_then_as_measured(clock):
    schedule = SaveSchedule("auto", clock=clock)
    clock.now_s += FIRST_SAVE_S - 1
    assert not schedule.due(1)
    clock.now_s += 1
    assert schedule.due(2)
    schedule.saved()
    assert not schedule.due(3)
    sentence = schedule.measured(pause_s=2.0, durable_s=5.0)
    expected_s = math.sqrt(2 * 2.0 * (PRIOR_INTERRUPTION_S + 60))
    assert schedule.interval_s == pytest.approx(expected_s)
    assert sentence is not None
    assert f"every {expected_s:.0f} s" in sentence
    assert "2.00 s" in sentence
    assert "5.0 s" in sentence
    assert "every 3.0 h" in sentence
    clock.now_s += expected_s - 1
    assert not schedule.due(4)
    clock.now_s += 1.001
    assert schedule.due(5)


def test_auto_counts_from_the_last_save_whoever_asked_for_it(clock):
    schedule = SaveSchedule("auto", clock=clock)
    clock.now_s += FIRST_SAVE_S / 2
    schedule.ask()
    assert schedule.due(1)
    schedule.saved()
    clock.now_s += FIRST_SAVE_S - 1
    assert not schedule.due(2)
    clock.now_s += 1
    assert schedule.due(3)


def test_auto_says_only_what_has_changed_markedly(clock):
    schedule = SaveSchedule("auto", clock=clock)
    assert schedule.measured(2.0, 5.0) is not None
    before_s = schedule.interval_s
    assert schedule.measured(2.2, 5.0) is None
    assert schedule.interval_s > before_s, "it follows all the same"
    assert schedule.measured(8.0, 5.0) is not None


def test_auto_saves_more_often_in_a_run_that_is_interrupted_often(clock):
    quiet = SaveSchedule("auto", InterruptionHistory(), clock)
    busy = SaveSchedule("auto", InterruptionHistory(trained_s=7200, interruptions=20), clock)
    for schedule in (quiet, busy):
        schedule.measured(2.0, 5.0)
    assert busy.interval_s == pytest.approx(math.sqrt(2 * 2.0 * 18_000 / 21))
    assert busy.interval_s < quiet.interval_s / 3
