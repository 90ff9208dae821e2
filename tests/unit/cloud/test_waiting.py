"""Why a job waits, or never would begin."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from botocore.stub import Stubber

from job.cloud.machines import Needs
from job.cloud.waiting import (
    crowded,
    environments,
    needs_of,
    never,
    queue_of,
    too_small,
    why_waiting,
)

Stub = Callable[[str], Stubber]
QUEUE = "arn:aws:batch:us-east-1:123456789012:job-queue/s4gan"
ARN = "arn:aws:batch:us-east-1:123456789012:compute-environment/"


def environment(name: str = "spot", **more: Any) -> dict[str, Any]:
    resources = {
        "type": "SPOT",
        "maxvCpus": 64,
        "desiredvCpus": 0,
        "instanceTypes": ["g5.xlarge", "g4dn.12xlarge"],
        "subnets": [],
        **more.pop("resources", {}),
    }
    return {
        "computeEnvironmentName": name,
        "computeEnvironmentArn": ARN + name,
        "state": "ENABLED",
        "status": "VALID",
        "computeResources": resources,
        **more,
    }


def queue(state: str = "ENABLED") -> dict[str, Any]:
    return {
        "jobQueues": [
            {
                "jobQueueName": "s4gan",
                "jobQueueArn": QUEUE,
                "state": state,
                "status": "VALID",
                "priority": 1,
                "computeEnvironmentOrder": [
                    {"order": 2, "computeEnvironment": ARN + "on-demand"},
                    {"order": 1, "computeEnvironment": ARN + "spot"},
                ],
            }
        ]
    }


def job(status: str = "RUNNABLE", reason: str = "", gpus: int = 1, vcpus: int = 4) -> Any:
    needs = {"GPU": gpus, "VCPU": vcpus, "MEMORY": 14_000 * gpus}
    return {
        "status": status,
        "statusReason": reason,
        "jobQueue": QUEUE,
        "container": {
            "resourceRequirements": [{"type": k, "value": str(v)} for k, v in needs.items()]
        },
    }


def with_environments(stub: Stub, *found: dict[str, Any]) -> None:
    batch = stub("batch")
    batch.add_response("describe_job_queues", queue(), {"jobQueues": [QUEUE]})
    batch.add_response(
        "describe_compute_environments",
        {"computeEnvironments": list(found)},
        {"computeEnvironments": [ARN + "spot", ARN + "on-demand"]},
    )


@pytest.mark.parametrize(
    ("needs", "most", "said"),
    [
        (Needs(4, 16, 1, nodes=2), 64, "its 2 machines have 96 vCPUs together, and .* start 64"),
        (Needs(4, 16, 1, nodes=2), 96, ""),
        (Needs(1, 4, 1, nodes=2), 8, ""),
        (Needs(1, 4, 1, nodes=3), 8, "3 machines have 12 vCPUs"),
        (Needs(4, 16, 1), 16, ""),  # Batch goes beyond its limit by one machine
    ],
)
def test_machines_of_a_job_on_several_count_as_a_whole(needs: Needs, most: int, said: str) -> None:
    found = crowded([environment(resources={"maxvCpus": most})], needs)
    assert re.search(said, found) if said else found == ""


def test_of_machines_that_are_not_known_nothing_is_said() -> None:
    of_tomorrow = environment(resources={"instanceTypes": ["g9.xlarge", "g4dn.12xlarge"]})
    assert crowded([of_tomorrow], Needs(4, 16, 1, nodes=9)) == ""


def test_a_job_on_several_that_waits_for_vcpus(stub: Stub) -> None:
    with_environments(stub, environment(), environment("on-demand"))
    waiting = job(gpus=4, vcpus=16)
    nodes = {"numNodes": 2, "nodeRangeProperties": [{"container": waiting.pop("container")}]}
    assert "96 vCPUs together" in why_waiting({**waiting, "nodeProperties": nodes})


def test_environments_come_in_the_order_of_the_queue(stub: Stub) -> None:
    batch = stub("batch")
    batch.add_response("describe_job_queues", queue(), {"jobQueues": [QUEUE]})
    batch.add_response(
        "describe_compute_environments",
        {"computeEnvironments": [environment("on-demand"), environment("spot")]},
    )
    found = queue_of(QUEUE)
    assert found is not None
    names = [one["computeEnvironmentName"] for one in environments(found)]
    assert names == ["spot", "on-demand"]


def test_a_queue_that_is_gone_is_none(stub: Stub) -> None:
    stub("batch").add_response("describe_job_queues", {"jobQueues": []})
    assert queue_of(QUEUE) is None


@pytest.mark.parametrize("needs", [(1, 4, 14_000), (4, 16, 56_000), (1, 48, 170_000)])
def test_what_fits_is_let_through(needs: tuple[int, int, int]) -> None:
    assert never([environment()], Needs(*needs)) == ""


@pytest.mark.parametrize(
    ("found", "needs", "reason"),
    [
        ([environment()], (8, 32, 112_000), r"none of .* has 8 GPUs.*; those do: .*g5\.48xlarge"),
        ([environment()], (16, 64, 1), "those do: none"),
        ([environment()], (1, 65, 1), "needs 65 vCPUs, and the stack may start 64"),
        (
            [environment(resources={"instanceTypes": ["g5.xlarge"]})],
            (1, 4, 16_000),
            "16000 MiB of memory",
        ),
        ([environment(state="DISABLED")], (1, 4, 1), "spot is disabled"),
        (
            [environment(status="INVALID", statusReason="no role")],
            (1, 4, 1),
            "spot is invalid: no role",
        ),
        (
            [environment(state="DISABLED"), environment("on-demand", state="DISABLED")],
            (1, 4, 1),
            "spot is disabled; the compute environment on-demand is disabled",
        ),
    ],
)
def test_what_never_fits_is_said(found: Any, needs: tuple[int, int, int], reason: str) -> None:
    assert re.search(reason, never(found, Needs(*needs)))


def test_a_gpus_memory_may_be_too_small() -> None:
    """A T4 has 16 GiB, an A10G 24."""
    mixed = [environment(resources={"instanceTypes": ["g4dn.xlarge", "g5.xlarge", "g5.12xlarge"]})]
    few, many, more = (Needs(1, 4, 14_000, gpu_bytes=gib * 2**30) for gib in (10, 20, 30))
    assert never(mixed, few) == never(mixed, many) == ""
    assert too_small(mixed, few) == []
    assert [machine.name for machine in too_small(mixed, many)] == ["g4dn.xlarge"]
    said = never(mixed, more)
    assert "has GPUs with the 30 GiB that the configuration takes; those do: g6e.xlarge" in said


def test_one_environment_that_fits_is_enough() -> None:
    assert never([environment(state="DISABLED"), environment("on-demand")], Needs(1, 4, 1)) == ""


def test_of_machines_that_are_not_in_the_table_nothing_is_said() -> None:
    found = environment(resources={"instanceTypes": ["g5.xlarge", "p9.huge"]})
    assert never([found], Needs(16, 4, 1)) == ""


def test_several_machines_need_as_much_each(stub: Stub) -> None:
    assert "needs 80 vCPUs" in never([environment()], Needs(1, 40, 1, nodes=2))
    with_environments(stub, environment(), environment("on-demand"))
    one = job(gpus=4, vcpus=40)
    of_nodes = {"numNodes": 2, "nodeRangeProperties": [{"container": one.pop("container")}]}
    assert "needs 80 vCPUs" in why_waiting({**one, "nodeProperties": of_nodes})


def test_needs_are_read_from_the_container() -> None:
    assert needs_of(job(gpus=4, vcpus=16)["container"]) == Needs(4, 16, 56_000)
    assert needs_of({}) == Needs(0, 0, 0)


@pytest.mark.parametrize("status", ["SUBMITTED", "PENDING"])
def test_a_job_that_batch_has_not_looked_at(status: str) -> None:
    assert "has not looked at it yet" in why_waiting(job(status))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY - Service cannot fulfill the capacity "
            "requested for instance type [g5.xlarge]",
            "AWS has no such machine free",
        ),
        ("MISCONFIGURATION:COMPUTE_ENVIRONMENT_MAX_RESOURCE - ...", "MaxvCpus"),
        ("MISCONFIGURATION:JOB_RESOURCE_REQUIREMENT - ...", "InstanceTypes"),
        ("MISCONFIGURATION:SERVICE_ROLE_PERMISSIONS - ...", "lacks rights"),
        ("something new", "something new"),
    ],
)
def test_what_batch_says_itself_is_put_in_plain_words(said: str, sentence: str) -> None:
    assert sentence in why_waiting(job(reason=said))


def test_a_queue_that_is_gone_or_disabled(stub: Stub) -> None:
    stub("batch").add_response("describe_job_queues", {"jobQueues": []})
    assert "its queue is gone" in why_waiting(job())
    stub("batch").add_response("describe_job_queues", queue("DISABLED"))
    assert why_waiting(job()) == "its queue is disabled"


def test_a_job_that_never_will_begin(stub: Stub) -> None:
    with_environments(stub, environment(), environment("on-demand"))
    assert why_waiting(job(gpus=8)).startswith("it will never begin: none of the stack's")


def test_other_jobs_use_all(stub: Stub) -> None:
    full = {"desiredvCpus": 61}
    with_environments(stub, environment(resources=full), environment("on-demand", resources=full))
    assert "other jobs use all vCPUs" in why_waiting(job())


def test_a_machine_is_on_its_way(stub: Stub) -> None:
    full = environment(resources={"desiredvCpus": 64})
    with_environments(stub, full, environment("on-demand"))
    assert "no machine has come up yet" in why_waiting(job())
