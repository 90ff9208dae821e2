"""Training that diverges for real, and what is done about it when that is asked for."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from job import app
from job.config import load_config
from job.errors import OutOfMemory
from job.monitor.ledger import read_ledger
from job.run import LEDGER
from job.training import loop
from tests.conftest import write_data
from tests.integration.conftest import SMALL, command

WILD = {"train__learning_rate": 6.4, "monitor__on_divergence": "rollback", "train__iterations": 20}
"""Loss_CE explodes within a few iterations, and comes back at an eighth of it, or before."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("divergence") / "data")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_ledger(run / LEDGER) if event["event"] == kind]


@pytest.mark.slow
def test_a_run_rolls_back_until_it_is_stable_also_over_a_kill(
    data: Path, start: Any, s4gan: Any, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    training = start(command(data, whole, **WILD))
    assert training.finish() == 0, training.output
    done = events(whole, "rolled_back")
    count = len(done)
    assert 1 <= count <= 3
    assert len(re.findall(r"^Rolled back \(\d of 3\) to iteration 0; going on with --learning-rate",
                          training.output, re.MULTILINE)) == count  # fmt: skip
    assert [one["learning_rate"] for one in done] == [6.4 / 2**n for n in range(1, count + 1)]
    ends = [(one["attempt"], one["exit_code"]) for one in events(whole, "attempt_ended")]
    assert ends == [*((n, 70) for n in range(1, count + 1)), (count + 1, 0)]
    first = events(whole, "train")[0]
    assert first["lr_g"] == done[-1]["learning_rate"]
    # Killed after the last rollback, it goes on with what it had come to.
    run = tmp_path / "run"
    training = start(command(data, run, **WILD))
    training.wait_for(rf"^Rolled back \({count} of 3\)")
    training.wait_for(r"^Iter 12/20")
    training.send(signal.SIGKILL)
    training.finish()
    training = start(command(data, run, **WILD))
    assert training.finish() == 0, training.output
    names = ("iteration", "loss_ce", "loss_d", "lr_g", "lr_d")
    ours, theirs = (
        [[line[name] for name in names] for line in events(one, "train")] for one in (run, whole)
    )
    assert ours == theirs


@pytest.mark.slow
def test_after_three_rollbacks_it_is_over(data: Path, start: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wild = {**WILD, "train__learning_rate": "1.0e+30"}
    training = start(command(data, run, **wild))
    assert training.finish() == 70, training.output
    assert len(events(run, "rolled_back")) == 3
    assert "(rolled back 3 times already)" in training.output
    assert "monitor.on_divergence" not in training.output
    # And stays over: the count is the run's, not the process's.
    training = start(command(data, run, **wild))
    assert training.finish() == 70, training.output
    assert len(events(run, "rolled_back")) == 3


@pytest.mark.slow
def test_it_goes_back_to_the_last_checkpoint_from_before(
    data: Path, start: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    training = start(command(data, run, checkpoint__every=4))
    training.wait_for(r"^Iter 15/40")
    training.send(signal.SIGTERM)
    assert training.finish() == 75
    saved = events(run, "checkpoint")[-1]["saved_at"]
    wild = {"train__learning_rate": 1000, "monitor__on_divergence": "rollback"}
    again = command(data, run, checkpoint__every=4, **wild)
    training = start([*again, "--resume-anyway"])
    training.finish()
    first = events(run, "rolled_back")[0]
    assert first["to"] >= saved  # it may have saved once more before it diverged
    assert first["since"] is None or first["since"] > first["to"]
    assert len(events(run, "rolled_back")) <= 3
    resumed = [one["resumed_at"] for one in events(run, "training_started")]
    assert resumed[2] == first["to"]


def trained(data: Path, run: Path, **changes: Any) -> str:
    """In this process, so that it can be made to fail; what it prints."""
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    config = load_config("guide", settings)
    console = Console(record=True, width=200)
    app.train(config, data_uri=str(data), run_uri=str(run), console=console)
    return console.export_text()


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine whose memory is enough for batches of one; the batches that were tried."""
    step = loop.train_step
    tried: list[int] = []

    def limited(state: Any, batch: Any, config: Any, *rest: Any) -> Any:
        tried.append(config.train.batch_size)
        if config.train.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(state, batch, config, *rest)

    monkeypatch.setattr(loop, "train_step", limited)
    return tried


@pytest.mark.slow
def test_batches_are_halved_until_they_fit(
    data: Path, tmp_path: Path, small_memory: list[int]
) -> None:
    run = tmp_path / "run"
    few = {"train__batch_size": 4, "train__accumulate": 1, "train__iterations": 4}
    output = trained(data, run, monitor__on_oom="halve", **few)
    assert small_memory[:3] == [4, 2, 1]
    assert "going on with batches of 1, 4 of them an iteration" in output
    done = [(one["batch_size"], one["accumulate"]) for one in events(run, "batch_halved")]
    assert done == [(2, 2), (1, 4)]
    assert "Finished after 4 iterations" in output
    reasons = [one["reason"] for one in events(run, "attempt_ended")]
    assert [reason.partition(" with")[0] for reason in reasons] == ["CUDA out of memory"] * 2 + [
        "finished"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"monitor__on_oom": "halve", "train__batch_size": 3}],
    ids=["stop", "cannot be halved"],
)
def test_otherwise_the_batch_to_try_is_said(
    data: Path, tmp_path: Path, small_memory: list[int], settings: dict[str, Any]
) -> None:
    with pytest.raises(OutOfMemory, match="CUDA out of memory with batches of") as caught:
        trained(data, tmp_path / "run", **settings)
    assert "--batch-size 1 --set train.accumulate=4" in caught.value.mend
    assert len(small_memory) == 1
