"""Putting the image where jobs find it."""

from __future__ import annotations

import base64
import re
import subprocess

from job.cloud.aws import client, explained
from job.cloud.stack import outputs
from job.errors import ConfigError, StorageError

COMMIT_TAG = "git-"
"""Begins a second tag of an image, which tells the commit it was built from."""


def push(image: str, tag: str, stack: str, docker: str = "docker") -> str:
    """Push a local image into the stack's repository.

    It gets a second tag with its commit, if it knows it, so that `submit` can compare.

    Args:
        image: its local name.
        tag: what it is to be called there.
        stack: whose repository.
        docker: command line of the engine; the key is given to it, not to the process list.

    Returns:
        The image's full name.

    Raises:
        ConfigError: there is no stack, no engine or no such image.
        StorageError: the engine or the repository refuses.
    """
    repository = outputs(stack)["RepositoryUri"]
    target = f"{repository}:{tag}"
    _run(docker, "tag", image, target, mend=f"make image IMAGE={image}")
    targets = [target]
    label = '{{index .Config.Labels "org.opencontainers.image.revision"}}'
    built_from = _run(docker, "inspect", "--format", label, image).strip()
    if re.fullmatch(r"[0-9a-f]{40}(-dirty)?", built_from):
        targets.append(f"{repository}:{COMMIT_TAG}{built_from}")
        _run(docker, "tag", image, targets[-1])
    ecr = client("ecr")
    with explained("log in to the repository"):
        token = ecr.get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, _, password = base64.b64decode(token).decode().partition(":")
    host = repository.partition("/")[0]
    _run(docker, "login", "--username", user, "--password-stdin", host, text=password)
    for name in targets:
        _run(docker, "push", name)
    return target


def _run(docker: str, *arguments: str, text: str | None = None, mend: str = "") -> str:
    """Run a command of the engine; its output, unless that is progress for the user to see."""
    quiet = arguments[0] != "push"
    try:
        ended = subprocess.run(
            [docker, *arguments],
            input=text,
            text=True,
            check=False,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.PIPE if quiet else None,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot run {docker}: {error.strerror}", mend="install Docker, or say --docker PATH"
        ) from None
    if ended.returncode:
        said = (ended.stderr or "").strip().splitlines()
        raise StorageError(
            f"docker {arguments[0]} failed{': ' + said[-1] if said else ''}", mend=mend
        )
    return ended.stdout or ""
