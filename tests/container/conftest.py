"""The real image, built once by `make image` with a real Docker engine, and runs in it.

The CUDA base is pulled if BASE_IMAGE names one; else a small Debian made on the spot stands in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from job.drill.attempt import AttemptProcess

ROOT = Path(__file__).parent.parent.parent
TAG = f"s4gan-test-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}"
"""Of this checkout: two that are tested on a machine do not take each other's image."""
STAND_IN = "s4gan-test-base"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-one",
    "WANDB_API_KEY": "planted-secret-two",
}
"""In the environment of whoever builds; nothing of it may be in the image."""


class Docker:
    """The command line of an engine."""

    def __init__(self, program: str) -> None:
        self.program = program

    def __call__(self, *arguments: str, check: bool = True, **options: Any) -> str:
        """Standard output of a command; both outputs when it fails."""
        ended = subprocess.run(
            [self.program, *arguments], capture_output=True, text=True, check=False, **options
        )
        if check:
            assert ended.returncode == 0, f"docker {arguments}:\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def code(self, *arguments: str) -> tuple[int, str]:
        """Exit status and both outputs of a command."""
        ended = subprocess.run(
            [self.program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return ended.returncode, ended.stdout

    def inspect(self, name: str, kind: str = "container") -> dict[str, Any]:
        """What the engine knows of a container or an image."""
        found: dict[str, Any] = json.loads(self(kind, "inspect", name))[0]
        return found


def make_image(
    docker: Docker, base: str, tag: str, source: Path = ROOT, options: str = ""
) -> subprocess.CompletedProcess[str]:
    """`make image` as a user calls it, with secrets in the environment."""
    return subprocess.run(
        [
            "make",
            "image",
            f"DOCKER={docker.program}",
            f"IMAGE={tag}",
            f"BASE_IMAGE={base}",
            f"BUILD_OPTIONS=--network host --progress plain {options}",
        ],
        cwd=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **SECRETS},
        check=False,
    )


@pytest.fixture(scope="session")
def docker() -> Docker:
    """A client that can build; the tests are skipped where there is no engine."""
    tried = []
    # A client may come without its builder, and hide one from the distribution that has it.
    for program in dict.fromkeys((shutil.which("docker") or "docker", "/usr/bin/docker")):
        try:
            ended = subprocess.run(
                [program, "build", "--quiet", "-"],
                input="FROM scratch\nLABEL is=probe\n",
                capture_output=True,
                text=True,
                env={**os.environ, "DOCKER_BUILDKIT": "1"},
                check=False,
            )
        except OSError as error:
            tried.append(f"{program}: {error.strerror}")
            continue
        if ended.returncode == 0:
            return Docker(program)
        tried.append(f"{program}: {ended.stderr.strip()[-200:]}")
    pytest.skip(
        f"no Docker engine that builds ({'; '.join(tried)}); on Debian and Ubuntu: "
        "apt-get install docker.io debootstrap iptables, then start dockerd"
    )


@pytest.fixture(scope="session")
def base(docker: Docker) -> str:
    """Name of an image to build on."""
    if chosen := os.environ.get("BASE_IMAGE"):
        return chosen
    if docker.code("image", "inspect", STAND_IN)[0] != 0:
        if os.geteuid() != 0 or shutil.which("debootstrap") is None:
            pytest.skip(
                "no image to build on: run as root with debootstrap installed, or name one "
                "that the engine can pull: make test-container BASE_IMAGE=ubuntu:24.04"
            )
        subprocess.run(
            [str(ROOT / "docker" / "stand_in_base.sh"), STAND_IN],
            check=True,
            env={**os.environ, "PATH": f"{Path(docker.program).parent}:{os.environ['PATH']}"},
        )
    return STAND_IN


@pytest.fixture(scope="session")
def image(docker: Docker, base: str) -> str:
    """Name of the image, built from the working tree."""
    ended = make_image(docker, base, TAG)
    assert ended.returncode == 0, ended.stdout[-5000:]
    return TAG


class ContainerAttempt(AttemptProcess):
    """An attempt in a container, as Batch would run it: read-only, one disk to write on."""

    docker: Docker
    image: str
    name: str
    options: Sequence[str] = ()

    def __init__(
        self,
        docker: Docker,
        image: str,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.docker, self.image, self.name, self.options = docker, image, name, options
        self._passed = dict(environment or {})
        super().__init__(arguments)

    def _launch(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(self.docker.program, "run", "--name", self.name, "--init", "--read-only"),
                *("--network", "host", "--shm-size", "1g"),
                *(word for pair in self._passed.items() for word in ("--env", "=".join(pair))),
                *self.options,
                self.image,
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,
        )

    def stop(self) -> None:
        """As an engine stops a container: SIGTERM, and SIGKILL when a minute has passed."""
        self.docker("stop", "--time", "60", self.name)

    def kill(self) -> None:
        """End it if it runs, and forget it with its disk."""
        self.docker("rm", "--force", "--volumes", self.name, check=False)
        super().kill()


@pytest.fixture
def contain(docker: Docker, image: str) -> Iterator[Callable[..., ContainerAttempt]]:
    """A function that starts an attempt in a container; all are removed at the end."""
    started: list[ContainerAttempt] = []

    def start(arguments: Sequence[str], **options: Any) -> ContainerAttempt:
        name = f"s4gan-test-{os.getpid()}-{len(started)}"
        started.append(ContainerAttempt(docker, image, name, arguments, **options))
        return started[-1]

    yield start
    for attempt in started:
        attempt.kill()
