"""A beat that is written now and then, and a check that reads it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from job import heartbeat
from job.heartbeat import VARIABLE, beat, main


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
