"""Decoding images and masks, and cutting the same window out of both."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from job.data.dataset import IGNORE, DatasetInfo, default_palette
from job.data.images import (
    PADDING_RGB,
    Array,
    Crop,
    cut_image,
    cut_mask,
    random_crop,
    read_index_mask,
    read_rgb,
    scaled_image,
    to_labels,
    valid_pixels,
)
from job.errors import DataError, ExitCode

RNG = np.random.default_rng(0)
LABELS: Array = RNG.integers(0, 5, (20, 30)).astype(np.uint8)
COLOURS: Array = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)

fractions = st.floats(0, 1, exclude_max=True)
sides = st.integers(1, 90)
crops = st.builds(
    Crop,
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    scale=st.floats(0.05, 4),
    top=fractions,
    left=fractions,
    mirror=st.booleans(),
)


def ignoring(ignore_index: int) -> DatasetInfo:
    """Classes of a data set whose masks call that value void."""
    names = tuple(f"class {index}" for index in range(5))
    return DatasetInfo(names, ignore_index, default_palette(5))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def indexed(labels: Array) -> Image.Image:
    """Mode P, with a palette whose brightness has nothing to do with the numbers."""
    image = Image.fromarray(labels)
    image.putpalette([(channel * 77 + 31) % 256 for channel in range(768)])
    return image


def png(width: int, height: int, *, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG of a bit depth that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "RGB"])
def test_an_image_of_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    original = Image.fromarray(COLOURS).convert(mode)
    image = read_rgb(save(original, tmp_path / "a.png"))
    assert image.mode == "RGB"
    assert image.size == (30, 20)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(original.convert("RGB")))


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    image = np.asarray(read_rgb(save(Image.fromarray(LABELS), tmp_path / "a.png")))
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], LABELS)


def test_transparency_is_dropped_and_leaves_the_colours(tmp_path: Path) -> None:
    rgba = np.dstack([COLOURS, np.zeros((20, 30), np.uint8)])
    image = read_rgb(save(Image.fromarray(rgba), tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(image), COLOURS)


def test_palette_images_get_their_palettes_colours(tmp_path: Path) -> None:
    image = indexed(LABELS)
    decoded = np.asarray(read_rgb(save(image, tmp_path / "a.png")))
    palette = np.array(image.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(decoded, palette[LABELS])


def test_a_printers_jpeg_becomes_rgb(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image = read_rgb(save(cmyk, tmp_path / "a.jpg"))
    red, green, blue = image.getpixel((4, 4))  # type: ignore[misc]
    assert red > 200 > 60 > max(green, blue)


def test_a_grey_image_of_16_bits_keeps_its_shades_or_is_refused(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    path = save(Image.fromarray(shades), tmp_path / "a.png")
    try:
        image = np.asarray(read_rgb(path))[..., 0].astype(int)
    except DataError:
        return
    assert np.abs(image - shades // 256).max() <= 1


def test_a_palette_with_alpha_becomes_rgb_without_a_warning(tmp_path: Path) -> None:
    path = save(indexed(LABELS), tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rgb(path).mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_a_data_error_naming_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rgb(path)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    assert caught.value.message.startswith(f"{path}: cannot be read as an image")
    assert "replace the file" in caught.value.mend
    with pytest.raises(DataError, match="cannot be read as a mask") as caught:
        read_index_mask(path)
    assert "unlabeled" in caught.value.mend


def test_an_absent_file_is_a_data_error(tmp_path: Path) -> None:
    for read in (read_rgb, read_index_mask):
        with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
            read(tmp_path / "gone.png")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_short_anywhere_is_a_data_error_or_whole(
    tmp_path: Path, file_format: str
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, file_format)
    whole = buffer.getvalue()
    path = tmp_path / "a.img"
    refused = 0
    for size in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:size])
        try:
            assert read_rgb(path).size == (30, 20)
        except DataError:
            refused += 1
    assert refused >= 38  # all but the end mark is needed


def test_an_image_too_large_for_pillow_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(Image.fromarray(LABELS), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # refuses above twice that
    with pytest.raises(DataError, match=r"a\.png"):
        read_rgb(path)
    with pytest.raises(DataError, match=r"a\.png"):
        read_index_mask(path)


# ---------------------------------------------------------------- masks


def test_a_grey_mask_keeps_its_numbers(tmp_path: Path) -> None:
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    mask = read_index_mask(save(Image.fromarray(numbers), tmp_path / "a.png"))
    assert mask.mode == "L"
    np.testing.assert_array_equal(np.asarray(mask), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_an_indexed_mask_keeps_its_numbers_whatever_its_palette(tmp_path: Path, bits: int) -> None:
    numbers = RNG.integers(0, 2**bits, (16, 16)).astype(np.uint8)
    mask = read_index_mask(save(indexed(numbers), tmp_path / "a.png", bits=bits))
    assert mask.mode == "L"
    np.testing.assert_array_equal(np.asarray(mask), numbers)


def test_an_indexed_mask_with_transparency_keeps_its_numbers(tmp_path: Path) -> None:
    mask = read_index_mask(save(indexed(LABELS), tmp_path / "a.png", transparency=0))
    np.testing.assert_array_equal(np.asarray(mask), LABELS)


def test_a_grey_mask_of_4_bits_keeps_its_numbers_or_is_refused(tmp_path: Path) -> None:
    numbers = np.arange(16, dtype=np.uint8).reshape(2, 8)
    packed = b"".join(
        b"\0" + bytes(row[0::2] << 4 | row[1::2]) for row in numbers
    )  # a filter byte, then two pixels a byte
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 2, bits=4, colour_type=0, rows=packed))
    try:
        mask = read_index_mask(path)
    except DataError:
        return
    np.testing.assert_array_equal(np.asarray(mask), numbers)


@pytest.mark.parametrize(
    ("mode", "named"),
    [("RGB", "RGB"), ("RGBA", "RGBA"), ("1", "1"), ("LA", "LA"), ("I;16", "I;16")],
)
def test_a_mask_that_holds_no_class_numbers_is_refused_with_its_mode(
    tmp_path: Path, mode: str, named: str
) -> None:
    path = save(Image.new(mode, (8, 8)), tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        read_index_mask(path)
    assert caught.value.message == (
        f"{path}: a mask must hold class numbers (PNG of mode L or P), this one has mode {named}"
    )
    assert "8-bit index PNG" in caught.value.mend


@settings(deadline=None)
@given(ignore_index=st.integers(5, 255))
def test_ignore_index_becomes_ignore_and_classes_stay(ignore_index: int) -> None:
    mask = LABELS.copy()
    mask[3:6] = ignore_index
    inside = to_labels(mask, ignoring(ignore_index))
    assert inside.dtype == np.uint8
    assert (inside[3:6] == IGNORE).all()
    np.testing.assert_array_equal(np.delete(inside, [3, 4, 5], 0), np.delete(mask, [3, 4, 5], 0))


def test_mapping_ignore_index_leaves_the_original_alone() -> None:
    mask = np.full((2, 2), 200, np.uint8)
    to_labels(mask, ignoring(200))
    assert (mask == 200).all()


# ---------------------------------------------------------------- cutting


def painted(size: tuple[int, int], ignore_index: int) -> tuple[Image.Image, Image.Image]:
    """A random mask of `size` (width, height) with void, and an image that shows its numbers."""
    width, height = size
    mask = np.random.default_rng([width, height]).integers(0, 5, (height, width)).astype(np.uint8)
    mask[::7] = ignore_index
    return Image.fromarray(np.dstack([mask, mask, mask])), Image.fromarray(mask)


@settings(deadline=None)
@given(size=st.tuples(sides, sides), crop=crops)
def test_image_and_mask_are_cut_alike_to_the_pixel_when_not_scaled(
    size: tuple[int, int], crop: Crop
) -> None:
    crop = Crop(crop.height, crop.width, 1.0, crop.top, crop.left, crop.mirror)
    image, mask = painted(size, ignore_index=200)
    cut, labels = cut_image(image, crop), cut_mask(mask, crop, ignoring(200))
    valid = valid_pixels(size, crop)
    shown = np.where(labels == IGNORE, 200, labels)
    for channel in range(3):
        np.testing.assert_array_equal(cut[..., channel][valid], shown[valid])
    assert (cut[~valid] == PADDING_RGB).all()
    assert (labels[~valid] == IGNORE).all()


@settings(deadline=None)
@given(size=st.tuples(st.integers(16, 120), st.integers(16, 120)), crop=crops)
def test_image_and_mask_are_cut_alike_when_scaled(size: tuple[int, int], crop: Crop) -> None:
    """Each pixel shows its own place: red and the mask its column, green its row."""
    width, height = size
    scale = 0.5 + crop.scale % 1.5
    crop = Crop(crop.height, crop.width, scale, crop.top, crop.left, crop.mirror)
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    cut = cut_image(Image.fromarray(np.dstack([x, y, x])), crop).astype(int)
    columns = cut_mask(Image.fromarray(x), crop, ignoring(255)).astype(int)
    rows = cut_mask(Image.fromarray(y), crop, ignoring(255)).astype(int)
    valid = valid_pixels(size, crop)
    assert np.abs(cut[..., 0] - columns)[valid].max() <= 2
    assert np.abs(cut[..., 1] - rows)[valid].max() <= 2


@settings(deadline=None)
@given(size=st.tuples(sides, sides), crop=crops)
def test_any_crop_of_any_image_lies_within_it(size: tuple[int, int], crop: Crop) -> None:
    """A plain image stays plain: nothing from outside, nothing black at the edges."""
    image = Image.new("RGB", size, (7, 8, 9))
    cut = cut_image(image, crop)
    labels = cut_mask(Image.new("L", size, 3), crop, ignoring(200))
    valid = valid_pixels(size, crop)
    assert cut.shape == (crop.height, crop.width, 3)
    assert labels.shape == valid.shape == (crop.height, crop.width)
    assert (cut.dtype, labels.dtype, valid.dtype) == (np.uint8, np.uint8, np.bool_)
    assert valid.any()
    assert (cut[valid] == (7, 8, 9)).all()
    assert (labels[valid] == 3).all()
    assert (cut[~valid] == PADDING_RGB).all()
    assert (labels[~valid] == IGNORE).all()


@settings(deadline=None)
@given(size=st.tuples(sides, sides), crop=crops)
def test_what_is_cut_owns_its_memory_in_order(size: tuple[int, int], crop: Crop) -> None:
    """As torch wants it."""
    cuts = (
        cut_image(Image.new("RGB", size), crop),
        cut_mask(Image.new("L", size), crop, ignoring(255)),
        valid_pixels(size, crop),
    )
    for array in cuts:
        assert array.flags.c_contiguous
        assert array.flags.writeable


@settings(deadline=None)
@given(size=st.tuples(sides, sides), crop=crops)
def test_a_mirrored_crop_is_the_plain_one_turned_around(size: tuple[int, int], crop: Crop) -> None:
    image, mask = painted(size, ignore_index=200)
    plain = Crop(crop.height, crop.width, crop.scale, crop.top, crop.left, mirror=False)
    turned = Crop(crop.height, crop.width, crop.scale, crop.top, crop.left, mirror=True)
    np.testing.assert_array_equal(cut_image(image, turned), cut_image(image, plain)[:, ::-1])
    np.testing.assert_array_equal(
        cut_mask(mask, turned, ignoring(200)), cut_mask(mask, plain, ignoring(200))[:, ::-1]
    )
    np.testing.assert_array_equal(valid_pixels(size, turned), valid_pixels(size, plain)[:, ::-1])


def test_top_and_left_reach_both_ends_of_the_image() -> None:
    x = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    across, down = Image.fromarray(x), Image.fromarray(x.T.copy())
    first = Crop(32, 32, 1.0, 0.0, 0.0, mirror=False)
    last = Crop(32, 32, 1.0, np.nextafter(1, 0), np.nextafter(1, 0), mirror=False)
    assert (
        cut_mask(across, first, ignoring(255))[0, 0]
        == cut_mask(down, first, ignoring(255))[0, 0]
        == 0
    )
    assert (
        cut_mask(across, last, ignoring(255))[0, -1]
        == cut_mask(down, last, ignoring(255))[-1, 0]
        == 99
    )


def test_every_place_of_a_window_is_equally_likely() -> None:
    x = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(1, -1))
    lefts = [
        cut_mask(x, Crop(1, 32, 1.0, 0.0, left, mirror=False), ignoring(255))[0, 0]
        for left in np.linspace(0, 1, 400, endpoint=False)
    ]
    assert np.bincount(lefts).tolist() == [100, 100, 100, 100]


def test_padding_stands_right_and_below_and_moves_with_the_mirror() -> None:
    crop = Crop(6, 8, 1.0, 0.5, 0.5, mirror=False)
    valid = valid_pixels((5, 4), crop)
    assert valid[:4, :5].all()
    assert valid.sum() == 20
    turned = valid_pixels((5, 4), Crop(6, 8, 1.0, 0.5, 0.5, mirror=True))
    assert turned[:4, 3:].all()
    assert turned.sum() == 20


def test_padding_is_zero_once_normalised() -> None:
    from job.models.normalization import IMAGENET_MEAN, IMAGENET_STD

    normalised = (np.array(PADDING_RGB) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert np.abs(normalised).max() < 0.01


def test_masks_are_scaled_without_mixing_labels() -> None:
    mask = Image.fromarray(np.where(LABELS > 2, 4, 0).astype(np.uint8))
    for scale in (0.5, 0.77, 1.4):
        labels = cut_mask(mask, Crop(16, 16, scale, 0.3, 0.6, mirror=False), ignoring(200))
        assert set(np.unique(labels)) <= {0, 4, IGNORE}


# ---------------------------------------------------------------- drawing a crop


SCALES = (0.5, 1.5)


def draw(seed: int, **changes: object) -> Crop:
    switches = {"image_scale": 1.0, "scale_range": SCALES, "random_mirror": True} | changes
    return random_crop(np.random.default_rng(seed), (32, 40), **switches)  # type: ignore[arg-type]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_one_switch_does_not_change_what_another_draws(seed: int) -> None:
    both = draw(seed)
    no_scale, no_mirror = draw(seed, scale_range=None), draw(seed, random_mirror=False)
    assert {(crop.top, crop.left) for crop in (both, no_scale, no_mirror)} == {
        (both.top, both.left)
    }
    assert no_mirror.scale == both.scale
    assert no_scale.mirror == both.mirror
    assert no_scale.scale == 1.0
    assert no_mirror.mirror is False


def test_as_many_numbers_are_drawn_whatever_is_switched_on() -> None:
    following = set()
    for scale in (None, SCALES):
        for mirror in (False, True):
            rng = np.random.default_rng(5)
            random_crop(rng, (32, 32), image_scale=1, scale_range=scale, random_mirror=mirror)
            following.add(float(rng.random()))
    assert len(following) == 1


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), image_scale=st.floats(0.1, 4))
def test_a_drawn_crop_has_the_size_asked_for_and_a_scale_in_range(
    seed: int, image_scale: float
) -> None:
    crop = draw(seed, image_scale=image_scale)
    low, high = SCALES
    assert (crop.height, crop.width) == (32, 40)
    assert low * image_scale <= crop.scale <= high * image_scale
    assert 0 <= crop.top < 1
    assert 0 <= crop.left < 1
    assert draw(seed, image_scale=image_scale, scale_range=None).scale == image_scale


def test_about_every_second_crop_is_mirrored() -> None:
    assert 420 < sum(draw(seed).mirror for seed in range(1000)) < 580


def test_scales_are_spread_over_the_range() -> None:
    scales = [draw(seed).scale for seed in range(500)]
    assert min(scales) < 0.55
    assert max(scales) > 1.45
    assert 0.95 < np.mean(scales) < 1.05


# ---------------------------------------------------------------- whole images


def test_a_whole_image_at_scale_1_is_the_image_itself_in_memory_of_its_own() -> None:
    image = Image.fromarray(COLOURS)
    pixels = scaled_image(image, 1.0)
    np.testing.assert_array_equal(pixels, COLOURS)
    pixels[:] = 0
    assert np.asarray(image).any()


@settings(deadline=None)
@given(size=st.tuples(sides, sides), scale=st.floats(0.01, 4))
def test_a_whole_image_is_scaled_to_the_nearest_pixel_and_never_to_nothing(
    size: tuple[int, int], scale: float
) -> None:
    pixels = scaled_image(Image.new("RGB", size), scale)
    width, height = (max(1, round(side * scale)) for side in size)
    assert pixels.shape == (height, width, 3)
    assert pixels.flags.writeable
