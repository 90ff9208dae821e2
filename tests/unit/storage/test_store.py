"""The `ObjectStore` contract, run against every implementation."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import ConfigError, ObjectNotFound, PreconditionFailed, StorageError
from job.storage import ABSENT, LocalStore, ObjectStore, is_same_place, open_store
from job.storage.s3 import S3Store
from tests.unit.stores import KINDS, open_kind


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    with open_kind(request.param, request, "root") as opened:
        yield opened


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
    with pytest.raises(ObjectNotFound):
        store.age_s("nothing")
    assert list(store.list("")) == []
    store.delete("nothing")
    assert not (tmp_path / "nothing").exists(), "a failed fetch leaves no file"


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


def test_an_upload_replaces_what_was_there(store, tmp_path):
    source = tmp_path / "source"
    for content in (b"first", b"", b"second"):
        source.write_bytes(content)
        store.upload(source, "key")
        assert store.read("key") == content
        assert store.fetch("key", tmp_path / "fetched").read_bytes() == content
        source.unlink()  # where an upload is a link, writing into it would write into the store


def test_a_file_to_upload_that_is_gone_is_an_error(store, tmp_path):
    with pytest.raises(StorageError):
        store.upload(tmp_path / "gone", "key")
    assert store.stat("key") is None


def test_a_version_changes_with_the_object_and_only_with_it(store):
    store.write("key", b"1")
    first = store.stat("key")
    assert store.stat("key") == first
    assert list(store.list("key")) == [first]
    store.write("key", b"2")
    second = store.stat("key")
    assert second.version not in (first.version, ABSENT)
    assert second.size == 1
    store.delete("key")
    assert store.stat("key") is None


def test_a_write_returns_the_version_that_the_next_one_needs(store):
    version = ABSENT
    for content in (b"1", b"22", b"1"):
        version = store.write("key", content, expected=version)
        assert store.read_versioned("key") == (content, version)


def test_a_conditional_copy_needs_the_version_of_its_target(store):
    store.write("one", b"1")
    store.write("two", b"2")
    store.copy("one", "target", expected=ABSENT)
    with pytest.raises(PreconditionFailed):
        store.copy("two", "target", expected=ABSENT)
    stale = store.stat("target").version
    store.copy("two", "target", expected=stale)
    with pytest.raises(PreconditionFailed):
        store.copy("one", "target", expected=stale)
    assert store.read("target") == b"2"
    current = store.stat("target").version
    store.delete("target")
    with pytest.raises(PreconditionFailed):
        store.copy("one", "target", expected=current)
    assert store.stat("target") is None


def test_a_copy_of_nothing_leaves_its_target_alone(store):
    store.write("target", b"here")
    for expected in (None, store.stat("target").version):
        with pytest.raises(ObjectNotFound, match="nothing"):
            store.copy("nothing", "target", expected=expected)
    assert store.read("target") == b"here"


def test_age_is_told_by_the_storage(store):
    store.write("key", b"")
    assert -2 <= store.age_s("key") < 1800, "by another clock, or in another time zone"


ODD_KEYS = (
    "with space",
    " leading",
    "plus+plus",
    "100%41%",
    "question?mark&and=more#hash",
    "a:b;c,d@e!$'()*[]{}|^~`",
    'quote"and<angle>',
    "\u00e4\u00f6\u6f22\U0001f600",
    "tab\there",
    "deep/with space/\u00e9/file.tar.gz",
    ".hidden/.file",
    "x" * 200,
)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_any_character_may_be_in_a_key(store, tmp_path, key):
    store.write(f"in/{key}", b"content", expected=ABSENT)
    assert store.read(f"in/{key}") == b"content"
    assert [info.key for info in store.list("in/")] == [f"in/{key}"]
    assert [info.key for info in store.list(f"in/{key}")] == [f"in/{key}"]
    assert store.stat(f"in/{key}").key == f"in/{key}"
    store.copy(f"in/{key}", f"to/{key}", expected=ABSENT)
    assert store.fetch(f"to/{key}", tmp_path / "fetched").read_bytes() == b"content"
    store.delete(f"in/{key}")
    assert store.stat(f"in/{key}") is None


def test_a_listing_is_whole_however_long(store):
    """S3 gives a thousand at a time."""
    keys = [f"many/{number:04d}" for number in range(1101)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), keys))
    assert [info.key for info in store.list("many/")] == keys
    assert [info.key for info in store.list("many/10")] == keys[1000:1100]


def _winners(attempts: list[Callable[[], object]]) -> list[int]:
    """Which of these calls, begun at the same moment, were not refused."""
    barrier = threading.Barrier(len(attempts))

    def attempt(call: Callable[[], object]) -> bool:
        barrier.wait()
        try:
            call()
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(len(attempts)) as pool:
        won = list(pool.map(attempt, attempts))
    return [number for number, one in enumerate(won) if one]


def test_of_eight_writers_exactly_one_creates_and_one_replaces(store):
    def writers(expected: str) -> list[Callable[[], object]]:
        return [
            lambda name=name: store.write("key", f"{name}{expected}".encode(), expected=expected)
            for name in range(8)
        ]

    version = ABSENT
    for _ in range(3):
        (winner,) = _winners(writers(version))
        content, found = store.read_versioned("key")
        assert content == f"{winner}{version}".encode()
        version = found


def test_of_eight_copies_one_creates_and_one_replaces(store):
    """Or none: SeaweedFS 4.48 now and then refuses all of eight that come at the same moment."""
    for name in range(8):
        store.write(f"from/{name}", f"{name}".encode())

    def copies(expected: str) -> list[Callable[[], object]]:
        return [
            lambda name=name: store.copy(f"from/{name}", "to", expected=expected)
            for name in range(8)
        ]

    for _ in range(2):
        found = store.stat("to")
        winners = _winners(copies(found.version if found else ABSENT))
        content, _ = store.read_versioned("to")
        if winners or not isinstance(store, S3Store):
            assert [str(winner).encode() for winner in winners] == [content]
        store.write("to", b"between")


def test_list_is_sorted_recursive_and_by_prefix(store):
    for key in ("x/2", "x/10", "x/1/deep", "xy", "y"):
        store.write(key, b"12")
    assert [info.key for info in store.list("x/")] == ["x/1/deep", "x/10", "x/2"]
    assert [info.key for info in store.list("x")] == ["x/1/deep", "x/10", "x/2", "xy"]
    assert [info.key for info in store.list("nothing/")] == []
    assert all(info.size == 2 for info in store.list(""))


def test_deleted_objects_are_gone(store):
    store.write("a/b/c", b"")
    store.write("a/d", b"")
    store.delete("a/b/c")
    assert [info.key for info in store.list("")] == ["a/d"]


def test_keys_cannot_leave_the_store(store):
    for call in (
        lambda: store.write("../outside", b""),
        lambda: store.read("a/../../outside"),
        lambda: store.copy("../outside", "inside"),
        lambda: store.delete(".."),
    ):
        with pytest.raises(StorageError, match=r"\.\.") as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFound)


def test_two_runs_beside_each_other_do_not_see_each_other(store):
    name = store.uri.rpartition("/")[2]
    other = open_store(f"{store.uri}2")
    other.write("key", b"other")
    store.write("key", b"ours")
    assert [info.key for info in store.list("")] == ["key"]
    assert store.read("key") == b"ours"
    assert other.uri.endswith(f"{name}2")
    if isinstance(other, S3Store):
        other.client.close()


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

    def test_deleting_leaves_no_empty_folder(self, tmp_path):
        store = LocalStore(tmp_path / "root")
        store.write("a/b/c", b"")
        store.write("a/d", b"")
        store.delete("a/b/c")
        assert not (tmp_path / "root" / "a" / "b").exists()

    def test_what_is_deleted_while_it_is_listed_is_left_out(self, tmp_path, monkeypatch):
        store = LocalStore(tmp_path)
        store.write("a", b"")
        store.write("b", b"")
        is_file = Path.is_file

        def then_deleted(path: Path) -> bool:
            found = is_file(path)
            if path.name == "a":
                path.unlink()
            return found

        monkeypatch.setattr(Path, "is_file", then_deleted)
        assert [info.key for info in store.list("")] == ["b"]

    def test_a_conditional_copy_that_may_not_write_says_so(self, tmp_path, monkeypatch):
        store = LocalStore(tmp_path)
        store.write("a", b"")

        def read_only(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("builtins.open", read_only)
        with pytest.raises(StorageError, match="Read-only"):
            store.copy("a", "b", expected=ABSENT)

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


def test_a_store_below_another_has_its_objects(store: ObjectStore) -> None:
    below = store.below("deep/er")
    below.write("a.txt", b"1")
    assert below.uri == f"{store.uri}/deep/er"
    assert store.read("deep/er/a.txt") == b"1"
    assert [info.key for info in below.list("")] == ["a.txt"]


def test_a_place_is_the_same_however_it_is_written(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_same_place(store, store)
    assert not is_same_place(store, store.below("inner"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    here = open_store("data")
    for uri in ("data/", "link", str(tmp_path / "data"), f"file://{tmp_path}/data", "./x/../data"):
        assert is_same_place(here, open_store(uri))
    assert not is_same_place(here, open_store("dat"))
    assert not is_same_place(here, store)
