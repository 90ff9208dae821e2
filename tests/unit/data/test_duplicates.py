"""Copies: which pictures count as the same, which look the same, and which do not."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from job.data.duplicates import (
    HAMMING_LIMIT,
    Fingerprint,
    Fingerprints,
    fingerprint,
    near_pairs,
    pixel_digest,
    rows_digest,
)


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Soft random shapes, as different from one another as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def prints(*images: Image.Image) -> Fingerprints:
    return Fingerprints([fingerprint(i) for i in images], [pixel_digest(i) for i in images])


def look_same(a: Image.Image, b: Image.Image) -> bool:
    pairs, count = near_pairs(prints(a), prints(b), limit=9)
    assert len(pairs) == count
    return count == 1


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


# ---------------------------------------------------------------- exact


def test_the_digest_is_of_pixels_whatever_the_file(tmp_path: Path) -> None:
    image = picture(0)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.webp", lossless=True)
    assert len({pixel_digest(Image.open(p)) for p in tmp_path.iterdir()}) == 1


def test_one_pixel_makes_another_digest() -> None:
    image = picture(0)
    before = pixel_digest(image)
    image.putpixel((3, 3), (1, 2, 3))
    assert pixel_digest(image) != before


@settings(deadline=None)
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)), seed=st.integers(0, 9))
def test_copies_have_the_same_rows_too(size: tuple[int, int], seed: int) -> None:
    image = picture(seed, size)
    assert rows_digest(image) == rows_digest(image.copy())
    wider = picture(seed, (size[0] + 1, size[1]))
    assert rows_digest(image) != rows_digest(wider)


def test_the_same_bytes_in_another_shape_are_another_picture() -> None:
    assert pixel_digest(Image.new("RGB", (8, 2))) != pixel_digest(Image.new("RGB", (2, 8)))


# ---------------------------------------------------------------- near


@pytest.mark.parametrize(
    "altered",
    [
        lambda image: as_jpeg(image, 60),
        lambda image: as_jpeg(image, 30),
        lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
        lambda image: image.resize((640, 480), Image.Resampling.LANCZOS),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    ],
    ids=["jpeg 60", "jpeg 30", "half", "twice", "darker"],
)
def test_a_copy_saved_in_another_way_looks_the_same(altered) -> None:
    for seed in range(8):
        assert look_same(picture(seed), altered(picture(seed)))


def test_other_pictures_and_mirrored_ones_do_not_look_the_same() -> None:
    images = [picture(seed) for seed in range(60)]
    images += [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    assert near_pairs(prints(*images), None, limit=9) == ([], 0)


def test_the_very_same_picture_is_no_near_duplicate() -> None:
    assert not look_same(picture(1), picture(1))


def test_plain_pictures_are_not_compared() -> None:
    """All of them have the hash 0, and say nothing."""
    plain = [Image.new("RGB", (40, 40), (grey,) * 3) for grey in range(0, 250, 10)]
    assert near_pairs(prints(*plain), None, limit=9) == ([], 0)


def test_pairs_within_one_list_are_found_once_and_in_order() -> None:
    first, second = picture(1), picture(2)
    images = [first, second, as_jpeg(first, 80), as_jpeg(second, 80)]
    assert near_pairs(prints(*images), None, limit=9) == ([(0, 2), (1, 3)], 2)


def test_no_more_pairs_than_asked_for_are_listed_but_all_are_counted() -> None:
    copies = [as_jpeg(picture(1), quality) for quality in range(70, 95, 5)]
    pairs, count = near_pairs(prints(*copies), None, limit=3)
    assert len(pairs) == 3
    assert count > 3


def test_of_no_images_there_are_no_pairs() -> None:
    assert near_pairs(prints(), None, limit=9) == ([], 0)
    assert near_pairs(prints(picture(1)), prints(), limit=9) == ([], 0)


def test_a_stop_ends_the_search() -> None:
    images = prints(picture(1), as_jpeg(picture(1), 80))
    assert near_pairs(images, None, limit=9, stopped=lambda: True) == ([], 0)


@settings(deadline=None, max_examples=30)
@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40),
    flips=st.lists(st.integers(0, 63), max_size=8),
)
def test_hashes_within_the_limit_are_all_found(hashes: list[int], flips: list[int]) -> None:
    """Against a comparison bit by bit; all thumbnails are alike."""
    hashes = [*hashes, hashes[0] ^ sum(1 << bit for bit in set(flips))]
    thumbnail = bytes(range(256))
    many = Fingerprints(
        [Fingerprint(one, thumbnail) for one in hashes],
        [index.to_bytes(8, "big") for index in range(len(hashes))],
    )
    expected = {
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (hashes[i] ^ hashes[j]).bit_count() <= HAMMING_LIMIT
    }
    assert set(near_pairs(many, None, limit=10**6)[0]) == expected


def test_many_images_are_compared_in_seconds() -> None:
    rng = np.random.default_rng(0)
    thumbnail = rng.integers(0, 256, 256).astype(np.uint8).tobytes()

    def some(count: int) -> Fingerprints:
        return Fingerprints(
            [Fingerprint(int(one), thumbnail) for one in rng.integers(0, 2**63, count)],
            [index.to_bytes(8, "big") for index in range(count)],
        )

    few, many = some(2_000), some(50_000)
    began_s = time.monotonic()
    near_pairs(few, many, limit=10)
    assert time.monotonic() - began_s < 30


def test_video_frames_a_second_apart_do_not_look_the_same(shared_data: Path) -> None:
    """The limits were chosen on CamVid, all of whose training frames are without a pair."""
    found = {}
    for part in ("train", "val"):
        paths = sorted((shared_data / "camvid" / part / "images").iterdir())[:120]
        found[part] = prints(*[Image.open(path).convert("RGB") for path in paths])
    assert near_pairs(found["train"], found["val"], limit=9) == ([], 0)
    assert near_pairs(found["train"], None, limit=9) == ([], 0)


def test_photographs_saved_anew_look_the_same(shared_data: Path) -> None:
    paths = sorted((shared_data / "camvid/train/images").iterdir())[::12]
    images = [Image.open(path).convert("RGB") for path in paths]
    copies = [as_jpeg(image.resize((240, 180)), 50) for image in images]
    pairs, count = near_pairs(prints(*images), prints(*copies), limit=999)
    assert all(i == j for i, j in pairs)
    assert count >= 0.9 * len(images)
