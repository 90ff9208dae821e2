"""The whole story as its user lives it: deploy, submit, watch, interrupt, cancel, go on, pull.

AWS is moto's server, whose Batch runs the real image in real containers; S3 is a real server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from job import run
from job.drill.seaweed import REGION, Identity, SeaweedServer
from tests.conftest import write_data
from tests.container.conftest import Docker
from tests.integration.conftest import SMALL

pytestmark = pytest.mark.timeout(1800)

STACK = "story"
ITERATIONS = 400
PATIENCE_S = 300.0
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


class User:
    """Somebody with a terminal."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Standard output of a command."""
        ended = subprocess.run(
            [sys.executable, "-m", "job", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, f"s4gan {arguments}:\n{ended.stdout}{ended.stderr}"
        assert "Traceback" not in ended.stderr
        return ended.stdout

    def status(self, uri: str) -> dict[str, Any]:
        """Of one run."""
        (found,) = json.loads(self("status", uri, "--json"))
        return dict(found)

    def wait(self, uri: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Look at a run until it is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not until(found := self.status(uri)):
            assert time.monotonic() < deadline, found
            time.sleep(1)
        return found


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment without an AWS account of its own; with nobody's keys."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "S4GAN_", "WANDB_"))]:
        monkeypatch.delenv(name)
    return {
        **os.environ,
        **KEYS,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "COLUMNS": "200",
    }


@pytest.fixture
def aws(
    docker: Docker, outside: dict[str, str], tmp_path: Path
) -> Iterator[tuple[dict[str, str], Path]]:
    """The account: an environment that points at it, and a file that holds a container's.

    Which S3 server jobs talk to is known only when the stack has named its bucket.
    """
    later = tmp_path / "container.json"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.container.cloud", str(later)],
        env=outside,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        assert endpoint, "moto's server did not start"
        try:
            yield {**outside, "AWS_ENDPOINT_URL": endpoint}, later
        finally:
            server.terminate()
            _forget_containers(docker)


def _forget_containers(docker: Docker) -> None:
    """Of jobs that were still running, because the test failed."""
    for name in docker("ps", "--all", "--format", "{{.Names}}").split():
        if name.startswith("s4gan-story-"):
            docker("rm", "--force", "--volumes", name, check=False)


def client(environment: dict[str, str], service: str) -> Any:
    return boto3.client(
        service,
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=REGION,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )


def deploy(user: User) -> dict[str, str]:
    """The stack, in the account's own network, with what moto wants to have said."""
    ec2, iam = client(user.environment, "ec2"), client(user.environment, "iam")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    subnets = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
    role = iam.create_role(RoleName="batch", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    parameters = {
        "BatchServiceRoleArn": role,
        "InstanceTypes": "g4dn.xlarge,g5.xlarge",
        "VpcId": vpc,
        "SubnetIds": ",".join(subnet["SubnetId"] for subnet in subnets[:3]),
    }
    told = [word for pair in parameters.items() for word in ("--parameter", "=".join(pair))]
    shown = user("infra", "deploy", "--stack", STACK, "--yes", *told)
    assert "would change so" in shown
    lines = [line.split() for line in shown.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def push(docker: Docker, image: str, user: User, parts: dict[str, str]) -> None:
    """As `infra push`, but into a repository that moto only keeps the books of."""
    docker("tag", image, f"{parts['RepositoryUri']}:latest")
    client(user.environment, "ecr").put_image(
        repositoryName=parts["RepositoryUri"].partition("/")[2],
        imageManifest='{"schemaVersion": 2}',
        imageManifestMediaType="application/vnd.oci.image.manifest.v1+json",
        imageTag="latest",
    )


def job_of(bucket: str) -> Identity:
    """With the rights of the stack's job role."""
    rights = ("Read:{}/data/*", "List:{}/data/*", "Read:{}/runs/*", "Write:{}/runs/*")
    rights += ("List:{}/runs/*",)
    return Identity("job", "jobkey", "jobsecret", tuple(right.format(bucket) for right in rights))


def test_from_deploying_to_the_model(
    docker: Docker, image: str, aws: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    environment, later = aws
    user = User(environment)
    parts = deploy(user)
    bucket = parts["Bucket"]
    identity = job_of(bucket)
    with SeaweedServer(tmp_path / "s3", buckets=(bucket,), identities=(identity,)) as s3:
        later.write_text(json.dumps(s3.environment(identity)))
        user.environment = {
            **environment,
            **{key: s3.environment()[key] for key in KEYS},
            "AWS_ENDPOINT_URL_S3": s3.endpoint,
            "S4GAN_STACK": STACK,
        }
        write_data(tmp_path / "data")
        data, uri = f"s3://{bucket}/data/shapes", f"s3://{bucket}/runs/story-1"
        user("data", "pack", str(tmp_path / "data"), data)
        settings = {**SMALL, "train.iterations": ITERATIONS, "train.eval_every": 100}
        changes = [f"--set={key}={value}" for key, value in settings.items()]
        submit = ("submit", "--data", data, "--run", uri, *changes)

        # Nothing is sent before the image is there.
        user(*submit, code=78)
        push(docker, image, user, parts)

        # The first job trains, and its machine is taken away.
        said = user(*submit)
        assert f"run  {uri}" in said
        first = said.split()[1]
        found = user.wait(uri, lambda found: bool(found["iteration"] > 20))
        assert (found["state"], found["job_id"]) == ("training", first)
        assert found["iterations"] == ITERATIONS
        user(*submit, code=78)  # it has a job
        docker("stop", "--time", "60", container(docker, first))
        found = user.wait(uri, lambda found: bool(found["state"] == "stopped"))
        assert 20 < found["iteration"] < ITERATIONS
        assert found["attempts"][0]["ended"].startswith("Stopped by SIGTERM")
        interrupted_at = found["iteration"]
        output = user("logs", uri)
        assert output.startswith(f"---- job {first}, attempt 1\n")
        assert f"Iter 20/{ITERATIONS}" in output
        assert f"saved after iteration {interrupted_at}" in output

        # The second goes on, and is cancelled.
        second = json.loads(user("resubmit", uri, "--json"))[0]["job_id"]
        found = user.wait(uri, lambda found: bool(found["iteration"] > interrupted_at + 20))
        assert (found["state"], found["job_id"]) == ("training", second)
        assert f"asked job {second} to save and end" in user("cancel", uri)
        found = user.wait(uri, lambda found: bool(found["state"] == "stopped"))
        assert "cancelled by s4gan cancel" in found["detail"]
        cancelled_at = found["iteration"]
        assert interrupted_at + 20 < cancelled_at < ITERATIONS
        user("cancel", uri, code=78)  # nothing trains it

        # The third finishes; nothing was trained twice.
        user(*submit)
        found = user.wait(
            uri,
            lambda found: bool(
                found["state"] not in ("starting", "training", "waiting", "stopped")
            ),
        )
        assert (found["state"], found["iteration"]) == ("finished", ITERATIONS)
        output = user("logs", uri)
        for iteration in range(1, ITERATIONS + 1):
            assert output.count(f"Iter {iteration}/{ITERATIONS} ") == 1
        assert "3" in user("status")  # all runs of the stack
        costs = json.loads(user("cost", uri, "--json"))[0]
        assert len(costs["attempts"]) == 3
        user(*submit, code=78)  # it is finished

        user("pull", uri, str(tmp_path / "pulled"))
        model = str(tmp_path / "pulled" / run.BEST_MODEL)
        scores = json.loads(user("evaluate", "--weights", model, "--data", data, "--json"))
        summary = json.loads((tmp_path / "pulled" / run.SUMMARY).read_text())
        assert scores["miou"] == pytest.approx(summary["best"]["val_miou"], abs=1e-6)


def container(docker: Docker, job_id: str) -> str:
    """Name of a job's container."""
    names = docker("ps", "--format", "{{.Names}}").split()
    (name,) = [name for name in names if name.endswith(job_id)]
    return name
