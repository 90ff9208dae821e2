"""The ledger `metrics.jsonl`: one JSON object a line, the truth that reports and W&B are made from.

Lines with an "iteration" belong to that iteration and vanish when it is rolled back; lines without
(an attempt's start and end, its checkpoints) are the run's history and stay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job import run
from job.checkpoint.lease import Lease
from job.errors import STORAGE_FAILURES, ConfigError, Fenced, RunDeleted, StorageError
from job.events import EvalEvent, Notice, TrainEvent
from job.storage import ObjectStore, open_store

log = logging.getLogger(__name__)

MIRROR_EVERY_S = 30.0
"""Between two uploads of a ledger that has grown."""


_LARGEST = 2**53
"""Of whole numbers: larger ones a float does not hold to the last digit, or not at all."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_score(value: Any) -> bool:
    return _is_number(value) and (0 <= value <= 1 or not math.isfinite(value))


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1e11  # up to the year 5138; NaN is no time


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_numbers(value: Any) -> bool:
    return _is_list(value) and all(one is None or _is_number(one) for one in value)


def _is_names(value: Any) -> bool:
    return _is_list(value) and all(map(_is_text, value))


_Kind = tuple[Callable[[Any], bool], str]
_NUMBER: _Kind = (_is_number, "a number")
_SCORE: _Kind = (_is_score, "from 0 to 1 (divide percent by 100)")
_WHOLE: _Kind = (_is_whole, "a whole number")
_COUNT: _Kind = (_is_count, "a number from 0 on")
_POSITIVE: _Kind = (_is_positive, "a number from 1 on")
_TIME: _Kind = (_is_time, "seconds since 1970")
_TEXT: _Kind = (_is_text, "text")
_LIST: _Kind = (_is_list, "a list")
_MAPPING: _Kind = (_is_mapping, "an object")
_END: _Kind = (lambda value: value is None or _is_count(value), "null or a number from 0 on")
_NUMBERS: _Kind = (_is_numbers, "a list of numbers")
_NAMES: _Kind = (_is_names, "a list of names")

_ALWAYS: Mapping[str, Mapping[str, _Kind]] = {
    "train": {"iteration": _COUNT, "images_per_s": _NUMBER},
    "eval": {"iteration": _COUNT, "train_miou": _SCORE, "val_miou": _SCORE},
    "training_started": {"resumed_at": _COUNT},
    "origin": {"data_uri": _TEXT, "classes": _NAMES, "provenance": _MAPPING},
    "machine": {"instance_type": _TEXT},
    "checkpoint": {"saved_at": _COUNT},
    "health": {"iteration": _COUNT, "rule": _TEXT, "ended": _END},
    "attempt_ended": {"exit_code": _WHOLE, "reason": _TEXT},
}
"""What each line of a kind has, beside its time and its attempt."""
_IF_THERE: Mapping[str, _Kind] = {
    "iteration": _COUNT,
    **dict.fromkeys(("loss_ce", "loss_fm", "loss_st", "loss_d", "lr_g", "lr_d"), _NUMBER),
    "loss_mlmt": _NUMBER,
    "st_count": _NUMBER,
    "pixel_accuracy": _NUMBER,
    "changes": _LIST,
    "class_iou": _NUMBERS,
    "job": _TEXT,
    "job_attempt": _COUNT,
    "gpus": _POSITIVE,
    "nodes": _POSITIVE,
    "predecessor": _COUNT,
    "reached": _COUNT,
    "predecessor_last_seen": _TIME,
    "life_cycle": _TEXT,
    "zone": _TEXT,
    "fingerprint": _TEXT,
}
"""What lines may have, of whatever kind."""
_SHOWN = 40
"""Characters of a wrong value that an error shows."""
_CHANGED = "the file was changed from outside: remove that line"


def open_run(named: str) -> ObjectStore:
    """The store of a run, which may be named by its ledger, too.

    Raises:
        ConfigError: it is another file.
    """
    place = f"./{named}" if named == run.LEDGER else named
    if place.endswith(f"/{run.LEDGER}"):
        return open_store(place.removesuffix(run.LEDGER))
    if os.path.isfile(place):
        raise ConfigError(
            f"{named}: is a file, and no run",
            mend="give the run's folder or s3:// prefix; of a file alone: s4gan diagnose FILE",
        )
    return open_store(named)


def read_ledger(path: Path, shown: str = "") -> list[dict[str, Any]]:
    """All lines of a ledger; none if there is no file.

    A last line that a killed process left half-written is dropped.

    Args:
        path: of the file.
        shown: what to call it in an error; its path if empty.

    Raises:
        StorageError: any other line is broken, or lacks what its readers rely on.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError.from_os("read", path, error) from error
    return parse_ledger(text, shown or str(path))


def parse_ledger(text: bytes, shown: str) -> list[dict[str, Any]]:
    """All lines of a ledger's content; see `read_ledger`."""
    lines = text.split(b"\n")
    lines.pop()  # empty, or a line whose end was never written
    while lines and not lines[-1].strip():  # of an editor
        lines.pop()
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise StorageError(
                f"{shown}: line {number} is no event",
                mend=_CHANGED,
            )
        _check(event, f"{shown}: line {number}")
        events.append(event)
    return events


def _check(event: Mapping[str, Any], where: str) -> None:
    """That a line has what every reader of the ledger relies on."""
    always = {"time": _TIME, "attempt": _POSITIVE, **_ALWAYS.get(event["event"], {})}
    if_there = {name: kind for name, kind in _IF_THERE.items() if name in event}
    for name, (holds, wanted) in {**if_there, **always}.items():
        if not holds(event.get(name)):
            raise StorageError(
                f"{where}: {name} is {_short(event.get(name))}, not {wanted}",
                mend=_CHANGED,
            )


def _short(value: Any) -> str:
    """As much of it as one wants to read."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def best_of(events: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The "eval" line of the best validation mIoU, the first of equals; None if there is none.

    A score that is no number is not the best.
    """
    scored = (one for one in events if one["event"] == "eval" and math.isfinite(one["val_miou"]))
    return max(scored, key=lambda event: event["val_miou"], default=None)


class Ledger:
    """A tracker that appends to a file, each line on the disk before its caller goes on.

    Any thread may append.

    Args:
        path: of the file; what a killed process left half-written at its end is cut off.
        attempt: written into every line.
        shown: what to call the file in an error.
    """

    def __init__(self, path: Path, *, attempt: int, shown: str = "") -> None:
        self.path = path
        self.reached = 0
        """The highest iteration that a line is of."""
        self._attempt = attempt
        self._lock = threading.Lock()
        self._write_anew(read_ledger(path, shown))

    def rewind(self, *, iteration: int, evaluated_iteration: int) -> list[dict[str, Any]]:
        """Drop the lines of a future that will be trained again, and return them.

        Args:
            iteration: where this attempt begins; lines of later ones are dropped.
            evaluated_iteration: the last evaluation that counts; a later one's line is dropped.
        """
        with self._lock:
            self._file.close()
            kept: list[dict[str, Any]] = []
            dropped: list[dict[str, Any]] = []
            for event in read_ledger(self.path):
                last = evaluated_iteration if event["event"] == "eval" else iteration
                # That a finding is over was told then, not when it was found.
                told_at = max(event.get("iteration", 0), event.get("ended") or 0)
                (kept if told_at <= last else dropped).append(event)
            self._write_anew(kept)
            return dropped

    def train(self, event: TrainEvent) -> None:
        """Append a "train" line."""
        self._append("train", event.to_dict())

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
        """Close the file; what a full disk does not take has been said by then."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_anew(self, events: list[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".tmp-{self.path.name}")
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(_line(event) for event in events)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
            self.reached = max((event.get("iteration", 0) for event in events), default=0)
        except OSError as error:
            raise StorageError.from_os("write", self.path, error) from error

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        head: dict[str, Any] = {"event": kind}
        if "iteration" in fields:
            head["iteration"] = fields["iteration"]
        head |= {"attempt": self._attempt, "time": round(time.time(), 3)}
        with self._lock:
            if self._file.closed:
                return  # a thread that was left behind because time ran out
            try:
                self._file.write(_line(head | dict(fields)))
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise StorageError.from_os("write", self._file.name, error) from error
            self.reached = max(self.reached, fields.get("iteration", 0))


class LedgerMirror:
    """Keeps the ledger of a run in a bucket up to date with the local file it grows in.

    Where the run is a folder the ledger grows in place, and there is nothing to do.

    Args:
        store: the run's.
        lease: of this attempt: only its holder may write the ledger.
        path: of the local file, which is made from the run's here.
    """

    def __init__(self, store: ObjectStore, lease: Lease, path: Path) -> None:
        self._lease = lease
        self._path = path
        self._in_place = store.local_path(run.LEDGER) is not None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._published = b""
        self._version = ""
        if not self._in_place:
            self._published, self._version = store.read_versioned(run.LEDGER)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._published)
        self._thread = threading.Thread(target=self._keep_publishing, name="ledger", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Make durable what has been written so far.

        Raises:
            Fenced: another attempt has taken over.
            StorageError: the storage failed.
        """
        if self._in_place:
            return
        with self._lock:
            try:
                text = self._path.read_bytes()
            except OSError as error:
                raise StorageError.from_os("read", self._path, error) from error
            whole_lines = text[: text.rfind(b"\n") + 1]
            if whole_lines != self._published:
                self._version = self._lease.publish(run.LEDGER, whole_lines, self._version)
                self._published = whole_lines

    def close(self) -> None:
        """Publish a last time, as well as the storage allows."""
        self._done.set()
        self._thread.join()
        try:
            self.publish()
        except (Fenced, RunDeleted, *STORAGE_FAILURES) as error:
            log.info("the ledger was not published: %s", error.message)

    def _keep_publishing(self) -> None:
        while not self._in_place and not self._done.wait(MIRROR_EVERY_S):
            try:
                self.publish()
            except (Fenced, RunDeleted):
                return  # the lease tells whom it concerns
            except STORAGE_FAILURES as error:
                log.info("ledger not published, trying again: %s", error.message)


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, allow_nan=False) + "\n"
