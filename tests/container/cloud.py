"""A small AWS in a process of its own: moto's server, whose Batch runs jobs in real containers.

    python -m tests.container.cloud ENVIRONMENT

prints the address it listens on. ENVIRONMENT is a file with a JSON object of variables that each
container gets, as the real ones get their role's keys; it is read when a container starts. What
moto leaves out of a job that matters to one is added here: user, read-only file system, shared
memory, init process, its numbers of the try and in the array; it is asked to end by SIGTERM and
has time to save; exit code and log group are told.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from docker.models.containers import Container, ContainerCollection
from moto.batch.models import Job
from moto.server import ThreadedMotoServer

from tests import moto_gaps

GRACE_S = 110
"""As the stack's machines give."""
LABEL = "s4gan-story"
"""Of each container, with the number of the process that started it: an engine has many users."""


def make_like_batch(environment: Path) -> None:
    """Change moto's and the engine's classes in this process.

    Args:
        environment: a file of what is added to each container's.
    """
    run_container, run_job, stop_attempt = (
        ContainerCollection.run,
        Job.run,
        Job._stop_attempt,
    )

    def run_as_the_definition_says(self: Any, image: str, *rest: Any, **options: Any) -> Any:
        given = json.loads(environment.read_text())
        options["environment"] |= {**given, "AWS_BATCH_JOB_ATTEMPT": "1"}
        _, of_array, index = options["environment"]["AWS_BATCH_JOB_ID"].partition(":")
        if of_array:
            options["environment"]["AWS_BATCH_JOB_ARRAY_INDEX"] = index
        options.pop("mounts")  # the image's own volume is as good as a machine's disk
        return run_container(
            self,
            image,
            *rest,
            user="10001:10001",
            read_only=True,
            init=True,
            shm_size="1g",
            labels={LABEL: str(os.getpid())},
            **options,
        )

    def run_with_its_log_group(self: Any) -> None:
        log = self.job_definition.container_properties["logConfiguration"]
        self._log_group = log["options"]["awslogs-group"]
        run_job(self)

    def stop_with_exit_code(self: Any) -> None:
        stop_attempt(self)
        if self.latest_attempt:
            self.latest_attempt["container"]["exitCode"] = getattr(self, "exit_code", None)

    ContainerCollection.run = run_as_the_definition_says
    Container.kill = functools.partialmethod(Container.stop, timeout=GRACE_S)
    Container.remove = functools.partialmethod(Container.remove, v=True)
    Job.run = run_with_its_log_group
    Job._stop_attempt = stop_with_exit_code
    moto_gaps.fill(setattr)


def main() -> None:
    """Serve until SIGTERM."""
    os.environ["MOTO_DOCKER_NETWORK_MODE"] = "host"
    make_like_batch(Path(sys.argv[1]))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.stop()


if __name__ == "__main__":
    main()
