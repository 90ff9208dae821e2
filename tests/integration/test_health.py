"""Training broken on purpose, for real: the right finding comes, once, and is diagnosed after."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from job.drill.attempt import AttemptProcess
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
    live, _, end = training.output.partition("Finished after")
    for said in (live, end):  # the end says again what is not over
        (line,) = (one for one in said.splitlines() if f", {rule})" in one)
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
    live = "\n".join(outputs).partition("Finished after")[0]
    assert live.count(", st_count_zero)") == 1


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


# ---------------------------------------------------------------- the end before the end


@pytest.fixture(scope="module")
def early(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reached its target at the second of four evaluations, at the latest."""
    run = tmp_path_factory.mktemp("early") / "run"
    training = AttemptProcess(command(data, run, **TARGET))
    assert training.finish() == 0, training.output
    assert "Stopped early: validation mIoU" in training.output
    return run


TARGET = {"stop__target_miou": 0.01, "train__eval_every": 9, "checkpoint__every": 7}


@pytest.mark.slow
def test_a_run_that_stops_early_is_finished_with_all_its_files(early: Path) -> None:
    summary = json.loads((early / "summary.json").read_text())
    reached = summary["run"]["iterations"]
    assert reached in (9, 18)
    assert "has reached the target of 0.01" in summary["run"]["stopped_early"]
    kept = f"checkpoint_{reached}.pth"
    for name in ("best_model.pth", "best_model_D.pth", "final_model.pth", "report.html", kept):
        assert (early / name).is_file(), name
    (event,) = (one for one in read_ledger(early / LEDGER) if one["event"] == "stopped_early")
    assert event["iteration"] == reached


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_more(
    data: Path, start: Any, early: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(early, run)
    before = json.loads((run / "summary.json").read_text())
    training = start(command(data, run, **TARGET))
    assert training.finish() == 0, training.output
    after = json.loads((run / "summary.json").read_text())
    assert after["run"]["iterations"] == before["run"]["iterations"]
    assert after["files"] == before["files"]
    assert "\nIter " not in training.output
    # Without the target it goes on to the end.
    training = start(command(data, run, **{**TARGET, "stop__target_miou": "null"}))
    assert training.finish() == 0, training.output
    assert json.loads((run / "summary.json").read_text())["run"]["iterations"] == 40


@pytest.mark.slow
def test_killed_before_its_last_words_it_ends_the_same(
    data: Path, start: Any, early: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for iteration in (3, 8, 9):
        training = start(command(data, run, **TARGET))
        training.wait_for_iteration(iteration)
        training.send(signal.SIGKILL)
        training.finish()
    assert start(command(data, run, **TARGET)).finish() == 0
    ours, theirs = (json.loads((one / "summary.json").read_text()) for one in (run, early))
    assert ours["best"] == theirs["best"]
    assert ours["run"]["iterations"] == theirs["run"]["iterations"]
