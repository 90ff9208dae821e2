"""The ledger `metrics.jsonl`: one JSON object a line, the truth that reports and W&B are made from.

Lines with an "iteration" belong to that iteration and vanish when it is rolled back; lines without
(an attempt's start and end) are the run's history and stay.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job.errors import StorageError
from job.events import EvalEvent, Notice, TrainEvent


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """All lines of a ledger; none if there is no file.

    A last line that a killed process left half-written is dropped.

    Raises:
        StorageError: any other line is broken.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError.from_os("read", path, error) from error
    lines.pop()  # empty, or a line whose end was never written
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            raise StorageError(
                f"{path}: line {number} is no event",
                mend="the file was changed from outside: remove that line",
            )
        events.append(event)
    return events


class Ledger:
    """A tracker that appends to a file, each line on the disk before training goes on.

    Args:
        path: of the file.
        attempt: written into every line.
        iteration: where this attempt begins; lines of later ones are dropped.
        evaluated_iteration: the last evaluation that counts; a later one's line is dropped.
    """

    def __init__(
        self, path: Path, *, attempt: int, iteration: int, evaluated_iteration: int
    ) -> None:
        self._attempt = attempt
        kept = [
            event
            for event in read_ledger(path)
            if event.get("iteration", 0)
            <= (evaluated_iteration if event["event"] == "eval" else iteration)
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tmp-{path.name}")
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(_line(event) for event in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise StorageError.from_os("write", path, error) from error

    def train(self, event: TrainEvent) -> None:
        """Append a "train" line."""
        self._append("train", asdict(event))

    def evaluation_started(self, iteration: int) -> None:
        """Nothing: the result is what counts."""

    def evaluation(self, event: EvalEvent) -> None:
        """Append an "eval" line."""
        self._append("eval", asdict(event))

    def step_done(self, iteration: int) -> None:
        """Nothing."""

    def notice(self, notice: Notice) -> None:
        """Append a line of the notice's own kind."""
        self._append(notice.kind, notice.fields)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        head: dict[str, Any] = {"event": kind}
        if "iteration" in fields:
            head["iteration"] = fields["iteration"]
        head |= {"attempt": self._attempt, "time": round(time.time(), 3)}
        try:
            self._file.write(_line(head | dict(fields)))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError.from_os("write", self._file.name, error) from error


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, allow_nan=False) + "\n"
