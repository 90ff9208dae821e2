"""Kinds of image files: what is told of them, and that it is what happens to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.data.dataset import Item
from job.data.formats import Formats, kind_of, reading_of
from job.data.images import ImageFacts, read_facts, read_rgb, read_rgb_and_facts
from job.errors import DataError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
ORIENTATION = 0x0112


def save(path: Path, image: Image.Image, *, orientation: int = 0, **options: Any) -> Path:
    if orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(path, **options)
    return path


def rgb16_png(path: Path, pixels: np.ndarray) -> Path:
    """A PNG of 16 bits a channel, which Pillow does not write; pixels uint16 (H, W, 3)."""
    from tests.unit.data.test_images import png

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(png(pixels.shape[1], pixels.shape[0], bits=16, colour_type=2, rows=rows))
    return path


def facts_of(path: Path) -> ImageFacts:
    _, facts = read_rgb_and_facts(path)
    header = read_facts(path)
    # The header tells the same, but for what only pixels can tell.
    assert (header.size, header.mode, header.bits) == (facts.size, facts.mode, facts.bits)
    assert header.has_alpha == facts.has_alpha
    return facts


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("mode", "ending", "kind"),
    [
        ("RGB", "png", "RGB"),
        ("RGB", "jpg", "RGB"),
        ("RGB", "webp", "RGB"),
        ("L", "png", "grey"),
        ("L", "jpg", "grey"),
        ("1", "png", "black and white"),
        ("LA", "png", "grey with alpha"),
        ("RGBA", "png", "RGB with alpha"),
        ("P", "png", "palette"),
        ("CMYK", "jpg", "CMYK"),
        ("I;16", "png", "grey of 16 bits"),
    ],
)
def test_the_kind_of_an_image_is_named(tmp_path: Path, mode: str, ending: str, kind: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(RNG.integers(0, 2**16, (20, 30)).astype(np.uint16))
    else:
        image = Image.fromarray(COLOURS).convert(mode)
    facts = facts_of(save(tmp_path / f"a.{ending}", image))
    assert kind_of(facts) == kind
    assert facts.size == (30, 20)
    assert facts.orientation == 1
    assert bool(reading_of(kind)) == (kind != "RGB")


def test_colours_of_16_bits_keep_their_upper_8(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 2**16, (20, 30, 3)).astype(np.uint16)
    path = rgb16_png(tmp_path / "a.png", pixels)
    assert kind_of(facts_of(path)) == "RGB of 16 bits"
    decoded = np.asarray(read_rgb(path)).astype(int)
    assert np.abs(decoded - pixels / 257).max() <= 1
    assert reading_of("RGB of 16 bits") == "the upper 8 bits are used"


@pytest.mark.parametrize("colour", [True, False])
def test_12_bits_in_16_are_dark_and_the_full_range_is_not(tmp_path: Path, colour: bool) -> None:
    full = RNG.integers(0, 2**16, (20, 30, 3)).astype(np.uint16)
    full[0] = 2**16 - 1
    for name, pixels, peak in (("full", full, 255), ("dark", full >> 4, 15)):
        path = tmp_path / f"{name}.png"
        if colour:
            rgb16_png(path, pixels)
        else:
            Image.fromarray(pixels[..., 0].copy()).save(path)
        assert facts_of(path).peak == peak


def test_an_opaque_alpha_channel_is_not_transparent(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS).convert("RGBA")
    assert not facts_of(save(tmp_path / "a.png", image)).is_transparent
    image.putpixel((4, 4), (1, 2, 3, 254))
    assert facts_of(save(tmp_path / "b.png", image)).is_transparent


def test_a_transparent_colour_is_seen_only_where_it_is_used(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((8, 8), 1, np.uint8))
    image.putpalette([9, 9, 9, 200, 200, 200])
    assert not facts_of(save(tmp_path / "a.png", image, transparency=0)).is_transparent
    used = facts_of(save(tmp_path / "b.png", image, transparency=1))
    assert used.is_transparent
    assert kind_of(used) == "palette with alpha"


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_told_and_not_followed(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    path = save(tmp_path / f"a.{ending}", Image.fromarray(COLOURS), orientation=orientation)
    facts = facts_of(path)
    assert facts.orientation == orientation
    assert read_facts(path).orientation == orientation
    assert facts.turned_size == ((20, 30) if orientation >= 5 else (30, 20))
    assert read_rgb(path).size == (30, 20)


def test_an_orientation_behind_the_pixels_of_a_png_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS), orientation=6)
    content = path.read_bytes()
    at = content.index(b"eXIf") - 4
    length = int.from_bytes(content[at : at + 4], "big") + 12
    chunk, rest = content[at : at + length], content[:at] + content[at + length :]
    end = rest.index(b"IEND") - 4
    path.write_bytes(rest[:end] + chunk + rest[end:])
    assert read_rgb_and_facts(path)[1].orientation == 6
    assert read_facts(path).orientation == 1  # which decodes nothing


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0garbage that is no TIFF", b"\xff" * 9]
)
def test_a_broken_exif_block_is_no_orientation(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(COLOURS).save(path, exif=exif)
    assert facts_of(path).orientation == 1


def test_an_orientation_that_does_not_exist_is_none(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.fromarray(COLOURS), orientation=9)
    assert facts_of(path).orientation == 1


def test_a_header_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("no image")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image") as caught:
        read_facts(path)
    assert caught.value.mend == "replace or remove it"


# ---------------------------------------------------------------- warnings


def item(name: str, *, mask: bool = True) -> Item:
    return Item(name, Path(f"{name}.png"), Path(f"m/{name}.png") if mask else None)


def facts(**changes: Any) -> ImageFacts:
    plain: dict[str, Any] = {
        "size": (30, 20),
        "mode": "RGB",
        "bits": 8,
        "orientation": 1,
        "has_alpha": False,
    }
    return ImageFacts(**(plain | changes))


def warned(*seen: tuple[Item, str, ImageFacts]) -> list[str]:
    formats = Formats()
    for one, part, its_facts in seen:
        formats.add(one, part, its_facts)
    return formats.warnings()


@pytest.mark.parametrize(
    "harmless",
    [
        {},
        {"mode": "L"},
        {"mode": "P"},
        {"mode": "I;16", "bits": 16},
        {"mode": "RGBA", "has_alpha": True},
        {"peak": 3},
    ],
    ids=str,
)
def test_what_is_read_as_it_looks_is_no_warning(harmless: dict[str, Any]) -> None:
    seen = [(item(f"i{index}"), "labeled", facts()) for index in range(3)]
    assert warned(*seen, (item("odd"), "labeled", facts(**harmless))) == []


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"is_transparent": True, "mode": "RGBA"}, "have transparent pixels (first: odd.png)"),
        ({"mode": "CMYK"}, "are CMYK, for printing (first: odd.png)"),
        ({"bits": 16, "peak": 15}, "have 16 bits and use 12 of them or fewer (first: odd.png)"),
        ({"orientation": 3}, "EXIF orientation that their mask's size cannot confirm (first: odd"),
        ({"orientation": 6, "size": (20, 20)}, "mask's size cannot confirm (first: odd.png)"),
        ({"orientation": 6}, "no mask or one that fits them as stored (first: odd.png)"),
    ],
)
def test_what_is_read_otherwise_is_a_warning(odd: dict[str, Any], said: str) -> None:
    (warning,) = warned((item("i"), "labeled", facts()), (item("odd"), "labeled", facts(**odd)))
    assert warning.startswith("1 of 2 images ")
    assert said in warning


def test_an_unlabeled_image_that_is_turned_has_no_mask_to_be_wrong() -> None:
    (warning,) = warned((item("odd", mask=False), "unlabeled", facts(orientation=3)))
    assert "no mask or one that fits them as stored" in warning


def test_parts_that_differ_in_colour_are_a_warning() -> None:
    (warning,) = warned(
        (item("a"), "labeled", facts(mode="L")),
        (item("b"), "unlabeled", facts()),
        (item("c"), "val", facts(mode="I;16", bits=16)),
    )
    assert warning.startswith("all labeled and val images are grey, all unlabeled images in colour")


def test_grey_images_throughout_are_no_warning() -> None:
    assert (
        warned((item("a"), "labeled", facts(mode="L")), (item("b"), "unlabeled", facts(mode="L")))
        == []
    )
