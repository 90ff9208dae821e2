"""Which code this is, as git tells."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import job


@dataclass(frozen=True)
class Revision:
    """Of the checkout that this program runs from."""

    commit: str
    diff_sha256: str = ""
    """Of what differs from the commit; empty if nothing does."""

    def __str__(self) -> str:
        return f"{self.commit}-dirty-{self.diff_sha256[:12]}" if self.diff_sha256 else self.commit


def revision() -> Revision | None:
    """None if the program is not in a git checkout, or git is not there."""
    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD")
    if commit is None or diff is None:
        return None
    diff += _untracked()
    dirty = hashlib.sha256(diff).hexdigest() if diff else ""
    return Revision(commit.decode().strip(), dirty)


def _untracked() -> bytes:
    """Names and contents of files that git does not know yet, but that the image would hold."""
    package = Path(job.__file__).parent
    listed = git("ls-files", "-z", "--others", "--exclude-standard", "--", package.name) or b""
    found = b""
    for name in filter(None, listed.split(b"\0")):
        with contextlib.suppress(OSError):
            found += name + b"\0" + (package.parent / os.fsdecode(name)).read_bytes()
    return found


def checkout() -> Path | None:
    """Folder of the checkout that this program runs from; None if it runs from none."""
    folder = Path(job.__file__).parent.parent
    return folder if (folder / ".git").exists() else None


def git(*arguments: str) -> bytes | None:
    """What git says of the checkout that this program runs from; None as for `revision`."""
    folder = checkout()
    if folder is None:
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
