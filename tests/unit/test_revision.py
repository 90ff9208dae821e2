"""Which code this is: real git, a checkout of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import job
from job.revision import revision


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With one commit of a package `job`, from which the program seems to run."""
    package = tmp_path / "job"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(job, "__file__", str(package / "__init__.py"))
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    (checkout / "job" / "x.pyc").write_text("ignored")
    (checkout / "notes.txt").write_text("not of the image")
    found = revision()
    assert found is not None
    assert len(found.commit) == 40
    assert str(found) == found.commit


@pytest.mark.parametrize("name", ["__init__.py", "new.py", "with space é.py"])
def test_what_the_image_would_hold_beyond_the_commit_is_told(checkout: Path, name: str) -> None:
    said = []
    for text in ("one = 1\n", "two = 2\n"):
        (checkout / "job" / name).write_text(text)
        said.append(str(revision()))
    assert all("-dirty-" in one for one in said)
    assert said[0] != said[1]


def test_without_git_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "__file__", str(tmp_path / "job" / "__init__.py"))
    assert revision() is None
