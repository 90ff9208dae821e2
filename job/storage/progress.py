"""How far a transfer is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_EVERY_S = 10.0


class TransferProgress(Protocol):
    """Told by a transfer what it does; from one thread at a time."""

    def say(self, text: str) -> None:
        """Something the user should know now."""

    def begin(self, what: str, files: int, size: int) -> None:
        """So many files are going to be moved, of so many bytes; 0 bytes: the files are counted."""

    def advance(self, files: int, size: int) -> None:
        """So many more of them are there."""

    def end(self) -> None:
        """Nothing more comes, whether all arrived or not."""


class Silent:
    """A `TransferProgress` that shows nothing."""

    def say(self, text: str) -> None:
        """See `TransferProgress.say`."""

    def begin(self, what: str, files: int, size: int) -> None:
        """See `TransferProgress.begin`."""

    def advance(self, files: int, size: int) -> None:
        """See `TransferProgress.advance`."""

    def end(self) -> None:
        """See `TransferProgress.end`."""


class ConsoleProgress:
    """A `TransferProgress` on a console.

    Args:
        console: where; a bar if it is a terminal, otherwise a line every LINE_EVERY_S.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what = ""
        self._files = self._files_done = self._size = self._done = 0
        self._began_s = self._line_s = 0.0

    def say(self, text: str) -> None:
        """See `TransferProgress.say`."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, what: str, files: int, size: int) -> None:
        """See `TransferProgress.begin`."""
        self._what, self._files, self._size = what, files, size
        self._files_done = self._done = 0  # the latter in bytes, or in files if those are counted
        self._began_s = self._line_s = self._clock()
        if self._console.is_terminal and files:
            count = TextColumn("{task.fields[files]}")
            columns = (DownloadColumn(), count, TransferSpeedColumn()) if size else (count,)
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                *columns,
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=self._whole, files=self._count())
            self._bar.start()

    def advance(self, files: int, size: int) -> None:
        """See `TransferProgress.advance`."""
        self._files_done += files
        step = size if self._size else files
        self._done += step
        if self._bar is not None:
            self._bar.update(self._task, advance=step, files=self._count())
        elif self._clock() - self._line_s >= LINE_EVERY_S:
            self._line_s = self._clock()
            self.say(f"{self._what}: {self._count()}, {self._moved()}{self._rate()}{self._left()}")

    def end(self) -> None:
        """See `TransferProgress.end`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _whole(self) -> int:
        return self._size or self._files

    def _count(self) -> str:
        return f"{self._files_done} of {self._files} files"

    def _moved(self) -> str:
        if not self._size:
            return ""
        return f"{megabytes(self._done)} of {megabytes(self._size)}, "

    def _rate(self) -> str:
        seconds = max(self._clock() - self._began_s, 1e-3)
        rate = self._done / seconds
        return f"{rate / 1e6:.1f} MB/s" if self._size else f"{rate:.1f} a second"

    def _left(self) -> str:
        if not 0 < self._done < self._whole:
            return ""
        seconds = self._clock() - self._began_s
        return f", {seconds * (self._whole / self._done - 1):.0f} s left"


def megabytes(size: float) -> str:
    """Bytes for people: 3 MB, 1.2 GB."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    if size >= 1e7:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
