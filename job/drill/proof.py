"""Whether two runs are the same to the bit: weights, optimizers, random state, ledger.

Works on what `s4gan pull --all` (or a local run folder) holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from job import run

_VOLATILE = ("time", "attempt", "images_per_s")
_MODELS = (run.BEST_MODEL, run.BEST_MODEL_D, run.FINAL_MODEL)


def compare_runs(one: Path, other: Path, iteration: int) -> list[str]:
    """Where two finished runs of `iteration` iterations differ; empty if nowhere."""
    return [
        *differences(final_state(one, iteration), final_state(other, iteration), "checkpoint"),
        *differences(model_weights(one), model_weights(other), "models"),
        *differences(training_lines(one), training_lines(other), "ledger"),
    ]


def training_lines(folder: Path) -> list[dict[str, Any]]:
    """The ledger without what depends on the clock or on who was interrupted when."""
    events = [json.loads(line) for line in (folder / run.LEDGER).read_text().splitlines()]
    return [
        {key: value for key, value in event.items() if key not in _VOLATILE}
        for event in events
        if "iteration" in event
    ]


def final_state(folder: Path, iteration: int) -> dict[str, Any]:
    """A numbered checkpoint, without what names the run rather than describes it."""
    state: dict[str, Any] = torch.load(
        folder / run.numbered_checkpoint(iteration), map_location="cpu", weights_only=True
    )
    del state["run"]
    if state["best"]:
        del state["best"]["id"]  # holds the attempt and a random part
    return state


def model_weights(folder: Path) -> dict[str, Any]:
    """Weights of the model files that are there, by name."""
    return {
        name: torch.load(folder / name, map_location="cpu", weights_only=True)["state_dict"]
        for name in _MODELS
        if (folder / name).exists()
    }


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
            return [f"{path} (lengths {len(left)} and {len(right)})"]
        return [
            found
            for index, pair in enumerate(zip(left, right, strict=True))
            for found in differences(*pair, f"{path}[{index}]")
        ]
    return [] if left == right else [f"{path}: {left!r} != {right!r}"]
