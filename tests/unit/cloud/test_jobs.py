"""The jobs of a run: found, ended, and their output read."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import typer
from botocore.stub import Stubber

from job import cli, run
from job.checkpoint.lease import acquire
from job.cloud import jobs
from job.cloud.jobs import Submission, active_job, cancel, run_lines, runs_at, submissions
from job.errors import ConfigError, ExitCode, StorageError
from job.storage import ObjectStore, open_store

Stub = Callable[[str], Stubber]
QUEUE = "arn:aws:batch:us-east-1:123456789012:job-queue/s4gan"
DEFINITION = "arn:aws:batch:us-east-1:123456789012:job-definition/s4gan:1"


@pytest.fixture
def store(moto: None) -> ObjectStore:
    """A run in a bucket."""
    boto3.client("s3").create_bucket(Bucket="bucket")
    return open_store("s3://bucket/runs/first")


def submitted(store: ObjectStore, job_id: str, number: int = 1) -> Submission:
    """A record as `submit` writes it."""
    record = Submission(
        name=f"2026112{number}T120000Z-abc123",
        job_id=job_id,
        submitted_at=f"2026-11-2{number}T12:00:00+00:00",
        stack="s4gan",
        log_group="/s4gan/s4gan",
        revision="",
        on_demand=False,
        request={},
    )
    store.write(run.job_record(record.name), record.to_json())
    return record


def job(job_id: str, status: str, streams: tuple[str | None, ...] = (), **more: Any) -> Any:
    """As DescribeJobs describes it; the last stream is the current attempt's."""
    ended = streams[:-1] if status == "RUNNING" else streams
    return {
        "jobId": job_id,
        "jobName": "s4gan-first",
        "jobQueue": QUEUE,
        "jobDefinition": DEFINITION,
        "status": status,
        "startedAt": 0,
        "attempts": [{"container": {"logStreamName": name} if name else {}} for name in ended],
        "container": {"logStreamName": streams[-1]} if streams and streams[-1] else {},
        **more,
    }


def describes(stub: Stub, *replies: list[Any]) -> None:
    """What Batch says, look by look."""
    for reply in replies:
        stub("batch").add_response("describe_jobs", {"jobs": reply})


def writes(stub: Stub, stream: str, *pages: tuple[str | None, str, list[str]]) -> None:
    """What the log says: for each page the token asked with, the next one, and the lines."""
    for asked, token, lines in pages:
        expected = {
            "logGroupName": "/s4gan/s4gan",
            "logStreamName": stream,
            "startFromHead": True,
        }
        if asked:
            expected["nextToken"] = asked
        stub("logs").add_response(
            "get_log_events",
            {"events": [{"message": line} for line in lines], "nextForwardToken": token},
            expected,
        )


# ---------------------------------------------------------------- which there were


def test_records_are_read_in_the_order_they_were_submitted(store: ObjectStore) -> None:
    for number in (2, 1, 3):
        submitted(store, f"job-{number}", number)
    store.write("jobs/20261120T120000Z-abc123/config.yaml", b"x")
    assert [record.job_id for record in submissions(store)] == ["job-1", "job-2", "job-3"]


@pytest.mark.parametrize("text", [b"{", b"{}", b"[]", b'{"name": "x", "more": 1}'])
def test_a_record_that_is_none_is_named(store: ObjectStore, text: bytes) -> None:
    store.write("jobs/x/job.json", text)
    with pytest.raises(StorageError, match=r"jobs/x/job\.json: is no record of a job"):
        submissions(store)


@pytest.mark.parametrize(
    "change", [{"job_id": None}, {"job_id": ""}, {"request": []}, {"name": 3}, {"on_demand": "no"}]
)
def test_so_is_one_that_somebody_has_changed(store: ObjectStore, change: dict[str, Any]) -> None:
    submitted(store, "job-1")
    (key,) = [info.key for info in store.list("jobs/") if info.key.endswith("/job.json")]
    store.write(key, json.dumps({**json.loads(store.read(key)), **change}).encode())
    with pytest.raises(StorageError, match=r"/job\.json: is no record of a job"):
        submissions(store)


def test_the_queue_of_a_changed_record_tells_no_region(store: ObjectStore) -> None:
    submitted(store, "job-1")
    (record,) = submissions(store)
    assert dataclasses.replace(record, request={"jobQueue": 5}).region is None


def test_what_lies_deeper_is_another_runs(store: ObjectStore) -> None:
    submitted(store, "job-1")
    submitted(store.below("jobs/inner"), "job-2")
    assert [record.job_id for record in submissions(store)] == ["job-1"]


@pytest.mark.parametrize(
    ("statuses", "active"),
    [
        (("FAILED", "RUNNING"), "job-2"),
        (("RUNNABLE", "FAILED"), "job-1"),
        (("FAILED", "SUCCEEDED"), None),
        ((None, None), None),
    ],
)
def test_the_newest_job_that_has_not_ended_counts(
    store: ObjectStore, stub: Stub, statuses: tuple[str | None, ...], active: str | None
) -> None:
    for number in (1, 2):
        submitted(store, f"job-{number}", number)
    known = [job(f"job-{n}", status) for n, status in enumerate(statuses, 1) if status]
    describes(stub, known)
    record = active_job(store)
    assert (record.job_id if record else None) == active


def test_a_child_that_batch_has_not_made_yet_is_as_its_parent(
    store: ObjectStore, stub: Stub
) -> None:
    submitted(store, "parent:3")
    batch = stub("batch")
    batch.add_response("describe_jobs", {"jobs": []}, {"jobs": ["parent:3"]})
    batch.add_response("describe_jobs", {"jobs": [job("parent", "PENDING")]}, {"jobs": ["parent"]})
    record = active_job(store)
    assert record is not None
    assert record.job_id == "parent:3"


def test_a_job_on_several_machines_has_the_output_of_the_main_one(
    store: ObjectStore, stub: Stub
) -> None:
    submitted(store, "job-1")
    parent = job("job-1", "SUCCEEDED")
    del parent["container"]
    parent["nodeProperties"] = {"numNodes": 2, "mainNode": 0, "nodeRangeProperties": []}
    batch = stub("batch")
    batch.add_response("describe_jobs", {"jobs": [parent]}, {"jobs": ["job-1"]})
    main = job("job-1#0", "SUCCEEDED", ("a",))
    batch.add_response("describe_jobs", {"jobs": [main]}, {"jobs": ["job-1#0"]})
    writes(stub, "a", (None, "f/1", ["one"]), ("f/1", "f/1", []))
    assert list(run_lines(store)) == ["---- job job-1, attempt 1", "one"]


def test_the_run_at_a_place_or_those_below_it(store: ObjectStore, tmp_path: Path) -> None:
    for name in ("b", "a", "deep/er"):
        open_store(f"s3://bucket/runs/{name}").write(run.IDENTITY, b"{}")
    places = [f"s3://bucket/runs/{name}" for name in ("a", "b", "deep/er")]
    assert [found.uri for found in runs_at("s3://bucket/runs")] == places
    assert [found.uri for found in runs_at("s3://bucket/runs/deep/er/")] == places[2:]
    open_store(str(tmp_path / "x" / "y")).write(run.IDENTITY, b"{}")
    assert [found.uri for found in runs_at(str(tmp_path))] == [str(tmp_path / "x" / "y")]
    with pytest.raises(ConfigError, match="there is no run"):
        runs_at("s3://bucket/data")


# ---------------------------------------------------------------- cancelling


def test_cancelling_terminates_the_job(store: ObjectStore, stub: Stub) -> None:
    submitted(store, "job-1")
    describes(stub, [job("job-1", "RUNNING")])
    stub("batch").add_response(
        "terminate_job", {}, {"jobId": "job-1", "reason": "cancelled: too dear"}
    )
    assert cancel(store, "too dear") == "job job-1"


def test_every_job_that_has_not_ended_is_cancelled(store: ObjectStore, stub: Stub) -> None:
    """Else the one that is left goes on, and costs."""
    for number in (1, 2, 3):
        submitted(store, f"job-{number}", number)
    states = ("RUNNING", "FAILED", "RUNNABLE")
    describes(stub, [job(f"job-{n}", state) for n, state in enumerate(states, 1)])
    for job_id in ("job-1", "job-3"):
        stub("batch").add_response("terminate_job", {}, {"jobId": job_id, "reason": "cancelled: x"})
    assert cancel(store, "x") == "job job-1 and job-3"


def test_a_job_is_looked_for_where_it_is(
    store: ObjectStore, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever AWS_REGION is by now."""
    record = dataclasses.replace(
        submitted(store, "job-1"), request={"jobQueue": QUEUE.replace("us-east-1", "eu-west-1")}
    )
    store.write(run.job_record(record.name), record.to_json())
    describes(stub, [job("job-1", "RUNNING", ("a",))], [job("job-1", "RUNNING", ("a",))])
    stub("batch").add_response("terminate_job", {}, {"jobId": "job-1", "reason": "cancelled: x"})
    writes(stub, "a", (None, "f/1", ["one"]), ("f/1", "f/1", []))
    asked: list[Any] = []
    client = jobs.client

    def asking(service: str, region: str | None = None) -> Any:
        asked.append(region)
        return client(service, region)

    monkeypatch.setattr(jobs, "client", asking)
    assert list(run_lines(store))[1] == "one"
    cancel(store, "x")
    assert asked == ["eu-west-1"] * 4


def test_a_job_that_was_not_written_down_is_found_by_its_lease(
    store: ObjectStore, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that submitted it was killed between the two."""
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "job-1")
    lease = acquire(store, on_lost=print)
    try:
        stub("batch").add_response(
            "terminate_job", {}, {"jobId": "job-1", "reason": "cancelled: x"}
        )
        assert cancel(store, "x") == "job job-1"
    finally:
        lease.release()


def test_there_is_nothing_to_cancel(store: ObjectStore, stub: Stub) -> None:
    submitted(store, "job-1")
    describes(stub, [job("job-1", "SUCCEEDED")])
    with pytest.raises(ConfigError, match="nothing trains this run"):
        cancel(store, "x")


def test_a_process_of_this_machine_is_told_to_stop(tmp_path: Path) -> None:
    """It holds the lease of a run in a folder."""
    program = (
        "import sys, time; from job.checkpoint.lease import acquire; from job.storage import "
        "open_store; acquire(open_store(sys.argv[1]), on_lost=print); print('has it', flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        assert cancel(open_store(str(tmp_path)), "x") == f"process {process.pid}"
        assert process.wait(30) == -signal.SIGTERM


def test_a_process_of_another_machine_cannot_be_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    lease = acquire(store, on_lost=lambda: None)
    text = store.read(run.LEASE)
    lease.release()
    pid = str(os.getpid()).encode()
    store.write(run.LEASE, text.replace(b'"machine": "', b'"machine": "elsewhere/'))
    with pytest.raises(ConfigError, match="on elsewhere, which is not this machine") as caught:
        cancel(store, "x")
    assert pid.decode() in caught.value.message


# ---------------------------------------------------------------- output


def test_the_output_of_all_attempts_in_order(store: ObjectStore, stub: Stub) -> None:
    submitted(store, "job-1", 1)
    submitted(store, "job-2", 2)
    describes(stub, [job("job-1", "FAILED", ("a", None, "b")), job("job-2", "SUCCEEDED", ("c",))])
    writes(stub, "a", (None, "f/1", ["one", "two"]), ("f/1", "f/1", []))
    # A page may be empty and yet not the last.
    writes(stub, "b", (None, "f/1", []), ("f/1", "f/2", ["three"]), ("f/2", "f/2", []))
    writes(stub, "c", (None, "f/1", ["four"]), ("f/1", "f/1", []))
    assert list(run_lines(store)) == [
        "---- job job-1, attempt 1",
        "one",
        "two",
        "---- job job-1, attempt 3",
        "three",
        "---- job job-2, attempt 1",
        "four",
    ]


def test_only_the_newest_attempt(store: ObjectStore, stub: Stub) -> None:
    submitted(store, "job-1")
    describes(stub, [job("job-1", "FAILED", ("a", "b"))])
    writes(stub, "b", (None, "f/1", ["two"]), ("f/1", "f/1", []))
    assert list(run_lines(store, last=True)) == ["---- job job-1, attempt 2", "two"]


def test_following_goes_on_over_attempts_until_the_job_has_ended(
    store: ObjectStore, stub: Stub
) -> None:
    submitted(store, "job-1")
    first, both = ("a",), ("a", "b")
    describes(
        stub,
        [job("job-1", "RUNNABLE")],
        [job("job-1", "RUNNING", first)],  # reading begins
        [job("job-1", "RUNNING", first)],  # it still runs
        [job("job-1", "RUNNABLE", first)],  # no more; a last look at what it wrote
        [job("job-1", "RUNNING", both)],
        [job("job-1", "SUCCEEDED", both)],
        [job("job-1", "SUCCEEDED", both)],
    )
    writes(
        stub,
        "a",
        (None, "f/1", ["one"]),
        ("f/1", "f/1", []),
        ("f/1", "f/2", ["two"]),
        ("f/2", "f/2", []),
        ("f/2", "f/2", []),
        ("f/2", "f/3", ["three, written last"]),
        ("f/3", "f/3", []),
    )
    same = ("f/1", "f/1", [])
    writes(stub, "b", (None, "f/1", ["four"]), same, same, same)
    assert list(run_lines(store, follow=True, poll_s=0)) == [
        "---- job job-1, attempt 1",
        "one",
        "two",
        "three, written last",
        "---- job job-1, attempt 2",
        "four",
    ]


def test_a_stream_that_is_not_there_yet_is_waited_for(store: ObjectStore, stub: Stub) -> None:
    submitted(store, "job-1")
    describes(
        stub,
        [job("job-1", "RUNNING", ("a",))],
        [job("job-1", "SUCCEEDED", ("a",))],
        [job("job-1", "SUCCEEDED", ("a",))],
    )
    stub("logs").add_client_error("get_log_events", "ResourceNotFoundException")
    same = ("f/1", "f/1", [])
    writes(stub, "a", (None, "f/1", ["one"]), same, same)
    assert list(run_lines(store, follow=True, poll_s=0)) == ["---- job job-1, attempt 1", "one"]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ([job("job-1", "RUNNABLE")], r"have written nothing yet \(RUNNABLE\)"),
        ([], "AWS has forgotten them"),
    ],
)
def test_jobs_without_output(
    store: ObjectStore, stub: Stub, known: list[Any], message: str
) -> None:
    submitted(store, "job-1")
    describes(stub, known)
    with pytest.raises(ConfigError, match=message):
        list(run_lines(store))


def test_a_run_that_was_never_submitted(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no job was submitted"):
        list(run_lines(store))
    with pytest.raises(ConfigError, match="is a run on this machine"):
        list(run_lines(open_store(str(tmp_path))))


def test_the_place_of_several_runs_has_no_output_of_its_own(store: ObjectStore) -> None:
    store.write(run.IDENTITY, b"{}")
    with pytest.raises(ConfigError, match="runs: is the place of 1 runs") as caught:
        list(run_lines(open_store("s3://bucket/runs")))
    assert caught.value.mend == "say which, for example: s4gan logs s3://bucket/runs/first"


def test_many_jobs_are_looked_at_in_several_requests(
    account: None, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_DESCRIBED", 2)
    batch = stub("batch")
    for ids in (["1", "2"], ["3"]):
        reply = {"jobs": [job(one, "RUNNING") for one in ids]}
        batch.add_response("describe_jobs", reply, {"jobs": ids})
    assert set(jobs._describe(["1", "2", "3"], None)) == {"1", "2", "3"}


# ---------------------------------------------------------------- the command


def test_cancelling_several_goes_on_after_one_that_fails(
    store: ObjectStore, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others would train on, and cost."""
    for name in "abc":
        one = store.below(name)
        one.write(run.IDENTITY, b"{}")
        submitted(one, name)
    stub("batch").add_response("describe_jobs", {"jobs": [job("a", "RUNNING")]})
    stub("batch").add_client_error("terminate_job", "AccessDeniedException", "not you")
    describes(stub, [job("b", "SUCCEEDED")], [job("c", "RUNNING")])
    stub("batch").add_response("terminate_job", {}, {"jobId": "c", "reason": "cancelled: by x"})
    with pytest.raises(typer.Exit) as ended:
        cli.cancel(store.uri, reason="by x")
    assert ended.value.exit_code == ExitCode.IO_ERROR
    told = capsys.readouterr()
    assert told.out == f"{store.uri}/c: asked job c to save and end\n"
    assert "cannot end the job a: access denied to TerminateJob (not you)" in told.err
    assert f"{store.uri}/b: nothing trains this run" in told.err


def test_what_was_cancelled_is_json(
    store: ObjectStore, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write(run.IDENTITY, b"{}")
    submitted(store, "job-1")
    describes(stub, [job("job-1", "RUNNING")])
    stub("batch").add_response("terminate_job", {}, {"jobId": "job-1", "reason": "cancelled: x"})
    cli.cancel(store.uri, reason="x", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == [{"run": store.uri, "stopped": "job job-1"}]


def test_a_reason_must_be_one(store: ObjectStore) -> None:
    with pytest.raises(ConfigError, match="--reason is empty"):
        cli.cancel(store.uri, reason=" ")
