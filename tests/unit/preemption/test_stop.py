"""Signals raise a flag; nothing else happens until the loop looks at it."""

from __future__ import annotations

import os
import signal

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
