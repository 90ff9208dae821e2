"""`StopRequest`: one flag that signals and notices raise and the training loop reads each time."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from job.errors import ExitCode, Preempted


class StopRequest:
    """Whether, and why, this attempt should save and leave. The first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deadline_s: float | None = None
        self._save_wanted = False
        self._terminals: list[int] = []
        """Descriptors of the output that end with the terminal."""

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self.reason is not None

    def request(self, reason: str, *, within_s: float | None = None) -> None:
        """Ask; callable from any thread.

        Args:
            reason: for the user.
            within_s: seconds until the machine is gone, if that is known.
        """
        if within_s is not None:
            deadline_s = time.monotonic() + within_s
            if self._deadline_s is None or deadline_s < self._deadline_s:
                self._deadline_s = deadline_s
        if self.reason is None:
            self.reason = reason

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the machine is gone; None if nobody knows of such a moment."""
        return None if self._deadline_s is None else self._deadline_s - time.monotonic()

    def request_save(self) -> None:
        """Ask for a checkpoint soon, without stopping; callable from any thread."""
        self._save_wanted = True

    def take_save_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        wanted, self._save_wanted = self._save_wanted, False
        return wanted

    def raise_if_requested(self) -> None:
        """For the stages before training, where there is nothing to save.

        Raises:
            Preempted: a stop was asked for.
        """
        if self.requested:
            raise Preempted(f"stopped by {self.reason} before training began")

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Within this block SIGTERM, SIGINT and SIGHUP set the flag; a second SIGINT ends all.

        SIGHUP, of a terminal that is closed, stays ignored where it is (nohup).
        """
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of a closed terminal
                    signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            _say(b"\nleaving at once, without saving\n")
            os._exit(ExitCode.KILLED_BY_USER)
        self.request(signal.Signals(number).name)
        if number == signal.SIGHUP:
            # It comes twice, to the leader of the session and to its group, and the second one may
            # be late. And whatever is still to be said would fail.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
        if number == signal.SIGINT:
            _say(b"\nfinishing this iteration, then saving (Ctrl-C again leaves at once)\n")


def stop_with_stdin() -> None:
    """Get SIGTERM when standard input ends.

    For a process whose standard input is a pipe that its parent holds open and writes nothing to:
    however the parent ends, killed too, the pipe ends with it.
    """
    threading.Thread(target=_await_end_of_stdin, name="stdin", daemon=True).start()


def _await_end_of_stdin() -> None:
    # os.read, not sys.stdin, whose lock a thread must not hold while the interpreter ends.
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _say(text: bytes) -> None:
    # os.write, not print: the handler may interrupt a print, whose buffer is not re-entrant. With
    # nobody to read it (the terminal is closed) the stop still counts.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.__stderr__.fileno(), text)  # type: ignore[union-attr]
