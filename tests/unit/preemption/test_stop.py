"""Signals raise a flag; nothing else happens until the loop looks at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from job.errors import Preempted
from job.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number):
    before = signal.getsignal(number)
    with StopRequest().on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_the_first_reason_stays():
    stop = StopRequest()
    stop.request("spot notice")
    stop.request("SIGTERM")
    assert stop.reason == "spot notice"


def test_a_second_sigterm_is_no_reason_to_leave_without_saving():
    with StopRequest().on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


def test_before_training_there_is_nothing_to_save():
    stop = StopRequest()
    stop.raise_if_requested()
    stop.request("SIGTERM")
    with pytest.raises(Preempted, match="SIGTERM") as caught:
        stop.raise_if_requested()
    assert caught.value.exit_code == 75


def test_without_a_notice_nobody_knows_how_much_time_is_left():
    stop = StopRequest()
    stop.request("SIGTERM")
    assert stop.seconds_left is None


def test_the_earliest_deadline_counts_whoever_came_first(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("job.preemption.stop.time", SimpleNamespace(monotonic=lambda: now_s))
    stop = StopRequest()
    stop.request("a spot notice", within_s=120)
    stop.request("another", within_s=300)
    now_s += 20
    assert stop.seconds_left == 100
    stop.request("a third", within_s=30)
    assert stop.seconds_left == 30
    stop.request("SIGTERM")
    now_s += 40
    assert stop.seconds_left == -10
    assert stop.reason == "a spot notice"


def test_a_deadline_is_known_before_the_stop_is(monkeypatch):
    """Who sees the flag from another thread must find the deadline with it."""
    seen: list[float | None] = []

    class Watched(StopRequest):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "reason" and value is not None:
                seen.append(self.seconds_left)
            super().__setattr__(name, value)

    Watched().request("a spot notice", within_s=120)
    assert seen[0] is not None


def test_a_save_request_is_taken_once_and_stops_nothing():
    stop = StopRequest()
    assert not stop.take_save_request()
    stop.request_save()
    stop.request_save()
    assert stop.take_save_request()
    assert not stop.take_save_request()
    assert not stop.requested


PROGRAM = """
import os, signal, sys, time
from job.preemption import StopRequest
if sys.argv[1] == "closed":
    os.close(2)
with StopRequest().on_signals() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.reason, flush=True)
    if sys.argv[1] == "twice":
        time.sleep(60)
"""


def started(mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_interrupt_leaves_at_once():
    process = started("twice")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Ctrl-C again leaves at once" in errors
    assert "leaving at once, without saving" in errors


def test_a_second_sigterm_waits_for_the_save():
    process = started("twice")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # the user is in a hurry
    process.communicate()
    assert process.returncode == 130


def test_an_interrupt_counts_even_if_the_terminal_is_gone():
    process = started("closed")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert output == "SIGINT\n"
    assert process.returncode == 0


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
time.sleep(100)
"""
CHILD = """
import time
from job.preemption import StopRequest, stop_with_stdin
with StopRequest().on_signals() as stop:
    stop_with_stdin()
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
print("asked by", stop.reason, flush=True)
"""


def test_a_child_is_asked_to_stop_when_its_parent_is_killed():
    parent = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        # The end of the output is the child's end, too.
        assert process.stdout.read() == "asked by SIGTERM\n"


def test_a_closed_terminal_asks_to_stop_and_comes_twice():
    before = signal.getsignal(signal.SIGHUP)
    try:
        with StopRequest().on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason == "SIGHUP"
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # late: to the group of the session's leader
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_after_a_terminal_was_closed_fails_nothing():
    before = signal.getsignal(signal.SIGHUP)
    leader, terminal = os.openpty()
    try:
        with StopRequest().on_signals() as stop:
            stop._terminals = [terminal]
            os.kill(os.getpid(), signal.SIGHUP)
            os.close(leader)
            assert os.write(terminal, b"saving") == 6  # an error before
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(terminal)


def test_a_process_that_ignores_its_terminal_goes_on_without_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest().on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
