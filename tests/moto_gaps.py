"""What moto leaves out of AWS that the stack needs, for whoever plays AWS with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moto.batch.models import BatchBackend, JobDefinition
from moto.cloudformation.models import CloudFormationBackend

Replace = Callable[[type, str, Any], None]


def fill(replace: Replace) -> None:
    """Put in what is missing.

    Args:
        replace: sets an attribute of a class; `setattr`, or pytest's that takes it back.
    """
    execute = CloudFormationBackend.execute_change_set
    register, describe = BatchBackend.register_job_definition, JobDefinition.describe

    def execute_and_see(self: Any, **options: Any) -> None:
        """It does not look up what a stack made by a change set has as outputs."""
        execute(self, **options)
        for made in self.stacks.values():
            made._parse_template()
            made.output_map = made._create_output_map()

    def register_of_its_type(self: Any, **options: Any) -> Any:
        """CloudFormation's job definitions are all for one container."""
        if options.get("node_properties"):
            options["_type"] = "multinode"
        return register(self, **options)

    def describe_nodes_too(self: Any) -> Any:
        nodes = {"nodeProperties": self.node_properties} if self.node_properties else {}
        return {**describe(self), **nodes}

    replace(CloudFormationBackend, "execute_change_set", execute_and_see)
    replace(BatchBackend, "register_job_definition", register_of_its_type)
    replace(JobDefinition, "describe", describe_nodes_too)
