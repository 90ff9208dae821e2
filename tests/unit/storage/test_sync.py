"""Data comes to the disk whole and verified, or not at all; and only what is not there yet."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job import heartbeat
from job.drill.proxy import CorruptReply, CutReply, Hold, Latency, Status, Throttle
from job.errors import AccessDenied, ConfigError, DataError, ExitCode, Preempted, StorageError
from job.storage import cache, sync
from job.storage.held import DECODED
from job.storage.s3 import S3Store
from job.storage.sync import data_folder
from tests.services import s3_client, wait_until
from tests.unit.storage.conftest import Remote, tree

FILES = {
    "dataset.yaml": b"classes: [a, b]",
    "train/images/one.png": os.urandom(3000),
    "train/images/two.png": os.urandom(70_000),
    "train/masks/one.png": b"",
    "val/images/three.png": os.urandom(10),
}


@pytest.fixture(autouse=True)
def _fresh(scratch: Path) -> None:
    pass


class Log:
    """A `TransferProgress` that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.files = self.size = self.files_done = self.size_done = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, what: str, files: int, size: int) -> None:
        self.files, self.size = files, size

    def advance(self, files: int, size: int) -> None:
        self.files_done += files
        self.size_done += size

    def end(self) -> None:
        pass


def bring(remote: Remote, prefix: str = "data", **options: Any) -> dict[str, bytes]:
    with data_folder(remote.uri(prefix), **options) as folder:
        return tree(folder)


def test_a_folder_is_used_where_it_lies(tmp_path: Path, scratch: Path) -> None:
    with data_folder(str(tmp_path)) as folder:
        assert folder == tmp_path
    assert not scratch.exists()


def test_a_prefix_is_mirrored(remote: Remote) -> None:
    remote.put_all(FILES)
    remote.put("data/train/", b"")  # what consoles make for a folder
    remote.put("database/other", b"no")
    log = Log()

    assert bring(remote, progress=log) == FILES
    assert (log.files, log.size) == (5, sum(map(len, FILES.values())))
    assert (log.files_done, log.size_done) == (log.files, log.size)


def test_an_error_in_the_data_names_the_original(remote: Remote) -> None:
    remote.put_all(FILES)

    def read(folder: Path) -> None:
        raise DataError(f"{folder}/dataset.yaml: wrong", mend=f"edit {folder}/dataset.yaml")

    with pytest.raises(DataError) as caught, data_folder(remote.uri("data/")) as folder:
        read(folder)
    original = remote.uri("data/dataset.yaml")
    assert str(caught.value) == f"{original}: wrong\n  mend: edit {original}"


def test_an_unchanged_set_is_only_listed(remote: Remote) -> None:
    remote.put_all(FILES)
    bring(remote)
    remote.proxy.forget()
    log = Log()

    assert bring(remote, progress=log) == FILES
    assert {exchange.query.partition("&")[0] for exchange in remote.proxy.requests} == {
        "list-type=2"
    }
    assert "unchanged" in log.said[-1]


def test_only_what_changed_is_fetched(remote: Remote) -> None:
    remote.put_all(FILES)
    bring(remote)
    remote.put("data/train/images/one.png", b"other")
    remote.put("data/train/images/new.png", b"new")
    remote.delete("data/val/images/three.png")
    remote.proxy.forget()

    expected = {**FILES, "train/images/one.png": b"other", "train/images/new.png": b"new"}
    del expected["val/images/three.png"]
    assert bring(remote) == expected
    assert remote.keys_read == ["data/train/images/new.png", "data/train/images/one.png"]


def test_a_reader_keeps_its_set_while_a_newer_one_comes(remote: Remote) -> None:
    remote.put_all(FILES)
    with data_folder(remote.uri()) as old:
        remote.put("data/dataset.yaml", b"newer")
        with data_folder(remote.uri()) as new:
            assert new != old
            assert (new / "dataset.yaml").read_bytes() == b"newer"
        assert tree(old) == FILES
    assert bring(remote)["dataset.yaml"] == b"newer"
    assert not old.exists()  # now nobody reads it


def test_a_file_damaged_on_the_disk_is_fetched_again(remote: Remote) -> None:
    remote.put_all(FILES)
    with data_folder(remote.uri()) as folder:
        path = folder / "train/images/one.png"
        path.chmod(0o644)
        path.write_bytes(b"edited")
        (folder / "dataset.yaml").unlink()
    remote.proxy.forget()

    assert bring(remote) == FILES
    assert remote.keys_read == ["data/dataset.yaml", "data/train/images/one.png"]


def test_after_a_restart_of_the_machine_contents_are_compared(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put_all(FILES)
    with data_folder(remote.uri()) as folder:
        path = folder / "train/images/one.png"
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(bytes(before.st_size))  # as after a power cut: right in size and time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(cache, "boot_id", lambda: "another")
    remote.proxy.forget()

    assert bring(remote) == FILES
    assert remote.keys_read == ["data/train/images/one.png"]


KILLED = """
import os, signal, sys
from job.storage import sync, transfer
from job.storage.cache import DataCache
record, count = DataCache.record, 0
def record_then_die(cache, entries):
    global count
    # No more than half, even if a slow machine records everything at once.
    entries = list(entries)[:int(sys.argv[2]) - count]
    record(cache, entries)
    count += len(entries)
    if count >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
DataCache.record = record_then_die
transfer.PROCESSES_FROM = int(sys.argv[3])
with sync.data_folder(sys.argv[1]):
    pass
"""


@pytest.mark.parametrize("workers", [False, True])
def test_a_killed_process_has_not_worked_in_vain(
    remote: Remote, scratch: Path, workers: bool
) -> None:
    count = 120
    objects = {f"{index:03d}": b"%d" % index * 50 for index in range(count)}
    remote.put_all(objects)
    arguments = [remote.uri(), str(count // 2), "1" if workers else "1000"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert not list(scratch.rglob("sets/*"))
    remote.proxy.forget()

    assert bring(remote) == objects
    # Less, even none, where the workers were ahead of the records: they verify without one.
    assert len(remote.keys_read) <= count - count // 2


def test_what_an_interrupted_transfer_has_brought_needs_no_room_again(
    remote: Remote, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("units", "large"):
        monkeypatch.setattr(f"job.storage.{module}.CHUNK_BYTES", 2**20)
    remote.put("data/large.bin", os.urandom(8 * 2**20))
    held = remote.proxy.add(Hold(method="GET", match="large.bin", skip=6, times=None))

    def six_are_there() -> bool:
        journals = scratch.rglob("*.part.json")
        return any(len(journal.read_text().splitlines()) == 7 for journal in journals)

    with pytest.raises(Preempted):
        bring(remote, stopped=six_are_there)
    held.release()
    usage = shutil.disk_usage(scratch)._replace(free=4 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    remote.proxy.forget()
    assert set(bring(remote)) == {"large.bin"}
    assert len(remote.gets) == 2


def test_two_processes_share_the_work(remote: Remote) -> None:
    remote.put_all(FILES)
    held = remote.proxy.add(Hold(match="one.png", times=None))
    results: list[dict[str, bytes]] = []
    logs = [Log(), Log()]
    threads = [
        threading.Thread(target=lambda log=log: results.append(bring(remote, progress=log)))
        for log in logs
    ]
    threads[0].start()
    assert held.reached.wait(30)
    threads[1].start()
    wait_until(lambda: any("waiting for another process" in text for text in logs[1].said))
    before = heartbeat._beats
    wait_until(lambda: heartbeat._beats > before)  # to wait for who is at work is no stall
    held.release()
    for thread in threads:
        thread.join(30)

    assert results == [FILES, FILES]
    assert [log.files for log in logs] == [len(FILES), 0]


def test_one_that_waits_can_be_stopped(remote: Remote) -> None:
    remote.put_all(FILES)
    held = remote.proxy.add(Hold(match="one.png", times=None))
    first = threading.Thread(target=lambda: bring(remote))
    first.start()
    assert held.reached.wait(30)
    with pytest.raises(Preempted):
        bring(remote, stopped=lambda: True)
    held.release()
    first.join(30)


def test_a_stop_ends_a_transfer_that_hangs(remote: Remote) -> None:
    remote.put_all(FILES)
    held = remote.proxy.add(Hold(match="one.png", at="reply"))
    with pytest.raises(Preempted):
        bring(remote, stopped=held.reached.is_set)
    held.release()
    remote.proxy.forget()

    assert bring(remote) == FILES


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_change_while_fetching_is_seen(remote: Remote, change: str) -> None:
    remote.put_all(FILES)
    held = remote.proxy.add(Hold(match="two.png", times=None))
    results: list[dict[str, bytes]] = []
    thread = threading.Thread(target=lambda: results.append(bring(remote)))
    thread.start()
    assert held.reached.wait(30)
    expected = dict(FILES)
    if change == "replaced":
        expected["train/images/two.png"] = b"changed"
        remote.put("data/train/images/two.png", b"changed")
    else:
        remote.delete("data/" + "train/images/two.png")
        del expected["train/images/two.png"]
    held.release()
    thread.join(60)

    assert results == [expected]


def test_what_changes_all_the_time_is_an_error(remote: Remote) -> None:
    remote.put_all(FILES)
    remote.proxy.add(Status(412, method="GET", match="one.png", times=None))
    with pytest.raises(StorageError, match="change all the time"):
        bring(remote)


def test_a_flipped_bit_is_fetched_again(remote: Remote) -> None:
    remote.put_all(FILES)
    flipped = remote.proxy.add(CorruptReply(5000, match="two.png", times=2))
    assert bring(remote) == FILES
    assert flipped.fired == 2


def test_an_object_that_never_verifies_is_named(remote: Remote, scratch: Path) -> None:
    remote.put_all(FILES)
    remote.proxy.add(CorruptReply(5000, match="two.png", times=None))
    with pytest.raises(StorageError, match=r"train/images/two\.png.*4 times"):
        bring(remote)
    assert not list(scratch.rglob("two.png"))
    assert not list(scratch.rglob("sets/*"))


def test_objects_without_checksum_are_verified_by_their_etag(
    remote: Remote, s3_server: Any
) -> None:
    with s3_client(s3_server, request_checksum_calculation="when_required") as client:
        client.put_object(Bucket=remote.bucket, Key="data/a", Body=b"x" * 100)
    flipped = remote.proxy.add(CorruptReply(50, match="data/a"))
    assert bring(remote) == {"a": b"x" * 100}
    assert flipped.fired == 1


def test_broken_and_busy_replies_are_asked_for_again(remote: Remote) -> None:
    remote.put_all(FILES)
    remote.proxy.add(CutReply(1000, match="two.png", times=2))
    busy = remote.proxy.add(Status(503, method="GET", match="/data/", times=4))
    slow = remote.proxy.add(Latency(0.05, method="GET", match="/data/", times=None))
    assert bring(remote) == FILES
    assert busy.fired == 4
    assert slow.fired > 4


def test_a_slow_network_is_borne(remote: Remote) -> None:
    remote.put_all(FILES)
    remote.proxy.add(Throttle(100_000, match="one.png", times=None))
    assert bring(remote) == FILES


def test_a_forbidden_object_is_named(remote: Remote) -> None:
    remote.put_all(FILES)
    remote.proxy.add(Status(403, method="GET", match="one.png", times=None))
    with pytest.raises(AccessDenied, match=r"one\.png: access denied(?s:.*)s3:GetObject"):
        bring(remote)


def test_a_missing_bucket_is_named(remote: Remote) -> None:
    with pytest.raises(ConfigError, match="there is no bucket s4gan-nowhere"):
        data_folder("s3://s4gan-nowhere/data").__enter__()


def test_an_empty_prefix_is_named(remote: Remote) -> None:
    remote.put("other/a", b"a")
    with pytest.raises(DataError, match=r"s3://.*/data: holds no objects") as caught:
        bring(remote)
    assert caught.value.exit_code is ExitCode.BAD_CONFIG


def test_keys_of_all_kinds_become_files(remote: Remote) -> None:
    names = [
        "a b",
        "a+b",
        "100%",
        "%41",
        "ümläut-日本",
        "what?",
        "a&b=c",
        "#1",
        "it's",
        "~x",
        "[1]",
    ]
    objects = {f"k/{name}": name.encode() for name in names}
    remote.put_all(objects)
    assert bring(remote) == objects
    assert all(not exchange.fault and exchange.status == 200 for exchange in remote.gets)
    assert len(remote.gets) == len(names)  # each at the first try, by the lean path


@pytest.mark.parametrize("key", ["a//b", "./a", "x" * 256])
def test_keys_that_cannot_be_files_are_named(key: str) -> None:
    with pytest.raises(DataError, match="rename or remove"):
        sync.check_path(key, key)


def test_an_object_that_is_also_a_folder_is_named(remote: Remote) -> None:
    remote.put_all({"a": b"1", "a/b": b"2"})
    with pytest.raises(DataError, match="a is an object and also the folder of a/b"):
        bring(remote)


def test_space_is_checked_before(
    remote: Remote, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put_all(FILES)
    little = shutil._ntuple_diskusage(100_000, 99_000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(sync.shutil, "disk_usage", lambda _: little)
    with pytest.raises(StorageError, match=r"needs 76.7 kB in .*1.0 kB are free") as caught:
        bring(remote)
    assert "S4GAN_SCRATCH" in caught.value.mend
    assert remote.gets == []


def test_what_a_killed_run_left_decoded_makes_room(
    remote: Remote, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put_all(FILES)
    leftover = sync.scratch_root() / DECODED / "0123456789ab"
    leftover.mkdir(parents=True)
    (leftover / "00ff").write_bytes(bytes(100_000))

    def usage(_: object) -> object:
        free = 1000 if leftover.exists() else 101_000
        return shutil._ntuple_diskusage(102_000, 102_000 - free, free)  # type: ignore[attr-defined]

    monkeypatch.setattr(sync.shutil, "disk_usage", usage)
    bring(remote)
    assert not leftover.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which only root may")
def test_a_disk_that_fills_up_keeps_what_was_fetched(
    remote: Remote, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {f"{index:02d}": os.urandom(50_000) for index in range(30)}
    remote.put_all(objects)
    scratch.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scratch)])
    if mounted.returncode:
        pytest.skip("mounting is not possible here")
    try:
        monkeypatch.setattr(sync._Bringer, "_check_space", lambda *_: None)
        with pytest.raises(StorageError, match=r"cannot write .*scratch.*No space left") as caught:
            bring(remote)
        assert caught.value.exit_code is ExitCode.IO_ERROR
        subprocess.run(["mount", "-o", "remount,size=8m", str(scratch)], check=True)
        remote.proxy.forget()
        assert bring(remote) == objects
        assert 0 < len(remote.keys_read) < len(objects)
    finally:
        subprocess.run(["umount", "-l", str(scratch)], check=True)


# ---------------------------------------------------------------- archives


def tar_of(objects: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in objects.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(objects: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in objects.items():
            file.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("set.tar", tar_of),
        ("set.tgz", lambda objects: tar_of(objects, "w:gz")),
        ("set.zip", zip_of),
    ],
)
def test_an_archive_is_unpacked(
    remote: Remote, name: str, make: Callable[[dict[str, bytes]], bytes]
) -> None:
    inside = {f"my-set/{path}": data for path, data in FILES.items()}
    remote.put(f"data/{name}", make(inside))
    assert bring(remote) == FILES
    assert bring(remote, f"data/{name}") == FILES
    remote.put("data/extra.png", b"extra")
    remote.proxy.forget()

    assert bring(remote) == {**FILES, "extra.png": b"extra"}
    assert remote.keys_read == ["data/extra.png"]


def test_an_archive_in_a_folder_is_unpacked_there(remote: Remote) -> None:
    remote.put_all({"dataset.yaml": b"d", "train/images.tar": tar_of({"./images/a.png": b"a"})})
    assert bring(remote) == {"dataset.yaml": b"d", "train/images/a.png": b"a"}


def test_archives_of_one_data_set_make_one_tree(remote: Remote) -> None:
    """Those of Cityscapes each have a README and a licence."""
    wanted = {}
    for part, ending in (("leftImg8bit", "_leftImg8bit"), ("gtFine", "_gtFine_labelIds")):
        inside = {f"{part}/train/aachen/a{ending}.png": part.encode()}
        texts = {"README": f"of {part}".encode(), "license.txt": b"the same"}
        remote.put(f"data/{part}_trainvaltest.zip", zip_of({**texts, **inside}))
        wanted |= inside
    remote.put("data/README", b"loose")
    assert bring(remote) == {**wanted, "README": b"loose"}
    remote.put("data/gtFine_more.zip", zip_of(inside))
    with pytest.raises(DataError, match=r"gtFine_more\.zip: gtFine/train.* comes twice"):
        bring(remote)


def hostile_tar(**fields: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("x")
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tar_of({"../out": b"x"}), "leads out"),
        (tar_of({"/etc/out": b"x"}), "leads out"),
        (tar_of({"a/../../out": b"x"}), "leads out"),
        (hostile_tar(type=tarfile.SYMTYPE, linkname="/etc"), "x is a link"),
        (hostile_tar(type=tarfile.LNKTYPE, linkname="../a"), "x is a link"),
        (hostile_tar(type=tarfile.CHRTYPE), "x is a device"),
        (tar_of({"a": b"x", "a/b": b"x"}), "is a file and a folder"),
        (tar_of({"a": b"x" * 5000})[:2000], "is damaged"),
        (b"no archive at all", "is damaged"),
    ],
)
def test_a_hostile_or_damaged_archive_is_refused(
    remote: Remote, scratch: Path, content: bytes, said: str
) -> None:
    remote.put("data/set.tar", content)
    with pytest.raises(DataError, match=f"(?s)/data/set.tar: .*{said}"):
        bring(remote)
    assert not list(scratch.rglob("out"))
    assert not list(scratch.rglob("sets/*"))


def test_a_zip_made_on_a_mac_is_the_data(remote: Remote) -> None:
    top = {f"scenes/{name}": data for name, data in FILES.items()}
    remote.put("data/set.zip", zip_of(top | {"__MACOSX/scenes/._dataset.yaml": b"resource fork"}))
    assert bring(remote) == FILES


def test_a_hostile_or_damaged_zip_is_refused(remote: Remote) -> None:
    remote.put("data/set.zip", zip_of({"../out": b"x"}))
    with pytest.raises(DataError, match="leads out"):
        bring(remote)
    good = zip_of({"a": os.urandom(5000)})
    remote.put("data/set.zip", good[:1000] + bytes(100) + good[1100:])
    with pytest.raises(DataError, match="is damaged"):
        bring(remote)


def test_an_archive_and_an_object_of_one_name_are_refused(remote: Remote) -> None:
    remote.put_all({"a.png": b"1", "set.tar": tar_of({"a.png": b"2"})})
    with pytest.raises(DataError, match=r"a\.png comes twice"):
        bring(remote)


# ---------------------------------------------------------------- many objects

ODD = ["a b.png", "a&b<c>\"d'.png", "a+b%20c.png", "&amp;.png", "\u00e9\u4e16.png", "]]>.png"]


def test_a_list_is_what_boto3_reads(remote: Remote) -> None:
    remote.put_all({name: bytes(number) for number, name in enumerate(ODD)})
    reply = remote.client.list_objects_v2(Bucket=remote.bucket, Prefix="data/")
    expected = [
        sync.Listed(item["Key"].removeprefix("data/"), item["Key"], item["Size"], item["ETag"])
        for item in reply["Contents"]
    ]
    source = sync.S3Source(S3Store(remote.uri()))
    assert source.listing() == expected
    assert sorted(item.path for item in expected) == sorted(ODD)


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("a&amp;b.png", "a&b.png"),
        ("&amp;lt;.png", "&lt;.png"),
        ("&#233;&#x4e16;.png", "\u00e9\u4e16.png"),
    ],
)
def test_what_is_escaped_in_a_page(written: str, key: str) -> None:
    customized: dict[str, Any] = {}
    body = (
        "<ListBucketResult><Name>b</Name><Contents>\n<ETag>&#34;1&quot;</ETag>"
        f"<Key>{written}</Key><Size>7</Size></Contents><KeyCount>1</KeyCount></ListBucketResult>"
    )
    page = {"status_code": 200, "body": body.encode()}
    sync._read_contents(page, customized)
    assert customized == {"Contents": [{"Key": key, "Size": 7, "ETag": '"1"'}]}
    assert page["body"] == (
        b"<ListBucketResult><Name>b</Name><KeyCount>1</KeyCount></ListBucketResult>"
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"<Contents><Key>a</Key><Size>1</Size><ETag>e</ETag></Contents>"),
        (200, b"<Contents><Key><![CDATA[a]]></Key><Size>1</Size><ETag>e</ETag></Contents>"),
        (200, b"<Contents><Key>a</Key><Size>1</Size></Contents>"),
        (200, b"<Error><Code>InternalError</Code></Error>"),
    ],
)
def test_any_other_page_is_left_to_boto3(status: int, body: bytes) -> None:
    customized: dict[str, Any] = {}
    page = {"status_code": status, "body": body}
    sync._read_contents(page, customized)
    assert (page["body"], customized) == (body, {})


def test_a_page_that_breaks_off_is_asked_for_again(remote: Remote) -> None:
    remote.put_all(FILES)
    cut = remote.proxy.add(CutReply(300, method="GET", match="list-type"))
    assert bring(remote) == FILES
    assert cut.fired == 1


def test_parts_of_files_that_are_still_wanted_stay_and_others_go(tmp_path: Path) -> None:
    store = cache.DataCache(tmp_path / "cache")
    with store.locked(stopped=lambda: False, waiting=lambda: None):
        kept = cache.FileEntry("deep/er/kept.png", 1, 2, "tag", "crc32:0")
        wanted, other = (
            cache.part_of(store.incoming / "deep" / name) for name in ("wanted.png", "other.png")
        )
        for path in (store.incoming / kept.path, wanted, other, store.incoming / "stray.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        store.begin(cache.SetContent({kept.path: kept}), expected=["deep/wanted.png"])
        assert set(tree(store.incoming)) == {
            kept.path,
            wanted.relative_to(store.incoming).as_posix(),
        }


def test_an_index_that_was_written_as_one_line_is_still_read(tmp_path: Path) -> None:
    store = cache.DataCache(tmp_path / "cache")
    entries = [cache.FileEntry(f"{n}.png", n, 2**62 + n, "tag", "crc32:0") for n in range(3)]
    with store.locked(stopped=lambda: False, waiting=lambda: None):
        store.begin(cache.SetContent(), expected=[])
        data = store.complete("f" * 64, cache.SetContent({one.path: one for one in entries}))
        (index,) = (store.folder / "sets").glob("*.json")
        assert store.sets() == [data]
        written = index.read_text()
        index.write_text(json.dumps(json.loads(written)))
        assert store.sets() == [data]
        for length in range(0, len(written) - 1, 7):
            index.write_text(written[:length])
            assert store.sets() == []


def test_an_index_of_no_files(tmp_path: Path) -> None:
    store = cache.DataCache(tmp_path / "cache")
    with store.locked(stopped=lambda: False, waiting=lambda: None):
        store.begin(cache.SetContent(), expected=[])
        data = store.complete("f" * 64, cache.SetContent())
        assert store.sets() == [data]
