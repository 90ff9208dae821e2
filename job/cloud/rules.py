"""What `infra/stack.yaml` is held to beyond being valid: rules for cfn-lint, a class each.

Each is a promise that a later edit could break without a sound: that an interrupted job is tried
again, that no checkpoint expires, that nothing runs while nobody trains, that rights are narrow.
cfn-lint takes them as `--append-rules job.cloud.rules`; the ids are those it leaves to its users.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cfnlint.rules import CloudFormationLintRule, RuleMatch
from cfnlint.template import Template

from job.errors import ExitCode

Problem = tuple[Sequence[str | int], str]
"""Where below a resource's properties, and what is wrong."""

MAX_ATTEMPTS = 10
MAX_RULES = 5
MIN_TIMEOUT_S = 60
"""AWS Batch API reference: RetryStrategy, JobTimeout. Neither is in its published schema."""
STOP_TIMEOUTS_S = range(60, 116)
"""Enough to save, and over before a machine goes two minutes after its notice."""
MIN_SPOT_TYPES = 3
_SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)
_READ_ONLY = re.compile(r"(Describe|List|Get)[A-Za-z]+$")


class _ResourceRule(CloudFormationLintRule):  # type: ignore[misc]
    """A rule that looks at the resources of one type."""

    type = ""

    def match(self, cfn: Template) -> list[RuleMatch]:
        """Called by cfn-lint."""
        return [
            RuleMatch(["Resources", name, *path], f"{name}: {text}")
            for name, resource in cfn.get_resources(self.type).items()
            for path, text in self.problems(resource, cfn)
        ]

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """What is wrong with a resource of this type."""
        raise NotImplementedError


def _value(value: Any, cfn: Template) -> Any:
    """A literal, also that of a parameter's default."""
    if isinstance(value, Mapping) and set(value) == {"Ref"}:
        return cfn.template.get("Parameters", {}).get(value["Ref"], {}).get("Default", value)
    return value


def _number(value: Any, cfn: Template) -> float:
    """Of a literal; not a number if it is not known here."""
    try:
        return float(_value(value, cfn))
    except (TypeError, ValueError):
        return float("nan")


def _all(value: Any) -> Iterator[Any]:
    """The items of a list or the one item, whatever conditions they are under."""
    if isinstance(value, Mapping) and set(value) == {"Fn::If"}:
        for branch in value["Fn::If"][1:]:
            yield from _all(branch)
    elif isinstance(value, list):
        for item in value:
            yield from _all(item)
    elif value != {"Ref": "AWS::NoValue"} and value is not None:
        yield value


def _get(value: Any, *path: str) -> Any:
    """What lies at a path; None if nothing does."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _containers(resource: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Where below a job definition containers are described, and how."""
    one = ("Properties", "ContainerProperties")
    if _get(resource, *one) is not None:
        yield one, _get(resource, *one)
    several = ("Properties", "NodeProperties", "NodeRangeProperties")
    for number, nodes in enumerate(_all(_get(resource, *several))):
        yield (*several, number, "Container"), _get(nodes, "Container")


# ---------------------------------------------------------------- machines


class MetadataReachesTheContainer(_ResourceRule):
    """The trainer asks the metadata service for the spot notice, from inside a container."""

    id = "E9001"
    shortdesc = "IMDSv2 is required, with a hop limit of 2"
    type = "AWS::EC2::LaunchTemplate"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "LaunchTemplateData")
        options = _get(resource, *path, "MetadataOptions")
        if _get(options, "HttpTokens") != "required":
            yield path, "MetadataOptions.HttpTokens must be required"
        if _number(_get(options, "HttpPutResponseHopLimit"), cfn) != 2:
            yield (
                path,
                "MetadataOptions.HttpPutResponseHopLimit must be 2: 1 hides the spot notice",
            )


class MachinesStopGently(_ResourceRule):
    """ECS kills a container 30 s after asking it to stop, unless told otherwise."""

    id = "E9002"
    shortdesc = "Containers get time to save, and doomed machines no new ones"
    type = "AWS::EC2::LaunchTemplate"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "LaunchTemplateData")
        text = str(_get(resource, *path, "UserData", "Fn::Base64") or "")
        timeout = re.search(r"ECS_CONTAINER_STOP_TIMEOUT=(\d+)s", text)
        if timeout is None or int(timeout[1]) not in STOP_TIMEOUTS_S:
            yield (
                path,
                (
                    f"UserData must set ECS_CONTAINER_STOP_TIMEOUT to {STOP_TIMEOUTS_S[0]} to "
                    f"{STOP_TIMEOUTS_S[-1]} s"
                ),
            )
        if "ECS_ENABLE_SPOT_INSTANCE_DRAINING=true" not in text:
            yield path, "UserData must set ECS_ENABLE_SPOT_INSTANCE_DRAINING=true"
        if not text.startswith("MIME-Version: 1.0"):
            yield path, "UserData must be a MIME archive: Batch adds its own part to it"


class DisksAreEncrypted(_ResourceRule):
    """Images of users lie on them."""

    id = "E9003"
    shortdesc = "Volumes are encrypted and go with their machine"
    type = "AWS::EC2::LaunchTemplate"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "LaunchTemplateData")
        devices = list(_all(_get(resource, *path, "BlockDeviceMappings")))
        if not devices:
            yield path, "BlockDeviceMappings must name the root volume, or it is not encrypted"
        for device in devices:
            if _get(device, "Ebs", "Encrypted") is not True:
                yield path, f"the volume {_get(device, 'DeviceName')} must be encrypted"
            if _get(device, "Ebs", "DeleteOnTermination") is not True:
                yield path, f"the volume {_get(device, 'DeviceName')} must go with its machine"


class NothingComesIn(CloudFormationLintRule):  # type: ignore[misc]
    """Nobody has to reach the machines, but those of the same job one another."""

    id = "E9004"
    shortdesc = "Security groups let nothing in but from within"

    def match(self, cfn: Template) -> list[RuleMatch]:
        """Called by cfn-lint."""
        found = [
            name
            for name, group in cfn.get_resources("AWS::EC2::SecurityGroup").items()
            if _get(group, "Properties", "SecurityGroupIngress")
        ]
        for name, ingress in cfn.get_resources("AWS::EC2::SecurityGroupIngress").items():
            properties = _get(ingress, "Properties")
            source = _get(properties, "SourceSecurityGroupId")
            if source is None or source != _get(properties, "GroupId"):
                found.append(name)
        return [
            RuleMatch(["Resources", name], f"{name}: nothing may come in from outside the group")
            for name in found
        ]


class IdleCostsNothing(_ResourceRule):
    """Machines are there while jobs are."""

    id = "E9005"
    shortdesc = "Compute environments shrink to nothing, and change in place"
    type = "AWS::Batch::ComputeEnvironment"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "ComputeResources")
        resources = _get(resource, *path)
        if _number(_get(resources, "MinvCpus"), cfn) != 0:
            yield path, "MinvCpus must be 0"
        if _get(resource, "Properties", "ReplaceComputeEnvironment") is not False:
            yield ("Properties",), "ReplaceComputeEnvironment must be false: jobs run in it"
        version = _get(resources, "LaunchTemplate", "Version")
        if not isinstance(version, Mapping):
            yield (
                path,
                (
                    f"LaunchTemplate.Version {version} must be the template's LatestVersionNumber: "
                    "Batch looks up $Latest and $Default only once"
                ),
            )


class SpotHasAChoice(_ResourceRule):
    """Few pools are interrupted often."""

    id = "E9006"
    shortdesc = "Spot machines come from several pools, by capacity"
    type = "AWS::Batch::ComputeEnvironment"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "ComputeResources")
        resources = _get(resource, *path)
        if _get(resources, "Type") != "SPOT":
            return
        if _get(resources, "AllocationStrategy") != "SPOT_PRICE_CAPACITY_OPTIMIZED":
            yield path, "AllocationStrategy must be SPOT_PRICE_CAPACITY_OPTIMIZED"
        types = _value(_get(resources, "InstanceTypes"), cfn)
        types = types.split(",") if isinstance(types, str) else list(_all(types))
        if len(types) < MIN_SPOT_TYPES:
            yield path, f"InstanceTypes must be {MIN_SPOT_TYPES} or more"


# ---------------------------------------------------------------- the job


class RetriesMatchTheExitCodes(_ResourceRule):
    """Without a last rule that ends it, Batch tries everything again."""

    id = "E9007"
    shortdesc = "What is tried again is what another machine can mend"
    type = "AWS::Batch::JobDefinition"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "RetryStrategy")
        attempts = _number(_get(resource, *path, "Attempts"), cfn)
        if not 1 < attempts <= MAX_ATTEMPTS:
            yield path, f"Attempts must be 2 to {MAX_ATTEMPTS}"
        rules = list(_all(_get(resource, *path, "EvaluateOnExit")))
        if len(rules) > MAX_RULES:
            yield path, f"EvaluateOnExit has {len(rules)} rules, Batch takes {MAX_RULES}"
        last = rules[-1] if rules else {}
        if str(_get(last, "Action")).upper() != "EXIT" or _get(last, "OnReason") != "*":
            yield path, 'the last rule must be OnReason "*", EXIT: what fits none is tried again'
        again = [rule for rule in rules if str(_get(rule, "Action")).upper() == "RETRY"]
        codes = {str(rule["OnExitCode"]) for rule in again if "OnExitCode" in rule}
        wanted = {str(int(ExitCode.PREEMPTED))}
        if codes != wanted:
            yield path, f"the exit codes to RETRY must be {sorted(wanted)}, are {sorted(codes)}"
        if not any(str(rule.get("OnStatusReason", "")).startswith("Host EC2") for rule in again):
            yield path, 'OnStatusReason "Host EC2*" (the machine was taken away) must be a RETRY'


class AttemptsEnd(_ResourceRule):
    """A job that hangs is paid for."""

    id = "E9008"
    shortdesc = "There is a last moment for each attempt"
    type = "AWS::Batch::JobDefinition"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "Timeout")
        if not _number(_get(resource, *path, "AttemptDurationSeconds"), cfn) >= MIN_TIMEOUT_S:
            yield ("Properties",), f"Timeout.AttemptDurationSeconds must be {MIN_TIMEOUT_S} or more"


class SecretsAreNamedOnly(_ResourceRule):
    """Whoever may look at a job reads its environment."""

    id = "E9009"
    shortdesc = "No secret is in a job's environment as plain text"
    type = "AWS::Batch::JobDefinition"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        for path, container in _containers(resource):
            for variable in _all(_get(container, "Environment")):
                name = str(_get(variable, "Name"))
                if _SECRET.search(name):
                    yield path, f"{name} must come from Secrets, by the secret's ARN"


class ContainersAreConfined(_ResourceRule):
    """The image needs no more than /scratch to write to."""

    id = "E9010"
    shortdesc = "Containers run as nobody special, on a read-only file system"
    type = "AWS::Batch::JobDefinition"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        for path, container in _containers(resource):
            if str(_get(container, "User") or "root").split(":")[0] in ("root", "0"):
                yield path, "User must not be root"
            if _get(container, "Privileged") is not False:
                yield path, "Privileged must be false"
            if _get(container, "ReadonlyRootFilesystem") is not True:
                yield path, "ReadonlyRootFilesystem must be true"
            linux = _get(container, "LinuxParameters")
            if _get(linux, "InitProcessEnabled") is not True:
                yield path, "LinuxParameters.InitProcessEnabled must be true, or signals get lost"
            if not _number(_get(linux, "SharedMemorySize"), cfn) >= 512:
                yield path, "LinuxParameters.SharedMemorySize must be 512 or more, for loaders"


class ContainersAreAlike(CloudFormationLintRule):  # type: ignore[misc]
    """A run moves between one machine and several."""

    id = "E9018"
    shortdesc = "All job definitions describe the same container, and the same retries"

    def match(self, cfn: Template) -> list[RuleMatch]:
        """Called by cfn-lint."""
        seen: dict[str, Any] = {}
        found = []
        for name, resource in cfn.get_resources("AWS::Batch::JobDefinition").items():
            for what, value in (
                *(("container", container) for _, container in _containers(resource)),
                ("RetryStrategy", _get(resource, "Properties", "RetryStrategy")),
                ("Timeout", _get(resource, "Properties", "Timeout")),
            ):
                if value != seen.setdefault(what, value):
                    found.append(
                        RuleMatch(["Resources", name], f"{name}: another {what} than before it")
                    )
        return found


class OutputIsKeptForAWhile(_ResourceRule):
    """Forever costs more each month."""

    id = "E9011"
    shortdesc = "Logs have an end"
    type = "AWS::Logs::LogGroup"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        if _get(resource, "Properties", "RetentionInDays") is None:
            yield ("Properties",), "RetentionInDays must be set"


# ---------------------------------------------------------------- storage


class BucketsAreClosed(_ResourceRule):
    """Weights and images of users are in them, and they outlive the stack."""

    id = "E9012"
    shortdesc = "Buckets are encrypted, versioned, private, kept"
    type = "AWS::S3::Bucket"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        bucket = _get(resource, "Properties")
        path = ("Properties",)
        if not _get(bucket, "BucketEncryption", "ServerSideEncryptionConfiguration"):
            yield path, "BucketEncryption must be set"
        if _get(bucket, "VersioningConfiguration", "Status") != "Enabled":
            yield path, "VersioningConfiguration must be Enabled"
        for block in (
            *("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls"),
            "RestrictPublicBuckets",
        ):
            if _get(bucket, "PublicAccessBlockConfiguration", block) is not True:
                yield path, f"PublicAccessBlockConfiguration.{block} must be true"
        rules = list(_all(_get(bucket, "OwnershipControls", "Rules")))
        if [_get(rule, "ObjectOwnership") for rule in rules] != ["BucketOwnerEnforced"]:
            yield path, "OwnershipControls must be BucketOwnerEnforced"
        for policy in ("DeletionPolicy", "UpdateReplacePolicy"):
            if resource.get(policy) != "Retain":
                yield (), f"{policy} must be Retain: the runs are in it"


class CheckpointsDoNotExpire(_ResourceRule):
    """The newest checkpoint of a run that waits for a machine may be old."""

    id = "E9013"
    shortdesc = "A bucket forgets interrupted uploads and older versions, and nothing else"
    type = "AWS::S3::Bucket"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "LifecycleConfiguration")
        rules = list(_all(_get(resource, *path, "Rules")))
        if not any("AbortIncompleteMultipartUpload" in rule for rule in rules):
            yield (
                ("Properties",),
                "no lifecycle rule ends interrupted uploads, which are paid for",
            )
        if not any("NoncurrentVersionExpiration" in rule for rule in rules):
            yield ("Properties",), "no lifecycle rule ends older versions, which are paid for"
        for rule in rules:
            if {"ExpirationInDays", "ExpirationDate"} & set(rule):
                yield path, f"rule {_get(rule, 'Id')} would delete objects that runs go on from"


class ConnectionsAreEncrypted(CloudFormationLintRule):  # type: ignore[misc]
    """Each bucket refuses what is not."""

    id = "E9014"
    shortdesc = "Buckets refuse connections without TLS"

    def match(self, cfn: Template) -> list[RuleMatch]:
        """Called by cfn-lint."""
        closed = set()
        for policy in cfn.get_resources("AWS::S3::BucketPolicy").values():
            for statement in _all(_get(policy, "Properties", "PolicyDocument", "Statement")):
                secure = _get(statement, "Condition", "Bool", "aws:SecureTransport")
                if _get(statement, "Effect") == "Deny" and str(secure).lower() == "false":
                    closed.add(_get(policy, "Properties", "Bucket", "Ref"))
        return [
            RuleMatch(
                ["Resources", name],
                f"{name}: no policy denies what is not aws:SecureTransport",
            )
            for name in cfn.get_resources("AWS::S3::Bucket")
            if name not in closed
        ]


# ---------------------------------------------------------------- rights


class _PolicyRule(CloudFormationLintRule):  # type: ignore[misc]
    """A rule that looks at the statements of policies."""

    def statements(self, cfn: Template) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """All that allow something, and whose they are."""
        for name, role in cfn.get_resources("AWS::IAM::Role").items():
            for policy in _all(_get(role, "Properties", "Policies")):
                for statement in _all(_get(policy, "PolicyDocument", "Statement")):
                    yield name, statement
        for name, policy in cfn.get_resources("AWS::IAM::ManagedPolicy").items():
            for statement in _all(_get(policy, "Properties", "PolicyDocument", "Statement")):
                yield name, statement


class RightsAreNarrow(_PolicyRule):
    """A right is for one action on one thing; what only looks may look everywhere."""

    id = "E9015"
    shortdesc = "No right is wider than its use"

    def match(self, cfn: Template) -> list[RuleMatch]:
        """Called by cfn-lint."""
        found = []
        for name, statement in self.statements(cfn):
            everywhere = "*" in list(_all(_get(statement, "Resource")))
            for action in _all(_get(statement, "Action")):
                verb = str(action).partition(":")[2]
                if "*" in str(action):
                    found.append((name, f"{action} is more than one action"))
                elif everywhere and not _READ_ONLY.match(verb):
                    found.append((name, f"{action} on every resource"))
        return [RuleMatch(["Resources", name], f"{name}: {text}") for name, text in found]


class DeletingIsForLeftovers(_PolicyRule):
    """Of a run, only what was replaced is ever deleted."""

    id = "E9016"
    shortdesc = "Nobody may delete models, data, or whole runs"
    _ALLOWED = ("/checkpoints/*", "/best/*", "/summary.json")

    def match(self, cfn: Template) -> list[RuleMatch]:
        """Called by cfn-lint."""
        found = []
        for name, statement in self.statements(cfn):
            if not any("s3:Delete" in str(action) for action in _all(_get(statement, "Action"))):
                continue
            for resource in _all(_get(statement, "Resource")):
                if not str(_get(resource, "Fn::Sub") or resource).endswith(self._ALLOWED):
                    found.append(RuleMatch(["Resources", name], f"{name}: may delete {resource}"))
        return found


class TasksOfThisAccount(_ResourceRule):
    """Else a service of AWS could be made to use the role for somebody else."""

    id = "E9017"
    shortdesc = "Roles of containers are trusted for this account only"
    type = "AWS::IAM::Role"

    def problems(self, resource: Mapping[str, Any], cfn: Template) -> Iterator[Problem]:
        """See the base."""
        path = ("Properties", "AssumeRolePolicyDocument")
        for statement in _all(_get(resource, *path, "Statement")):
            if _get(statement, "Principal", "Service") == "ecs-tasks.amazonaws.com" and not _get(
                statement, "Condition", "StringEquals", "aws:SourceAccount"
            ):
                yield path, "must ask for aws:SourceAccount"
