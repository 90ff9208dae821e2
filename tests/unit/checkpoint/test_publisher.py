"""The training thread pays for a copy and for nothing else; what must be durable is waited for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from job import run
from job.checkpoint import publisher as publisher_module
from job.checkpoint.manager import BestModel, CheckpointManager
from job.checkpoint.publisher import FINISH_ATTEMPTS, Publisher, copy_tensors
from job.errors import AccessDenied, ConfigError, Fenced, StorageError
from job.events import Notice
from job.storage import LocalStore
from tests.services import wait_until
from tests.unit.checkpoint.conftest import iterations, loaded, pointer, state
from tests.unit.stores import Slow


class Told:
    """What the publisher has reported, and how often it found itself fenced."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.fenced = 0
        self.ledger_published = 0

    def tell(self, notice: Notice) -> None:
        self.notices.append(notice)

    def on_fenced(self) -> None:
        self.fenced += 1

    def before_pointer(self) -> None:
        self.ledger_published += 1

    @property
    def kinds(self) -> list[str]:
        return [notice.kind for notice in self.notices]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def slow(store: LocalStore) -> Slow:
    return Slow(store)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def slow_manager(slow: Slow, take_over: Callable[..., Any], tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(slow, take_over(slow), tmp_path / "scratch")


@pytest.fixture
def publisher(slow_manager: CheckpointManager, told: Told, slow: Slow) -> Iterator[Publisher]:
    made = Publisher(
        slow_manager,
        tell=told.tell,
        before_pointer=told.before_pointer,
        on_fenced=told.on_fenced,
    )
    yield made
    slow.gate.set()
    made.close()
    assert not made._thread.is_alive()


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "RETRY_WAIT_S", (0.0, 0.0, 0.0))


def save(publisher: Publisher, iteration: int, **options: Any) -> None:
    publisher.save(state(iteration), **{"best": None, "numbered": False, **options})


def save_best(publisher: Publisher, iteration: int) -> Any:
    files = {
        name: {"weights": torch.full((5,), float(iteration))}
        for name in (run.BEST_MODEL, run.BEST_MODEL_D)
    }
    return publisher.save_best(files, iteration=iteration, val_miou=iteration / 100)


def idle(publisher: Publisher) -> bool:
    with publisher._changed:
        return publisher._is_idle()


@contextlib.contextmanager
def in_thread(call: Callable[[], Any]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=call)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()


# ---------------------------------------------------------------- not waiting


def test_a_save_returns_while_the_storage_hangs(publisher, slow, store, told):
    slow.close_gate()
    save(publisher, 5)  # returns, although nothing can be stored
    assert slow.waiting.wait(60)
    assert publisher.busy
    assert publisher.saved_iteration is None
    assert publisher.cost is None
    assert store.stat(run.LATEST_POINTER) is None
    slow.gate.set()
    publisher.finish()
    assert publisher.saved_iteration == 5
    assert publisher.cost.size > 0
    assert not publisher.busy
    assert iterations(pointer(store)) == [5]
    assert told.ledger_published == 1


def test_a_best_model_returns_while_the_storage_hangs(publisher, slow, store):
    slow.close_gate()
    best = save_best(publisher, 5)
    assert slow.waiting.wait(60)
    assert best.iteration == 5
    assert store.stat(run.BEST_MODEL) is None
    slow.gate.set()
    publisher.finish()
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 5


def test_what_is_saved_is_the_state_of_that_moment(publisher, slow, store):
    slow.close_gate()
    current = state(5)
    current["nested"] = {"list": [torch.zeros(3)], "pair": (torch.zeros(2), 1)}
    publisher.save(current, best=None, numbered=False)
    files = {run.BEST_MODEL: {"weights": current["weights"]}}
    publisher.save_best(files, iteration=5, val_miou=0.5)
    current["weights"].fill_(-1)
    current["nested"]["list"][0].fill_(-1)
    current["nested"]["pair"][0].fill_(-1)
    current["iteration"] = 6
    slow.gate.set()
    publisher.finish()
    saved = loaded(store, run.LATEST_CHECKPOINT)
    assert saved["iteration"] == 5
    assert torch.equal(saved["weights"], state(5)["weights"])
    assert torch.equal(saved["nested"]["list"][0], torch.zeros(3))
    assert torch.equal(saved["nested"]["pair"][0], torch.zeros(2))
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 5


def test_a_copy_keeps_structure_type_and_values():
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    original = {"a": [1, "x", None, parameter], 3: (True, torch.tensor([1], dtype=torch.uint8))}
    copied = copy_tensors(original)
    assert list(copied) == ["a", 3]
    assert copied["a"][:3] == [1, "x", None]
    assert torch.equal(copied["a"][3], parameter)
    assert not copied["a"][3].requires_grad
    assert isinstance(copied[3], tuple)
    assert copied[3][1].dtype == torch.uint8
    assert copied["a"][3].data_ptr() != parameter.data_ptr()


def test_a_numbered_save_does_not_wait_for_one_on_its_way(publisher, slow, store):
    slow.close_gate()
    save(publisher, 5)
    assert slow.waiting.wait(60)
    assert not publisher.wait_until_free(0.01)
    save(publisher, 10, numbered=True)
    save(publisher, 12)
    assert publisher.busy
    slow.gate.set()
    publisher.finish()
    assert iterations(pointer(store)) == [12, 10, 5]
    assert store.stat(run.numbered_checkpoint(10)) is not None


def test_a_numbered_state_that_failed_is_made_up_for(publisher, slow, store):
    slow.failures = [StorageError("down")]
    save(publisher, 10, numbered=True)
    wait_until(lambda: not publisher.busy)
    save(publisher, 12)
    publisher.finish()
    assert iterations(pointer(store)) == [12, 10]
    assert store.stat(run.numbered_checkpoint(10)) is not None


def test_an_endless_outage_holds_a_bounded_number_of_copies(publisher, slow, store, told):
    slow.failures = [StorageError("down")] * 100
    best = None
    for iteration in range(10, 60, 10):
        best = save_best(publisher, iteration)
        save(publisher, iteration, numbered=True, best=best)
        save(publisher, iteration + 1, best=best)
        wait_until(lambda: not publisher.busy)
    assert len(publisher._shared.owed) <= 2 * publisher_module.MAX_OWED_STATES
    given_up = [n.fields["of_iteration"] for n in told.notices if n.kind == "save_given_up"]
    assert given_up == [10, 20, 30]
    slow.failures = []
    publisher.finish()
    assert iterations(pointer(store)) == [51, 50, 40]
    assert best is not None
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 50


def test_a_numbered_checkpoint_that_is_refused_for_good_does_not_stop_the_others(
    publisher, slow, store, told, monkeypatch
):
    monkeypatch.setattr(publisher_module, "MAX_TRIES", 3)

    def copy(source: str, target: str, **options: Any) -> None:
        if target == run.numbered_checkpoint(10):
            raise AccessDenied("objects of this name are locked")
        store.copy(source, target, **options)

    monkeypatch.setattr(slow, "copy", copy, raising=False)
    save(publisher, 10, numbered=True)
    for iteration in range(11, 17):
        wait_until(lambda: idle(publisher))
        save(publisher, iteration)
    publisher.finish()
    assert iterations(pointer(store))[0] == 16
    assert told.kinds.count("save_given_up") == 1
    assert store.stat(run.numbered_checkpoint(10)) is None


def test_a_better_model_outlives_a_failed_state_that_refers_to_an_older_one(publisher, slow, store):
    first = save_best(publisher, 5)
    publisher.finish()
    slow.failures = [StorageError("down")]
    save(publisher, 5, best=first, numbered=True)
    wait_until(lambda: idle(publisher))
    second = save_best(publisher, 6)
    save(publisher, 6, best=second)
    publisher.finish()
    assert iterations(pointer(store)) == [6, 5]
    for best in (first, second):
        assert store.stat(run.best_manifest(best.id)) is not None
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 6


def test_what_a_later_job_makes_pointless():
    def named(*jobs: str) -> list[str]:
        made: dict[str, Any] = {}
        for job in jobs:
            number = int(job[1:])
            best = BestModel(f"b{number // 10 * 10}", number, 0.5)
            if job[0] == "b":
                made[job] = publisher_module._Best(best, {})
            else:
                made[job] = publisher_module._Save(state(number), best, job[0] == "n", 0.0)
        kept = publisher_module.needed(list(made.values()))
        return [name for name, job in made.items() if job in kept]

    assert named("s1") == ["s1"]
    assert named("s1", "s2") == ["s2"]
    assert named("n1", "s2") == ["n1", "s2"]
    assert named("n1", "s2", "s3") == ["n1", "s3"]
    assert named("n1", "n2", "s3") == ["n1", "n2", "s3"]
    assert named("n1", "n2", "n3", "s4") == ["n2", "n3", "s4"]
    assert named("b10", "b20") == ["b20"]
    assert named("b10", "n11", "b20", "s21") == ["b10", "n11", "b20", "s21"]
    assert named("b10", "s11", "b20", "s21") == ["b20", "s21"]


def test_it_is_free_again_once_a_save_is_durable(publisher, slow, store):
    slow.close_gate()
    save(publisher, 5)
    assert slow.waiting.wait(60)
    with in_thread(slow.gate.set):
        assert publisher.wait_until_free(60)
    assert iterations(pointer(store)) == [5]


def test_the_checkpoint_notice_tells_what_it_cost(publisher, told):
    save(publisher, 5)
    publisher.finish()
    (notice,) = told.notices
    assert notice.kind == "checkpoint"
    assert notice.fields["saved_at"] == 5
    assert notice.fields["bytes"] == publisher.cost.size
    assert notice.fields.keys() == {"saved_at", "bytes", "pause_s", "serialise_s", "publish_s"}


# ---------------------------------------------------------------- failing


@pytest.mark.parametrize("error", [StorageError("full"), ConfigError("keys were revoked")])
def test_a_failure_is_told_and_the_training_goes_on(publisher, slow, store, told, error):
    slow.failures = [error]
    save(publisher, 5)
    wait_until(lambda: not publisher.busy)
    assert told.kinds == ["save_failed"]
    assert "iteration 5" in told.notices[0].message
    assert error.message in told.notices[0].message
    assert publisher.saved_iteration is None
    save(publisher, 10)
    publisher.finish()
    assert told.kinds == ["save_failed", "checkpoint"]
    assert iterations(pointer(store)) == [10]


def test_finish_tries_the_newest_failed_state_again(publisher, slow, store, told):
    slow.failures = [StorageError("down")] * (FINISH_ATTEMPTS - 1)
    save(publisher, 5)
    publisher.finish()
    assert iterations(pointer(store)) == [5]
    assert told.kinds == ["save_failed"] * (FINISH_ATTEMPTS - 1) + ["checkpoint"]


@pytest.mark.parametrize("error", [StorageError("down"), ConfigError("keys were revoked")])
def test_finish_gives_up_with_the_storages_own_error(publisher, slow, store, error):
    slow.failures = [error] * 100
    save(publisher, 5)
    with pytest.raises(type(error), match=error.message):
        publisher.finish()
    assert len([key for key in slow.uploads if key.endswith("state.pth")]) == FINISH_ATTEMPTS
    assert store.stat(run.LATEST_POINTER) is None


def test_finish_with_a_best_model_after_a_failed_state(publisher, slow, store):
    """The later success does not make the failure forgotten."""
    slow.failures = [StorageError("down")]
    save(publisher, 5)
    wait_until(lambda: not publisher.busy)
    save_best(publisher, 6)
    publisher.finish()
    assert iterations(pointer(store)) == [5]
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 6


def within(seconds: float) -> Callable[[], float]:
    """What is left of so many seconds from now on."""
    deadline_s = time.monotonic() + seconds
    return lambda: deadline_s - time.monotonic()


def test_finish_gives_up_when_its_time_is_over(publisher, slow, store):
    slow.close_gate()
    save(publisher, 5)
    with pytest.raises(StorageError, match="not durable"):
        publisher.finish(within(0.05))
    slow.gate.set()
    publisher.finish(within(60))
    assert iterations(pointer(store)) == [5]


def test_finish_does_not_wait_beyond_its_time_for_another_try(publisher, slow, monkeypatch):
    monkeypatch.setattr(publisher_module, "RETRY_WAIT_S", (3600.0,) * 3)
    slow.failures = [StorageError("down")]
    save(publisher, 5)
    with pytest.raises(StorageError, match="down"):
        publisher.finish(within(60))


@pytest.mark.parametrize("down", [False, True], ids=["uploading", "between two tries"])
def test_finish_learns_meanwhile_that_its_time_is_limited(publisher, slow, monkeypatch, down):
    monkeypatch.setattr(publisher_module, "RETRY_WAIT_S", (3600.0,) * 3)
    if down:
        slow.failures = [StorageError("down")]
    else:
        slow.close_gate()
    save(publisher, 5)
    wait_until(lambda: slow.waiting.is_set() or (down and publisher._is_idle()))
    left_s = iter([None, None, None, 0.0])
    with pytest.raises(StorageError, match="down" if down else "no time is left"):
        publisher.finish(lambda: next(left_s))


def test_finish_with_nothing_to_do_returns(publisher):
    publisher.finish()
    publisher.finish(within(0))


def test_a_best_model_is_there_before_a_state_that_refers_to_it(publisher, slow, store):
    """Even when its first upload has failed."""
    slow.failures = [StorageError("down")]
    best = save_best(publisher, 5)
    wait_until(publisher._is_idle)
    assert store.stat(run.best_manifest(best.id)) is None
    save(publisher, 5, best=best)
    publisher.finish()
    assert iterations(pointer(store)) == [5]
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 5
    last = len(slow.uploads) - 1 - slow.uploads[::-1].index(run.best_file(best.id, run.BEST_MODEL))
    state_key = next(key for key in slow.uploads if key.endswith("state.pth"))
    assert last < slow.uploads.index(state_key)


def test_a_state_whose_best_model_cannot_be_stored_is_not_stored(publisher, slow, store):
    slow.failures = [StorageError("down")] * 100
    best = save_best(publisher, 5)
    save(publisher, 5, best=best)
    with pytest.raises(StorageError, match="down"):
        publisher.finish()
    assert not any(key.endswith("state.pth") for key in slow.uploads)
    slow.failures = []
    save(publisher, 6, best=best)
    publisher.finish()
    assert store.stat(run.best_manifest(best.id)) is not None


def test_finish_makes_up_for_a_best_model_alone(publisher, slow, store):
    slow.failures = [StorageError("down")]
    save_best(publisher, 5)
    publisher.finish()
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 5


# ---------------------------------------------------------------- ending


def everything_raises(publisher: Publisher, error: type[BaseException], match: str) -> None:
    for call in (
        lambda: save(publisher, 10),
        lambda: save_best(publisher, 10),
        lambda: publisher.busy,
        lambda: publisher.wait_until_free(1),
        lambda: publisher.finish(),
        lambda: publisher.finish(within(1)),
    ):
        with pytest.raises(error, match=match):
            call()


def test_being_fenced_reaches_the_training_thread(publisher, take_over, told, store):
    take_over()
    save(publisher, 5)
    publisher._thread.join(60)
    assert told.fenced == 1
    everything_raises(publisher, Fenced, "taken over")
    assert told.fenced == 1
    assert told.kinds == []
    assert store.stat(run.LATEST_POINTER) is None


def test_whoever_waits_when_it_is_fenced_is_woken(publisher, slow, take_over):
    slow.close_gate()
    save(publisher, 5)
    assert slow.waiting.wait(60)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            publisher.finish()
        except BaseException as error:
            caught.append(error)

    with in_thread(wait):
        take_over()
        slow.gate.set()
    assert isinstance(caught[0], Fenced)


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), SystemExit("console is gone")])
def test_anything_unexpected_reaches_the_training_thread(publisher, slow, told, error):
    slow.failures = [error]
    save(publisher, 5)
    publisher._thread.join(60)
    everything_raises(publisher, type(error), str(error))
    assert told.fenced == 0


@pytest.mark.parametrize("failing", [False, True], ids=["after a success", "after a failure"])
def test_a_listener_that_breaks_is_no_reason_to_wait_for_ever(slow_manager, slow, told, failing):
    def tell(notice: Notice) -> None:
        raise BrokenPipeError("nobody listens")

    publisher = Publisher(
        slow_manager, tell=tell, before_pointer=lambda: None, on_fenced=told.on_fenced
    )
    slow.failures = [StorageError("down")] if failing else []
    save(publisher, 5)
    publisher._thread.join(60)
    everything_raises(publisher, BrokenPipeError, "nobody listens")
    publisher.close()


def test_close_ends_the_thread_and_begins_nothing_new(slow_manager, slow, told):
    publisher = Publisher(
        slow_manager, tell=told.tell, before_pointer=lambda: None, on_fenced=told.on_fenced
    )
    slow.close_gate()
    save_best(publisher, 5)
    assert slow.waiting.wait(60)
    save(publisher, 5)
    publisher.close(within_s=0.01)  # it hangs, and is left alone
    assert publisher._thread.is_alive()
    assert publisher._thread.daemon, "it cannot keep the process from ending"
    slow.gate.set()
    publisher.close()
    assert not publisher._thread.is_alive()
    assert not any(key.endswith("state.pth") for key in slow.uploads)


def test_close_with_no_time_left_at_all_returns(slow_manager, slow, told):
    publisher = Publisher(
        slow_manager, tell=told.tell, before_pointer=lambda: None, on_fenced=told.on_fenced
    )
    slow.close_gate()
    save(publisher, 5)
    assert slow.waiting.wait(60)
    publisher.close(within_s=-5.0)
    slow.gate.set()
    publisher.close()
    assert not publisher._thread.is_alive()
