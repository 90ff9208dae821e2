"""What is in the image, and how a run in it lives and is stopped."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job import run
from job.drill.proof import compare_runs
from job.drill.seaweed import SeaweedServer
from job.storage import open_store
from job.storage.pull import pull
from tests.conftest import write_data
from tests.container.conftest import (
    ROOT,
    SECRETS,
    TAG,
    ContainerAttempt,
    Docker,
    make_image,
)
from tests.integration.conftest import command
from tests.services import BUCKET, JOB, s3_client, wait_until

# The first of them builds the image: minutes, of which most is downloading.
pytestmark = pytest.mark.timeout(1800)

ITERATIONS = 60
Contain = Callable[..., ContainerAttempt]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that anybody may write, with data; containers' users are not ours."""
    write_data(tmp_path / "data")
    (tmp_path / "runs").mkdir(mode=0o777)
    (tmp_path / "runs").chmod(0o777)
    tmp_path.chmod(0o755)
    yield tmp_path
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def mounted(folder: Path) -> tuple[str, ...]:
    return ("--volume", f"{folder}:/work")


# ---------------------------------------------------------------- what it is


def test_it_runs_as_nobody_special_and_gets_signals_itself(docker: Docker, image: str) -> None:
    config = docker.inspect(image, "image")["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["s4gan"]  # no shell between the engine and Python
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "job.heartbeat"]
    assert list(config["Volumes"]) == ["/scratch"]


def test_its_labels_say_what_it_was_built_from(docker: Docker, image: str) -> None:
    labels = docker.inspect(image, "image")["Config"]["Labels"]
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert labels["org.opencontainers.image.revision"] == revision
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*Z", labels["org.opencontainers.image.created"])


def test_no_secret_of_the_builder_is_in_it(docker: Docker, image: str) -> None:
    """It was built with secrets in the environment, from a folder that holds data and history."""
    told = docker("history", "--no-trunc", image) + str(docker.inspect(image, "image"))
    found = docker(
        *("run", "--rm", "--user", "0", "--entrypoint", "grep", image),
        *("-rlsE", "|".join(SECRETS.values()), "/opt/s4gan/src", "/scratch", "/work", "/etc"),
        *("/home", "/root", "/tmp", "/var"),
        check=False,
    )
    assert found == ""
    for name, value in SECRETS.items():
        assert value not in told
        assert name not in told
    code = "import json, os; print(json.dumps(os.listdir('/opt/s4gan/src')))"
    files = json.loads(docker("run", "--rm", "--entrypoint", "python", image, "-c", code))
    made = {"build", "s4gan_job.egg-info"}
    assert set(files) - made == {"LICENSE", "README.md", "job", "pyproject.toml"}


def test_a_change_of_code_installs_no_dependency_again(
    docker: Docker, base: str, image: str, tmp_path: Path
) -> None:
    source, mark = tmp_path / "source", secrets.token_hex(8)
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", "demo", "*_cache", ".git"))
    with open(source / "job" / "heartbeat.py", "a") as file:
        file.write(f"\nCHANGED = {mark!r}\n")  # another one each time, for the engine remembers
    tag = f"{TAG}:changed"
    ended = make_image(docker, base, tag, source)
    assert ended.returncode == 0, ended.stdout[-5000:]

    steps = re.findall(r"^#(\d+) \[.*\] RUN .*pip install.*$", ended.stdout, re.MULTILINE)
    dependencies, program = steps
    assert re.search(rf"^#{dependencies} CACHED", ended.stdout, re.MULTILINE)
    assert not re.search(rf"^#{program} CACHED", ended.stdout, re.MULTILINE)
    said = docker(
        *("run", "--rm", "--entrypoint", "python", tag),
        *("-c", "import job.heartbeat; print(job.heartbeat.CHANGED)"),
    )
    assert said.strip() == mark
    docker("image", "rm", tag)


# ---------------------------------------------------------------- runs in it


def test_stopped_by_the_engine_it_saves_and_goes_on(
    contain: Contain, bucket: str, s3_server: SeaweedServer, tmp_path: Path, s3_env: Any
) -> None:
    """Data and run in S3, nothing writable but /scratch: as Batch runs it."""
    data = write_data(tmp_path / "data")
    with s3_client(s3_server) as client:
        for path in sorted(data.rglob("*")):
            if path.is_file():
                key = f"data/scenes/{path.relative_to(data).as_posix()}"
                client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def attempt(number: int, uri: str) -> ContainerAttempt:
        environment = s3_server.environment(JOB if uri.endswith("/first") else None) | {
            "OMP_NUM_THREADS": "1",
            "AWS_BATCH_JOB_ID": f"job-{uri[-5:]}",
            "AWS_BATCH_JOB_ATTEMPT": str(number),
        }
        arguments = command(f"s3://{BUCKET}/data/scenes", uri, train__iterations=ITERATIONS)
        return contain(arguments, environment=environment)

    first_uri = f"s3://{BUCKET}/runs/first"
    first = attempt(1, first_uri)
    first.wait_for_iteration(20)
    first.stop()
    assert first.finish() == 75, first.output
    assert "device: cpu (no GPU found)" in first.output
    saved = open_store(first_uri).read(run.LATEST_POINTER)
    assert saved

    second = attempt(2, first_uri)
    assert second.finish() == 0, second.output
    assert "Iter 1/" not in second.output

    twin = attempt(1, f"s3://{BUCKET}/runs/other")
    assert twin.finish() == 0, twin.output
    pull(first_uri, tmp_path / "first", everything=True)
    pull(f"s3://{BUCKET}/runs/other", tmp_path / "other", everything=True)
    assert compare_runs(tmp_path / "first", tmp_path / "other", ITERATIONS) == []


def test_health_tells_a_stalled_trainer_from_a_working_one(
    docker: Docker, contain: Contain, folder: Path
) -> None:
    attempt = contain(
        command("data", "runs/long", train__iterations=100_000, train__eval_every=100_000),
        options=(
            *mounted(folder),
            *("--health-cmd", "python -m job.heartbeat --minutes 0.1"),
            *("--health-interval", "1s", "--health-retries", "2"),
            *("--health-start-period", "120s"),
        ),
    )

    def health() -> str:
        status: str = docker.inspect(attempt.name)["State"]["Health"]["Status"]
        return status

    def trainer(signal: str) -> None:
        """The oldest Python is the trainer; process 1 is the engine's init."""
        code = (
            "import os, signal; found = [int(p) for p in os.listdir('/proc') if p.isdigit() and "
            "b'/s4gan' in open(f'/proc/{p}/cmdline', 'rb').read() and int(p) > 1]; "
            f"os.kill(min(found), signal.{signal})"
        )
        docker("exec", attempt.name, "python", "-c", code)

    attempt.wait_for_iteration(5)
    wait_until(lambda: health() == "healthy")
    trainer("SIGSTOP")
    wait_until(lambda: health() == "unhealthy")
    trainer("SIGCONT")
    wait_until(lambda: health() == "healthy")
    attempt.stop()
    assert attempt.finish() == 75


def test_with_little_shared_memory_it_trains_all_the_same(contain: Contain, folder: Path) -> None:
    attempt = contain(
        command("data", "runs/one", train__iterations=10, data__workers=2),
        options=(*mounted(folder), "--shm-size", "64k"),
    )
    assert attempt.finish() == 0, attempt.output
    assert "the trainer loads the images itself" in attempt.output
    assert "--shm-size 2g" in attempt.output


def test_shared_memory_that_others_fill_is_named(
    docker: Docker, contain: Contain, folder: Path
) -> None:
    attempt = contain(
        command("data", "runs/one", train__iterations=100_000, data__workers=1),
        options=(*mounted(folder), "--shm-size", "4m"),
    )
    attempt.wait_for_iteration(2)
    filling = "open('/dev/shm/filler', 'wb').write(bytes(2**23))"
    assert docker.code("exec", attempt.name, "python", "-c", filling)[0] != 0  # it is full
    assert attempt.finish() == 74, attempt.output
    assert "Traceback" not in attempt.output
    assert "the shared memory (/dev/shm) is full" in attempt.output


def test_any_user_may_run_it(contain: Contain, folder: Path) -> None:
    attempt = contain(
        command("data", "runs/one", train__iterations=10),
        options=(*mounted(folder), "--user", "12345:12345"),
    )
    assert attempt.finish() == 0, attempt.output
    assert (folder / "runs" / "one" / run.BEST_MODEL).stat().st_uid == 12345


def test_a_folder_of_ours_that_it_may_not_write_is_named(contain: Contain, folder: Path) -> None:
    (folder / "runs").chmod(0o755)
    attempt = contain(
        command("data", "runs/one"), options=(*mounted(folder), "--user", "12345:12345")
    )
    assert attempt.finish() == 74, attempt.output
    assert "Traceback" not in attempt.output
    assert "runs" in attempt.output
    assert "mend:" in attempt.output


def test_a_scratch_that_cannot_be_written_is_named(
    contain: Contain, folder: Path, tmp_path: Path
) -> None:
    attempt = contain(
        command("data", "runs/one"),
        options=(*mounted(folder), "--volume", f"{folder / 'data'}:/scratch:ro"),
    )
    assert attempt.finish() == 74, attempt.output
    assert "Traceback" not in attempt.output
    assert "in a container mount one at /scratch" in attempt.output


def test_run_local_leaves_files_that_are_ours(docker: Docker, image: str, folder: Path) -> None:
    ended = subprocess.run(
        [
            str(ROOT / "scripts" / "run_local.sh"),
            *command("data", "runs/one", train__iterations=10),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "IMAGE": image, "DOCKER": docker.program},
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "no GPU on this machine" in ended.stderr
    assert (folder / "runs" / "one" / run.BEST_MODEL).stat().st_uid == folder.stat().st_uid
