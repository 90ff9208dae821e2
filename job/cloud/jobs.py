"""The jobs of a run: which there were, what became of them, their output, and how to end one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from job import run
from job.checkpoint.lease import look
from job.cloud.aws import client, code_of, explained, region_of
from job.errors import ConfigError, ObjectNotFound, StorageError
from job.storage import ObjectStore, open_store

ACTIVE = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING")
POLL_S = 5.0
CANCELLED = "cancelled: "
"""How the reason of a job that was ended begins; the stack's alarm is silent about those."""
LAST_LOOKS = 2
"""At the output of an attempt that has ended."""
MAX_DESCRIBED = 100
"""Jobs that DescribeJobs takes at once."""


@dataclass(frozen=True)
class Submission:
    """A job as it was submitted; the content of `job.json`."""

    name: str
    """Sorts by time; names the folder below `jobs/`."""
    job_id: Annotated[str, Field(min_length=1)]
    submitted_at: str
    """UTC, ISO 8601."""
    stack: str
    log_group: str
    revision: str
    on_demand: bool
    request: Mapping[str, Any]

    @property
    def region(self) -> str | None:
        """Where its job is, whatever the user's own region is now; None if it is not known."""
        return region_of(str(self.request.get("jobQueue", "")))

    def to_json(self) -> bytes:
        """Content of the file."""
        return json.dumps({**vars(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Submission:
        """Inverse of `to_json`.

        Raises:
            ValueError: it is not what that gives.
        """
        return TypeAdapter(cls).validate_json(text, strict=True)


def submissions(store: ObjectStore) -> list[Submission]:
    """All jobs of a run, oldest first.

    Raises:
        StorageError: a record cannot be read.
    """
    found = []
    for info in store.list(run.JOBS):
        name = info.key.removeprefix(run.JOBS).partition("/")[0]
        if info.key != run.job_record(name):
            continue
        try:
            found.append(Submission.from_json(store.read(info.key)))
        except ObjectNotFound:
            continue
        except ValueError:
            raise unreadable_record(store, name) from None
    return found


def unreadable_record(store: ObjectStore, submission: str) -> StorageError:
    """Of a run's job, that somebody has changed."""
    return StorageError(
        f"{store.uri}/{run.job_record(submission)}: is no record of a job",
        mend="delete it: the run itself does not need it",
    )


def runs_at(uri: str) -> list[ObjectStore]:
    """The run at a place, or, if it is none, all that are below it, by name.

    Raises:
        ConfigError: there is none.
    """
    store = open_store(uri)
    if store.stat(run.IDENTITY) is not None:
        return [store]
    tail = f"/{run.IDENTITY}"
    found = sorted(
        info.key.removesuffix(tail) for info in store.list("") if info.key.endswith(tail)
    )
    if not found:
        raise ConfigError(
            f"{uri}: there is no run",
            mend="give the URI that --run had; submitting (s4gan submit) and training make one",
        )
    return [store.below(name) for name in found]


def describe(records: Sequence[Submission]) -> dict[str, Mapping[str, Any]]:
    """What Batch knows of jobs, by their ids; it forgets them some days after their end.

    A child of an array job that Batch has not made yet is as its parent. A job on several machines
    has the output of its main one.
    """
    known: dict[str, Mapping[str, Any]] = {}
    for region in dict.fromkeys(record.region for record in records):
        known |= _describe_in(region, [one.job_id for one in records if one.region == region])
    return known


def _describe_in(region: str | None, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    known = _describe(ids, region)
    unborn = [job_id for job_id in ids if job_id not in known and ":" in job_id]
    parents = _describe(sorted({job_id.partition(":")[0] for job_id in unborn}), region)
    for job_id in unborn:
        parent = parents.get(job_id.partition(":")[0])
        if parent is not None:
            known[job_id] = parent
    main = {
        job_id: f"{job_id}#{job['nodeProperties']['mainNode']}"
        for job_id, job in known.items()
        if "nodeProperties" in job
    }
    nodes = _describe(sorted(main.values()), region)
    for job_id, node_id in main.items():
        node = nodes.get(node_id, {})
        of_node = {key: node[key] for key in ("container", "attempts") if key in node}
        known[job_id] = {**known[job_id], **of_node}
    return known


def _describe(ids: Sequence[str], region: str | None) -> dict[str, Mapping[str, Any]]:
    if not ids:
        return {}
    batch = client("batch", region)
    known = {}
    for first in range(0, len(ids), MAX_DESCRIBED):
        with explained("look at the run's jobs"):
            reply = batch.describe_jobs(jobs=list(ids[first : first + MAX_DESCRIBED]))
        known.update({job["jobId"]: job for job in reply["jobs"]})
    return known


def active_job(store: ObjectStore) -> Submission | None:
    """The run's newest job that has not ended; None if all have."""
    return next(iter(reversed(_active_jobs(store))), None)


def _active_jobs(store: ObjectStore) -> list[Submission]:
    """More than one if two people have submitted the same run in the same second."""
    records = submissions(store)
    return not_ended(records, describe(records))


def not_ended(
    records: Sequence[Submission], known: Mapping[str, Mapping[str, Any]]
) -> list[Submission]:
    """Those jobs that train, or are to.

    Args:
        records: `submissions`.
        known: `describe`.
    """
    return [one for one in records if known.get(one.job_id, {}).get("status") in ACTIVE]


def cancel(store: ObjectStore, reason: str) -> str:
    """Ask whatever trains a run to stop: it saves first. What waits for a machine just ends.

    Args:
        store: of the run.
        reason: shown in the job's history.

    Returns:
        What was stopped.

    Raises:
        ConfigError: nothing that could be stopped from here trains it.
    """
    records = [] if store.local_path("") is not None else _active_jobs(store)
    for record in records:
        _terminate(record.job_id, record.region, reason)
    if records:
        return "job " + " and ".join(record.job_id for record in records)
    holding = look(store)
    if holding is None or not holding.is_live:
        raise ConfigError(f"{store.uri}: nothing trains this run")
    if holding.holder.job and store.local_path("") is None:
        # Whoever submitted it was killed before the job was written down, or deleted the record.
        _terminate(holding.holder.job, None, reason)
        return f"job {holding.holder.job}"
    process = holding.holder.process_here()
    if process is None:
        machine = holding.holder.machine.partition("/")[0]
        raise ConfigError(
            f"{store.uri}: is trained by process {holding.holder.pid} on {machine}, "
            "which is not this machine",
            mend="stop it there (Ctrl-C, docker stop): it saves",
        )
    os.kill(process, signal.SIGTERM)
    return f"process {process}"


def _terminate(job_id: str, region: str | None, reason: str) -> None:
    # Not CancelJob: that does nothing to a job that has started, and does not say so.
    with explained(f"end the job {job_id}"):
        client("batch", region).terminate_job(jobId=job_id, reason=f"{CANCELLED}{reason}")


# ---------------------------------------------------------------- output


@dataclass(frozen=True)
class Stream:
    """Where the output of one attempt is."""

    job_id: str
    attempt: int
    """Of this job, from 1."""
    name: str
    is_running: bool


def streams(records: Sequence[Submission], known: Mapping[str, Mapping[str, Any]]) -> list[Stream]:
    """The output of each attempt that wrote any, oldest first."""
    found: list[Stream] = []
    for record in records:
        description = known.get(record.job_id, {})
        names = [
            attempt.get("container", {}).get("logStreamName")
            for attempt in description.get("attempts", ())
        ]
        running = description.get("status") == "RUNNING"
        current = description.get("container", {}).get("logStreamName")
        if current and current not in names:
            names.append(current)
        found += [
            Stream(record.job_id, number, name, running and name == current)
            for number, name in enumerate(names, start=1)
            if name
        ]
    return found


def lines(
    group: str, stream: str, *, follow: Iterator[bool], region: str | None = None
) -> Iterator[str]:
    """The lines of an attempt's output.

    Args:
        group: log group.
        stream: log stream.
        follow: asked when there is nothing more for now: whether more may come.
        region: where the log is; None: the user's.
    """
    from botocore.exceptions import ClientError

    logs = client("logs", region)
    token: str | None = None
    while True:
        options = {"nextToken": token} if token else {}
        with explained(f"read the output {stream}"):
            try:
                reply = logs.get_log_events(
                    logGroupName=group, logStreamName=stream, startFromHead=True, **options
                )
            except ClientError as error:
                if code_of(error) != "ResourceNotFoundException":
                    raise
                reply = {"events": [], "nextForwardToken": token}  # nothing was written yet
        for event in reply["events"]:
            yield event["message"]
        # The same token again tells the end; a page may be empty without being the last.
        ended = reply["nextForwardToken"] == token
        token = reply["nextForwardToken"]
        if ended and not next(follow, False):
            return


def run_lines(
    store: ObjectStore, *, last: bool = False, follow: bool = False, poll_s: float = POLL_S
) -> Iterator[str]:
    """The output of all attempts at a run, one after the other, each under a line that says which.

    Args:
        store: of the run.
        last: begin with the newest attempt.
        follow: go on until the run's last job has ended.
        poll_s: seconds between two looks.

    Raises:
        ConfigError: the run has no job, or AWS has forgotten them.
    """
    if store.local_path("") is not None:
        raise ConfigError(
            f"{store.uri}: is a run on this machine; its output was its console's",
            mend=f"what it reported is in {store.uri}/{run.LEDGER}",
        )
    records = submissions(store)
    if not records:
        below: list[ObjectStore] = []
        with contextlib.suppress(ConfigError):
            below = runs_at(store.uri)
        if below and below[0].uri != store.uri:
            raise ConfigError(
                f"{store.uri}: is the place of {len(below)} runs",
                mend=f"say which, for example: s4gan logs {below[0].uri}",
            )
        raise ConfigError(f"{store.uri}: no job was submitted for this run")
    by_id = {record.job_id: record for record in records}
    shown: set[str] = set()
    while True:
        known = describe(records)
        found = streams(records, known)
        if last:
            shown.update(stream.name for stream in found[:-1])
            last = False
        for stream in found:
            if stream.name in shown:
                continue
            shown.add(stream.name)
            yield f"---- job {stream.job_id}, attempt {stream.attempt}"
            more = _while_running(records, stream, poll_s) if follow else iter(())
            record = by_id[stream.job_id]
            yield from lines(record.log_group, stream.name, follow=more, region=record.region)
        is_over = all(job["status"] not in ACTIVE for job in known.values())
        if not follow or is_over:
            break
        time.sleep(poll_s)
    if not shown:
        status = ", ".join(sorted({job["status"] for job in known.values()}))
        raise ConfigError(
            f"{store.uri}: its jobs have written nothing"
            + (f" yet ({status})" if status else ", or AWS has forgotten them"),
            mend=f"s4gan status {store.uri}",
        )


def _while_running(records: Sequence[Submission], stream: Stream, poll_s: float) -> Iterator[bool]:
    """True as long as the attempt runs, and a few times more: last lines arrive late."""
    while any(
        found.is_running and found.name == stream.name
        for found in streams(records, describe(records))
    ):
        time.sleep(poll_s)
        yield True
    for _ in range(LAST_LOOKS):
        time.sleep(poll_s)
        yield True
