"""Ending an attempt that hangs, so that the next one can go on on another machine.

The scheduler sees only that the process runs; a GPU that has fallen off its bus, or a disk that
answers no more, would be paid for until the job's time is up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from job import heartbeat
from job.errors import ConfigError, ExitCode, Stalled
from job.events import Notice
from job.monitor.attempts import crash_loop, fingerprint
from job.monitor.ledger import read_ledger

VARIABLE = "S4GAN_STALL_MINUTES"
MINUTES = 60.0
"""Without any work; far above what a step, an image or a part of a file takes. Waiting for a
storage that is down is no work either."""
LAST_WORDS_S = 30.0
"""For the ledger; it may be its disk, or the network, that hangs."""


def stall_minutes() -> float:
    """After how long without any work an attempt is taken to hang; 0: never.

    Raises:
        ConfigError: the variable holds no such number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        minutes = float(text) if text else MINUTES
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < math.inf:
        raise ConfigError(
            f"{VARIABLE}={text}: must be a number of minutes", mend="0 turns the watch off"
        )
    return minutes


@contextlib.contextmanager
def watch_stall(
    minutes: float, ledger: Path, tell: Callable[[Notice], None], publish: Callable[[], None]
) -> Iterator[None]:
    """Within this block the process ends, to be tried again, when nothing is done for so long.

    It ends from beside, for what hangs can neither be interrupted nor asked.

    Args:
        minutes: without any work; 0: never.
        ledger: on this machine.
        tell: takes the last words for console and ledger, on another thread.
        publish: makes the ledger durable.
    """

    def end(silent_minutes: float) -> None:
        faulthandler.dump_traceback()
        error = Stalled(
            f"nothing was done for {silent_minutes:.0f} minutes; where each thread waits is said "
            "above"
        )
        ending = {
            "reason": error.message,
            "exit_code": int(error.exit_code),
            "fingerprint": fingerprint(error),
        }

        code = [error.exit_code]

        def say() -> None:
            tell(Notice("attempt_ended", f"error: {error.message}", ending))
            if crash_loop(read_ledger(ledger)) is not None:
                code[0] = ExitCode.NO_PROGRESS
                tell(Notice("gave_up", "error: several attempts in a row hung, and saved nothing"))
            publish()

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(LAST_WORDS_S)
        os._exit(code[0])

    with heartbeat.watch(minutes, end):
        yield
