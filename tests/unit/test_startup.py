"""What the commands import: what they do not use must not keep their users waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from job import run
from job.config import Config
from job.run import RunIdentity
from tests.series import lines

PROGRAM = """
import sys
from job.cli import main
sys.argv[0] = "s4gan"
try:
    main()
except SystemExit as end:
    code = end.code
print(code or 0, *sys.modules, file=sys.stderr)
"""
TRAINING = {"torch", "torchvision", "timm", "wandb", "matplotlib", "cfnlint", "onnx"}
"""Seconds each."""
SLOW = TRAINING | {"boto3", "botocore", "numpy", "PIL", "pydantic", "yaml", "rich", "contourpy"}
"""Tenths of a second each."""


def imported(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code of the command, the modules it has imported, and what it has printed."""
    # Keys that nobody takes, at a port where nobody listens: no command here may need them.
    environment = {
        "PATH": "/usr/bin:/bin",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, *modules = done.stderr.splitlines()[-1].split(" ")
    return int(code), set(modules), done.stdout


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that has been trained for a while."""
    ledger = "".join(json.dumps(line) + "\n" for line in lines(until=3000))
    (tmp_path / run.LEDGER).write_text(ledger)
    (tmp_path / run.CONFIG).write_text(Config().to_yaml())
    (tmp_path / run.IDENTITY).write_bytes(RunIdentity.create("2026-01-01T00:00:00").to_json())
    return tmp_path


@pytest.mark.parametrize(("flag", "said"), [("--help", "Usage"), ("--version", "s4gan ")])
def test_help_imports_nothing_slow(flag: str, said: str) -> None:
    code, modules, printed = imported(flag)
    assert code == 0
    assert said in printed
    assert sorted(SLOW & modules) == []


@pytest.mark.parametrize("verb", ["train", "submit", "evaluate", "predict", "data", "infra"])
def test_help_of_a_command_imports_only_what_reads_its_options(verb: str) -> None:
    code, modules, printed = imported(verb, "--help")
    assert code == 0
    assert "Usage" in printed
    # typer itself takes pydantic, if there is one, for the values of options.
    assert sorted((SLOW - {"pydantic"}) & modules) == []


def test_to_submit_imports_nothing_of_the_training() -> None:
    code, modules, printed = imported(
        "submit", "--dry-run", "--data", "s3://b/data/x", "--run", "s3://b/runs/x"
    )
    assert code == 0
    assert "containerOverrides" in printed
    assert sorted(TRAINING & modules) == []


@pytest.mark.parametrize(
    ("verb", "code", "said"),
    [("status", 0, "50000"), ("diagnose", 0, "healthy"), ("cost", 0, "hours"), ("logs", 78, "")],
)
def test_to_look_at_a_run_imports_nothing_of_the_training(
    run_folder: Path, verb: str, code: int, said: str
) -> None:
    found, modules, printed = imported(verb, str(run_folder))
    assert found == code
    assert said in printed
    assert sorted((TRAINING | {"numpy", "PIL", "boto3"}) & modules) == []
