"""AWS as moto plays it, or as botocore's stub does, word by word."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from moto import mock_aws

from job.cloud import aws, stack
from tests import moto_gaps


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of nobody, and nothing of the user's own account."""
    for name in os.environ:
        if name.startswith(("AWS_", "S4GAN_")):
            monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def moto(account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """AWS in this process; jobs succeed at once."""
    moto_gaps.fill(monkeypatch.setattr)
    with mock_aws(config={"batch": {"use_docker": False}}):
        yield


@pytest.fixture
def parts(moto: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The outputs of a stack that is deployed, with an image in its repository."""
    with monkeypatch.context() as patch:
        patch.setattr(stack, "validate", lambda path: [])  # test_rules.py does
        made = stack.deploy(
            "s4gan", stack.TEMPLATE, for_moto(), say=print, agreed=lambda _: True, poll_s=0
        )
    assert made is not None
    boto3.client("ecr").put_image(
        repositoryName=made["RepositoryUri"].partition("/")[2],
        imageManifest='{"schemaVersion": 2}',
        imageManifestMediaType="application/vnd.oci.image.manifest.v1+json",
        imageTag="latest",
    )
    return made


def for_moto() -> dict[str, str]:
    """It wants Batch's service role to exist, and takes the default of a list for one word."""
    reply = boto3.client("iam").create_role(RoleName="batch", AssumeRolePolicyDocument="{}")
    types = "g4dn.xlarge,g5.xlarge,g5.2xlarge"
    return {"BatchServiceRoleArn": str(reply["Role"]["Arn"]), "InstanceTypes": types}


@pytest.fixture
def stub(account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Stubber]]:
    """A function that gives the stub of a service; each request and reply fits AWS's own model.

    All replies that were prepared have to be asked for. Services whose stub no test asks for are
    moto's, if the test has that too.
    """
    stubs: dict[str, Stubber] = {}

    def of(service: str) -> Stubber:
        if service not in stubs:
            stubs[service] = Stubber(boto3.client(service, region_name="us-east-1"))
            stubs[service].activate()
        return stubs[service]

    def client(service: str, region: str | None = None) -> Any:
        return stubs[service].client if service in stubs else boto3.client(service)

    monkeypatch.setattr(aws, "client", client)
    for module in ("stack", "image", "submit", "preflight", "jobs", "waiting", "machines"):
        monkeypatch.setattr(f"job.cloud.{module}.client", client)
    yield of
    for stubber in stubs.values():
        stubber.assert_no_pending_responses()
