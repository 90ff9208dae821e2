"""Why a job waits, or never would begin: the queue, its machines, and what the job needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from job.cloud.aws import client, explained, region_of
from job.cloud.machines import Machine, Needs, machines

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


def queue_of(arn: str) -> Mapping[str, Any] | None:
    """As Batch describes a queue; None if it is gone."""
    with explained("look at the queue"):
        batch = client("batch", region_of(arn))
        found = batch.describe_job_queues(jobQueues=[arn])["jobQueues"]
    return dict(found[0]) if found else None


def environments(queue: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The compute environments of a queue, in its order.

    Args:
        queue: `queue_of`.
    """
    order = sorted(queue["computeEnvironmentOrder"], key=lambda item: int(item["order"]))
    names = [item["computeEnvironment"] for item in order]
    with explained("look at the queue's machines"):
        batch = client("batch", region_of(queue["jobQueueArn"]))
        reply = batch.describe_compute_environments(computeEnvironments=names)
    by_arn = {item["computeEnvironmentArn"]: item for item in reply["computeEnvironments"]}
    return [by_arn[name] for name in names if name in by_arn]


def never(queue: Sequence[Mapping[str, Any]], needs: Needs) -> str:
    """Why a job could never begin in any of a queue's environments; empty if it could.

    Args:
        queue: `environments`.
        needs: of the job.
    """
    reasons = []
    for environment in queue:
        reason = _never_in(environment, needs)
        if not reason:
            return ""
        reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons))


def too_small(queue: Sequence[Mapping[str, Any]], needs: Needs) -> list[Machine]:
    """Machines that a job may be given, though its GPUs' memory cannot be enough."""
    names = {name for one in queue for name in one["computeResources"].get("instanceTypes", ())}
    found = (machines()[name] for name in sorted(names) if name in machines())
    return [machine for machine in found if machine.holds(needs) and not machine.computes(needs)]


def crowded(queue: Sequence[Mapping[str, Any]], needs: Needs) -> str:
    """Why a job on several machines may wait for ever; empty if nothing speaks for it.

    Each of its machines is its own, however little of it the job uses.

    Args:
        queue: `environments`.
        needs: of the job.
    """
    if needs.nodes == 1:
        return ""
    found = []
    for one in queue:
        resources = one["computeResources"]
        names = resources.get("instanceTypes", ())
        known = [machines()[name] for name in names if name in machines()]
        vcpus = [machine.vcpus for machine in known if machine.holds(needs)]
        if (
            not vcpus
            or len(known) < len(names)
            or needs.nodes * min(vcpus) <= resources["maxvCpus"]
        ):
            return ""
        found.append((needs.nodes * min(vcpus), resources["maxvCpus"]))
    wanted, most = min(found)
    return (
        f"its {needs.nodes} machines have {wanted} vCPUs together, and the stack may start {most} "
        f"(its parameter MaxvCpus)"
    )


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
    queue = queue_of(job["jobQueue"])
    if queue is None:
        return "its queue is gone: cancel it"
    if queue["state"] != "ENABLED":
        return "its queue is disabled"
    found = environments(queue)
    needs = needs_of(container_of(job), job.get("nodeProperties", {}).get("numNodes", 1))
    reason = never(found, needs)
    if reason:
        return f"it will never begin: {reason}"
    reason = crowded(found, needs)
    if reason:
        return reason
    if all(_is_full(environment, needs.vcpus) for environment in found):
        return "other jobs use all vCPUs that the stack may start (its parameter MaxvCpus)"
    if any(one["computeResources"].get("type") == "SPOT" for one in found):
        return (
            "no machine has come up yet; that takes a few minutes, and longer when spot machines "
            "are short (--on-demand does not wait for those)"
        )
    return "no machine has come up yet; that takes a few minutes"


def container_of(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a job or a job definition says of its container; of several machines', the first's."""
    if "nodeProperties" in described:
        container = described["nodeProperties"]["nodeRangeProperties"][0]["container"]
    else:
        container = described.get("containerProperties") or described.get("container", {})
    return dict(container)


def needs_of(container: Mapping[str, Any], nodes: int = 1) -> Needs:
    """What a job or a job definition asks for; 0 where it says nothing."""
    said = {
        need["type"]: int(float(need["value"]))
        for need in container.get("resourceRequirements", ())
    }
    return Needs(said.get("GPU", 0), said.get("VCPU", 0), said.get("MEMORY", 0), nodes)


def _never_in(environment: Mapping[str, Any], needs: Needs) -> str:
    name = environment["computeEnvironmentName"]
    if environment["state"] != "ENABLED":
        return f"the compute environment {name} is disabled"
    if environment.get("status") == "INVALID":
        return f"the compute environment {name} is invalid: {environment.get('statusReason', '')}"
    resources = environment["computeResources"]
    vcpus = needs.vcpus * needs.nodes
    if resources["maxvCpus"] < vcpus:
        return (
            f"it needs {vcpus} vCPUs, and the stack may start {resources['maxvCpus']} "
            "(its parameter MaxvCpus)"
        )
    types = resources.get("instanceTypes", ())
    known = [machines()[name] for name in types if name in machines()]
    if len(known) < len(types):
        return ""  # of the others nothing is known
    large = [machine for machine in known if machine.holds(needs)]
    if any(machine.computes(needs) for machine in large):
        return ""
    fitting = [m.name for m in machines().values() if m.holds(needs) and m.computes(needs)]
    what = f"{needs.gpus} GPUs, {needs.vcpus} vCPUs and {needs.memory_mib} MiB of memory"
    if large:
        what = f"GPUs with the {needs.gpu_bytes / 2**30:.0f} GiB that the configuration takes"
    return (
        f"none of the stack's machines ({', '.join(types)}) has {what}; those do: "
        f"{', '.join(fitting[:6]) or 'none'} (its parameter InstanceTypes)"
    )


def _is_full(environment: Mapping[str, Any], vcpus: int) -> bool:
    resources = environment["computeResources"]
    return bool(resources.get("desiredvCpus", 0) + vcpus > resources["maxvCpus"])
