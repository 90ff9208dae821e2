"""The guide's closing checklist at its edges, and what `summary.json` holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

import job
from job.config import Config
from job.monitor.guide import MAX_GAP
from job.monitor.summary import Check, checklist, provenance, summary, summary_json
from job.monitor.verdict import verdict
from job.run import RunIdentity

IDENTITY = RunIdentity("0123", "s4gan-0123", "2024-01-01T00:00:00+00:00")


def evaluated(
    iteration: int, *, train: float = 0.5, val: float = 0.5, attempt: int = 1
) -> dict[str, Any]:
    return {
        "event": "eval",
        "iteration": iteration,
        "attempt": attempt,
        "time": 1.0,
        "train_miou": train,
        "val_miou": val,
        "class_iou": [val, None],
        "pixel_accuracy": 0.9,
        "best_miou": val,
        "previous_best": None,
    }


def checked(events: list[dict[str, Any]], **changes: Any) -> dict[str, Check]:
    """The lines of a checklist by their first words."""
    arguments = {
        "best_path": "runs/a/best_model.pth",
        "best_verified": True,
        "finished": True,
        "wandb_finished": True,
        "wandb_outcome": "https://wandb.example/r",
    } | changes
    lines = checklist(events=events, **arguments)
    keys = ("best", "file", "errors", "gap", "wandb")
    return dict(zip(keys, lines, strict=True))


def summed_up(events: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    arguments = {
        "run_uri": "runs/a",
        "data_uri": "data/b",
        "identity": IDENTITY,
        "config": {"train": {"seed": 3}},
        "classes": ("sky", "road"),
        "num_images": {"labeled": 2, "unlabeled": 3, "validation": 1},
        "files": {"best_model.pth": {"sha256": "ab", "size": 5}},
        "events": events,
        "checks": [Check("a", True, "b")],
        "health": verdict(events, Config(), 2),
        "iterations": 500,
        "stopped": "",
        "wandb_url": "https://wandb.example/r",
    } | changes
    return summary(**arguments)


# ---------------------------------------------------------------- checklist


def test_a_good_run_passes_the_guides_five_lines() -> None:
    lines = checked([evaluated(500, train=0.7, val=0.62)])
    assert [line.name for line in lines.values()] == [
        "Best validation mIoU recorded",
        "best_model.pth exists and verifies",
        "Training completed without errors",
        "Final train/val gap < 0.15",
        "W&B run finished successfully",
    ]
    assert all(line.passed for line in lines.values())
    assert lines["best"].detail == "0.6200 at iteration 500"
    assert lines["file"].detail == "runs/a/best_model.pth"
    assert lines["errors"].detail == ""
    assert lines["gap"].detail == "0.0800"
    assert lines["wandb"].detail == "https://wandb.example/r"


@pytest.mark.parametrize("trained", [True, False])
def test_an_attempt_that_did_not_come_to_train_is_no_error_of_the_training(trained: bool) -> None:
    head: dict[str, Any] = {"attempt": 2, "time": 2.0}
    begun = [{"event": "training_started", **head, "resumed_at": 500}] if trained else []
    lines = checked(
        [
            evaluated(500),
            {"event": "attempt_started", **head},
            *begun,
            {"event": "attempt_ended", **head, "exit_code": 78, "reason": "x: no such folder"},
        ]
    )
    assert lines["errors"].passed != trained
    assert ("x: no such folder" in lines["errors"].detail) == trained


@pytest.mark.parametrize(
    ("train", "val", "passes"),
    [
        (0.15, 0.0, False),
        (0.1499, 0.0, True),
        (0.9, 0.5, False),
        (0.5, 0.6, True),
        (0.5, 0.5, True),
    ],
)
def test_the_gap_must_be_below_its_limit(train: float, val: float, *, passes: bool) -> None:
    gap = checked([evaluated(500, train=train, val=val)])["gap"]
    assert gap.passed is passes
    assert gap.detail == f"{train - val:.4f}"
    assert MAX_GAP == 0.15


def test_the_gap_is_the_last_evaluations_not_the_best_ones() -> None:
    events = [evaluated(500, train=0.7, val=0.7), evaluated(1000, train=0.9, val=0.6)]
    assert not checked(events)["gap"].passed
    assert checked(events[::-1])["gap"].passed


def test_the_best_is_the_first_of_the_highest() -> None:
    events = [evaluated(1, val=0.3), evaluated(2, val=0.6), evaluated(3, val=0.6)]
    assert checked(events)["best"].detail == "0.6000 at iteration 2"
    assert summed_up(events)["best"]["iteration"] == 2


def test_without_an_evaluation_best_and_gap_fail() -> None:
    lines = checked([{"event": "attempt_started", "attempt": 1, "resumed_at": 0}])
    for key in ("best", "gap"):
        assert not lines[key].passed
        assert lines[key].detail == "no evaluation"


def test_a_best_of_zero_counts_as_recorded() -> None:
    assert checked([evaluated(500, train=0.0, val=0.0)])["best"].passed


def test_a_best_model_that_did_not_verify_fails() -> None:
    assert not checked([evaluated(500)], best_verified=False)["file"].passed


def test_a_run_that_was_rolled_back_was_not_without_errors() -> None:
    line = checked([{"event": "rolled_back", "attempt": 1}, evaluated(500)])["errors"]
    assert not line.passed
    assert line.detail == "it diverged, and was rolled back 1 times"


def ended(exit_code: int, reason: str) -> dict[str, Any]:
    return {"event": "attempt_ended", "attempt": 1, "exit_code": exit_code, "reason": reason}


def test_attempts_that_failed_are_errors_also_of_a_run_that_finished() -> None:
    preempted, diverged = ended(75, "stopped by SIGTERM"), ended(70, "training diverged: NaN")
    assert checked([evaluated(500), preempted, ended(0, "finished")])["errors"].passed
    line = checked([evaluated(500), diverged, ended(0, "finished")])["errors"]
    assert not line.passed
    assert line.detail == "an attempt ended with an error: training diverged: NaN"
    line = checked([diverged, ended(74, "no space"), evaluated(500)])["errors"]
    assert line.detail == "2 attempts ended with an error: no space"


def test_a_run_that_goes_on_has_not_completed() -> None:
    line = checked([evaluated(500)], finished=False)["errors"]
    assert not line.passed
    assert line.detail == "it has not finished"


def test_images_that_could_not_be_decoded_are_errors_and_counted() -> None:
    unreadable = {"event": "unreadable_image", "iteration": 3, "attempt": 1, "path": "a.png"}
    line = checked([unreadable, evaluated(500), unreadable])["errors"]
    assert not line.passed
    assert line.detail == "2 images could not be decoded"


def test_an_unfinished_mirror_fails_with_how_it_ended() -> None:
    line = checked([evaluated(500)], wandb_finished=False, wandb_outcome="offline; upload")["wandb"]
    assert not line.passed
    assert line.detail == "offline; upload"


# ---------------------------------------------------------------- summary.json


def test_the_summary_holds_best_final_files_data_and_configuration() -> None:
    events = [
        {"event": "attempt_started", "attempt": 1, "time": 0.0, "resumed_at": 0},
        evaluated(500, train=0.75, val=0.625),
        evaluated(1000, train=0.875, val=0.5, attempt=3),
    ]
    content = summed_up(events)
    assert content["run"] == {
        "uri": "runs/a",
        "run_id": "0123",
        "created_at": "2024-01-01T00:00:00+00:00",
        "attempts": 3,
        "iterations": 500,
        "stopped_early": None,
        "wandb_url": "https://wandb.example/r",
    }
    assert content["best"] == {
        "iteration": 500,
        "val_miou": 0.625,
        "train_miou": 0.75,
        "pixel_accuracy": 0.9,
        "class_iou": {"sky": 0.625, "road": None},
    }
    assert content["final"] == {"iteration": 1000, "val_miou": 0.5, "train_miou": 0.875}
    assert content["files"] == {"best_model.pth": {"sha256": "ab", "size": 5}}
    assert content["data"] == {
        "uri": "data/b",
        "images": {"labeled": 2, "unlabeled": 3, "validation": 1},
    }
    assert content["checklist"] == [asdict(Check("a", True, "b"))]
    assert content["config"] == {"train": {"seed": 3}}


def test_without_an_evaluation_best_and_final_are_empty() -> None:
    content = summed_up([])
    assert content["best"] is None
    assert content["final"] is None
    assert content["run"]["attempts"] == 0


def test_classes_of_another_number_than_measured_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        summed_up([evaluated(500)], classes=("sky", "road", "car"))


def test_the_verdict_is_in_it() -> None:
    losses = {"loss_ce": 1.0, "loss_fm": 0.01, "loss_st": 0.0, "st_count": 0}
    stuck = [
        {"event": "train", "attempt": 1, "iteration": iteration, "loss_d": 0.693, **losses}
        for iteration in range(100, 3_000, 100)
    ]
    health = summed_up([*stuck, evaluated(3_000)])["health"]
    assert not health["healthy"]
    assert "d_stuck" in {finding["rule"] for finding in health["findings"]}
    assert summed_up([evaluated(500)])["health"]["healthy"]


def test_the_text_is_json_that_reads_back_the_same() -> None:
    content = summed_up([evaluated(500)], run_uri="caf\u00e9 \udce9")
    assert json.loads(summary_json(content)) == content


def test_numbers_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        summary_json({"val_miou": float("nan")})


def test_provenance_names_versions_and_machine() -> None:
    facts = provenance()
    assert facts["s4gan"] == job.__version__
    assert facts["torch"] == torch.__version__
    assert set(facts) == {"s4gan", "git", "python", "torch", "torchvision", "device"}
    json.dumps(facts)


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance()["git"] is None
