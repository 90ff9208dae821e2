"""Why a job waits, or never would begin: the queue, its machines, and what the job needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from job.cloud.aws import client, explained
from job.cloud.machines import machines

_BATCH_SAYS = {
    "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY": "AWS has no such machine free in the stack's zones "
    "now; wait, allow more types (infra deploy --parameter InstanceTypes=...), or submit it "
    "--on-demand",
    "MISCONFIGURATION:COMPUTE_ENVIRONMENT_MAX_RESOURCE": "the stack may not start machines with so "
    "many vCPUs; infra deploy --parameter MaxvCpus=...",
    "MISCONFIGURATION:JOB_RESOURCE_REQUIREMENT": "no machine of the stack is large enough for the "
    "job; infra deploy --parameter InstanceTypes=...",
    "MISCONFIGURATION:SERVICE_ROLE_PERMISSIONS": "AWS Batch's own role lacks rights; see the "
    "compute environment in the console",
}
"""Source: AWS Batch User Guide, "Jobs stuck in a RUNNABLE status"."""


def environments(queue: str) -> list[Mapping[str, Any]]:
    """The compute environments of a queue, in its order."""
    batch = client("batch")
    with explained("look at the queue"):
        found = batch.describe_job_queues(jobQueues=[queue])["jobQueues"]
    if not found:
        return []
    order = sorted(found[0]["computeEnvironmentOrder"], key=lambda item: int(item["order"]))
    names = [item["computeEnvironment"] for item in order]
    with explained("look at the queue's machines"):
        reply = batch.describe_compute_environments(computeEnvironments=names)
    by_arn = {item["computeEnvironmentArn"]: item for item in reply["computeEnvironments"]}
    return [by_arn[name] for name in names if name in by_arn]


def never(
    queue: Sequence[Mapping[str, Any]], gpus: int, vcpus: int, memory_mib: int, nodes: int = 1
) -> str:
    """Why a job could never begin in any of a queue's environments; empty if it could.

    Args:
        queue: `environments`.
        gpus: needed of a machine.
        vcpus: needed of a machine.
        memory_mib: needed of a machine.
        nodes: machines needed at the same time.
    """
    reasons = []
    for environment in queue:
        reason = _never_in(environment, gpus, vcpus, memory_mib, nodes)
        if not reason:
            return ""
        reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons))


def why_waiting(job: Mapping[str, Any]) -> str:
    """The likely reason why a job has no machine yet; a sentence.

    Args:
        job: as DescribeJobs describes it.
    """
    if job["status"] != "RUNNABLE":
        return "Batch has not looked at it yet"
    said = str(job.get("statusReason", ""))
    for prefix, sentence in _BATCH_SAYS.items():
        if said.startswith(prefix):
            return sentence
    if said:
        return said
    batch = client("batch")
    with explained("look at the queue"):
        queues = batch.describe_job_queues(jobQueues=[job["jobQueue"]])["jobQueues"]
    if not queues:
        return "its queue is gone: cancel it"
    if queues[0]["state"] != "ENABLED":
        return "its queue is disabled"
    found = environments(job["jobQueue"])
    needs = needs_of(container_of(job))
    reason = never(found, *needs, job.get("nodeProperties", {}).get("numNodes", 1))
    if reason:
        return f"it will never begin: {reason}"
    if all(_is_full(environment, needs[1]) for environment in found):
        return "other jobs use all vCPUs that the stack may start (its parameter MaxvCpus)"
    return (
        "no machine has come up yet; that takes a few minutes, and longer when spot machines are "
        "short (--on-demand does not wait for those)"
    )


def container_of(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a job or a job definition says of its container; of several machines', the first's."""
    if "nodeProperties" in described:
        container = described["nodeProperties"]["nodeRangeProperties"][0]["container"]
    else:
        container = described.get("containerProperties") or described.get("container", {})
    return dict(container)


def needs_of(container: Mapping[str, Any]) -> tuple[int, int, int]:
    """GPUs, vCPUs and MiB of memory that a job or a job definition asks for."""
    needs = {
        need["type"]: int(float(need["value"]))
        for need in container.get("resourceRequirements", ())
    }
    return needs.get("GPU", 0), needs.get("VCPU", 0), needs.get("MEMORY", 0)


def _never_in(
    environment: Mapping[str, Any], gpus: int, vcpus: int, memory_mib: int, nodes: int
) -> str:
    name = environment["computeEnvironmentName"]
    if environment["state"] != "ENABLED":
        return f"the compute environment {name} is disabled"
    if environment.get("status") == "INVALID":
        return f"the compute environment {name} is invalid: {environment.get('statusReason', '')}"
    resources = environment["computeResources"]
    if resources["maxvCpus"] < vcpus * nodes:
        return (
            f"it needs {vcpus * nodes} vCPUs, and the stack may start {resources['maxvCpus']} "
            "(its parameter MaxvCpus)"
        )
    types = resources.get("instanceTypes", ())
    known = [machines()[name] for name in types if name in machines()]
    if len(known) == len(types) and not any(
        machine.holds(gpus, vcpus, memory_mib) for machine in known
    ):
        fitting = [m.name for m in machines().values() if m.holds(gpus, vcpus, memory_mib)]
        return (
            f"none of the stack's machines ({', '.join(types)}) has {gpus} GPUs, {vcpus} vCPUs "
            f"and {memory_mib} MiB of memory; those do: {', '.join(fitting[:6]) or 'none'} "
            "(its parameter InstanceTypes)"
        )
    return ""


def _is_full(environment: Mapping[str, Any], vcpus: int) -> bool:
    resources = environment["computeResources"]
    return bool(resources.get("desiredvCpus", 0) + vcpus > resources["maxvCpus"])
