"""What training has printed, read back as the lines of a ledger; also out of a container's log."""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from job.errors import ConfigError, ExitCode
from job.monitor.divergence import BATCH_HALVED, ROLLED_BACK
from job.monitor.health import OUT_OF_MEMORY

DOCKER_PART = 16 * 1024
"""Bytes of a line from which on Docker's json-file driver writes it as several objects."""
_NUMBER = r"([-+\w.]+)"
_LOSSES = re.compile(
    rf"Iter +(\d+)/(\d+) +\| +Loss_CE: +{_NUMBER} +\| +Loss_FM: +{_NUMBER} +"
    rf"\| +Loss_ST: +{_NUMBER} +\| +Loss_D: +{_NUMBER} +\| +ST_Count: +(\d+)"
)
_EVALUATING = re.compile(r"Evaluating at iteration (\d+)")
_ROLLED_BACK = re.compile(r"Rolled back \(\d+ of \d+\) to iteration \d+")
_CHECK = re.compile(r"\[[ x]\] [A-Z]")
"""A line of the checklist."""
_FINISHED = re.compile(r"Finished after \d+ iterations")
_ERROR = re.compile(r"(?:^|\s)error: (.+)")
"""Of the program itself, or of Python, whose names of errors are capital letters and "Error"."""
_RAISED = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+)")
_STOPPED = re.compile(r"Stopped by .+; saved after iteration \d+")
_HALVED = re.compile(r"going on with batches of \d+")
_SCORE = re.compile(rf"(Training|Validation) mIoU: {_NUMBER}( ?%)?")
_CLASSES = re.compile(r"validation images, (\d+) classes\b")
_SCORES = ("train_miou", "val_miou")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
"""Of a terminal: colours, cursor, title. Source: ECMA-48, 5.3 to 5.6."""


def printed_text(text: str) -> str | None:
    """What was printed, out of what Docker or CloudWatch has wrapped it in.

    Taken apart are Docker's json-file (an object with "log" each line), what `aws logs
    filter-log-events` and `get-log-events` answer (objects with "message"), and a terminal's
    escapes. A prefix of each line (a time, a stream, a container) is left: lines are searched.

    Returns:
        None if it is a ledger, and not what was printed.
    """
    if text.lstrip()[:1] in ("{", "["):  # a bracket is also how `kubectl logs --prefix` begins
        first = next(_documents(text), None)
        if _cloudwatch_events(first) is not None:
            text = "\n".join(_messages(text))
        elif text.lstrip()[0] == "{" and _dockers(first) is None:
            return None
    return _ESCAPES.sub("", "".join(_without_docker(text)))


def events_of_console(text: str) -> Iterator[dict[str, Any]]:
    """The lines of a console log as a ledger's; of what was trained twice, the second time.

    Other text before, between and behind is passed over: `docker logs -t` puts a time before each
    line, and a progress bar leaves its own.

    Args:
        text: see `printed_text`.
    """
    events: list[dict[str, Any]] = []
    evaluating: dict[str, Any] = {}
    for line in re.split(r"[\r\n]+", text):
        if _CHECK.search(line):
            continue  # it may quote what ended an attempt before
        if found := _LOSSES.search(line):
            iteration, of, *losses, count = found.groups()
            values = [_float(one) for one in losses]
            if None in values or int(of) < 1:
                continue
            names = ("loss_ce", "loss_fm", "loss_st", "loss_d")
            event = {"event": "train", "iteration": int(iteration), "of": int(of)}
            _append(
                events, event | dict(zip(names, values, strict=True)) | {"st_count": int(count)}
            )
        elif found := _EVALUATING.search(line):
            evaluating = {"event": "eval", "iteration": int(found[1])}
        elif (found := _SCORE.search(line)) and evaluating:
            value = _float(found[2])
            if value is not None:
                name = _SCORES[found[1] == "Validation"]
                evaluating[name] = value / 100 if found[3] else value
            if evaluating.keys() >= set(_SCORES):
                _append(events, evaluating)
                evaluating = {}
        elif (why := OUT_OF_MEMORY) in line or (why := "training diverged") in line:
            events.append(
                {
                    "event": "attempt_ended",
                    "exit_code": ExitCode.DIVERGED if why != OUT_OF_MEMORY else 0,
                    "reason": line[line.index(why) :],
                    "reached": next(
                        (one["iteration"] for one in reversed(events) if "iteration" in one), 0
                    ),
                }
            )
            if _HALVED.search(line):
                events.append({"event": BATCH_HALVED})
        elif _ROLLED_BACK.search(line):
            events.append({"event": ROLLED_BACK})
        elif found := _STOPPED.search(line):
            ended = {"exit_code": ExitCode.PREEMPTED, "reason": found[0]}
            events.append({"event": "attempt_ended"} | ended)
        elif found := _RAISED.search(line) or _ERROR.search(line):
            # If training goes on after it, it was of a try before, or no end at all.
            ended = {"exit_code": ExitCode.SOFTWARE, "reason": found[1].strip()}
            events.append({"event": "attempt_ended"} | ended)
        elif _FINISHED.search(line):
            ended = {"exit_code": ExitCode.OK, "reason": "finished"}
            events.append({"event": "attempt_ended"} | ended)
    yield from events


def classes_said(text: str) -> int | None:
    """How many classes a run has said at its start that there are; None if it has not."""
    found = _CLASSES.search(text)
    return int(found[1]) if found else None


def scores_as_shares(events: Sequence[dict[str, Any]], shown: str) -> bool:
    """Make shares of 1 of scores that are percent; whether they were.

    Args:
        events: of a console log, whose scores are changed in place.
        shown: what to call the log in an error.

    Raises:
        ConfigError: they are neither the one nor the other.
    """
    evaluations = [event for event in events if event["event"] == "eval"]
    scores = [event[name] for event in evaluations for name in _SCORES]
    scores = [score for score in scores if math.isfinite(score)]
    odd = next((score for score in scores if not 0 <= score <= 1), None)
    if odd is None:
        return False
    # One score above 1 among many below is a fault, and no reason to divide them all.
    if min(scores) < 0 or max(scores) > 100 or statistics.median(scores) <= 1:
        raise ConfigError(
            f"{shown}: an mIoU of {odd:g} is no share of 1, and the scores are not percent either",
            mend="give a log whose scores are all from 0 to 1, or all percent",
        )
    for event in evaluations:
        event.update({name: event[name] / 100 for name in _SCORES})
    return True


# ---------------------------------------------------------------- what it is wrapped in


def _documents(text: str) -> Iterator[Any]:
    """The JSON values that a text consists of, up to what is none."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield value


def _cloudwatch_events(document: Any) -> list[dict[str, Any]] | None:
    """Of an answer of CloudWatch Logs, or of its `events` alone; None if it is something else."""
    events = document.get("events") if isinstance(document, dict) else document
    if not isinstance(events, list):
        return None
    if not all(isinstance(one, dict) and isinstance(one.get("message"), str) for one in events):
        return None
    return events


def _messages(text: str) -> list[str]:
    """Of all answers in a text, oldest first: one page after the other may be newest first."""
    events = [event for page in _documents(text) for event in _cloudwatch_events(page) or ()]
    if all(isinstance(event.get("timestamp"), int) for event in events):
        events.sort(key=lambda event: int(event["timestamp"]))
    return [event["message"] for event in events]


def _dockers(document: Any) -> str | None:
    """What was printed, if this is an object of Docker's json-file driver."""
    printed = document.get("log") if isinstance(document, dict) else None
    return printed if isinstance(printed, str) else None


def _without_docker(text: str) -> Iterator[str]:
    """Each line as it was printed, where Docker's json-file driver has wrapped it."""
    for line in text.split("\n"):
        document = None
        if line.startswith("{"):
            with contextlib.suppress(ValueError):  # cut off, where the file was rotated
                document = json.loads(line)
        printed = _dockers(document)
        if printed is None:
            yield line + "\n"
            continue
        # Other drivers leave the end of the line out.
        goes_on = len(printed.encode(errors="replace")) >= DOCKER_PART or printed.endswith("\n")
        yield printed if goes_on else printed + "\n"


# ---------------------------------------------------------------- small things


def _append(events: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """Drop what an attempt before had told of this iteration and later ones."""
    at, kind = event["iteration"], event["event"]
    stay = []
    while events and events[-1].get("iteration", at) >= at:  # from the end: a log may be long
        before = events.pop()
        if "iteration" not in before or (before["iteration"] == at and before["event"] != kind):
            stay.append(before)
    events += [*reversed(stay), event]


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
