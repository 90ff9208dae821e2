"""The console: the monitoring guide's lines to the letter, and a progress bar on a terminal."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from job.events import EvalEvent, Notice, TrainEvent

RULE = "=" * 60


class SafeConsole(Console):
    """A console whose reader may go away (`s4gan train | head`) without ending the training."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich prints; a disk that takes no more output silences it."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Write no more, instead of rich's own exit."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console() -> SafeConsole:
    """A console on standard output that also works where the locale has no check mark."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return SafeConsole(highlight=False, markup=False, emoji=False, soft_wrap=True)


def train_line(event: TrainEvent, iterations: int) -> str:
    """The guide's line of losses."""
    return (
        f"Iter {event.iteration}/{iterations} | Loss_CE: {event.loss_ce:.3f} | "
        f"Loss_FM: {event.loss_fm:.3f} | Loss_ST: {event.loss_st:.3f} | "
        f"Loss_D: {event.loss_d:.3f} | ST_Count: {event.st_count}"
    )


def evaluation_head(iteration: int) -> str:
    """The guide's lines before an evaluation."""
    return f"\n{RULE}\nEvaluating at iteration {iteration}...\n{RULE}"


def evaluation_lines(event: EvalEvent) -> str:
    """The guide's lines after an evaluation."""
    lines = [
        f"Training mIoU: {event.train_miou:.4f}",
        f"Validation mIoU: {event.val_miou:.4f}",
    ]
    if event.is_best:
        before = "" if event.previous_best is None else f" (previous: {event.previous_best:.4f})"
        lines.append(f"\u2713 New best validation mIoU: {event.val_miou:.4f}{before}")
    return "\n".join([*lines, RULE])


class ConsoleTracker:
    """A tracker that prints. Use as a context: the progress bar lives within.

    Args:
        console: where to.
        iterations: of the whole run.
        start: iterations already done.
    """

    def __init__(self, console: Console, iterations: int, start: int) -> None:
        self._console = console
        self._iterations = iterations
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            _ImagesPerSecond(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("train", total=iterations, completed=start, rate="")

    def __enter__(self) -> ConsoleTracker:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def train(self, event: TrainEvent) -> None:
        """Print the line of losses."""
        self._progress.update(self._task, rate=f"{event.images_per_s:.1f} images/s")
        self._console.print(train_line(event, self._iterations))

    def evaluation_started(self, iteration: int) -> None:
        """Print the head of the block."""
        self._console.print(evaluation_head(iteration))

    def evaluation(self, event: EvalEvent) -> None:
        """Print the rest of the block."""
        self._console.print(evaluation_lines(event))

    def step_done(self, iteration: int) -> None:
        """Move the bar, if there is one; where it is not drawn, a tenth of a millisecond."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=iteration)

    def notice(self, notice: Notice) -> None:
        """Print the sentence."""
        if notice.message:
            self._console.print(notice.message)


class _ImagesPerSecond(ProgressColumn):
    """The rate of the last line of losses."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("rate", "")))
