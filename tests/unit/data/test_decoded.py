"""Images that are kept decoded are the same ones, and never in the way."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.config import DataConfig
from job.data import decoded
from job.data.dataset import DatasetInfo, Item
from job.data.decoded import Decoder, KeepingDecoder, decoded_folder, decoder
from job.data.images import cut_image, cut_mask, random_crop
from job.data.splits import SplitItems
from job.errors import DataError
from job.storage.held import kept_within

INFO = DatasetInfo(("sky", "road"), 255, ((0, 0, 0), (9, 9, 9)))
NOISE = np.random.default_rng(3)


def photo(path: Path, width: int = 61, height: int = 47) -> Path:
    pixels = NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, width: int = 61, height: int = 47) -> Path:
    Image.fromarray(NOISE.integers(0, 2, (height, width), dtype=np.uint8)).save(path)
    return path


def items_of(*paths: Path) -> SplitItems:
    return SplitItems(
        labeled=(), unlabeled=tuple(Item(p.stem, p, None) for p in paths), val=(), train_sample=()
    )


@pytest.mark.parametrize("scale_range", [None, (0.3, 2.5)])
def test_crops_are_the_same_to_the_bit(
    tmp_path: Path, scale_range: tuple[float, float] | None
) -> None:
    image, labels = photo(tmp_path / "a.png"), mask(tmp_path / "m.png")
    plain, keeping = Decoder(), KeepingDecoder(tmp_path / "kept")
    rng = np.random.default_rng(0)
    for _ in range(60):
        crop = random_crop(
            rng, (33, 40), image_scale=1.0, scale_range=scale_range, random_mirror=True
        )
        np.testing.assert_array_equal(
            cut_image(keeping.image(image), crop), cut_image(plain.image(image), crop)
        )
        np.testing.assert_array_equal(
            cut_mask(keeping.mask(labels), crop, INFO), cut_mask(plain.mask(labels), crop, INFO)
        )


def test_a_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(tmp_path / "a.png")
    first = np.asarray(KeepingDecoder(tmp_path / "kept").image(image))
    monkeypatch.setattr(decoded, "read_rgb", None)
    again = KeepingDecoder(tmp_path / "kept").image(image)  # of another process
    np.testing.assert_array_equal(np.asarray(again), first)


def test_a_file_that_has_changed_is_decoded_again(tmp_path: Path) -> None:
    keeping, path = KeepingDecoder(tmp_path / "kept"), tmp_path / "a.png"
    keeping.image(photo(path))
    photo(path, 20, 30)
    assert keeping.image(path).size == (20, 30)


@pytest.mark.parametrize("left", [0, 5, 16, 100])
def test_what_was_written_in_part_is_decoded_again(tmp_path: Path, left: int) -> None:
    keeping, path = KeepingDecoder(tmp_path / "kept"), photo(tmp_path / "a.png")
    whole = np.asarray(keeping.image(path).convert("RGB"))
    (file,) = (tmp_path / "kept").iterdir()
    os.truncate(file, left)
    np.testing.assert_array_equal(np.asarray(keeping.image(path).convert("RGB")), whole)


def test_a_full_disk_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kept").touch()  # a file where the folder should be
    keeping = KeepingDecoder(tmp_path / "kept")
    with caplog.at_level(logging.WARNING):
        for name in "ab":
            assert keeping.image(photo(tmp_path / f"{name}.png")).size == (61, 47)
    assert caplog.text.count("not kept any more") == 1


@pytest.mark.parametrize("content", [None, b"no image"])
def test_errors_are_those_of_reading(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    for read in (KeepingDecoder(tmp_path / "kept").image, KeepingDecoder(tmp_path / "kept").mask):
        with pytest.raises(DataError, match=r"a\.png: cannot be read"):
            read(path)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("cache", "memory", "keeps"),
    [
        ("auto", 10**9, True),
        ("auto", 2 * 61 * 47 * 4 * 2 - 1, False),  # two images, in more than half of that
        ("auto", 2 * 61 * 47 * 4 * 2, True),
        ("disk", 0, True),
        ("none", 10**9, False),
    ],
)
def test_auto_keeps_what_fits_into_half_of_the_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cache: str,
    memory: int,
    keeps: bool,
) -> None:
    monkeypatch.setattr(decoded, "_free_memory", lambda: memory)
    items = items_of(photo(tmp_path / "a.png"), photo(tmp_path / "b.png"))
    config = DataConfig.model_validate({"cache": cache})
    found = decoder(items, config, tmp_path / "x" / "kept")
    assert isinstance(found, KeepingDecoder) == keeps
    said = "half of the free memory" in caplog.text
    assert said == (cache == "auto" and not keeps)
    assert not isinstance(decoder(items, config, None), KeepingDecoder)


def test_the_free_memory_is_some_of_this_machines() -> None:
    assert 10**6 < decoded._free_memory() < 10**14


def test_what_a_container_has_read_from_files_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("4000\n")
    (tmp_path / "memory.current").write_text("3500\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 2700\nactive_file 300\n")
    assert decoded._free_in_container(tmp_path) == 4000 - (3500 - 2700)
    (tmp_path / "memory.max").write_text("max\n")
    with pytest.raises(ValueError, match="max"):
        decoded._free_in_container(tmp_path)


def test_some_of_the_disk_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = photo(tmp_path / "a.png")
    free = [decoded._LEFT_BYTES - 1, decoded._LEFT_BYTES]
    for left, kept in zip(free, (0, 1), strict=True):
        monkeypatch.setattr(decoded, "_free_disk", lambda _, left=left: left)
        keeping = KeepingDecoder(tmp_path / "kept")
        assert keeping.image(path).size == keeping.image(path).size
        assert len(list((tmp_path / "kept").glob("*"))) == kept
    assert caplog.text.count("not kept any more: [Errno 28] less than 2 GiB would stay free") == 1


def test_they_are_removed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S4GAN_SCRATCH", str(tmp_path / "scratch"))
    folder = decoded_folder(tmp_path)
    assert folder.is_relative_to(tmp_path / "scratch")
    assert folder != decoded_folder(tmp_path / "other")
    with kept_within(folder):
        KeepingDecoder(folder).image(photo(tmp_path / "a.png"))
        assert len(list(folder.iterdir())) == 1
    assert not folder.exists()


HOLDER = """
import sys
from pathlib import Path
from job.data.decoded import KeepingDecoder
from job.storage.held import kept_within
folder = Path(sys.argv[1])
with kept_within(folder):
    KeepingDecoder(folder).image(Path(sys.argv[2]))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(folder: Path, image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that trains on images in a folder, until its standard input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_uses_stays(
    tmp_path: Path,
) -> None:
    image, place = photo(tmp_path / "a.png"), tmp_path / "decoded"
    with holding(place / "dead", image) as dead, holding(place / "alive", image) as alive:
        for process in (dead, alive):
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert list((place / "dead").iterdir())
        with kept_within(place / "mine"):
            assert sorted(path.name for path in place.iterdir()) == ["alive", "mine"]
        with kept_within(place / "alive"):  # another run on the same data
            pass
        assert list((place / "alive").iterdir())
        assert alive.stdin is not None
        alive.stdin.close()
        alive.wait()
    assert list(place.iterdir()) == []


def test_a_folder_that_is_removed_while_it_is_asked_for_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock = tmp_path / "kept", fcntl.flock
    taken = []

    def removed_first(descriptor: int, kind: int) -> None:
        if not taken:
            folder.rmdir()
        taken.append(kind)
        lock(descriptor, kind)

    monkeypatch.setattr("fcntl.flock", removed_first)
    with kept_within(folder):
        assert folder.is_dir()
        assert len(taken) >= 2
    assert not folder.exists()


def test_without_locks_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "other").mkdir()
    with kept_within(tmp_path / "mine"):
        KeepingDecoder(tmp_path / "mine").image(photo(tmp_path / "a.png"))
    assert (tmp_path / "other").is_dir()
    assert not (tmp_path / "mine").exists()


def test_a_place_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "decoded").touch()
    with kept_within(tmp_path / "decoded" / "x"):
        pass
