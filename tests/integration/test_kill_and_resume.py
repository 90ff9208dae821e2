"""The promise the project stands for: killed at any point, resumed, equal to the bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from job.drill.attempt import AttemptProcess
from job.drill.proof import training_lines
from job.storage.pull import pull
from tests.conftest import write_data
from tests.integration.conftest import assert_same_result, command

ITERATIONS = 40


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """Data, and the run that was never stopped."""
    folder = tmp_path_factory.mktemp("twin")
    data = write_data(folder / "data")
    training = AttemptProcess(command(data, folder / "run"))
    assert training.finish() == 0, training.output
    return data, folder / "run"


def test_sigkill_at_random_iterations_changes_nothing(twin, start, tmp_path):
    data, uninterrupted = twin
    run = tmp_path / "run"
    at = sorted(random.Random(20).sample(range(2, ITERATIONS - 1), 5))
    for iteration in at:
        training = start(command(data, run))
        training.wait_for_iteration(iteration)
        training.send(signal.SIGKILL)
        assert training.finish() == -signal.SIGKILL
    training = start(command(data, run))
    assert training.finish() == 0, training.output
    assert_same_result(run, uninterrupted, ITERATIONS)
    attempts = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    starts = [e for e in attempts if e["event"] == "training_started"]
    assert [e["attempt"] for e in starts] == [1, 2, 3, 4, 5, 6]
    for killed_at, event in zip(at, starts[1:], strict=True):
        # The newest checkpoint may still have been on its way, and another one waiting for it.
        assert killed_at - event["resumed_at"] <= 3 * 7, "lost more than two saves on their way"


def test_sigterm_exits_75_and_loses_nothing(twin, start, tmp_path):
    data, uninterrupted = twin
    run = tmp_path / "run"
    reached = 0
    for iteration in (3, 20, 33):
        training = start(command(data, run))
        training.wait_for_iteration(iteration)
        training.send(signal.SIGTERM)
        assert training.finish() == 75, training.output
        saved = training_lines(run)[-1]["iteration"]
        assert saved >= iteration
        if reached:
            assert f"resuming after iteration {reached} " in training.output
        reached = saved
        assert f"saved after iteration {reached} of {ITERATIONS}" in training.output
    assert start(command(data, run)).finish() == 0
    assert_same_result(run, uninterrupted, ITERATIONS)


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(twin, start, tmp_path):
    data, _ = twin
    run = tmp_path / "run"
    training = start(command(data, run))
    training.wait_for_iteration(4)
    training.send(signal.SIGINT)
    assert training.finish() == 75
    assert "Ctrl-C again leaves at once" in training.output

    # An iteration long enough to be in the middle of it when the second one comes.
    big = {"data__crop_size": 256, "train__batch_size": 8, "train__accumulate": 8}
    training = start(command(data, tmp_path / "long", train__log_every=1, **big))
    training.wait_for("generator:")
    training.send(signal.SIGINT)
    training.wait_for("Ctrl-C again")
    training.send(signal.SIGINT)
    assert training.finish() == 130
    assert not (tmp_path / "long" / "latest_checkpoint.pth").exists()


def test_a_finished_run_can_be_finished_again(twin, start, tmp_path):
    data, uninterrupted = twin
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    training = start(command(data, run))
    assert training.finish() == 0, training.output
    assert_same_result(run, uninterrupted, ITERATIONS)
    assert "Finished after 40 iterations" in training.output
    health = json.loads((run / "summary.json").read_text())["health"]
    last = training.output.partition("Finished after")[2]
    assert last.count("try: ") == sum(one["ended"] is None for one in health["findings"])
    assert ("\nhealthy: " in last) == health["healthy"]


def test_a_finished_run_that_goes_on_is_not_finished(twin, start, tmp_path):
    data, uninterrupted = twin
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    training = start([*command(data, run, train__iterations=2000), "--resume-anyway"])
    training.wait_for(r"New best validation mIoU")
    training.send(signal.SIGTERM)
    assert training.finish() == 75, training.output
    pulled = pull(str(run), tmp_path / "pulled")
    assert not pulled.finished
    best = {file.name: file.verified for file in pulled.files}["best_model.pth"]
    assert best == "sha256"


@pytest.mark.slow
def test_loader_processes_do_not_change_the_result(twin, start, tmp_path):
    data, uninterrupted = twin
    run = tmp_path / "run"
    training = start(command(data, run, data__workers=2), forked=False)
    training.wait_for_iteration(12)
    training.send(signal.SIGTERM)
    assert training.finish() == 75, training.output
    assert start(command(data, run, data__workers=1), forked=False).finish() == 0
    assert_same_result(run, uninterrupted, ITERATIONS)


def test_loader_processes_do_not_outlive_a_killed_training(twin, start, tmp_path):
    data, _ = twin
    training = start(command(data, tmp_path / "run", data__workers=2), forked=False)
    training.wait_for_iteration(3)
    children = children_of(training.process.pid)
    assert len(children) >= 2
    training.send(signal.SIGKILL)
    training.process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "loader processes were left behind"
        time.sleep(0.2)


def children_of(pid: int) -> list[int]:
    """All processes below one, by walking /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [below for child in found for below in children_of(child)]


def test_a_damaged_newest_checkpoint_costs_only_the_way_back_to_the_one_before(
    twin, start, tmp_path
):
    data, uninterrupted = twin
    run = tmp_path / "run"
    training = start(command(data, run))
    training.wait_for_iteration(24)
    training.send(signal.SIGTERM)
    assert training.finish() == 75
    newest, before, *_ = json.loads((run / "checkpoints/latest.json").read_text())["checkpoints"]
    state = run / "checkpoints" / newest / "state.pth"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.unlink()  # its plain name is a link to the same file
    state.write_bytes(content)

    training = start(command(data, run))
    assert training.finish() == 0, training.output
    assert "will not be tried again" in training.output
    assert f"resuming after iteration {int(before.partition('-')[0])} " in training.output
    reason = json.loads((run / "checkpoints/quarantine" / f"{newest}.json").read_text())["reason"]
    assert "sha256" in reason
    assert_same_result(run, uninterrupted, ITERATIONS)


def test_two_attempts_at_once_one_trains(twin, start, tmp_path):
    data, _ = twin
    run = tmp_path / "run"
    first = start(command(data, run, train__iterations=2000))
    first.wait_for_iteration(2)
    second = start(command(data, run, train__iterations=2000))
    assert second.finish() == 76
    assert "is training in" in second.output
    first.send(signal.SIGTERM)
    assert first.finish() == 75


def test_files_of_a_finished_run(twin):
    _, run = twin
    names = {path.name for path in run.iterdir() if path.is_file()}
    assert names >= {
        "config.yaml",
        "run.json",
        "splits.json",
        "metrics.jsonl",
        "latest_checkpoint.pth",
        "checkpoint_20.pth",
        "checkpoint_40.pth",
        "best_model.pth",
        "best_model_D.pth",
        "final_model.pth",
        "predictions.png",
        "report.html",
        "summary.json",
    }
    assert not (run / ".work").exists()
    assert not list(run.rglob(".tmp-*"))
    recovery = [p for p in (run / "checkpoints").iterdir() if (p / "state.pth").exists()]
    assert len(recovery) == 3


def test_sigterm_at_any_moment_of_the_start_exits_75(start, make_data, tmp_path):
    """Also while torch starts, whose C++ cannot bear an exception (found by the soak)."""
    data = make_data()
    codes = set()
    for tenths in range(4, 28, 4):
        training = start(command(data, tmp_path / "run", train__iterations=100_000), forked=False)
        time.sleep(tenths / 10)
        training.send(signal.SIGTERM)
        codes.add(training.finish())
    # Before Python has read the program there is nobody to answer.
    assert codes <= {75, -signal.SIGTERM}
    assert 75 in codes
