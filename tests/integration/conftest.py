"""Running the real command as a user does, and comparing what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = {
    "data.crop_size": 32,
    "data.random_mirror": "true",
    "data.random_scale": "true",
    "model.backbone": "tiny",
    "model.weights": "none",
    "model.discriminator_channels": 8,
    "train.iterations": 40,
    "train.batch_size": 2,
    "train.accumulate": 2,
    "train.learning_rate": 0.01,
    "train.log_every": 1,
    "train.eval_every": 10,
    "loss.st_start": 5,
    "checkpoint.every": 7,
    "checkpoint.keep_every": 20,
    "wandb.mode": "disabled",
}
"""A whole run in seconds: self-training on, several evaluations, saves that fall between them."""


def command(data: Path, run: Path, **changes: Any) -> list[str]:
    """The command line of a small run; `changes` are written section__key=value."""
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    assignments = [f"--set={key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "job", "train", f"--data={data}", f"--run={run}", *assignments]


class Training:
    """A training process whose lines are read as they come."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> str:
        """Read until a line matches; fails if the process ends first."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return line
        pytest.fail(f"no line matched {pattern!r}:\n" + "\n".join(self.lines))

    def wait_for_iteration(self, iteration: int) -> None:
        """Read until this iteration's losses are printed."""
        self.wait_for(rf"^Iter {iteration}/")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self) -> int:
        """Read to the end; returns the exit status (negative for a signal)."""
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        self.process.stdout.close()
        return self.process.wait()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def start() -> Iterator[Any]:
    """A function that starts a `Training`; whatever still runs at the end is killed."""
    running: list[Training] = []

    def start_training(argv: list[str]) -> Training:
        running.append(Training(argv))
        return running[-1]

    yield start_training
    for training in running:
        training.process.kill()
        training.process.wait()
        assert training.process.stdout is not None
        training.process.stdout.close()


def training_lines(run: Path) -> list[dict[str, Any]]:
    """The ledger without what depends on the clock or on who was interrupted when."""
    volatile = ("time", "attempt", "images_per_s")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in event.items() if key not in volatile}
        for event in events
        if "iteration" in event
    ]


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values are not the same to the bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and torch.equal(left, right)
        return [] if same else [path]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = set(left) | set(right)
        return [
            found
            for key in sorted(keys, key=str)
            for found in (
                differences(left[key], right[key], f"{path}.{key}")
                if key in left and key in right
                else [f"{path}.{key} (only in one)"]
            )
        ]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return [f"{path} (lengths)"]
        return [
            found
            for index, pair in enumerate(zip(left, right, strict=True))
            for found in differences(*pair, f"{path}[{index}]")
        ]
    return [] if left == right else [f"{path}: {left!r} != {right!r}"]


def final_state(run: Path, iteration: int) -> dict[str, Any]:
    """The last full checkpoint, without what names the run rather than describes it."""
    state: dict[str, Any] = torch.load(run / f"checkpoint_{iteration}.pth", weights_only=True)
    del state["run"]
    if state["best"]:
        del state["best"]["id"]  # holds the attempt and a random part
    return state


def best_weights(run: Path) -> dict[str, Any]:
    return {
        name: torch.load(run / name, weights_only=True)["state_dict"]
        for name in ("best_model.pth", "best_model_D.pth", "final_model.pth")
        if (run / name).exists() and "state_dict" in torch.load(run / name, weights_only=True)
    }


def assert_same_result(run: Path, twin: Path, iteration: int) -> None:
    """Weights, optimizers, random state and ledger of two runs are the same to the bit."""
    assert differences(final_state(run, iteration), final_state(twin, iteration)) == []
    assert differences(best_weights(run), best_weights(twin)) == []
    assert training_lines(run) == training_lines(twin)
