"""One attempt at a run as a process of its own, watched by its console lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from job.errors import JobError

PATIENCE_S = 300.0
"""For a line that has to come, or an end; far above what it takes on a slow machine."""


class UnexpectedEnd(JobError):
    """An attempt has not done what it should have; the message holds its last lines."""


class AttemptProcess:
    """`s4gan ARGUMENTS...` in a process group of its own, its output read as it comes.

    Args:
        arguments: of the command line.
        environment: added to this process's.
        log: file that gets the output too.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.began_s = time.monotonic()
        self.ended_s: float | None = None
        self.lines: list[str] = []
        self._arrived = threading.Condition()
        self._read_upto = 0
        self._over = False
        self._log = log
        self.process = self._launch(
            arguments,
            {
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "PYTHONIOENCODING": "utf-8",
                **(environment or {}),
            },
        )
        self._reader = threading.Thread(target=self._read, name="attempt-output", daemon=True)
        self._reader.start()

    def _launch(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "job", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """All lines so far."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str) -> str:
        """The next line that matches, after the one this returned before.

        Raises:
            UnexpectedEnd: the process ended, or PATIENCE_S passed, without one.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        with self._arrived:
            while True:
                while self._read_upto < len(self.lines):
                    line = self.lines[self._read_upto]
                    self._read_upto += 1
                    if re.search(pattern, line):
                        return line
                if self._over or time.monotonic() > deadline_s:
                    break
                self._arrived.wait(1.0)
        raise UnexpectedEnd(f"no line matched {pattern!r}:\n{self._tail()}")

    def wait_for_iteration(self, iteration: int) -> str:
        """The line of this iteration's losses, or of a later one if it resumed beyond."""
        while True:
            line = self.wait_for(r"^Iter \d+/")
            if _iteration_of(line) >= iteration:
                return line

    @property
    def reached(self) -> int:
        """The last iteration whose losses were printed; 0 before the first."""
        for line in reversed(self.lines):
            if re.match(r"Iter \d+/", line):
                return _iteration_of(line)
        return 0

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the attempt (not to its loaders)."""
        self.process.send_signal(number)

    def finish(self) -> int:
        """Wait for the end; returns the exit status (negative for a signal).

        Raises:
            UnexpectedEnd: it does not end.
        """
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise UnexpectedEnd(f"it does not end:\n{self._tail()}") from None
        self._reader.join()
        return code

    def kill(self) -> None:
        """Kill whatever still runs of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for text in stream:
                self._take(text.rstrip("\n"))
        self.ended_s = time.monotonic()
        with self._arrived:
            self._over = True
            self._arrived.notify_all()

    def _take(self, line: str) -> None:
        with self._arrived:
            self.lines.append(line)
            self._arrived.notify_all()
        if self._log is not None:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _tail(self) -> str:
        return "\n".join(self.lines[-25:])


def _iteration_of(line: str) -> int:
    return int(line.removeprefix("Iter ").partition("/")[0])
