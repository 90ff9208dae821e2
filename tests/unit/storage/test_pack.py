"""A pack is the data set again, whole or not at all, and only what changed is ever moved."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from job.drill.proxy import CorruptReply, Status
from job.errors import ConfigError, DataError, StorageError
from job.storage import pack as packing
from job.storage.pack import describe, pack
from job.storage.packindex import INDEX, PackIndex
from job.storage.sync import data_folder
from job.storage.units import SPAN_BYTES
from tests.unit.storage.conftest import Remote, tree

FILES = {
    "dataset.yaml": b"classes: [a, b]",
    **{f"train/images/{index:02d}.png": os.urandom(4000 + index) for index in range(40)},
    "train/masks/00.png": b"",
    "val/images/a b+ü%?.png": b"odd",
    f"{'long/' * 40}x.png": b"deep",
}


@pytest.fixture(autouse=True)
def _small_shards(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHARD_MIN_BYTES", 20_000)
    monkeypatch.setattr(packing, "SHARD_MAX_BYTES", 60_000)
    monkeypatch.setattr(packing, "CUT_EVERY_BYTES", 8_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / ".hidden").write_bytes(b"not data")
    return folder


def bring(uri: str, **options: Any) -> dict[str, bytes]:
    with data_folder(uri, **options) as folder:
        return tree(folder)


def test_a_pack_in_a_folder_is_the_data_again(source: Path, tmp_path: Path) -> None:
    packed = pack(str(source), str(tmp_path / "pack"))
    assert packed.files == len(FILES)
    assert packed.shards == packed.uploaded > 2
    assert bring(str(tmp_path / "pack")) == FILES


def test_a_pack_in_a_bucket_is_the_data_again(remote: Remote, source: Path) -> None:
    pack(str(source), remote.uri("packed"))
    remote.proxy.forget()
    assert bring(remote.uri("packed")) == FILES
    shards = [key for key in remote.keys("packed/") if key.endswith(".tar")]
    assert remote.keys_read == sorted(["packed/pack.json", *shards])
    remote.proxy.forget()
    assert bring(remote.uri("packed")) == FILES
    assert remote.gets == []


def test_a_bucket_can_be_packed(remote: Remote, source: Path, tmp_path: Path) -> None:
    remote.put_all(FILES)
    pack(remote.uri(), str(tmp_path / "from-bucket"))
    pack(str(source), str(tmp_path / "from-folder"))
    assert tree(tmp_path / "from-bucket") == tree(tmp_path / "from-folder")


def test_shards_are_plain_tar_files(source: Path, tmp_path: Path) -> None:
    pack(str(source), str(tmp_path / "pack"))
    found = {}
    for path in (tmp_path / "pack").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    assert found == FILES


def test_packing_again_writes_nothing(remote: Remote, source: Path) -> None:
    pack(str(source), remote.uri("packed"))
    remote.proxy.forget()
    assert pack(str(source), remote.uri("packed")).uploaded == 0
    assert {exchange.method for exchange in remote.proxy.requests} == {"GET"}


def test_a_change_touches_few_shards_and_is_all_that_is_fetched(
    remote: Remote, source: Path
) -> None:
    shards = pack(str(source), remote.uri("packed")).shards
    bring(remote.uri("packed"))
    (source / "train/images/00a.png").write_bytes(b"new")
    again = pack(str(source), remote.uri("packed"))
    assert again.uploaded < shards
    remote.proxy.forget()

    assert bring(remote.uri("packed")) == {**FILES, "train/images/00a.png": b"new"}
    assert len(remote.gets) == 2  # the index and the one new file
    names = {key.removeprefix("packed/") for key in remote.keys("packed/")}
    index = PackIndex.from_json(remote.read("packed/pack.json"), called="")
    assert names == {INDEX, *(shard.name for shard in index.shards)}  # old shards are gone


def test_old_shards_that_may_not_be_deleted_only_take_space(remote: Remote, source: Path) -> None:
    pack(str(source), remote.uri("packed"))
    (source / "train/images/00a.png").write_bytes(b"new")
    remote.proxy.add(Status(403, method="DELETE", match="shard"))
    again = pack(str(source), remote.uri("packed"))
    assert again.left == 1
    assert "1 shards of an earlier pack stay" in describe(again)
    assert bring(remote.uri("packed")) == {**FILES, "train/images/00a.png": b"new"}


def test_a_pack_that_failed_does_not_exist_and_is_repeated(remote: Remote, source: Path) -> None:
    remote.proxy.add(Status(403, method="PUT", match="shard", skip=1))
    with pytest.raises(StorageError, match="access denied"):
        pack(str(source), remote.uri("packed"))
    assert INDEX not in str(remote.keys("packed/"))
    again = pack(str(source), remote.uri("packed"))
    assert again.uploaded == again.shards - 1
    assert bring(remote.uri("packed")) == FILES


def test_an_old_pack_stays_in_force_until_the_new_one_is_whole(
    remote: Remote, source: Path
) -> None:
    pack(str(source), remote.uri("packed"))
    (source / "dataset.yaml").write_bytes(b"newer")
    remote.proxy.add(Status(403, method="PUT", match="pack.json"))
    with pytest.raises(StorageError):
        pack(str(source), remote.uri("packed"))
    assert bring(remote.uri("packed")) == FILES


def test_of_two_packers_one_is_refused(
    remote: Remote, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_packs(*arguments: Any) -> Any:
        remote.put("packed/pack.json", b"theirs")
        return write_tar(*arguments)

    write_tar = packing._write_tar
    monkeypatch.setattr(packing, "_write_tar", other_packs)
    with pytest.raises(StorageError, match="somebody else made a pack"):
        pack(str(source), remote.uri("packed"))
    assert remote.read("packed/pack.json") == b"theirs"


def test_a_large_file_in_a_pack_is_streamed(
    remote: Remote, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = os.urandom(SPAN_BYTES + 1)
    (source / "train/images/large.png").write_bytes(large)
    pack(str(source), remote.uri("packed"))
    flipped = remote.proxy.add(CorruptReply(SPAN_BYTES // 2, match="shard", times=None))
    with pytest.raises(StorageError, match="damaged"):
        bring(remote.uri("packed"))
    flipped.remove()
    assert bring(remote.uri("packed"))["train/images/large.png"] == large


def test_a_damaged_shard_is_named(source: Path, tmp_path: Path, scratch: Path) -> None:
    pack(str(source), str(tmp_path / "pack"))
    index = PackIndex.from_json((tmp_path / "pack" / INDEX).read_bytes(), called="")
    file = index.files[5]
    shard = tmp_path / "pack" / file.shard
    data = bytearray(shard.read_bytes())
    data[file.offset + 7] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(StorageError, match=f"{file.shard}.*{file.path} in it is damaged") as caught:
        bring(str(tmp_path / "pack"))
    assert "s4gan data pack" in caught.value.mend
    assert not list(scratch.rglob("sets/*"))


def test_a_missing_shard_and_a_bad_index_are_named(source: Path, tmp_path: Path) -> None:
    pack(str(source), str(tmp_path / "pack"))
    index = tmp_path / "pack" / INDEX
    shard = next((tmp_path / "pack").glob("*.tar"))
    shard.rename(shard.with_suffix(".gone"))
    with pytest.raises(DataError, match=f"{shard.name}: is missing"):
        bring(str(tmp_path / "pack"))
    text = index.read_bytes()
    index.write_bytes(text[: len(text) // 2])
    with pytest.raises(DataError, match="is not the index of a pack"):
        bring(str(tmp_path / "pack"))
    index.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(DataError, match="has format 99"):
        bring(str(tmp_path / "pack"))


def test_an_index_cannot_lead_out_of_the_cache(source: Path, tmp_path: Path, scratch: Path) -> None:
    pack(str(source), str(tmp_path / "pack"))
    index = tmp_path / "pack" / INDEX
    index.write_bytes(index.read_bytes().replace(b"dataset.yaml", b"../../../out"))
    with pytest.raises(DataError, match="cannot be the name of a file"):
        bring(str(tmp_path / "pack"))
    assert not list(scratch.rglob("out"))


def test_what_cannot_be_packed_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="or the other way round"):
        pack(str(source), str(source / "pack"))
    with pytest.raises(DataError, match="no such folder"):
        pack(str(tmp_path / "nowhere"), str(tmp_path / "pack"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which is not of a pack"):
        pack(str(source), str(tmp_path / "full"))
    (source / "more.zip").touch()
    with pytest.raises(DataError, match="an archive in a pack"):
        pack(str(source), str(tmp_path / "pack"))


def fifo(source: Path) -> None:
    os.mkfifo(source / "pipe")


def dangling_link(source: Path) -> None:
    (source / "link").symlink_to("nowhere")


def foreign_name(source: Path) -> None:
    Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.png")).write_bytes(b"x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fifo, "pipe: is neither a file nor a folder"),
        (dangling_link, "link: is a link to nothing"),
        (foreign_name, "its name is not in UTF-8"),
    ],
)
def test_what_is_no_file_is_named(source: Path, tmp_path: Path, change: Any, said: str) -> None:
    change(source)
    with pytest.raises(DataError, match=said) as caught:
        pack(str(source), str(tmp_path / "pack"))
    str(caught.value).encode()


def test_a_folder_that_cannot_be_read_is_not_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("masks"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(StorageError, match=r"cannot read .*masks: Permission denied"):
        pack(str(source), str(tmp_path / "pack"))


def test_an_object_that_changes_while_it_is_packed_is_named(
    remote: Remote, source: Path, tmp_path: Path
) -> None:
    remote.put_all(FILES)
    remote.proxy.add(Status(412, method="GET", match="train/images/07.png", times=None))
    with pytest.raises(DataError, match=r"train/images/07\.png: changed while it was packed"):
        pack(remote.uri(), str(tmp_path / "pack"))


@pytest.mark.parametrize("large", [100, SPAN_BYTES + 100])
def test_a_half_download_beside_its_file_stays_what_it_is(
    source: Path, tmp_path: Path, large: int
) -> None:
    """As other programs leave it: the name is not ours to use."""
    whole = {"a.jpg": os.urandom(large), "a.jpg.part": b"half", "a.jpg.part.json": b"{}"}
    for name, data in whole.items():
        (source / name).write_bytes(data)
    pack(str(source), str(tmp_path / "pack"))
    assert bring(str(tmp_path / "pack")) == FILES | whole


def test_a_large_file_may_have_the_longest_name(source: Path, tmp_path: Path) -> None:
    (source / ("x" * 255)).write_bytes(os.urandom(SPAN_BYTES + 1))
    pack(str(source), str(tmp_path / "pack"))
    assert len(bring(str(tmp_path / "pack"))) == len(FILES) + 1
