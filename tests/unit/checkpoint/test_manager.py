"""Checkpoints exist whole or not at all, whatever stage of a publish is the last one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from job import run
from job.checkpoint.lease import Lease, acquire
from job.checkpoint.manager import KEEP_RECOVERY, BestModel, CheckpointManager
from job.errors import Fenced, StorageError
from job.storage import LocalStore


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class MortalStore(LocalStore):
    """A store that dies before its n-th change."""

    def __init__(self, root: Path, changes_left: int) -> None:
        super().__init__(root)
        self.changes_left = changes_left

    def _change(self) -> None:
        if self.changes_left == 0:
            raise Killed
        self.changes_left -= 1

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        if key != run.LEASE:
            self._change()
        return super().write(key, data, expected=expected)

    def upload(self, path: Path, key: str) -> None:
        self._change()
        super().upload(path, key)

    def delete(self, key: str) -> None:
        self._change()
        super().delete(key)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def lease(store: LocalStore) -> Iterator[Lease]:
    held = acquire(store, on_lost=lambda: None)
    yield held
    held.release()


@pytest.fixture
def manager(store: LocalStore, lease: Lease, tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(store, lease, tmp_path / "scratch")


def state(iteration: int) -> dict[str, object]:
    return {"iteration": iteration, "weights": torch.full((50,), float(iteration)), "best": None}


def save(manager: CheckpointManager, iteration: int, *, numbered: bool = False) -> None:
    manager.save(state(iteration), best=None, numbered=numbered)


def save_best(manager: CheckpointManager, iteration: int) -> BestModel:
    files = {
        name: {"weights": torch.full((5,), float(iteration))}
        for name in (run.BEST_MODEL, run.BEST_MODEL_D)
    }
    best = manager.new_best(iteration, iteration / 100)
    manager.save_best(best, files)
    return best


def reopened(store: LocalStore, lease: Lease, tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(LocalStore(store.root), lease, tmp_path / "scratch2")


def iteration_in(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["iteration"])


def test_no_checkpoint_yet(manager):
    assert manager.restore() is None


def test_the_newest_is_restored(manager, store, lease, tmp_path):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    restored = reopened(store, lease, tmp_path).restore()
    assert restored["iteration"] == 15
    assert torch.equal(restored["weights"], state(15)["weights"])


def test_plain_names_follow(manager, store):
    save(manager, 5, numbered=True)
    save(manager, 7)
    assert iteration_in(store.root / "latest_checkpoint.pth") == 7
    assert iteration_in(store.root / "checkpoint_5.pth") == 5


def test_recovery_checkpoints_are_pruned_and_numbered_ones_stay(manager, store, lease, tmp_path):
    for iteration in range(1, 11):
        save(manager, iteration, numbered=iteration % 4 == 0)
    with_data = sorted(
        iteration_in(path) for path in (store.root / "checkpoints").rglob("state.pth")
    )
    assert with_data == [8, 9, 10]
    assert len(with_data) == KEEP_RECOVERY
    assert iteration_in(store.root / "checkpoint_4.pth") == 4
    # The ladder still reaches it, through its plain name.
    for path in list((store.root / "checkpoints").rglob("state.pth")):
        path.unlink()
    (store.root / "checkpoint_8.pth").unlink()
    assert reopened(store, lease, tmp_path).restore()["iteration"] == 4


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "0 bytes"),
        (lambda data: data[: len(data) // 2], "bytes with sha256"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "sha256"),
        (None, "data is missing"),
    ],
    ids=["empty", "truncated", "bit flipped", "missing"],
)
def test_a_damaged_checkpoint_is_quarantined_and_never_tried_again(
    manager, store, lease, tmp_path, damage, reason, caplog
):
    save(manager, 5)
    save(manager, 10)
    newest = json.loads(store.read(run.LATEST_POINTER))["checkpoints"][0]
    path = store.root / run.checkpoint_state(newest)
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))

    assert reopened(store, lease, tmp_path).restore()["iteration"] == 5
    mark = json.loads(store.read(run.quarantine_mark(newest)))
    assert reason in mark["reason"]
    assert newest in caplog.text
    caplog.clear()
    path.write_bytes(data)  # good again, but it has been condemned
    again = reopened(store, lease, tmp_path)
    assert again.restore()["iteration"] == 5
    assert caplog.text == ""
    save(again, 6)
    assert reopened(store, lease, tmp_path).restore()["iteration"] == 6


def test_a_missing_or_broken_manifest_is_damage(manager, store, lease, tmp_path):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    ids = json.loads(store.read(run.LATEST_POINTER))["checkpoints"]
    (store.root / run.checkpoint_manifest(ids[0])).unlink()
    (store.root / run.checkpoint_manifest(ids[1])).write_text("{}")
    assert reopened(store, lease, tmp_path).restore()["iteration"] == 5


def test_nothing_readable_is_an_error_not_a_fresh_start(manager, store, lease, tmp_path):
    save(manager, 5)
    for path in (store.root / "checkpoints").rglob("state.pth"):
        path.unlink()
    with pytest.raises(StorageError, match="none of its 1 checkpoints") as caught:
        reopened(store, lease, tmp_path).restore()
    assert "another --run" in caught.value.mend


def test_a_checkpoint_of_a_later_format_is_not_quarantined(manager, store, lease, tmp_path):
    save(manager, 5)
    id_ = json.loads(store.read(run.LATEST_POINTER))["checkpoints"][0]
    manifest = json.loads(store.read(run.checkpoint_manifest(id_)))
    store.write(run.checkpoint_manifest(id_), json.dumps({**manifest, "format": 99}).encode())
    with pytest.raises(StorageError, match="format 99"):
        reopened(store, lease, tmp_path).restore()
    assert list(store.list(run.QUARANTINE)) == []


def test_a_kill_at_every_stage_of_a_save_leaves_a_good_checkpoint(tmp_path):
    """Every change to the store, one after the other, is the last one."""
    stages = 0
    while True:
        folder = tmp_path / f"stage{stages}"
        plain = LocalStore(folder)
        held = acquire(plain, on_lost=lambda: None)
        first = CheckpointManager(plain, held, folder / "scratch")
        for iteration in (1, 2, 3, 4):
            best = save_best(first, iteration)
            first.save(state(iteration), best=best, numbered=iteration == 2)
        mortal = MortalStore(folder, stages)
        second = CheckpointManager(mortal, held, folder / "scratch")
        try:
            best = save_best(second, 6)
            second.save(state(6), best=best, numbered=True)
            completed = True
        except Killed:
            completed = False
        restored = CheckpointManager(LocalStore(folder), held, folder / "scratch").restore()
        assert restored is not None
        assert restored["iteration"] in ((6,) if completed else (4, 6))
        assert torch.equal(restored["weights"], state(restored["iteration"])["weights"])
        assert iteration_in(folder / "latest_checkpoint.pth") == restored["iteration"]
        # The next save tidies up what the killed one left.
        third = CheckpointManager(LocalStore(folder), held, folder / "scratch")
        third.restore()
        third.save(state(7), best=best, numbered=False)
        folders = {path.parent.name for path in (folder / "checkpoints").rglob("*.pth")}
        assert len(folders) == KEEP_RECOVERY
        held.release()
        if completed:
            break
        stages += 1
    assert stages >= 8, "the test has lost its grip on the store's changes"


def test_a_stale_attempt_cannot_publish(manager, store, lease, tmp_path):
    save(manager, 5)
    pointer = store.read(run.LATEST_POINTER)
    raw = json.loads(store.read(run.LEASE))
    store.write(run.LEASE, json.dumps({**raw, "attempt": 2}).encode())
    with pytest.raises(Fenced):
        save(manager, 10)
    with pytest.raises(Fenced):
        save_best(manager, 10)
    with pytest.raises(Fenced):
        manager.save_file({"a": 1}, run.FINAL_MODEL)
    with pytest.raises(Fenced):
        reopened(store, lease, tmp_path).restore()
    assert store.read(run.LATEST_POINTER) == pointer
    assert iteration_in(store.root / run.LATEST_CHECKPOINT) == 5
    assert not (store.root / run.BEST_MODEL).exists()


def test_the_holder_of_the_lease_overrides_a_pointer_written_by_a_stale_attempt(manager, store):
    save(manager, 5)
    store.write(run.LATEST_POINTER, b'{"checkpoints": [], "attempt": 0}')
    save(manager, 10)
    assert iteration_in(store.root / "latest_checkpoint.pth") == 10
    assert len(json.loads(store.read(run.LATEST_POINTER))["checkpoints"]) == 2


def test_after_a_fallback_the_future_is_forgotten(manager, store, lease, tmp_path):
    for iteration in (5, 10, 15):
        save(manager, iteration)
    ids = json.loads(store.read(run.LATEST_POINTER))["checkpoints"]
    (store.root / run.checkpoint_state(ids[0])).unlink()
    again = reopened(store, lease, tmp_path)
    assert again.restore()["iteration"] == 10
    save(again, 12)
    kept = json.loads(store.read(run.LATEST_POINTER))["checkpoints"]
    assert ids[0] not in kept
    assert kept[1:] == ids[1:]


def test_best_models_are_kept_as_long_as_a_checkpoint_refers_to_them(manager, store):
    first = save_best(manager, 10)
    manager.save(state(10), best=first, numbered=False)
    second = save_best(manager, 20)
    manager.save(state(20), best=second, numbered=False)
    assert {p.name for p in (store.root / "best").iterdir()} == {first.id, second.id}
    for iteration in (21, 22, 23):
        manager.save(state(iteration), best=second, numbered=False)
    assert {p.name for p in (store.root / "best").iterdir()} == {second.id}
    manager.point_best(second)
    assert manager.verify_best(second) == store.root / run.BEST_MODEL


def test_a_rolled_back_best_model_is_pointed_to_again(manager, store):
    first = save_best(manager, 10)
    save_best(manager, 20)
    manager.point_best(first)
    weights = torch.load(store.root / run.BEST_MODEL, weights_only=True)["weights"]
    assert weights[0] == 10


def test_a_best_model_that_was_changed_does_not_verify(manager, store):
    best = save_best(manager, 10)
    # The plain names are mended from the model's own files ...
    (store.root / run.BEST_MODEL_D).unlink()
    store.write(run.BEST_MODEL, b"other")
    assert manager.verify_best(best) == store.root / run.BEST_MODEL
    assert torch.load(store.root / run.BEST_MODEL, weights_only=True)["weights"][0] == 10
    # ... which have to be what was written.
    store.write(run.best_file(best.id, run.BEST_MODEL_D), b"other")
    store.write(run.BEST_MODEL_D, b"other")
    with pytest.raises(StorageError, match="not the file that was written"):
        manager.verify_best(best)


def test_best_model_records_survive_a_checkpoint(manager):
    best = save_best(manager, 10)
    assert BestModel.from_dict(json.loads(json.dumps(best.to_dict()))) == best


def test_a_full_disk_is_an_error_with_a_mend_and_the_old_checkpoint_stays(
    manager, store, lease, tmp_path, monkeypatch
):
    save(manager, 5)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="file write failed") as caught:
        save(manager, 10)
    assert "disk space" in caught.value.mend
    assert reopened(store, lease, tmp_path).restore()["iteration"] == 5


def test_equal_states_are_equal_files(manager, store):
    save(manager, 5)
    first = (store.root / "latest_checkpoint.pth").read_bytes()
    manager.save(state(5), best=None, numbered=False)
    assert (store.root / "latest_checkpoint.pth").read_bytes() == first
