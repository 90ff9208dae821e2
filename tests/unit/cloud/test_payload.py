"""What is sent to Batch, word by word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from job.cloud.payload import Job, container_overrides, job_name, submit_request

GOLDEN = Path(__file__).parents[2] / "golden" / "submit_requests.json"
ONE = Job(
    run_uri="s3://bucket/runs/cats/first",
    data_uri="s3://bucket/data/cats",
    config_uri="s3://bucket/runs/cats/first/jobs/20261126T120000Z-abc123/config.yaml",
    queue="arn:aws:batch:us-east-1:123456789012:job-queue/s4gan",
    definition="arn:aws:batch:us-east-1:123456789012:job-definition/s4gan:1",
    stack="s4gan",
    revision="0123456789abcdef0123456789abcdef01234567",
)
JOBS = {
    "one GPU": ONE,
    "four GPUs for ten hours, whatever changed": Job(
        **{
            **vars(ONE),
            "gpus": 4,
            "max_hours": 10.0,
            "resume_anyway": True,
            "vcpus": 16,
            "memory_mib": 56_000,
        }
    ),
    "two machines with four GPUs each": Job(
        **{
            **vars(ONE),
            "definition": ONE.definition.replace("s4gan:1", "s4gan-nodes:1"),
            "queue": ONE.queue + "-on-demand",
            "nodes": 2,
            "gpus": 4,
            "vcpus": 16,
            "memory_mib": 56_000,
        }
    ),
    "six runs": Job(
        **{
            **vars(ONE),
            "run_uri": "s3://bucket/runs/cats",
            "config_uri": "s3://bucket/runs/cats/jobs/20261126T120000Z-abc123/points.json",
            "runs": 6,
        }
    ),
}


def test_the_requests_are_the_golden_ones() -> None:
    """After a wanted change: write `submit_request` of each into the file, and read the diff."""
    golden = json.loads(GOLDEN.read_text())
    assert {name: submit_request(job) for name, job in JOBS.items()} == golden


@pytest.mark.parametrize("name", JOBS)
def test_aws_takes_the_request(name: str, account: None) -> None:
    """By the service's own model of it."""
    batch = boto3.client("batch")
    request = submit_request(JOBS[name])
    with Stubber(batch) as stubber:
        stubber.add_response("submit_job", {"jobName": "x", "jobId": "1"}, request)
        batch.submit_job(**request)


def test_tags_hold_only_what_aws_lets_them_hold() -> None:
    request = submit_request(
        Job(**{**vars(ONE), "run_uri": "s3://bucket/runs/größer, schöner;" + "x" * 300})
    )
    tag = request["tags"]["Run"]
    assert tag.startswith("s3://bucket/runs/größer- schöner-")
    assert len(tag) == 256


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/runs/first", "s4gan-first"),
        ("s3://bucket/runs/cats/loss.threshold_st=0.1/seed=2", "s4gan-cats-loss-threshold_st-0-1"),
        ("s3://bucket/runs/größer", "s4gan-gr-er"),
        ("s3://bucket/runs/猫", "s4gan-run"),
        ("s3://bucket/runs/" + "x" * 300, "s4gan-" + "x" * 122),
    ],
)
def test_names_are_in_letters_that_batch_takes(uri: str, name: str) -> None:
    assert job_name(uri).startswith(name)
    assert len(job_name(uri)) <= 128


def test_nothing_secret_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "a" * 40
    monkeypatch.setenv("WANDB_API_KEY", secret)
    requests: list[Any] = [submit_request(job) for job in JOBS.values()]
    assert secret not in json.dumps(requests)
    assert all("environment" not in container_overrides(request) for request in requests)
