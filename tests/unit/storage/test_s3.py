"""S3Store on a real server: what goes wrong is told in words, and what can be survived is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.retryhandler
import pytest

from job.cloud.aws import client
from job.drill.proxy import (
    CorruptReply,
    CutReply,
    CutUpload,
    FaultProxy,
    Hold,
    LoseReply,
    Status,
    Throttle,
)
from job.errors import (
    AccessDenied,
    ConfigError,
    Corrupted,
    JobError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
)
from job.storage import ABSENT
from job.storage import s3 as s3_module
from job.storage.s3 import S3Store, make_client, split_uri
from tests.services import BUCKET, JOB

Operation = Callable[[S3Store, Path], Any]


def upload(store: S3Store, folder: Path) -> None:
    (folder / "source").write_bytes(b"content")
    store.upload(folder / "source", "key")


OPERATIONS: dict[str, Operation] = {
    "read": lambda store, folder: store.read("key"),
    "read_versioned": lambda store, folder: store.read_versioned("key"),
    "stat": lambda store, folder: store.stat("key"),
    "age_s": lambda store, folder: store.age_s("key"),
    "fetch": lambda store, folder: store.fetch("key", folder / "fetched"),
    "list": lambda store, folder: list(store.list("")),
    "write": lambda store, folder: store.write("key", b"content"),
    "create": lambda store, folder: store.write("key", b"content", expected=ABSENT),
    "replace": lambda store, folder: store.write("key", b"content", expected='"0"'),
    "upload": upload,
    "copy": lambda store, folder: store.copy("key", "target"),
    "delete": lambda store, folder: store.delete("key"),
}
READING = ("read", "read_versioned", "stat", "age_s", "fetch")
WRITING = ("write", "create", "replace", "upload")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries as many as ever, but at once."""
    monkeypatch.setattr(botocore.retryhandler, "delay_exponential", lambda *_, **__: 0.0)
    no_sleep = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
    monkeypatch.setattr(s3_module, "time", no_sleep)


@contextlib.contextmanager
def opened(uri: str) -> Iterator[S3Store]:
    store = S3Store(uri)
    with contextlib.closing(store.client):
        yield store


@pytest.fixture
def direct(s3_env: dict[str, str], bucket: str) -> Iterator[S3Store]:
    """The run past the proxy, as administrator: what the server really has."""
    with opened(f"s3://{bucket}/runs/x") as store:
        yield store


@pytest.fixture
def store(
    direct: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Store]:
    """The run through the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
    with opened(direct.uri) as through:
        yield through


def failure(name: str, store: S3Store, folder: Path) -> JobError:
    with pytest.raises(JobError) as caught:
        OPERATIONS[name](store, folder)
    return caught.value


def failures(store: S3Store, folder: Path) -> Iterator[JobError]:
    """How each operation fails; they are looked at one by one, so a traceback shows which."""
    for name in OPERATIONS:
        yield failure(name, store, folder)


# ---------------------------------------------------------------- who asks, and for what


def test_a_wrong_secret_is_the_users_error(direct, monkeypatch, tmp_path):
    direct.write("key", b"content")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with opened(direct.uri) as store:
        for error in failures(store, tmp_path):
            assert isinstance(error, ConfigError)
            assert error.exit_code == 78
            assert "SignatureDoesNotMatch" in error.message
            assert "AWS_SECRET_ACCESS_KEY" in error.mend
            assert "not-the-secret" not in str(error)


def test_an_unknown_key_is_the_users_error(direct, monkeypatch, tmp_path):
    direct.write("key", b"content")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with opened(direct.uri) as store:
        for error in failures(store, tmp_path):
            assert isinstance(error, ConfigError)
            assert "InvalidAccessKeyId" in error.message
            assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(error)


def test_no_credentials_at_all_are_the_users_error(direct, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with opened(direct.uri) as store:
        for error in failures(store, tmp_path):
            assert isinstance(error, ConfigError)
            assert error.exit_code == 78
            assert "no usable AWS credentials" in error.message
            assert "AWS_PROFILE" in error.mend


def test_a_missing_bucket_is_never_a_missing_object(s3_env, tmp_path):
    with opened("s3://no-such-bucket/runs/x") as store:
        for error in failures(store, tmp_path):
            assert isinstance(error, ConfigError)
            assert error.exit_code == 78
            assert error.message == "there is no bucket no-such-bucket"
            assert "aws s3 mb s3://no-such-bucket" in error.mend


def test_a_name_that_no_bucket_can_have_is_the_users_error(s3_env, tmp_path):
    with opened("s3://no bucket/runs/x") as store:
        for error in failures(store, tmp_path):
            assert isinstance(error, ConfigError)
            assert "no bucket cannot be a bucket's name" in error.message


def test_a_uri_without_a_bucket_is_the_users_error():
    for uri in ("s3://", "s3:///prefix"):
        with pytest.raises(ConfigError, match="names no bucket"):
            S3Store(uri)
    assert split_uri("s3://bucket") == ("bucket", "")
    assert split_uri("s3://bucket/a/b/") == ("bucket", "a/b")


def test_a_character_that_nobody_sees_is_refused():
    for uri in ("s3://bucket/a\nb", "s3://bucket/a\x00", "s3://bucket/a\u200bb"):
        with pytest.raises(ConfigError, match="not printed") as caught:
            split_uri(uri)
        assert str(caught.value).count("\n") == 1


def test_an_unusable_endpoint_is_the_users_error(s3_env, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        S3Store("s3://bucket/x")


def test_an_unknown_profile_is_the_users_error(s3_env, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(ConfigError, match="nobodys"):
        S3Store("s3://bucket/x")


@pytest.fixture
def as_job(direct, monkeypatch, s3_server) -> Iterator[Callable[[str], S3Store]]:
    """Opens stores as the job, which may read data/, own runs/ and nothing else."""
    for name, value in s3_server.environment(JOB).items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        yield lambda prefix: stack.enter_context(opened(f"s3://{BUCKET}/{prefix}"))


def test_an_identity_that_owns_its_prefix_can_do_everything_there(as_job, tmp_path):
    store = as_job("runs/first")
    version = store.write("key", b"content", expected=ABSENT)
    store.write("key", b"content", expected=version)
    store.write("target", b"content")
    store.copy("key", "target", expected=store.stat("target").version)
    for name, operation in OPERATIONS.items():
        if name not in ("create", "replace"):
            operation(store, tmp_path)


def test_an_identity_that_may_only_read_is_told_what_it_lacks(direct, as_job, tmp_path):
    store = as_job("data/x")
    direct.client.put_object(Bucket=BUCKET, Key="data/x/key", Body=b"content")
    assert store.read("key") == b"content"
    lacking = {**dict.fromkeys((*WRITING, "copy"), "s3:PutObject"), "delete": "s3:DeleteObject"}
    for name, permission in lacking.items():
        error = failure(name, store, tmp_path)
        assert isinstance(error, AccessDenied)
        assert error.exit_code == 74
        assert permission in error.mend
        assert f"s3://{BUCKET}/data/x" in error.message


def test_what_may_not_be_seen_is_denied_never_absent(as_job, tmp_path):
    store = as_job("elsewhere")
    for error in failures(store, tmp_path):
        assert isinstance(error, AccessDenied)
        assert "access denied" in error.message
    assert "s3:ListBucket" in failure("list", store, tmp_path).mend


def test_one_object_that_is_denied_is_not_absent(direct, store, fault_proxy, tmp_path):
    direct.write("key", b"content")
    fault_proxy.add(Status(403, match="/runs/x/key", times=None))
    for name in READING:
        error = failure(name, store, tmp_path)
        assert isinstance(error, AccessDenied)
        assert "s3:GetObject" in error.mend
        assert error.message.startswith(f"cannot read s3://{BUCKET}/runs/x/key")


def test_a_refusal_that_has_passed_by_the_second_look_is_no_refusal(direct, store, fault_proxy):
    direct.write("key", b"content")
    fault_proxy.add(Status(403, method="HEAD"))
    assert store.stat("key") == direct.stat("key")


def test_a_wrong_clock_is_said_to_be_the_clock(direct, store, fault_proxy, tmp_path):
    direct.write("key", b"content")
    fault_proxy.add(Status(403, code="RequestTimeTooSkewed", times=None))
    for error in failures(store, tmp_path):
        assert isinstance(error, StorageError)
        assert error.exit_code == 74
        assert "clock is wrong" in error.message


def test_expired_credentials_are_said_to_have_expired(direct, store, fault_proxy, tmp_path):
    direct.write("key", b"content")
    fault_proxy.add(Status(400, code="ExpiredToken", times=None))
    for error in failures(store, tmp_path):
        assert isinstance(error, StorageError)
        assert "expired" in error.message
        assert "renew" in error.mend


def test_a_bucket_elsewhere_is_said_to_be_elsewhere(store, fault_proxy, tmp_path):
    objects = re.compile("/runs/x|list-type")  # not the bucket, whose region botocore asks for
    fault_proxy.add(Status(301, code="PermanentRedirect", match=objects, times=None))
    for error in failures(store, tmp_path):
        assert isinstance(error, ConfigError)
        assert "another region" in error.message
        assert "AWS_REGION" in error.mend


# ---------------------------------------------------------------- the network


def test_an_endpoint_that_is_down_is_a_storage_error(store, fault_proxy, tmp_path):
    fault_proxy.down = True
    for error in failures(store, tmp_path):
        assert type(error) is StorageError
        assert error.exit_code == 74
        assert "AWS_ENDPOINT_URL" in error.mend


def test_while_nobody_answers_it_is_said_once_in_a_while(
    store, fault_proxy, tmp_path, monkeypatch, caplog
):
    fault_proxy.down = True
    for again_s, most in ((1000.0, 1), (0.0, 100)):
        monkeypatch.setattr(s3_module, "TELL_AGAIN_S", again_s)
        caplog.clear()
        with opened(store.uri) as fresh, pytest.raises(StorageError):
            fresh.read("x")
        said = [text for text in caplog.messages if text.startswith("S3 does not answer, trying")]
        assert 1 <= len(said) <= most
    assert len(said) == s3_module.ATTEMPTS - 1
    assert "trying again (1 of 6): " in said[0]


def test_an_endpoint_that_does_not_answer_is_a_storage_error(
    direct, fault_proxy, monkeypatch, tmp_path
):
    monkeypatch.setattr(s3_module, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr(s3_module, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
    with opened(direct.uri) as store:
        for name in set(OPERATIONS) - {"create", "replace"}:  # as "write", a second or two each
            hold = fault_proxy.add(Hold(times=None))
            error = failure(name, store, tmp_path)
            assert type(error) is StorageError
            assert "timeout" in error.message.lower() or "timed out" in error.message.lower()
            assert hold.fired <= 2, "tried as often as configured, and not again on top of that"
            hold.remove()


def test_the_network_comes_back(direct, store, fault_proxy):
    direct.write("key", b"content")
    assert store.read("key") == b"content"
    fault_proxy.down = True
    with pytest.raises(StorageError):
        store.read("key")
    fault_proxy.down = False
    assert store.read("key") == b"content"


@pytest.mark.parametrize("fault", [Status(503, times=5), Status(500, times=3)], ids=["503", "500"])
def test_bursts_of_server_errors_are_survived(direct, store, fault_proxy, tmp_path, fault):
    for name, operation in OPERATIONS.items():
        direct.delete("key")
        version = ABSENT if name == "create" else direct.write("key", b"before")
        armed = fault_proxy.add(fault)
        if name == "replace":
            store.write("key", b"content", expected=version)
        else:
            operation(store, tmp_path)
        assert armed.fired == fault.times
        if name in WRITING:
            assert direct.read("key") == b"content"


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_goes_on_failing_is_a_storage_error(
    direct, store, fault_proxy, tmp_path, status
):
    direct.write("key", b"before")
    for name in OPERATIONS:
        armed = fault_proxy.add(Status(status, times=None))
        error = failure(name, store, tmp_path)
        assert type(error) is StorageError
        assert error.exit_code == 74
        assert "busy or failing" in error.mend
        assert armed.fired == s3_module.ATTEMPTS, "a long outage uses no retries up"
        armed.remove()
    assert direct.read("key") == b"before"


def test_two_writes_at_the_same_moment_are_repeated(direct, store, fault_proxy):
    armed = fault_proxy.add(Status(409, method="PUT", times=3))
    version = store.write("key", b"1", expected=ABSENT)
    assert armed.fired == 3
    fault_proxy.add(Status(409, method="PUT", times=3))
    store.write("key", b"2", expected=version)
    direct.write("other", b"3")
    fault_proxy.add(Status(409, method="PUT", times=3))
    store.copy("other", "target", expected=ABSENT)
    assert direct.read("key") == b"2"
    assert direct.read("target") == b"3"


def test_a_conflict_without_end_is_a_storage_error(direct, store, fault_proxy):
    armed = fault_proxy.add(Status(409, method="PUT", times=None))
    with pytest.raises(StorageError, match="ConditionalRequestConflict") as caught:
        store.write("key", b"1", expected=ABSENT)
    assert not isinstance(caught.value, PreconditionFailed)
    assert armed.fired == s3_module.CONFLICT_ATTEMPTS


def test_a_write_whose_reply_was_lost_is_recognised(direct, store, fault_proxy):
    """It is repeated, and refused the second time, because the first one had arrived."""
    lost = fault_proxy.add(LoseReply(method="PUT"))
    first = store.write("key", b"1", expected=ABSENT)
    assert lost.fired == 1
    assert direct.read_versioned("key") == (b"1", first)
    lost = fault_proxy.add(LoseReply(method="PUT"))
    second = store.write("key", b"2", expected=first)
    assert lost.fired == 1
    assert direct.read_versioned("key") == (b"2", second)
    assert [exchange.status for exchange in fault_proxy.requests if exchange.method == "PUT"] == [
        200,
        412,
        200,
        412,
    ]


def test_a_write_that_arrived_and_was_overwritten_is_not_taken_for_ours(direct, store, fault_proxy):
    fault_proxy.add(LoseReply(method="PUT"))
    second_try = fault_proxy.add(Hold(method="PUT", skip=1))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(store.write, "key", b"ours", expected=ABSENT)
        assert second_try.reached.wait(60)
        assert direct.read("key") == b"ours"
        direct.write("key", b"theirs")
        second_try.release()
        with pytest.raises(PreconditionFailed, match="somebody else"):
            result.result()
    assert direct.read("key") == b"theirs"


def test_somebody_elses_write_is_never_taken_for_ours(direct, store, fault_proxy):
    """Ours does not arrive at all the first time; theirs does in between."""
    second_try = fault_proxy.add(Hold(method="PUT", skip=1))
    fault_proxy.add(CutUpload(1, method="PUT"))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(store.write, "key", b"ours", expected=ABSENT)
        assert second_try.reached.wait(60)
        direct.write("key", b"theirs")
        second_try.release()
        with pytest.raises(PreconditionFailed):
            result.result()


def test_a_copy_whose_reply_was_lost_is_there(direct, store, fault_proxy):
    direct.write("key", b"content")
    lost = fault_proxy.add(LoseReply(method="PUT"))
    store.copy("key", "target")
    assert lost.fired == 1
    fault_proxy.add(LoseReply(method="PUT"))
    with pytest.raises(PreconditionFailed):  # as documented: the caller looks again
        store.copy("key", "other", expected=ABSENT)
    assert direct.read("target") == direct.read("other") == b"content"


def test_a_delete_whose_reply_was_lost_is_done(direct, store, fault_proxy):
    direct.write("key", b"content")
    lost = fault_proxy.add(LoseReply(method="DELETE"))
    store.delete("key")
    assert lost.fired == 1
    assert direct.stat("key") is None


# ---------------------------------------------------------------- large and broken bodies


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """The smallest parts S3 allows, few at a time."""
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_module, "PART_THREADS", 2)
    return 5 * 2**20


def file_of(path: Path, size: int) -> str:
    """Write random bytes; returns their hash."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(0, size, 2**20):
            block = os.urandom(min(2**20, size - file.tell()))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_50_mb_go_both_ways_and_are_copied_in_bounded_memory(
    direct, small_parts, monkeypatch, tmp_path
):
    size = 50 * 2**20
    digest = file_of(tmp_path / "source", size)
    with opened(direct.uri) as store:
        store.stat("warm up")
        tracemalloc.start()
        try:
            store.upload(tmp_path / "source", "big")
            _, uploading = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            fetched = store.fetch("big", tmp_path / "fetched")
            _, fetching = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert hash_of(fetched) == digest
        assert store.stat("big").size == size
        assert uploading < size / 4
        # For a slow disk boto3 queues up to 100 pieces of 256 KiB, however large the object is.
        assert fetching < 100 * 2**18 + size / 4
        assert store.stat("big").version.strip('"').endswith("-10"), "it went in 10 parts"

        # A limit that makes it too large for one request, and parts of 6 MiB.
        monkeypatch.setattr(s3_module, "COPY_LIMIT_BYTES", 30 * 2**20)
        store.copy("big", "copied", expected=ABSENT)
        assert hash_of(store.fetch("copied", tmp_path / "fetched")) == digest
        with pytest.raises(PreconditionFailed):
            store.copy("big", "copied", expected=ABSENT)
        assert "Uploads" not in store.client.list_multipart_uploads(Bucket=BUCKET)


@pytest.mark.parametrize("size", [100_000, 12 * 2**20], ids=["in one", "in parts"])
class TestUploadsThatBreak:
    """Nothing half-written is ever visible."""

    @pytest.fixture
    def through(self, small_parts, store, monkeypatch) -> Iterator[S3Store]:
        with opened(store.uri) as again:  # with the small parts
            yield again

    def test_a_cut_is_repeated(self, direct, through, fault_proxy, tmp_path, size):
        digest = file_of(tmp_path / "source", size)
        cut = fault_proxy.add(CutUpload(50_000, method="PUT", times=2))
        through.upload(tmp_path / "source", "key")
        assert cut.fired == 2
        assert hash_of(direct.fetch("key", tmp_path / "fetched")) == digest

    def test_a_lost_reply_is_survived(self, direct, through, fault_proxy, tmp_path, size):
        digest = file_of(tmp_path / "source", size)
        lost = [
            fault_proxy.add(LoseReply(method="PUT", times=2)),
            fault_proxy.add(LoseReply(method="POST", match="uploadId")),
        ]
        through.upload(tmp_path / "source", "key")
        assert lost[0].fired == 2
        assert lost[1].fired == (1 if size > 2**20 else 0)
        assert hash_of(direct.fetch("key", tmp_path / "fetched")) == digest

    def test_cuts_without_end_leave_nothing(self, direct, through, fault_proxy, tmp_path, size):
        file_of(tmp_path / "source", size)
        fault_proxy.add(CutUpload(50_000, method="PUT", times=None))
        with pytest.raises(StorageError, match="runs/x/key") as caught:
            through.upload(tmp_path / "source", "key")
        assert caught.value.exit_code == 74
        assert direct.stat("key") is None
        assert list(direct.list("")) == []
        assert "Uploads" not in direct.client.list_multipart_uploads(Bucket=BUCKET)

    def test_half_an_upload_is_not_visible(self, direct, through, fault_proxy, tmp_path, size):
        digest = file_of(tmp_path / "source", size)
        hold = fault_proxy.add(Hold(at="upload", after_bytes=60_000, method="PUT"))
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(through.upload, tmp_path / "source", "key")
            assert hold.reached.wait(60)
            assert direct.stat("key") is None
            assert list(direct.list("")) == []
            hold.release()
            result.result()
        assert hash_of(direct.fetch("key", tmp_path / "fetched")) == digest


@pytest.fixture(params=["read", "fetch"])
def get(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[S3Store], bytes]:
    """Both ways to have the content of "key"."""
    if request.param == "read":
        return lambda store: store.read("key")
    return lambda store: store.fetch("key", tmp_path / "fetched").read_bytes()


CONTENT = bytes(range(256)) * 40


@pytest.mark.parametrize("fault", [CutReply(3000), CorruptReply(3000)], ids=["cut", "corrupted"])
def test_a_body_that_breaks_is_read_again(direct, store, fault_proxy, get, fault):
    direct.write("key", CONTENT)
    for times in (1, 2):
        armed = fault_proxy.add(dataclasses.replace(fault, method="GET", times=times))
        assert get(store) == CONTENT
        assert armed.fired == times


def test_a_body_that_always_breaks_off_is_an_error_with_its_key(
    direct, store, fault_proxy, get, tmp_path
):
    direct.write("key", CONTENT)
    fault_proxy.add(CutReply(3000, method="GET", times=None))
    with pytest.raises(StorageError, match=r"cannot read s3://.*/runs/x/key") as caught:
        get(store)
    assert type(caught.value) is StorageError
    assert list(tmp_path.glob("fetched/*")) == [], "half a file is no file"


def test_a_body_that_always_arrives_changed_is_corrupted(direct, store, fault_proxy, get, tmp_path):
    direct.write("key", CONTENT)
    fault_proxy.add(CorruptReply(3000, method="GET", times=None))
    with pytest.raises(Corrupted, match=r"s3://.*/runs/x/key: what arrives is not"):
        get(store)
    assert list(tmp_path.glob("fetched/*")) == []


def test_a_reply_that_breaks_off_in_a_listing_is_asked_for_again(direct, store, fault_proxy):
    direct.write("key", b"")
    cut = fault_proxy.add(CutReply(10, method="GET", match="list-type"))
    assert [info.key for info in store.list("")] == ["key"]
    assert cut.fired == 1


def test_20_kb_a_second_is_slow_but_enough(direct, store, fault_proxy, tmp_path):
    fault_proxy.add(Throttle(20_000, times=None))
    store.write("key", CONTENT * 2, expected=ABSENT)
    assert store.fetch("key", tmp_path).read_bytes() == CONTENT * 2


def test_a_full_disk_is_said_to_be_full(direct, monkeypatch, tmp_path):
    direct.write("key", CONTENT)
    with pytest.raises(StorageError) as caught:
        direct.fetch("key", Path("/dev/full"))
    assert caught.value.exit_code == 74
    assert "key" in caught.value.message


def test_one_store_serves_many_threads(direct):
    """The lease, the ledger and the publisher share one."""
    problems: list[BaseException] = []

    def use(name: int) -> None:
        try:
            version = ABSENT
            for turn in range(10):
                content = f"{name} {turn}".encode()
                version = direct.write(f"thread/{name}", content, expected=version)
                assert direct.read_versioned(f"thread/{name}") == (content, version)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=use, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(list(direct.list("thread/"))) == 6


def test_not_there_is_not_there(store, tmp_path):
    assert store.stat("key") is None
    assert store.read_versioned("key") == (b"", ABSENT)
    for name in ("read", "age_s", "fetch", "copy"):
        assert type(failure(name, store, tmp_path)) is ObjectNotFound
    assert type(failure("replace", store, tmp_path)) is PreconditionFailed


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({"AWS_REGION": "eu-west-1"}, "eu-west-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-1"),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
    ],
)
def test_the_region_is_where_awss_other_tools_take_it(
    s3_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    region: str,
) -> None:
    """A container of AWS Batch is given AWS_REGION alone, of which boto3 knows nothing."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert make_client().meta.region_name == region
    assert client("batch").meta.region_name == region
