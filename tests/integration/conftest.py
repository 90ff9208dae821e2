"""Running the real command as a user does, and comparing what it leaves behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from job import cli
from job.drill.attempt import AttemptProcess
from job.drill.proof import compare_runs
from tests.nursery import ForkedAttempt

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


def command(data: Path | str, run: Path | str, **changes: Any) -> list[str]:
    """The arguments of a small run; `changes` are written section__key=value."""
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    assignments = [f"--set={key}={value}" for key, value in settings.items()]
    return ["train", f"--data={data}", f"--run={run}", *assignments]


@pytest.fixture
def start() -> Iterator[Any]:
    """A function that starts an attempt; whatever still runs at the end is killed.

    With `forked=False` it is a new Python, as a user's would be.
    """
    running: list[AttemptProcess] = []

    def start_attempt(
        arguments: list[str], *, forked: bool = True, **options: Any
    ) -> AttemptProcess:
        running.append((ForkedAttempt if forked else AttemptProcess)(arguments, **options))
        return running[-1]

    yield start_attempt
    for attempt in running:
        attempt.kill()


class Ended(NamedTuple):
    """A command line that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def s4gan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[Sequence[object]], Ended]]:
    """Run a command line in this process, which saves it the seconds that importing torch takes."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setenv("COLUMNS", "100")

    def run(arguments: Sequence[object]) -> Ended:
        monkeypatch.setattr(sys, "argv", ["s4gan", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    yield run
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def assert_same_result(run: Path, twin: Path, iteration: int) -> None:
    """Weights, optimizers, random state and ledger of two runs are the same to the bit."""
    assert compare_runs(run, twin, iteration) == []
