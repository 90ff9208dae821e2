"""The story of a run's attempts, from its ledger: interruptions, and failures that repeat."""

from __future__ import annotations

from typing import Any

import pytest

from job.checkpoint.interval import InterruptionHistory
from job.errors import ConfigError, ExitCode, StorageError
from job.monitor.attempts import (
    MAX_ALIKE,
    attempts_of,
    crash_loop,
    fingerprint,
    interruption_history,
    kept_iteration,
)

Events = list[dict[str, Any]]


def attempt(
    number: int,
    *,
    start: float = 0.0,
    seconds: float = 100.0,
    code: int | None = ExitCode.SOFTWARE,
    mark: str = "ValueError: boom",
    saved_at: int | None = None,
    **started: Any,
) -> Events:
    """Its lines; without a code it was killed and there is no last one."""
    head = {"attempt": number}
    events: Events = [{"event": "attempt_started", **head, "time": start, **started}]
    if saved_at is not None:
        events.append(
            {"event": "checkpoint", **head, "time": start + seconds / 2, "saved_at": saved_at}
        )
    end = start + seconds
    events.append({"event": "train", "iteration": 1, **head, "time": end})
    if code is not None:
        ending = {"event": "attempt_ended", **head, "time": end, "exit_code": int(code)}
        events.append({**ending, "reason": f"reason {number}", "fingerprint": mark})
    return events


def row(*parts: Events) -> Events:
    return [event for part in parts for event in part]


# ---------------------------------------------------------------- attempts


def test_an_empty_ledger_has_no_attempts():
    assert attempts_of([]) == []
    assert interruption_history([], 1) == InterruptionHistory(0, 0)
    assert crash_loop([]) is None


def test_an_attempt_as_its_lines_tell_it():
    (found,) = attempts_of(attempt(1, start=50.0, seconds=10.0, saved_at=7))
    assert (found.number, found.started, found.last_seen) == (1, 50.0, 60.0)
    assert (found.exit_code, found.reason) == (1, "reason 1")
    assert found.fingerprint == "ValueError: boom"
    assert found.saved_at == 7
    assert not found.was_interrupted


def test_a_killed_attempt_was_last_seen_when_its_lease_was_renewed():
    """Its ledger was published less often."""
    events = row(
        attempt(1, start=0.0, seconds=10.0, code=None),
        attempt(2, start=500.0, predecessor=1, predecessor_last_seen=75.0),
    )
    first, second = attempts_of(events)
    assert first.last_seen == 75.0
    assert first.was_interrupted
    assert second.started == 500.0


def test_a_lease_that_says_less_than_the_ledger_takes_nothing_away():
    events = row(
        attempt(1, seconds=100.0, code=None),
        attempt(2, predecessor=1, predecessor_last_seen=20.0),
        attempt(3, predecessor=17, predecessor_last_seen=9e9),
    )
    assert [one.last_seen for one in attempts_of(events)] == [100.0, 100.0, 100.0]


def test_lines_without_an_attempt_or_of_one_that_never_started_are_passed_over():
    events = [
        {"event": "note", "time": 1.0},
        {"event": "checkpoint", "attempt": 9, "time": 1.0, "saved_at": 3},
        *attempt(1),
    ]
    assert [one.number for one in attempts_of(events)] == [1]


@pytest.mark.parametrize(
    ("code", "interrupted"),
    [
        (None, True),
        (75, True),
        (76, True),
        (130, True),
        (0, False),
        (1, False),
        (70, False),
        (74, False),
        (78, False),
        (93, False),
    ],
)
def test_the_machine_and_the_user_interrupt_faults_do_not(code, interrupted):
    (found,) = attempts_of(attempt(1, code=code))
    assert found.was_interrupted is interrupted


def test_the_history_counts_attempts_before_the_current_one():
    events = row(
        attempt(1, start=0.0, seconds=100.0, code=None),
        attempt(2, start=200.0, seconds=50.0, code=ExitCode.PREEMPTED),
        attempt(3, start=300.0, seconds=25.0, code=ExitCode.SOFTWARE),
        attempt(4, start=400.0, seconds=1000.0, code=None),
    )
    assert interruption_history(events, 4) == InterruptionHistory(trained_s=175.0, interruptions=2)


# ---------------------------------------------------------------- fingerprints


def test_a_fault_is_the_same_but_for_its_numbers():
    first = fingerprint(RuntimeError("bad tensor at 0x7fe3 of size 12\nmore"))
    assert first == fingerprint(RuntimeError("bad tensor at 0xdead of size 900\nother"))
    assert first == "RuntimeError: bad tensor at # of size #"
    assert first != fingerprint(ValueError("bad tensor at 0x7fe3 of size 12"))
    assert fingerprint(KeyError()) == "KeyError: KeyError"
    assert fingerprint(StorageError("down", mend="wait")) == "StorageError: down"


# ---------------------------------------------------------------- crash loops


def alike(count: int, first: int = 1, **options: Any) -> Events:
    return row(*(attempt(number, **options) for number in range(first, first + count)))


@pytest.mark.parametrize("code", [ExitCode.SOFTWARE, ExitCode.IO_ERROR])
def test_three_failures_alike_without_a_checkpoint_are_a_loop(code):
    assert crash_loop(alike(MAX_ALIKE - 1, code=code)) is None
    story = crash_loop(alike(MAX_ALIKE, code=code))
    assert story is not None
    assert story.splitlines() == [
        f"attempt 1: after 100 s, exit code {int(code)}: reason 1",
        f"  attempt 2: after 100 s, exit code {int(code)}: reason 2",
        f"  attempt 3: after 100 s, exit code {int(code)}: reason 3",
    ]


def test_a_different_failure_breaks_the_row():
    for odd in range(1, 4):
        events = row(
            *(attempt(n, mark="OSError: other" if n == odd else "X: y") for n in (1, 2, 3))
        )
        assert crash_loop(events) is None


def test_a_checkpoint_in_any_of_them_breaks_the_row():
    for saver in range(1, 4):
        events = row(*(attempt(n, saved_at=10 if n == saver else None) for n in (1, 2, 3)))
        assert crash_loop(events) is None


@pytest.mark.parametrize("code", [None, 75, 76, 130])
def test_interruptions_never_count_and_do_not_break_the_row(code):
    assert crash_loop(alike(10, code=code, mark="Preempted: SIGTERM")) is None
    events = row(attempt(1), attempt(2, code=code), attempt(3), attempt(4, code=code), attempt(5))
    assert crash_loop(events) is not None


@pytest.mark.parametrize("code", [None, 75])
def test_an_interrupted_attempt_that_saved_something_is_progress(code):
    events = row(attempt(1), attempt(2), attempt(3, code=code, saved_at=50), attempt(4))
    assert crash_loop(events) is None
    assert crash_loop(row(events, attempt(5))) is None
    assert crash_loop(row(events, attempt(5), attempt(6))) is not None


@pytest.mark.parametrize("code", [ExitCode.OK, ExitCode.BAD_CONFIG, ExitCode.DIVERGED])
def test_what_the_user_must_mend_anyway_is_no_loop(code):
    assert crash_loop(alike(5, code=code)) is None


def test_a_failure_without_a_fingerprint_is_like_no_other():
    assert crash_loop(alike(5, mark="")) is None


def test_only_the_last_ones_count():
    events = row(alike(2, mark="A: a"), alike(3, first=3, mark="B: b"))
    assert crash_loop(events) is not None
    assert crash_loop(row(alike(3), attempt(4, mark="B: b"))) is None


def test_a_configuration_error_has_a_fingerprint_too():
    assert fingerprint(ConfigError("x 1")) == "ConfigError: x #"


# ---------------------------------------------------------------- what the time went to


def trained(number: int, *, start: float, resumed_at: int, until: int, seconds: float) -> Events:
    """An attempt that needs 10 s to begin, and then a second for an iteration; it is killed."""
    head = {"attempt": number}
    begun = start + 10
    return [
        {"event": "attempt_started", **head, "time": start},
        {"event": "training_started", **head, "time": begun, "resumed_at": resumed_at},
        *(
            {"event": "train", "iteration": it, **head, "time": begun + it - resumed_at}
            for it in range(resumed_at + 10, until + 1, 10)
        ),
        {"event": "note", **head, "time": start + seconds},
    ]


def saved(number: int, *, time: float, at: int) -> Events:
    return [{"event": "checkpoint", "attempt": number, "time": time, "saved_at": at}]


def split(found: Any) -> tuple[float, float, float]:
    return found.startup_s, found.useful_s, found.redone_s


def test_time_is_split_into_start_use_and_what_was_trained_again():
    """The ledger holds no lines of what was rolled back."""
    events = row(
        trained(1, start=0.0, resumed_at=0, until=50, seconds=100.0),
        trained(2, start=200.0, resumed_at=50, until=90, seconds=60.0),
    )
    first, second = attempts_of(events)
    assert split(first) == (10.0, 50.0, 40.0)
    assert split(second) == (10.0, 0.0, 50.0)  # killed, and nothing of it was saved


def test_a_checkpoint_between_two_lines_counts():
    events = row(
        trained(1, start=0.0, resumed_at=0, until=50, seconds=100.0),
        saved(1, time=65.0, at=54),
        saved(1, time=90.0, at=79),  # it did not verify
        trained(2, start=200.0, resumed_at=54, until=74, seconds=40.0),
        saved(2, time=235.0, at=79),
    )
    first, second = attempts_of(events)
    assert split(first) == (10.0, 55.0, 35.0)
    assert split(second) == (10.0, 25.0, 5.0)


def test_an_attempt_that_did_not_come_to_train_was_of_no_use():
    (found,) = attempts_of(
        [
            {"event": "attempt_started", "attempt": 1, "time": 0.0},
            {"event": "note", "attempt": 1, "time": 30.0},
        ]
    )
    assert split(found) == (30.0, 0.0, 0.0)


def test_what_a_finished_attempt_does_at_its_end_is_nothing_trained_again():
    events = trained(1, start=0.0, resumed_at=0, until=50, seconds=100.0)
    ending = {"event": "attempt_ended", "attempt": 1, "time": 100.0, "exit_code": 0, "reason": ""}
    (found,) = attempts_of([*events, ending])
    assert split(found) == (10.0, 50.0, 0.0)


def test_where_an_attempt_ran_and_for_which_job():
    events = row(
        attempt(1, job="abc", job_attempt=2, gpus=4),
        [
            {
                "event": "machine",
                "attempt": 1,
                "time": 1.0,
                "instance_type": "g5.12xlarge",
                "life_cycle": "spot",
                "zone": "us-east-1a",
            }
        ],
    )
    (found,) = attempts_of(events)
    assert (found.job, found.job_attempt, found.gpus) == ("abc", 2, 4)
    assert (found.instance_type, found.life_cycle, found.zone) == (
        "g5.12xlarge",
        "spot",
        "us-east-1a",
    )


def test_of_a_killed_attempt_that_nobody_went_on_from_only_what_was_saved_counts():
    events = row(
        trained(1, start=0.0, resumed_at=0, until=50, seconds=100.0), saved(1, time=43.0, at=30)
    )
    found = attempts_of(events)
    # Iteration 31 and what came later is lost; line 40 came at 50 s, so before that.
    assert split(found[0]) == (10.0, 33.0, 57.0)
    assert kept_iteration(found) == 30


def test_after_two_fall_backs_what_the_earliest_left_counts():
    events = row(
        trained(1, start=0.0, resumed_at=0, until=20, seconds=120.0),
        saved(1, time=31.0, at=20),
        saved(1, time=61.0, at=50),
        saved(1, time=91.0, at=80),
        trained(2, start=200.0, resumed_at=80, until=70, seconds=60.0),
        trained(3, start=300.0, resumed_at=50, until=40, seconds=60.0),
        trained(4, start=400.0, resumed_at=20, until=30, seconds=60.0),
    )
    found = attempts_of(events)
    assert split(found[0]) == (10.0, 21.0, 89.0)
    assert [one.useful_s for one in found[1:3]] == [0.0, 0.0]
    assert kept_iteration(found) == 20


def test_nothing_is_kept_of_a_run_that_nobody_trained():
    assert kept_iteration([]) == 0
