"""A run's identity and the key of every object this program reads or writes in it.

The run URI is a folder or a bucket prefix; keys are relative to it, with `/` between parts. The
plain names at the top are the monitoring guide's own and what a user looks for; the longer ones
below `checkpoints/` and `best/` are what makes publishing atomic (see `job.checkpoint.manager`).
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass

CONFIG = "config.yaml"
IDENTITY = "run.json"
SPLITS = "splits.json"
LEASE = "lease.json"
LEDGER = "metrics.jsonl"
BEST_MODEL = "best_model.pth"
BEST_MODEL_D = "best_model_D.pth"
LATEST_CHECKPOINT = "latest_checkpoint.pth"
FINAL_MODEL = "final_model.pth"
PREDICTIONS = "predictions.png"
BEST_EVALUATION = "best_evaluation.json"
REPORT = "report.html"
SUMMARY = "summary.json"

JOBS = "jobs/"
POINTS = "points.json"
CLAIM = "jobs/claim.json"
CHECKPOINTS = "checkpoints/"
LATEST_POINTER = "checkpoints/latest.json"
QUARANTINE = "checkpoints/quarantine/"
BEST = "best/"
WEIGHTS = "weights/"
"""Of pretrained networks, put there by the user for machines without a network."""


def numbered_checkpoint(iteration: int) -> str:
    """Plain name of the checkpoint kept for good at this iteration."""
    return f"checkpoint_{iteration}.pth"


def unique_id(iteration: int, attempt: int) -> str:
    """A name no other save will ever use; sorts by iteration, then attempt."""
    return f"{iteration:09d}-a{attempt:04d}-{secrets.token_hex(3)}"


def attempt_in(unique_id: str) -> int:
    """The attempt that made a `unique_id`.

    Raises:
        ValueError: not one of ours.
    """
    return int(unique_id.split("-")[1].removeprefix("a"))


def iteration_in(unique_id: str) -> int:
    """The iteration of a `unique_id`.

    Raises:
        ValueError: not one of ours.
    """
    return int(unique_id.split("-")[0])


def job_config(submission: str) -> str:
    """Key of the configuration that a job was submitted with; never written again."""
    return f"{JOBS}{submission}/{CONFIG}"


def job_record(submission: str) -> str:
    """Key of what was submitted, and as which job."""
    return f"{JOBS}{submission}/job.json"


def checkpoint_state(checkpoint_id: str) -> str:
    """Key of a checkpoint's data."""
    return f"{CHECKPOINTS}{checkpoint_id}/state.pth"


def checkpoint_manifest(checkpoint_id: str) -> str:
    """Key of the manifest that makes a checkpoint exist."""
    return f"{CHECKPOINTS}{checkpoint_id}/manifest.json"


def quarantine_mark(checkpoint_id: str) -> str:
    """Key of the note why a checkpoint is never tried again."""
    return f"{QUARANTINE}{checkpoint_id}.json"


def best_manifest(best_id: str) -> str:
    """Key of the sizes and hashes of a best model's files."""
    return f"{BEST}{best_id}/manifest.json"


def best_file(best_id: str, name: str) -> str:
    """Key of one of the files of a best model."""
    return f"{BEST}{best_id}/{name}"


@dataclass(frozen=True)
class RunIdentity:
    """What stays the same over all attempts of a run."""

    run_id: str
    """Random, chosen when the run is created."""
    wandb_id: str
    """Id of the run's one Weights & Biases run."""
    created_at: str
    """UTC, ISO 8601."""

    @classmethod
    def create(cls, created_at: str) -> RunIdentity:
        """A new identity."""
        run_id = secrets.token_hex(8)
        return cls(run_id=run_id, wandb_id=f"s4gan-{run_id}", created_at=created_at)

    def to_json(self) -> bytes:
        """Content of `run.json`."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> RunIdentity:
        """Inverse of `to_json`.

        Raises:
            ValueError: it is not what that gives.
        """
        from pydantic import TypeAdapter  # takes a while to import

        return TypeAdapter(cls).validate_json(text, strict=True)


def job_points(submission: str) -> str:
    """Key of what an array job's children are to train; not in a run, but where its runs are."""
    return f"{JOBS}{submission}/{POINTS}"
