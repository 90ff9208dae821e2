"""`summary.json`: the guide's closing checklist filled in, and where everything came from."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchvision

import job
from job.monitor.divergence import ROLLED_BACK
from job.monitor.guide import MAX_GAP
from job.monitor.ledger import best_of
from job.monitor.verdict import ERRORS, Verdict
from job.revision import git
from job.run import RunIdentity

BEST_VERIFIES = "best_model.pth exists and verifies"
COMPLETED = "Training completed without errors"
"""Names of lines of the checklist."""


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    name: str
    passed: bool
    detail: str


def checklist(
    *,
    events: Sequence[Mapping[str, Any]],
    best_path: str,
    best_verified: bool,
    finished: bool,
    wandb_finished: bool,
    wandb_outcome: str,
) -> list[Check]:
    """The guide's five lines, from the ledger and from what was just verified.

    Args:
        events: the ledger.
        best_path: where `best_model.pth` is.
        best_verified: whether it was read back and is what was written.
        finished: whether training is over.
        wandb_finished: whether W&B has everything.
        wandb_outcome: how the mirror ended.
    """
    evaluations = [event for event in events if event["event"] == "eval"]
    best = best_of(events)
    last = evaluations[-1] if evaluations else None
    gap = last["train_miou"] - last["val_miou"] if last else None
    unreadable = sum(event["event"] == "unreadable_image" for event in events)
    given_up = [event["of_iteration"] for event in events if event["event"] == "save_given_up"]
    rollbacks = sum(event["event"] == ROLLED_BACK for event in events)
    errors = [f"{unreadable} images could not be decoded"] if unreadable else []
    if not finished:
        errors.append("it has not finished")
    # What did not come to train, as it was mistyped, is no error of a training that has finished.
    mistyped = _attempts(events, "attempt_started") - _attempts(events, "training_started")
    failed = [
        event
        for event in events
        if event["event"] == "attempt_ended"
        and event["exit_code"] in ERRORS
        and not (finished and event.get("attempt") in mistyped)
    ]
    if failed:
        count = f"{len(failed)} attempts" if len(failed) > 1 else "an attempt"
        errors.append(f"{count} ended with an error: {failed[-1]['reason']}")
    if rollbacks:
        errors.append(f"it diverged, and was rolled back {rollbacks} times")
    if given_up:
        errors.append(f"no checkpoint of iterations {', '.join(map(str, given_up))}")
    return [
        Check(
            "Best validation mIoU recorded",
            best is not None,
            f"{best['val_miou']:.4f} at iteration {best['iteration']}" if best else "no evaluation",
        ),
        Check(BEST_VERIFIES, best_verified, best_path),
        Check(
            COMPLETED,
            not errors,
            "; ".join(errors),
        ),
        Check(
            f"Final train/val gap < {MAX_GAP}",
            gap is not None and gap < MAX_GAP,
            f"{gap:.4f}" if gap is not None else "no evaluation",
        ),
        Check("W&B run finished successfully", wandb_finished, wandb_outcome),
    ]


def _attempts(events: Sequence[Mapping[str, Any]], kind: str) -> set[int]:
    return {event["attempt"] for event in events if event["event"] == kind}


def summary(
    *,
    run_uri: str,
    data_uri: str,
    identity: RunIdentity,
    config: Mapping[str, Any],
    classes: Sequence[str],
    num_images: Mapping[str, int],
    files: Mapping[str, Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    checks: Sequence[Check],
    health: Verdict,
    iterations: int,
    stopped: str,
    wandb_url: str | None,
) -> dict[str, Any]:
    """Content of `summary.json`."""
    evaluations = [event for event in events if event["event"] == "eval"]
    best = best_of(events)
    return {
        "run": {
            "uri": run_uri,
            "run_id": identity.run_id,
            "created_at": identity.created_at,
            "attempts": max((event["attempt"] for event in events), default=0),
            "iterations": iterations,
            "stopped_early": stopped or None,
            "wandb_url": wandb_url,
        },
        "best": {
            "iteration": best["iteration"],
            "val_miou": best["val_miou"],
            "train_miou": best["train_miou"],
            "pixel_accuracy": best["pixel_accuracy"],
            "class_iou": dict(zip(classes, best["class_iou"], strict=True)),
        }
        if best
        else None,
        "final": {key: evaluations[-1][key] for key in ("iteration", "val_miou", "train_miou")}
        if evaluations
        else None,
        "files": dict(files),
        "checklist": [asdict(check) for check in checks],
        "health": health.to_dict(),
        "data": {"uri": data_uri, "images": dict(num_images)},
        "provenance": provenance(),
        "config": dict(config),
    }


def provenance() -> dict[str, Any]:
    """Versions and machine: what one needs to know to do it again."""
    return {
        "s4gan": job.__version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def summary_json(content: Mapping[str, Any]) -> bytes:
    """The text of the file."""
    return json.dumps(content, indent=1, allow_nan=False).encode()


def _git_revision() -> str | None:
    """Revision the image was built from, or of the checkout the program runs from."""
    if revision := os.environ.get("S4GAN_GIT_SHA"):
        return revision
    said = git("describe", "--always", "--dirty", "--abbrev=12") or b""
    return said.decode().strip() or None
