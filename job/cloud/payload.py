"""The request of AWS Batch's SubmitJob, as a pure function of what is to be trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VCPUS, MEMORY_MIB = 4, 14_000
"""For one GPU: the stack's own defaults, for a request that no stack was asked for."""
_MAX_NAME, _MAX_TAG = 128, 256
_TAG = re.compile(r"[^\w .:/=+@-]")


@dataclass(frozen=True)
class Job:
    """What is to be trained, and where."""

    run_uri: str
    """Of the run; of an array job, the place of all its runs."""
    data_uri: str
    config_uri: str
    """Of an array job, the file that tells its children what is theirs."""
    queue: str
    definition: str
    stack: str
    runs: int = 1
    """More than one: an array job."""
    nodes: int = 1
    """Machines that train a run together."""
    gpus: int = 1
    """Of each; so are the next two."""
    vcpus: int = VCPUS
    memory_mib: int = MEMORY_MIB
    max_hours: float | None = None
    """For an attempt; None leaves it to the job definition."""
    resume_anyway: bool = False
    revision: str = ""
    """Of the code that submits; empty if it is not known."""


def submit_request(job: Job) -> dict[str, Any]:
    """Arguments of SubmitJob. Nothing secret is in them: anybody who may look at a job reads them.

    What is tried again, how often, and all else that does not differ between runs is the job
    definition's.

    Source: AWS Batch API reference, SubmitJob.
    """
    command = ["train", "--data", job.data_uri]
    if job.runs > 1:
        command += ["--array", job.config_uri]
    else:
        command += ["--config", job.config_uri, "--run", job.run_uri]
    if job.gpus > 1:
        command += ["--gpus", str(job.gpus)]
    if job.resume_anyway:
        command.append("--resume-anyway")
    overrides: dict[str, Any] = {"command": command}
    if job.gpus > 1:
        overrides["resourceRequirements"] = [
            {"type": "GPU", "value": str(job.gpus)},
            {"type": "VCPU", "value": str(job.vcpus)},
            {"type": "MEMORY", "value": str(job.memory_mib)},
        ]
    if job.nodes > 1:
        nodes = [{"targetNodes": "0:", "containerOverrides": overrides}]
        what = {"nodeOverrides": {"numNodes": job.nodes, "nodePropertyOverrides": nodes}}
    else:
        what = {"containerOverrides": overrides}
    tags = {"Project": job.stack, "Run": job.run_uri, "Revision": job.revision}
    request: dict[str, Any] = {
        "jobName": job_name(job.run_uri),
        "jobQueue": job.queue,
        "jobDefinition": job.definition,
        **what,
        "propagateTags": True,
        "tags": {key: _TAG.sub("-", value)[:_MAX_TAG] for key, value in tags.items() if value},
    }
    if job.runs > 1:
        request["arrayProperties"] = {"size": job.runs}
    if job.max_hours is not None:
        request["timeout"] = {"attemptDurationSeconds": round(3600 * job.max_hours)}
    return request


def container_overrides(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a request of `submit_request` says of the container."""
    if "nodeOverrides" in request:
        overrides = request["nodeOverrides"]["nodePropertyOverrides"][0]["containerOverrides"]
    else:
        overrides = request["containerOverrides"]
    return dict(overrides)


@dataclass(frozen=True)
class Submitted:
    """What a request of `submit_request` asked for, but for the run itself."""

    data_uri: str
    nodes: int
    gpus: int
    max_hours: float | None
    resume_anyway: bool

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> Submitted:
        """Read it back.

        Raises:
            LookupError, ValueError, TypeError, AttributeError: it is not such a request.
        """
        container = container_overrides(request)
        command = [str(word) for word in container["command"]]
        needs = container.get("resourceRequirements", ())
        timeout = request.get("timeout")
        return cls(
            data_uri=command[command.index("--data") + 1],
            nodes=int(request.get("nodeOverrides", {}).get("numNodes", 1)),
            gpus=next((int(need["value"]) for need in needs if need["type"] == "GPU"), 1),
            max_hours=float(timeout["attemptDurationSeconds"]) / 3600 if timeout else None,
            resume_anyway="--resume-anyway" in command,
        )


def job_name(run_uri: str) -> str:
    """A name for people: the run's path in its bucket, in the letters that Batch takes."""
    path = run_uri.removeprefix("s3://").partition("/")[2].removeprefix("runs/")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path).strip("-_")
    return f"s4gan-{name or 'run'}"[:_MAX_NAME]
