"""The ledger: its lines, what a rollback drops, and what a kill or a stranger's hand leaves."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job import run
from job.checkpoint.lease import Lease, acquire
from job.config import Config
from job.drill.proxy import LoseReply, Status
from job.errors import ConfigError, ExitCode, Fenced, StorageError
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor import ledger as ledger_module
from job.monitor.attempts import crash_loop
from job.monitor.health import Watch
from job.monitor.ledger import Ledger, LedgerMirror, best_of, open_run, parse_ledger, read_ledger
from job.monitor.setting import Setting
from job.storage import LocalStore, ObjectStore
from job.storage.s3 import S3Store
from tests.services import wait_until
from tests.unit.stores import Passing, open_kind

TRAIN = TrainEvent(
    iteration=500,
    loss_ce=2.47,
    loss_fm=0.037,
    loss_st=0.0,
    loss_d=0.184,
    loss_g=2.4737,
    st_count=2,
    lr_g=2.5e-4,
    lr_d=1e-4,
    images_per_s=12.5,
)
EVAL = EvalEvent(
    iteration=500,
    train_miou=0.3523,
    val_miou=0.3201,
    class_iou=(0.5, None, 0.25),
    pixel_accuracy=0.8,
    best_miou=0.3201,
    previous_best=None,
)


def opened(path: Path, *, attempt: int = 1, iteration: int = 0, evaluated: int = 0) -> Ledger:
    ledger = Ledger(path, attempt=attempt)
    ledger.rewind(iteration=iteration, evaluated_iteration=evaluated)
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def kinds(path: Path) -> list[tuple[str, int | None]]:
    return [(event["event"], event.get("iteration")) for event in read_ledger(path)]


def written(path: Path, upto: int, *, step: int = 5) -> None:
    """A first attempt: a line of losses each iteration, an evaluation each `step`."""
    ledger = opened(path)
    ledger.notice(Notice("attempt_started", "", {"resumed_at": 0}))
    for iteration in range(1, upto + 1):
        ledger.train(replace(TRAIN, iteration=iteration))
        if iteration % step == 0:
            ledger.evaluation(replace(EVAL, iteration=iteration))
    ledger.notice(Notice("attempt_ended", "", {"reason": "SIGTERM", "exit_code": 75}))
    ledger.close()


# ---------------------------------------------------------------- lines


def test_a_line_of_losses_has_the_documented_keys_in_order(path: Path) -> None:
    before = time.time()
    ledger = opened(path, attempt=3)
    ledger.train(TRAIN)
    ledger.close()
    (line,) = path.read_text().splitlines()
    event = json.loads(line)
    assert list(event) == [
        "event",
        "iteration",
        "attempt",
        "time",
        "loss_ce",
        "loss_fm",
        "loss_st",
        "loss_d",
        "loss_g",
        "st_count",
        "lr_g",
        "lr_d",
        "images_per_s",
    ]
    assert line.startswith('{"event": "train", "iteration": 500, "attempt": 3, "time": ')
    assert before - 0.01 <= event["time"] <= time.time() + 0.01
    assert event["loss_ce"] == 2.47
    assert event["st_count"] == 2
    assert event["lr_g"] == 2.5e-4


def test_an_evaluations_line_has_every_class_and_null_where_one_does_not_occur(path: Path) -> None:
    ledger = opened(path)
    ledger.evaluation(EVAL)
    ledger.close()
    (event,) = read_ledger(path)
    assert list(event)[:4] == ["event", "iteration", "attempt", "time"]
    del event["time"]
    assert event == {
        "event": "eval",
        "iteration": 500,
        "attempt": 1,
        "train_miou": 0.3523,
        "val_miou": 0.3201,
        "class_iou": [0.5, None, 0.25],
        "pixel_accuracy": 0.8,
        "best_miou": 0.3201,
        "previous_best": None,
    }
    assert '"class_iou": [0.5, null, 0.25]' in path.read_text()


def test_a_notices_line_has_its_kind_and_fields_but_not_its_sentence(path: Path) -> None:
    ledger = opened(path, attempt=2)
    ledger.notice(Notice("attempt_started", "a sentence", {"resumed_at": 7}))
    ledger.notice(Notice("unreadable_image", "", {"iteration": 9, "path": "caf\u00e9 \udce9.png"}))
    ledger.close()
    started, unreadable = read_ledger(path)
    assert set(started) == {"event", "attempt", "time", "resumed_at"}
    assert (started["event"], started["resumed_at"]) == ("attempt_started", 7)
    assert list(unreadable) == ["event", "iteration", "attempt", "time", "path"]
    assert unreadable["path"] == "caf\u00e9 \udce9.png"


def test_the_other_events_write_nothing(path: Path) -> None:
    ledger = opened(path)
    ledger.evaluation_started(500)
    ledger.step_done(500)
    ledger.close()
    assert path.read_bytes() == b""


def test_a_line_is_on_the_disk_before_training_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(path)
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_bytes()))
    ledger.train(TRAIN)
    (content,) = synced
    assert content.endswith(b"}\n")
    ledger.close()


def test_numbers_survive_to_the_last_bit(path: Path) -> None:
    ledger = opened(path)
    ledger.train(replace(TRAIN, loss_ce=0.1 + 0.2, loss_d=1e-300))
    ledger.close()
    (event,) = read_ledger(path)
    assert event["loss_ce"] == 0.1 + 0.2
    assert event["loss_d"] == 1e-300


def test_the_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "metrics.jsonl"
    opened(path).close()
    assert path.is_file()
    assert [child.name for child in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_a_storage_error_naming_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError) as caught:
            ledger.train(TRAIN)
    ledger.close()
    assert caught.value.exit_code == ExitCode.IO_ERROR == 74
    assert str(path) in caught.value.message
    assert "disk space" in caught.value.mend


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the place of the folder")
    with pytest.raises(StorageError, match="run"):
        opened(tmp_path / "run" / "metrics.jsonl")


# ---------------------------------------------------------------- attempts and rollback


def test_the_next_attempt_appends(path: Path) -> None:
    written(path, 5)
    before = path.read_bytes()
    ledger = opened(path, attempt=2, iteration=5, evaluated=5)
    assert path.read_bytes() == before
    ledger.train(replace(TRAIN, iteration=6))
    ledger.close()
    assert path.read_bytes().startswith(before)
    assert read_ledger(path)[-1]["attempt"] == 2


def test_a_rollback_drops_the_lines_of_later_iterations(path: Path) -> None:
    written(path, 12)
    opened(path, attempt=2, iteration=7, evaluated=5).close()
    assert kinds(path) == [
        ("attempt_started", None),
        *[("train", iteration) for iteration in range(1, 6)],
        ("eval", 5),
        ("train", 6),
        ("train", 7),
        ("attempt_ended", None),
    ]


def test_how_far_a_run_has_come_goes_back_with_it(path: Path) -> None:
    written(path, 20)
    ledger = opened(path, attempt=2, iteration=10, evaluated=10)
    assert ledger.reached == 10
    ledger.notice(Notice("health", "", {"iteration": 12}))
    ledger.notice(Notice("checkpoint", "", {"saved_at": 30}))
    assert ledger.reached == 12
    ledger.close()


def test_a_rollback_drops_an_evaluation_that_is_owed_again(path: Path) -> None:
    """The checkpoint of iteration 10 was saved before its evaluation."""
    written(path, 10)
    opened(path, attempt=2, iteration=10, evaluated=5).close()
    assert ("eval", 5) in kinds(path)
    assert ("eval", 10) not in kinds(path)
    assert ("train", 10) in kinds(path)


def test_a_rollback_to_the_start_keeps_the_history_of_attempts(path: Path) -> None:
    written(path, 10)
    opened(path, attempt=2).close()
    assert kinds(path) == [("attempt_started", None), ("attempt_ended", None)]


def test_a_rollback_drops_later_notices_of_an_iteration(path: Path) -> None:
    ledger = opened(path)
    for iteration in (3, 8):
        ledger.notice(Notice("unreadable_image", "", {"iteration": iteration, "path": "a.png"}))
    ledger.close()
    opened(path, attempt=2, iteration=5).close()
    assert kinds(path) == [("unreadable_image", 3)]


@settings(deadline=None, max_examples=50)
@given(upto=st.integers(0, 12), iteration=st.integers(0, 14), evaluated=st.integers(0, 14))
def test_what_a_rollback_keeps_is_kept_to_the_letter(
    tmp_path_factory: pytest.TempPathFactory, upto: int, iteration: int, evaluated: int
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "metrics.jsonl"
    head = {"attempt": 1, "time": 1e9}
    lines = [json.dumps({"event": "attempt_started", **head})]
    for i in range(1, upto + 1):
        at = {**head, "iteration": i}
        loss = {"loss_ce": 0.1 * i, "images_per_s": 1.0}
        lines.append(json.dumps({"event": "train", **at, **loss}))
        if i % 3 == 0:
            scores = {"train_miou": 0.5, "val_miou": 0.01 * i, "class_iou": [None, 0.5]}
            lines.append(json.dumps({"event": "eval", **at, **scores}))
    path.write_text("".join(f"{line}\n" for line in lines))
    opened(path, attempt=2, iteration=iteration, evaluated=evaluated).close()

    def stays(event: dict[str, Any]) -> bool:
        last = evaluated if event["event"] == "eval" else iteration
        return "iteration" not in event or event["iteration"] <= last

    kept = [line for line in lines if stays(json.loads(line))]
    assert path.read_text() == "".join(f"{line}\n" for line in kept)


def test_a_rewritten_ledger_is_on_the_disk_before_it_takes_the_old_ones_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(path, 3)
    happened: list[str] = []
    fsync, rename = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        happened.append("fsync")
        fsync(fd)

    def record_replace(source: Any, target: Any) -> None:
        happened.append("replace")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    opened(path, attempt=2, iteration=2).close()
    assert "fsync" in happened[: happened.index("replace")]


def test_a_kill_while_rewriting_leaves_the_old_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(path, 3)
    before = path.read_bytes()

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(path, attempt=2, iteration=1)
    assert path.read_bytes() == before
    opened(path, attempt=2, iteration=1).close()  # what was left over is no hindrance
    assert kinds(path)[-2:] == [("train", 1), ("attempt_ended", None)]


# ---------------------------------------------------------------- reading


def test_an_absent_ledger_has_no_lines(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "metrics.jsonl") == []


def test_an_empty_ledger_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert read_ledger(tmp_path / "metrics.jsonl") == []


def test_a_last_line_cut_anywhere_is_dropped(path: Path) -> None:
    written(path, 4)
    whole = path.read_bytes()
    events = read_ledger(path)
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert read_ledger(path) == events[:-1]


def test_a_half_written_line_is_gone_before_the_next_attempt_writes(path: Path) -> None:
    written(path, 2)
    with open(path, "ab") as file:
        file.write(b'{"event": "train", "itera')
    ledger = opened(path, attempt=2, iteration=2)
    ledger.train(replace(TRAIN, iteration=3))
    ledger.close()
    assert kinds(path)[-2:] == [("attempt_ended", None), ("train", 3)]


@pytest.mark.parametrize(
    "broken",
    [
        b'{"event": "train", "iter',
        b"",
        b"\xff\xfe",
        b"\0\0\0\0",
        b"null",
        b"[1]",
        b'{"iteration": 2}',
    ],
)
def test_a_broken_inner_line_is_a_storage_error_naming_it(path: Path, broken: bytes) -> None:
    written(path, 3)
    lines = path.read_bytes().split(b"\n")
    lines[2] = broken
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(StorageError) as caught:
        opened(path, attempt=2, iteration=3).close()
    assert caught.value.exit_code == ExitCode.IO_ERROR
    assert f"{path}: line 3 " in caught.value.message
    assert caught.value.mend


# ---------------------------------------------------------------- the ledger of a run in a bucket


class TestLedgerMirror:
    """The local file is the truth of this attempt; the bucket follows, and outlives it."""

    @pytest.fixture
    def store(self, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
        with open_kind("bucket", request) as opened:
            yield opened

    @pytest.fixture
    def take_over(
        self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[..., Lease]]:
        with contextlib.ExitStack() as stack:
            numbers = itertools.count(1)

            def start(through: ObjectStore | None = None) -> Lease:
                monkeypatch.setenv("AWS_BATCH_JOB_ID", "job")
                monkeypatch.setenv("AWS_BATCH_JOB_ATTEMPT", str(next(numbers)))
                lease = acquire(through or store, on_lost=lambda: None)
                stack.callback(lease.release)
                return lease

            yield start

    @pytest.fixture
    def mirrored(
        self, store: ObjectStore, tmp_path: Path
    ) -> Iterator[Callable[[Lease], tuple[Ledger, LedgerMirror]]]:
        """Opens the ledger of an attempt on a machine of its own."""
        with contextlib.ExitStack() as stack:

            def open_both(lease: Lease) -> tuple[Ledger, LedgerMirror]:
                local = tmp_path / f"machine{lease.attempt}" / run.LEDGER
                mirror = LedgerMirror(store, lease, local)
                stack.callback(mirror.close)
                ledger = Ledger(local, attempt=lease.attempt)
                stack.callback(ledger.close)
                return ledger, mirror

            yield open_both

    def test_the_bucket_follows_when_asked_and_at_the_end(self, store, take_over, mirrored):
        ledger, mirror = mirrored(take_over())
        ledger.train(replace(TRAIN, iteration=1))
        assert store.stat(run.LEDGER) is None
        mirror.publish()
        assert store.read(run.LEDGER) == ledger.path.read_bytes()
        ledger.train(replace(TRAIN, iteration=2))
        mirror.close()
        assert store.read(run.LEDGER) == ledger.path.read_bytes()

    def test_it_follows_by_itself(self, store, take_over, mirrored, monkeypatch):
        monkeypatch.setattr(ledger_module, "MIRROR_EVERY_S", 0.01)
        ledger, _ = mirrored(take_over())
        for iteration in (1, 2):
            ledger.train(replace(TRAIN, iteration=iteration))
            wait_until(lambda: store.read_versioned(run.LEDGER)[0] == ledger.path.read_bytes())

    def test_what_has_not_grown_is_not_written_again(self, store, take_over, mirrored):
        ledger, mirror = mirrored(take_over())
        ledger.train(TRAIN)
        mirror.publish()
        before = store.stat(run.LEDGER)
        store.delete(run.LEDGER)
        mirror.publish()
        assert store.stat(run.LEDGER) is None
        assert before is not None

    def test_half_a_line_is_not_published(self, store, take_over, mirrored):
        ledger, mirror = mirrored(take_over())
        ledger.train(TRAIN)
        whole = ledger.path.read_bytes()
        with open(ledger.path, "ab") as file:
            file.write(b'{"event": "train", "itera')
        mirror.publish()
        assert store.read(run.LEDGER) == whole

    def test_the_next_attempt_goes_on_from_the_bucket(self, store, take_over, mirrored):
        ledger, mirror = mirrored(take_over())
        for iteration in range(1, 6):
            ledger.train(replace(TRAIN, iteration=iteration))
        mirror.publish()
        ledger.train(replace(TRAIN, iteration=6))  # is lost with the machine
        second, mirror = mirrored(take_over())
        assert kinds(second.path) == [("train", iteration) for iteration in range(1, 6)]
        second.rewind(iteration=3, evaluated_iteration=0)
        second.train(replace(TRAIN, iteration=4, loss_ce=9.0))
        mirror.publish()
        published = [json.loads(line) for line in store.read(run.LEDGER).splitlines()]
        assert [line["iteration"] for line in published] == [1, 2, 3, 4]
        assert [line["attempt"] for line in published] == [1, 1, 1, 2]

    def test_a_stale_attempt_changes_nothing(self, store, take_over, mirrored, caplog):
        caplog.set_level("INFO")
        old_ledger, old = mirrored(take_over())
        old_ledger.train(replace(TRAIN, iteration=1))
        old.publish()
        ledger, mirror = mirrored(take_over())
        ledger.train(replace(TRAIN, iteration=2))
        mirror.publish()
        published = store.read(run.LEDGER)
        old_ledger.train(replace(TRAIN, iteration=3))
        with pytest.raises(Fenced):
            old.publish()
        old.close()
        assert "the ledger was not published" in caplog.text
        assert store.read(run.LEDGER) == published

    def test_a_last_word_of_a_stale_attempt_is_overridden(self, store, take_over, mirrored):
        """It had passed its check; its successor had not yet published."""
        lease = take_over()
        old_ledger, old = mirrored(lease)
        old_ledger.train(replace(TRAIN, iteration=1))
        old.publish()
        ledger, mirror = mirrored(take_over())
        old_ledger.train(replace(TRAIN, iteration=2))
        old.publish()
        ledger.train(replace(TRAIN, iteration=3))
        mirror.publish()
        assert store.read(run.LEDGER) == ledger.path.read_bytes()
        assert [event["iteration"] for event in read_ledger(ledger.path)] == [1, 3]

    def test_the_fenced_ones_thread_ends(self, take_over, mirrored, monkeypatch):
        monkeypatch.setattr(ledger_module, "MIRROR_EVERY_S", 0.01)
        old_ledger, old = mirrored(take_over())
        ledger, mirror = mirrored(take_over())
        ledger.train(TRAIN)
        mirror.publish()
        old_ledger.train(TRAIN)
        wait_until(lambda: not old._thread.is_alive())

    def test_lost_replies_are_no_strangers_writes(
        self, store, take_over, fault_proxy, monkeypatch, tmp_path
    ):
        monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda *_, **__: 0.0)
        monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
        through = S3Store(store.uri)
        path = tmp_path / "machine" / run.LEDGER
        mirror = LedgerMirror(through, take_over(through), path)
        ledger = Ledger(path, attempt=1)
        for iteration in range(1, 4):
            lost = fault_proxy.add(LoseReply(method="PUT", match=run.LEDGER))
            ledger.train(replace(TRAIN, iteration=iteration))
            mirror.publish()
            assert lost.fired == 1
            assert store.read(run.LEDGER) == path.read_bytes()
        # Not one reply gets through: an error this time, and the next time it is put right.
        lost = fault_proxy.add(LoseReply(method="PUT", match=run.LEDGER, times=None))
        ledger.train(replace(TRAIN, iteration=4))
        fault_proxy.add(Status(503, method="GET", match=run.LEDGER, times=None))
        with pytest.raises(StorageError):
            mirror.publish()
        fault_proxy.clear()
        ledger.train(replace(TRAIN, iteration=5))
        mirror.publish()
        assert store.read(run.LEDGER) == path.read_bytes()
        ledger.close()
        mirror.close()
        through.client.close()

    @pytest.mark.parametrize("error", [StorageError("down"), ConfigError("keys were revoked")])
    def test_a_storage_that_fails_ends_nothing(
        self, store, take_over, tmp_path, monkeypatch, caplog, error
    ):
        caplog.set_level("INFO")
        monkeypatch.setattr(ledger_module, "MIRROR_EVERY_S", 0.01)
        failing = Failing(store)
        lease = take_over(failing)
        mirror = LedgerMirror(failing, lease, tmp_path / run.LEDGER)
        ledger = Ledger(tmp_path / run.LEDGER, attempt=1)
        failing.error = error
        ledger.train(TRAIN)
        wait_until(lambda: caplog.text.count("ledger not published, trying again") >= 2)
        assert store.stat(run.LEDGER) is None
        failing.error = None
        wait_until(lambda: store.read_versioned(run.LEDGER)[0] == ledger.path.read_bytes())
        failing.error = error
        ledger.notice(Notice("attempt_ended", "", {"reason": "", "exit_code": 0}))
        ledger.close()
        mirror.close()
        assert not mirror._thread.is_alive()

    def test_a_line_in_a_ledger_that_is_closed_is_dropped(self, path):
        ledger = opened(path)
        ledger.close()
        ledger.notice(Notice("late", "", {}))
        assert read_ledger(path) == []


class Failing(Passing):
    """Refuses the ledger while told to."""

    error: Exception | None = None

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        if self.error is not None and key == run.LEDGER:
            raise self.error
        return self.inner.write(key, data, expected=expected)


def test_where_the_run_is_a_folder_the_ledger_grows_in_place(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    lease = acquire(store, on_lost=lambda: None)
    local = store.local_path(run.LEDGER)
    written(local, 2)
    before = local.read_bytes()
    mirror = LedgerMirror(store, lease, local)
    mirror.publish()
    mirror.close()
    assert local.read_bytes() == before
    assert not mirror._thread.is_alive()
    lease.release()


def test_that_a_finding_is_over_is_forgotten_with_the_iterations_that_showed_it(
    tmp_path: Path,
) -> None:
    """Else it would be told twice: the drill has seen it."""
    found = {"rule": "d_stuck", "iteration": 185, "since": 176}
    ledger = Ledger(tmp_path / "metrics.jsonl", attempt=1)
    ledger.notice(Notice("health", "", {**found, "ended": None}))
    ledger.notice(Notice("health", "", {**found, "ended": 196}))
    dropped = ledger.rewind(iteration=195, evaluated_iteration=0)
    ledger.close()
    assert [event["ended"] for event in dropped] == [196]
    assert [event["ended"] for event in read_ledger(tmp_path / "metrics.jsonl")] == [None]


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    scores = [math.nan, 0.4, math.inf, 0.5, 0.5, math.nan]
    events = [
        {"event": "eval", "iteration": at, "val_miou": one} for at, one in enumerate(scores, 1)
    ]
    best = best_of([{"event": "train"}, *events])
    assert best is not None
    assert best["iteration"] == 4
    assert best_of(events[:1]) is None


# ---------------------------------------------------------------- damaged numbers

HUGE = "1" + 400 * "0"
"""No float holds it, and JSON does."""
LINES: dict[str, dict[str, Any]] = {
    "attempt_started": {"gpus": 1, "nodes": 1},
    "training_started": {"resumed_at": 0},
    "origin": {"data_uri": "d", "classes": ["a"], "provenance": {}},
    "configuration_changed": {"changes": []},
    "train": {"iteration": 100, "st_count": 3, "images_per_s": 10.0}
    | dict.fromkeys(("loss_ce", "loss_fm", "loss_st", "loss_d", "lr_g", "lr_d"), 0.5),
    "eval": {"iteration": 100, "train_miou": 0.5, "val_miou": 0.5, "class_iou": [0.5, None]},
    "health": {"iteration": 100, "rule": "d_stuck", "ended": 100},
    "checkpoint": {"saved_at": 100},
    "attempt_ended": {"exit_code": 75, "reason": "SIGTERM", "reached": 100},
}
FIELDS = [(kind, name) for kind, fields in LINES.items() for name in ("attempt", "time", *fields)]


def ledger_with(kind: str, name: str, written: str) -> bytes:
    head = {"attempt": 1, "time": 1.0}
    lines = [
        {"event": each, **head, **fields} | ({name: "@"} if each == kind else {})
        for each, fields in LINES.items()
    ]
    return "".join(json.dumps(line).replace('"@"', written) + "\n" for line in lines).encode()


@pytest.mark.parametrize(("kind", "name"), FIELDS)
@pytest.mark.parametrize("written", ["1e400", HUGE, f"-{HUGE}", "NaN", f"[{HUGE}]", "[0.5, true]"])
def test_a_damaged_number_is_named_or_judged_and_no_traceback(
    kind: str, name: str, written: str
) -> None:
    events, said = read_or_told(ledger_with(kind, name, written))
    if said:
        assert said.startswith(f"L: line {1 + list(LINES).index(kind)}: {name} is ")
        assert len(said) < 120
    watch = Watch(Setting(Config(), 2))
    for event in events:
        watch.observe(event)
    json.dumps([one.to_dict() for one in watch.findings], allow_nan=False)
    assert crash_loop(events) is None


def read_or_told(content: bytes) -> tuple[list[dict[str, Any]], str]:
    try:
        return parse_ledger(content, "L"), ""
    except StorageError as error:
        return [], error.message


# ---------------------------------------------------------------- a run by its ledger


@pytest.mark.parametrize("named", ["cats", "cats/", "cats/metrics.jsonl", "metrics.jsonl"])
def test_a_run_may_be_named_by_its_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, tmp_path / "cats"):
        place.mkdir(exist_ok=True)
        (place / "metrics.jsonl").write_bytes(b"")
    store = open_run(named)
    assert store.local_path("x") == tmp_path / ("cats" if "cats" in named else "") / "x"


def test_so_may_one_in_s3(s3_env: None, bucket: str) -> None:
    named = f"s3://{bucket}/runs/cats"
    assert open_run(f"{named}/metrics.jsonl").uri == open_run(named).uri == named


def test_another_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    with pytest.raises(ConfigError, match="log: is a file, and no run") as caught:
        open_run(str(tmp_path / "log"))
    assert "s4gan diagnose FILE" in caught.value.mend
