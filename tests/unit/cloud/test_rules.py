"""The stack's template is good, and each rule finds the template that breaks it."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cfnlint import core
from cfnlint.core import get_rules
from cfnlint.decode import cfn_yaml

from job.cloud import rules
from job.cloud.stack import TEMPLATE, validate

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
Break = Callable[[dict[str, Any]], Any]


def properties(template: Any, name: str) -> Any:
    return template["Resources"][name]["Properties"]


def launch(template: Any) -> Any:
    return properties(template, "LaunchTemplate")["LaunchTemplateData"]


def container(template: Any) -> Any:
    return properties(template, "JobDefinition")["ContainerProperties"]


def of_nodes(template: Any) -> Any:
    nodes = properties(template, "NodesJobDefinition")["NodeProperties"]
    return nodes["NodeRangeProperties"][0]["Container"]


def swap(where: Any, old: str, new: str, value: Any) -> None:
    del where[old]
    where[new] = value


def retry(template: Any) -> Any:
    return properties(template, "JobDefinition")["RetryStrategy"]


def statements(template: Any, role: str) -> Any:
    return properties(template, role)["Policies"][0]["PolicyDocument"]["Statement"]


def user_data(template: Any, old: str, new: str) -> None:
    text = launch(template)["UserData"]["Fn::Base64"]
    assert old in text
    launch(template)["UserData"] = {"Fn::Base64": text.replace(old, new)}


def lifecycle(template: Any) -> Any:
    return properties(template, "Bucket")["LifecycleConfiguration"]["Rules"]


BREAKS: list[tuple[str, str, Break]] = [
    ("E9001", "HttpTokens", lambda t: launch(t)["MetadataOptions"].update(HttpTokens="optional")),
    ("E9001", "HopLimit", lambda t: launch(t)["MetadataOptions"].update(HttpPutResponseHopLimit=1)),
    ("E9001", "HttpTokens", lambda t: launch(t).pop("MetadataOptions")),
    ("E9002", "STOP_TIMEOUT", lambda t: user_data(t, "STOP_TIMEOUT=110s", "STOP_TIMEOUT=30s")),
    ("E9002", "STOP_TIMEOUT", lambda t: launch(t).pop("UserData")),
    ("E9002", "DRAINING", lambda t: user_data(t, "DRAINING=true", "DRAINING=false")),
    ("E9002", "MIME", lambda t: user_data(t, "MIME-Version: 1.0", "#!/bin/sh")),
    (
        *("E9003", "encrypted"),
        lambda t: launch(t)["BlockDeviceMappings"][0]["Ebs"].update(Encrypted=False),
    ),
    ("E9003", "BlockDeviceMappings", lambda t: launch(t).pop("BlockDeviceMappings")),
    (
        *("E9003", "go with its machine"),
        lambda t: launch(t)["BlockDeviceMappings"][0]["Ebs"].update(DeleteOnTermination=False),
    ),
    (
        *("E9004", "come in"),
        lambda t: properties(t, "SecurityGroup").update(
            SecurityGroupIngress=[
                {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": "10.0.0.0/8"}
            ]
        ),
    ),
    (
        *("E9004", "come in"),
        lambda t: swap(
            *(properties(t, "AmongThemselves"), "SourceSecurityGroupId", "CidrIp", "10.0.0.0/8")
        ),
    ),
    (
        *("E9004", "come in"),
        lambda t: properties(t, "AmongThemselves").update(SourceSecurityGroupId="sg-0123456789"),
    ),
    *(
        (rule, text, lambda t, n=name, c=change: properties(t, n)["ComputeResources"].update(c))
        for name in ("SpotComputeEnvironment", "OnDemandComputeEnvironment")
        for rule, text, change in (
            ("E9005", "MinvCpus", {"MinvCpus": 1}),
            (
                *("E9005", r"\$Latest"),
                {"LaunchTemplate": {"LaunchTemplateName": "x", "Version": "$Latest"}},
            ),
        )
    ),
    (
        *("E9005", "ReplaceComputeEnvironment"),
        lambda t: properties(t, "SpotComputeEnvironment").pop("ReplaceComputeEnvironment"),
    ),
    (
        *("E9006", "AllocationStrategy"),
        lambda t: properties(t, "SpotComputeEnvironment")["ComputeResources"].update(
            AllocationStrategy="BEST_FIT_PROGRESSIVE"
        ),
    ),
    (
        *("E9006", "InstanceTypes must be 3"),
        lambda t: t["Parameters"]["InstanceTypes"].update(Default="g5.xlarge,g5.2xlarge"),
    ),
    ("E9007", "Attempts", lambda t: retry(t).update(Attempts=11)),
    ("E9007", "Attempts", lambda t: retry(t).update(Attempts=1)),
    ("E9007", "the last rule", lambda t: retry(t)["EvaluateOnExit"].pop()),
    (
        "E9007",
        "6 rules",
        lambda t: retry(t)["EvaluateOnExit"].insert(0, {"OnExitCode": "75", "Action": "RETRY"}),
    ),
    (
        "E9007",
        r"'75', '93'",
        lambda t: retry(t)["EvaluateOnExit"][2].update(OnExitCode="93"),
    ),
    ("E9007", r"are \[\]", lambda t: retry(t)["EvaluateOnExit"].pop(3)),
    ("E9007", "taken away", lambda t: retry(t)["EvaluateOnExit"].pop(0)),
    ("E9008", "Timeout", lambda t: properties(t, "JobDefinition").pop("Timeout")),
    (
        *("E9008", "Timeout"),
        lambda t: properties(t, "JobDefinition").update(Timeout={"AttemptDurationSeconds": 10}),
    ),
    (
        *("E9009", "WANDB_API_KEY"),
        lambda t: container(t)["Environment"].append({"Name": "WANDB_API_KEY", "Value": "x"}),
    ),
    ("E9010", "User", lambda t: container(t).pop("User")),
    ("E9010", "User", lambda t: container(t).update(User="0:10001")),
    ("E9010", "Privileged", lambda t: container(t).update(Privileged=True)),
    ("E9010", "Readonly", lambda t: container(t).update(ReadonlyRootFilesystem=False)),
    ("E9010", "Init", lambda t: container(t)["LinuxParameters"].pop("InitProcessEnabled")),
    ("E9010", "SharedMemory", lambda t: container(t)["LinuxParameters"].pop("SharedMemorySize")),
    (
        *("E9009", "WANDB_API_KEY"),
        lambda t: of_nodes(t)["Environment"].append({"Name": "WANDB_API_KEY", "Value": "x"}),
    ),
    ("E9010", "Privileged", lambda t: of_nodes(t).update(Privileged=True)),
    ("E9018", "another container", lambda t: of_nodes(t).update(Image="another")),
    (
        *("E9018", "another RetryStrategy"),
        lambda t: properties(t, "NodesJobDefinition")["RetryStrategy"].update(Attempts=3),
    ),
    (
        *("E9018", "another Timeout"),
        lambda t: properties(t, "JobDefinition").update(Timeout={"AttemptDurationSeconds": 99}),
    ),
    ("E9011", "RetentionInDays", lambda t: properties(t, "LogGroup").pop("RetentionInDays")),
    ("E9012", "BucketEncryption", lambda t: properties(t, "Bucket").pop("BucketEncryption")),
    ("E9012", "Versioning", lambda t: properties(t, "Bucket").pop("VersioningConfiguration")),
    (
        *("E9012", "BlockPublicPolicy"),
        lambda t: properties(t, "Bucket")["PublicAccessBlockConfiguration"].pop(
            "BlockPublicPolicy"
        ),
    ),
    ("E9012", "OwnershipControls", lambda t: properties(t, "Bucket").pop("OwnershipControls")),
    ("E9012", "DeletionPolicy", lambda t: t["Resources"]["Bucket"].pop("DeletionPolicy")),
    ("E9013", "uploads", lambda t: lifecycle(t).pop(0)),
    ("E9013", "older versions", lambda t: lifecycle(t).__delitem__(slice(1, None))),
    (
        "E9013",
        "would delete",
        lambda t: lifecycle(t).append(
            {"Id": "old", "Status": "Enabled", "Prefix": "runs/", "ExpirationInDays": 90}
        ),
    ),
    ("E9014", "no policy", lambda t: t["Resources"].pop("BucketPolicy")),
    ("E9015", "more than one", lambda t: statements(t, "JobRole")[0].update(Action="s3:Get*")),
    ("E9015", "every resource", lambda t: statements(t, "JobRole")[1].update(Resource="*")),
    (
        *("E9015", "every resource"),
        lambda t: properties(t, "SubmitPolicy")["PolicyDocument"]["Statement"][1].update(
            Resource="*"
        ),
    ),
    (
        *("E9016", "may delete"),
        lambda t: statements(t, "JobRole")[2].update(Resource={"Fn::Sub": "${Bucket.Arn}/runs/*"}),
    ),
    (
        *("E9017", "SourceAccount"),
        lambda t: properties(t, "JobRole")["AssumeRolePolicyDocument"]["Statement"][0].pop(
            "Condition"
        ),
    ),
]


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    """With the short forms of functions written out, so that it can be dumped again."""
    return dict(cfn_yaml.loads(TEMPLATE.read_text()))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if not isinstance(value, str) else str(value)


@pytest.fixture
def own_rules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """cfn-lint's many take most of the time; that it finds nothing else is another test's."""
    monkeypatch.setattr(core, "get_rules", lambda *_: _own_rules())


@functools.cache
def _own_rules() -> Any:
    others = [*(f"E{number}" for number in range(9)), "W", "I"]
    return get_rules([rules.__name__], others, [])


def test_the_template_is_good() -> None:
    assert validate() == []


def test_it_is_still_good_written_out(template: dict[str, Any], tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    path = tmp_path / "stack.yaml"
    path.write_text(yaml.safe_dump(plain(template)))
    assert validate(path) == []


@pytest.mark.parametrize(
    ("rule", "text", "spoil"), BREAKS, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(BREAKS)]
)
def test_each_rule_finds_what_breaks_it(
    own_rules_alone: None,
    template: dict[str, Any],
    tmp_path: Path,
    rule: str,
    text: str,
    spoil: Break,
) -> None:
    spoiled = copy.deepcopy(plain(template))
    spoil(spoiled)
    path = tmp_path / "stack.yaml"
    path.write_text(yaml.safe_dump(spoiled))
    found = [str(finding) for finding in validate(path) if finding.rule == rule]
    assert any(re.search(text, line) for line in found), found


def test_no_rule_is_without_a_test() -> None:
    ids = {
        value.id
        for value in vars(rules).values()
        if isinstance(value, type) and getattr(value, "id", "").startswith("E9")
    }
    assert ids == {rule for rule, _, _ in BREAKS}


# ---------------------------------------------------------------- what machines run at their start


@pytest.fixture
def script(template: dict[str, Any], tmp_path: Path) -> Path:
    """The shell part of the user data."""
    text = template["Resources"]["LaunchTemplate"]["Properties"]["LaunchTemplateData"]
    parts = str(text["UserData"]["Fn::Base64"]).split("--==S4GAN==")
    assert len(parts) == 3
    assert parts[2].startswith("--")  # the archive's end
    head, _, body = parts[1].lstrip("\n").partition("\n\n")
    assert head.startswith("Content-Type: text/x-shellscript")
    path = tmp_path / "start.sh"
    path.write_text(body)
    return path


def test_it_is_clean_shell(script: Path) -> None:
    ended = subprocess.run([SHELLCHECK, script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(
    ("disks", "broken", "done"),
    [
        ([], (), []),
        (
            ["/dev/nvme1n1"],
            (),
            ["mkfs.xfs -f /dev/nvme1n1", "mount -o noatime /dev/nvme1n1 {scratch}"],
        ),
        (["/dev/nvme1n1"], ("mkfs.xfs", "mdadm"), []),
        (
            ["/dev/nvme1n1", "/dev/nvme2n1"],
            ("mdadm",),
            ["mkfs.xfs -f /dev/nvme1n1", "mount -o noatime /dev/nvme1n1 {scratch}"],
        ),
        (
            ["/dev/nvme1n1", "/dev/nvme2n1"],
            (),
            [
                "mdadm --create /dev/md0 --run --level 0 --raid-devices 2 /dev/nvme1n1 "
                "/dev/nvme2n1",
                "mkfs.xfs -f /dev/md0",
                "mount -o noatime /dev/md0 {scratch}",
            ],
        ),
    ],
)
def test_local_disks_become_scratch(
    script: Path, tmp_path: Path, disks: list[str], broken: Sequence[str], done: list[str]
) -> None:
    tools, calls, scratch = tmp_path / "bin", tmp_path / "calls", tmp_path / "scratch"
    tools.mkdir()
    for name in ("mdadm", "mkfs.xfs", "mount"):
        works = "exit 1" if name in broken else f'echo "{name} $*" >> {calls}'
        (tools / name).write_text(f"#!/bin/sh\n{works}\n")
    shown = ["/dev/nvme0n1 Amazon Elastic Block Store"]
    shown += [f"{disk} Amazon EC2 NVMe Instance Storage" for disk in disks]
    (tools / "lsblk").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(shown) + "\nEND\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    config = tmp_path / "ecs.config"
    text = script.read_text()
    text = text.replace("/etc/ecs/ecs.config", str(config)).replace("=/scratch", f"={scratch}")
    script.write_text(text)
    subprocess.run(
        ["bash", script], check=True, env={"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    assert config.read_text().splitlines() == [
        "ECS_CONTAINER_STOP_TIMEOUT=110s",
        "ECS_ENABLE_SPOT_INSTANCE_DRAINING=true",
    ]
    found = calls.read_text().splitlines() if calls.exists() else []
    assert found == [line.format(scratch=scratch) for line in done]
    assert scratch.stat().st_mode & 0o7777 == 0o1777


# ---------------------------------------------------------------- mails, and images


def test_a_job_that_was_cancelled_is_no_alarm(template: dict[str, Any]) -> None:
    from job.cloud.jobs import CANCELLED

    detail = template["Resources"]["FailedJobs"]["Properties"]["EventPattern"]["detail"]
    assert detail["statusReason"] == [{"anything-but": {"prefix": CANCELLED}}]


def test_the_image_that_jobs_run_is_kept_before_old_ones_go(template: dict[str, Any]) -> None:
    from job.cloud.image import COMMIT_TAG

    policy = template["Resources"]["Repository"]["Properties"]["LifecyclePolicy"]
    text = policy["LifecyclePolicyText"]["Fn::Sub"].replace("${ImageTag}", "v1")
    first, *others = json.loads(text)["rules"]
    assert first["selection"]["tagPatternList"] == ["v1"]
    assert first["selection"]["countNumber"] == 1  # only one image can have a tag
    patterns = [one["selection"].get("tagPatternList") for one in others]
    assert [f"{COMMIT_TAG}*"] in patterns
    priorities = [one["rulePriority"] for one in (first, *others)]
    assert priorities == sorted(set(priorities))
