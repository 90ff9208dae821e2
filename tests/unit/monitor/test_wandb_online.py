"""The real wandb client against a server of ours: one run, whatever happens to its attempts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb

from job.config import config_from_dict
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor import wandb_run, wandb_tracker
from job.monitor.guide import PHASES
from job.monitor.health import Finding, Standing
from job.monitor.pictures import Example
from job.monitor.wandb_run import ModelFile, RunFacts
from job.monitor.wandb_tracker import WandbTracker
from job.revision import revision
from job.run import RunIdentity
from tests import wandb_files
from tests.wandb_server import WandbServer

pytestmark = [
    pytest.mark.usefixtures("_wandb_leaves_folders"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

ID = "s4gan-0123"
IDENTITY = RunIdentity(run_id="0123", wandb_id=ID, created_at="2024-01-01T00:00:00+00:00")
CLASSES = ("sky", "road")
TRAIN = TrainEvent(0, 2.5, 0.02, 1.5, 0.2, 4.0, 2, 2.5e-4, 1e-4, 12.5)
EVAL = EvalEvent(0, 0.75, 0.5, (0.5, None), 0.8, 0.5, None)


@pytest.fixture
def server(wandb_server: WandbServer) -> WandbServer:
    return wandb_server


class Attempt:
    """An attempt's mirror, with the ledger of the run up to it."""

    def __init__(self, folder: Path, before: list[dict[str, Any]], **settings: Any) -> None:
        self.told: list[Notice] = []
        self.ledger = before
        config = config_from_dict({"train": {"iterations": 1000}, "wandb": settings}, source="test")
        facts = RunFacts("s3://b/runs/x", "s3://b/data", CLASSES, {"s4gan": "1", "git": "abc"})
        self.tracker = WandbTracker(
            config, IDENTITY, folder, self.told.append, facts=facts, before=before
        )

    def train(self, *iterations: int) -> None:
        for iteration in iterations:
            event = replace(TRAIN, iteration=iteration)
            self.tracker.train(event)
            self.ledger.append(_line("train", event))

    def evaluate(self, *iterations: int) -> None:
        for iteration in iterations:
            event = replace(EVAL, iteration=iteration)
            self.tracker.evaluation(event)
            self.ledger.append(_line("eval", event))

    def end(self, exit_code: int = 0) -> Attempt:
        self.tracker.close(exit_code=exit_code, preempted=exit_code == 75)
        wandb.teardown()  # the next attempt is another process
        return self

    @property
    def states(self) -> list[str]:
        return [notice.fields["state"] for notice in self.told]


def _line(kind: str, event: TrainEvent | EvalEvent) -> dict[str, Any]:
    fields = asdict(event)
    return {"event": kind, "attempt": 1, "time": 1.7e9 + event.iteration, **fields}


@pytest.fixture
def attempt(tmp_path: Path, server: WandbServer) -> Callable[..., Attempt]:
    def begin(before: list[dict[str, Any]] | None = None, **settings: Any) -> Attempt:
        return Attempt(tmp_path, [] if before is None else before, **settings)

    return begin


def example(size: int = 40) -> Example:
    image = np.zeros((size, size * 2, 3), np.uint8)
    mask = np.zeros((size, size * 2), np.uint8)
    mask[: size // 2] = 1
    mask[0] = 255
    return Example("val_1", image, mask, mask)


def iterations(server: WandbServer, key: str = "Training Loss/Cross Entropy") -> list[int]:
    return [at for at, _ in server.runs[ID].series(key)]


# ---------------------------------------------------------------- attempts


def test_a_run_has_its_configuration_origin_and_address(
    attempt: Callable[..., Attempt],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("S4GAN_GIT_SHA", "abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-indeed")
    ours = attempt(tags=["a"])
    ours.train(100)
    ours.end()
    kept = server.runs[ID]
    assert kept.config["train"]["value"]["iterations"] == 1000
    assert kept.config["provenance"]["value"] == {"s4gan": "1", "git": "abc"}
    assert kept.config["data_uri"]["value"] == "s3://b/data"
    assert kept.commit == "abc"
    assert kept.tags == ["a"]
    assert (kept.complete, kept.exit_code) == (True, 0)
    (told,) = ours.told
    assert told.kind == "wandb"
    assert told.fields["url"] == ours.tracker.url == f"{server.url}/team/s4gan/runs/{ID}"
    everything = [repr(vars(kept)).encode(), *kept.files.values()]
    assert not any(b"very-secret-indeed" in text for text in everything)


def test_the_commit_is_the_programs_and_not_that_of_the_folder_it_is_started_in(
    attempt: Callable[..., Attempt],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.chdir(tmp_path)
    attempt().end()
    ours = revision()
    assert server.runs[ID].commit == (ours.commit if ours else None)
    wandb.teardown()

    monkeypatch.setattr("job.revision.checkout", lambda: None)
    server.runs.clear()
    attempt().end()
    assert server.runs[ID].commit == "abc"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_diff_is_sent_to_those_who_have_asked_for_it(
    attempt: Callable[..., Attempt],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    wanted: bool,
) -> None:
    checkout = tmp_path / "checkout"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(checkout)]
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    (checkout / "file").write_text("before\n")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    (checkout / "file").write_text("after\n")
    monkeypatch.setattr("job.revision.checkout", lambda: checkout)
    if wanted:
        monkeypatch.setenv("WANDB_SAVE_CODE", "true")
    attempt().end()
    assert ("diff.patch" in server.runs[ID].files) is wanted


def test_what_is_rolled_back_and_trained_again_is_not_doubled(
    attempt: Callable[..., Attempt], server: WandbServer
) -> None:
    first = attempt()
    first.train(100, 200, 300)
    first.evaluate(300)
    first.end(exit_code=75)
    assert server.runs[ID].preempting
    kept = [line for line in first.ledger if line["iteration"] <= 100]
    second = attempt(kept)
    second.train(200, 300)
    second.evaluate(300)
    second.train(400)
    second.end()
    assert iterations(server) == [100, 200, 300, 400]
    assert iterations(server, "Metrics/Validation mIoU") == [300]


def test_what_was_lost_on_the_way_is_made_up_for(
    attempt: Callable[..., Attempt], server: WandbServer
) -> None:
    first = attempt()
    first.train(100, 200)
    first.end(exit_code=75)
    # Of the next attempt W&B got losses and no scores, and then it was killed.
    ledger = [*first.ledger, _line("train", replace(TRAIN, iteration=300))]
    ledger += [_line("eval", replace(EVAL, iteration=at)) for at in (100, 200, 300)]
    ledger.sort(key=lambda line: line["iteration"])
    third = attempt(ledger)
    third.train(400)
    third.end()
    assert iterations(server) == [100, 200, 300, 400]
    assert iterations(server, "Metrics/Validation mIoU") == [100, 200, 300]
    assert iterations(server, "Health/Phase") == [100, 200, 300]
    late = [row for row in server.runs[ID].history if row["iteration"] == 300]
    assert late[0]["_timestamp"] == 1.7e9 + 300


def test_an_attempt_online_sends_what_those_offline_had_trained(
    attempt: Callable[..., Attempt], server: WandbServer
) -> None:
    first = attempt(mode="offline")
    first.train(100, 200)
    first.end(exit_code=75)
    assert server.runs == {}
    assert first.states == ["offline"]
    second = attempt(first.ledger)
    second.train(300)
    second.end()
    assert iterations(server) == [100, 200, 300]


def test_a_killed_process_leaves_no_gap_and_nothing_twice(
    attempt: Callable[..., Attempt], server: WandbServer, tmp_path: Path
) -> None:
    """SIGKILL: whatever of it had arrived, the next attempt sends the rest."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.unit.monitor.test_wandb_online import Attempt\n"
        "ours = Attempt(Path(sys.argv[1]), [])\n"
        "for iteration in range(1, 41): ours.train(iteration)\n"
        "print('trained', flush=True)\n"
        "time.sleep(600)\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "first")],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"},
    )
    assert killed.stdout is not None
    killed.stdout.readline()
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at and not (ID in server.runs and server.runs[ID].lines):
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert iterations(server)
    ledger = [_line("train", replace(TRAIN, iteration=at)) for at in range(1, 31)]
    second = attempt(ledger)
    second.train(*range(31, 51))
    second.end()
    assert iterations(server) == list(range(1, 51))


# ---------------------------------------------------------------- pictures, tables, the model


def test_a_new_best_model_is_shown_with_masks_class_table_and_targets(
    attempt: Callable[..., Attempt], server: WandbServer
) -> None:
    ours = attempt()
    ours.train(100)
    ours.tracker.pictures(100, [example(), example()])
    ours.evaluate(100)
    ours.end()
    kept = server.runs[ID]
    ((at, pictures),) = kept.series("Best Model/Predictions")
    assert (at, pictures["count"], pictures["captions"]) == (100, 2, ["val_1", "val_1"])
    assert [set(masks) for masks in pictures["all_masks"]] == [{"prediction", "truth"}] * 2
    assert pictures["format"] == "jpg"
    assert all(name in kept.files for name in pictures["filenames"])
    labels = kept.config["_wandb"]["value"]["mask/class_labels"]
    (of_truth,) = [one for key, one in labels.items() if key.endswith("truth")]
    assert of_truth["value"] == {"0": "sky", "1": "road", "255": "ignored"}
    ((_, table),) = kept.series("Best Model/IoU of each class")
    content = wandb_json(kept.files[table["path"]])
    assert content["columns"] == ["class", "IoU", "iteration"]
    assert content["data"] == [["sky", 0.5, 100], ["road", None, 100]]
    charts = kept.config["_wandb"]["value"]["visualize"]
    assert "Targets/Cross Entropy" in charts
    assert "Targets/Validation mIoU" in charts
    assert kept.summary["best/iteration"] == 100
    assert kept.summary["Metrics/Validation mIoU"] == {"max": 0.5}
    assert kept.series("IoU/sky") == [(100, 0.5)]
    assert kept.series("IoU/road") == []


def wandb_json(content: bytes) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(content)
    return found


def test_pictures_are_wanted_at_first_and_after_each_tenth_of_the_run(
    attempt: Callable[..., Attempt],
) -> None:
    ours = attempt(mode="offline")
    asked = []
    for iteration in range(10, 301, 10):
        if ours.tracker.wants_pictures(iteration):
            ours.tracker.pictures(iteration, [])
            asked.append(iteration)
    ours.end()
    assert asked == [10, 110, 210]
    assert not attempt(mode="disabled").tracker.wants_pictures(10)


def test_large_pictures_are_made_small_with_whole_classes() -> None:
    small = wandb_run.shrunk(example(1000))
    assert small.image.shape == (256, 512, 3)
    assert small.truth.shape == small.prediction.shape == (256, 512)
    assert set(np.unique(small.truth)) <= {0, 1, 255}
    assert wandb_run.shrunk(example(40)).image.shape == (40, 80, 3)


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    path = tmp_path / "best_model.pth"
    path.write_bytes(b"weights" * 100)
    return ModelFile("s3://b/runs/x/best/1/best_model.pth", path, "abc", 100, 0.5)


@pytest.mark.parametrize("how", ["none", "reference", "upload"])
def test_the_model_is_an_artifact_as_configured(
    attempt: Callable[..., Attempt],
    server: WandbServer,
    model: ModelFile,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)  # where it is sent from may have no right to S3
    ours = attempt(model_artifact=how)
    ours.train(100)
    ours.evaluate(100)
    ours.tracker.ended(1000, [example()], model)
    ours.end()
    assert ours.states == ["online"]
    models = [one for one in server.artifacts.values() if one.type == "model"]
    if how == "none":
        assert models == []
        return
    (kept,) = models
    assert kept.committed
    assert kept.name == f"{ID}-best_model"
    assert "best" in kept.aliases
    assert kept.metadata == {
        "val_miou": 0.5,
        "iteration": 100,
        "sha256": "abc",
        "uri": model.uri,
        "data_uri": "s3://b/data",
    }
    entry = kept.manifest["contents"]["best_model.pth"]
    if how == "reference":
        assert entry["ref"] == model.uri
        assert kept.contents == {}
    else:
        assert kept.contents == {"best_model.pth": b"weights" * 100}


def test_a_model_in_a_folder_is_referred_to_by_its_path(
    attempt: Callable[..., Attempt], server: WandbServer, model: ModelFile
) -> None:
    ours = attempt()
    ours.tracker.ended(1000, [example()], replace(model, uri=str(model.path)))
    ours.end()
    (kept,) = (one for one in server.artifacts.values() if one.type == "model")
    assert model.path is not None
    assert kept.manifest["contents"]["best_model.pth"]["ref"] == model.path.as_uri()


def test_a_finished_run_that_ends_again_is_shown_once(
    attempt: Callable[..., Attempt], server: WandbServer, model: ModelFile
) -> None:
    ledger: list[dict[str, Any]] = []
    for _ in range(2):
        ours = attempt(ledger)
        ours.train(*() if ledger else (1000,))
        ours.tracker.ended(1000, [example()], model)
        ours.end()
    assert len(server.runs[ID].series("Best Model/Predictions")) == 1
    assert iterations(server) == [1000]


def finding() -> Finding:
    return Finding("d_stuck", "problem", 100, 50, 0.7, "it stays", ("--learning-rate-D 1",))


def test_a_finding_is_an_alert(attempt: Callable[..., Attempt], server: WandbServer) -> None:
    ours = attempt()
    ours.tracker.finding(finding())
    ours.tracker.standing(Standing(100, PHASES[0], 1, ()), 1)
    ours.end()
    (alert,) = server.alerts
    assert (alert["title"], alert["severity"]) == ("d_stuck", "ERROR")
    assert alert["text"] == "it stays\nSince iteration 50. To try:\n--learning-rate-D 1"
    assert server.runs[ID].series("Health/Open Findings") == [(100, 1)]


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("what", ["log_pictures", "log_class_table", "log_targets", "log_model"])
def test_what_cannot_be_sent_is_said_and_the_curves_go_on(
    attempt: Callable[..., Attempt],
    server: WandbServer,
    model: ModelFile,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room\nmore")

    monkeypatch.setattr(wandb_run, what, fail)
    ours = attempt()
    ours.train(100)
    ours.tracker.pictures(100, [example()])
    ours.evaluate(100)
    ours.tracker.ended(1000, [example()], model)
    ours.train(200)
    ours.end()
    assert set(ours.states) == {"online", "not_sent"}
    assert all("(no room)" in one.message for one in ours.told[1:])
    assert iterations(server) == [100, 200]
    assert ours.tracker.finished_online


def test_a_server_without_artifacts_still_gets_the_curves(
    attempt: Callable[..., Attempt], server: WandbServer, model: ModelFile
) -> None:
    server.refuse = {"CreateArtifact"}
    ours = attempt(model_artifact="upload")
    ours.train(100)
    ours.evaluate(100)
    ours.tracker.ended(1000, [example()], model)
    ours.train(200)
    ours.end()
    assert "not_sent" in ours.states
    assert iterations(server) == [100, 200]
    assert server.runs[ID].series("Best Model/Predictions")


def test_an_upload_that_does_not_end_ends_with_its_time(
    attempt: Callable[..., Attempt],
    model: ModelFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Endless:
        def wait(self, timeout: float) -> None:
            time.sleep(timeout)
            raise TimeoutError("still uploading")

    monkeypatch.setattr(wandb_tracker, "UPLOAD_TIMEOUT_S", 1)
    monkeypatch.setattr(wandb_run, "log_model", lambda *_: Endless())
    ours = attempt(model_artifact="upload")
    ours.tracker.ended(1000, [example()], model)
    ours.end()
    assert ours.told[-1].message.endswith(
        "the upload of the model could not be sent (still uploading)"
    )
    assert ours.tracker.finished_online


# ---------------------------------------------------------------- offline


def test_offline_files_hold_pictures_tables_and_the_reference(
    attempt: Callable[..., Attempt], model: ModelFile, tmp_path: Path
) -> None:
    ours = attempt(mode="offline")
    ours.train(100)
    ours.tracker.pictures(100, [example()])
    ours.evaluate(100)
    ours.tracker.ended(1000, [example()], model)
    ours.end()
    assert ours.states == ["offline"]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    give_up_at = time.monotonic() + 10
    while wandb_files.exit_code(folder) is None and time.monotonic() < give_up_at:
        time.sleep(0.05)
    rows = wandb_files.history(folder)
    assert [row["iteration"] for row in rows if "Training Loss/Cross Entropy" in row] == [100]
    assert len([row for row in rows if "Best Model/Predictions" in row]) == 2
    artifacts = [r.artifact for r in wandb_files.records(folder) if r.HasField("artifact")]
    assert [one.name for one in artifacts if one.type == "model"] == [f"{ID}-best_model"]
    assert wandb_files.exit_code(folder) == 0
