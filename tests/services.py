"""Fixtures: a real S3 server, a network that fails on demand, an instance's metadata service.

One server per pytest process (so one per xdist worker) is started by the first test that needs it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config

from job.drill.imds import FakeImds
from job.drill.proxy import FaultProxy
from job.drill.seaweed import REGION, Identity, SeaweedServer

BUCKET = "s4gan-tests"
JOB = Identity(
    "job",
    "jobkey",
    "jobsecret",
    (
        f"Read:{BUCKET}/data/*",
        f"List:{BUCKET}/data/*",
        f"Read:{BUCKET}/runs/first/*",
        f"Write:{BUCKET}/runs/first/*",
        f"List:{BUCKET}/runs/first/*",
    ),
)
"""What a training job may do: read `data/` and own `runs/first/` of the tests' bucket."""


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """The server of this pytest process; without its package tests fail, they are not skipped."""
    folder = tmp_path_factory.mktemp("s3")
    with SeaweedServer(folder, buckets=(BUCKET,), identities=(JOB,)) as server:
        yield server
    shutil.rmtree(folder)  # pytest would keep the objects of three sessions


@pytest.fixture
def s3_env(s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The process's environment points at the server, and at nothing of the user's own account."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    environment = {
        **s3_server.environment(),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> str:
    """Name of an empty bucket.

    Always the same one: to make another takes a quarter of a second, and the server has room for
    a few dozen only.
    """
    with s3_client(s3_server) as client:
        _empty(client, BUCKET)
    return BUCKET


@pytest.fixture
def fault_proxy(s3_server: SeaweedServer) -> Iterator[FaultProxy]:
    """A proxy of this test's own in front of the server; `endpoint` is where to point clients."""
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def imds() -> Iterator[FakeImds]:
    """A spot instance's metadata service that announces nothing yet."""
    with FakeImds() as service:
        yield service


@contextlib.contextmanager
def s3_client(
    server: SeaweedServer,
    *,
    endpoint: str = "",
    identity: Identity | None = None,
    attempts: int = 1,
    **config: Any,
) -> Iterator[Any]:
    """A boto3 client of the server (through `endpoint`: that of a proxy), closed at the end."""
    environment = server.environment(identity)
    client = boto3.client(
        "s3",
        endpoint_url=endpoint or server.endpoint,
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
        config=Config(retries={"total_max_attempts": attempts}, **config),
    )
    with contextlib.closing(client):
        yield client


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fails if it does not for a whole minute."""
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def _empty(client: Any, bucket: str) -> None:
    for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        if keys := [{"Key": item["Key"]} for item in page.get("Contents", ())]:
            client.delete_objects(Bucket=bucket, Delete={"Objects": keys})
