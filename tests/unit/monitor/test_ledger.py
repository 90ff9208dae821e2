"""The ledger: its lines, what a rollback drops, and what a kill or a stranger's hand leaves."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.errors import ExitCode, StorageError
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor.ledger import Ledger, read_ledger

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
    ledger.notice(Notice("attempt_ended", "", {"reason": "SIGTERM", "saved_at": upto}))
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
    lines = [json.dumps({"event": "attempt_started", "attempt": 1})]
    for i in range(1, upto + 1):
        lines.append(json.dumps({"event": "train", "iteration": i, "loss_ce": 0.1 * i}))
        if i % 3 == 0:
            lines.append(json.dumps({"event": "eval", "iteration": i, "class_iou": [None, 0.5]}))
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
