"""A run that is trained, killed and gone on with, and what becomes of it in W&B."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.storage.s3 import S3Store
from tests.conftest import CLASSES
from tests.integration.conftest import assert_same_result, command
from tests.services import BUCKET

LOSSES = "Training Loss/Cross Entropy"
SCORES = "Metrics/Validation mIoU"

pytestmark = [
    pytest.mark.usefixtures("_wandb_leaves_folders"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]


def ledger(text: bytes) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def of_kind(events: list[dict], kind: str) -> list[int]:
    return [event["iteration"] for event in events if event["event"] == kind]


def trained_in_two_attempts(start, arguments: list[str]) -> None:
    first = start(arguments)
    first.wait_for_iteration(20)
    first.kill()
    assert start(arguments).finish() == 0


def test_an_interrupted_run_is_one_run_online(make_data, tmp_path, start, wandb_server):
    """Losses and scores of each iteration once, though some were trained twice."""
    run = tmp_path / "run"
    trained_in_two_attempts(start, command(make_data(), run, wandb__mode="online"))
    identity = json.loads((run / "run.json").read_text())
    kept = wandb_server.runs[identity["wandb_id"]]
    events = ledger((run / "metrics.jsonl").read_bytes())
    assert [at for at, _ in kept.series(LOSSES)] == of_kind(events, "train")
    assert [at for at, _ in kept.series(SCORES)] == of_kind(events, "eval")
    values = [event["loss_ce"] for event in events if event["event"] == "train"]
    assert [value for _, value in kept.series(LOSSES)] == pytest.approx(values)
    assert (kept.complete, kept.exit_code) == (True, 0)

    shown = kept.series("Best Model/Predictions")
    assert shown[-1][0] == of_kind(events, "eval")[-1]
    assert set(shown[-1][1]["all_masks"][0]) == {"prediction", "truth"}
    (model,) = (one for one in wandb_server.artifacts.values() if one.type == "model")
    best = Path(model.metadata["uri"])
    assert best.read_bytes() == (run / "best_model.pth").read_bytes()
    url = f"{wandb_server.url}/team/s4gan/runs/{identity['wandb_id']}"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["run"]["wandb_url"] == url
    assert url in [event.get("url") for event in events if event["event"] == "wandb"]
    (data,) = {tuple(event["classes"]) for event in events if event["event"] == "origin"}
    assert data == CLASSES


def test_a_run_that_was_offline_is_sent_as_one(make_data, tmp_path, start, s4gan, wandb_server):
    data, run, twin = make_data(), tmp_path / "run", tmp_path / "twin"
    trained_in_two_attempts(start, command(data, run, wandb__mode="offline"))
    assert start(command(data, twin)).finish() == 0
    assert_same_result(run, twin, 40)  # pictures are made without a trace in the training
    assert wandb_server.runs == {}
    result = s4gan(["wandb-sync", run])
    assert result.code == 0, result.err
    (kept,) = wandb_server.runs.values()
    events = ledger((run / "metrics.jsonl").read_bytes())
    assert [at for at, _ in kept.series(LOSSES)] == of_kind(events, "train")
    assert kept.series(f"IoU/{CLASSES[1]}")
    assert result.out.splitlines()[-1].endswith(f"/team/s4gan/runs/{kept.name}")

    again = s4gan(["wandb-sync", run])
    assert again.code == 78
    assert "already" in again.err
    assert f"--id {kept.name}-replay" in again.err


@pytest.mark.usefixtures("s3_env")
def test_a_run_in_s3_is_referred_to_where_it_is(make_data, start, s4gan, wandb_server):
    uri = f"s3://{BUCKET}/runs/synced"
    assert start(command(make_data(), uri, wandb__mode="offline")).finish() == 0
    result = s4gan(["wandb-sync", uri])
    assert result.code == 0, result.err
    (model,) = (one for one in wandb_server.artifacts.values() if one.type == "model")
    reference = model.manifest["contents"]["best_model.pth"]["ref"]
    assert reference.startswith(f"{uri}/best/")
    store = S3Store(uri)
    assert store.stat(reference.removeprefix(f"{uri}/")) is not None
    assert (
        f"s4gan wandb-sync {uri}"
        in json.loads(store.read("summary.json"))["checklist"][-1]["detail"]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no metrics.jsonl"),
        (["nowhere", "--id", ""], "--id is empty"),
        (["nowhere", "--project", " "], "--project is empty"),
        (["nowhere", "--offline", "s3://bucket/x"], "must be a local folder"),
    ],
)
def test_wrong_arguments_are_named(s4gan, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = s4gan(["wandb-sync", *arguments])
    assert result.code == 78
    assert said in result.err
    assert "mend" in result.err
