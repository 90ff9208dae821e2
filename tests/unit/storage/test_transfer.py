"""Large objects, whatever they were uploaded as; and the checksums everything rests on."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from job.drill.proxy import CorruptReply, CutReply, Status
from job.errors import StorageError
from job.storage import get, large, open_store
from job.storage.digests import Promise, combine_crc32, md5_promise, promise_of
from job.storage.get import ObjectChanged
from job.storage.progress import ConsoleProgress
from job.storage.sync import S3Source
from job.storage.transfer import SPAN_GAP_BYTES, SPAN_MEMBERS, spans, transfer
from job.storage.units import CHUNK_BYTES, Arrived, Member, Whole, part_of
from tests.services import s3_client
from tests.unit.storage.conftest import Remote, tree

PART = 5 * 2**20
SIZE = 3 * PART + 77


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(os.urandom(SIZE))
    return path


def fetch(remote: Remote, key: str, folder: Path, **options: Any) -> Arrived:
    source = S3Source(open_store(remote.uri(key.rpartition("/")[0])))  # type: ignore[arg-type]
    units = [
        Whole(item.key, item.size, item.etag, item.path)
        for item in source.listing()
        if item.key == key
    ]
    arrived: list[Arrived] = []
    transfer(source.origin, units, folder, arrived=arrived.extend, **options)
    return arrived[0]


def put_plain(remote: Remote, server: Any, content: Path) -> None:
    """One piece without a checksum: only the ETag says what it is."""
    with s3_client(server, request_checksum_calculation="when_required") as client:
        client.put_object(Bucket=remote.bucket, Key="data/x", Body=content.read_bytes())


def put_with_crc32(remote: Remote, server: Any, content: Path) -> None:
    remote.put("data/x", content.read_bytes())


def put_with_sha256(remote: Remote, server: Any, content: Path) -> None:
    remote.put("data/x", content.read_bytes(), ChecksumAlgorithm="SHA256")


def put_in_parts(remote: Remote, server: Any, content: Path) -> None:
    remote.put_in_parts("data/x", content, PART)


def put_in_plain_parts(remote: Remote, server: Any, content: Path) -> None:
    with s3_client(server, request_checksum_calculation="when_required") as client:
        Remote(client, remote.bucket, remote.proxy).put_in_parts("data/x", content, PART)


KINDS = [
    (put_plain, "etag"),
    (put_with_crc32, "crc32"),
    (put_with_sha256, "sha256"),
    (put_in_parts, "crc32"),
    (put_in_plain_parts, "etag"),
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "CHUNK_BYTES", PART)
    monkeypatch.setattr("job.storage.units.CHUNK_BYTES", PART)


@pytest.mark.parametrize(("put", "verified"), KINDS)
def test_a_large_object_is_verified_however_it_was_stored(
    remote: Remote,
    s3_server: Any,
    content: Path,
    tmp_path: Path,
    put: Callable[..., None],
    verified: str,
) -> None:
    put(remote, s3_server, content)
    # Broken off, then wrong at the first try: fetched again, then right.
    remote.proxy.add(CutReply(PART // 2, method="GET", match="data/x"))
    flipped = remote.proxy.add(CorruptReply(PART // 2, method="GET", match="data/x"))
    arrived = fetch(remote, "data/x", tmp_path / "to")

    assert tree(tmp_path / "to") == {"x": content.read_bytes()}
    assert flipped.fired == 1
    assert arrived.verified == verified
    assert arrived.check == f"crc32:{zlib.crc32(content.read_bytes()):08x}"


def test_a_large_object_that_never_verifies_is_named(
    remote: Remote, content: Path, tmp_path: Path
) -> None:
    remote.put_in_parts("data/x", content, PART)
    remote.proxy.add(CorruptReply(9, method="GET", match="partNumber=2", times=None))
    with pytest.raises(StorageError, match=r"data/x: .*4 times in a row"):
        fetch(remote, "data/x", tmp_path / "to")
    assert "x" not in tree(tmp_path / "to")


def test_only_missing_parts_are_fetched(remote: Remote, content: Path, tmp_path: Path) -> None:
    remote.put_in_parts("data/x", content, PART)
    denied = remote.proxy.add(Status(403, method="GET", match="partNumber=3", times=None))
    with pytest.raises(StorageError, match="access denied"):
        fetch(remote, "data/x", tmp_path / "to")
    denied.remove()
    done = len(part_of(tmp_path / "to" / "x", large.JOURNAL).read_text().splitlines()) - 1
    remote.proxy.forget()

    fetch(remote, "data/x", tmp_path / "to")
    assert tree(tmp_path / "to") == {"x": content.read_bytes()}
    assert len(remote.gets) == 4 - done


def test_parts_of_another_object_are_not_mixed_in(
    remote: Remote, content: Path, tmp_path: Path
) -> None:
    remote.put_in_parts("data/x", content, PART)
    denied = remote.proxy.add(Status(403, method="GET", match="partNumber=3", times=None))
    with pytest.raises(StorageError):
        fetch(remote, "data/x", tmp_path / "to")
    denied.remove()
    content.write_bytes(os.urandom(SIZE))
    remote.put_in_parts("data/x", content, PART)

    fetch(remote, "data/x", tmp_path / "to")
    assert tree(tmp_path / "to") == {"x": content.read_bytes()}


def test_worker_processes_do_the_same(remote: Remote, tmp_path: Path) -> None:
    objects = {f"{index:02d}": os.urandom(index * 100) for index in range(40)}
    remote.put_all(objects)
    remote.proxy.add(CorruptReply(50, match="data/09", times=2))
    source = S3Source(open_store(remote.uri()))  # type: ignore[arg-type]
    units = [Whole(i.key, i.size, i.etag, i.path) for i in source.listing()]
    arrived: list[Arrived] = []
    transfer(source.origin, units, tmp_path / "to", arrived=arrived.extend, processes=2)
    assert tree(tmp_path / "to") == objects
    assert sorted(file.path for file in arrived) == sorted(objects)

    remote.put("data/07", b"changed")
    with pytest.raises(ObjectChanged, match="data/07"):
        transfer(source.origin, units, tmp_path / "again", arrived=arrived.extend, processes=2)
    remote.proxy.add(Status(403, method="GET", match="data/05", times=None))
    with pytest.raises(StorageError, match=r"data/05: access denied"):
        transfer(source.origin, units[:6], tmp_path / "more", arrived=arrived.extend, processes=1)


def test_without_the_lean_path_all_still_comes(
    remote: Remote, content: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.storage.sync.find_route", lambda *_: None)
    remote.put_all({"small": b"small", "k/ü ?": b"odd"})
    remote.put_in_parts("data/x", content, PART)
    for key, data in {"data/small": b"small", "data/x": content.read_bytes()}.items():
        fetch(remote, key, tmp_path)
        assert (tmp_path / key.removeprefix("data/")).read_bytes() == data


@pytest.mark.parametrize(
    ("endpoint", "style", "netloc", "prefix"),
    [
        ("", "auto", "a-bucket.s3.eu-west-1.amazonaws.com", ""),
        ("", "path", "s3.eu-west-1.amazonaws.com", "/a-bucket"),
        ("http://127.0.0.1:9000", "auto", "127.0.0.1:9000", "/a-bucket"),
        ("https://s3.example.com", "virtual", "a-bucket.s3.example.com", ""),
    ],
)
def test_the_route_is_boto3s(
    s3_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    style: str,
    netloc: str,
    prefix: str,
) -> None:
    from job.storage.s3 import make_client

    monkeypatch.delenv("AWS_ENDPOINT_URL")
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "eu-west-1")
    route = get.find_route(make_client(s3={"addressing_style": style}), "a-bucket")
    assert route is not None
    assert (route.netloc, route.prefix, route.region) == (netloc, prefix, "eu-west-1")
    assert route.secure == (not endpoint.startswith("http://"))


def test_a_proxy_turns_the_lean_path_off(
    s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.storage.s3 import make_client

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example.com")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example.com:3128")
    assert get.find_route(make_client(), "a-bucket") is None


def test_a_temporary_credentials_token_is_signed() -> None:
    route = get.Route(False, "h", "h", 80, "/b", "r", "e3b0", "")
    head = get._signed_head(route, get.Credentials("a", "s", "tok"), "k", '"e"', None, 0).decode()
    assert "x-amz-security-token: tok\r\n" in head
    assert "x-amz-date;x-amz-security-token, " in head
    assert "s3cret" not in repr(get.Credentials("a", "s3cret", None))


def test_crc32_of_pieces_combine() -> None:
    a, b = os.urandom(1000), os.urandom(777)
    assert combine_crc32(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
    assert combine_crc32(zlib.crc32(a), zlib.crc32(b""), 0) == zlib.crc32(a)


def test_promises() -> None:
    md5 = hashlib.md5(b"x", usedforsecurity=False)
    etag = f'"{md5.hexdigest()}"'
    assert promise_of({}, etag) == Promise("md5", md5.digest())
    assert promise_of({"x-amz-checksum-crc32": "AAAAAA==-2"}, etag) == Promise("crc32", bytes(4), 2)
    assert promise_of({"x-amz-checksum-crc32": "?"}, etag) == Promise("md5", md5.digest())
    assert promise_of({"x-amz-server-side-encryption": "aws:kms"}, etag) is None
    assert promise_of({"x-amz-server-side-encryption-customer-algorithm": "AES256"}, etag) is None
    assert md5_promise('"not an md5"') is None


def test_spans_join_neighbours_only() -> None:
    def member(offset: int, size: int = 10) -> Member:
        return Member(str(offset), size, offset, "")

    near = [member(0), member(512), member(1024)]
    far = [member(2000 + SPAN_GAP_BYTES)]
    assert [len(span.members) for span in spans("s", "e", near + far)] == [3, 1]
    many = [member(index * 512) for index in range(SPAN_MEMBERS + 1)]
    assert [len(span.members) for span in spans("s", "e", many)] == [SPAN_MEMBERS, 1]
    long = [member(0, CHUNK_BYTES), member(CHUNK_BYTES + 512)]
    assert [span.length for span in spans("s", "e", long)] == [CHUNK_BYTES, 10]


@pytest.mark.parametrize(
    ("size", "line"),
    [
        (10_000_000, "data: 2 of 10 files, 20 MB of 100 MB, 2.0 MB/s, 40 s left\n"),
        (0, "data: 2 of 10 files, 0.2 a second, 40 s left\n"),
    ],
)
def test_progress_off_a_terminal_is_a_line_now_and_then(size: int, line: str) -> None:
    out, now = io.StringIO(), [0.0]
    progress = ConsoleProgress(Console(file=out), clock=lambda: now[0])
    progress.begin("data", 10, 10 * size)
    progress.advance(1, size)
    now[0] = 10.0
    progress.advance(1, size)
    progress.advance(1, size)
    progress.end()
    assert out.getvalue() == line


@pytest.mark.parametrize("size", [10_000_000, 0])
def test_progress_on_a_terminal_is_a_bar(size: int) -> None:
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=True, width=120, _environ={})
    progress = ConsoleProgress(console, clock=lambda: now[0])
    progress.begin("data", 10, 10 * size)
    progress.advance(4, 4 * size)
    progress.end()
    assert "4 of 10 files" in out.getvalue()
    assert ("MB" in out.getvalue()) == bool(size)
