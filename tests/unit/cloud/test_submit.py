"""Submitting: everything that can be wrong is said before anything is sent."""

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
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from moto.batch.models import BatchBackend

from job import run
from job.checkpoint.lease import acquire
from job.cloud import preflight
from job.cloud import submit as submit_module
from job.cloud.jobs import submissions
from job.cloud.payload import container_overrides
from job.cloud.preflight import Wish, container_definition
from job.cloud.submit import dry_run, resubmit, submit
from job.cloud.sweep import Point, sweep_points
from job.config import Config, WandbConfig, config_from_dict, config_from_yaml, load_config
from job.errors import AccessDenied, ConfigError, DataError, JobError, StorageError
from job.revision import Revision
from job.run import RunIdentity
from job.storage import open_store
from job.storage.pack import pack
from tests.conftest import write_data
from tests.layouts import WRITERS, write_voc

# moto makes no bucket policies, topic policies and budgets, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse:UserWarning")

CONFIG = load_config("demo", {"wandb.mode": "disabled"})
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Stub = Callable[[str], Stubber]


@pytest.fixture(autouse=True)
def code(monkeypatch: pytest.MonkeyPatch) -> list[Revision | None]:
    """The revision that the program takes itself for; may be replaced."""
    found: list[Revision | None] = [Revision(COMMIT)]
    monkeypatch.setattr(submit_module, "revision", lambda: found[0])
    return found


@pytest.fixture
def data(parts: dict[str, str]) -> str:
    """A data set as far as `submit` looks at it."""
    uri = f"s3://{parts['Bucket']}/data/cats"
    lay_data(uri)
    return uri


def lay_data(uri: str, info: bytes = b"classes: [a, b]") -> None:
    store = open_store(uri)
    store.write("dataset.yaml", info)
    for key in ("train/images/1.png", "train/masks/1.png"):
        store.write(key, b"x")


def wish(parts: dict[str, str], data: str, config: Config = CONFIG, **more: Any) -> Wish:
    run_uri = more.pop("run_uri", f"s3://{parts['Bucket']}/runs/first")
    points = sweep_points(
        config, run_uri, seeds=more.pop("seeds", None), sweeps=more.pop("sweeps", ())
    )
    return Wish(points=points, run_uri=run_uri, data_uri=data, stack="s4gan", **more)


def told_of(monkeypatch: pytest.MonkeyPatch, **parameters: str) -> None:
    """The stack has other parameters than it was deployed with."""
    found = preflight.deployed("s4gan")
    changed = dataclasses.replace(found, parameters={**found.parameters, **parameters})
    monkeypatch.setattr(preflight, "deployed", lambda name: changed)


def sent(job_id: str) -> Any:
    return boto3.client("batch").describe_jobs(jobs=[job_id])["jobs"][0]


def jobs_of(parts: dict[str, str]) -> list[Any]:
    batch = boto3.client("batch")
    queues = (parts["JobQueue"], parts["OnDemandJobQueue"])
    return [job for queue in queues for job in batch.list_jobs(jobQueue=queue)["jobSummaryList"]]


# ---------------------------------------------------------------- what is sent and written down


def test_a_run_is_submitted_and_written_down(parts: dict[str, str], data: str) -> None:
    said: list[str] = []
    (one,) = submit(wish(parts, data), said.append)
    assert said == []
    store = open_store(one.run_uri)
    (record,) = submissions(store)
    assert record.job_id == one.job_id
    assert (record.stack, record.log_group, record.revision) == (
        "s4gan",
        parts["LogGroup"],
        COMMIT,
    )
    command = record.request["containerOverrides"]["command"]
    config_uri = command[command.index("--config") + 1]
    assert config_uri == f"{store.uri}/{run.job_config(record.name)}"
    text = store.read(run.job_config(record.name)).decode()
    assert config_from_yaml(text, source="x") == CONFIG
    job = sent(one.job_id)
    assert job["jobName"] == "s4gan-first"
    assert job["jobQueue"] == parts["JobQueue"]


def test_on_demand_goes_to_the_other_queue(parts: dict[str, str], data: str) -> None:
    (one,) = submit(wish(parts, data, on_demand=True), print)
    assert sent(one.job_id)["jobQueue"] == parts["OnDemandJobQueue"]


def test_more_gpus_ask_for_more_of_everything(parts: dict[str, str], data: str) -> None:
    boto3.client("batch").register_job_definition(
        jobDefinitionName="large",
        type="container",
        containerProperties={
            "image": parts["RepositoryUri"] + ":latest",
            "resourceRequirements": [
                {"type": "GPU", "value": "1"},
                {"type": "VCPU", "value": "2"},
                {"type": "MEMORY", "value": "3000"},
            ],
        },
    )
    config = config_from_yaml(
        CONFIG.to_yaml(), source="x", overrides={"train.accumulate": 2, "train.batch_size": 2}
    )
    definition = container_definition("large")
    needs = wish(parts, data, config, gpus=2).needs(definition)
    assert (needs.gpus, needs.vcpus, needs.memory_mib) == (2, 4, 6000)


def test_several_machines_are_one_job_on_demand(parts: dict[str, str], data: str) -> None:
    config = config_from_yaml(CONFIG.to_yaml(), source="x", overrides={"train.accumulate": 2})
    said: list[str] = []
    (one,) = submit(wish(parts, data, config, nodes=2, on_demand=True), said.append)
    assert len(said) == 1
    assert "no way to the internet" in said[0]
    (again,) = resubmit(one.run_uri, on_demand=None, say=print)
    first, second = submissions(open_store(one.run_uri))
    assert {first.job_id, second.job_id} == {one.job_id, again.job_id}
    for record in (first, second):
        assert record.request["nodeOverrides"]["numNodes"] == 2
        assert record.request["jobDefinition"] == parts["NodesJobDefinition"]
        assert record.request["jobQueue"] == parts["OnDemandJobQueue"]
        assert container_overrides(record.request)["command"][-1] == one.run_uri
    with pytest.raises(ConfigError, match="on demand only"):
        resubmit(one.run_uri, on_demand=False, say=print)


def test_the_same_run_again_is_another_job(parts: dict[str, str], data: str) -> None:
    (one,) = submit(wish(parts, data), print)
    (two,) = submit(wish(parts, data), print)  # moto's jobs end at once
    assert one.job_id != two.job_id
    assert {record.job_id for record in submissions(open_store(one.run_uri))} == {
        one.job_id,
        two.job_id,
    }
    assert one.wandb_url == two.wandb_url


def test_it_can_be_submitted_again_without_saying_anything_again(
    parts: dict[str, str], data: str
) -> None:
    (one,) = submit(wish(parts, data, max_hours=2.5, resume_anyway=True), print)
    (two,) = resubmit(one.run_uri, on_demand=None, say=print)
    (three,) = resubmit(one.run_uri, on_demand=True, say=print)
    records = {record.job_id: record for record in submissions(open_store(one.run_uri))}
    first, second = records[one.job_id], records[two.job_id]
    configs = [f"{one.run_uri}/{run.job_config(record.name)}" for record in (first, second)]
    assert configs[0] != configs[1]
    assert second.request == json.loads(json.dumps(first.request).replace(configs[0], configs[1]))
    assert records[three.job_id].request["jobQueue"] == parts["OnDemandJobQueue"]


def test_only_a_run_that_was_submitted_can_be_submitted_again(parts: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="was never submitted"):
        resubmit(f"s3://{parts['Bucket']}/runs/first", on_demand=None, say=print)


def test_the_address_at_wandb_is_known_before_the_run_begins(
    parts: dict[str, str], data: str
) -> None:
    config = CONFIG.model_copy(
        update={"wandb": WandbConfig(project="cats", entity="team", mode="online")}
    )
    (one,) = submit(wish(parts, data, config), print)
    identity = RunIdentity.from_json(open_store(one.run_uri).read(run.IDENTITY))
    assert one.wandb_url == f"https://wandb.ai/team/cats/runs/{identity.wandb_id}"


def test_without_a_key_the_user_is_told_that_wandb_stays_offline(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"wandb": WandbConfig(mode="auto")})
    said: list[str] = []
    submit(wish(parts, data, config), said.append)
    assert len(said) == 1
    assert "the stack has no W&B key" in said[0]
    told_of(monkeypatch, WandbSecretArn="arn:aws:x")
    said.clear()
    submit(wish(parts, data, config), said.append)
    assert said == []


def test_a_process_that_trains_the_run_elsewhere_is_told_of(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = wish(parts, data)
    type(open_store(one.run_uri))
    lease = acquire(open_store(one.run_uri), on_lost=lambda: None)
    said: list[str] = []
    submit(one, said.append)
    assert f"process {os.getpid()} on" in said[0]
    assert "ends with exit code 76" in said[0]
    lease.release()
    said.clear()
    submit(one, said.append)
    assert said == []


def test_a_sweep_is_one_job_of_several_runs(parts: dict[str, str], data: str) -> None:
    place = f"s3://{parts['Bucket']}/runs/cats"
    submitted = submit(wish(parts, data, run_uri=place, seeds=3), print)
    parent = submitted[0].job_id.partition(":")[0]
    assert [one.job_id for one in submitted] == [f"{parent}:{n}" for n in range(3)]
    assert [one.run_uri for one in submitted] == [f"{place}/seed={n}" for n in range(3)]
    records = [submissions(open_store(one.run_uri))[0] for one in submitted]
    request = records[0].request
    assert request["arrayProperties"] == {"size": 3}
    command = request["containerOverrides"]["command"]
    points = json.loads(open_store(place).read(run.job_points(records[0].name)))
    assert command[command.index("--array") + 1] == (f"{place}/{run.job_points(records[0].name)}")
    for one, record, point in zip(submitted, records, points, strict=True):
        assert point["run"] == one.run_uri
        assert point["config"] == f"{one.run_uri}/{run.job_config(record.name)}"
        text = open_store(one.run_uri).read(run.job_config(record.name)).decode()
        seed = config_from_yaml(text, source="x").train.seed
        assert one.run_uri.endswith(f"/seed={seed}")


def test_of_a_sweep_what_is_finished_is_left_out(parts: dict[str, str], data: str) -> None:
    place = f"s3://{parts['Bucket']}/runs/cats"
    for seed in (0, 1):
        open_store(f"{place}/seed={seed}").write(run.SUMMARY, b"{}")
    said: list[str] = []
    submitted = submit(wish(parts, data, run_uri=place, seeds=4), said.append)
    assert [one.run_uri for one in submitted] == [f"{place}/seed={n}" for n in (2, 3)]
    assert said == [f"left out: {place}/seed={n}: this run is finished" for n in (0, 1)]


def test_what_is_left_of_a_sweep_may_be_one_run(parts: dict[str, str], data: str) -> None:
    place = f"s3://{parts['Bucket']}/runs/cats"
    open_store(f"{place}/seed=0").write(run.SUMMARY, b"{}")
    (one,) = submit(wish(parts, data, run_uri=place, seeds=2), print)
    (record,) = submissions(open_store(one.run_uri))
    assert "arrayProperties" not in record.request
    assert f"{place}/seed=1" in record.request["containerOverrides"]["command"]


def test_a_run_is_no_place_for_a_sweep_nor_the_other_way_round(
    parts: dict[str, str], data: str
) -> None:
    submit(wish(parts, data), print)
    with pytest.raises(ConfigError, match="runs/first: is a run, and can be no place for several"):
        submit(wish(parts, data, seeds=2), print)
    place = f"s3://{parts['Bucket']}/runs/cats"
    submit(wish(parts, data, run_uri=place, seeds=2), print)
    with pytest.raises(ConfigError, match="runs/cats: is the place of several runs"):
        submit(wish(parts, data, run_uri=place), print)
    (again, _) = submit(wish(parts, data, run_uri=place, seeds=2), print)
    assert again.run_uri == f"{place}/seed=0"


def test_a_finished_sweep_is_said_to_be(parts: dict[str, str], data: str) -> None:
    place = f"s3://{parts['Bucket']}/runs/cats"
    for seed in (0, 1):
        open_store(f"{place}/seed={seed}").write(run.SUMMARY, b"{}")
    with pytest.raises(ConfigError, match="every run of the sweep is finished"):
        submit(wish(parts, data, run_uri=place, seeds=2), print)


def test_changes_that_are_not_committed_are_said_and_written_down(
    parts: dict[str, str], data: str, code: list[Revision | None]
) -> None:
    code[0] = Revision(COMMIT, diff_sha256="ab" * 32)
    said: list[str] = []
    (one,) = submit(wish(parts, data), said.append)
    assert len(said) == 1
    assert "changes that are not committed" in said[0]
    (record,) = submissions(open_store(one.run_uri))
    assert record.revision == f"{COMMIT}-dirty-abababababab"


def test_an_image_of_another_commit_is_said(
    parts: dict[str, str], data: str, code: list[Revision | None]
) -> None:
    ecr, name = boto3.client("ecr"), parts["RepositoryUri"].partition("/")[2]
    (image,) = ecr.batch_get_image(repositoryName=name, imageIds=[{"imageTag": "latest"}])["images"]
    ecr.put_image(
        repositoryName=name,
        imageManifest=image["imageManifest"],
        imageManifestMediaType="application/vnd.oci.image.manifest.v1+json",
        imageTag=f"git-{COMMIT}",
    )
    said: list[str] = []
    submit(wish(parts, data), said.append)
    assert said == []
    code[0] = Revision("f" * 40)
    submit(wish(parts, data), said.append)
    assert len(said) == 1
    assert f"was built from {COMMIT}, and this checkout is at {'f' * 40}" in said[0]


def test_a_job_that_cannot_be_written_down_is_ended_again(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, key: str, *rest: Any, **more: Any) -> str:
        if key.endswith("job.json"):
            raise StorageError("no room")
        return write(self, key, *rest, **more)

    def end(self: Any, job_id: str, reason: str) -> None:
        terminated.append(job_id)

    terminated: list[str] = []
    monkeypatch.setattr(BatchBackend, "terminate_job", end)
    kind = type(open_store(data))
    write = kind.write
    monkeypatch.setattr(kind, "write", full)
    with pytest.raises(StorageError, match=r"could not be written down \(no room\); it was ended"):
        submit(wish(parts, data), print)
    (job,) = jobs_of(parts)
    assert terminated == [job["jobId"]]


def test_of_two_who_submit_the_same_at_once_one_is_told_to_wait(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = wish(parts, data)
    store = open_store(one.run_uri)
    monkeypatch.setattr(type(store), "age_s", lambda self, key: age)
    age = 1.0
    store.write(run.CLAIM, b'{"by": "another"}')
    assert "is being submitted by another command" in str(refused(parts, one))
    assert store.read(run.CLAIM) == b'{"by": "another"}'
    age = 1000.0  # that one was killed
    submit(one, print)
    age = 1.0  # it is given back
    submit(one, print)


@pytest.mark.parametrize("there", ["place", "run"])
def test_a_sweep_and_one_of_its_runs_are_not_submitted_at_once(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    place = f"s3://{parts['Bucket']}/runs/cats"
    first = f"{place}/seed=0"
    claim = b'{"by": "another", "lasts_s": 180.2}'
    open_store(place if there == "place" else first).write(run.CLAIM, claim)
    if there == "place":
        said = refused(parts, wish(parts, data, run_uri=first))
        assert f"{place}: is being submitted by another command" in str(said)
        return
    lines: list[str] = []
    (one,) = submit(wish(parts, data, run_uri=place, seeds=2), lines.append)
    assert one.run_uri == f"{place}/seed=1"
    assert lines == [f"left out: {first}: is being submitted by another command"]


def test_a_claim_lasts_as_long_as_it_says(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = wish(parts, data)
    store = open_store(one.run_uri)
    store.write(run.CLAIM, b'{"by": "a large sweep", "lasts_s": 1180}')
    monkeypatch.setattr(type(store), "age_s", lambda self, key: 1000.0)
    assert "works again 20 minutes after it" in str(refused(parts, one).mend)
    store.write(run.CLAIM, b'["nobody\'s"]')
    submit(one, print)


def test_a_run_in_another_is_refused(parts: dict[str, str], data: str) -> None:
    submit(wish(parts, data), print)
    inner = f"s3://{parts['Bucket']}/runs/first/again"
    for more in ({}, {"seeds": 2}):
        with pytest.raises(ConfigError, match=r"lies in the run s3://.*/runs/first"):
            submit(wish(parts, data, run_uri=inner, **more), print)


def test_a_run_around_others_is_refused(parts: dict[str, str], data: str) -> None:
    submit(wish(parts, data, run_uri=f"s3://{parts['Bucket']}/runs/cats/a"), print)
    with pytest.raises(ConfigError, match="runs/cats: is the place of other runs, as a"):
        submit(wish(parts, data, run_uri=f"s3://{parts['Bucket']}/runs/cats"), print)


def test_a_whole_bucket_is_no_run() -> None:
    one = Wish([Point("s3://b", CONFIG)], run_uri="s3://b", data_uri="s3://b/data", stack="s4gan")
    with pytest.raises(ConfigError, match="--run s3://b: is a whole bucket"):
        dry_run(one)


@pytest.mark.parametrize(
    "request_", [{}, {"jobQueue": 3}, {"containerOverrides": {"command": ["train"]}}]
)
def test_a_changed_record_cannot_be_submitted_again(
    parts: dict[str, str], data: str, request_: dict[str, Any]
) -> None:
    (one,) = submit(wish(parts, data), print)
    store = open_store(one.run_uri)
    (record,) = submissions(store)
    changed = dataclasses.replace(record, request=request_)
    store.write(run.job_record(record.name), changed.to_json())
    with pytest.raises(StorageError, match=r"job\.json: is no record of a job"):
        resubmit(one.run_uri, on_demand=None, say=print)


def test_two_threads_submit_once(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is told to wait, or sees the job."""
    one = wish(parts, data)
    free = preflight.free_runs
    meanwhile: list[str] = []

    def slow(*arguments: Any) -> Any:
        if not meanwhile:
            meanwhile.append("")
            with pytest.raises(ConfigError, match="is being submitted by another command"):
                submit(one, print)
        return free(*arguments)

    monkeypatch.setattr(submit_module, "free_runs", slow)
    submit(one, print)
    assert len(jobs_of(parts)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_job_is_submitted_leaves_no_job_that_nobody_knows_of(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(self: Any, name: str, arguments: Any) -> Any:
        if name == "SubmitJob":
            os.kill(os.getpid(), number)
        return call(self, name, arguments)

    from botocore.client import BaseClient

    call = BaseClient._make_api_call
    monkeypatch.setattr(BaseClient, "_make_api_call", interrupted)
    before = signal.getsignal(number)
    said: list[str] = []
    place = f"s3://{parts['Bucket']}/runs/cats"
    submitted = submit(wish(parts, data, run_uri=place, seeds=3), said.append)
    for one in submitted:
        assert [record.job_id for record in submissions(open_store(one.run_uri))] == [one.job_id]
    assert said == [f"{number.name} came when it was submitted already; s4gan cancel ends it"]
    assert signal.getsignal(number) == before


# ---------------------------------------------------------------- what is refused


def test_a_dry_run_refuses_a_run_among_its_own_data() -> None:
    one = Wish(
        [Point("s3://bucket/data/cats/run", CONFIG)],
        run_uri="s3://bucket/data/cats/run",
        data_uri="s3://bucket/data/cats/",
        stack="s4gan",
    )
    with pytest.raises(ConfigError, match="lies in --data"):
        dry_run(one)


def test_a_dry_run_asks_nobody(account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    request, costs = dry_run(wish({"Bucket": "b"}, "s3://b/data/cats", max_hours=1.0))
    assert request["jobQueue"] == "<JobQueue of the stack s4gan>"
    assert request["timeout"] == {"attemptDurationSeconds": 3600}
    assert "What the run may cost" in costs[0]
    assert any("g5.xlarge" in line for line in costs)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"run_uri": "runs/first"}, "--run runs/first: a job in the cloud"),
        ({"run_uri": "s3:///runs/first"}, "s3:///runs/first: names no bucket"),
        ({"run_uri": "s3://b/runs//first"}, "has '//' or a dot"),
        ({"max_hours": 0.001}, "--max-hours 0.001"),
        ({"max_hours": float("nan")}, "--max-hours nan"),
        ({"max_hours": float("inf")}, "--max-hours inf"),
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": 3}, "train.accumulate"),
        ({"nodes": 3, "on_demand": True}, "--gpus 1 on 3 machines: train.accumulate is"),
        ({"nodes": 0}, "--nodes 0"),
        ({"nodes": 2}, "on demand only"),
        ({"nodes": 2, "on_demand": True, "seeds": 2}, "each run of a sweep is on one machine"),
    ],
)
def test_a_wish_that_contradicts_itself(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dry_run(wish({"Bucket": "b"}, "s3://b/data/cats", **more))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "fine"),
    [
        ("none", True),
        ("imagenet", True),
        ("s3://b/data/weights.pth", True),
        ("weights.pth", False),
        ("/data/weights.pth", False),
    ],
)
def test_weights_on_this_machine_cannot_be_reached_from_there(weights: str, fine: bool) -> None:
    config = config_from_yaml(CONFIG.to_yaml(), source="x", overrides={"model.weights": weights})
    one = wish({"Bucket": "b"}, "s3://b/data/cats", config)
    if fine:
        dry_run(one)
    else:
        with pytest.raises(ConfigError, match=r"model\.weights .*: is a file of this machine"):
            dry_run(one)


def test_data_on_this_machine_cannot_be_reached_from_there() -> None:
    with pytest.raises(ConfigError, match=r"--data \./cats: a job in the cloud"):
        dry_run(wish({"Bucket": "b"}, "./cats"))


def refused(parts: dict[str, str], one: Wish) -> JobError:
    """What is said; nothing was submitted."""
    with pytest.raises(JobError) as caught:
        submit(one, print)
    assert jobs_of(parts) == []
    return caught.value


def test_without_a_stack(moto: None) -> None:
    with pytest.raises(ConfigError, match="no stack s4gan in us-east-1") as caught:
        submit(wish({"Bucket": "b"}, "s3://b/data/cats"), print)
    assert "AWS_REGION" in caught.value.mend


@pytest.mark.parametrize(
    "place", ["s3://other/runs/first", "s3://{}/first", "s3://{}/data/first", "s3://{}/runs/"]
)
def test_a_run_where_jobs_may_not_write(parts: dict[str, str], data: str, place: str) -> None:
    error = refused(parts, wish(parts, data, run_uri=place.format(parts["Bucket"])))
    assert "may not write there" in str(error)
    assert f"s3://{parts['Bucket']}/runs/" in error.mend


def test_data_where_jobs_may_not_read(parts: dict[str, str]) -> None:
    error = refused(parts, wish(parts, f"s3://{parts['Bucket']}/elsewhere"))
    assert "may not read there" in str(error)


def test_data_in_a_bucket_that_the_stack_was_not_told_of(parts: dict[str, str]) -> None:
    error = refused(parts, wish(parts, "s3://others/cats"))
    assert "may not read that bucket" in str(error)
    assert error.mend == "s4gan infra deploy --parameter DataBucketArns=arn:aws:s3:::others"


def test_data_in_a_bucket_that_the_stack_was_told_of(
    parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "arn:aws:s3:::more, arn:aws:s3:::others"
    told_of(monkeypatch, DataBucketArns=told)
    boto3.client("s3").create_bucket(Bucket="others")
    lay_data("s3://others/cats")
    assert len(submit(wish(parts, "s3://others/cats"), print)) == 1


def test_an_empty_place_is_no_data_set(parts: dict[str, str]) -> None:
    uri = f"s3://{parts['Bucket']}/data/cats"
    error = refused(parts, wish(parts, uri))
    assert isinstance(error, DataError)
    assert f"{uri}: there is nothing" in str(error)
    open_store(uri).write("train/images/1.png", b"x")
    assert "1 objects, but no dataset.yaml" in str(refused(parts, wish(parts, uri)))


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (b"classes: [a", "cannot be read"),
        (b"clases: [a, b]", "unknown key clases (did you mean classes?)"),
        (b"classes: [a]", "classes must be a list of 2"),
    ],
)
def test_a_broken_description_of_the_data(parts: dict[str, str], info: bytes, said: str) -> None:
    uri = f"s3://{parts['Bucket']}/data/cats"
    lay_data(uri, info)
    error = refused(parts, wish(parts, uri))
    assert isinstance(error, DataError)
    assert error.message.startswith(f"{uri}/dataset.yaml: ")
    assert said in str(error)


@pytest.mark.parametrize(
    ("gone", "said"), [("images", "no training images"), ("masks", "no masks")]
)
def test_data_without_images_or_masks(
    parts: dict[str, str], data: str, gone: str, said: str
) -> None:
    open_store(data).delete(f"train/{gone}/1.png")
    error = refused(parts, wish(parts, data))
    assert f"{data}/train/{gone}/: there are {said}" in str(error)


def lay_tree(uri: str, folder: Path) -> None:
    store = open_store(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())


def of_data(**data: Any) -> Config:
    raw = CONFIG.to_dict()
    return config_from_dict({**raw, "data": {**raw["data"], **data}}, source="test")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", WRITERS)
def test_data_of_other_layouts(
    parts: dict[str, str], tmp_path: Path, layout: str, packed: bool
) -> None:
    uri = f"s3://{parts['Bucket']}/data/{layout}"
    WRITERS[layout](tmp_path / "data")
    if packed:
        pack(str(tmp_path / "data"), uri)
    else:
        lay_tree(uri, tmp_path / "data")
    assert len(submit(wish(parts, uri), print)) == 1
    other = wish(parts, uri, of_data(layout="folder"), run_uri=f"s3://{parts['Bucket']}/runs/b")
    with pytest.raises(DataError):
        submit(other, print)


def test_a_layout_that_is_not_there_or_not_whole(parts: dict[str, str], tmp_path: Path) -> None:
    uri = f"s3://{parts['Bucket']}/data/voc"
    lay_tree(uri, write_voc(tmp_path / "voc", train=1, val=1, others=0))
    error = refused(parts, wish(parts, uri, of_data(layout="cityscapes")))
    assert f"{uri}: is not of the layout cityscapes" in str(error)
    store = open_store(uri)
    store.write("dataset.yaml", b"classes: [a, b]")
    error = refused(parts, wish(parts, uri))
    assert f"{uri}/dataset.yaml: has 2 classes, the masks of this layout have 21" in str(error)
    store.delete("dataset.yaml")
    for name in ("train.txt", "val.txt"):
        path = f"ImageSets/Segmentation/{name}"
        content = store.read(path)
        store.delete(path)
        error = refused(parts, wish(parts, uri))
        assert f"{uri}/{path}: there is no such object" in str(error)
        store.write(path, content)
    store.delete("SegmentationClass/2007_000027.png")
    store.delete("SegmentationClass/2009_000027.png")
    error = refused(parts, wish(parts, uri))
    assert f"{uri}: is of no known layout" in str(error)
    assert "voc: looked for JPEGImages/ and SegmentationClass/" in str(error)
    assert "found JPEGImages/ only" in str(error)


def test_lists_are_looked_for(parts: dict[str, str], data: str) -> None:
    error = refused(parts, wish(parts, data, of_data(labeled_list="splits/l.txt")))
    assert f"{data}/splits/l.txt: there is no such object, which data.labeled_list" in str(error)
    place = f"s3://{parts['Bucket']}"
    for value, said in (
        ("/home/me/l.txt", "is a file of this machine"),
        ("file:///home/me/l.txt", "is a file of this machine"),
        ("../l.txt", "leads out of the data folder"),
        (f"{place}/l.txt", "may not read there"),
        ("s3://others/l.txt", "may not read that bucket"),
        (f"{place}/data/l.txt", "there is no such object"),
    ):
        error = refused(parts, wish(parts, data, of_data(val_list=value)))
        assert f"data.val_list {value}: " in str(error)
        assert said in str(error)
    open_store(data).write("splits/l.txt", b"1")
    open_store(f"{place}/data").write("l.txt", b"1")
    config = of_data(labeled_list="splits/l.txt", val_list=f"{place}/data/l.txt")
    assert len(submit(wish(parts, data, config), print)) == 1


def test_a_pack_is_looked_into_by_its_index(parts: dict[str, str], tmp_path: Path) -> None:
    uri = f"s3://{parts['Bucket']}/data/packed"
    pack(str(write_data(tmp_path / "data")), uri)
    assert len(submit(wish(parts, uri), print)) == 1
    store = open_store(uri)
    (shard,) = (info.key for info in store.list("") if info.key.endswith(".tar"))
    store.write(shard, b"cut off")
    other = wish(parts, uri, run_uri=f"s3://{parts['Bucket']}/runs/other")
    with pytest.raises(DataError, match=r"is missing, or not of the size that pack\.json says"):
        submit(other, print)
    store.write("pack.json", b"{}")
    with pytest.raises(DataError, match=r"packed/pack\.json: is not the index of a pack"):
        submit(other, print)


@pytest.mark.parametrize("key", ["cats.tar", "parts/cats-0001.zip"])
def test_archives_are_a_data_set(parts: dict[str, str], key: str) -> None:
    uri = f"s3://{parts['Bucket']}/data/cats"
    open_store(uri).write(key, b"x")
    assert len(submit(wish(parts, uri), print)) == 1


def test_an_image_that_was_not_pushed(parts: dict[str, str], data: str) -> None:
    name = parts["RepositoryUri"].partition("/")[2]
    boto3.client("ecr").batch_delete_image(repositoryName=name, imageIds=[{"imageTag": "latest"}])
    error = refused(parts, wish(parts, data))
    assert f"the image {parts['RepositoryUri']}:latest was not pushed yet" in str(error)
    assert error.mend == "make image, then s4gan infra push --tag latest"


def test_a_queue_that_is_disabled(parts: dict[str, str], data: str) -> None:
    boto3.client("batch").update_job_queue(jobQueue=parts["JobQueue"], state="DISABLED")
    error = refused(parts, wish(parts, data))
    assert "takes no jobs: it is DISABLED" in str(error)


def test_a_job_that_no_machine_of_the_stack_could_hold(parts: dict[str, str], data: str) -> None:
    config = config_from_yaml(CONFIG.to_yaml(), source="x", overrides={"train.accumulate": 4})
    error = refused(parts, wish(parts, data, config, gpus=4))
    assert "could not run: none of the stack's machines (g4dn.xlarge, " in str(error)
    assert "g4dn.12xlarge" in str(error)


def test_a_configuration_that_takes_more_memory_than_a_gpu_has(
    parts: dict[str, str], data: str
) -> None:
    """The stack has T4s with 16 GiB and A10Gs with 24."""
    images = {"model.backbone": "resnet101", "data.crop_size": 321}
    configs = [
        config_from_yaml(
            CONFIG.to_yaml(), source="x", overrides={**images, "train.batch_size": batch}
        )
        for batch in (4, 24, 40)
    ]
    said: list[str] = []
    submit(wish(parts, data, configs[0], run_uri=f"s3://{parts['Bucket']}/runs/4"), said.append)
    assert said == []
    submit(wish(parts, data, configs[1], run_uri=f"s3://{parts['Bucket']}/runs/24"), said.append)
    assert "takes 19 GiB of a GPU's memory or more" in said[0]
    assert "(g4dn.xlarge)" in said[0]
    with pytest.raises(ConfigError, match="has GPUs with the 31 GiB that the config") as caught:
        submit(wish(parts, data, configs[2], run_uri=f"s3://{parts['Bucket']}/runs/40"), print)
    assert "train.accumulate" in caught.value.mend


def test_a_run_that_is_finished(parts: dict[str, str], data: str) -> None:
    one = wish(parts, data)
    open_store(one.run_uri).write(run.SUMMARY, b"{}")
    assert "this run is finished" in str(refused(parts, one))
    assert len(submit(dataclasses.replace(one, resume_anyway=True), print)) == 1


def test_a_finished_run_that_nothing_has_changed_of_is_not_gone_on_with(
    parts: dict[str, str], data: str
) -> None:
    """A machine would start, see that all is done, and end."""
    one = wish(parts, data, resume_anyway=True)
    store = open_store(one.run_uri)
    store.write(run.CONFIG, CONFIG.to_yaml().encode())
    store.write(run.CHECKPOINTS + "000000001-a0001-abcdef/state.pth", b"x")
    store.write(run.SUMMARY, b"{}")
    assert "this run is finished" in str(refused(parts, one))
    longer = config_from_yaml(CONFIG.to_yaml(), source="x", overrides={"train.iterations": 2000})
    assert len(submit(wish(parts, data, longer, resume_anyway=True), print)) == 1


def test_one_seed_is_below_its_place_too(parts: dict[str, str], data: str) -> None:
    submit(wish(parts, data), print)
    with pytest.raises(ConfigError, match="is a run, and can be no place for several"):
        submit(wish(parts, data, seeds=1), print)


def test_weights_that_several_machines_could_not_download(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train.accumulate": 2, "model.weights": "imagenet"}
    config = config_from_yaml(CONFIG.to_yaml(), source="x", overrides=changes)
    one = wish(parts, data, config, nodes=2, on_demand=True)
    assert "model.weights imagenet: machines of a job on several" in str(refused(parts, one))
    told_of(monkeypatch, VpcId="vpc-1")
    assert len(submit(one, print)) == 1


def test_a_run_of_another_configuration(parts: dict[str, str], data: str) -> None:
    one = wish(parts, data)
    store = open_store(one.run_uri)
    other = config_from_yaml(CONFIG.to_yaml(), source="x", overrides={"train.seed": 7})
    store.write(run.CONFIG, other.to_yaml().encode())
    store.write(run.CHECKPOINTS + "000000001-a0001-abcdef/state.pth", b"x")
    error = refused(parts, one)
    assert "train.seed: 7 in the run, 0 now" in str(error)
    assert len(submit(dataclasses.replace(one, resume_anyway=True), print)) == 1


def test_a_run_that_a_job_is_training(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = wish(parts, data)
    (first,) = submit(one, print)
    record = submissions(open_store(first.run_uri))[0]
    monkeypatch.setattr(preflight, "active_job", lambda store: record)
    with pytest.raises(ConfigError, match=f"has the job {first.job_id} already") as caught:
        submit(one, print)
    assert "s4gan logs" in caught.value.mend
    assert "s4gan cancel" in caught.value.mend


def test_what_aws_refuses_is_explained(
    parts: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Any, name: str, arguments: Any) -> Any:
        if name == "SubmitJob":
            error = {"Code": "AccessDeniedException", "Message": "not authorized"}
            raise ClientError({"Error": error}, name)
        return call(self, name, arguments)

    from botocore.client import BaseClient

    call = BaseClient._make_api_call
    monkeypatch.setattr(BaseClient, "_make_api_call", denied)
    with pytest.raises(AccessDenied, match="cannot submit the job: access denied to SubmitJob"):
        submit(wish(parts, data), print)


def test_an_identity_that_cannot_be_read(parts: dict[str, str], data: str) -> None:
    one = wish(parts, data)
    open_store(one.run_uri).write(run.IDENTITY, b"not json")
    error = refused(parts, one)
    assert "run.json: cannot be read" in str(error)


# ---------------------------------------------------------------- the command


def s4gan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user without any AWS account runs it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return subprocess.run(
        [sys.executable, "-m", "job", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_prints_the_request_and_only_that() -> None:
    done = s4gan(
        *("submit", "--dry-run", "--config", "demo", "--threshold-st", "0.3"),
        *("--data", "s3://b/data/cats", "--run", "s3://b/runs/first/"),
    )
    assert done.returncode == 0
    request = json.loads(done.stdout)
    assert request["containerOverrides"]["command"][-1] == "s3://b/runs/first"
    assert "What the run may cost" in done.stderr


@pytest.mark.parametrize("verb", [["submit", "--data", "s3://b/d"], ["status"], ["cancel"]])
def test_without_credentials_no_command_ends_in_a_traceback(verb: list[str]) -> None:
    place = ["--run", "s3://b/runs/x"] if verb[0] == "submit" else ["s3://b/runs/x"]
    done = s4gan(*verb, *place)
    assert done.returncode in (74, 78)
    assert "credentials" in done.stderr
    assert "Traceback" not in done.stderr


def test_submitting_needs_no_torch() -> None:
    program = (
        "import sys, typer.testing, job.cli as c;"
        "r = typer.testing.CliRunner().invoke(c.app, ['submit', '--dry-run', '--data',"
        " 's3://b/data/x', '--run', 's3://b/runs/x']);"
        "import job.cloud.status, job.cloud.show;"
        "sys.exit(r.exit_code or ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
