"""`FaultProxy`: an HTTP proxy in front of an S3 server that fails on demand, and keeps a log.

Owns what happens to a request between client and server. Requests and replies pass unchanged (the
Host header too, so that signatures stay valid) and are never held in memory as a whole. It knows no
S3 beyond the form of an error reply.

    with FaultProxy(server.endpoint) as proxy:
        proxy.add(Status(503, method="PUT", times=2))          # two puts are told to slow down
        lost = proxy.add(LoseReply(match="/lease.json"))       # stored, but the client cannot know
        ...
        assert lost.fired == 1
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from http import HTTPStatus
from types import TracebackType
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

HOST = "127.0.0.1"
_CHUNK_BYTES = 256 * 1024
_THROTTLE_STEP_S = 0.05
_S3_CODES = {
    403: ("AccessDenied", "Access Denied."),
    404: ("NoSuchKey", "The specified key does not exist."),
    409: ("ConditionalRequestConflict", "A conflicting operation occurred. Try again."),
    412: ("PreconditionFailed", "At least one of the preconditions you specified did not hold."),
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
}
"""Source: Amazon S3 API Reference, "Error responses"."""
_BODILESS = (204, 304)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What to do to a request, and to which.

    A request meets all matching `Latency`, `Throttle` and `Hold` faults, and the first other one
    in the order they were added; those behind it do not see it.
    """

    method: str | None = None
    """"PUT" (parts of multipart uploads too), "GET", ...; None: any."""
    match: str | re.Pattern[str] = ""
    """Part of "/bucket/key?query" with the key unquoted, or a pattern to search in it."""
    times: int | None = 1
    """How often it fires; None: until removed."""
    skip: int = 0
    """So many matching requests pass first."""

    ends: ClassVar[bool] = True
    """Whether the request comes to a bad end, so that no other such fault can apply."""


@dataclass(frozen=True)
class Status(Fault):
    """Reply with an S3 error; the server never hears of the request."""

    status: int = 503
    code: str = ""
    """S3's word, such as SlowDown; empty: the usual one of the status."""
    read_body: bool = True
    """Whether to let the client send its body first."""


@dataclass(frozen=True)
class Latency(Fault):
    """Wait before the request is passed on."""

    seconds: float
    ends: ClassVar[bool] = False


@dataclass(frozen=True)
class Throttle(Fault):
    """Pass bodies on at this speed, in both directions."""

    bytes_per_s: float
    ends: ClassVar[bool] = False


@dataclass(frozen=True)
class Hold(Fault):
    """Let the request wait until `Armed.release`.

    A client that goes away meanwhile is noticed only then: a request that was all there is still
    passed on, as by a slow network.
    """

    at: Literal["request", "upload", "reply"] = "request"
    """Before anything is passed on; in the request's body; or when the server has answered."""
    after_bytes: int = 0
    """How much of the body is passed on before; for "upload" only."""
    ends: ClassVar[bool] = False


@dataclass(frozen=True)
class Reset(Fault):
    """Reset the connection; the server never hears of the request."""


@dataclass(frozen=True)
class CutUpload(Fault):
    """Reset both connections after so many bytes of the request's body: nothing is stored.

    Always before its last byte. A request without a body is reset before it reaches the server.
    """

    after_bytes: int


@dataclass(frozen=True)
class LoseReply(Fault):
    """Let the server do its work, then reset the connection instead of replying."""


@dataclass(frozen=True)
class CutReply(Fault):
    """Close the connection after so many bytes of the reply's body, always before its last."""

    after_bytes: int


@dataclass(frozen=True)
class CorruptReply(Fault):
    """Flip one bit of the reply's body; its length and headers stay."""

    offset: int
    """Which byte; the last one if there are fewer."""


F = TypeVar("F", bound=Fault)


@dataclass
class Exchange:
    """One request and what became of it; complete before the client has all of the reply."""

    method: str
    path: str
    """Unquoted: "/bucket/key"."""
    query: str
    """As on the wire, without "?"."""
    status: int | None = None
    """Of the server's reply, even if the client does not get it, or the fault's; None: none yet."""
    fault: str = ""
    """Names of the faults met, joined by "+"."""
    bytes_up: int = 0
    """Of the request's body, as received from the client."""
    bytes_down: int = 0
    """Of the reply's body, as sent to the client."""


class Armed:
    """A fault that was added to a proxy. All methods may be called from any thread.

    Attributes:
        fault: what was added.
        fired: how many requests it met so far.
        reached: set when it has met one; for `Hold`, when that one waits.
    """

    def __init__(self, fault: Fault, proxy: FaultProxy) -> None:
        self.fault = fault
        self.fired = 0
        self.reached = threading.Event()
        self._seen = 0
        self._proxy = proxy
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let requests go that a `Hold` keeps; later ones do not wait any more."""
        self._proxy._call(self._released.set)

    def remove(self) -> None:
        """No request meets it from now on; those it holds go on."""
        self._proxy._remove(self)
        self.release()

    def _meets(self, exchange: Exchange) -> bool:
        fault = self.fault
        target = f"{exchange.path}?{exchange.query}" if exchange.query else exchange.path
        if fault.method not in (None, exchange.method):
            return False
        if isinstance(fault.match, str):
            if fault.match not in target:
                return False
        elif not fault.match.search(target):
            return False
        self._seen += 1
        if self._seen <= fault.skip or (fault.times is not None and self.fired >= fault.times):
            return False
        self.fired += 1
        if not isinstance(fault, Hold):
            self.reached.set()
        return True

    async def _wait(self) -> None:
        self.reached.set()
        await self._released.wait()


class FaultProxy:
    """A proxy for the length of a `with` block, in a thread of its own.

    Args:
        upstream: the server, "http://HOST:PORT".

    Attributes:
        endpoint: where clients connect to, from entering the block on.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{upstream}: only http:// can be looked into")
        self._upstream = (parts.hostname, parts.port or 80)
        self.endpoint = ""
        self._port = 0
        self._lock = threading.Lock()
        self._armed: list[Armed] = []
        self._log: list[Exchange] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._placeholder: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        try:
            # Bound but never listening: it keeps the port ours while the proxy is down.
            self._placeholder = _bound_socket(0)
            self._port = self._placeholder.getsockname()[1]
            self.endpoint = f"http://{HOST}:{self._port}"
            self._run(self._listen())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._end()

    def add(self, fault: Fault) -> Armed:
        """Let requests meet a fault from now on."""
        armed = Armed(fault, self)
        with self._lock:
            self._armed.append(armed)
        return armed

    def clear(self) -> None:
        """Remove all faults; requests that are held go on. `down` stays."""
        with self._lock:
            armed = list(self._armed)
        for one in armed:
            one.remove()

    @property
    def requests(self) -> list[Exchange]:
        """All requests since the start or `forget`, in the order they came."""
        with self._lock:
            return [replace(exchange) for exchange in self._log]

    def forget(self) -> None:
        """Empty the log."""
        with self._lock:
            self._log.clear()

    @property
    def down(self) -> bool:
        """The network is out: open connections are reset, new ones refused."""
        return self._server is None

    @down.setter
    def down(self, down: bool) -> None:
        if down != self.down:
            self._run(self._disconnect() if down else self._listen())

    # What follows runs in the proxy's own thread, but for the three that get there.

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _call(self, function: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function)

    def _end(self) -> None:
        self._run(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._placeholder is not None:
            self._placeholder.close()

    def _remove(self, armed: Armed) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._armed.remove(armed)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._accept, sock=_bound_socket(self._port), limit=_CHUNK_BYTES, backlog=128
        )

    async def _disconnect(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        # Nothing but connections runs here. A task may begin another one on its way out.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)  # transports close in the turns after they are told to

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._connections.add(task)

        def end(task: asyncio.Task[None]) -> None:
            # However it ended, even before it began: nothing may stay open.
            self._connections.discard(task)
            _reset(writer)

        task.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, request after request."""
        with contextlib.suppress(ConnectionError, EOFError):
            while await self._exchange(reader, writer):
                pass
            writer.close()
            await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection can take another.

        Raises:
            ConnectionError: the client must see a broken connection.
        """
        raw = await _read_head(reader)
        if raw is None:
            return False
        head = _Head(raw)
        method, target, version = head.first_line.split(" ")
        path, _, query = target.partition("?")
        exchange = Exchange(method, unquote(path), query)
        met = self._begin(exchange)
        body = _Body(reader, chunked=head.chunked, length=head.length or 0)

        if latency := sum(armed.fault.seconds for armed in met if isinstance(armed.fault, Latency)):
            await asyncio.sleep(latency)
        await _hold(met, "request")
        if _first(met, Reset) or (_first(met, CutUpload) and body.complete):
            raise ConnectionResetError("fault")
        if status := _first(met, Status):
            reusable = await _refuse(status, exchange, head, body, writer)
        else:
            reusable = await self._forward(exchange, met, head, body, writer)
        if reusable and version == "HTTP/1.1" and not head.closes:
            return True
        if not body.complete:
            # A reset because of unread bytes could overtake the reply: let the client finish.
            await writer.drain()
            writer.write_eof()
            while await reader.read(_CHUNK_BYTES):
                pass
        return False

    def _begin(self, exchange: Exchange) -> list[Armed]:
        """Write the request into the log; returns the faults that it meets."""
        met: list[Armed] = []
        with self._lock:
            self._log.append(exchange)
            ended = False
            for armed in self._armed:
                if (not ended or not armed.fault.ends) and armed._meets(exchange):
                    met.append(armed)
                    ended = ended or armed.fault.ends
        exchange.fault = "+".join(type(armed.fault).__name__ for armed in met)
        return met

    async def _forward(
        self,
        exchange: Exchange,
        met: list[Armed],
        head: _Head,
        body: _Body,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Pass the request on and its reply back; whether the connection can be used again."""
        try:
            up_reader, up_writer = await asyncio.open_connection(
                *self._upstream, limit=_CHUNK_BYTES
            )
        except OSError as error:
            raise ConnectionResetError("the server is down") from error
        uploading = answering = None
        try:
            up_writer.write(head.raw)
            uploading = asyncio.create_task(_upload(body, up_writer, met, exchange))
            answering = asyncio.create_task(_read_answer(up_reader, writer))
            # The server may answer before it has the body; then the rest is not wanted.
            await asyncio.wait({uploading, answering}, return_when=asyncio.FIRST_COMPLETED)
            if uploading.done():
                uploading.result()
            answer = await answering
            return await _relay(answer, up_reader, body, writer, met, exchange)
        finally:
            tasks = [task for task in (uploading, answering) if task is not None]
            for task in tasks:
                task.cancel()
            _reset(up_writer)  # first, for the wait may be cancelled as well
            await asyncio.gather(*tasks, return_exceptions=True)


class _Head:
    """The lines before a body, as they came and taken apart."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.first_line, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        self._headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        self.status = int(self.first_line.split(" ")[1]) if self.first_line[:5] == "HTTP/" else 0
        self.chunked = "chunked" in self._headers.get("transfer-encoding", "").lower()
        length = self._headers.get("content-length")
        self.length = int(length) if length is not None and not self.chunked else None
        self.closes = self._headers.get("connection", "").lower() == "close"
        self.expects_continue = self._headers.get("expect", "").lower() == "100-continue"

    def closing(self) -> bytes:
        """The raw head, with word that the connection closes after this reply."""
        return self.raw if self.closes else self.raw[:-2] + b"Connection: close\r\n\r\n"


class _Body:
    """The payload behind a head, read piece by piece, without the framing of chunks."""

    def __init__(self, reader: asyncio.StreamReader, *, chunked: bool, length: int | None) -> None:
        """`length` counts where the body is not chunked; None: until the connection ends."""
        self.chunked = chunked
        self.length = None if chunked else length
        self.complete = self.length == 0
        """Whether everything has been read."""
        self._trailers = b""
        self._reader = reader
        self._left = 0 if chunked else length

    async def read(self, at_most: int = _CHUNK_BYTES) -> bytes:
        """The next bytes, at least one; none at the end.

        Raises:
            ConnectionError, EOFError: it ends before its time.
        """
        if self.complete:
            return b""
        if self.chunked and self._left == 0:
            line = await self._reader.readuntil(b"\r\n")
            self._left = int(line.partition(b";")[0], 16)
            if self._left == 0:
                while (line := await self._reader.readuntil(b"\r\n")) != b"\r\n":
                    self._trailers += line
                self.complete = True
                return b""
        data = await self._reader.read(at_most if self._left is None else min(at_most, self._left))
        if self._left is None:
            self.complete = not data
            return data
        if not data:
            raise ConnectionResetError("the body is too short")
        self._left -= len(data)
        if self._left == 0:
            if self.chunked:
                await self._reader.readexactly(2)
            else:
                self.complete = True
        return data

    def within(self, offset: int) -> int:
        """The offset, or that of the last byte if the body is known to be shorter."""
        return offset if self.length is None else max(0, min(offset, self.length - 1))

    async def send(
        self, data: bytes, writer: asyncio.StreamWriter, throttle: Throttle | None
    ) -> None:
        """Write bytes that were read, framed as they came, and wait while the buffer is full."""
        step = len(data)
        if throttle:
            step = max(1, int(throttle.bytes_per_s * _THROTTLE_STEP_S))
        for begin in range(0, len(data), step):
            piece = data[begin : begin + step]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)
            await writer.drain()
            if throttle:
                await asyncio.sleep(len(piece) / throttle.bytes_per_s)

    async def send_end(self, writer: asyncio.StreamWriter) -> None:
        """Write what closes the body."""
        if self.chunked:
            writer.write(b"0\r\n" + self._trailers + b"\r\n")
        await writer.drain()


async def _upload(
    body: _Body, writer: asyncio.StreamWriter, met: list[Armed], exchange: Exchange
) -> None:
    """Pass the request's body on, unless the server stops listening.

    Raises:
        ConnectionError, EOFError: a fault cut it, or the client went away.
    """
    throttle, cut = _first(met, Throttle), _first(met, CutUpload)
    cut_at = body.within(cut.after_bytes) if cut else None
    holds = [
        (body.within(armed.fault.after_bytes), armed)
        for armed in met
        if isinstance(armed.fault, Hold) and armed.fault.at == "upload"
    ]
    while True:
        passed = exchange.bytes_up
        for offset, armed in holds:
            if offset == passed:
                await armed._wait()
        if passed == cut_at:
            raise ConnectionResetError("fault")
        stops = [offset for offset, _ in holds] + ([] if cut_at is None else [cut_at])
        room = min([_CHUNK_BYTES, *(stop - passed for stop in stops if stop > passed)])
        data = await body.read(room)
        if not data:
            break
        exchange.bytes_up += len(data)
        try:
            await body.send(data, writer, throttle)
        except ConnectionError:
            return  # it has heard enough; its answer, if any, says why
    if cut:
        raise ConnectionResetError("fault")
    for offset, armed in holds:
        if offset > exchange.bytes_up:
            await armed._wait()
    with contextlib.suppress(ConnectionError):
        await body.send_end(writer)


async def _read_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Head:
    """The head of the final reply; "100 Continue" before it goes to the client at once."""
    while True:
        raw = await _read_head(reader)
        if raw is None:
            raise ConnectionResetError("the server closed the connection")
        head = _Head(raw)
        if head.status >= 200:
            return head
        writer.write(raw)
        await writer.drain()


async def _relay(
    answer: _Head,
    reader: asyncio.StreamReader,
    request_body: _Body,
    writer: asyncio.StreamWriter,
    met: list[Armed],
    exchange: Exchange,
) -> bool:
    """Pass the server's reply on; whether the client's connection can be used again."""
    exchange.status = answer.status
    await _hold(met, "reply")
    empty = exchange.method == "HEAD" or answer.status in _BODILESS
    body = _Body(reader, chunked=answer.chunked and not empty, length=0 if empty else answer.length)
    throttle, cut, corrupt = _first(met, Throttle), _first(met, CutReply), _first(met, CorruptReply)
    if _first(met, LoseReply):
        while await body.read():
            pass
        raise ConnectionResetError("fault")
    if cut and body.complete:
        raise ConnectionResetError("fault")
    ends_by_closing = body.length is None and not body.chunked
    reusable = request_body.complete and not answer.closes and not ends_by_closing
    writer.write(answer.raw if reusable else answer.closing())
    cut_at = body.within(cut.after_bytes) if cut else None
    flip_at = body.within(corrupt.offset) if corrupt else None
    while exchange.bytes_down != cut_at:
        begin = exchange.bytes_down
        data = await body.read(_CHUNK_BYTES if cut_at is None else cut_at - begin)
        if not data:
            break
        if flip_at is not None and begin <= flip_at < begin + len(data):
            flipped = bytearray(data)
            flipped[flip_at - begin] ^= 1
            data = bytes(flipped)
        exchange.bytes_down += len(data)
        await body.send(data, writer, throttle)
    if cut:
        return False
    await body.send_end(writer)
    return reusable


async def _refuse(
    fault: Status, exchange: Exchange, head: _Head, body: _Body, writer: asyncio.StreamWriter
) -> bool:
    """Reply with the fault's error; whether the client's connection can be used again."""
    if fault.read_body:
        if head.expects_continue and not body.complete:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while data := await body.read():
            exchange.bytes_up += len(data)
    status = HTTPStatus(fault.status)
    code, message = _S3_CODES.get(fault.status, (status.phrase.replace(" ", ""), status.phrase))
    request_id = secrets.token_hex(8).upper()
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{fault.code or code}</Code><Message>{message}</Message>"
        f"<Resource>{escape(exchange.path)}</Resource><RequestId>{request_id}</RequestId></Error>"
    ).encode()
    if exchange.method == "HEAD" or fault.status in _BODILESS:
        xml = b""
    lines = [
        f"HTTP/1.1 {fault.status} {status.phrase}",
        "Content-Type: application/xml",
        f"Content-Length: {len(xml)}",
        f"x-amz-request-id: {request_id}",
        *([] if body.complete else ["Connection: close"]),
    ]
    exchange.status = fault.status
    exchange.bytes_down = len(xml)
    writer.write("\r\n".join([*lines, "", ""]).encode() + xml)
    await writer.drain()
    return body.complete


async def _hold(met: list[Armed], at: str) -> None:
    for armed in met:
        if isinstance(armed.fault, Hold) and armed.fault.at == at:
            await armed._wait()


def _first(met: list[Armed], kind: type[F]) -> F | None:
    return next((armed.fault for armed in met if isinstance(armed.fault, kind)), None)


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    """All lines up to and with the empty one; None if the connection ended before the first."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    except asyncio.LimitOverrunError as error:
        raise ConnectionResetError("no end of the headers") from error


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, with a reset instead of an end; what is not sent yet is lost."""
    with contextlib.suppress(OSError):  # it is closed already
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    writer.transport.abort()


def _bound_socket(port: int) -> socket.socket:
    """A socket on the port (0: any free one), which others of ours may share."""
    # With its protocol named asyncio switches Nagle's algorithm off; else small replies take 40 ms.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((HOST, port))
    except OSError:
        bound.close()
        raise
    return bound
