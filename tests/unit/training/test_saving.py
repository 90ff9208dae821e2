"""How the loop leaves: what is saved in which time, and what the ledger is told of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from job import run
from job.checkpoint import publisher as publisher_module
from job.checkpoint.interval import SaveSchedule
from job.checkpoint.lease import Lease, acquire
from job.checkpoint.manager import BestModel, CheckpointManager, SaveCost
from job.checkpoint.publisher import Publisher
from job.errors import ConfigError, Fenced, StorageError
from job.events import Notice
from job.preemption import StopRequest
from job.storage import LocalStore
from job.training.saving import RESERVE_S, Saving
from tests.services import wait_until
from tests.unit.checkpoint.conftest import iterations, pointer
from tests.unit.stores import Slow
from tests.unit.training.test_loop import MakeRun, make_run
from tests.unit.training.tiny import tiny_config

__all__ = ["make_run"]


class State:
    """What saving asks of a `TrainState`."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        self.best: BestModel | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "weights": torch.zeros(3)}


class Heard:
    """A tracker of which only notices matter."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def notice(self, notice: Notice) -> None:
        self.notices.append(notice)

    @property
    def only(self) -> Notice:
        (notice,) = self.notices
        return notice


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "RETRY_WAIT_S", (0.0, 0.0, 0.0))


@pytest.fixture
def slow(tmp_path: Path) -> Slow:
    return Slow(LocalStore(tmp_path / "run"))


@pytest.fixture
def lease(slow: Slow) -> Iterator[Lease]:
    held = acquire(slow, on_lost=lambda: None)
    yield held
    held.release()


@pytest.fixture
def publisher(slow: Slow, lease: Lease, tmp_path: Path) -> Iterator[Publisher]:
    made = Publisher(
        CheckpointManager(slow, lease, tmp_path / "scratch"),
        tell=lambda notice: None,
        before_pointer=lambda: None,
        on_fenced=lambda: None,
    )
    yield made
    slow.gate.set()
    made.close()


@pytest.fixture
def stop() -> StopRequest:
    return StopRequest()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def saving(publisher: Publisher, stop: StopRequest, heard: Heard) -> Saving:
    config = tiny_config(checkpoint__every=10, checkpoint__keep_every=50, train__iterations=120)
    return Saving(config, publisher, SaveSchedule(10), stop, heard, 0)


def durable(slow: Slow) -> list[int]:
    """Iterations of the published checkpoints, newest first."""
    return iterations(pointer(slow)) if slow.stat(run.LATEST_POINTER) else []


def notice_comes(stop: StopRequest, within_s: float) -> None:
    stop.request("a spot notice", within_s=within_s)


# ---------------------------------------------------------------- nobody knows the end


def test_after_a_signal_the_state_is_durable_and_nothing_is_said(saving, stop, slow, heard):
    stop.request("SIGTERM")
    assert saving.before_leaving(State(7))
    assert durable(slow) == [7]
    assert heard.notices == []


def test_a_state_that_is_on_its_way_is_waited_for_and_not_saved_twice(
    saving, stop, slow, publisher
):
    slow.close_gate()
    saving.save(State(7))
    assert slow.waiting.wait(60)
    stop.request("SIGTERM")
    slow.gate.set()
    assert saving.before_leaving(State(7))
    assert durable(slow) == [7]


def test_an_older_state_that_is_on_its_way_comes_first(saving, stop, slow):
    slow.close_gate()
    saving.save(State(5))
    assert slow.waiting.wait(60)
    stop.request("SIGTERM")
    slow.gate.set()
    assert saving.before_leaving(State(7))
    assert durable(slow) == [7, 5]


@pytest.mark.parametrize("error", [StorageError("down"), ConfigError("keys were revoked")])
def test_a_storage_that_refuses_is_an_error_where_there_was_time(saving, stop, slow, error):
    slow.failures = [error] * 100
    stop.request("SIGTERM")
    with pytest.raises(type(error), match=error.message):
        saving.before_leaving(State(7))


# ---------------------------------------------------------------- within a deadline


def test_with_enough_time_the_ledger_says_how_much_was_left(saving, stop, slow, heard):
    notice_comes(stop, 1000)
    assert saving.before_leaving(State(7))
    assert durable(slow) == [7]
    assert heard.only.kind == "saved_in_time"
    assert heard.only.fields["saved_at"] == 7
    assert 0 < heard.only.fields["seconds_left"] <= 1000
    assert "Saved after iteration 7" in heard.only.message


def test_what_is_handed_over_already_is_waited_for(saving, stop, slow, heard):
    saving.save(State(7))
    notice_comes(stop, 1000)
    assert saving.before_leaving(State(7))
    assert durable(slow) == [7]
    assert heard.only.kind == "saved_in_time"


@pytest.mark.parametrize("left_s", [0.0, RESERVE_S - 1])
def test_without_time_nothing_is_begun_and_the_ledger_says_so(saving, stop, slow, heard, left_s):
    notice_comes(stop, left_s)
    assert not saving.before_leaving(State(7))
    assert slow.uploads == []
    assert heard.only.kind == "save_skipped"
    fields = heard.only.fields
    assert fields["reached"] == 7
    assert fields["saved_at"] is None
    assert fields["seconds_left"] <= left_s
    assert "the iterations of this attempt will be trained again" in heard.only.message


def test_a_save_that_takes_longer_than_is_left_is_not_begun(saving, stop, slow, publisher, heard):
    saving.save(State(5))
    publisher.finish()
    publisher._shared.cost = SaveCost(size=1, serialise_s=50.0, publish_s=150.0)
    uploads = len(slow.uploads)
    notice_comes(stop, 100)
    assert not saving.before_leaving(State(7))
    assert len(slow.uploads) == uploads
    assert "a save takes 200 s, 100 s are left" in heard.only.message
    assert "since iteration 5 will be trained again" in heard.only.message
    assert heard.only.fields["saved_at"] == 5


def test_a_save_that_takes_less_is_begun(saving, stop, slow, publisher, heard):
    saving.save(State(5))
    publisher.finish()
    publisher._shared.cost = SaveCost(size=1, serialise_s=10.0, publish_s=40.0)
    notice_comes(stop, 100)
    assert saving.before_leaving(State(7))
    assert durable(slow) == [7, 5]


def test_an_upload_in_flight_that_does_not_end_leaves_no_time(saving, stop, slow, heard):
    slow.close_gate()
    saving.save(State(5))
    assert slow.waiting.wait(60)
    notice_comes(stop, RESERVE_S + 0.2)
    assert not saving.before_leaving(State(7))
    assert heard.only.kind == "save_skipped"
    assert len([key for key in slow.uploads if key.endswith("state.pth")]) == 1
    slow.gate.set()  # what was on its way still counts
    wait_until(lambda: durable(slow) == [5])


def test_an_upload_in_flight_that_ends_in_time_is_followed_by_the_last(saving, stop, slow, heard):
    slow.close_gate()
    saving.save(State(5))
    assert slow.waiting.wait(60)
    notice_comes(stop, 1000)
    slow.gate.set()
    assert saving.before_leaving(State(7))
    assert durable(slow) == [7, 5]
    assert heard.only.kind == "saved_in_time"


def test_a_last_save_that_hangs_is_given_up_before_the_machine_goes(saving, stop, slow, heard):
    slow.close_gate()
    notice_comes(stop, RESERVE_S + 0.3)
    assert not saving.before_leaving(State(7))
    assert heard.only.kind == "save_skipped"
    assert "not durable" in heard.only.fields["reason"]


def test_a_notice_counts_that_comes_while_the_last_save_hangs(saving, stop, slow, heard):
    """As at the end of a run, which nothing had stopped."""
    slow.close_gate()
    saving.save(State(7))
    timer = threading.Timer(0.2, notice_comes, (stop, RESERVE_S + 0.3))
    timer.start()
    assert not saving.before_leaving(State(7))
    timer.join()
    assert heard.only.kind == "save_skipped"


def test_a_state_as_it_was_restored_is_not_saved_again(publisher, stop, slow, heard):
    saving = Saving(tiny_config(), publisher, SaveSchedule(10), stop, heard, 7)
    assert saving.before_leaving(State(7))
    assert slow.uploads == []


@pytest.mark.parametrize("error", [StorageError("down"), ConfigError("keys were revoked")])
def test_a_storage_that_fails_before_the_machine_goes_is_told(saving, stop, slow, heard, error):
    slow.failures = [error] * 100
    notice_comes(stop, 1000)
    assert not saving.before_leaving(State(7))
    assert heard.only.kind == "save_skipped"
    assert heard.only.fields["reason"] == error.message


@pytest.mark.parametrize("left_s", [None, 1000])
def test_being_fenced_is_no_matter_of_time(saving, stop, slow, publisher, left_s):
    text = slow.read(run.LEASE)
    slow.write(run.LEASE, text.replace(b'"attempt": 1', b'"attempt": 2'))
    stop.request("anything", within_s=left_s)
    with pytest.raises(Fenced):
        saving.before_leaving(State(7))
    assert durable(slow) == []


def test_a_run_whose_last_state_is_not_saved_is_not_complete(make_run: MakeRun) -> None:
    """Exit 0 would say that all files are in place."""
    three = make_run(train__iterations=3)
    stop = StopRequest()

    def at_the_last_evaluation(kind: str, what: Any) -> None:
        if kind == "evaluation":
            stop.request("a spot notice", within_s=1.0)

    attempt = three(hook=at_the_last_evaluation, stop=stop)
    assert not attempt.complete
    assert three.saved_iterations() == []
    assert three().complete
    assert three.has(run.numbered_checkpoint(3))


# ---------------------------------------------------------------- in between


def test_recovery_checkpoints_numbered_ones_and_the_last_are_due(saving):
    due = []
    for iteration in range(1, 121):
        if saving.due(iteration):
            due.append(iteration)
            saving._schedule.saved()
    assert due == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
    assert [saving._is_numbered(i) for i in (10, 50, 100, 119, 120)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_a_save_that_falls_due_while_one_is_on_its_way_comes_later(saving, slow, publisher):
    slow.close_gate()
    saving.save(State(10))
    assert slow.waiting.wait(60)
    assert not saving.due(20)
    assert not saving.due(21)
    assert saving.due(50), "a numbered one belongs to its iteration"
    slow.gate.set()
    publisher.finish()
    assert saving.due(22)


def test_a_rebalance_recommendation_makes_a_save_due(saving, stop):
    assert not saving.due(1)
    stop.request_save()
    assert saving.due(2)
    saving.save(State(2))
    assert not saving.due(3)


def test_a_measured_cost_is_told_once_when_it_changes_the_interval(publisher, stop, heard):
    saving = Saving(tiny_config(), publisher, SaveSchedule("auto"), stop, heard, 0)
    saving.save(State(1))
    publisher.finish()
    publisher._shared.cost = SaveCost(size=1, serialise_s=100.0, publish_s=300.0)
    saving.due(2)
    saving.due(3)
    assert heard.only.kind == "save_interval"
    assert heard.only.fields == {"seconds": 800.0}


def test_what_is_due_after_a_fencing_raises(saving, slow, publisher):
    text = slow.read(run.LEASE)
    slow.write(run.LEASE, text.replace(b'"attempt": 1', b'"attempt": 2'))
    saving.save(State(5))
    publisher._thread.join(60)
    with pytest.raises(Fenced):
        saving.due(10)
    with pytest.raises(Fenced):
        saving.before_leaving(State(11))


def test_whoever_waits_long_is_told_what_for_and_what_leaving_costs(
    saving, stop, slow, heard, monkeypatch
):
    monkeypatch.setattr("job.training.saving.PATIENCE_S", 0.1)
    monkeypatch.setattr(publisher_module, "LOOK_AGAIN_S", 0.02)
    saving.save(State(5))
    wait_until(lambda: durable(slow) == [5])
    slow.close_gate()
    stop.request("SIGINT")
    leaving = threading.Thread(target=saving.before_leaving, args=(State(7),))
    leaving.start()
    wait_until(lambda: bool(heard.notices))
    slow.gate.set()
    leaving.join(60)
    assert durable(slow) == [7, 5]
    assert heard.only.kind == "save_waits"
    assert "until iteration 7 is saved" in heard.only.message
    assert "what came after 5" in heard.only.message
