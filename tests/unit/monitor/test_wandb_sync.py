"""A ledger replayed into one clean W&B run, by the real wandb client; and what it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from job.config import config_from_dict
from job.errors import ConfigError, ExitCode, JobError, StorageError
from job.monitor import wandb_run
from job.monitor.wandb_sync import Replayed, replay
from tests import wandb_files
from tests.series import CLASSES, lines
from tests.wandb_server import KeptRun, WandbServer

pytestmark = [
    pytest.mark.usefixtures("_wandb_leaves_folders"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

ID = "s4gan-0123"
CONFIG = config_from_dict(
    {"train": {"iterations": 1000}, "loss": {"st_start": 100}, "wandb": {"project": "p"}},
    source="test",
)
NAMES = [f"c{index}" for index in range(CLASSES)]
BEST = "best/000001000-a0001-abc/best_model.pth"

Sync = Callable[..., Replayed]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two attempts, both offline."""
    folder = tmp_path / "run"
    (folder / BEST).parent.mkdir(parents=True)
    (folder / BEST).write_bytes(b"weights")
    (folder / "config.yaml").write_text(CONFIG.to_yaml())
    identity = {"run_id": "0123", "wandb_id": ID, "created_at": "2024-01-01T00:00:00+00:00"}
    (folder / "run.json").write_text(json.dumps(identity))
    Image.new("RGB", (30, 20)).save(folder / "predictions.png")
    events = list(lines(CONFIG, loss_d=lambda _: 0.69))
    best = {"iteration": 1000, "val_miou": 0.7, "class_iou": dict.fromkeys(NAMES, 0.5)}
    summary = {
        "best": best,
        "files": {"best_model.pth": {"size": 7, "sha256": "abc"}},
        "data": {"uri": "s3://b/data"},
        "provenance": {"s4gan": "1"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    write_ledger(folder, [notice("wandb", state="offline"), *events])
    return folder


def notice(event: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, "attempt": 1, "time": 1.0, **fields}


def write_ledger(folder: Path, events: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text)


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def sync(run: Path, said: list[str]) -> Sync:
    def call(**options: Any) -> Replayed:
        chosen = {"entity": None, "project": None, "run_id": None, "offline": None} | options
        return replay(str(run), **chosen, say=said.append)

    return call


def kept_run(server: WandbServer, id_: str = ID) -> KeptRun:
    return server.runs[id_]


# ---------------------------------------------------------------- online


def test_each_iteration_is_there_once_in_order_and_the_run_is_finished(
    sync: Sync, wandb_server: WandbServer, said: list[str]
) -> None:
    made = sync()
    kept = kept_run(wandb_server)
    assert made.where == f"{wandb_server.url}/team/p/runs/{ID}"
    assert (made.run_id, made.last_iteration, made.rows) == (ID, 1000, 14)
    every = [at for at, _ in kept.series("Training Loss/Cross Entropy")]
    assert every == list(range(100, 1001, 100))
    assert [at for at, _ in kept.series("Metrics/Validation mIoU")] == [500, 1000]
    assert [at for at, _ in kept.series("Health/Phase")] == [500, 1000]
    assert [at for at, _ in kept.series("IoU/c3")] == [500, 1000]
    assert (kept.complete, kept.exit_code, kept.preempting) == (True, 0, False)
    assert kept.config["train"]["value"]["iterations"] == 1000
    assert kept.config["data_uri"]["value"] == "s3://b/data"
    assert kept.config["provenance"]["value"] == {"s4gan": "1"}
    assert kept.commit is None  # that of what sends it is another one
    assert kept.summary["Metrics/Validation mIoU"]["max"] == max(
        value for _, value in kept.series("Metrics/Validation mIoU")
    )
    assert kept.history[0]["_timestamp"] == 100
    assert kept.series("Best Model/Predictions")
    assert kept.series("Best Model/IoU of each class")
    assert wandb_server.alerts == []  # it is no news any more
    ((_, table),) = kept.series("Health/Findings")
    assert json.loads(kept.files[table["path"]])["data"][0][0] == "d_stuck"
    assert said == []


@pytest.mark.parametrize("how", ["none", "reference", "upload"])
def test_the_model_goes_along_as_configured(
    sync: Sync, run: Path, wandb_server: WandbServer, how: str
) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("artifact: reference", f"artifact: {how}"))
    sync()
    models = [one for one in wandb_server.artifacts.values() if one.type == "model"]
    assert len(models) == (0 if how == "none" else 1)
    for kept in models:
        assert kept.metadata["sha256"] == "abc"
        entry = kept.manifest["contents"]["best_model.pth"]
        if how == "upload":
            assert kept.contents == {"best_model.pth": b"weights"}
        else:
            assert entry["ref"] == (run / BEST).as_uri()


def test_entity_project_and_id_can_be_said(sync: Sync, wandb_server: WandbServer) -> None:
    made = sync(entity="others", project="q", run_id="mine")
    assert made.where == f"{wandb_server.url}/others/q/runs/mine"
    assert list(wandb_server.runs) == ["mine"]


def test_a_run_that_is_there_is_never_added_to(sync: Sync, wandb_server: WandbServer) -> None:
    sync()
    before = len(kept_run(wandb_server).lines)
    with pytest.raises(ConfigError, match=f"has a run {ID} already") as caught:
        sync()
    assert f"--id {ID}-replay" in caught.value.mend
    assert len(kept_run(wandb_server).lines) == before
    sync(run_id=f"{ID}-replay")
    with pytest.raises(ConfigError, match="already") as caught:
        sync(run_id=f"{ID}-replay")
    assert f"--id {ID}-replay-2" in caught.value.mend


def test_the_id_of_a_deleted_run_is_explained(sync: Sync, wandb_server: WandbServer) -> None:
    wandb_server.deleted.add(ID)
    with pytest.raises(ConfigError, match="was deleted") as caught:
        sync()
    assert f"--id {ID}-replay" in caught.value.mend


@pytest.mark.parametrize(
    ("last", "code", "preempting"),
    [
        (notice("attempt_ended", exit_code=75, reason="SIGTERM"), 75, True),
        (notice("attempt_ended", exit_code=70, reason="diverged"), 70, False),
        (notice("attempt_started") | {"attempt": 2}, 1, False),
        (notice("attempt_ended", exit_code=0, reason="finished"), 1, False),
    ],
    ids=["preempted", "diverged", "killed", "unfinished again"],
)
def test_an_unfinished_run_is_shown_as_it_ended(
    sync: Sync,
    run: Path,
    wandb_server: WandbServer,
    last: dict[str, Any],
    code: int,
    *,
    preempting: bool,
) -> None:
    (run / "summary.json").unlink()
    (run / "predictions.png").unlink()
    first = notice("attempt_ended", exit_code=75, reason="SIGTERM")
    told = notice(
        "origin", data_uri="s3://b/other", classes=NAMES, provenance={"s4gan": "2", "git": "beef"}
    )
    write_ledger(run, [told, *read_ledger(run), first, last])
    sync()
    kept = kept_run(wandb_server)
    assert (kept.exit_code, kept.preempting) == (code, preempting)
    assert kept.config["data_uri"]["value"] == "s3://b/other"
    assert kept.config["provenance"]["value"] == {"s4gan": "2", "git": "beef"}
    assert kept.commit == "beef"
    assert kept.series("IoU/c3")
    assert [one for one in wandb_server.artifacts.values() if one.type == "model"] == []
    assert kept.series("Best Model/Predictions") == []


def test_a_repeated_line_of_a_ledger_is_sent_once(
    sync: Sync, run: Path, wandb_server: WandbServer
) -> None:
    events = read_ledger(run)
    write_ledger(run, [*events, *events[-4:]])
    sync()
    every = [at for at, _ in kept_run(wandb_server).series("Training Loss/Cross Entropy")]
    assert every == list(range(100, 1001, 100))


# ---------------------------------------------------------------- offline


def offline_rows(folder: Path) -> list[dict[str, Any]]:
    give_up_at = time.monotonic() + 10
    while wandb_files.exit_code(folder) is None and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert wandb_files.exit_code(folder) == 0
    return wandb_files.history(folder)


def test_offline_files_have_each_iteration_once_under_the_runs_own_id(
    sync: Sync, tmp_path: Path
) -> None:
    made = sync(offline=tmp_path / "new" / "files")
    folder = Path(made.where)
    assert folder.parent == tmp_path / "new" / "files" / "wandb"
    rows = offline_rows(folder)
    every = [row["iteration"] for row in rows if "Training Loss/Cross Entropy" in row]
    assert every == list(range(100, 1001, 100))
    assert made.run_id == ID


@pytest.mark.parametrize("state", ["online", None])
def test_what_w_and_b_may_have_already_gets_an_id_of_its_own_offline(
    sync: Sync, run: Path, tmp_path: Path, state: str | None
) -> None:
    """`wandb sync` asks nobody before it adds to a run."""
    events = read_ledger(run)[1:]
    write_ledger(run, [*([notice("wandb", state=state)] if state else []), *events])
    assert sync(offline=tmp_path).run_id == f"{ID}-replay"
    assert sync(offline=tmp_path, run_id="mine").run_id == "mine"


def test_a_folder_takes_the_files_of_one_id_once(sync: Sync, tmp_path: Path) -> None:
    """`wandb sync` would add the second to the first."""
    made = sync(offline=tmp_path)
    with pytest.raises(ConfigError, match=f"has been made of W&B run {ID} already") as caught:
        sync(offline=tmp_path)
    assert made.where in caught.value.message
    assert f"--id {ID}-replay" in caught.value.mend
    assert sync(offline=tmp_path, run_id=f"{ID}-replay").run_id == f"{ID}-replay"


def test_a_run_may_be_named_by_its_ledger(run: Path, tmp_path: Path, said: list[str]) -> None:
    options: Any = {"entity": None, "project": None, "run_id": None, "offline": tmp_path / "files"}
    assert replay(f"{run}/metrics.jsonl", **options, say=said.append).run_id == ID


# ---------------------------------------------------------------- what goes wrong


def test_without_a_key_it_says_what_to_do(
    sync: Sync, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    with pytest.raises(ConfigError, match="no key") as caught:
        sync()
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    assert "WANDB_API_KEY" in caught.value.mend
    assert "--offline" in caught.value.mend


def test_a_server_that_is_not_there_is_said(
    sync: Sync, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 2)
    with pytest.raises(StorageError, match="not reachable") as caught:
        sync()
    assert "--offline" in caught.value.mend


@pytest.mark.parametrize("what", ["log_class_table", "log_targets", "log_findings", "log_model"])
def test_what_the_curves_do_not_depend_on_may_fail(
    sync: Sync,
    wandb_server: WandbServer,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(wandb_run, what, fail)
    sync()
    assert kept_run(wandb_server).exit_code == 0
    (line,) = said
    assert line.endswith("could not be sent (no room)")


def test_a_send_that_fails_is_no_success(
    sync: Sync, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("still uploading")

    monkeypatch.setattr(wandb.Run, "finish", fail)
    with pytest.raises(StorageError, match="not everything was sent"):
        sync()


def test_a_model_that_is_gone_is_said_and_the_rest_sent(
    sync: Sync, run: Path, wandb_server: WandbServer, said: list[str]
) -> None:
    (run / BEST).unlink()
    sync()
    assert kept_run(wandb_server).exit_code == 0
    assert "no model of iteration 1000" in said[0]


@pytest.mark.parametrize(
    ("last", "says", "mend"),
    [
        (notice("attempt_started"), "nothing has been trained yet", "wait for its first line"),
        (
            notice("attempt_ended", exit_code=78, reason="no images"),
            r"ended with an error: no images \(exit code 78\)",
            "mend that",
        ),
        (
            notice("attempt_ended", exit_code=75, reason="SIGTERM"),
            "before the last attempt ended: SIGTERM",
            "run the same s4gan train again",
        ),
    ],
    ids=["begun", "failed", "interrupted"],
)
def test_of_a_run_without_a_line_it_says_why(
    sync: Sync, run: Path, tmp_path: Path, last: dict[str, Any], says: str, mend: str
) -> None:
    write_ledger(run, [notice("attempt_started"), last])
    (run / "config.yaml").unlink()  # it may have failed before there was one
    with pytest.raises(ConfigError, match=says) as caught:
        sync(offline=tmp_path)
    assert caught.value.mend.startswith(mend)


@pytest.mark.parametrize("key", ["metrics.jsonl", "config.yaml", "run.json"])
def test_a_folder_that_is_no_run_is_named(sync: Sync, run: Path, tmp_path: Path, key: str) -> None:
    (run / key).unlink()
    with pytest.raises(ConfigError, match=f"there is no {key}"):
        sync(offline=tmp_path)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("metrics.jsonl", "no json\n"),
        ("metrics.jsonl", ""),
        ("config.yaml", "train: {iterations: none}"),
        ("config.yaml", "\x00: ["),
        ("run.json", "{}"),
        ("summary.json", "["),
        ("summary.json", "[]"),
    ],
)
def test_a_broken_file_is_an_error_of_ours(
    sync: Sync, run: Path, tmp_path: Path, key: str, text: str
) -> None:
    (run / key).write_text(text)
    with pytest.raises(JobError):
        sync(offline=tmp_path)


def test_an_id_that_w_and_b_does_not_take_is_said(sync: Sync, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a/b") as caught:
        sync(offline=tmp_path, run_id="a/b")
    assert "--id" in caught.value.mend


def test_a_file_in_place_of_the_folder_is_said(sync: Sync, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        sync(offline=tmp_path / "file" / "sub")


@pytest.mark.parametrize(
    "fields",
    [
        {"data_uri": 3, "classes": [], "provenance": {}},
        {"data_uri": "", "classes": "abc", "provenance": {}},
        {"data_uri": "", "classes": [], "provenance": []},
        {},
    ],
)
def test_an_origin_that_was_changed_by_hand_is_named(
    sync: Sync, run: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    write_ledger(run, [notice("origin", **fields), *read_ledger(run)])
    with pytest.raises(StorageError, match="line 1"):
        sync(offline=tmp_path)
