"""Checkpoints exist whole or not at all, whatever stage of a publish is the last one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from job import run
from job.checkpoint.manager import KEEP_RECOVERY, BestModel, CheckpointManager
from job.drill.proxy import CorruptReply, CutUpload, FaultProxy, LoseReply, Status
from job.errors import AccessDenied, Fenced, StorageError
from job.storage import ABSENT, ObjectStore
from job.storage import s3 as s3_module
from job.storage.s3 import S3Store
from tests.unit.checkpoint.conftest import (
    iteration_in,
    iterations,
    kept_data,
    loaded,
    pointer,
    save,
    save_best,
    state,
)
from tests.unit.stores import Killed, MortalStore, Passing

on_s3 = pytest.mark.parametrize("store", ["bucket"], indirect=True)


@pytest.fixture
def reopened(store: ObjectStore, lease: Any, tmp_path: Path) -> Callable[[], CheckpointManager]:
    """What another process would see."""
    return lambda: CheckpointManager(store, lease, tmp_path / "scratch2")


@pytest.fixture
def through(
    store: ObjectStore, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Store]:
    """The same run through a proxy, with small parts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_module, "_wait", lambda attempt: None)
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda *_, **__: 0.0)
    opened = S3Store(store.uri)
    with contextlib.closing(opened.client):
        yield opened


# ---------------------------------------------------------------- saving and restoring


def test_no_checkpoint_yet(manager):
    assert manager.restore() is None


def test_the_newest_is_restored(manager, reopened):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    restored = reopened().restore()
    assert restored["iteration"] == 15
    assert torch.equal(restored["weights"], state(15)["weights"])


def test_plain_names_follow(manager, store):
    save(manager, 5, numbered=True)
    save(manager, 7)
    assert iteration_in(store, "latest_checkpoint.pth") == 7
    assert iteration_in(store, "checkpoint_5.pth") == 5


def test_equal_states_are_equal_files(manager, store):
    save(manager, 5)
    first = store.read("latest_checkpoint.pth")
    save(manager, 5)
    assert store.read("latest_checkpoint.pth") == first


def test_a_checkpoint_of_a_later_format_is_not_quarantined(manager, store, reopened):
    save(manager, 5)
    (id_,) = pointer(store)
    manifest = json.loads(store.read(run.checkpoint_manifest(id_)))
    store.write(run.checkpoint_manifest(id_), json.dumps({**manifest, "format": 99}).encode())
    with pytest.raises(StorageError, match="format 99"):
        reopened().restore()
    assert list(store.list(run.QUARANTINE)) == []


def test_a_full_disk_is_an_error_with_a_mend_and_the_old_checkpoint_stays(
    manager, reopened, monkeypatch
):
    save(manager, 5)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="file write failed") as caught:
        save(manager, 10)
    assert "disk space" in caught.value.mend
    monkeypatch.undo()
    assert reopened().restore()["iteration"] == 5


def test_what_a_save_costs_is_told(manager):
    cost = manager.save(state(5), best=None, numbered=False)
    assert cost.size > 0
    assert cost.seconds == cost.serialise_s + cost.publish_s > 0


def test_the_ledger_is_made_durable_between_data_and_pointer(manager, store):
    def before_pointer() -> None:
        assert kept_data(store) == [5]
        assert store.stat(run.LATEST_POINTER) is None

    manager.save(state(5), best=None, numbered=False, before_pointer=before_pointer)
    assert iterations(pointer(store)) == [5]


def test_without_a_durable_ledger_there_is_no_checkpoint(manager, store, reopened):
    save(manager, 5)

    def fails() -> None:
        raise StorageError("the ledger")

    with pytest.raises(StorageError, match="the ledger"):
        manager.save(state(10), best=None, numbered=True, before_pointer=fails)
    assert iterations(pointer(store)) == [5]
    assert iteration_in(store, run.LATEST_CHECKPOINT) == 5
    assert store.stat(run.numbered_checkpoint(10)) is None
    save(manager, 11)
    assert kept_data(store) == [5, 11], "what the failed save had uploaded is gone"


# ---------------------------------------------------------------- the ladder


DAMAGES: dict[str, tuple[Callable[[bytes], bytes] | None, str]] = {
    "empty": (lambda data: b"", "0 bytes"),
    "truncated": (lambda data: data[: len(data) // 2], "bytes with sha256"),
    "bit flipped": (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "sha256"),
    "too long": (lambda data: data + b"x", "sha256"),
    "missing": (None, "data is missing"),
}


class Watched(Passing):
    """Remembers which objects were fetched."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.fetched: list[str] = []

    def fetch(self, key: str, directory: Path) -> Path:
        self.fetched.append(key)
        return self.inner.fetch(key, directory)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_quarantined_and_never_tried_again(
    manager, store, lease, tmp_path, damage, caplog
):
    change, reason = DAMAGES[damage]
    save(manager, 5)
    save(manager, 10)
    newest = pointer(store)[0]
    key = run.checkpoint_state(newest)
    data = store.read(key)
    if change is None:
        store.delete(key)
    else:
        store.write(key, change(data))

    assert CheckpointManager(store, lease, tmp_path / "s").restore()["iteration"] == 5
    mark = json.loads(store.read(run.quarantine_mark(newest)))
    assert reason in mark["reason"]
    assert newest in caplog.text
    assert iteration_in(store, run.LATEST_CHECKPOINT) == 5
    caplog.clear()
    store.write(key, data)  # good again, but it has been condemned
    watched = Watched(store)
    again = CheckpointManager(watched, lease, tmp_path / "s")
    assert again.restore()["iteration"] == 5
    assert key not in watched.fetched
    assert caplog.text == ""
    save(again, 6)
    assert iterations(pointer(store)) == [6, 5]
    assert CheckpointManager(store, lease, tmp_path / "s").restore()["iteration"] == 6


def test_a_kill_before_the_pointer_moved_on_reads_a_condemned_checkpoint_no_more(
    manager, store, take_over, tmp_path
):
    """The mark alone must do: nothing after it was written."""
    save(manager, 5)
    save(manager, 10)
    newest = pointer(store)[0]
    store.write(run.checkpoint_state(newest), b"")
    mortal = MortalStore(store)
    killed = CheckpointManager(mortal, take_over(mortal), tmp_path / "s")
    mortal.changes_left = 1
    with pytest.raises(Killed):
        killed.restore()
    assert pointer(store)[0] == newest
    watched = Watched(store)
    assert CheckpointManager(watched, take_over(), tmp_path / "s").restore()["iteration"] == 5
    assert run.checkpoint_state(newest) not in watched.fetched


def test_a_missing_or_broken_manifest_is_damage(manager, store, reopened):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    ids = pointer(store)
    store.delete(run.checkpoint_manifest(ids[0]))
    store.write(run.checkpoint_manifest(ids[1]), b"{}")
    assert reopened().restore()["iteration"] == 5


def test_a_manifest_without_data_or_a_pointer_to_nothing_falls_back(manager, store, reopened):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    ids = pointer(store)
    store.delete(run.checkpoint_state(ids[0]))
    store.delete(run.checkpoint_state(ids[1]))
    store.delete(run.checkpoint_manifest(ids[1]))
    assert reopened().restore()["iteration"] == 5
    assert {Path(info.key).stem for info in store.list(run.QUARANTINE)} == set(ids[:2])


def test_a_state_that_is_no_checkpoint_of_ours_is_damage(manager, store, reopened):
    """The hash is right, and torch refuses to load it: nothing in it is ever executed."""
    save(manager, 5)
    save(manager, 10)
    newest = pointer(store)[0]
    manifest = json.loads(store.read(run.checkpoint_manifest(newest)))
    record = manifest["files"]["state.pth"]
    evil = b"cos\nsystem\n(S'touch executed'\ntR."
    record["size"] = len(evil)
    record["sha256"] = __import__("hashlib").sha256(evil).hexdigest()
    store.write(run.checkpoint_state(newest), evil)
    store.write(run.checkpoint_manifest(newest), json.dumps(manifest).encode())
    assert reopened().restore()["iteration"] == 5
    assert not Path("executed").exists()


def test_nothing_readable_is_an_error_not_a_fresh_start(manager, store, reopened):
    save(manager, 5)
    store.delete(run.checkpoint_state(pointer(store)[0]))
    for _ in range(2):
        with pytest.raises(StorageError, match="none of its 1 checkpoints") as caught:
            reopened().restore()
        assert "another --run" in caught.value.mend


def test_after_a_fallback_the_future_is_forgotten(manager, store, reopened):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    ids = pointer(store)
    store.delete(run.checkpoint_state(ids[0]))
    again = reopened()
    assert again.restore()["iteration"] == 10
    save(again, 12)
    assert pointer(store)[1:] == ids[1:]
    assert ids[0] not in pointer(store)


@on_s3
def test_a_numbered_checkpoint_is_read_under_either_of_its_names(manager, store, reopened):
    save(manager, 5)
    save(manager, 10, numbered=True)
    store.write(run.checkpoint_state(pointer(store)[0]), b"damaged")
    assert reopened().restore()["iteration"] == 10
    assert list(store.list(run.QUARANTINE)) == []
    assert iteration_in(store, run.LATEST_CHECKPOINT) == 10


@on_s3
@pytest.mark.parametrize("large", [False, True], ids=["in one", "in parts"])
def test_damage_on_the_way_condemns_nothing(
    manager, store, through, lease, tmp_path, fault_proxy, large
):
    """Of parts S3 has no checksum that boto3 would compare: our own sha256 finds it."""
    save(manager, 5)
    content = {**state(10), "more": torch.zeros(2_000_000 if large else 1)}
    CheckpointManager(through, lease, tmp_path / "s").save(content, best=None, numbered=False)
    assert (through.stat(run.LATEST_CHECKPOINT).size > s3_module.PART_BYTES) is large
    flip = fault_proxy.add(CorruptReply(3000, method="GET", match="state.pth"))
    restored = CheckpointManager(through, lease, tmp_path / "s").restore()
    assert flip.fired == 1
    assert restored["iteration"] == 10
    assert list(store.list(run.QUARANTINE)) == []


@on_s3
@pytest.mark.parametrize("what", ["state.pth", "manifest.json"])
def test_what_always_arrives_changed_is_damage(
    manager, store, through, lease, tmp_path, fault_proxy, what
):
    save(manager, 5)
    save(manager, 10)
    newest = pointer(store)[0]
    fault_proxy.add(CorruptReply(20, method="GET", match=f"{newest}/{what}", times=None))
    restored = CheckpointManager(through, lease, tmp_path / "s").restore()
    assert restored["iteration"] == 5
    mark = json.loads(store.read(run.quarantine_mark(newest)))
    assert "what arrives is not" in mark["reason"]


@on_s3
@pytest.mark.parametrize("status", [403, 500, 503])
@pytest.mark.parametrize("what", ["latest.json", "manifest.json", "state.pth", "list-type"])
def test_a_storage_that_fails_condemns_nothing_and_is_no_fresh_start(
    manager, store, through, lease, tmp_path, fault_proxy, what, status
):
    save(manager, 5)
    save(manager, 10)
    before = pointer(store)
    fault_proxy.add(Status(status, match=what, times=None))
    with pytest.raises(StorageError):
        CheckpointManager(through, lease, tmp_path / "s").restore()
    assert list(store.list(run.QUARANTINE)) == []
    assert pointer(store) == before


# ---------------------------------------------------------------- killed


def test_a_kill_at_every_stage_of_a_save_leaves_a_good_checkpoint(store, take_over, tmp_path):
    """Every change to the store, one after the other, is the last one."""
    stages = 0
    completed = False
    while not completed:
        for info in list(store.list("")):
            if info.key != run.LEASE:
                store.delete(info.key)
        first = CheckpointManager(store, take_over(), tmp_path / "scratch")
        best = save_best(first, 1)
        for iteration in (2, 3, 4):
            save(first, iteration, best=best)
        mortal = MortalStore(store)
        second = CheckpointManager(mortal, take_over(mortal), tmp_path / "scratch")
        second.restore()
        mortal.changes_left = stages
        try:
            save(second, 6, best=save_best(second, 6), numbered=True)
            completed = True
        except Killed:
            stages += 1

        third = CheckpointManager(store, take_over(), tmp_path / "scratch")
        restored = third.restore()
        assert restored is not None
        assert restored["iteration"] in ((6,) if completed else (4, 6))
        assert torch.equal(restored["weights"], state(restored["iteration"])["weights"])
        assert iteration_in(store, run.LATEST_CHECKPOINT) == restored["iteration"]
        assert loaded(store, run.BEST_MODEL)["weights"][0] in (1, 6)
        # The next save tidies up what the killed one left.
        save(third, 7, best=best)
        assert len(kept_data(store)) == KEEP_RECOVERY
        listed = {info.key.split("/")[1] for info in store.list("best/")}
        assert listed <= {best.id, *(third._manifest(id_).best_id for id_ in pointer(store))}
    assert stages >= 13, "the test has lost its grip on the store's changes"


def test_a_kill_at_every_stage_of_a_restore_changes_nothing_for_the_next(
    store, take_over, tmp_path
):
    """The changes are: the mark of a bad one, the pointer, the plain name."""
    for stages in range(4):
        manager = CheckpointManager(store, take_over(), tmp_path / "s")
        manager.restore()
        for iteration in (5, 10, 15):
            save(manager, iteration)
        store.write(run.checkpoint_state(pointer(store)[0]), b"damaged")
        mortal = MortalStore(store)
        killed = CheckpointManager(mortal, take_over(mortal), tmp_path / "s")
        mortal.changes_left = stages
        if stages < 3:
            with pytest.raises(Killed):
                killed.restore()
        else:
            assert killed.restore()["iteration"] == 10
        again = CheckpointManager(store, take_over(), tmp_path / "s")
        assert again.restore()["iteration"] == 10
        assert iterations(pointer(store))[0] == 10
        assert iteration_in(store, run.LATEST_CHECKPOINT) == 10


@on_s3
@pytest.mark.parametrize("fault", [LoseReply, lambda **where: CutUpload(30, **where)])
@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD"])
def test_a_hiccup_at_any_request_of_a_save_is_survived(
    manager, store, through, lease, tmp_path, fault_proxy, fault, method
):
    """The same request again is enough, whether or not the first one has arrived."""
    best = save_best(manager, 5)
    for iteration in range(1, 6):
        save(manager, iteration, best=best)
    flaky = CheckpointManager(through, lease, tmp_path / "s")
    flaky.restore()
    hiccup = fault_proxy.add(fault(method=method, times=1))
    hits = 0
    for iteration in range(6, 40):
        fault_proxy.forget()
        best = save_best(flaky, iteration)
        save(flaky, iteration, best=best, numbered=True)
        hits += hiccup.fired
        assert iteration_in(store, run.LATEST_CHECKPOINT) == iteration
        assert iteration_in(store, run.numbered_checkpoint(iteration)) == iteration
        assert iterations(pointer(store))[0] == iteration
        assert loaded(store, run.BEST_MODEL)["weights"][0] == iteration
        if not hiccup.fired:
            break  # so many requests has a save
        hiccup.remove()
        hiccup = fault_proxy.add(fault(method=method, times=1, skip=hits))
    else:
        pytest.fail("a save has no end")
    assert hits >= 2
    assert list(store.list(run.QUARANTINE)) == []


# ---------------------------------------------------------------- fenced


def test_a_stale_attempt_cannot_publish(manager, store, take_over, reopened):
    save(manager, 5)
    before = store.read(run.LATEST_POINTER)
    take_over()
    for attempt in (
        lambda: save(manager, 10),
        lambda: save_best(manager, 10),
        lambda: manager.save_file({"a": 1}, run.FINAL_MODEL),
        lambda: reopened().restore(),
    ):
        with pytest.raises(Fenced):
            attempt()
    assert store.read(run.LATEST_POINTER) == before
    assert iteration_in(store, run.LATEST_CHECKPOINT) == 5
    assert store.stat(run.BEST_MODEL) is None
    assert store.stat(run.FINAL_MODEL) is None


def test_the_holder_of_the_lease_overrides_a_pointer_written_by_a_stale_attempt(manager, store):
    save(manager, 5)
    store.write(run.LATEST_POINTER, b'{"checkpoints": [], "attempt": 0}')
    save(manager, 10)
    assert iteration_in(store, run.LATEST_CHECKPOINT) == 10
    assert iterations(pointer(store)) == [10, 5]


class SleepyStore(MortalStore):
    """Falls asleep once, before its n-th change, and goes on when the rest of the world has."""

    def __init__(self, inner: ObjectStore, meanwhile: Callable[[], None]) -> None:
        super().__init__(inner)
        self.meanwhile = meanwhile
        self.slept = False

    def _change(self) -> None:
        if self.changes_left == 0:
            self.slept = True
            self.meanwhile()
        self.changes_left -= 1


PLAIN = (
    run.LATEST_CHECKPOINT,
    run.BEST_MODEL,
    run.BEST_MODEL_D,
    run.numbered_checkpoint(10),
    run.numbered_checkpoint(5),
)


def visible(store: ObjectStore, manager: CheckpointManager) -> dict[str, bytes]:
    """Everything a user or the next attempt would look at."""
    keys = [run.LATEST_POINTER, *PLAIN]
    for id_ in pointer(store):
        manifest = manager._manifest(id_)
        keys += [run.checkpoint_manifest(id_), run.checkpoint_state(id_)]
        if manifest.best_id is not None:
            keys.append(run.best_manifest(manifest.best_id))
            keys += [run.best_file(manifest.best_id, name) for name in (run.BEST_MODEL,)]
    return {key: store.read_versioned(key)[0] for key in keys}


def test_a_stale_attempt_that_wakes_at_any_stage_changes_nothing(store, take_over, tmp_path):
    """It sleeps in the middle of a save; meanwhile its successor has gone on and published."""
    stages = 0
    fenced = 0
    seen: dict[str, bytes] = {}
    while True:
        for info in list(store.list("")):
            if info.key != run.LEASE:
                store.delete(info.key)
        before = CheckpointManager(store, take_over(), tmp_path / "s0")
        best = save_best(before, 1)
        for iteration in (3, 4, 5):
            save(before, iteration, numbered=iteration == 5, best=best)

        seen.clear()
        successor: CheckpointManager | None = None

        def meanwhile() -> None:
            nonlocal successor
            successor = CheckpointManager(store, take_over(), tmp_path / "s2")
            restored = successor.restore()
            assert restored is not None
            assert restored["iteration"] in (5, 10)
            best = save_best(successor, 9)
            for iteration in (10, 12):
                save(successor, iteration, numbered=iteration == 10, best=best, by=2)
            seen.update(visible(store, successor))

        sleepy = SleepyStore(store, meanwhile)
        stale = CheckpointManager(sleepy, take_over(sleepy), tmp_path / "s1")
        assert stale.restore()["iteration"] == 5
        sleepy.changes_left = stages
        try:
            save(stale, 10, numbered=True, best=save_best(stale, 10))
        except Fenced:
            fenced += 1
        if not sleepy.slept:
            break
        assert successor is not None
        assert visible(store, successor) == seen, f"woken before change {stages}"
        with pytest.raises(Fenced):
            save(stale, 11)
        last = CheckpointManager(store, take_over(), tmp_path / "s3")
        assert last.restore()["iteration"] == 12
        assert visible(store, last).keys() == seen.keys()
        stages += 1
    assert stages >= 13
    assert fenced >= stages - 3, "nearly every stage finds out at once"


def test_a_successor_that_has_only_restored_shuts_its_predecessor_out(store, take_over, tmp_path):
    """Before the successor's first save, too, the sleeper's pointer is refused."""

    def meanwhile() -> None:
        successor = CheckpointManager(store, take_over(), tmp_path / "s2")
        assert successor.restore()["iteration"] == 5

    sleepy = SleepyStore(store, meanwhile)
    stale = CheckpointManager(sleepy, take_over(sleepy), tmp_path / "s1")
    save(stale, 5)
    sleepy.changes_left = 2  # data, manifest, and now the pointer
    with pytest.raises(Fenced):
        save(stale, 10)
    assert sleepy.slept
    assert iterations(pointer(store)) == [5]
    assert iteration_in(store, run.LATEST_CHECKPOINT) == 5


def test_a_stale_attempts_leftovers_go_with_the_next_ones_first_save(store, take_over, tmp_path):
    mortal = MortalStore(store)
    stale = CheckpointManager(mortal, take_over(mortal), tmp_path / "s1")
    mortal.changes_left = 1  # the data, but no manifest that makes them a checkpoint
    with pytest.raises(Killed):
        save(stale, 10)
    assert kept_data(store) == [10]
    successor = CheckpointManager(store, take_over(), tmp_path / "s2")
    assert successor.restore() is None
    save(successor, 3)
    assert kept_data(store) == [3]


# ---------------------------------------------------------------- retention


def test_recovery_checkpoints_are_pruned_and_numbered_ones_stay(manager, store, reopened):
    for iteration in range(1, 11):
        save(manager, iteration, numbered=iteration % 4 == 0)
    assert kept_data(store) == [8, 9, 10]
    assert len(kept_data(store)) == KEEP_RECOVERY
    assert iteration_in(store, "checkpoint_4.pth") == 4
    # The ladder still reaches it, through its plain name.
    for info in list(store.list(run.CHECKPOINTS)):
        if info.key.endswith(".pth"):
            store.delete(info.key)
    store.delete("checkpoint_8.pth")
    assert reopened().restore()["iteration"] == 4


class OrderedStore(Passing):
    """Checks at each deletion that something newer is durable."""

    deletions = 0

    def delete(self, key: str) -> None:
        self.deletions += 1
        durable = pointer(self.inner)
        for id_ in durable[:KEEP_RECOVERY]:
            assert id_ not in key
            assert self.inner.stat(run.checkpoint_state(id_)) is not None
            assert self.inner.stat(run.checkpoint_manifest(id_)) is not None
        self.inner.delete(key)


def test_nothing_is_deleted_before_its_successor_is_durable(store, lease, tmp_path):
    ordered = OrderedStore(store)
    manager = CheckpointManager(ordered, lease, tmp_path / "s")
    for iteration in range(1, 8):
        best = save_best(manager, iteration)
        save(manager, iteration, best=best, numbered=iteration % 3 == 0)
    assert ordered.deletions > 10
    assert iterations(pointer(store)) == [7, 6, 5, 3]


class FailingStore(Passing):
    """Refuses to write one key."""

    refused = ""

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        if key == self.refused:
            raise StorageError("refused")
        return self.inner.write(key, data, expected=expected)


def test_a_save_without_a_pointer_deletes_nothing_and_leaves_nothing(store, take_over, tmp_path):
    failing = FailingStore(store)
    manager = CheckpointManager(failing, take_over(failing), tmp_path / "s")
    for iteration in range(1, 6):
        save(manager, iteration)
    before = {info.key for info in store.list(run.CHECKPOINTS)}
    failing.refused = run.LATEST_POINTER
    with pytest.raises(StorageError, match="refused"):
        save(manager, 6)
    assert before <= {info.key for info in store.list(run.CHECKPOINTS)}
    assert iterations(pointer(store)) == kept_data(store)[2::-1] == [5, 4, 3]
    failing.refused = ""
    save(manager, 7)
    assert kept_data(store) == [4, 5, 7]


class UndeletableStore(Passing):
    denied = 0

    def delete(self, key: str) -> None:
        self.denied += 1
        raise AccessDenied(f"cannot delete {key}: access denied", mend="s3:DeleteObject")


def test_without_the_right_to_delete_there_is_one_warning_and_saving_goes_on(
    store, lease, tmp_path, caplog
):
    undeletable = UndeletableStore(store)
    manager = CheckpointManager(undeletable, lease, tmp_path / "s")
    for iteration in range(1, 8):
        save(manager, iteration)
    assert undeletable.denied > 1
    assert caplog.text.count("old checkpoints could not be deleted") == 1
    assert "s3:DeleteObject" in caplog.text
    assert iterations(pointer(store))[:KEEP_RECOVERY] == [7, 6, 5]
    assert kept_data(store) == [1, 2, 3, 4, 5, 6, 7]
    # With the right, the next attempt's first save tidies up.
    allowed = CheckpointManager(store, lease, tmp_path / "s")
    allowed.restore()
    save(allowed, 8)
    assert kept_data(store) == [6, 7, 8]


def test_what_could_not_be_deleted_for_a_moment_goes_with_the_next_save(store, lease, tmp_path):
    undeletable = UndeletableStore(store)
    manager = CheckpointManager(undeletable, lease, tmp_path / "s")
    for iteration in range(1, 6):
        save(manager, iteration)
    assert kept_data(store) == [1, 2, 3, 4, 5]
    manager._store = store
    save(manager, 6)
    assert kept_data(store) == [4, 5, 6]


@on_s3
def test_a_bucket_that_forbids_deleting_is_no_hindrance(manager, store, caplog):
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:DeleteObject",
                "Resource": f"arn:aws:s3:::{store.bucket}/runs/*",
            }
        ],
    }
    store.client.put_bucket_policy(Bucket=store.bucket, Policy=json.dumps(policy))
    try:
        for iteration in range(1, 6):
            save(manager, iteration)
    finally:
        store.client.delete_bucket_policy(Bucket=store.bucket)
    assert caplog.text.count("s3:DeleteObject") == 1
    assert kept_data(store) == [1, 2, 3, 4, 5]
    assert iteration_in(store, run.LATEST_CHECKPOINT) == 5


# ---------------------------------------------------------------- best models


def test_best_models_are_kept_as_long_as_a_checkpoint_refers_to_them(manager, store):
    def kept() -> set[str]:
        return {info.key.split("/")[1] for info in store.list(run.BEST)}

    first = save_best(manager, 10)
    save(manager, 10, best=first)
    second = save_best(manager, 20)
    save(manager, 20, best=second)
    assert kept() == {first.id, second.id}
    for iteration in (21, 22, 23):
        save(manager, iteration, best=second)
    assert kept() == {second.id}
    manager.point_best(second)
    assert torch.load(manager.verify_best(second), weights_only=True)["weights"][0] == 20


def test_a_rolled_back_best_model_is_pointed_to_again(manager, store):
    first = save_best(manager, 10)
    save_best(manager, 20)
    manager.point_best(first)
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 10


def test_a_best_model_that_was_changed_does_not_verify(manager, store):
    best = save_best(manager, 10)
    # The plain names are mended from the model's own files ...
    store.delete(run.BEST_MODEL_D)
    store.write(run.BEST_MODEL, b"other")
    assert torch.load(manager.verify_best(best), weights_only=True)["name"] == run.BEST_MODEL
    assert loaded(store, run.BEST_MODEL)["weights"][0] == 10
    assert loaded(store, run.BEST_MODEL_D)["name"] == run.BEST_MODEL_D
    # ... which have to be what was written.
    store.write(run.best_file(best.id, run.BEST_MODEL_D), b"other")
    store.write(run.BEST_MODEL_D, b"other")
    with pytest.raises(StorageError, match="not the file that was written"):
        manager.verify_best(best)


def test_best_model_records_survive_a_checkpoint(manager):
    best = save_best(manager, 10)
    assert BestModel.from_dict(json.loads(json.dumps(best.to_dict()))) == best


def test_no_two_saves_share_a_key(manager, store):
    """Not even those of one iteration in one attempt: a reader never sees one become another."""
    versions: dict[str, str] = {}
    for _ in range(3):
        save(manager, 5)
        for info in store.list(run.CHECKPOINTS):
            if info.key != run.LATEST_POINTER:
                assert versions.setdefault(info.key, info.version) == info.version
    assert len(versions) == 6
    assert ABSENT not in versions.values()


def test_nothing_stays_in_the_local_folder(manager, reopened, tmp_path):
    save(manager, 5, numbered=True, best=save_best(manager, 5))
    reopened().restore()
    left = [name for folder in ("scratch", "scratch2") for name in _names(tmp_path / folder)]
    assert left == []


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def test_a_damaged_copy_of_a_numbered_checkpoint_is_made_anew_from_the_other(
    manager, store, reopened, caplog
):
    save(manager, 5)
    save(manager, 10, numbered=True)
    newest = pointer(store)[0]
    whole = store.read(run.checkpoint_state(newest))
    store.write(run.checkpoint_state(newest), whole[:-1] + bytes([whole[-1] ^ 1]))
    assert reopened().restore()["iteration"] == 10
    assert store.read(run.checkpoint_state(newest)) == whole
    assert "made anew" in caplog.text
    assert list(store.list(run.QUARANTINE)) == []


@pytest.mark.parametrize("content", [b"", b'{"checkp', b"[]", None], ids=repr)
def test_a_lost_pointer_is_no_fresh_start(manager, store, reopened, content, caplog):
    """The manifests say what there is; nothing of it is taken for leftovers."""
    for iteration in (5, 10, 15):
        save(manager, iteration)
    before = pointer(store)
    if content is None:
        store.delete(run.LATEST_POINTER)
    else:
        store.write(run.LATEST_POINTER, content)
    again = reopened()
    assert again.restore()["iteration"] == 15
    assert "going by the 3 manifests" in caplog.text
    assert pointer(store) == before
    save(again, 16)
    assert len(pointer(store)) == KEEP_RECOVERY


def test_a_whole_checkpoint_that_cannot_be_loaded_is_not_condemned(
    manager, store, reopened, monkeypatch
):
    """As on a machine short of memory, where torch raises a RuntimeError."""
    save(manager, 5)
    save(manager, 10)

    def short(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", short)
        with pytest.raises(StorageError, match="is whole, but torch cannot load it") as caught:
            reopened().restore()
    assert "memory" in caught.value.mend
    assert list(store.list(run.QUARANTINE)) == []
    assert reopened().restore()["iteration"] == 10


def test_a_damaged_checkpoint_is_put_aside_not_deleted(manager, store, reopened):
    for iteration in (5, 10):
        save(manager, iteration)
    bad = pointer(store)[0]
    store.write(run.checkpoint_state(bad), b"damaged")
    again = reopened()
    assert again.restore()["iteration"] == 5
    for iteration in (6, 7, 8, 9):
        save(again, iteration)
    assert bad not in pointer(store)
    assert store.read(run.checkpoint_state(bad)) == b"damaged"


# ---------------------------------------------------------------- putting aside


def test_what_was_saved_since_it_went_wrong_is_put_aside(manager, store, reopened):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    assert manager.set_aside(10, "Loss_CE has jumped") == 5
    assert reopened().restore()["iteration"] == 5
    marks = [json.loads(store.read(info.key)) for info in store.list(run.QUARANTINE)]
    assert [mark["reason"] for mark in marks] == ["Loss_CE has jumped"] * 2
    assert {run.iteration_in(mark["id"]) for mark in marks} == {10, 15}


def test_the_oldest_stays_as_there_is_nothing_else(manager, reopened):
    for iteration in (5, 10):
        save(manager, iteration)
    assert manager.set_aside(3, "x") == 5
    assert reopened().restore()["iteration"] == 5


def test_without_a_checkpoint_there_is_nothing_to_put_aside(manager):
    assert manager.set_aside(0, "x") is None


def test_a_kill_while_putting_aside_leaves_what_can_be_gone_on_with(manager, store, reopened):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    manager.set_aside(15, "x")  # it came no further
    other = reopened()
    assert other.restore()["iteration"] == 10
    assert other.set_aside(10, "x") == 5
    assert reopened().restore()["iteration"] == 5
