"""Through the proxy a client talks to the real server, until a fault does exactly what it says."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    FlexibleChecksumError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from job.drill.proxy import (
    CorruptReply,
    CutReply,
    CutUpload,
    FaultProxy,
    Hold,
    Latency,
    LoseReply,
    Reset,
    Status,
    Throttle,
)
from tests.services import BUCKET, Identity, s3_client, wait_until

KEY = {"Bucket": BUCKET, "Key": "folder/one object"}
PATH = f"/{BUCKET}/folder/one object"
BIG = bytes(range(256)) * 4 * 1024 * 12
"""12 MiB: more than all buffers on the way."""


@pytest.fixture
def direct(s3_server, bucket):
    """A client past the proxy, in an empty bucket: what the server really has."""
    with s3_client(s3_server) as client:
        yield client


@pytest.fixture
def client(s3_server, fault_proxy, bucket):
    """A client through the proxy that tries once."""
    with s3_client(s3_server, endpoint=fault_proxy.endpoint) as client:
        yield client


@pytest.fixture
def stubborn(s3_server, fault_proxy, bucket):
    """A client through the proxy that tries three times."""
    with s3_client(s3_server, endpoint=fault_proxy.endpoint, attempts=3) as client:
        yield client


@contextlib.contextmanager
def refused(code):
    """The block's request is answered by an error with this code."""
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.response["Error"]["Code"] == code


def content(client):
    """The object under KEY; None if there is none."""
    try:
        with contextlib.closing(client.get_object(**KEY)["Body"]) as body:
            return body.read()
    except client.exceptions.NoSuchKey:
        return None


def log(proxy):
    return [(exchange.method, exchange.status, exchange.fault) for exchange in proxy.requests]


class InBackground(threading.Thread):
    """A call in a thread of its own, with its result or error."""

    def __init__(self, call, **arguments):
        super().__init__()
        self.call, self.arguments = call, arguments
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self.call(**self.arguments)
        except Exception as error:
            self.error = error

    def outcome(self):
        self.join()
        if self.error:
            raise self.error
        return self.result


# --- Without faults


def test_everything_passes_unchanged(client, direct, fault_proxy):
    client.put_object(**KEY, Body=b"hello", Metadata={"step": "7"})
    head = client.head_object(**KEY)
    assert (head["ContentLength"], head["Metadata"]) == (5, {"step": "7"})
    assert content(client) == content(direct) == b"hello"
    assert client.get_object(**KEY, Range="bytes=1-2")["Body"].read() == b"el"
    assert client.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 1
    client.copy_object(Bucket=BUCKET, Key="copy", CopySource=KEY)
    client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": "copy"}]})
    client.delete_object(**KEY)
    assert content(client) is None
    assert not any(exchange.fault for exchange in fault_proxy.requests)


def test_signatures_are_still_checked(s3_server, fault_proxy, bucket):
    wrong = Identity("admin", s3_server.access_key, "wrong")
    with (
        s3_client(s3_server, endpoint=fault_proxy.endpoint, identity=wrong) as client,
        refused("SignatureDoesNotMatch"),
    ):
        client.put_object(**KEY, Body=b"1")


def test_big_objects_pass_in_parts_and_in_one(client, direct):
    client.put_object(**KEY, Body=BIG)
    assert content(direct) == BIG
    assert content(client) == BIG
    parts = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    client.upload_fileobj(io.BytesIO(BIG + b"!"), BUCKET, KEY["Key"], Config=parts)
    assert content(direct) == BIG + b"!"
    copy = io.BytesIO()
    client.download_fileobj(BUCKET, KEY["Key"], copy, Config=parts)
    assert copy.getvalue() == BIG + b"!"


def test_conditional_writes_and_reads_pass(client):
    etag = client.put_object(**KEY, Body=b"1", IfNoneMatch="*")["ETag"]
    with refused("PreconditionFailed"):
        client.put_object(**KEY, Body=b"2", IfNoneMatch="*")
    with refused("304"):
        client.get_object(**KEY, IfNoneMatch=etag)
    client.put_object(**KEY, Body=b"3", IfMatch=etag)
    with refused("PreconditionFailed"):
        client.put_object(**KEY, Body=b"4", IfMatch=etag)
    assert content(client) == b"3"


def test_one_connection_carries_many_requests(direct, s3_server, fault_proxy):
    direct.put_object(**KEY, Body=b"hello")
    with s3_client(s3_server, endpoint=fault_proxy.endpoint) as signer:
        get, head, missing = (
            signer.generate_presigned_url(operation, Params=parameters)
            for operation, parameters in (
                ("get_object", KEY),
                ("head_object", KEY),
                ("get_object", {**KEY, "Key": "missing"}),
            )
        )
    etag = direct.head_object(**KEY)["ETag"]
    connection = http.client.HTTPConnection(urlsplit(fault_proxy.endpoint).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.connect()
        port = connection.sock.getsockname()[1]
        for method, url, headers, expected in (
            ("GET", get, {}, (200, b"hello")),
            ("HEAD", head, {}, (200, b"")),
            ("GET", get, {"If-None-Match": etag}, (304, b"")),
            ("GET", missing, {}, (404, None)),
            ("GET", get, {}, (200, b"hello")),
        ):
            connection.request(method, url.removeprefix(fault_proxy.endpoint), headers=headers)
            response = connection.getresponse()
            body = response.read()
            assert response.status == expected[0]
            assert expected[1] is None or body == expected[1]
        assert connection.sock.getsockname()[1] == port
    assert [exchange.status for exchange in fault_proxy.requests] == [200, 200, 304, 404, 200]


def test_chunked_bodies_pass(direct, s3_server, fault_proxy):
    with s3_client(s3_server, endpoint=fault_proxy.endpoint) as signer:
        url = signer.generate_presigned_url("put_object", Params=KEY)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        pieces = [BIG[:10], BIG[10:700_000], BIG[700_000:]]
        connection.request(
            "PUT", url.removeprefix(fault_proxy.endpoint), iter(pieces), encode_chunked=True
        )
        with connection.getresponse() as response:
            response.read()
            assert response.status == 200
    assert content(direct) == BIG
    assert fault_proxy.requests[0].bytes_up == len(BIG)


def test_the_log_tells_what_was_transferred(client, fault_proxy):
    client.put_object(**KEY, Body=b"hello")
    client.get_object(**KEY)["Body"].read()
    put, get = fault_proxy.requests
    assert (put.method, put.path, put.status, put.fault, put.bytes_up, put.bytes_down) == (
        *("PUT", PATH, 200, ""),
        *(5, 0),
    )
    assert (get.method, get.path, get.status, get.fault, get.bytes_up, get.bytes_down) == (
        *("GET", PATH, 200, ""),
        *(0, 5),
    )
    client.list_objects_v2(Bucket=BUCKET, Prefix="folder/")
    assert "list-type=2" in fault_proxy.requests[-1].query
    fault_proxy.forget()
    assert fault_proxy.requests == []


def test_memory_stays_bounded(s3_server, bucket):
    """100 MB up and down; the proxy is in a process of its own, whose peak the kernel knows."""
    program = (
        "import pathlib, re, sys\n"
        "from job.drill.proxy import FaultProxy\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)',"
        " pathlib.Path('/proc/self/status').read_text())[1])\n"
        "with FaultProxy(sys.argv[1]) as proxy:\n"
        "    before = peak()\n"
        "    print(proxy.endpoint, flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print(peak() - before, [(r.bytes_up, r.bytes_down) for r in proxy.requests])\n"
    )
    size = 100_000_000
    with subprocess.Popen(
        [sys.executable, "-c", program, s3_server.endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        endpoint = process.stdout.readline().strip()
        with s3_client(s3_server, endpoint=endpoint, read_timeout=120) as client:
            client.put_object(**KEY, Body=bytes(size))
            received = sum(map(len, client.get_object(**KEY)["Body"].iter_chunks(2**20)))
        process.stdin.write("\n")
        process.stdin.flush()
        grown_kib, _, transferred = process.stdout.readline().partition(" ")
    assert received == size
    assert transferred.strip() == f"[({size}, 0), (0, {size})]"
    assert int(grown_kib) < 16 * 1024


# --- Which requests meet a fault


def test_a_fault_meets_as_many_requests_as_it_says(client, fault_proxy):
    armed = fault_proxy.add(Status(503, times=2, skip=1))
    assert content(client) is None
    assert not armed.reached.is_set()
    for _ in range(2):
        with refused("SlowDown"):
            client.get_object(**KEY)
    assert armed.reached.is_set()
    assert content(client) is None
    assert armed.fired == 2
    assert log(fault_proxy) == [
        ("GET", 404, ""),
        ("GET", 503, "Status"),
        ("GET", 503, "Status"),
        ("GET", 404, ""),
    ]


@pytest.mark.parametrize(
    ("where", "met"),
    [
        ({}, True),
        ({"method": "PUT"}, True),
        ({"method": "GET"}, False),
        ({"match": "/folder/one object"}, True),
        ({"match": "/folder/two"}, False),
        ({"match": re.compile(r"object(\?|$)")}, True),
        ({"match": re.compile(r"^/folder")}, False),
        ({"match": "uploadId="}, False),
    ],
)
def test_a_fault_chooses_by_method_and_path(client, fault_proxy, where, met):
    armed = fault_proxy.add(Status(403, **where))
    with refused("AccessDenied") if met else contextlib.nullcontext():
        client.put_object(**KEY, Body=b"1")
    assert armed.fired == met


def test_a_query_can_be_matched(client, fault_proxy):
    fault_proxy.add(Status(503, match="list-type=2"))
    client.put_object(**KEY, Body=b"1")
    with refused("SlowDown"):
        client.list_objects_v2(Bucket=BUCKET)


def test_faults_fire_in_order_and_one_at_a_time(client, fault_proxy):
    first = fault_proxy.add(Status(503))
    second = fault_proxy.add(Status(500, times=None))
    slow = fault_proxy.add(Latency(0.0))
    with refused("SlowDown"):
        client.get_object(**KEY)
    assert (first.fired, second.fired, slow.fired) == (1, 0, 1)
    with refused("InternalError"):
        client.get_object(**KEY)
    assert fault_proxy.requests[0].fault == "Status+Latency"


def test_faults_can_be_removed(client, fault_proxy):
    gone = fault_proxy.add(Status(500, times=None))
    fault_proxy.add(Status(503, times=None))
    gone.remove()
    gone.remove()
    with refused("SlowDown"):
        client.get_object(**KEY)
    fault_proxy.clear()
    assert content(client) is None
    assert gone.fired == 0


# --- What each fault does


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (403, "AccessDenied"),
        (409, "ConditionalRequestConflict"),
    ],
)
def test_status_is_s3s_own_error(client, fault_proxy, status, code):
    fault_proxy.add(Status(status))
    with refused(code):
        client.put_object(**KEY, Body=b"1")


@pytest.mark.parametrize("read_body", [True, False])
@pytest.mark.parametrize("body", [b"", b"small", BIG])
def test_after_a_status_nothing_is_stored(client, direct, fault_proxy, read_body, body):
    fault_proxy.add(Status(503, read_body=read_body))
    with refused("SlowDown"):
        client.put_object(**KEY, Body=body)
    assert content(direct) is None
    # boto3 asks before it sends a body, and keeps it when the answer is an error.
    assert fault_proxy.requests[0].bytes_up == (len(body) if read_body else 0)
    client.put_object(**KEY, Body=body)
    assert content(direct) == body


def test_status_with_a_code_of_its_own(client, fault_proxy):
    fault_proxy.add(Status(400, code="RequestTimeout"))
    with refused("RequestTimeout"):
        client.get_object(**KEY)


def test_status_of_a_head_request(client, fault_proxy):
    fault_proxy.add(Status(503))
    with refused("503"):
        client.head_object(**KEY)


def test_botocore_retries_what_slows_down(stubborn, direct, fault_proxy):
    fault_proxy.add(Status(503, method="PUT", times=2))
    stubborn.put_object(**KEY, Body=b"1")
    assert content(direct) == b"1"
    assert log(fault_proxy) == [
        ("PUT", 503, "Status"),
        ("PUT", 503, "Status"),
        ("PUT", 200, ""),
    ]


def test_a_client_that_does_not_ask_first_gets_the_early_reply_too(direct, s3_server, fault_proxy):
    fault_proxy.add(Status(503, read_body=False))
    with s3_client(s3_server, endpoint=fault_proxy.endpoint) as signer:
        url = signer.generate_presigned_url("put_object", Params=KEY)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("PUT", url.removeprefix(fault_proxy.endpoint), BIG)
        with connection.getresponse() as response:
            assert (response.status, response.getheader("Connection")) == (503, "close")
            response.read()
    assert content(direct) is None


def test_latency_can_outlast_the_clients_patience(client, s3_server, fault_proxy):
    armed = fault_proxy.add(Latency(3600))
    with (
        s3_client(s3_server, endpoint=fault_proxy.endpoint, read_timeout=0.1) as impatient,
        pytest.raises(ReadTimeoutError),
    ):
        impatient.get_object(**KEY)
    assert armed.fired == 1
    assert content(client) is None


def test_throttle_passes_everything(client, direct, fault_proxy):
    armed = fault_proxy.add(Throttle(50e6, times=2))
    client.put_object(**KEY, Body=BIG)
    assert content(direct) == BIG
    assert content(client) == BIG
    assert armed.fired == 2


def test_throttle_slows_both_directions(client, direct, fault_proxy):
    direct.put_object(**KEY, Body=BIG)
    fault_proxy.add(Throttle(1000, times=None))
    up = InBackground(client.put_object, Bucket=BUCKET, Key="up", Body=bytes(10_000_000))
    down = InBackground(lambda: client.get_object(**KEY)["Body"].read())
    # A few pieces of 50 bytes pass; of what the buffers hold, the rest would take hours.
    wait_until(lambda: len(fault_proxy.requests) == 2)
    wait_until(lambda: all(r.bytes_up + r.bytes_down > 0 for r in fault_proxy.requests))
    assert all(r.bytes_up + r.bytes_down < 2**20 for r in fault_proxy.requests)
    fault_proxy.down = True
    for call in (up, down):
        with pytest.raises((ConnectionClosedError, ResponseStreamingError)):
            call.outcome()
    fault_proxy.down = False


def test_reset_happens_before_the_server_hears_of_it(client, direct, fault_proxy):
    fault_proxy.add(Reset())
    with pytest.raises(ConnectionClosedError):
        client.put_object(**KEY, Body=b"1")
    assert content(direct) is None
    assert log(fault_proxy) == [("PUT", None, "Reset")]


@pytest.mark.parametrize("after_bytes", [0, 1, 5_000_000, len(BIG) - 1, 10**9])
def test_a_cut_upload_stores_nothing(client, direct, fault_proxy, after_bytes):
    fault_proxy.add(CutUpload(after_bytes))
    with pytest.raises(ConnectionClosedError):
        client.put_object(**KEY, Body=BIG)
    assert content(direct) is None
    assert fault_proxy.requests[0].bytes_up == min(after_bytes, len(BIG) - 1)


def test_a_cut_upload_leaves_the_old_object(client, direct, fault_proxy):
    direct.put_object(**KEY, Body=b"old")
    fault_proxy.add(CutUpload(2))
    with pytest.raises(ConnectionClosedError):
        client.put_object(**KEY, Body=b"new")
    assert content(direct) == b"old"


def test_a_cut_request_without_a_body_never_arrives(client, direct, fault_proxy):
    direct.put_object(**KEY, Body=b"1")
    fault_proxy.add(CutUpload(0))
    with pytest.raises(ConnectionClosedError):
        client.delete_object(**KEY)
    assert content(direct) == b"1"


def test_a_cut_part_of_an_upload_is_sent_again(stubborn, direct, fault_proxy):
    armed = fault_proxy.add(CutUpload(1_000_000, match="partNumber=2"))
    parts = TransferConfig(
        multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20, use_threads=False
    )
    stubborn.upload_fileobj(io.BytesIO(BIG), BUCKET, KEY["Key"], Config=parts)
    assert armed.fired == 1
    assert content(direct) == BIG


def test_a_lost_reply_means_it_was_done(client, direct, fault_proxy):
    fault_proxy.add(LoseReply())
    with pytest.raises(ConnectionClosedError):
        client.put_object(**KEY, Body=b"1")
    assert content(direct) == b"1"
    assert log(fault_proxy) == [("PUT", 200, "LoseReply")]


def test_a_conditional_write_retried_after_a_lost_reply_meets_itself(stubborn, direct, fault_proxy):
    fault_proxy.add(LoseReply())
    with refused("PreconditionFailed"):
        stubborn.put_object(**KEY, Body=b"mine", IfNoneMatch="*")
    assert content(direct) == b"mine"
    assert log(fault_proxy) == [("PUT", 200, "LoseReply"), ("PUT", 412, "")]


@pytest.mark.parametrize("after_bytes", [0, 1, 5_000_000, len(BIG) - 1, 10**9])
def test_a_cut_reply_is_noticed(client, direct, fault_proxy, after_bytes):
    direct.put_object(**KEY, Body=BIG)
    fault_proxy.add(CutReply(after_bytes))
    body = client.get_object(**KEY)["Body"]
    with contextlib.closing(body), pytest.raises((IncompleteReadError, ResponseStreamingError)):
        body.read()
    assert fault_proxy.requests[0].bytes_down == min(after_bytes, len(BIG) - 1)
    assert content(client) == BIG


@pytest.mark.parametrize("offset", [0, 1, 5_000_000, len(BIG) - 1, 10**9])
def test_a_corrupt_reply_differs_by_one_bit(s3_server, direct, fault_proxy, offset):
    direct.put_object(**KEY, Body=BIG)
    fault_proxy.add(CorruptReply(offset))
    unchecked = {"response_checksum_validation": "when_required"}
    with s3_client(s3_server, endpoint=fault_proxy.endpoint, **unchecked) as client:
        received = content(client)
    assert len(received) == len(BIG)
    flipped = int.from_bytes(received, "little") ^ int.from_bytes(BIG, "little")
    assert flipped.bit_count() == 1
    assert flipped.bit_length() == 8 * min(offset, len(BIG) - 1) + 1


def test_boto3_notices_a_corrupt_reply(client, direct, fault_proxy):
    direct.put_object(**KEY, Body=b"hello")
    fault_proxy.add(CorruptReply(2))
    with pytest.raises(FlexibleChecksumError):
        content(client)
    assert content(client) == b"hello"


def test_hold_keeps_a_request_until_it_is_released(client, direct, fault_proxy):
    held = fault_proxy.add(Hold(method="PUT"))
    put = InBackground(client.put_object, **KEY, Body=b"1")
    assert held.reached.wait(60)
    assert content(direct) is None
    held.release()
    put.outcome()
    assert content(direct) == b"1"


def test_hold_in_the_middle_of_an_upload(client, direct, fault_proxy):
    held = fault_proxy.add(Hold(at="upload", after_bytes=5_000_000))
    put = InBackground(client.put_object, **KEY, Body=BIG)
    assert held.reached.wait(60)
    assert fault_proxy.requests[0].bytes_up == 5_000_000
    assert content(direct) is None
    held.release()
    put.outcome()
    assert content(direct) == BIG


def test_hold_of_a_reply_means_it_was_done(client, direct, fault_proxy):
    held = fault_proxy.add(Hold(at="reply"))
    put = InBackground(client.put_object, **KEY, Body=b"1")
    assert held.reached.wait(60)
    assert content(direct) == b"1"
    assert put.is_alive()
    held.release()
    put.outcome()


@pytest.mark.parametrize("way", ["remove", "clear"])
def test_who_is_held_goes_on_when_the_fault_is_removed(client, fault_proxy, way):
    held = fault_proxy.add(Hold())
    put = InBackground(client.put_object, **KEY, Body=b"1")
    assert held.reached.wait(60)
    held.remove() if way == "remove" else fault_proxy.clear()
    put.outcome()


def test_leaving_ends_who_is_held(s3_server, direct):
    with contextlib.ExitStack() as stack:
        with FaultProxy(s3_server.endpoint) as proxy:
            held = proxy.add(Hold())
            client = stack.enter_context(s3_client(s3_server, endpoint=proxy.endpoint))
            put = InBackground(client.put_object, **KEY, Body=b"1")
            assert held.reached.wait(60)
        with pytest.raises(ConnectionClosedError):
            put.outcome()
        held.release()  # too late, and harmless
    assert content(direct) is None


def test_down_refuses_and_resets_until_it_is_up_again(client, direct, fault_proxy):
    held = fault_proxy.add(Hold())
    put = InBackground(client.put_object, **KEY, Body=b"1")
    assert held.reached.wait(60)
    fault_proxy.down = True
    with pytest.raises(ConnectionClosedError):
        put.outcome()
    for _ in range(2):
        with pytest.raises(EndpointConnectionError):
            client.put_object(**KEY, Body=b"1")
        fault_proxy.down = True
    assert content(direct) is None
    assert len(fault_proxy.requests) == 1
    fault_proxy.down = False
    client.put_object(**KEY, Body=b"1")
    assert content(direct) == b"1"


def test_a_dead_server_is_a_broken_connection():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with FaultProxy(f"http://127.0.0.1:{nobody.getsockname()[1]}") as proxy:
            connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", "/")
                with pytest.raises(ConnectionResetError):
                    connection.getresponse()


# --- A server that is not as polite as SeaweedFS


@contextlib.contextmanager
def scripted_server(script):
    """A server that takes one connection and runs `script(connection, file)` on it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection, connection.makefile("rwb") as file:
                script(connection, file)

        server = InBackground(serve)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.outcome()


def read_head(file):
    return list(iter(file.readline, b"\r\n"))


def exchange(proxy, request):
    """All that comes back for raw bytes, until the other side closes."""
    host, port = urlsplit(proxy.endpoint).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_chunks_and_trailers_pass_both_ways():
    received = []

    def script(_connection, file):
        received.append(read_head(file))
        received.append(read_head(file))  # up to the empty line behind the trailers
        file.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        file.write(b"2;note=x\r\nab\r\n1\r\nc\r\n0\r\nX-Sum: 2\r\n\r\n")

    with scripted_server(script) as upstream, FaultProxy(upstream) as proxy:
        reply = exchange(
            proxy,
            b"PUT /key HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
        )
        assert [(r.bytes_up, r.bytes_down) for r in proxy.requests] == [(5, 3)]
    head, body = received
    assert head[1] == b"Host: h\r\n"
    assert body == [b"5\r\n", b"hello\r\n", b"0\r\n", b"X-Sum: 1\r\n"]
    assert reply.endswith(b"\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\nX-Sum: 2\r\n\r\n")


def test_a_reply_that_ends_with_the_connection():
    def script(_connection, file):
        read_head(file)
        file.write(b"HTTP/1.1 200 OK\r\n\r\nhello")

    with scripted_server(script) as upstream, FaultProxy(upstream) as proxy:
        reply = exchange(proxy, b"GET /key HTTP/1.1\r\nHost: h\r\n\r\n")
    assert reply == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"


def test_an_answer_before_the_body_was_sent_closes_the_connection():
    def script(_connection, file):
        read_head(file)
        file.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        file.flush()
        with contextlib.suppress(ConnectionResetError):
            file.read()

    request = b"PUT /key HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n"
    with scripted_server(script) as upstream, FaultProxy(upstream) as proxy:
        host, port = urlsplit(proxy.endpoint).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(request + bytes(10))
            reply = b"".join(iter(lambda: connection.recv(65536), b""))
            assert reply.endswith(b"Connection: close\r\n\r\nno")
            connection.sendall(bytes(90))  # still welcome, so that no reset eats the reply


def test_a_cut_in_chunks_never_lets_the_last_one_through(bucket):
    received = []

    def script(_connection, file):
        read_head(file)
        with contextlib.suppress(ConnectionResetError):
            received.append(file.read())

    with scripted_server(script) as upstream, FaultProxy(upstream) as proxy:
        proxy.add(CutUpload(1000))
        with pytest.raises(ConnectionResetError):
            exchange(
                proxy,
                b"PUT /key HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"5\r\nhello\r\n0\r\n\r\n",
            )
    assert not any(b"0\r\n\r\n" in body for body in received)


def test_a_server_that_hangs_up_is_a_broken_connection():
    def script(_connection, file):
        read_head(file)

    with scripted_server(script) as upstream, FaultProxy(upstream) as proxy:
        with pytest.raises(ConnectionResetError):
            exchange(proxy, b"GET /key HTTP/1.1\r\nHost: h\r\n\r\n")
        assert log(proxy) == [("GET", None, "")]


def test_only_plain_http_can_be_looked_into():
    with pytest.raises(ValueError, match="only http://"):
        FaultProxy("https://s3.amazonaws.com")
