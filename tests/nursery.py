"""Attempts that begin at once: forked from a process that has imported everything already.

Importing torch takes a process seven seconds of a core, more than a whole run of the tests. So one
process per test worker imports it, and attempts are its grandchildren, otherwise like those of
`python -m job`: environment, folder, output, process group and signals of their own. A test that
is about the start itself, or about loader processes, uses a plain `AttemptProcess`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from job.drill.attempt import AttemptProcess


class ForkedAttempt(AttemptProcess):
    """See `AttemptProcess`."""

    def _launch(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        return _Forked(arguments, environment)  # type: ignore[return-value]


class _Forked:
    """What `AttemptProcess` needs of a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        out, out_end = os.pipe()
        self._status, status_end = os.pipe()
        nursery = _nursery()
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        here = f"/proc/{os.getpid()}/fd"
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": os.getcwd(),
            "out": f"{here}/{out_end}",
            "status": f"{here}/{status_end}",
        }
        print(json.dumps(request), file=nursery.stdin, flush=True)
        self.pid = int(nursery.stdout.readline())
        os.close(out_end)
        os.close(status_end)
        self.stdout: IO[str] = os.fdopen(out, encoding="utf-8", errors="replace")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(os.read(self._status, 20))
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """See `subprocess.Popen.wait`."""
        if self.returncode is None:
            select.select([self._status], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("attempt", timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """See `subprocess.Popen.send_signal`."""
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """Ends when this process does, as its stdin is closed then."""
    code = "from tests.nursery import serve; serve(); from job.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
    )


def serve() -> None:
    """Fork a process for each line of stdin; returns in those processes, ready for `main`."""
    importlib.import_module("job.app")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            _become_attempt(request)
            return
    os._exit(0)


def _become_attempt(request: dict[str, object]) -> None:
    """Of the two processes after this, one watches the other and reports its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = os.open(str(request["status"]), os.O_WRONLY)
    out = os.open(str(request["out"]), os.O_WRONLY)
    child = os.fork()
    if child:
        os.close(out)
        os.write(sys.stdout.fileno(), b"%d\n" % child)
        os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdout.fileno())
        _, code = os.waitpid(child, 0)
        os.write(status, str(os.waitstatus_to_exitcode(code)).encode())
        os._exit(0)
    os.setsid()
    os.close(status)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.chdir(str(request["folder"]))
    environment = request["environment"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    arguments = request["arguments"]
    assert isinstance(arguments, list)
    sys.argv = ["s4gan", *arguments]
