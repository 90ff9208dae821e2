"""The whole story as its user lives it: deploy, submit, watch, interrupt, cancel, go on, pull.

AWS is moto's server, whose Batch runs the real image in real containers; S3 is a real server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from job.errors import ExitCode
from tests.conftest import write_data
from tests.container.cloud import LABEL
from tests.container.conftest import Docker
from tests.integration.conftest import SMALL

pytestmark = pytest.mark.timeout(1800)

STACK = f"story-{os.getpid()}"
"""Names the image too, and an engine has many users."""
ENDLESS = 100_000
"""Iterations of a run that no machine is so quick, and no test so slow, as to see the end of."""
PATIENCE_S = 300.0
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


class User:
    """Somebody with a terminal."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def __call__(self, *arguments: str) -> str:
        """Standard output of a command."""
        return self._s4gan(0, *arguments).stdout

    def refused(self, *arguments: str) -> str:
        """What a command says that cannot be."""
        return self._s4gan(78, *arguments).stderr

    def _s4gan(self, code: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "job", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"s4gan {arguments}:\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

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
            server.kill()  # it has nothing to save
            server.wait()  # it starts no container any more
            _forget_containers(docker, server.pid)


def _forget_containers(docker: Docker, pid: int) -> None:
    """Of a server's jobs that were still running, because the test failed."""
    for name in docker("ps", "--all", "--quiet", "--filter", f"label={LABEL}={pid}").split():
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


@contextlib.contextmanager
def pushed(docker: Docker, image: str, user: User, parts: dict[str, str]) -> Iterator[None]:
    """As `infra push`, but into a repository that moto only keeps the books of."""
    name = f"{parts['RepositoryUri']}:latest"
    docker("tag", image, name)
    client(user.environment, "ecr").put_image(
        repositoryName=parts["RepositoryUri"].partition("/")[2],
        imageManifest='{"schemaVersion": 2}',
        imageManifestMediaType="application/vnd.oci.image.manifest.v1+json",
        imageTag="latest",
    )
    try:
        yield
    finally:
        # The name only; by force, as the container of a test that failed may still be there.
        docker("rmi", "--force", name, check=False)


def job_of(bucket: str) -> Identity:
    """With the rights of the stack's job role."""
    rights = (
        "Read:{}/data/*",
        "List:{}/data/*",
        "Read:{}/runs/*",
        "Write:{}/runs/*",
        "List:{}/runs/*",
    )
    return Identity("job", "jobkey", "jobsecret", tuple(right.format(bucket) for right in rights))


@contextlib.contextmanager
def account(
    docker: Docker, image: str, aws: tuple[dict[str, str], Path], tmp_path: Path
) -> Iterator[tuple[User, str]]:
    """A user with the stack, the image in its repository and data in its bucket; the bucket."""
    environment, later = aws
    user = User({**environment, "S4GAN_STACK": STACK})
    parts = deploy(user)
    bucket = parts["Bucket"]
    identity = job_of(bucket)
    write_data(tmp_path / "data")
    with SeaweedServer(tmp_path / "s3", buckets=(bucket,), identities=(identity,)) as s3:
        # One thread each, as the tests have: with more they wait for each other on a busy machine.
        later.write_text(json.dumps({**s3.environment(identity), "OMP_NUM_THREADS": "1"}))
        user.environment |= {key: s3.environment()[key] for key in KEYS}
        user.environment["AWS_ENDPOINT_URL_S3"] = s3.endpoint
        user("data", "pack", str(tmp_path / "data"), f"s3://{bucket}/data/shapes")
        assert "was not pushed yet" in user.refused(
            *("submit", "--data", f"s3://{bucket}/data/shapes", "--run", f"s3://{bucket}/runs/x")
        )
        with pushed(docker, image, user, parts):
            yield user, bucket


def ended(found: dict[str, Any]) -> bool:
    return found["state"] in ("finished", "failed")


def test_from_deploying_to_the_model(
    docker: Docker, image: str, aws: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    with account(docker, image, aws, tmp_path) as (user, bucket):
        data, uri = f"s3://{bucket}/data/shapes", f"s3://{bucket}/runs/story-1"
        submit = (
            *("submit", "--config", "demo", "--data", data, "--run", uri),
            *(f"--set={key}={value}" for key, value in SMALL.items()),
        )
        endless = (*submit, f"--set=train.iterations={ENDLESS}")

        # The first job trains, and its machine is taken away.
        said = user(*endless)
        assert f"run  {uri}" in said
        first = said.split()[1]
        found = user.wait(uri, lambda found: bool(found["iteration"] > 20))
        assert (found["state"], found["job_id"]) == ("training", first)
        assert found["iterations"] == ENDLESS
        assert f"has the job {first} already" in user.refused(*endless)
        docker("stop", "--time", "60", container(docker, first))
        found = user.wait(uri, lambda found: bool(found["state"] == "stopped"))
        assert 20 < found["iteration"] < ENDLESS
        assert found["attempts"][0]["ended"].startswith("Stopped by SIGTERM")
        assert exit_code(user, first) == ExitCode.PREEMPTED
        interrupted_at = found["iteration"]
        output = user("logs", uri)
        assert output.startswith(f"---- job {first}, attempt 1\n")
        assert f"Iter 20/{ENDLESS}" in output
        assert f"saved after iteration {interrupted_at}" in output

        # The second goes on, and is cancelled.
        second = json.loads(user("resubmit", uri, "--json"))[0]["job_id"]
        found = user.wait(uri, lambda found: bool(found["iteration"] > interrupted_at + 20))
        assert (found["state"], found["job_id"]) == ("training", second)
        assert f"asked job {second} to save and end" in user("cancel", uri)
        found = user.wait(uri, lambda found: bool(found["state"] == "stopped"))
        assert "cancelled: by s4gan cancel" in found["detail"]
        assert exit_code(user, second) == ExitCode.PREEMPTED
        cancelled_at = found["iteration"]
        assert interrupted_at + 20 < cancelled_at < ENDLESS
        assert "nothing trains this run" in user.refused("cancel", uri)

        # The third is to come to an end, which is another configuration. Nothing is trained twice.
        last = cancelled_at + 40
        to_the_end = (*submit, f"--set=train.iterations={last}")
        assert "began with another configuration" in user.refused(*to_the_end)
        third = json.loads(user(*to_the_end, "--resume-anyway", "--json"))[0]["job_id"]
        found = user.wait(uri, lambda found: ended(found) and found["job_id"] == third)
        assert (found["state"], found["iteration"]) == ("finished", last)
        assert exit_code(user, third) == ExitCode.OK
        trained = re.findall(r"^Iter (\d+)/", user("logs", uri), re.MULTILINE)
        assert [int(iteration) for iteration in trained] == list(range(1, last + 1))
        assert f"run            {uri}" in user("status")  # of all runs of the stack
        costs = json.loads(user("cost", uri, "--json"))[0]
        assert len(costs["attempts"]) == 3
        assert "this run is finished" in user.refused(*to_the_end)

        user("pull", uri, str(tmp_path / "pulled"))
        model = str(tmp_path / "pulled" / run.BEST_MODEL)
        scores = json.loads(user("evaluate", "--weights", model, "--data", data, "--json"))
        summary = json.loads((tmp_path / "pulled" / run.SUMMARY).read_text())
        assert scores["miou"] == pytest.approx(summary["best"]["val_miou"], abs=1e-6)


def test_a_sweep_is_one_command(
    docker: Docker, image: str, aws: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    with account(docker, image, aws, tmp_path) as (user, bucket):
        data, place = f"s3://{bucket}/data/shapes", f"s3://{bucket}/runs/sweep"
        changes = [f"--set={key}={value}" for key, value in SMALL.items()]
        submit = ("submit", "--data", data, "--run", place, "--seeds", "2", *changes)
        submitted = json.loads(user(*submit, "--json"))
        assert [one["run_uri"] for one in submitted] == [f"{place}/seed=0", f"{place}/seed=1"]
        for one in submitted:
            user.wait(one["run_uri"], ended)
        found = json.loads(user("status", place, "--json"))
        assert [one["state"] for one in found] == ["finished", "finished"]
        assert found[0]["val_miou"] != found[1]["val_miou"]
        assert "every run of the sweep is finished" in user.refused(*submit)


def exit_code(user: User, job_id: str) -> int:
    """What Batch has seen of a job's end, and decides by whether to try it again."""
    (job,) = client(user.environment, "batch").describe_jobs(jobs=[job_id])["jobs"]
    return int(job["attempts"][-1]["container"]["exitCode"])


def container(docker: Docker, job_id: str) -> str:
    """Name of a job's container."""
    names = docker("ps", "--format", "{{.Names}}").split()
    (name,) = [name for name in names if name.endswith(job_id)]
    return name
