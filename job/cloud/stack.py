"""The stack that jobs run on: checking its template, making, changing and removing it."""

from __future__ import annotations

import datetime
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import job
from job.cloud.aws import client, code_of, explained
from job.errors import ConfigError, JobError, StorageError

TEMPLATE = Path(job.__file__).parent.parent / "infra" / "stack.yaml"
POLL_S = 5.0
_GONE_WRONG = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "DELETE_FAILED")
"""States of a stack that can only be deleted."""
_REGION = "us-east-1"
"""For checking: every service and type of machine is there."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a template."""

    path: Path
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule} {self.message}"


@dataclass(frozen=True)
class Change:
    """What a deployment would do to one resource."""

    action: str
    """Add, Modify, Remove, ..."""
    name: str
    type: str
    replacement: str
    """True, False, Conditional; empty where there is nothing to replace."""


def read_template(path: Path) -> str:
    """Text of a template.

    Raises:
        ConfigError: there is none.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the stack's template cannot be read ({error})",
            mend="run this in a checkout of the project, or say --template PATH",
        ) from None


def validate(path: Path = TEMPLATE) -> list[Finding]:
    """Check a template without an account: by cfn-lint, and by our own rules.

    Raises:
        ConfigError: cfn-lint is not installed, or there is no template.
    """
    text = read_template(path)
    try:
        from cfnlint.api import lint
        from cfnlint.core import get_rules
    except ModuleNotFoundError:
        raise ConfigError(
            "checking a template needs cfn-lint", mend="pip install 's4gan-job[infra]'"
        ) from None
    rules = get_rules(["job.cloud.rules"], [], [])
    return [
        Finding(path, match.linenumber, match.rule.id, match.message)
        for match in lint(text, rules, [_REGION])
    ]


# ---------------------------------------------------------------- deploying


def deploy(
    name: str,
    path: Path,
    parameters: Mapping[str, str],
    *,
    say: Callable[[str], None],
    agreed: Callable[[Sequence[Change]], bool],
    poll_s: float = POLL_S,
) -> dict[str, str] | None:
    """Make or change the stack, once somebody has agreed to what would change.

    Args:
        name: of the stack.
        path: of the template.
        parameters: that differ from the defaults, or from what a stack has already.
        say: is told what happens.
        agreed: is shown the changes and decides.
        poll_s: seconds between two looks at how far it is.

    Returns:
        The stack's outputs; None if it was not agreed to.

    Raises:
        ConfigError: the template or a parameter is wrong, or the stack can only be deleted.
        StorageError: AWS refused, with the first reason it gave.
    """
    findings = validate(path)
    if findings:
        raise ConfigError(
            "the template is not as it should be\n  " + "\n  ".join(map(str, findings)),
            mend="s4gan infra validate",
        )
    text = read_template(path)
    formation = client("cloudformation")
    status = _status(formation, name)
    if status in _GONE_WRONG:
        raise ConfigError(
            f"the stack {name} is in state {status}, and can only be deleted",
            mend=f"s4gan infra destroy --stack {name}, then deploy again",
        )
    new = status in (None, "REVIEW_IN_PROGRESS")
    if not new and status is not None and status.endswith("_IN_PROGRESS"):
        raise ConfigError(
            f"the stack {name} is being changed by somebody else ({status})",
            mend="wait until it is done, then deploy again",
        )
    proposal = _propose(formation, name, text, parameters, new, poll_s)
    if proposal is None:
        say(f"The stack {name} is as the template says; nothing to do.")
        return outputs(name)
    wanted = False
    try:
        wanted = agreed(proposal.changes)
    finally:
        if not wanted:
            _withdraw(formation, proposal)
    if not wanted:
        return None
    began = _newest_event(formation, proposal.stack_id)
    _execute(formation, name, proposal)
    good = ("CREATE_COMPLETE", "UPDATE_COMPLETE")
    _follow(formation, proposal.stack_id, began, say, poll_s, good=good)
    return outputs(name)


@dataclass(frozen=True)
class Deployed:
    """A stack that is there."""

    outputs: Mapping[str, str]
    """What it calls its parts."""
    parameters: Mapping[str, str]


def deployed(name: str) -> Deployed:
    """What the stack says of itself.

    Raises:
        ConfigError: there is no such stack in this account and region, or it is not finished.
    """
    found = _stack(client("cloudformation"), name)
    if found is None:
        raise _no_stack(name)
    parts = _outputs_of(found)
    if "Bucket" not in parts:  # outputs come all at once, when the stack is made
        raise _without_parts(name, found["StackStatus"])
    return Deployed(
        parts,
        {one["ParameterKey"]: str(one["ParameterValue"]) for one in found.get("Parameters", ())},
    )


def _no_stack(name: str) -> ConfigError:
    from job.storage.s3 import aws_session

    return ConfigError(
        f"there is no stack {name} in {aws_session().region_name}",
        mend="deploy it (s4gan infra deploy), set AWS_REGION to where it is, or say --stack",
    )


def _outputs_of(found: Any) -> dict[str, str]:
    return {item["OutputKey"]: item["OutputValue"] for item in found.get("Outputs", ())}


def _without_parts(name: str, status: str) -> ConfigError:
    if status in _GONE_WRONG:
        mend = f"s4gan infra destroy --stack {name}, then s4gan infra deploy --stack {name}"
    elif status == "REVIEW_IN_PROGRESS":
        mend = f"nobody has agreed to it yet: s4gan infra deploy --stack {name}"
    elif status.endswith("_IN_PROGRESS"):
        mend = "wait until it is done"
    else:
        mend = "it is none of this program's: say --stack, or set AWS_REGION"
    return ConfigError(f"the stack {name} is in state {status}, and has no bucket", mend=mend)


def outputs(name: str) -> dict[str, str]:
    """What the stack calls its parts.

    Raises:
        ConfigError: there is no such stack in this account and region, or it is not finished.
    """
    return dict(deployed(name).outputs)


@dataclass(frozen=True)
class _Proposal:
    """A change set that waits for a yes. Two people may have one each, of the same stack."""

    id: str
    """ARN. By a name a change set of somebody else might be meant."""
    stack_id: str
    """ARN. By its name another stack might be meant, made after this one was deleted."""
    new: bool
    """The stack has never been made."""
    changes: Sequence[Change]


def _propose(
    formation: Any,
    name: str,
    text: str,
    parameters: Mapping[str, str],
    new: bool,
    poll_s: float,
) -> _Proposal | None:
    """Make a change set and return what it would do; None if nothing."""
    with explained(f"read the parameters of {TEMPLATE.name}"):
        known = {
            item["ParameterKey"]
            for item in formation.get_template_summary(TemplateBody=text)["Parameters"]
        }
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ConfigError(
            f"the template has no parameter {', '.join(unknown)}",
            mend=f"it has {', '.join(sorted(known))}",
        )
    before = _stack(formation, name) if not new else None
    kept = {item["ParameterKey"] for item in (before or {}).get("Parameters", ())} & known
    given: list[dict[str, Any]] = [
        {"ParameterKey": key, "ParameterValue": value} for key, value in sorted(parameters.items())
    ]
    given += [
        {"ParameterKey": key, "UsePreviousValue": True} for key in sorted(kept - set(parameters))
    ]
    with explained(f"propose changes of the stack {name}"):
        made = formation.create_change_set(
            StackName=name,
            ChangeSetName=_change_set_name(),
            ChangeSetType="CREATE" if new else "UPDATE",
            TemplateBody=text,
            Parameters=given,
            Capabilities=["CAPABILITY_IAM"],
            Tags=[{"Key": "Project", "Value": name}],
        )
        proposal = _Proposal(made["Id"], made["StackId"], new, ())
        while True:
            proposed = formation.describe_change_set(ChangeSetName=proposal.id)
            if proposed["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
                break
            time.sleep(poll_s)
    why = proposed.get("StatusReason", "")
    if proposed["Status"] == "FAILED":
        _withdraw(formation, proposal)
        if "didn't contain changes" in why or "No updates" in why:
            return None
        raise ConfigError(f"CloudFormation refuses the template: {why}")
    found = (item["ResourceChange"] for item in _changes(formation, proposal, proposed))
    changes = [
        Change(
            change["Action"],
            change["LogicalResourceId"],
            change["ResourceType"],
            change.get("Replacement", ""),
        )
        for change in found
    ]
    return replace(proposal, changes=changes)


def _change_set_name() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"s4gan-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def _withdraw(formation: Any, proposal: _Proposal) -> None:
    """Leave things as they were, whatever somebody else has done meanwhile."""
    with explained("withdraw the proposed changes"):
        formation.delete_change_set(ChangeSetName=proposal.id)
        if not proposal.new:
            return
        # An empty stack would stay, in review for ever. But somebody else may have made it by now,
        # or be about to.
        if _status(formation, proposal.stack_id) != "REVIEW_IN_PROGRESS":
            return
        if not formation.list_change_sets(StackName=proposal.stack_id)["Summaries"]:
            formation.delete_stack(StackName=proposal.stack_id)


def _execute(formation: Any, name: str, proposal: _Proposal) -> None:
    from botocore.exceptions import ClientError

    with explained(f"change the stack {name}"):
        try:
            formation.execute_change_set(ChangeSetName=proposal.id)
        except ClientError as error:
            if code_of(error) not in ("ChangeSetNotFound", "InvalidChangeSetStatus"):
                raise
            raise ConfigError(
                f"the stack {name} was changed by somebody else since this was proposed",
                mend="deploy again, and look at what would change now",
            ) from None


def _changes(formation: Any, proposal: _Proposal, first: Mapping[str, Any]) -> Iterator[Any]:
    page = first
    while True:
        yield from page.get("Changes", ())
        if not page.get("NextToken"):
            return
        with explained("read the proposed changes"):
            page = formation.describe_change_set(
                ChangeSetName=proposal.id, NextToken=page["NextToken"]
            )


# ---------------------------------------------------------------- removing


def destroy(
    name: str,
    *,
    delete_bucket: bool,
    say: Callable[[str], None],
    agreed: Callable[[str], bool],
    poll_s: float = POLL_S,
) -> bool:
    """Remove the stack; its bucket stays unless it is to go too.

    Args:
        name: of the stack.
        delete_bucket: delete the bucket and every version of every object in it.
        say: is told what happens.
        agreed: is shown what will be gone, and decides.
        poll_s: seconds between two looks at how far it is.

    Returns:
        Whether it was agreed to.

    Raises:
        ConfigError: there is no such stack, or somebody still has its SubmitPolicy.
        StorageError: AWS refused, with the first reason it gave.
    """
    formation = client("cloudformation")
    found = _stack(formation, name)
    if found is None:
        raise _no_stack(name)
    parts = _outputs_of(found)
    bucket = parts.get("Bucket", "")
    _refuse_to_take_rights(parts.get("SubmitPolicy", ""))
    if bucket and delete_bucket:
        gone = f"the stack {name} and all that is in s3://{bucket}"
    else:
        gone = f"the stack {name}" + (f" (s3://{bucket} stays)" if bucket else "")
    if not agreed(gone):
        return False
    id_ = found["StackId"]  # a deleted stack is not found by its name any more
    began = _newest_event(formation, id_)
    with explained(f"delete the stack {name}"):
        formation.delete_stack(StackName=id_)
    _follow(formation, id_, began, say, poll_s, good=("DELETE_COMPLETE",))
    if bucket and delete_bucket:
        _delete_bucket(bucket, say)
    return True


def _refuse_to_take_rights(policy: str) -> None:
    """A policy that somebody has cannot be deleted; half of the stack would be gone by then."""
    if not policy:
        return
    try:
        with explained("see who has the stack's SubmitPolicy"):
            found = client("iam").list_entities_for_policy(PolicyArn=policy)
    except JobError:
        return  # without the right to see it, or in a world without IAM, deleting will tell
    kinds = (("PolicyUsers", "User"), ("PolicyGroups", "Group"), ("PolicyRoles", "Role"))
    holders = [
        (kind.lower(), one[f"{kind}Name"]) for key, kind in kinds for one in found.get(key, ())
    ]
    if not holders:
        return
    kind, holder = holders[0]
    raise ConfigError(
        "the stack's SubmitPolicy still belongs to "
        + ", ".join(f"the {kind} {holder}" for kind, holder in holders),
        mend=f"aws iam detach-{kind}-policy --{kind}-name {holder} --policy-arn {policy}",
    )


def _delete_bucket(bucket: str, say: Callable[[str], None]) -> None:
    s3 = client("s3")
    count = 0
    with explained(f"empty the bucket {bucket}"):
        for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
            versions = [*page.get("Versions", ()), *page.get("DeleteMarkers", ())]
            objects = [{"Key": item["Key"], "VersionId": item["VersionId"]} for item in versions]
            if objects:
                reply = s3.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
                if reply.get("Errors"):
                    first = reply["Errors"][0]
                    raise StorageError(
                        f"cannot delete s3://{bucket}/{first['Key']}: {first.get('Message')}",
                        mend="the stack is gone; empty and delete the bucket by hand",
                    )
                count += len(objects)
        s3.delete_bucket(Bucket=bucket)
    say(f"deleted s3://{bucket} with {count} objects and older versions")


# ---------------------------------------------------------------- looking at it


def _stack(formation: Any, name: str) -> Any:
    """A stack's description; None if there is none."""
    from botocore.exceptions import ClientError

    with explained(f"look at the stack {name}"):
        try:
            return formation.describe_stacks(StackName=name)["Stacks"][0]
        except ClientError as error:
            if code_of(error) == "ValidationError" and "does not exist" in str(error):
                return None
            raise


def _status(formation: Any, name: str) -> str | None:
    found = _stack(formation, name)
    return None if found is None else str(found["StackStatus"])


def _events(formation: Any, name: str) -> list[Any]:
    """The stack's history, newest first, as far as one page goes: about 100 events."""
    with explained(f"read the events of the stack {name}"):
        return list(formation.describe_stack_events(StackName=name)["StackEvents"])


def _newest_event(formation: Any, name: str) -> str:
    events = _events(formation, name)
    return str(events[0]["EventId"]) if events else ""


def _follow(
    formation: Any,
    name: str,
    began: str,
    say: Callable[[str], None],
    poll_s: float,
    good: tuple[str, ...],
) -> None:
    """Tell of each resource that is done, until the stack is; raise if it did not end well."""
    told: set[str] = set()
    failures: list[str] = []
    while True:
        status = _status(formation, name) or "DELETE_COMPLETE"
        fresh = []
        for event in _events(formation, name):
            if event["EventId"] == began:
                break
            if event["EventId"] not in told:
                fresh.append(event)
        for event in reversed(fresh):
            told.add(event["EventId"])
            state, resource = event["ResourceStatus"], event.get("LogicalResourceId", "")
            why = event.get("ResourceStatusReason", "")
            if state.endswith("_FAILED"):
                failures.append(f"{resource} ({event.get('ResourceType', '')}): {why or state}")
            if not state.endswith("_IN_PROGRESS"):
                say(f"  {state.lower().replace('_', ' ')}: {resource}")
        if not status.endswith("_IN_PROGRESS"):
            break
        time.sleep(poll_s)
    if status in good:
        return
    first = failures[0] if failures else status
    raise StorageError(
        f"the stack is in state {status}; what failed first: {first}",
        mend="mend that; a stack that could not be made has to be destroyed before another try",
    )


def parameters_from(texts: Sequence[str]) -> dict[str, str]:
    """`Key=Value` as given on the command line.

    Raises:
        ConfigError: not of that form.
    """
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--parameter {text}: must be Key=Value")
        pairs[key] = value
    return pairs


def table(changes: Sequence[Change]) -> str:
    """Changes for people, a line each."""
    width = max(len(change.name) for change in changes)
    lines = []
    for change in changes:
        replaced = {"True": ", is replaced", "Conditional": ", may be replaced"}
        note = replaced.get(change.replacement, "")
        lines.append(f"  {change.action.lower():<7} {change.name:<{width}}  {change.type}{note}")
    return "\n".join(lines)
