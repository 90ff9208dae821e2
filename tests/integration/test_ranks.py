"""Two processes that train as one, on the CPU with gloo: as two GPUs of a machine would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from job import nodes, run
from job.drill.attempt import AttemptProcess
from job.drill.proof import compare_runs, final_state, training_lines
from job.monitor.ledger import read_ledger
from tests.conftest import write_data
from tests.integration.conftest import command
from tests.services import wait_until

ITERATIONS = 24
CALM = 0.0005
"""Small enough that rounding does not grow from step to step."""
TOLERANCE = 1e-4
"""Of losses and weights, relative: sums in another order, over so many iterations."""

pytestmark = pytest.mark.slow


def arguments(data: Path, folder: Path, gpus: int, **changes: Any) -> list[str]:
    changes = {"train__iterations": ITERATIONS, "train__learning_rate": CALM, **changes}
    return [*command(data, folder, **changes), "--gpus", str(gpus)]


def others(process: AttemptProcess) -> list[int]:
    """The processes of the other ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"job.parallel" in words and parent == process.process.pid:
                found.append(int(entry.name))
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("ranks") / "data")


@pytest.fixture(scope="module")
def of_one(data: Path) -> Path:
    """A run of one process."""
    folder = data.parent / "one"
    attempt = AttemptProcess(arguments(data, folder, 1))
    assert attempt.finish() == 0, attempt.output
    return folder


@pytest.fixture(scope="module")
def of_two(data: Path) -> Path:
    """The same run of two processes."""
    folder = data.parent / "two"
    attempt = AttemptProcess(arguments(data, folder, 2))
    assert attempt.finish() == 0, attempt.output
    assert "device: cpu (no GPU found), 2 processes" in attempt.output
    return folder


def assert_close(
    one: Path, other: Path, networks: Sequence[str] = ("generator", "discriminator")
) -> None:
    for kind, abs_ in (("train", 1e-5), ("eval", 0.005)):  # a pixel may fall to another class
        lines, other_lines = (
            [event for event in training_lines(folder) if event["event"] == kind]
            for folder in (one, other)
        )
        assert len(lines) == len(other_lines) > 0
        for line, other_line in zip(lines, other_lines, strict=True):
            for key, value in line.items():
                if isinstance(value, (int, float)):
                    close = pytest.approx(other_line[key], rel=TOLERANCE, abs=abs_)
                    assert value == close, (line["iteration"], key)
    last = training_lines(one)[-1]["iteration"]
    state, other_state = final_state(one, last), final_state(other, last)
    for network in networks:
        for name, value in state[network].items():
            torch.testing.assert_close(
                value, other_state[network][name], rtol=TOLERANCE, atol=1e-5, msg=name
            )


def test_two_are_equal_to_one(of_one: Path, of_two: Path) -> None:
    """Losses, scores, weights and batch norm's running statistics."""
    assert len([e for e in training_lines(of_one) if e["event"] == "train"]) == ITERATIONS
    assert_close(of_one, of_two)


def test_two_are_equal_to_one_with_a_teacher_and_mixed_views(
    start: Any, data: Path, tmp_path: Path
) -> None:
    changes = {
        "train__iterations": 6,
        # The pyramid's batch norm over one value per image makes 200 times of a rounding; at the
        # rate of the other tests that is more than the tolerance on some CPUs.
        "train__learning_rate": CALM / 25,
        "train__ema_decay": 0.9,
        "data__photometric_distortion": True,
        "data__strong_augment": True,
        "data__cutmix": 1.0,
        "model__head": "deeplabv3plus",
    }
    one, two = tmp_path / "1", tmp_path / "2"
    for gpus, folder in enumerate((one, two), start=1):
        attempt = start(arguments(data, folder, gpus, **changes))
        assert attempt.finish() == 0, attempt.output
    assert_close(one, two, networks=("generator", "discriminator", "teacher"))


def test_a_resumed_run_of_two_is_the_same_to_the_bit(
    start: Any, data: Path, of_two: Path, tmp_path: Path
) -> None:
    first = start(arguments(data, tmp_path / "run", 2))
    first.wait_for_iteration(9)
    pids = others(first)
    assert len(pids) == 1
    first.send(signal.SIGTERM)
    assert first.finish() == 75, first.output
    assert not any(map(is_there, pids))
    second = start(arguments(data, tmp_path / "run", 2))
    assert second.finish() == 0, second.output
    assert compare_runs(tmp_path / "run", of_two, ITERATIONS) == []


def test_a_checkpoint_moves_between_counts(
    start: Any, data: Path, of_one: Path, tmp_path: Path
) -> None:
    for gpus in (2, 1):
        attempt = start(arguments(data, tmp_path / "run", gpus))
        attempt.wait_for_iteration(7 if gpus == 2 else 15)
        attempt.send(signal.SIGTERM)
        assert attempt.finish() == 75, attempt.output
    last = start(arguments(data, tmp_path / "run", 2))
    assert last.finish() == 0, last.output
    assert_close(tmp_path / "run", of_one)


def test_a_rank_that_is_killed_ends_the_attempt_to_be_tried_again(
    start: Any, data: Path, of_two: Path, tmp_path: Path
) -> None:
    first = start(arguments(data, tmp_path / "run", 2))
    first.wait_for_iteration(16)
    os.kill(others(first)[0], signal.SIGKILL)
    assert first.finish() == 75, first.output
    assert "the process of rank 1 ended with signal 9" in first.output
    assert "Traceback" not in first.output
    events = read_ledger(tmp_path / "run" / run.LEDGER)
    assert [event["rank"] for event in events if event["event"] == "rank_lost"] == [1]

    second = start(arguments(data, tmp_path / "run", 2))
    assert second.finish() == 0, second.output
    assert "resuming after iteration" in second.output
    assert compare_runs(tmp_path / "run", of_two, ITERATIONS) == []


def test_a_rank_that_dies_again_and_again_is_no_interruption(
    start: Any, data: Path, tmp_path: Path
) -> None:
    for number in range(3):
        attempt = start(arguments(data, tmp_path / "run", 2, checkpoint__every=1000))
        attempt.wait_for_iteration(1)
        os.kill(others(attempt)[0], signal.SIGKILL)
        assert attempt.finish() == (93 if number == 2 else 75), attempt.output


def test_the_others_end_with_the_leader(start: Any, data: Path, tmp_path: Path) -> None:
    attempt = start(arguments(data, tmp_path / "run", 2, train__iterations=10**6))
    attempt.wait_for_iteration(2)
    pids = others(attempt)
    attempt.send(signal.SIGKILL)
    attempt.finish()
    wait_until(lambda: not any(map(is_there, pids)))


def test_the_others_leave_with_the_leaders_own_failure(
    start: Any, data: Path, tmp_path: Path
) -> None:
    attempt = start(arguments(data, tmp_path / "run", 2, train__learning_rate="1e30"))
    assert attempt.finish() == 70, attempt.output


# ---------------------------------------------------------------- on two machines


class Machines:
    """Two machines as AWS Batch starts them: both are told the same command, and who they are."""

    def __init__(self, start: Any) -> None:
        self._start = start
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def __call__(self, words: list[str], position: int, **options: Any) -> AttemptProcess:
        """The attempt of one of them."""
        environment = {
            nodes.COUNT: "2",
            nodes.INDEX: str(position),
            nodes.MAIN_INDEX: "0",
            nodes.MAIN_ADDRESS: "127.0.0.1",
            nodes.PORT_VARIABLE: str(self.port),
            "AWS_BATCH_JOB_ID": f"job#{position}",
        }
        found: AttemptProcess = self._start(words, environment=environment, **options)
        return found


@pytest.fixture
def machines(start: Any) -> Machines:
    return Machines(start)


def test_two_machines_are_as_two_processes_of_one(
    machines: Machines,
    data: Path,
    of_two: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = arguments(data, tmp_path / "run", 1)
    monkeypatch.setenv("S4GAN_SCRATCH", str(tmp_path / "scratch-1"))
    other = machines(words, 1)
    monkeypatch.setenv("S4GAN_SCRATCH", str(tmp_path / "scratch-0"))
    main = machines(words, 0)
    assert main.finish() == 0, main.output
    assert other.finish() == 0, other.output
    for scratch in ("scratch-0", "scratch-1"):  # decoded images are gone from both
        assert list((tmp_path / scratch / "s4gan" / "decoded").iterdir()) == []
    assert "machine 2 of 2; the first one reports" in other.output
    assert compare_runs(tmp_path / "run", of_two, ITERATIONS) == []
    (started,) = (
        event
        for event in read_ledger(tmp_path / "run" / run.LEDGER)
        if event["event"] == "attempt_started"
    )
    assert (started["gpus"], started["nodes"], started["job"]) == (2, 2, "job")


def test_two_machines_that_are_stopped_go_on_as_one(
    machines: Machines, start: Any, data: Path, of_two: Path, tmp_path: Path
) -> None:
    words = arguments(data, tmp_path / "run", 1)
    main, other = machines(words, 0), machines(words, 1)
    main.wait_for_iteration(9)
    for process in (other, main):  # TerminateJob reaches all of them, in any order
        process.send(signal.SIGTERM)
    assert main.finish() == 75, main.output
    assert other.finish() == 0, other.output
    last = start(arguments(data, tmp_path / "run", 2))
    assert last.finish() == 0, last.output
    assert compare_runs(tmp_path / "run", of_two, ITERATIONS) == []


def test_a_machine_that_is_gone_ends_the_attempt_to_be_tried_again(
    machines: Machines, data: Path, of_two: Path, tmp_path: Path
) -> None:
    words = arguments(data, tmp_path / "run", 1)
    main, other = machines(words, 0), machines(words, 1)
    main.wait_for_iteration(16)
    other.kill()
    assert main.finish() == 75, main.output
    assert "Traceback" not in main.output
    main, other = machines(words, 0), machines(words, 1)
    assert main.finish() == 0, main.output
    assert other.finish() == 0
    assert compare_runs(tmp_path / "run", of_two, ITERATIONS) == []


IMPATIENT = """
import sys
import job.parallel
job.parallel.GONE_S, job.parallel.NOTICED_S = 12.0, 1.0
sys.argv = ["s4gan", *sys.argv[1:]]
from job.cli import main
main()
"""


class Impatient(AttemptProcess):
    """The command with less patience for other machines."""

    def _launch(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )


def test_a_machine_that_hangs_is_noticed(data: Path, tmp_path: Path) -> None:
    """Its connections stay open, so that no collective fails."""
    words = arguments(data, tmp_path / "run", 1, train__iterations=10**6)
    machines = Machines(lambda words, **options: Impatient(words, **options))
    main, other = machines(words, 0), machines(words, 1)
    try:
        main.wait_for_iteration(5)
        (rank,) = others(other)
        os.kill(rank, signal.SIGSTOP)
        assert main.finish() == 75, main.output
        assert "the process of rank 1, on another machine, is gone" in main.output
        os.kill(rank, signal.SIGCONT)
        assert other.finish() == 0, other.output  # it sees that the leader is gone
    finally:
        main.kill()
        other.kill()


def test_a_port_that_is_taken_is_named(machines: Machines, data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", machines.port))
        taken.listen()
        main = machines(arguments(data, tmp_path / "run", 1), 0)
        assert main.finish() == 78, main.output
    assert f"the port {machines.port}, where other machines find this one" in main.output
    assert "Traceback" not in main.output


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (0, "--gpus 0: must be at least 1"),
        (3, "make train.accumulate a multiple of 3; to keep the images of an iteration at 4"),
    ],
)
def test_a_count_that_cannot_be_is_refused(
    s4gan: Any, data: Path, tmp_path: Path, gpus: int, said: str
) -> None:
    ended = s4gan(arguments(data, tmp_path / "run", gpus))
    assert ended.code == 78
    assert said in ended.err
    assert not (tmp_path / "run").exists()
