"""What moto leaves out of AWS that the stack needs, for whoever plays AWS with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import yaml
from moto.batch.models import BatchBackend, JobDefinition
from moto.cloudformation.models import CloudFormationBackend

Replace = Callable[[Any, str, Any], None]


_PARSED: dict[tuple[str, Any], Any] = {}
"""Templates, over all tests of a process."""


def fill(replace: Replace) -> None:
    """Put in what is missing.

    Args:
        replace: sets an attribute; `setattr`, or pytest's that takes it back.
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

    load = yaml.load

    def load_once(text: Any, Loader: Any) -> Any:
        """It parses a template five times for one deployment, which takes longer than all else."""
        if not isinstance(text, str):
            return load(text, Loader)
        if (text, Loader) not in _PARSED:
            _PARSED[text, Loader] = load(text, Loader)
        return copy.deepcopy(_PARSED[text, Loader])

    replace(yaml, "load", load_once)
    replace(CloudFormationBackend, "execute_change_set", execute_and_see)
    replace(BatchBackend, "register_job_definition", register_of_its_type)
    replace(JobDefinition, "describe", describe_nodes_too)
