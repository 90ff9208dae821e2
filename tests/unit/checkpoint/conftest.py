"""A run in a folder and in a bucket, and successive attempts at it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from job import run
from job.checkpoint.lease import Lease, acquire
from job.checkpoint.manager import BestModel, CheckpointManager
from job.storage import ObjectStore
from tests.unit.stores import KINDS, open_kind

Attempts = Callable[..., Lease]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    with open_kind(request.param, request) as opened:
        yield opened


@pytest.fixture
def take_over(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempts]:
    """Starts the next attempt of one job, which replaces the last one at once.

    It may go through a store of its own; what is published under the lease goes there, too.
    """
    number = 0
    with contextlib.ExitStack() as stack:

        def start(through: ObjectStore | None = None) -> Lease:
            nonlocal number
            number += 1
            monkeypatch.setenv("AWS_BATCH_JOB_ID", "job")
            monkeypatch.setenv("AWS_BATCH_JOB_ATTEMPT", str(number))
            lease = acquire(through or store, on_lost=lambda: None)
            stack.callback(lease.release)
            return lease

        yield start


@pytest.fixture
def lease(take_over: Attempts) -> Lease:
    return take_over()


@pytest.fixture
def manager(store: ObjectStore, lease: Lease, tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(store, lease, tmp_path / "scratch")


def state(iteration: int, by: int = 1) -> dict[str, Any]:
    """A state that differs with the attempt that made it."""
    return {
        "iteration": iteration,
        "weights": torch.full((50,), float(iteration)),
        "by": by,
        "best": None,
    }


def save(
    manager: CheckpointManager,
    iteration: int,
    *,
    numbered: bool = False,
    best: BestModel | None = None,
    by: int = 1,
) -> None:
    manager.save(state(iteration, by), best=best, numbered=numbered)


def save_best(manager: CheckpointManager, iteration: int) -> BestModel:
    files = {
        name: {"weights": torch.full((5,), float(iteration)), "name": name}
        for name in (run.BEST_MODEL, run.BEST_MODEL_D)
    }
    best = manager.new_best(iteration, iteration / 100)
    manager.save_best(best, files)
    return best


def loaded(store: ObjectStore, key: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(io.BytesIO(store.read(key)), weights_only=True)
    return content


def iteration_in(store: ObjectStore, key: str) -> int:
    return int(loaded(store, key)["iteration"])


def pointer(store: ObjectStore) -> list[str]:
    """Ids of the checkpoints, newest first."""
    ids: list[str] = json.loads(store.read(run.LATEST_POINTER))["checkpoints"]
    return ids


def iterations(ids: list[str]) -> list[int]:
    return [int(id_.partition("-")[0]) for id_ in ids]


def kept_data(store: ObjectStore) -> list[int]:
    """Iterations whose own data are stored."""
    keys = [info.key for info in store.list(run.CHECKPOINTS) if info.key.endswith(".pth")]
    return sorted(iterations([key.removeprefix(run.CHECKPOINTS) for key in keys]))
