"""One GET at a time, cheaply: a lean HTTP path to S3 with boto3 behind it.

boto3 spends 2 ms of CPU on each GET, ten times what signing, sending and reading take; with many
small files that is the whole time. So each GET is tried once over a plain socket with a signature
of our own. Whatever is not exactly a good reply (an error, a redirect, a broken connection) is
asked for again through boto3, which knows all the rest: retries, regions, clocks, expired tokens.

Knows nothing of files, checksums or data sets.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from job.errors import StorageError, reason

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 20
"""Between two bytes. Also the longest that a stop can be held up by a dead network."""
ATTEMPTS = 8
"""Through boto3, with waits that double up to LONGEST_WAIT_S."""
LONGEST_WAIT_S = 20
GIVE_UP_AFTER = 16
"""Failures in a row, in one process, after which the lean path is not tried any more."""
_HEAD_BYTES = 64 * 2**10
_OK = {200, 206}


class ObjectChanged(Exception):
    """The object is not the one that was listed any more, or is gone."""


class ReplyBroken(Exception):
    """A body that ended too early, or a reply that cannot be what was asked for."""


class Reply(Protocol):
    """The answer to a GET."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""

    def readinto(self, view: memoryview) -> int:
        """Read some bytes of the body; 0 at its end.

        Raises:
            ReplyBroken: the connection broke.
        """


class Getter(Protocol):
    """Where objects are read from; used by many threads at once."""

    def open(
        self, key: str, *, etag: str, span: tuple[int, int] | None = None, part: int = 0
    ) -> contextlib.AbstractContextManager[Reply]:
        """GET an object, on condition that it is still the listed one.

        Args:
            key: of the bucket, in full.
            etag: as listed.
            span: first byte and length, for a part of it.
            part: number of an uploaded part, from 1, for that one.

        Raises:
            ObjectChanged: it is not.
            JobError: refused, or failed after all retries.
        """

    def head(self, key: str, *, etag: str, part: int = 0) -> Mapping[str, str]:
        """Headers of an object, or of one of its uploaded parts; raises as `open` does."""

    def stop(self) -> None:
        """Break off what is going on in other threads; nothing new can be begun."""

    def close(self) -> None:
        """Give the connections back, when no thread uses them any more."""


@dataclass(frozen=True)
class Credentials:
    """As botocore's frozen ones, but of a type that other processes can be sent."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False)


@dataclass(frozen=True)
class Route:
    """How requests for a bucket reach it, as boto3 resolved it."""

    secure: bool
    netloc: str
    """Host header."""
    host: str
    port: int
    prefix: str
    """Of paths: "/bucket", or nothing where the bucket is in the host's name."""
    region: str
    payload_hash: str
    """What boto3 signs in the place of a body's hash: of nothing, or that there is none."""
    ca_file: str


@dataclass(frozen=True)
class S3Address:
    """What another process needs to read from a bucket, but for the credentials."""

    bucket: str
    route: Route | None
    """None: only through boto3."""

    def getter(self, credentials: Callable[[], Credentials | None]) -> S3Getter:
        """A getter for this process."""
        return S3Getter(self, credentials)


@dataclass(frozen=True)
class FolderAddress:
    """Objects that are files."""

    root: str

    def getter(self, credentials: Callable[[], Credentials | None]) -> FolderGetter:
        """A getter for this process; needs no credentials."""
        return FolderGetter(Path(self.root))


Address = S3Address | FolderAddress


def find_route(client: Any, bucket: str) -> Route | None:
    """Ask boto3 where it would send a GET and how it would sign it; sends nothing.

    None where the lean path cannot go: proxies, unsigned requests, other signatures.

    Raises:
        botocore.exceptions.BotoCoreError: no credentials, no region, ...
    """
    from botocore.httpsession import get_cert_path
    from botocore.session import Session
    from botocore.utils import get_environ_proxies

    seen: list[Any] = []

    def capture(request: Any, **_: Any) -> None:
        seen.append(request)
        raise _NotSent

    client.meta.events.register("before-send.s3.GetObject", capture, unique_id="s4gan-route")
    try:
        client.get_object(Bucket=bucket, Key="k")
    except _NotSent:
        pass
    finally:
        client.meta.events.unregister("before-send.s3.GetObject", unique_id="s4gan-route")
    url = urlsplit(seen[0].url)
    headers = {name.lower(): _text(value) for name, value in seen[0].headers.items()}
    scheme, _, rest = headers.get("authorization", "").partition(" Credential=")
    scope = rest.partition(",")[0].split("/")[-4:]
    if scheme != "AWS4-HMAC-SHA256" or scope[2:] != ["s3", "aws4_request"]:
        return None
    if get_environ_proxies(seen[0].url) or not url.hostname or not url.path.endswith("/k"):
        return None
    secure = url.scheme == "https"
    return Route(
        secure=secure,
        netloc=url.netloc,
        host=url.hostname,
        port=url.port or (443 if secure else 80),
        prefix=url.path[: -len("/k")],
        region=scope[1],
        payload_hash=headers["x-amz-content-sha256"],
        ca_file=str(Session().get_config_variable("ca_bundle") or get_cert_path(True)),
    )


class _NotSent(Exception):
    """Stops boto3 before a request leaves."""


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


# ---------------------------------------------------------------- S3


class S3Getter:
    """A `Getter` of one bucket; keeps a connection for each thread."""

    def __init__(self, address: S3Address, credentials: Callable[[], Credentials | None]) -> None:
        self._address = address
        self._credentials = credentials
        self._own = threading.local()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._failures = 0
        self._stopped = threading.Event()
        self._client: Any = None

    @contextlib.contextmanager
    def open(
        self, key: str, *, etag: str, span: tuple[int, int] | None = None, part: int = 0
    ) -> Iterator[Reply]:
        """See `Getter.open`."""
        if self._stopped.is_set():
            raise StorageError("stopped")
        quick = self._quick(key, etag, span, part)
        if quick is None:
            with contextlib.closing(self._through_boto3(key, etag, span, part)) as slow:
                yield slow
            return
        try:
            yield quick
        finally:
            if quick.remaining or not quick.keep_alive:
                self._drop_connection()

    def stop(self) -> None:
        """See `Getter.stop`."""
        with self._lock:
            self._stopped.set()
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `Getter.close`."""
        for connection in self._sockets:
            connection.close()
        if self._client is not None:
            self._client.close()

    def _quick(
        self, key: str, etag: str, span: tuple[int, int] | None, part: int
    ) -> _QuickReply | None:
        """The reply if it came at once and is good; None: ask boto3."""
        route, credentials = self._address.route, self._credentials()
        if route is None or credentials is None or self._failures >= GIVE_UP_AFTER:
            return None
        head = _signed_head(route, credentials, key, etag, span, part)
        try:
            reply = self._exchange(route, head)
        except (OSError, ValueError):
            reply = None
        if reply is None or reply.status not in _OK:
            self._drop_connection()
            # A changed object or a busy server says nothing against this way of asking.
            if reply is None or (reply.status not in (404, 412, 429) and reply.status < 500):
                self._failures += 1
            return None
        self._failures = 0
        return reply

    def _exchange(self, route: Route, head: bytes) -> _QuickReply:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            try:
                return _exchange(connection, head)
            except OSError:  # closed by the server while it lay idle
                self._drop_connection()
        connection = self._own.connection = _connect(route)
        with self._lock:
            if self._stopped.is_set():
                raise OSError("closed")
            self._sockets.add(connection)
        return _exchange(connection, head)

    def _drop_connection(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            self._own.connection = None
            with self._lock:
                self._sockets.discard(connection)
            connection.close()

    def _through_boto3(
        self, key: str, etag: str, span: tuple[int, int] | None, part: int
    ) -> _Boto3Reply:
        which: dict[str, Any] = {}
        if span:
            which["Range"] = _range(span)
        elif part:
            which["PartNumber"] = part
        else:
            which["ChecksumMode"] = "ENABLED"
        return _Boto3Reply(self._asked(self._boto3().get_object, key, etag, which))

    def head(self, key: str, *, etag: str, part: int = 0) -> Mapping[str, str]:
        """See `Getter.head`."""
        which: dict[str, Any] = {"PartNumber": part} if part else {"ChecksumMode": "ENABLED"}
        reply = self._asked(self._boto3().head_object, key, etag, which)
        return dict(reply["ResponseMetadata"]["HTTPHeaders"])

    def _asked(
        self, call: Callable[..., Any], key: str, etag: str, which: Mapping[str, Any]
    ) -> Any:
        """Call boto3, again if the server is busy; with waits that `stop` breaks off."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        from job.storage.s3 import explain

        for attempt in range(1, ATTEMPTS + 1):
            if self._stopped.is_set():
                break
            try:
                return call(Bucket=self._address.bucket, Key=key, IfMatch=etag, **which)
            except (ClientError, BotoCoreError) as error:
                reply = getattr(error, "response", {})
                code = reply.get("Error", {}).get("Code")
                status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if status == 412 or (status == 404 and code != "NoSuchBucket"):
                    raise ObjectChanged(key) from None
                again = isinstance(error, HTTPClientError) or status >= 500 or status == 429
                if not again or attempt == ATTEMPTS:
                    raise explain(error, "read", f"s3://{self._address.bucket}/{key}") from error
            longest_s = min(LONGEST_WAIT_S, 0.2 * 2**attempt)
            self._stopped.wait(random.uniform(0, longest_s))
        raise StorageError("stopped")

    def _boto3(self) -> Any:
        from job.storage.s3 import make_client

        with self._lock:
            if self._client is None:
                self._client = make_client(
                    read_timeout=READ_TIMEOUT_S, retries={"total_max_attempts": 1}
                )
            return self._client


class _QuickReply:
    """A `Reply` over our own socket."""

    def __init__(
        self, connection: socket.socket, status: int, headers: dict[str, str], rest: memoryview
    ) -> None:
        self.status = status
        self.headers = headers
        self.keep_alive = headers.get("connection", "").lower() != "close"
        if "transfer-encoding" in headers:
            raise ValueError("not a plain body")
        self.remaining = int(headers["content-length"]) if "content-length" in headers else -1
        if self.remaining < len(rest):
            raise ValueError("no length, or more than was announced")
        self._connection = connection
        self._rest = rest

    def readinto(self, view: memoryview) -> int:
        """See `Reply.readinto`."""
        wanted = min(len(view), self.remaining)
        if not wanted:
            return 0
        if self._rest:
            count = min(wanted, len(self._rest))
            view[:count] = self._rest[:count]
            self._rest = self._rest[count:]
        else:
            try:
                count = self._connection.recv_into(view[:wanted])
            except OSError as error:
                raise ReplyBroken(reason(error)) from None
        if not count:
            raise ReplyBroken("the connection was closed in the middle")
        self.remaining -= count
        return count


class _Boto3Reply:
    """A `Reply` of boto3's."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        self.headers: dict[str, str] = dict(reply["ResponseMetadata"]["HTTPHeaders"])
        self._body = reply["Body"]

    def readinto(self, view: memoryview) -> int:
        """See `Reply.readinto`."""
        from botocore.exceptions import BotoCoreError

        try:
            data = self._body.read(len(view))
        except (BotoCoreError, OSError) as error:
            raise ReplyBroken(reason(error)) from None
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Give the connection back."""
        self._body.close()


def _connect(route: Route) -> socket.socket:
    connection = socket.create_connection((route.host, route.port), CONNECT_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(READ_TIMEOUT_S)
    if not route.secure:
        return connection
    return _tls_context(route.ca_file).wrap_socket(connection, server_hostname=route.host)


@functools.cache
def _tls_context(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def _exchange(connection: socket.socket, head: bytes) -> _QuickReply:
    """Send a request and read the head of its reply.

    Raises:
        OSError: nothing came.
        ValueError: what came is not HTTP as we know it.
    """
    connection.sendall(head)
    buffer = bytearray(_HEAD_BYTES)
    view, count, end = memoryview(buffer), 0, -1
    while end < 0:
        got = connection.recv_into(view[count:]) if count < _HEAD_BYTES else 0
        if not got:
            raise ConnectionError("no complete reply")
        count += got
        end = buffer.find(b"\r\n\r\n", 0, count)
    lines = buffer[:end].decode("latin-1").split("\r\n")
    version, status = lines[0].split(" ", 2)[:2]
    if version != "HTTP/1.1":
        raise ValueError(f"unexpected protocol {version}")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return _QuickReply(connection, int(status), headers, view[end + 4 : count])


def _signed_head(
    route: Route,
    credentials: Credentials,
    key: str,
    etag: str,
    span: tuple[int, int] | None,
    part: int,
) -> bytes:
    """The head of a signed GET request.

    Source: AWS, "Create a signed AWS API request" (Signature Version 4); S3 encodes a path once.
    Condition and range are left unsigned, as botocore leaves them.
    """
    path = f"{route.prefix}/{quote(key, safe='/')}"
    query = f"partNumber={part}" if part else ""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    signed = {
        "host": route.netloc,
        "x-amz-content-sha256": route.payload_hash,
        "x-amz-date": now,
    }
    if span is None and not part:
        signed["x-amz-checksum-mode"] = "ENABLED"
    if credentials.token:
        signed["x-amz-security-token"] = credentials.token
    names = sorted(signed)
    canonical = "\n".join(
        [
            "GET",
            path,
            query,
            *(f"{name}:{signed[name]}" for name in names),
            "",
            ";".join(names),
            route.payload_hash,
        ]
    )
    scope = f"{now[:8]}/{route.region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"
    secret = _signing_key(credentials.secret_key, now[:8], route.region)
    signature = hmac.digest(secret, to_sign.encode(), "sha256").hex()
    lines = [f"GET {path}{'?' if query else ''}{query} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in signed.items()]
    lines += [
        f"authorization: AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, "
        f"SignedHeaders={';'.join(names)}, Signature={signature}",
        f"if-match: {etag}",
        "user-agent: s4gan-job",
        "accept-encoding: identity",
    ]
    if span:
        lines.append(f"range: {_range(span)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@functools.lru_cache(maxsize=8)
def _signing_key(secret_key: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for step in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, step.encode(), "sha256")
    return key


def _range(span: tuple[int, int]) -> str:
    first, length = span
    return f"bytes={first}-{first + length - 1}"


# ---------------------------------------------------------------- folders


class FolderGetter:
    """A `Getter` of files below a folder; an ETag is what `folder_etag` says."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextlib.contextmanager
    def open(
        self, key: str, *, etag: str, span: tuple[int, int] | None = None, part: int = 0
    ) -> Iterator[Reply]:
        """See `Getter.open`; files have no parts."""
        path = self._root / key
        try:
            file = open(path, "rb")  # noqa: SIM115  # closed below; errors there are not of opening
        except FileNotFoundError:
            raise ObjectChanged(key) from None
        except OSError as error:
            raise StorageError.from_os("read", path, error) from error
        with file:
            status = os.fstat(file.fileno())
            if folder_etag(status) != etag:
                raise ObjectChanged(key)
            first, length = span or (0, status.st_size)
            file.seek(first)
            yield _FileReply(file, length)

    def head(self, key: str, *, etag: str, part: int = 0) -> Mapping[str, str]:
        """See `Getter.head`."""
        with self.open(key, etag=etag) as reply:
            return reply.headers

    def stop(self) -> None:
        """See `Getter.stop`; files do not hang."""

    def close(self) -> None:
        """See `Getter.close`."""


class _FileReply:
    """A `Reply` from a file."""

    def __init__(self, file: Any, length: int) -> None:
        self.headers = {"content-length": str(length)}
        self._file = file
        self._remaining = length

    def readinto(self, view: memoryview) -> int:
        """See `Reply.readinto`."""
        try:
            count = int(self._file.readinto(view[: self._remaining]))
        except OSError as error:
            raise ReplyBroken(reason(error)) from None
        self._remaining -= count
        return count


def folder_etag(status: os.stat_result) -> str:
    """Changes when a file is written."""
    return f'"{status.st_size}-{status.st_mtime_ns}"'
