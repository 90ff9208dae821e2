"""What the ledger says of a run's attempts: how often interrupted, and whether it is stuck."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from job.checkpoint.interval import InterruptionHistory
from job.errors import ExitCode, RankLost, Stalled, reason

MAX_ALIKE = 3
"""Attempts that may fail alike without a new checkpoint. Source: NVIDIA Resiliency Extension's
`max_no_progress_cycles`."""
_INTERRUPTED = (None, ExitCode.PREEMPTED, ExitCode.FENCED, ExitCode.KILLED_BY_USER)
_TRIED_AGAIN = (f"{RankLost.__qualname__}:", f"{Stalled.__qualname__}:")
"""Failures all the same: what ended one of the processes, or made it hang, may do so again."""
_MAY_PASS = (ExitCode.SOFTWARE, ExitCode.IO_ERROR, ExitCode.PREEMPTED)
"""Failures that somebody may hope to be over at the next attempt."""


@dataclass
class Attempt:
    """One attempt, as far as the ledger knows it."""

    number: int
    started: float
    """Seconds since 1970."""
    last_seen: float
    exit_code: int | None = None
    """None: it was killed."""
    reason: str = ""
    fingerprint: str = ""
    """Equal for two failures that are the same but for numbers."""
    saved_at: int | None = None
    """Iteration of its newest checkpoint."""
    resumed_at: int | None = None
    """Iteration it went on from; None: it did not come to train."""
    training_since: float | None = None
    """Seconds since 1970."""
    marks: list[tuple[int, float]] = field(default_factory=list)
    """(iteration, seconds since 1970) of its ledger lines that were not rolled back."""
    saves: dict[int, float] = field(default_factory=dict)
    """When each of its checkpoints was durable, by iteration."""
    counts_until: float | None = None
    """Seconds since 1970; what was trained later was lost. As close as ledger lines and
    checkpoints tell."""
    job: str = ""
    """The scheduler's id of the job; empty outside of one."""
    job_attempt: int = 0
    """The scheduler's number of this try of the job."""
    gpus: int = 1
    """Processes that trained together."""
    nodes: int = 1
    """Machines they were on."""
    instance_type: str = ""
    """Of EC2; empty elsewhere."""
    life_cycle: str = ""
    """`spot` or `on-demand`; empty outside of EC2."""
    zone: str = ""
    """Availability zone; empty outside of EC2."""

    @property
    def reached(self) -> int | None:
        """Last iteration in the ledger that was not rolled back."""
        return self.marks[-1][0] if self.marks else None

    @property
    def busy_s(self) -> float:
        """From its first to its last sign of life, seconds."""
        return self.last_seen - self.started

    @property
    def useful_s(self) -> float:
        """Of those, spent on iterations that count."""
        if self.training_since is None or self.counts_until is None:
            return 0.0
        return max(0.0, self.counts_until - self.training_since)

    @property
    def redone_s(self) -> float:
        """Of those, spent on iterations that were lost, so that they are trained again."""
        if self.training_since is None or self.exit_code == ExitCode.OK:
            return 0.0
        return self.busy_s - self.startup_s - self.useful_s

    @property
    def startup_s(self) -> float:
        """Of those, before the first iteration."""
        began = self.last_seen if self.training_since is None else self.training_since
        return began - self.started

    @property
    def was_interrupted(self) -> bool:
        """By the machine or the user, not by a fault."""
        return self.exit_code in _INTERRUPTED and not self.fingerprint.startswith(_TRIED_AGAIN)


def attempts_of(events: Iterable[Mapping[str, Any]]) -> list[Attempt]:
    """The attempts of a run, in order.

    Args:
        events: its ledger.
    """
    found: dict[int, Attempt] = {}
    for event in events:
        number = event.get("attempt")
        if number is None:
            continue
        if event["event"] == "attempt_started":
            found[number] = Attempt(
                number,
                started=event["time"],
                last_seen=event["time"],
                job=event.get("job", ""),
                job_attempt=event.get("job_attempt", 0),
                gpus=event.get("gpus", 1),
                nodes=event.get("nodes", 1),
            )
            before = found.get(event.get("predecessor", 0))
            if before is not None and event.get("predecessor_last_seen"):
                # Its lease was renewed longer than its ledger was published.
                before.last_seen = max(before.last_seen, event["predecessor_last_seen"])
        attempt = found.get(number)
        if attempt is None:
            continue
        attempt.last_seen = max(attempt.last_seen, event["time"])
        if "iteration" in event and event["event"] != "health":  # told by a thread that lags
            attempt.marks.append((event["iteration"], event["time"]))
        if event["event"] == "training_started":
            attempt.resumed_at = event["resumed_at"]
            attempt.training_since = event["time"]
        elif event["event"] == "machine":
            attempt.instance_type = event["instance_type"]
            attempt.life_cycle = event.get("life_cycle", "")
            attempt.zone = event.get("zone", "")
        elif event["event"] == "checkpoint":
            attempt.saved_at = event["saved_at"]
            attempt.saves[event["saved_at"]] = event["time"]
        elif event["event"] == "attempt_ended":
            attempt.exit_code = event["exit_code"]
            attempt.reason = event["reason"]
            attempt.fingerprint = event.get("fingerprint", "")
    ordered = [found[number] for number in sorted(found)]
    for number, attempt in enumerate(ordered):
        later = [after.resumed_at for after in ordered[number + 1 :]]
        attempt.counts_until = _counts_until(attempt, [at for at in later if at is not None])
    return ordered


def last_that_counts(attempts: Sequence[Attempt]) -> Attempt | None:
    """The last attempt; of a finished run the one that finished it, whatever failed to begin later.

    Args:
        attempts: `attempts_of`.
    """
    if not attempts:
        return None
    trained = next((one for one in reversed(attempts) if one.resumed_at is not None), None)
    if trained is not None and trained.exit_code == ExitCode.OK and attempts[-1].exit_code:
        return trained
    return attempts[-1]


def lines_that_count(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of `last_that_counts`; all of a log, which knows no attempts.

    Args:
        events: a ledger's, or a log's.
    """
    events = list(events)
    last = last_that_counts(attempts_of(events))
    return [event for event in events if last is None or event.get("attempt") == last.number]


def kept_iteration(attempts: Sequence[Attempt]) -> int:
    """The iteration that a next attempt would go on from.

    Args:
        attempts: `attempts_of`.
    """
    for attempt in reversed(attempts):
        if attempt.saved_at is not None:
            return attempt.saved_at
        if attempt.resumed_at is not None:
            return attempt.resumed_at
    return 0


def _counts_until(attempt: Attempt, gone_on_from: Sequence[int]) -> float | None:
    """When it had done the last of what counts.

    That is nothing after the earliest iteration that a later attempt went on from; and if none has
    yet, nothing after its newest checkpoint, unless it came to the end.
    """
    kept = min(gone_on_from, default=attempt.saved_at)
    if not gone_on_from and attempt.exit_code == ExitCode.OK:
        kept = attempt.reached
    if kept is None:
        return None
    done = max((at for iteration, at in attempt.marks if iteration <= kept), default=None)
    lost = min((at for iteration, at in attempt.marks if iteration > kept), default=None)
    # A checkpoint tells more exactly than the lines, but is durable only some time later.
    saved = attempt.saves.get(kept)
    if saved is not None and lost is not None:
        saved = min(saved, lost)
    return max((at for at in (done, saved) if at is not None), default=None)


def interruption_history(events: Iterable[Mapping[str, Any]], current: int) -> InterruptionHistory:
    """How long the attempts before the current one lasted, and how many were interrupted."""
    before = [attempt for attempt in attempts_of(events) if attempt.number < current]
    return InterruptionHistory(
        trained_s=sum(attempt.busy_s for attempt in before),
        interruptions=sum(attempt.was_interrupted for attempt in before),
    )


def fingerprint(error: BaseException) -> str:
    """What stays the same when the same fault comes again: type and first line, without numbers."""
    text = re.sub(r"0x[0-9a-fA-F]+|\d+", "#", reason(error))
    return f"{type(error).__qualname__}: {text}"


def crash_loop(events: Iterable[Mapping[str, Any]]) -> str | None:
    """The story of attempts that fail alike, if the last MAX_ALIKE did and saved nothing.

    Interrupted attempts do not count; one that has saved something is progress and breaks the row.
    """
    failed: list[Attempt] = []
    for attempt in attempts_of(events):
        if not attempt.was_interrupted:
            failed.append(attempt)
        elif attempt.saved_at is not None:
            failed.clear()
    last = failed[-MAX_ALIKE:]
    alike = len(last) == MAX_ALIKE and all(
        attempt.exit_code in _MAY_PASS
        and attempt.saved_at is None
        and attempt.fingerprint
        and attempt.fingerprint == last[-1].fingerprint
        for attempt in last
    )
    if not alike:
        return None
    lines = [
        f"attempt {attempt.number}: after {attempt.busy_s:.0f} s, "
        f"exit code {attempt.exit_code}: {attempt.reason}"
        for attempt in last
    ]
    return "\n  ".join(lines)
