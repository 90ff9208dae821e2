"""`S3Store`: objects under a prefix of a bucket, and S3's errors in words.

Everything the program knows of boto3 for single objects is here; moving many or large files into a
folder is `job.storage.sync`'s. Endpoint, region and credentials come from where boto3 takes them
(`AWS_ENDPOINT_URL`, profiles, the job's role).
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.exceptions as aws
import botocore.loaders
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from job.errors import (
    AccessDenied,
    ConfigError,
    Corrupted,
    JobError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    reason,
)
from job.heartbeat import beat
from job.storage.store import ABSENT, ObjectInfo

log = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20
"""Of multipart transfers; times PART_THREADS, an upper bound of what they hold in memory."""
PART_THREADS = 8
COPY_LIMIT_BYTES = 5 * 2**30
"""Largest object CopyObject takes. Source: S3 API Reference, CopyObject."""
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
"""Between two bytes, not for a whole object; a contended conditional write can take seconds."""
ATTEMPTS = 7
"""Of one request, by botocore, with exponential waits: half a minute in all."""
TELL_AGAIN_S = 30.0
"""Between two words of a client about a storage that does not answer."""
BODY_ATTEMPTS = 4
"""Of reading an object whose body breaks off or arrives changed, which botocore does not retry."""
CONFLICT_ATTEMPTS = 10

_PERMISSIONS = {
    "read": "s3:GetObject (and s3:ListBucket: without it S3 answers 403 for what is not there)",
    "write": "s3:PutObject",
    "list": "s3:ListBucket",
    "copy": "s3:GetObject and s3:PutObject",
    "delete": "s3:DeleteObject",
}
WRONG_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}
NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
    aws.ProfileNotFound,
    aws.InvalidConfigError,
    aws.UnauthorizedSSOTokenError,
    aws.SSOTokenLoadError,
)
"""What botocore raises where nobody is logged in, or not any more."""
_Result = TypeVar("_Result")


def aws_session() -> Any:
    """A boto3 session of its own: the default one must not be shared between threads.

    Its region is AWS_REGION's, as with AWS's other tools, and what a container of the stack is
    given; boto3 by itself knows only AWS_DEFAULT_REGION and profiles.
    """
    core = botocore.session.get_session()
    loader = _descriptions(core.get_config_variable("data_path"))
    core.register_component("data_loader", loader)
    session = boto3.session.Session(
        region_name=os.environ.get("AWS_REGION") or None, botocore_session=core
    )
    loader.search_paths[:] = dict.fromkeys(loader.search_paths)  # each session appends boto3's own
    return session


@functools.lru_cache(maxsize=4)
def _descriptions(path: str | None) -> Any:
    """What botocore reads the services' descriptions with; it remembers what it has read.

    One for all sessions: reading those of S3 is most of the time that a client takes.

    Args:
        path: where else there are some: botocore's `data_path`.
    """
    return botocore.loaders.create_loader(path)


def make_client(**options: Any) -> Any:
    """A boto3 S3 client with this program's timeouts and retries; `options` go to its Config.

    Raises:
        ConfigError: boto3's own configuration cannot be used.
    """
    config = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        # Not "standard": its quota of retries is used up by one long outage, and for hours after
        # that every hiccup would be an error.
        "retries": {"mode": "legacy", "total_max_attempts": ATTEMPTS},
        "max_pool_connections": 4 * PART_THREADS,
        "tcp_keepalive": True,
        "user_agent_extra": "s4gan-job",
    }
    try:
        client = aws_session().client("s3", config=Config(**(config | options)))
    except (aws.BotoCoreError, ValueError) as error:
        raise _no_client(error) from None
    client.meta.events.register("needs-retry.s3", _RetryWarning(), unique_id="s4gan-retry")
    return client


class _RetryWarning:
    """Says that S3 does not answer while botocore tries again, which may take minutes."""

    def __init__(self) -> None:
        self._told_s = -math.inf

    def __call__(
        self, attempts: int, caught_exception: BaseException | None = None, **_: Any
    ) -> None:
        """Botocore's event `needs-retry`, before it decides."""
        if caught_exception is None or attempts >= ATTEMPTS:
            return
        now_s = time.monotonic()
        if now_s - self._told_s < TELL_AGAIN_S:
            return
        self._told_s = now_s
        log.warning(
            "S3 does not answer, trying again (%d of %d): %s",
            *(attempts, ATTEMPTS - 1, reason(caught_exception)),
        )


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix (without slashes at its ends) of s3://bucket/prefix.

    Raises:
        ConfigError: no bucket.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{uri}: names no bucket", mend="write s3://BUCKET/PREFIX")
    if not uri.isprintable():
        raise ConfigError(
            f"{uri!r}: has a character in it that is not printed", mend="write it without"
        )
    if prefix.strip("/") and any(part in ("", ".", "..") for part in prefix.strip("/").split("/")):
        # Legal as a key, but some servers do not list it again.
        raise ConfigError(f"{uri}: has '//' or a dot for a folder in it", mend="remove it")
    return bucket, prefix.strip("/")


class S3Store:
    """An `ObjectStore` under a prefix of a bucket.

    Conditional writes are S3's own (If-Match, If-None-Match), so they hold between any machines.
    """

    def __init__(self, uri: str, client: Any = None) -> None:
        self.bucket, self.prefix = split_uri(uri)
        self._root = f"{self.prefix}/" if self.prefix else ""
        self.client = client or make_client()
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=PART_THREADS,
        )

    @property
    def uri(self) -> str:
        """s3://bucket/prefix."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def below(self, path: str) -> S3Store:
        """See `ObjectStore`. To make a client takes a tenth of a second of a core."""
        return S3Store(f"{self.uri}/{path}", self.client)

    def read(self, key: str) -> bytes:
        """See `ObjectStore.read`."""
        return self._read(key)[0]

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        """See `ObjectStore.read_versioned`; the version is the ETag."""
        try:
            return self._read(key)
        except ObjectNotFound:
            return b"", ABSENT

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        """See `ObjectStore.write`."""

        def put(**condition: str) -> str:
            reply = self.client.put_object(**self._at(key), Body=data, **condition)
            return str(reply["ETag"])

        def is_ours() -> str | None:
            found, version = self.read_versioned(key)
            return version if found == data else None

        with self.explained("write", key):
            return put() if expected is None else self._conditional(key, expected, put, is_ours)

    def upload(self, path: Path, key: str) -> None:
        """See `ObjectStore.upload`; in parts, so memory stays bounded."""
        with self.explained("write", key):
            self.client.upload_file(
                str(path),
                self.bucket,
                self._root + key,
                Config=self._transfer,
                Callback=lambda _: beat(),
            )

    def fetch(self, key: str, directory: Path) -> Path:
        """See `ObjectStore.fetch`."""
        path = directory / key.rpartition("/")[2]
        with self.explained("read", key):
            directory.mkdir(parents=True, exist_ok=True)
            for attempt in range(1, BODY_ATTEMPTS + 1):
                try:
                    self.client.download_file(
                        self.bucket, self._root + key, str(path), Config=self._transfer
                    )
                    return path
                except aws.ClientError as error:
                    if _is_bare(error):
                        self._head(key)  # says more
                    raise
                except aws.FlexibleChecksumError:
                    if attempt == BODY_ATTEMPTS:
                        raise
                    _wait(attempt)
        raise AssertionError("unreachable")

    def stat(self, key: str) -> ObjectInfo | None:
        """See `ObjectStore.stat`."""
        with self.explained("read", key):
            try:
                head = self._head(key)
            except aws.ClientError as error:
                if _status(error) != 404 or _code(error) == "NoSuchBucket":
                    raise
                return None
        return ObjectInfo(key, head["ContentLength"], head["ETag"])

    def age_s(self, key: str) -> float:
        """See `ObjectStore.age_s`; both times are the server's, to the second."""
        with self.explained("read", key):
            head = self._head(key)
        date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        # A server without a clock may leave it out (RFC 9110, 6.6.1); then ours has to do.
        now = (
            email.utils.parsedate_to_datetime(date) if date else datetime.datetime.now(datetime.UTC)
        )
        return float((now - head["LastModified"]).total_seconds())

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self._root + prefix
        )
        with self.explained("list", prefix):
            for page in pages:
                for item in page.get("Contents", ()):
                    key = item["Key"].removeprefix(self._root)
                    yield ObjectInfo(key, item["Size"], item["ETag"])

    def copy(self, source: str, target: str, *, expected: str | None = None) -> None:
        """See `ObjectStore.copy`; on the server, in one request up to 5 GiB."""
        info = self.stat(source)
        if info is None:
            raise ObjectNotFound(f"{self._url(source)}: no such object")
        size = info.size

        def put(**condition: str) -> str:
            if size > COPY_LIMIT_BYTES:
                return self._copy_in_parts(source, target, size, condition)
            reply = self.client.copy_object(
                **self._at(target), CopySource=self._at(source), **condition
            )
            return str(reply["CopyObjectResult"]["ETag"])

        with self.explained("copy", target):
            if expected is None:
                put()
            else:
                # A lost reply needs no reading back: the caller copies anew from what is there.
                self._conditional(target, expected, put, lambda: None)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        with self.explained("delete", key):
            self.client.delete_object(**self._at(key))

    def local_path(self, key: str) -> Path | None:
        """See `ObjectStore.local_path`."""
        return None

    def _at(self, key: str) -> dict[str, str]:
        if ".." in key.split("/"):
            raise StorageError(f"{key}: a key must not contain '..'")
        return {"Bucket": self.bucket, "Key": self._root + key}

    def _url(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._root}{key}"

    def _head(self, key: str) -> dict[str, Any]:
        """Ask for an object's size and version; a refusal comes with its reason."""
        try:
            return dict(self.client.head_object(**self._at(key)))
        except aws.ClientError as error:
            if not _is_bare(error):
                raise
        # The reply to a HEAD has no body, so it cannot say whether key or bucket is missing, nor
        # whether an object or the credentials are refused. The reply to a GET can.
        self.client.get_object(**self._at(key))["Body"].close()
        return dict(self.client.head_object(**self._at(key)))

    def _read(self, key: str) -> tuple[bytes, str]:
        with self.explained("read", key):
            for attempt in range(1, BODY_ATTEMPTS + 1):
                reply = self.client.get_object(**self._at(key))
                try:
                    return reply["Body"].read(), str(reply["ETag"])
                except (aws.HTTPClientError, aws.FlexibleChecksumError, aws.IncompleteReadError):
                    # The body broke off, or is not what the server's checksum says.
                    if attempt == BODY_ATTEMPTS:
                        raise
                    _wait(attempt)
        raise AssertionError("unreachable")

    def _conditional(
        self,
        key: str,
        expected: str,
        put: Callable[..., str],
        is_ours: Callable[[], str | None],
    ) -> str:
        """Run `put` on condition that the object's version is `expected`."""
        condition = {"IfNoneMatch": "*"} if expected == ABSENT else {"IfMatch": expected}
        for attempt in range(1, CONFLICT_ATTEMPTS + 1):
            try:
                return put(**condition)
            except aws.ClientError as error:
                status = _status(error)
                # If-Match on what has been deleted is 404 at AWS, 412 elsewhere.
                gone = status == 404 and expected != ABSENT and _code(error) != "NoSuchBucket"
                if status == 412 or gone:
                    # botocore repeats a write whose reply was lost; the repetition then finds the
                    # first one's result.
                    if (version := is_ours()) is not None:
                        return version
                    raise PreconditionFailed(
                        f"{self._url(key)}: changed by somebody else"
                    ) from None
                # 409: two conditional writes at the same moment; the server asks for a repetition.
                if status != 409 or attempt == CONFLICT_ATTEMPTS:
                    raise
                time.sleep(0.05 * 2 ** min(attempt, 6) * random.random())
        raise AssertionError("unreachable")

    def _copy_in_parts(self, source: str, target: str, size: int, condition: dict[str, str]) -> str:
        upload = {
            **self._at(target),
            "UploadId": self.client.create_multipart_upload(**self._at(target))["UploadId"],
        }
        try:
            parts = []
            for number, first in enumerate(range(0, size, COPY_LIMIT_BYTES // 5), start=1):
                last = min(first + COPY_LIMIT_BYTES // 5, size) - 1
                part = self.client.upload_part_copy(
                    **upload,
                    PartNumber=number,
                    CopySource=self._at(source),
                    CopySourceRange=f"bytes={first}-{last}",
                )
                parts.append({"PartNumber": number, "ETag": part["CopyPartResult"]["ETag"]})
            reply = self.client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, **condition
            )
            return str(reply["ETag"])
        except BaseException:
            with contextlib.suppress(aws.ClientError, aws.BotoCoreError):
                self.client.abort_multipart_upload(**upload)
            raise

    @contextlib.contextmanager
    def explained(self, verb: str, key: str) -> Iterator[None]:
        """Turn boto3's errors into ours: what happened to which object, and what to do.

        Args:
            verb: read, write, list, copy or delete.
            key: the object or prefix.
        """
        try:
            yield
        except (aws.ClientError, aws.BotoCoreError, Boto3Error) as error:
            raise explain(error, verb, self._url(key)) from error
        except OSError as error:  # of the local file
            raise StorageError.from_os("read or write a local copy of", key, error) from error


def explain(error: Exception, verb: str, url: str) -> JobError:
    """What boto3 raised while we tried to `verb` the object at `url`, as our error with a mend."""
    cause: BaseException | None = error
    while isinstance(cause, Boto3Error):  # s3transfer wraps what it caught, and forgets its type
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, aws.ClientError):
        return _explain_reply(cause, verb, url)
    bucket = url.removeprefix("s3://").partition("/")[0]
    if isinstance(cause, NO_CREDENTIALS):
        return _no_client(cause)
    if isinstance(cause, aws.FlexibleChecksumError):
        return Corrupted(
            f"{url}: what arrives is not what the storage says it keeps ({reason(cause)})",
            mend="the object is damaged, or the network changes what passes: fetch it from "
            "another machine, or store it again",
        )
    if isinstance(cause, aws.ParamValidationError):
        return ConfigError(f"{url}: {bucket} cannot be a bucket's name", mend="check the URI")
    return StorageError(
        f"cannot {verb} {url}: {reason(cause or error)}",
        mend="check the network and, if it is set, AWS_ENDPOINT_URL; then run it again",
    )


def _explain_reply(error: aws.ClientError, verb: str, url: str) -> JobError:
    code, status = _code(error), _status(error)
    bucket = url.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket":
        return ConfigError(
            f"there is no bucket {bucket}",
            mend=f"check the URI, or make it: aws s3 mb s3://{bucket}",
        )
    if status == 404 and code != "NoSuchUpload":
        return ObjectNotFound(f"{url}: no such object")
    if code in WRONG_KEYS:
        return ConfigError(
            f"the AWS credentials are not valid here ({code})",
            mend="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the job's role, "
            "and AWS_ENDPOINT_URL if it is set",
        )
    if code in EXPIRED:
        return StorageError(
            f"cannot {verb} {url}: the AWS credentials have expired",
            mend="renew them (for example: aws sso login), then run it again",
        )
    if code == "RequestTimeTooSkewed":
        return StorageError(
            f"cannot {verb} {url}: this machine's clock is wrong, so its signatures are refused",
            mend="set the clock, then run it again",
        )
    if status == 403:
        return AccessDenied(
            f"cannot {verb} {url}: access denied",
            mend=f"the identity of this job needs {_PERMISSIONS[verb]} there",
        )
    if code in _ELSEWHERE:
        return ConfigError(
            f"the bucket {bucket} is in another region ({reason(error)})",
            mend="set AWS_REGION to the bucket's region",
        )
    if code == "EntityTooLarge" or status == 507:
        return StorageError(f"cannot {verb} {url}: {reason(error)}", mend="free some space there")
    busy = "the storage is busy or failing; " if status >= 500 or status == 429 else ""
    return StorageError(f"cannot {verb} {url}: {reason(error)}", mend=f"{busy}run it again later")


def _no_client(error: BaseException) -> ConfigError:
    return ConfigError(
        f"no usable AWS credentials or configuration ({reason(error)})",
        mend="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the job a role",
    )


def _wait(attempt: int) -> None:
    time.sleep(0.2 * 2**attempt * random.random())


def _is_bare(error: aws.ClientError) -> bool:
    """Whether the reply had only a status to say why the request is refused."""
    return 400 <= _status(error) < 500 and _code(error) in ("", str(_status(error)))


def _code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
