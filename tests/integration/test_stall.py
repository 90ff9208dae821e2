"""An attempt that hangs ends by itself, says where it hung, and the next one goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from job import run
from job.errors import ConfigError
from job.monitor.attempts import attempts_of
from job.monitor.ledger import read_ledger
from job.monitor.stall import MINUTES, VARIABLE, stall_minutes
from tests.conftest import MakeData
from tests.integration.conftest import command

HANGING = """
import sys, threading
import job.heartbeat, job.training.loop as loop
job.heartbeat.LOOK_EVERY_S = 0.05
step = loop.train_step
def a_step_that_hangs(state, *rest):
    if state.iteration == 15:
        threading.Event().wait()
    return step(state, *rest)
loop.train_step = a_step_that_hangs
sys.argv = ["s4gan", *sys.argv[1:]]
from job.cli import main
main()
"""


def hang(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANGING, *arguments],
        env={**os.environ, VARIABLE: "0.1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_it_ends_and_is_tried_again_but_not_for_ever(
    start: Any, make_data: MakeData, tmp_path: Path
) -> None:
    arguments = command(make_data(), tmp_path / "run", checkpoint__every=1000)
    ends = [hang(arguments) for _ in range(3)]
    assert [end.returncode for end in ends] == [75, 75, 93], ends
    assert "error: nothing was done for 0 minutes" in ends[0].stdout
    assert "in a_step_that_hangs" in ends[0].stderr  # the stacks say where
    assert "several attempts in a row hung" in ends[2].stdout
    for attempt in attempts_of(read_ledger(tmp_path / "run" / run.LEDGER)):
        assert attempt.exit_code == 75
        assert attempt.fingerprint.startswith("Stalled: nothing was done")
        assert not attempt.was_interrupted

    # Where it does not hang it goes on.
    last = start(arguments)
    assert last.finish() == 0, last.output
    lines = (tmp_path / "run" / run.LEDGER).read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines if '"event": "train"' in line]
    assert iterations == list(range(1, 41))


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_patience_that_is_no_number_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{VARIABLE}={text}: must be a number of minutes"):
        stall_minutes()


@pytest.mark.parametrize(("text", "minutes"), [("", MINUTES), ("0", 0.0), ("12.5", 12.5)])
def test_the_patience_can_be_chosen(
    text: str, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert stall_minutes() == minutes
