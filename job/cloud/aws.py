"""Clients of AWS's services, and their errors as ours.

The endpoint of a service can be named as everywhere in boto3 (AWS_ENDPOINT_URL_BATCH, ...).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

from job.errors import AccessDenied, ConfigError, JobError, StorageError, reason

STACK_VARIABLE = "S4GAN_STACK"
DEFAULT_STACK = "s4gan"


def client(service: str, region: str | None = None) -> Any:
    """A boto3 client; the same one as long as the environment says the same.

    Making one reads the service's whole description: half a second for EC2, and a table of many
    runs asks for many.

    Args:
        service: as boto3 calls it.
        region: another one than the user's own.

    Raises:
        ConfigError: there are no credentials, or no region.
    """
    said = tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_")))
    return _client(service, region, said)


@functools.lru_cache(maxsize=16)
def _client(service: str, region: str | None, _said: tuple[tuple[str, str], ...]) -> Any:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    from job.storage.s3 import aws_session

    try:
        session = aws_session()
        if session.get_credentials() is None:
            raise ConfigError(
                "no AWS credentials found",
                mend="log in (for example: aws sso login), or set AWS_PROFILE or the keys",
            )
        return session.client(
            service,
            region_name=region,
            config=Config(
                connect_timeout=10,
                read_timeout=60,
                retries={"mode": "standard", "total_max_attempts": 5},
                user_agent_extra="s4gan-job",
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise explain(error, f"use {service}") from None


@contextlib.contextmanager
def explained(action: str) -> Iterator[None]:
    """Turn boto3's errors within a block into ours.

    Args:
        action: what is done there: "submit the job".
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except (ClientError, BotoCoreError, ResponseParserError) as error:
        raise explain(error, action) from error


def explain(error: Exception, action: str) -> JobError:
    """What boto3 raised, as our error with a mend."""
    from botocore import exceptions as aws
    from botocore.parsers import ResponseParserError

    from job.storage.s3 import EXPIRED, NO_CREDENTIALS, WRONG_KEYS

    if isinstance(error, ResponseParserError):
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        return StorageError(
            f"cannot {action}: what answered is not AWS" + (f" ({endpoint})" if endpoint else ""),
            mend="check AWS_ENDPOINT_URL if it is set, and the network's proxy",
        )
    if isinstance(error, aws.NoRegionError):
        return ConfigError("no AWS region is chosen", mend="set AWS_REGION to the stack's region")
    if isinstance(error, NO_CREDENTIALS):
        return ConfigError(
            f"no usable AWS credentials ({reason(error)})",
            mend="log in (for example: aws sso login), or set AWS_PROFILE or the keys",
        )
    if isinstance(error, aws.ClientError):
        code = code_of(error)
        text = str(error.response.get("Error", {}).get("Message", "")) or code
        if code in EXPIRED:
            return StorageError(
                f"cannot {action}: the AWS credentials have expired",
                mend="renew them (for example: aws sso login)",
            )
        if code in WRONG_KEYS:
            return ConfigError(
                f"cannot {action}: the AWS credentials are not valid ({code})",
                mend="check AWS_PROFILE or the keys",
            )
        if code in ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation"):
            operation = error.operation_name
            return AccessDenied(
                f"cannot {action}: access denied to {operation} ({text})",
                mend="ask for the stack's SubmitPolicy; infra/README.md lists what each command "
                "needs",
            )
        return StorageError(f"cannot {action}: {text}", mend="see the reason above")
    return StorageError(
        f"cannot {action}: {reason(error)}",
        mend="check the network, AWS_REGION, and AWS_ENDPOINT_URL if it is set",
    )


def region_of(arn: str) -> str | None:
    """The region that an ARN names; None if it is none. What a run's records name is there."""
    parts = arn.split(":")
    return parts[3] or None if parts[0] == "arn" and len(parts) > 5 else None


def code_of(error: Any) -> str:
    """Of a ClientError."""
    return str(error.response.get("Error", {}).get("Code", ""))


def stack_name(chosen: str | None) -> str:
    """Of the stack to use: as chosen, else S4GAN_STACK, else s4gan.

    Raises:
        ConfigError: not a name that everything in the stack can have.
    """
    name = chosen or os.environ.get(STACK_VARIABLE) or DEFAULT_STACK
    if not re.fullmatch(r"[a-z][a-z0-9-]{1,38}[a-z0-9]", name):
        raise ConfigError(
            f"{name}: cannot be the name of a stack",
            mend="3 to 40 small letters, digits and hyphens, the first one a letter",
        )
    return name
