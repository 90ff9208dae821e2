"""A beat that is written now and then, and a check that reads it."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from job import heartbeat
from job.heartbeat import VARIABLE, beat, main
from tests.services import wait_until


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "beat"))
    monkeypatch.setattr(heartbeat, "_last_s", 0.0)
    monkeypatch.setattr(sys, "argv", ["heartbeat"])
    return tmp_path / "beat"


def test_a_beat_is_written_at_most_once_a_second(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((100.0, 100.9, 101.0, 101.5, 102.1))
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: next(clock))
    written = []
    monkeypatch.setattr(Path, "touch", lambda path: written.append(path))
    for _ in range(5):
        beat()
    assert written == [file, file, file]


def test_who_worked_a_moment_ago_is_healthy(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat()
    main()
    assert capsys.readouterr().out == "at work 0 s ago\n"


def test_who_has_done_nothing_for_long_is_stalled(file: Path) -> None:
    beat()
    os.utime(file, (time.time() - 660,) * 2)
    with pytest.raises(SystemExit, match="stalled: nothing was done for 11 minutes"):
        main()


def test_the_patience_can_be_changed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat()
    os.utime(file, (time.time() - 660,) * 2)
    monkeypatch.setattr(sys, "argv", ["heartbeat", "--minutes", "12"])
    main()


def test_a_clock_set_back_is_no_stall(file: Path) -> None:
    beat()
    os.utime(file, (time.time() + 9999,) * 2)
    main()


def test_before_the_first_beat_nothing_is_known(file: Path) -> None:
    with pytest.raises(SystemExit, match="not begun"):
        main()


def test_without_the_variable_nothing_is_written_and_the_check_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    beat()
    assert not file.exists()
    with pytest.raises(SystemExit, match=f"{VARIABLE} is not set"):
        main()


def test_a_beat_that_cannot_be_written_is_no_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(file / "no" / "such"))
    beat()


# ---------------------------------------------------------------- looked at from within


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the watch sees, changed by the test."""
    now = [1000.0]
    monkeypatch.setattr(heartbeat, "LOOK_EVERY_S", 0.005)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


def passing(clock: list[float], seconds: float, step_s: float) -> None:
    """Let time pass in steps that the watch has time to see."""
    for _ in range(round(seconds / step_s)):
        clock[0] += step_s
        time.sleep(0.01)


def test_silence_is_noticed_once(clock: list[float]) -> None:
    stalled: list[float] = []
    with heartbeat.watch(0.001, stalled.append):  # 0.06 s
        passing(clock, 0.05, 0.01)
        assert stalled == []
        wait_until(lambda: clock.__setitem__(0, clock[0] + 0.01) or bool(stalled))
        passing(clock, 0.2, 0.01)
    assert len(stalled) == 1
    assert stalled[0] >= 0.001


def test_beats_keep_it_quiet(clock: list[float]) -> None:
    stalled: list[float] = []
    with heartbeat.watch(0.01, stalled.append):  # 0.6 s
        for _ in range(20):
            passing(clock, 0.1, 0.01)
            beat()
    assert stalled == []


def test_time_in_which_the_process_was_stopped_does_not_count(clock: list[float]) -> None:
    stalled: list[float] = []
    with heartbeat.watch(60, stalled.append):
        passing(clock, 5_000_000, 1_000_000)
    assert stalled == []


def test_the_watch_can_be_off(clock: list[float]) -> None:
    before = threading.active_count()
    with heartbeat.watch(0, pytest.fail):
        assert threading.active_count() == before
