"""Deploying and removing the stack: against moto, and a stub where that cannot play along."""

from __future__ import annotations

import base64
import datetime
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import CredentialRetrievalError, UnauthorizedSSOTokenError
from botocore.parsers import ResponseParserError
from botocore.stub import ANY, Stubber

from job.cloud import stack
from job.cloud.aws import explained, stack_name
from job.cloud.image import push
from job.cloud.stack import TEMPLATE, Change, deploy, destroy, outputs, parameters_from, validate
from job.errors import AccessDenied, ConfigError, JobError, StorageError
from tests.unit.cloud.conftest import for_moto

# moto makes no bucket policies, topic policies and budgets, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse:UserWarning")

NAME = "s4gan"
NOW = datetime.datetime(2026, 11, 26, tzinfo=datetime.UTC)
KEYS = {
    *("Bucket", "RepositoryUri", "JobQueue", "OnDemandJobQueue", "JobDefinition", "LogGroup"),
    *("AlarmTopic", "SubmitPolicy", "Region", "NodesJobDefinition"),
}
CHANGE_SET = "arn:aws:cloudformation:us-east-1:123456789012:changeSet/s4gan-now/1"
STACK = f"arn:aws:cloudformation:us-east-1:123456789012:stack/{NAME}/1"
Stub = Callable[[str], Stubber]


@pytest.fixture(autouse=True)
def _checked_elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_rules.py` lints the template; a second each time would add up."""
    if "really_validate" not in request.keywords:
        monkeypatch.setattr(stack, "validate", lambda path=TEMPLATE: [])


class Told:
    """What a deployment says and asks."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.lines: list[str] = []
        self.asked: Any = None

    def say(self, line: str) -> None:
        self.lines.append(line)

    def agreed(self, what: Any) -> bool:
        self.asked = what
        return self.answer


def deployed(told: Told, **parameters: str) -> dict[str, str] | None:
    return deploy(NAME, TEMPLATE, parameters, say=told.say, agreed=told.agreed, poll_s=0)


def in_a_given_vpc() -> dict[str, str]:
    """moto cannot take a whole VPC away again."""
    ec2 = boto3.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    subnets = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
    ids = ",".join(subnet["SubnetId"] for subnet in subnets[:3])
    return {**for_moto(), "VpcId": vpc, "SubnetIds": ids}


# ---------------------------------------------------------------- moto


def test_it_is_made_and_its_parts_are_named(moto: None) -> None:
    told = Told()
    made = deployed(told, **for_moto())
    assert made is not None
    assert set(made) == KEYS
    assert outputs(NAME) == made
    assert {change.action for change in told.asked} == {"Add"}
    assert {"Bucket", "JobDefinition", "JobQueue"} <= {change.name for change in told.asked}

    batch = boto3.client("batch")
    queue = batch.describe_job_queues(jobQueues=[made["JobQueue"]])["jobQueues"][0]
    assert [item["order"] for item in queue["computeEnvironmentOrder"]] == [1, 2]
    definition = batch.describe_job_definitions(jobDefinitions=[made["JobDefinition"]])
    container = definition["jobDefinitions"][0]["containerProperties"]
    assert container["image"] == made["RepositoryUri"] + ":latest"
    assert container["readonlyRootFilesystem"] is True
    assert "WANDB_API_KEY" not in str(container)


def test_parameters_reach_what_they_are_for(moto: None) -> None:
    secret = "arn:aws:secretsmanager:us-east-1:123456789012:secret:wandb-abcdef"
    made = deployed(
        Told(),
        **for_moto(),
        ImageTag="v1",
        WandbSecretArn=secret,
        DataBucketArns="arn:aws:s3:::one,arn:aws:s3:::two",
        LogRetentionDays="30",
    )
    assert made is not None
    definition = boto3.client("batch").describe_job_definitions(
        jobDefinitions=[made["JobDefinition"]]
    )
    container = definition["jobDefinitions"][0]["containerProperties"]
    assert container["image"].endswith(":v1")
    assert container["secrets"] == [{"name": "WANDB_API_KEY", "valueFrom": secret}]
    iam = boto3.client("iam")
    job_role = container["jobRoleArn"].rpartition("/")[2]
    policy = iam.get_role_policy(RoleName=job_role, PolicyName="runs-and-data")["PolicyDocument"]
    rights = yaml.safe_load(str(policy))  # moto gives what Python would print
    reading = next(s for s in rights["Statement"] if s["Sid"] == "ReadOtherData")
    assert reading["Resource"] == ["arn:aws:s3:::one/*", "arn:aws:s3:::two/*"]
    listing = next(s for s in rights["Statement"] if s["Sid"] == "ListOtherData")
    assert listing["Resource"] == ["arn:aws:s3:::one", "arn:aws:s3:::two"]
    groups = boto3.client("logs").describe_log_groups(logGroupNamePrefix=made["LogGroup"])
    assert groups["logGroups"][0]["retentionInDays"] == 30


def test_what_is_not_agreed_to_is_not_done(moto: None) -> None:
    assert deployed(Told(answer=False), **for_moto()) is None
    with pytest.raises(ConfigError, match="no stack s4gan in us-east-1"):
        outputs(NAME)


def test_removing_keeps_the_bucket(moto: None) -> None:
    told = Told()
    made = deployed(told, **in_a_given_vpc())
    assert made is not None
    told = Told()
    assert destroy(NAME, delete_bucket=False, say=told.say, agreed=told.agreed, poll_s=0)
    assert told.asked == f"the stack s4gan (s3://{made['Bucket']} stays)"
    with pytest.raises(ConfigError, match="no stack"):
        outputs(NAME)


def test_removing_is_not_done_without_a_yes(moto: None) -> None:
    deployed(Told(), **for_moto())
    told = Told(answer=False)
    assert not destroy(NAME, delete_bucket=True, say=told.say, agreed=told.agreed, poll_s=0)
    assert set(outputs(NAME)) == KEYS


def test_a_bucket_that_is_to_go_is_emptied_of_all_versions(moto: None) -> None:
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="gone")
    s3.put_bucket_versioning(Bucket="gone", VersioningConfiguration={"Status": "Enabled"})
    for body in (b"1", b"2"):
        s3.put_object(Bucket="gone", Key="runs/a", Body=body)
    s3.delete_object(Bucket="gone", Key="runs/a")
    lines: list[str] = []
    stack._delete_bucket("gone", lines.append)
    assert lines == ["deleted s3://gone with 3 objects and older versions"]
    assert s3.list_buckets()["Buckets"] == []


def test_removing_what_is_not_there(moto: None) -> None:
    with pytest.raises(ConfigError, match="no stack s4gan in us-east-1") as caught:
        destroy(NAME, delete_bucket=False, say=print, agreed=lambda _: True)
    assert "AWS_REGION" in caught.value.mend


def test_a_stack_that_somebody_may_still_submit_to_stays(moto: None) -> None:
    made = deployed(Told(), **for_moto())
    assert made is not None
    iam = boto3.client("iam")
    iam.create_user(UserName="ada")
    iam.attach_user_policy(UserName="ada", PolicyArn=made["SubmitPolicy"])
    with pytest.raises(ConfigError, match="belongs to the user ada") as caught:
        destroy(NAME, delete_bucket=False, say=print, agreed=lambda _: True)
    assert "aws iam detach-user-policy --user-name ada" in caught.value.mend
    assert set(outputs(NAME)) == KEYS


# ---------------------------------------------------------------- replies that moto does not give


def refusing_a_new_one(formation: Stubber) -> None:
    formation.add_client_error(
        "describe_stacks", "ValidationError", "Stack with id s4gan does not exist", 400
    )
    proposing(formation, kind="CREATE", Status="CREATE_COMPLETE", Changes=[changing("Vpc")])
    formation.add_response("delete_change_set", {}, {"ChangeSetName": CHANGE_SET})


@pytest.mark.parametrize("status", ["CREATE_IN_PROGRESS", "CREATE_COMPLETE"])
def test_a_no_leaves_the_same_stack_that_another_has_made(stub: Stub, status: str) -> None:
    formation = stub("cloudformation")
    refusing_a_new_one(formation)
    formation.add_response("describe_stacks", described(status), {"StackName": STACK})
    assert deployed(Told(answer=False), ImageTag="v2") is None


def test_a_no_leaves_the_stack_that_another_is_being_asked_about(stub: Stub) -> None:
    formation = stub("cloudformation")
    refusing_a_new_one(formation)
    formation.add_response("describe_stacks", described("REVIEW_IN_PROGRESS"), {"StackName": STACK})
    others = {"Summaries": [{"ChangeSetName": "theirs"}]}
    formation.add_response("list_change_sets", others, {"StackName": STACK})
    assert deployed(Told(answer=False), ImageTag="v2") is None


def test_a_no_leaves_no_empty_stack(stub: Stub) -> None:
    formation = stub("cloudformation")
    refusing_a_new_one(formation)
    formation.add_response("describe_stacks", described("REVIEW_IN_PROGRESS"), {"StackName": STACK})
    formation.add_response("list_change_sets", {"Summaries": []}, {"StackName": STACK})
    formation.add_response("delete_stack", {}, {"StackName": STACK})
    assert deployed(Told(answer=False), ImageTag="v2") is None


@pytest.mark.parametrize("code", ["ChangeSetNotFound", "InvalidChangeSetStatus"])
def test_a_yes_to_what_is_no_longer_so(stub: Stub, code: str) -> None:
    formation = stub("cloudformation")
    formation.add_response("describe_stacks", described("UPDATE_COMPLETE"))
    proposing(formation, Status="CREATE_COMPLETE", Changes=[changing("Vpc")])
    formation.add_response("describe_stack_events", {"StackEvents": []})
    formation.add_client_error("execute_change_set", code, "no such change set", 404)
    with pytest.raises(ConfigError, match="changed by somebody else since") as caught:
        deployed(Told(), ImageTag="v2")
    assert "deploy again" in caught.value.mend


@pytest.mark.parametrize(
    ("status", "mend"),
    [
        ("CREATE_IN_PROGRESS", "wait until it is done"),
        ("REVIEW_IN_PROGRESS", "nobody has agreed to it yet"),
        ("ROLLBACK_COMPLETE", "infra destroy --stack s4gan"),
        ("CREATE_COMPLETE", "none of this program's"),
    ],
)
def test_a_stack_without_parts_says_its_state(stub: Stub, status: str, mend: str) -> None:
    formation = stub("cloudformation")
    formation.add_response("describe_stacks", described(status, Outputs=[]))
    with pytest.raises(ConfigError, match=f"in state {status}, and has no bucket") as caught:
        outputs(NAME)
    assert mend in caught.value.mend


def described(status: str, **more: Any) -> dict[str, Any]:
    return {
        "Stacks": [
            {
                "StackName": NAME,
                "StackId": STACK,
                "CreationTime": NOW,
                "StackStatus": status,
                **more,
            }
        ]
    }


def event(id_: str, status: str, name: str, reason: str = "") -> dict[str, Any]:
    return {
        "StackId": "1",
        "EventId": id_,
        "StackName": NAME,
        "Timestamp": NOW,
        "ResourceStatus": status,
        "LogicalResourceId": name,
        "ResourceType": "AWS::Batch::ComputeEnvironment",
        "ResourceStatusReason": reason,
    }


def proposing(formation: Stubber, *, kind: str = "UPDATE", **reply: Any) -> None:
    """Up to the reply that says what would change."""
    names = ("BatchServiceRoleArn", "ImageTag", "MaxvCpus")
    formation.add_response(
        "get_template_summary",
        {"Parameters": [{"ParameterKey": name} for name in names]},
        {"TemplateBody": TEMPLATE.read_text()},
    )
    kept = []
    if kind == "UPDATE":
        formation.add_response(
            "describe_stacks",
            described(
                "CREATE_COMPLETE", Parameters=[{"ParameterKey": "MaxvCpus", "ParameterValue": "8"}]
            ),
            {"StackName": NAME},
        )
        kept = [{"ParameterKey": "MaxvCpus", "UsePreviousValue": True}]
    formation.add_response(
        "create_change_set",
        {"Id": CHANGE_SET, "StackId": STACK},
        {
            "StackName": NAME,
            "ChangeSetName": ANY,
            "ChangeSetType": kind,
            "TemplateBody": TEMPLATE.read_text(),
            "Parameters": [{"ParameterKey": "ImageTag", "ParameterValue": "v2"}, *kept],
            "Capabilities": ["CAPABILITY_IAM"],
            "Tags": [{"Key": "Project", "Value": NAME}],
        },
    )
    named = {"ChangeSetName": CHANGE_SET}
    formation.add_response("describe_change_set", {"Status": "CREATE_IN_PROGRESS"}, named)
    formation.add_response("describe_change_set", reply, named)


def changing(name: str, replacement: str = "False") -> dict[str, Any]:
    return {
        "ResourceChange": {
            "Action": "Modify",
            "LogicalResourceId": name,
            "ResourceType": "AWS::Batch::JobDefinition",
            "Replacement": replacement,
        }
    }


def test_a_change_is_shown_done_and_followed(stub: Stub) -> None:
    formation = stub("cloudformation")
    formation.add_response("describe_stacks", described("UPDATE_COMPLETE"), {"StackName": NAME})
    proposing(
        formation,
        Status="CREATE_COMPLETE",
        Changes=[changing("JobDefinition", "True")],
        NextToken="more",
    )
    formation.add_response(
        "describe_change_set",
        {"Status": "CREATE_COMPLETE", "Changes": [changing("Bucket")]},
        {"ChangeSetName": CHANGE_SET, "NextToken": "more"},
    )
    old = event("0", "CREATE_COMPLETE", "Bucket")
    formation.add_response("describe_stack_events", {"StackEvents": [old]}, {"StackName": STACK})
    formation.add_response("execute_change_set", {}, {"ChangeSetName": CHANGE_SET})
    formation.add_response("describe_stacks", described("UPDATE_IN_PROGRESS"))
    first = event("1", "UPDATE_IN_PROGRESS", "JobDefinition")
    formation.add_response("describe_stack_events", {"StackEvents": [first, old]})
    formation.add_response("describe_stacks", described("UPDATE_COMPLETE"))
    second = event("2", "UPDATE_COMPLETE", "JobDefinition")
    formation.add_response("describe_stack_events", {"StackEvents": [second, first, old]})
    formation.add_response(
        "describe_stacks",
        described("UPDATE_COMPLETE", Outputs=[{"OutputKey": "Bucket", "OutputValue": "b"}]),
    )
    told = Told()
    assert deployed(told, ImageTag="v2") == {"Bucket": "b"}
    assert told.lines == ["  update complete: JobDefinition"]
    assert stack.table(told.asked).splitlines() == [
        "  modify  JobDefinition  AWS::Batch::JobDefinition, is replaced",
        "  modify  Bucket         AWS::Batch::JobDefinition",
    ]


def test_nothing_to_do_is_said(stub: Stub) -> None:
    formation = stub("cloudformation")
    formation.add_response("describe_stacks", described("CREATE_COMPLETE"))
    proposing(
        formation,
        Status="FAILED",
        StatusReason="The submitted information didn't contain changes. Submit different.",
    )
    formation.add_response("delete_change_set", {}, {"ChangeSetName": CHANGE_SET})
    made = [{"OutputKey": "Bucket", "OutputValue": "b"}]
    formation.add_response("describe_stacks", described("CREATE_COMPLETE", Outputs=made))
    told = Told()
    assert deployed(told, ImageTag="v2") == {"Bucket": "b"}
    assert told.lines == ["The stack s4gan is as the template says; nothing to do."]
    assert told.asked is None


def test_what_fails_first_is_named(stub: Stub) -> None:
    formation = stub("cloudformation")
    formation.add_client_error(
        "describe_stacks", "ValidationError", "Stack with id s4gan does not exist", 400
    )
    proposing(formation, kind="CREATE", Status="CREATE_COMPLETE", Changes=[changing("Vpc")])
    formation.add_response("describe_stack_events", {"StackEvents": []})
    formation.add_response("execute_change_set", {})
    formation.add_response("describe_stacks", described("ROLLBACK_COMPLETE"))
    formation.add_response(
        "describe_stack_events",
        {
            "StackEvents": [
                event("3", "DELETE_COMPLETE", "Vpc"),
                event("2", "CREATE_FAILED", "Bucket", "Resource creation cancelled"),
                event("1", "CREATE_FAILED", "Spot", "no such instance type: g9.large"),
            ]
        },
    )
    with pytest.raises(StorageError, match=r"Spot \(AWS.*no such instance type") as caught:
        deployed(Told(), ImageTag="v2")
    assert "destroyed before another try" in caught.value.mend


@pytest.mark.parametrize(
    ("status", "mend"),
    [
        ("ROLLBACK_COMPLETE", "s4gan infra destroy --stack s4gan"),
        ("DELETE_FAILED", "s4gan infra destroy --stack s4gan"),
        ("UPDATE_IN_PROGRESS", "wait until it is done"),
    ],
)
def test_a_stack_that_cannot_be_changed_now(stub: Stub, status: str, mend: str) -> None:
    stub("cloudformation").add_response("describe_stacks", described(status))
    with pytest.raises(ConfigError, match=status) as caught:
        deployed(Told())
    assert mend in caught.value.mend


def test_a_parameter_that_is_not_there(stub: Stub) -> None:
    formation = stub("cloudformation")
    formation.add_response("describe_stacks", described("CREATE_COMPLETE"))
    formation.add_response("get_template_summary", {"Parameters": [{"ParameterKey": "ImageTag"}]})
    with pytest.raises(ConfigError, match="no parameter ImageTaq") as caught:
        deployed(Told(), ImageTaq="v2")
    assert caught.value.mend == "it has ImageTag"


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("AccessDenied", AccessDenied, "access denied to DescribeStacks"),
        ("ExpiredToken", StorageError, "have expired"),
        ("InvalidClientTokenId", ConfigError, "are not valid"),
        ("Throttling", StorageError, "Rate exceeded"),
    ],
)
def test_what_aws_refuses(stub: Stub, code: str, kind: type[JobError], said: str) -> None:
    stub("cloudformation").add_client_error("describe_stacks", code, "Rate exceeded", 400)
    with pytest.raises(kind, match=said) as caught:
        outputs(NAME)
    assert caught.value.mend


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CredentialRetrievalError(provider="sso", error_msg="expired"), "no usable AWS cred"),
        (UnauthorizedSSOTokenError(), "no usable AWS credentials"),
        (ResponseParserError("<html>"), "what answered is not AWS (http://proxy)"),
    ],
)
def test_what_is_no_answer_of_aws(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://proxy")
    with pytest.raises(JobError) as caught, explained("look at the queue"):
        raise error
    assert said in caught.value.message


def test_without_credentials(account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="no AWS credentials found") as caught:
        outputs(NAME)
    assert "aws sso login" in caught.value.mend


def test_without_a_region(account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(ConfigError, match="no AWS region"):
        outputs(NAME)


def test_the_stacks_name(account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stack_name(None) == "s4gan"
    monkeypatch.setenv("S4GAN_STACK", "other")
    assert stack_name(None) == "other"
    assert stack_name("mine-2") == "mine-2"
    for name in ("S4gan", "a", "x_y", "2x", "x-", "x" * 41):
        with pytest.raises(ConfigError, match="cannot be the name of a stack"):
            stack_name(name)


def test_parameters_of_the_command_line() -> None:
    assert parameters_from(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    for text in ("A", "=1"):
        with pytest.raises(ConfigError, match="Key=Value"):
            parameters_from([text])


# ---------------------------------------------------------------- templates


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        validate(tmp_path / "none.yaml")
    assert "--template" in caught.value.mend


@pytest.mark.parametrize("text", ["{", "- a\n- b\n", "Resources: 3\n", ""])
def test_a_template_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stack.yaml"
    path.write_text(text)
    findings = validate(path)
    assert findings
    assert str(findings[0]).startswith(f"{path}:")


def test_without_cfn_lint_its_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cfnlint'] = sys.modules['cfnlint.api'] = None\n"
        "from job.cloud.stack import validate\nvalidate()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "pip install 's4gan-job[infra]'" in ended.stderr


# ---------------------------------------------------------------- pushing the image


DOCKER = """#!/bin/sh
echo "$@" >> {log}
if [ "$1" = login ]; then cat >> {log}; fi
if [ "$1" = {fails} ]; then echo "Error: something is wrong" >&2; exit 1; fi
"""


def fake_docker(folder: Path, fails: str = "nothing") -> tuple[str, Path]:
    program, log = folder / "docker", folder / "log"
    program.write_text(DOCKER.format(log=log, fails=fails))
    program.chmod(0o755)
    return str(program), log


def ready(stub: Stub) -> None:
    uri = "123456789012.dkr.ecr.us-east-1.amazonaws.com/s4gan"
    given = [
        {"OutputKey": "Bucket", "OutputValue": "b"},
        {"OutputKey": "RepositoryUri", "OutputValue": uri},
    ]
    stub("cloudformation").add_response(
        "describe_stacks", described("CREATE_COMPLETE", Outputs=given)
    )


def logs_in(stub: Stub) -> None:
    token = base64.b64encode(b"AWS:secret").decode()
    stub("ecr").add_response(
        "get_authorization_token", {"authorizationData": [{"authorizationToken": token}]}, {}
    )


REVISION_LABEL = '{{index .Config.Labels "org.opencontainers.image.revision"}}'


def test_an_image_that_knows_its_commit_gets_it_as_a_tag(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(stub)
    logs_in(stub)
    ran: list[tuple[str, ...]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(tuple(command[1:]))
        said = f"{'a' * 40}-dirty\n" if command[1] == "inspect" else ""
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(subprocess, "run", run)
    push("s4gan:latest", "v1", NAME)
    repository = "123456789012.dkr.ecr.us-east-1.amazonaws.com/s4gan"
    names = [f"{repository}:v1", f"{repository}:git-{'a' * 40}-dirty"]
    assert [one[1:] for one in ran if one[0] == "push"] == [(name,) for name in names]
    assert [one[2] for one in ran if one[0] == "tag"] == names


def test_the_image_is_pushed_with_a_key_that_is_not_shown(stub: Stub, tmp_path: Path) -> None:
    ready(stub)
    logs_in(stub)
    docker, log = fake_docker(tmp_path)
    target = "123456789012.dkr.ecr.us-east-1.amazonaws.com/s4gan:v1"
    assert push("s4gan:latest", "v1", NAME, docker) == target
    assert log.read_text().splitlines() == [
        f"tag s4gan:latest {target}",
        f"inspect --format {REVISION_LABEL} s4gan:latest",
        f"login --username AWS --password-stdin {target.partition('/')[0]}",
        f"secretpush {target}",
    ]


def test_an_image_that_is_not_there(stub: Stub, tmp_path: Path) -> None:
    ready(stub)
    docker, _ = fake_docker(tmp_path, fails="tag")
    with pytest.raises(StorageError, match="docker tag failed: Error: something is wrong") as error:
        push("s4gan:latest", "v1", NAME, docker)
    assert error.value.mend == "make image IMAGE=s4gan:latest"


def test_no_docker(stub: Stub, tmp_path: Path) -> None:
    ready(stub)
    with pytest.raises(ConfigError, match="cannot run"):
        push("s4gan:latest", "v1", NAME, str(tmp_path / "none"))


# ---------------------------------------------------------------- the command line


def test_the_verbs(
    moto: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from job import cli

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["s4gan", "infra", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    import signal

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(stack, "POLL_S", 0.0)
    given = [word for pair in in_a_given_vpc().items() for word in ("--parameter", "=".join(pair))]
    try:
        assert run("deploy", *given) == 78
        assert "say --yes" in capsys.readouterr().err
        assert run("deploy", "--yes", *given) == 0
        said = capsys.readouterr().out
        assert "The stack s4gan would change so:\n  add " in said
        assert "JobQueue" in said
        assert run("destroy") == 78
        assert run("destroy", "--yes") == 0
        assert "stays" in capsys.readouterr().out
        assert run("destroy", "--yes") == 78
        assert "no stack s4gan" in capsys.readouterr().err
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def test_changes_are_what_people_read() -> None:
    changes: Sequence[Change] = [
        Change("Add", "Vpc", "AWS::EC2::VPC", ""),
        Change("Modify", "JobQueue", "AWS::Batch::JobQueue", "Conditional"),
    ]
    assert stack.table(changes).splitlines() == [
        "  add     Vpc       AWS::EC2::VPC",
        "  modify  JobQueue  AWS::Batch::JobQueue, may be replaced",
    ]
