"""The `ObjectStore` contract, run against every implementation."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from job.errors import ConfigError, ObjectNotFound, PreconditionFailed, StorageError
from job.storage import ABSENT, LocalStore, ObjectStore, open_store
from job.storage.sync import bring_data


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return LocalStore(tmp_path / "root")


def test_what_is_written_is_read(store):
    store.write("a/b.json", b"one")
    assert store.read("a/b.json") == b"one"
    store.write("a/b.json", b"two")
    assert store.read("a/b.json") == b"two"


def test_reading_what_is_not_there(store, tmp_path):
    with pytest.raises(ObjectNotFound):
        store.read("nothing")
    with pytest.raises(ObjectNotFound):
        store.fetch("nothing", tmp_path)
    with pytest.raises(ObjectNotFound):
        store.copy("nothing", "target")
    assert store.stat("nothing") is None
    assert store.read_versioned("nothing") == (b"", ABSENT)
    assert list(store.list("")) == []
    store.delete("nothing")


def test_conditional_write_needs_the_version_that_was_read(store):
    first = store.write("key", b"1", expected=ABSENT)
    with pytest.raises(PreconditionFailed):
        store.write("key", b"2", expected=ABSENT)
    second = store.write("key", b"2", expected=first)
    with pytest.raises(PreconditionFailed):
        store.write("key", b"3", expected=first)
    assert store.read_versioned("key") == (b"2", second)


def test_a_conditional_write_of_something_deleted_fails(store):
    version = store.write("key", b"1", expected=ABSENT)
    store.delete("key")
    with pytest.raises(PreconditionFailed):
        store.write("key", b"2", expected=version)


def _increment(root: str, times: int) -> None:
    store = LocalStore(Path(root))
    done = 0
    while done < times:
        data, version = store.read_versioned("counter")
        try:
            store.write("counter", str(int(data or b"0") + 1).encode(), expected=version)
            done += 1
        except PreconditionFailed:
            continue


def test_conditional_writes_of_several_processes_lose_no_update(tmp_path):
    context = multiprocessing.get_context("spawn")
    root = str(tmp_path / "root")
    Path(root).mkdir()
    processes = [context.Process(target=_increment, args=(root, 40)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert LocalStore(Path(root)).read("counter") == b"160"


def test_uploaded_file_is_fetched_whole(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    store.upload(source, "deep/down/file")
    assert store.fetch("deep/down/file", tmp_path).read_bytes() == source.read_bytes()
    info = store.stat("deep/down/file")
    assert info is not None
    assert info.size == 100_000


def test_the_source_of_an_upload_can_go(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    store.upload(source, "key")
    source.unlink()
    assert store.read("key") == b"content"


def test_a_copy_outlives_its_source(store):
    store.write("a", b"content")
    store.copy("a", "b")
    store.write("a", b"other")
    assert store.read("b") == b"content"
    store.delete("a")
    assert store.read("b") == b"content"


def test_list_is_sorted_recursive_and_by_prefix(store):
    for key in ("x/2", "x/10", "x/1/deep", "xy", "y"):
        store.write(key, b"12")
    assert [info.key for info in store.list("x/")] == ["x/1/deep", "x/10", "x/2"]
    assert [info.key for info in store.list("x")] == ["x/1/deep", "x/10", "x/2", "xy"]
    assert [info.key for info in store.list("nothing/")] == []
    assert all(info.size == 2 for info in store.list(""))


def test_deleted_objects_are_gone_and_leave_no_folder(store, tmp_path):
    store.write("a/b/c", b"")
    store.write("a/d", b"")
    store.delete("a/b/c")
    assert [info.key for info in store.list("")] == ["a/d"]
    assert not (tmp_path / "root" / "a" / "b").exists()


def test_keys_cannot_leave_the_store(store):
    with pytest.raises(StorageError, match=r"\.\."):
        store.write("../outside", b"")


class TestLocalStore:
    """What only a folder can show."""

    def test_a_write_that_fails_leaves_the_old_content_and_no_leftover(self, tmp_path, monkeypatch):
        store = LocalStore(tmp_path)
        store.write("key", b"old")

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            store.write("key", b"new")
        assert "free some disk space" in caught.value.mend
        assert caught.value.exit_code == 74
        monkeypatch.undo()
        assert store.read("key") == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["key"]

    def test_leftovers_of_killed_writers_are_not_listed_and_can_be_removed(self, tmp_path):
        store = LocalStore(tmp_path)
        store.write("a/key", b"1")
        (tmp_path / "a" / ".tmp-key-1234").write_bytes(b"half")
        assert [info.key for info in store.list("")] == ["a/key"]
        store.remove_leftovers()
        assert not list(tmp_path.rglob(".tmp-*"))

    def test_another_file_system_means_a_copy(self, tmp_path, monkeypatch):
        def no_links(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_links)
        source = tmp_path / "source"
        source.write_bytes(b"content")
        store = LocalStore(tmp_path / "root")
        store.upload(source, "key")
        assert store.read("key") == b"content"

    def test_a_file_in_the_place_of_the_folder_is_an_error_with_a_mend(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="choose another folder"):
            LocalStore(tmp_path / "file").write("key", b"")

    def test_denied_is_an_error_and_never_not_there(self, tmp_path, monkeypatch):
        store = LocalStore(tmp_path)
        store.write("key", b"")

        def denied(*_: object, **__: object) -> bytes:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", denied)
        with pytest.raises(StorageError, match="Permission denied") as caught:
            store.read("key")
        assert not isinstance(caught.value, ObjectNotFound)

    def test_fetch_hands_out_the_file_itself(self, tmp_path):
        store = LocalStore(tmp_path)
        store.write("key", b"1")
        assert store.fetch("key", tmp_path / "elsewhere") == tmp_path / "key"
        assert store.local_path("key") == tmp_path / "key"
        assert stat.S_ISREG((tmp_path / "key").stat().st_mode)


def test_a_uri_without_scheme_or_with_file_is_a_folder(tmp_path):
    assert open_store(str(tmp_path)).local_path("x") == tmp_path / "x"
    assert open_store(f"file://{tmp_path}").local_path("x") == tmp_path / "x"
    assert open_store("some/folder").uri == "some/folder"


def test_the_folder_itself_may_be_named_with_dots(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = open_store("../there")
    store.write("a/key", b"1")
    assert (tmp_path / "there" / "a" / "key").read_bytes() == b"1"
    assert [info.key for info in store.list("a/")] == ["a/key"]


def test_an_unknown_scheme_is_the_users_error():
    with pytest.raises(ConfigError, match="gs://") as caught:
        open_store("gs://bucket/run")
    assert caught.value.exit_code == 78


def test_local_data_are_used_where_they_lie(tmp_path):
    assert bring_data(str(tmp_path)) == tmp_path
