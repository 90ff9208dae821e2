"""How a run is: from its own ledger and lease, and from what Batch knows of its jobs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from job import run
from job.checkpoint.lease import Holding, look
from job.cloud.jobs import describe, not_ended, runs_at, submissions
from job.cloud.machines import Prices, machines
from job.cloud.waiting import why_waiting
from job.config import Config, config_from_yaml
from job.errors import AccessDenied, ExitCode, JobError, ObjectNotFound
from job.monitor.attempts import Attempt, attempts_of, kept_iteration, last_that_counts
from job.monitor.ledger import parse_ledger
from job.storage import ObjectStore

TOGETHER = 8
"""Runs that are looked at at the same time."""
_STOPPED = (ExitCode.PREEMPTED, ExitCode.KILLED_BY_USER)


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt: what it did, where, and what that cost."""

    number: int
    started: float
    """Seconds since 1970."""
    seconds: float
    useful_s: float
    """On iterations that count."""
    redone_s: float
    """On iterations that were lost, so that they are trained again."""
    idle_s: float
    """The rest: data, loading, the last upload."""
    nodes: int
    """Machines."""
    gpus: int
    """Of all machines."""
    instance_type: str
    life_cycle: str
    usd: float | None
    """None if nobody knows what the machine costs."""
    on_demand_usd: float | None
    """What the same time would have cost on demand."""
    ended: str
    """Why; empty while it goes on."""


@dataclass(frozen=True)
class Unrecorded:
    """Time of the run's jobs that its ledger knows nothing of."""

    tries: int
    """Of jobs, that had a machine."""
    seconds: float
    """Of their containers, together; counted in no cost."""
    ended: str
    """Why the newest of them ended, as Batch says it."""


@dataclass(frozen=True)
class RunStatus:
    """A run, at one moment."""

    run: str
    state: str
    """new, submitted, waiting, starting, training, finished, stopped, interrupted, failed; of
    several also unreadable."""
    detail: str
    """Why it waits or has ended; may be empty."""
    job_id: str
    """Of the job that is to train it, else of its newest; empty if it has none."""
    iteration: int
    """Of a run that nothing trains, the one that it would go on from."""
    iterations: int | None
    """None if the configuration cannot be read."""
    val_miou: float | None
    """Best so far."""
    images_per_s: float | None
    seconds_left: float | None
    """Of training, at the newest attempt's speed; None unless it is training."""
    attempts: tuple[AttemptStatus, ...]
    unrecorded: Unrecorded | None = None
    """None if there is no such time, or Batch has forgotten it."""

    @property
    def usd(self) -> float | None:
        """Of all attempts whose cost is known; None if no one's is."""
        known = [attempt.usd for attempt in self.attempts if attempt.usd is not None]
        return sum(known) if known else None

    @property
    def usd_is_complete(self) -> bool:
        """Whether every attempt's cost is known."""
        return all(attempt.usd is not None for attempt in self.attempts)

    @property
    def on_demand_usd(self) -> float | None:
        """The same time on demand; None if it is not known of all attempts."""
        known = [attempt.on_demand_usd for attempt in self.attempts]
        return None if None in known or not known else sum(usd or 0 for usd in known)

    @property
    def saved_usd(self) -> float | None:
        """Against on demand, of those attempts where both are known; None if of no one."""
        saved = [
            attempt.on_demand_usd - attempt.usd
            for attempt in self.attempts
            if attempt.usd is not None and attempt.on_demand_usd is not None
        ]
        return sum(saved) if saved else None

    @property
    def goodput(self) -> float | None:
        """Share of all GPUs' time spent on iterations that count; None before there is any."""
        busy = sum(attempt.gpus * attempt.seconds for attempt in self.attempts)
        useful = sum(attempt.gpus * attempt.useful_s for attempt in self.attempts)
        return useful / busy if busy else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("usd", "usd_is_complete", "on_demand_usd", "saved_usd", "goodput")
        sums = {name: getattr(self, name) for name in names}
        return {
            **vars(self),
            **sums,
            "attempts": [vars(attempt) for attempt in self.attempts],
            "unrecorded": vars(self.unrecorded) if self.unrecorded else None,
        }


def statuses_at(uri: str, prices: Prices) -> list[RunStatus]:
    """Of the run at a place, or of all below it; of several, one whose files are damaged says so.

    Raises:
        ConfigError: there is none.
        StorageError: the storage failed, or AWS did not answer.
    """
    stores = runs_at(uri)

    def look_at(store: ObjectStore) -> RunStatus:
        try:
            return status_of(store, prices)
        except AccessDenied:
            raise
        except JobError as error:
            if len(stores) == 1:
                raise
            return RunStatus(
                run=store.uri,
                state="unreadable",
                detail=error.message,
                job_id="",
                iteration=0,
                iterations=None,
                val_miou=None,
                images_per_s=None,
                seconds_left=None,
                attempts=(),
            )

    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(look_at, stores))


def status_of(store: ObjectStore, prices: Prices) -> RunStatus:
    """How a run is.

    Args:
        store: of the run.
        prices: what machines cost.

    Raises:
        StorageError: the storage failed, or AWS did not answer.
    """
    events = _ledger(store)
    config = _config(store)
    jobs = [] if store.local_path("") is not None else submissions(store)
    known = describe(jobs)
    tries = attempts_of(events)
    holding = look(store)
    live = holding is not None and holding.is_live
    # Of two jobs that were submitted at the same moment the older one may be what trains.
    job = next(reversed(not_ended(jobs, known) or jobs), None)
    state, detail = _state(
        store, known.get(job.job_id) if job else None, tries, live=live, had_job=bool(jobs)
    )
    trained = [event for event in events if event["event"] == "train"]
    scores = [event["val_miou"] for event in events if event["event"] == "eval"]
    iteration = kept_iteration(tries)
    if tries and (live or state == "finished"):
        iteration = max(iteration, tries[-1].reached or 0)
    return RunStatus(
        run=store.uri,
        state=state,
        detail=detail,
        job_id=job.job_id if job else "",
        iteration=iteration,
        iterations=config.train.iterations if config is not None else None,
        val_miou=max(filter(math.isfinite, scores), default=None),
        images_per_s=trained[-1]["images_per_s"] if trained else None,
        seconds_left=_seconds_left(tries, config) if state == "training" else None,
        attempts=tuple(
            _attempt(
                one, known, prices, holding if holding and holding.attempt == one.number else None
            )
            for one in tries
        ),
        unrecorded=_unrecorded([known[one.job_id] for one in jobs if one.job_id in known], tries),
    )


# ---------------------------------------------------------------- what the parts say


def _state(
    store: ObjectStore,
    job: Mapping[str, Any] | None,
    tries: Sequence[Attempt],
    *,
    live: bool,
    had_job: bool,
) -> tuple[str, str]:
    """State and detail of a run."""
    batch = job["status"] if job is not None else ""
    last = last_that_counts(tries)
    if job is not None and batch in ("SUBMITTED", "PENDING", "RUNNABLE"):
        return "waiting", why_waiting(job)
    if batch == "STARTING":
        return "starting", "the machine is there; the image is being fetched"
    if live:
        return "training", ""
    if batch == "RUNNING":
        return "starting", "the container runs, and has not begun with the run yet"
    if last is not None and last.exit_code == ExitCode.OK:
        if store.stat(run.SUMMARY) is not None:
            later = "" if last is tries[-1] else f"attempt {tries[-1].number} did not begin: "
            return "finished", later and later + tries[-1].reason.partition("\n")[0]
        return "interrupted", f"it has finished, but its {run.SUMMARY} is gone; training makes it"
    if job is not None and batch == "FAILED" and all(one.job != job["jobId"] for one in tries):
        return "failed", _job_end(job)  # it never came to the run
    if last is None:
        if not had_job:
            return "new", "nothing has trained it yet, and no job is to"
        if job is None:
            return "submitted", "but AWS no longer knows its job"
        return "failed", f"its job is {batch}, but its {run.LEDGER} is not there"
    if last.exit_code is None:
        return "interrupted", _job_end(job) or "its process was killed"
    if last.exit_code in _STOPPED:
        said = job.get("statusReason", "") if job is not None and batch == "FAILED" else ""
        return "stopped", f"{last.reason} ({said})" if said else last.reason
    return "failed", last.reason


def _job_end(job: Mapping[str, Any] | None) -> str:
    """What Batch says of a job that is over."""
    if job is None:
        return ""
    container = job.get("container", {})
    said = [job.get("statusReason", ""), container.get("reason", "")]
    if container.get("exitCode"):
        said.append(f"exit code {container['exitCode']}; s4gan logs says more")
    return "; ".join(dict.fromkeys(text for text in said if text))


def _unrecorded(jobs: Sequence[Mapping[str, Any]], tries: Sequence[Attempt]) -> Unrecorded | None:
    """What Batch has tried without an attempt at the run: no image, no lease, killed too early.

    Args:
        jobs: of the run, oldest first, as Batch describes them.
        tries: at the run.
    """
    recorded = {(one.job, one.job_attempt) for one in tries}
    found = [
        one
        for job in jobs
        for number, one in enumerate(job.get("attempts", ()), start=1)
        if (job["jobId"], number) not in recorded
    ]
    if not found:
        return None
    return Unrecorded(
        tries=len(found),
        seconds=sum(
            max(0, one["stoppedAt"] - one["startedAt"]) / 1000
            for one in found
            if "startedAt" in one and "stoppedAt" in one
        ),
        ended=_job_end(found[-1]),
    )


def _attempt(
    attempt: Attempt,
    known: Mapping[str, Mapping[str, Any]],
    prices: Prices,
    holding: Holding | None,
) -> AttemptStatus:
    """An attempt as its own ledger, its lease (if it was the last to have it) and Batch tell."""
    is_live = holding is not None and holding.is_live
    if holding is not None:
        # The lease is renewed more often than the ledger is published. Both times are by the
        # attempt's clock, never by ours.
        silent_s = holding.silent_s if is_live else 0.0
        attempt.last_seen = max(attempt.last_seen, holding.renewed_at + silent_s)
    seconds = attempt.busy_s
    usd, on_demand_usd = _cost(attempt, seconds, prices)
    # All that a living one has trained counts so far.
    useful_s = seconds - attempt.startup_s if is_live else attempt.useful_s
    redone_s = 0.0 if is_live else attempt.redone_s
    return AttemptStatus(
        number=attempt.number,
        started=attempt.started,
        seconds=seconds,
        useful_s=useful_s,
        redone_s=redone_s,
        idle_s=max(0.0, seconds - useful_s - redone_s),
        nodes=attempt.nodes,
        gpus=attempt.gpus,
        instance_type=attempt.instance_type,
        life_cycle=attempt.life_cycle,
        usd=usd,
        on_demand_usd=on_demand_usd,
        ended="" if is_live else _why_ended(attempt, known),
    )


def _why_ended(attempt: Attempt, known: Mapping[str, Mapping[str, Any]]) -> str:
    """By its own words; of one that had no time for any, by Batch's."""
    if attempt.exit_code is not None:
        return attempt.reason.partition(". ")[0].rstrip(".")
    tries = known.get(attempt.job, {}).get("attempts", ())
    if attempt.job_attempt and len(tries) >= attempt.job_attempt:
        one = tries[attempt.job_attempt - 1]
        said = one.get("statusReason", "")
        if said.startswith("Host EC2"):
            return "its spot machine was taken back before it could save"
        if "timeout" in said:
            return "it took longer than it may (--max-hours, or the stack's MaxAttemptSeconds)"
        return said or one.get("container", {}).get("reason", "") or "killed"
    return "killed"


def _cost(attempt: Attempt, seconds: float, prices: Prices) -> tuple[float | None, float | None]:
    """US dollars of an attempt, and what it would have cost on demand."""
    if not attempt.instance_type:
        return None, None
    hours = attempt.nodes * seconds / 3600 * _share(attempt, prices)
    listed = prices.on_demand(attempt.instance_type, attempt.zone)
    on_demand = listed * hours if listed is not None else None
    if attempt.life_cycle != "spot":
        return on_demand, on_demand
    until = attempt.started + seconds
    spot = prices.spot(attempt.instance_type, attempt.zone, attempt.started, until)
    return (spot * hours if spot is not None else None), on_demand


def _share(attempt: Attempt, prices: Prices) -> float:
    """Of a machine's price: Batch may put other jobs onto the GPUs that this one does not use."""
    machine = machines().get(attempt.instance_type)
    used = attempt.gpus // attempt.nodes
    if machine is None or used >= machine.gpus:
        return 1.0
    prices.notes[
        f"of a {machine.name}'s price, {used} of its {machine.gpus} GPUs are counted; what no job "
        "uses of it is paid for too"
    ] = None
    return used / machine.gpus


def _seconds_left(tries: Sequence[Attempt], config: Config | None) -> float | None:
    if not tries or config is None:
        return None
    last = tries[-1]
    if last.reached is None or last.resumed_at is None or last.reached <= last.resumed_at:
        return None
    began, (reached, at) = last.training_since, last.marks[-1]
    pace_s = max(0.0, at - (began or at)) / (reached - last.resumed_at)
    return max(0, config.train.iterations - last.reached) * pace_s


def _ledger(store: ObjectStore) -> list[dict[str, Any]]:
    try:
        text = store.read(run.LEDGER)
    except ObjectNotFound:
        return []
    shown = str(store.local_path(run.LEDGER) or f"{store.uri}/{run.LEDGER}")
    return parse_ledger(text, shown)


def _config(store: ObjectStore) -> Config | None:
    """What the run is trained with, or will be; None if that cannot be read."""
    for key in _config_keys(store):
        with contextlib.suppress(ObjectNotFound):
            text = store.read(key).decode(errors="replace")
            with contextlib.suppress(JobError):
                return config_from_yaml(text, source=key)
            return None
    return None


def _config_keys(store: ObjectStore) -> Iterator[str]:
    """Where it may be; listed only as far as it is asked for."""
    yield run.CONFIG
    if store.local_path("") is None:
        keys = (info.key for info in store.list(run.JOBS))
        yield from sorted((key for key in keys if key.endswith(f"/{run.CONFIG}")), reverse=True)
