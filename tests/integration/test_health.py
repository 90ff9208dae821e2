"""Training broken on purpose, for real: the right finding comes, once, and is diagnosed after."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from job.monitor.ledger import read_ledger
from job.run import LEDGER
from tests.conftest import write_data
from tests.integration.conftest import command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("health") / "data")


def told(run: Path) -> list[tuple[str, int]]:
    """Findings in a run's ledger as they began: rule, iteration."""
    return [
        (event["rule"], event["iteration"])
        for event in read_ledger(run / LEDGER)
        if event["event"] == "health" and event["ended"] is None
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "rule", "advice"),
    [
        (
            {"train__learning_rate_D": 0, "loss__lambda_fm": 0},
            "d_stuck",
            "--learning-rate-D 0.0001 (it is 0)",
        ),
        ({"loss__threshold_st": 0.99}, "st_never_active", "--threshold-st 0.2 (it is 0.99)"),
    ],
)
def test_the_right_finding_comes_while_training_and_after_it(
    data: Path, start: Any, s4gan: Any, tmp_path: Path, broken: Any, rule: str, advice: str
) -> None:
    run = tmp_path / "run"
    training = start(command(data, run, **broken))
    assert training.finish() == 0, training.output
    assert [one for one, _ in told(run)].count(rule) == 1
    (line,) = (one for one in training.output.splitlines() if f", {rule})" in one)
    assert line.startswith("problem: ")
    assert advice in line
    ended = s4gan(["diagnose", run, "--json"])
    assert ended.code == 1
    found = json.loads(ended.out)["findings"]
    assert sorted((one["rule"], one["iteration"]) for one in found) == sorted(told(run))


@pytest.mark.slow
def test_killed_and_resumed_it_is_told_of_once(data: Path, start: Any, tmp_path: Path) -> None:
    """And with the same iteration as without the kill."""
    broken = {"loss__threshold_st": 0.99}
    whole = tmp_path / "whole"
    assert start(command(data, whole, **broken)).finish() == 0
    run = tmp_path / "run"
    outputs = []
    for iteration in (20, 34, None):
        training = start(command(data, run, **broken))
        if iteration is not None:
            training.wait_for_iteration(iteration)
            training.send(signal.SIGKILL)
            assert training.finish() == -signal.SIGKILL
        else:
            assert training.finish() == 0, training.output
        outputs.append(training.output)
    assert told(run) == told(whole)
    lines = [line for line in "\n".join(outputs).splitlines() if ", st_count_zero)" in line]
    assert len(lines) == 1


@pytest.mark.slow
def test_a_crash_by_nan_is_a_finding(data: Path, start: Any, s4gan: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = start(command(data, run, train__learning_rate="1.0e+30"))
    assert training.finish() == 70, training.output
    assert "non_finite" in [rule for rule, _ in told(run)]
    assert "half the learning rates" in training.output
    ended = s4gan(["diagnose", run])
    assert ended.code == 1
    assert "NaN or infinite" in ended.out
