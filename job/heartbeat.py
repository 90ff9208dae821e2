"""Tells a process that gets on from one that hangs, to whoever looks from outside.

Whatever does a piece of a run's work (a training step, an image evaluated or checked, a part of a
file moved) calls `beat`. `python -m job.heartbeat` is the container's health check: it fails when
the last beat is too long ago. A process that runs is not enough: one that waits for a dead disk,
GPU or peer runs too. AWS Batch does not ask for a container's health, so `watch` looks from within.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "S4GAN_HEARTBEAT"
"""Names the file whose modification time is the last beat; set in the image, where it lies in
memory of the container's own. Unset: nobody looks, and nothing is written."""
MINUTES = 10.0
"""More than anything takes that cannot beat: to import torch from a cold disk, to compile, to wait
for another attempt's lease, to write a checkpoint."""
BEAT_EVERY_S = 1.0

LOOK_EVERY_S = 10.0

_last_s = 0.0
_beats = 0


def beat() -> None:
    """Say that a piece of work was done; costs nothing when it was said a moment ago.

    Never an error: a run does not end because its health cannot be told.
    """
    global _last_s, _beats
    _beats += 1
    now_s = time.monotonic()
    if now_s - _last_s < BEAT_EVERY_S:
        return
    _last_s = now_s
    if path := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            Path(path).touch()


@contextlib.contextmanager
def watch(minutes: float, stalled: Callable[[float], None]) -> Iterator[None]:
    """Within this block a thread calls `stalled` when there was no beat for so long, once.

    Time in which the whole process was stopped, or its machine slept, does not count.

    Args:
        minutes: without a beat; 0 never is too long.
        stalled: is given the minutes, on that thread.
    """
    done = threading.Event()
    if minutes > 0:
        thread = threading.Thread(
            target=_watch, args=(minutes, stalled, done), name="stall-watch", daemon=True
        )
        thread.start()
    try:
        yield
    finally:
        done.set()


def _watch(minutes: float, stalled: Callable[[float], None], done: threading.Event) -> None:
    seen, silent_s, then_s = _beats, 0.0, time.monotonic()
    while not done.wait(LOOK_EVERY_S):
        now_s = time.monotonic()
        silent_s += min(now_s - then_s, 2 * LOOK_EVERY_S)  # more than that was no time of ours
        then_s = now_s
        if _beats != seen:
            seen, silent_s = _beats, 0.0
        if silent_s >= 60 * minutes:
            stalled(silent_s / 60)
            return


def main() -> None:
    """Exit 0 if there was a beat within the last minutes, else 1 with a line that says so."""
    parser = argparse.ArgumentParser(prog="python -m job.heartbeat", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="[%(default)g]")
    minutes = parser.parse_args().minutes
    path = os.environ.get(VARIABLE)
    if not path:
        sys.exit(f"{VARIABLE} is not set: nothing is known of the run")
    try:
        # The wall clock, for files know no other. One set back makes a beat of the future: alive.
        silent_s = time.time() - os.stat(path).st_mtime
    except OSError:
        sys.exit("the run has not begun yet")
    if silent_s > 60 * minutes:
        sys.exit(f"stalled: nothing was done for {silent_s / 60:.0f} minutes")
    print(f"at work {max(silent_s, 0):.0f} s ago")


if __name__ == "__main__":
    main()
