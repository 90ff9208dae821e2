"""`FakeImds`: the metadata service of an EC2 instance (IMDSv2) on loopback, with a spot notice.

Owns what an instance would be told about itself; knows nothing of who asks.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

HOST = "127.0.0.1"
_TOKEN_PATH = "/latest/api/token"
_METADATA = "/latest/meta-data/"
_MAX_TTL_S = 21_600
_POLL_S = 0.05
_CREDENTIALS_VALID = timedelta(hours=6)


@dataclass(frozen=True)
class ImdsRequest:
    """A question that was asked, and how it was answered."""

    method: str
    path: str
    status: int | None
    """None: not at all."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What the instance says about itself."""

    life_cycle: Literal["spot", "on-demand"] = "spot"
    instance_id: str = "i-0123456789abcdef0"
    instance_type: str = "g5.xlarge"
    availability_zone: str = "us-east-1a"
    role: str = "s4gan-job"
    """Name of the instance's role; without keys there is none."""
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    """Empty for keys that are no session's, such as those of `SeaweedServer`."""


class FakeImds:
    """A metadata service for the length of a `with` block.

    Nothing is announced until `notice` or `rebalance` is called: the paths are 404, as on a real
    instance. All methods may be called from any thread.

    Args:
        instance: what it says about itself.
        tokens_required: answer only requests with a token (IMDSv2). Otherwise those without are
            answered as well (IMDSv1); one that is wrong or has expired is 401 either way.

    Attributes:
        endpoint: "http://127.0.0.1:PORT", from entering the block on.
        hang: while set, requests are accepted and never answered.
        tokens_required: see above; may be changed at any time.

    Source: Amazon EC2 User Guide, "Use the Instance Metadata Service to access instance metadata",
    "Spot Instance interruption notices", "EC2 instance rebalance recommendations".
    """

    def __init__(self, instance: Instance | None = None, *, tokens_required: bool = True) -> None:
        self.instance = instance or Instance()
        self.tokens_required = tokens_required
        self.endpoint = ""
        self._lock = threading.Lock()
        self._hanging = False
        self._wake = threading.Event()
        self._log: list[ImdsRequest] = []
        self._tokens: dict[str, float] = {}
        self._action: dict[str, str] | None = None
        self._rebalance: dict[str, str] | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FakeImds:
        self._server = _Server(self)
        self.endpoint = f"http://{HOST}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,))
        self._thread.daemon = True
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self.hang = False
        self._server.hang_up()
        self._server.server_close()  # waits for the requests in flight

    def environment(self) -> dict[str, str]:
        """Variables that point AWS clients (and this program) here."""
        return {
            "AWS_EC2_METADATA_DISABLED": "false",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint,
        }

    def notice(
        self, in_s: float = 120, action: Literal["terminate", "stop", "hibernate"] = "terminate"
    ) -> None:
        """Announce that the instance will be interrupted in so many seconds."""
        with self._lock:
            self._action = {"action": action, "time": _iso(timedelta(seconds=in_s))}

    def rebalance(self) -> None:
        """Announce that the instance is at elevated risk of being interrupted."""
        with self._lock:
            self._rebalance = {"noticeTime": _iso()}

    def clear(self) -> None:
        """Take back what was announced."""
        with self._lock:
            self._action = self._rebalance = None

    def expire_tokens(self) -> None:
        """Make all tokens that were given out invalid, as if their time had passed."""
        with self._lock:
            self._tokens.clear()

    @property
    def hang(self) -> bool:
        """Whether requests are accepted and never answered; those waiting stay unanswered."""
        return self._hanging

    @hang.setter
    def hang(self, hang: bool) -> None:
        with self._lock:
            if hang and not self._hanging:
                self._wake = threading.Event()
            self._hanging = hang
            if not hang:
                self._wake.set()

    @property
    def requests(self) -> list[ImdsRequest]:
        """All requests since the start or `forget`, in the order they were answered."""
        with self._lock:
            return list(self._log)

    def forget(self) -> None:
        """Empty the log."""
        with self._lock:
            self._log.clear()

    def _hangs(self, method: str, path: str) -> bool:
        """Log and wait while the service hangs; whether it did."""
        with self._lock:
            if not self._hanging:
                return False
            self._log.append(ImdsRequest(method, path, None))
            wake = self._wake
        wake.wait()
        return True

    def _answer(self, method: str, path: str, header: Callable[[str], str | None]) -> _Reply:
        """The reply to a request, which is in the log before the client has it."""
        with self._lock:
            if method == "PUT":
                reply = self._new_token(path, header)
            else:
                reply = self._metadata(path, header("X-aws-ec2-metadata-token"))
            self._log.append(ImdsRequest(method, path, reply.status))
        return reply

    def _new_token(self, path: str, header: Callable[[str], str | None]) -> _Reply:
        if path != _TOKEN_PATH:
            return _Reply(405)
        if header("X-Forwarded-For") is not None:
            return _Reply(403)
        ttl = header("X-aws-ec2-metadata-token-ttl-seconds") or ""
        if not ttl.isdecimal() or not 1 <= int(ttl) <= _MAX_TTL_S:
            return _Reply(400)
        token = secrets.token_urlsafe(40)
        self._tokens[token] = time.monotonic() + int(ttl)
        return _Reply(200, token, headers={"X-aws-ec2-metadata-token-ttl-seconds": ttl})

    def _metadata(self, path: str, token: str | None) -> _Reply:
        if self.tokens_required or token is not None:
            expires_s = self._tokens.get(token or "", 0.0)
            if time.monotonic() >= expires_s:
                return _Reply(401)
        if not path.startswith(_METADATA):
            return _Reply(404)
        content = self._contents().get(path.removeprefix(_METADATA).rstrip("/"))
        if content is None:
            return _Reply(404)
        if isinstance(content, str):
            return _Reply(200, content)
        return _Reply(200, json.dumps(content), content_type="application/json")

    def _contents(self) -> dict[str, str | dict[str, str] | None]:
        instance = self.instance
        contents: dict[str, str | dict[str, str] | None] = {
            "instance-id": instance.instance_id,
            "instance-life-cycle": instance.life_cycle,
            "instance-type": instance.instance_type,
            "placement/availability-zone": instance.availability_zone,
            "placement/region": instance.availability_zone[:-1],
            "spot/instance-action": self._action,
            "events/recommendations/rebalance": self._rebalance,
        }
        if instance.access_key:
            folder = "iam/security-credentials"
            contents[folder] = instance.role
            contents[f"{folder}/{instance.role}"] = {
                "Code": "Success",
                "LastUpdated": _iso(),
                "Type": "AWS-HMAC",
                "AccessKeyId": instance.access_key,
                "SecretAccessKey": instance.secret_key,
                "Token": instance.session_token,
                "Expiration": _iso(_CREDENTIALS_VALID),
            }
        return contents


@dataclass(frozen=True)
class _Reply:
    status: int
    text: str = ""
    content_type: str = "text/plain"
    headers: dict[str, str] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    """Threads that are joined at the end; `hang_up` sees to it that they come to one."""

    daemon_threads = False

    def __init__(self, imds: FakeImds) -> None:
        self.imds = imds
        self._open: set[socket.socket] = set()
        super().__init__((HOST, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours; anything else is, and is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        """End what clients have left open or half asked."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._reply()

    def do_PUT(self) -> None:
        self._reply()

    def _reply(self) -> None:
        imds = self.server.imds
        if imds._hangs(self.command, self.path):
            return
        reply = imds._answer(self.command, self.path, self.headers.get)
        body = reply.text.encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `FakeImds.requests`, not stderr."""


def _iso(ahead: timedelta = timedelta(0)) -> str:
    """That far from now as the service writes it: 2017-09-18T08:22:00Z."""
    return (datetime.now(UTC) + ahead).strftime("%Y-%m-%dT%H:%M:%SZ")
