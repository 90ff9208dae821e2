"""Pulled artifacts are what the run has written down, or they are not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from job.drill.proxy import Hold
from job.errors import ConfigError, ExitCode, Preempted, StorageError
from job.run import RunIdentity
from job.storage.large import JOURNAL
from job.storage.pull import pull, records_of, table
from job.storage.units import part_of
from tests.unit.storage.conftest import Remote, tree

CHUNK_BYTES = 2**20
BEST = os.urandom(30_000)
FINAL = os.urandom(20_000)
STATE = os.urandom(40_000)
BEST_ID = "000000200-a0001-abcdef"
STATE_ID = "000000400-a0001-123456"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("units", "large"):
        monkeypatch.setattr(f"job.storage.{module}.CHUNK_BYTES", CHUNK_BYTES)


def record(data: bytes) -> dict[str, object]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def objects_of_run(*, finished: bool = True) -> dict[str, bytes]:
    best = {"files": {"best_model.pth": record(BEST)}}
    state = {
        "files": {"state.pth": record(STATE)},
        "keys": [f"checkpoints/{STATE_ID}/state.pth", "checkpoint_400.pth"],
    }
    run = {
        "config.yaml": b"train: {}",
        "run.json": b"{}",
        "metrics.jsonl": b"{}\n",
        "lease.json": b"{}",
        "best_model.pth": BEST,
        f"best/{BEST_ID}/best_model.pth": BEST,
        f"best/{BEST_ID}/manifest.json": json.dumps(best).encode(),
        f"checkpoints/{STATE_ID}/state.pth": STATE,
        f"checkpoints/{STATE_ID}/manifest.json": json.dumps(state).encode(),
        "checkpoint_200.pth": b"older",
        "checkpoint_400.pth": STATE,
    }
    if finished:
        files = {"best_model.pth": record(BEST), "final_model.pth": record(FINAL)}
        run |= {
            "final_model.pth": FINAL,
            "summary.json": json.dumps({"files": files}).encode(),
        }
    return run


NAMES = {
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "summary.json",
    "best_model.pth",
    "final_model.pth",
    "checkpoint_400.pth",
}


def test_the_artifacts_come_verified(remote: Remote, tmp_path: Path) -> None:
    run = objects_of_run()
    remote.put_all(run, "runs/one/")
    result = pull(remote.uri("runs/one"), tmp_path / "here")

    assert tree(tmp_path / "here") == {name: run[name] for name in NAMES}
    verified = {file.name: file.verified for file in result.files}
    assert {verified[n] for n in NAMES if n.endswith(".pth")} == {"sha256"}
    assert verified["config.yaml"] == "crc32"
    assert result.finished
    assert "best_model.pth" in table(result)
    (tmp_path / "here" / "best_model.pth").write_bytes(b"can be written to")


def test_what_is_there_and_right_is_not_fetched_again(remote: Remote, tmp_path: Path) -> None:
    remote.put_all(objects_of_run(), "runs/one/")
    pull(remote.uri("runs/one"), tmp_path)
    (tmp_path / "final_model.pth").write_bytes(bytes(len(FINAL)))
    remote.proxy.forget()
    result = pull(remote.uri("runs/one"), tmp_path)

    assert result.fetched == 1
    assert tree(tmp_path)["final_model.pth"] == FINAL
    assert [key for key in remote.keys_read if key.endswith(".pth")] == ["runs/one/final_model.pth"]


def test_all_is_everything_but_the_lease(remote: Remote, tmp_path: Path) -> None:
    run = objects_of_run()
    remote.put_all(run, "runs/one/")
    pull(remote.uri("runs/one"), tmp_path, everything=True)
    del run["lease.json"]
    assert tree(tmp_path) == run


def test_a_run_in_a_folder_is_copied(tmp_path: Path) -> None:
    run = objects_of_run(finished=False)
    for name, data in run.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    result = pull(str(tmp_path / "run"), tmp_path / "here")

    names = NAMES - {"summary.json", "final_model.pth"}
    assert tree(tmp_path / "here") == {name: run[name] for name in names}
    assert not result.finished
    assert "has not finished" in table(result)


def test_a_replaced_model_is_refused(remote: Remote, tmp_path: Path) -> None:
    run = objects_of_run() | {"best_model.pth": bytes(len(BEST))}
    remote.put_all(run, "runs/one/")
    with pytest.raises(StorageError, match=r"best_model\.pth is not the file") as caught:
        pull(remote.uri("runs/one"), tmp_path)
    assert caught.value.exit_code is ExitCode.IO_ERROR
    assert f"best/{BEST_ID}/best_model.pth" in caught.value.mend
    assert tree(tmp_path).keys() == NAMES - {"best_model.pth"}  # the others are good


def test_a_replaced_model_takes_no_good_ones_place(remote: Remote, tmp_path: Path) -> None:
    remote.put_all(objects_of_run(), "runs/one/")
    pull(remote.uri("runs/one"), tmp_path)
    remote.put("runs/one/best_model.pth", bytes(len(BEST)))
    (tmp_path / "best_model.pth").unlink()
    with pytest.raises(StorageError, match="is not the file"):
        pull(remote.uri("runs/one"), tmp_path)
    assert "best_model.pth" not in tree(tmp_path)


def test_a_pull_goes_on_where_it_was_interrupted(remote: Remote, tmp_path: Path) -> None:
    large = os.urandom(3 * CHUNK_BYTES + 5)
    remote.put_all({"config.yaml": b"c"}, "runs/one/")
    remote.put("runs/one/best_model.pth", large)
    # The last range waits; when all others are there we are stopped.
    held = remote.proxy.add(Hold(method="GET", match="best_model", skip=3, times=None))
    part = part_of(tmp_path / ".pull" / "best_model.pth", JOURNAL)

    def three_are_there() -> bool:
        return part.exists() and len(part.read_text().splitlines()) == 4

    with pytest.raises(Preempted):
        pull(remote.uri("runs/one"), tmp_path, stopped=three_are_there)
    assert "best_model.pth" not in tree(tmp_path)
    held.release()
    remote.proxy.forget()

    pull(remote.uri("runs/one"), tmp_path)
    assert tree(tmp_path) == {"config.yaml": b"c", "best_model.pth": large}
    assert len([get for get in remote.gets if "best_model" in get.path]) == 1


def test_a_file_replaced_while_it_comes_is_begun_anew(remote: Remote, tmp_path: Path) -> None:
    remote.put_all({"config.yaml": b"c"}, "runs/one/")
    remote.put("runs/one/best_model.pth", os.urandom(2 * CHUNK_BYTES))
    held = remote.proxy.add(Hold(method="GET", match="best_model", skip=1, times=None))
    thread = threading.Thread(target=pull, args=(remote.uri("runs/one"), tmp_path))
    thread.start()
    assert held.reached.wait(30)
    newer = os.urandom(2 * CHUNK_BYTES)
    remote.put("runs/one/best_model.pth", newer)
    held.release()
    thread.join(60)
    assert tree(tmp_path)["best_model.pth"] == newer


@pytest.mark.parametrize("there", [{}, {"thesis.txt": b"x"}])
def test_a_missing_run_is_named(remote: Remote, tmp_path: Path, there: dict[str, bytes]) -> None:
    remote.put_all(there, "runs/one/")
    with pytest.raises(ConfigError, match="runs/one: there is no run"):
        pull(remote.uri("runs/one"), tmp_path)
    with pytest.raises(ConfigError, match="there is no run"):
        pull(str(tmp_path / "nowhere"), tmp_path / "here")


def test_the_summary_decides_between_best_models() -> None:
    manifests = {
        f"best/{index}/manifest.json": {"files": {"best_model.pth": record(data)}}
        for index, data in enumerate((b"a", b"b"))
    }
    running = records_of(manifests)
    ended = records_of({**manifests, "summary.json": {"files": {"best_model.pth": record(b"b")}}})
    assert len(running["best_model.pth"]) == 2
    assert ended["best_model.pth"] == running["best/1/best_model.pth"]


def test_what_an_interrupted_pull_has_brought_needs_no_room_again(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = os.urandom(8 * CHUNK_BYTES)
    remote.put_all({"config.yaml": b"c"}, "runs/one/")
    remote.put("runs/one/best_model.pth", large)
    held = remote.proxy.add(Hold(method="GET", match="best_model", skip=6, times=None))
    part = part_of(tmp_path / ".pull" / "best_model.pth", JOURNAL)
    with pytest.raises(Preempted):
        pull(
            remote.uri("runs/one"),
            tmp_path,
            stopped=lambda: part.exists() and len(part.read_text().splitlines()) == 7,
        )
    held.release()
    usage = shutil.disk_usage(tmp_path)._replace(free=4 * CHUNK_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    pull(remote.uri("runs/one"), tmp_path)
    assert (tmp_path / "best_model.pth").read_bytes() == large


def test_a_folder_with_another_run_is_refused(remote: Remote, tmp_path: Path) -> None:
    ours = RunIdentity.create("2026-01-01")
    remote.put_all(objects_of_run() | {"run.json": ours.to_json()}, "runs/one/")
    (tmp_path / "run.json").write_bytes(RunIdentity.create("2026-01-02").to_json())
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="holds the files of another run"):
        pull(remote.uri("runs/one"), tmp_path)
    assert tree(tmp_path) == before
    (tmp_path / "run.json").write_bytes(ours.to_json())
    pull(remote.uri("runs/one"), tmp_path)


def test_of_two_pulls_into_one_folder_one_is_refused(remote: Remote, tmp_path: Path) -> None:
    remote.put_all(objects_of_run(), "runs/one/")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match="another pull is writing there"):
        pull(remote.uri("runs/one"), tmp_path)
    os.close(descriptor)
    pull(remote.uri("runs/one"), tmp_path)


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b'{"files": 1}', b'{"files": {"best_model.pth": 5}}']
)
def test_a_summary_of_another_shape_says_nothing(
    remote: Remote, tmp_path: Path, text: bytes
) -> None:
    remote.put_all(objects_of_run() | {"summary.json": text}, "runs/one/")
    files = pull(remote.uri("runs/one"), tmp_path).files
    assert {file.name for file in files} == NAMES
