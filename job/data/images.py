"""Reading images and masks from files, and cutting the same random window out of both.

Inside the program a mask is uint8, of classes, and IGNORE for every pixel that counts for nothing:
void in the user's mask, and the padding of an image smaller than the crop. `to_labels` is the one
place where the values of a file become that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from job.data.dataset import IGNORE, DatasetInfo
from job.errors import DataError

Image.MAX_IMAGE_PIXELS = 500_000_000
"""Above it Pillow warns, and refuses above twice that: 3 GB of memory. Its own limit, a sixth, is
less than many an aerial image has, which `s4gan predict` cuts into tiles."""

PADDING_RGB = (124, 116, 104)
"""ImageNet's mean: padding is about 0 once normalised."""

Array = NDArray[np.uint8]

UNREADABLE = (
    OSError,  # absent, truncated, not an image (UnidentifiedImageError)
    ValueError,
    SyntaxError,  # what Pillow makes of a broken PNG chunk
    Image.DecompressionBombError,
)
"""What Pillow raises for a file it cannot decode."""

_PACKED_GREY = {"L;2": 3, "L;4": 15}
"""Largest value of grey PNGs of less than 8 bits; Pillow stretches it to 255."""

_ORIENTATION_TAG = 0x0112
_EXIF_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Where Pillow keeps what may hold an orientation; without any of them a PNG would be decoded."""


@dataclass(frozen=True)
class ImageFacts:
    """What an image file holds, before it became RGB of 8 bits."""

    size: tuple[int, int]
    """Width and height as stored."""
    mode: str
    """Pillow's: RGB, L (grey), P (palette), CMYK, ..."""
    bits: int
    """Of a channel: 8, or 16."""
    orientation: int
    """EXIF's, 1..8; 1 is upright. Source: EXIF 2.3, tag 0x0112."""
    has_alpha: bool
    """An alpha channel, or a transparent colour."""
    is_transparent: bool = False
    """Some pixel is not opaque; only known once it is decoded."""
    peak: int = 255
    """Largest value of any channel of the RGB image of 8 bits; only known once it is decoded."""

    @property
    def turned_size(self) -> tuple[int, int]:
        """Width and height as a viewer shows it."""
        return self.size[::-1] if self.orientation >= 5 else self.size


@dataclass(frozen=True)
class Crop:
    """A window of a scaled image, and whether it is mirrored."""

    height: int
    width: int
    scale: float
    top: float
    left: float
    """Place of the window, 0..1 of the room it has."""
    mirror: bool


def random_crop(
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    image_scale: float,
    scale_range: tuple[float, float] | None,
    random_mirror: bool,
) -> Crop:
    """Draw a crop of `size` (height, width).

    Args:
        rng: drawn from.
        size: of the crop.
        image_scale: of every image.
        scale_range: least and most of a random factor on top; None: there is none.
        random_mirror: whether every second one is mirrored.

    All random numbers are drawn whatever is switched on, so that one switch does not change what
    another one does.
    """
    factor, top, left, coin = rng.random(4)
    low, high = scale_range or (1.0, 1.0)
    return Crop(
        height=size[0],
        width=size[1],
        scale=image_scale * (low + (high - low) * float(factor)),
        top=float(top),
        left=float(left),
        mirror=random_mirror and bool(coin < 0.5),
    )


def read_rgb(path: Path) -> Image.Image:
    """Decode an image to RGB: colour, grey of 8 or 16 bits, palette, CMYK, with or without alpha.

    Of 16 bits the upper 8 stay; alpha is dropped, and the colours under it stay; CMYK is converted
    without its colour profile. Pixels stay where they are stored: an EXIF orientation is not
    followed, as nothing says which way a mask was drawn (`job.data.checks` warns).

    Raises:
        DataError: not an image, a damaged one, or one of floating point numbers.
    """
    return _read(path, look=False)[0]


def read_rgb_and_facts(path: Path) -> tuple[Image.Image, ImageFacts]:
    """As `read_rgb`, with what the file holds.

    Raises:
        DataError: as `read_rgb`.
    """
    image, facts = _read(path, look=True)
    assert facts is not None
    return image, facts


def read_facts(path: Path) -> ImageFacts:
    """What an image's header says; decodes no pixel.

    Raises:
        DataError: not an image.
    """
    try:
        with Image.open(path) as image:
            return _facts(image)
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read as an image ({error})", mend="replace or remove it"
        ) from None


def _read(path: Path, *, look: bool) -> tuple[Image.Image, ImageFacts | None]:
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise DataError(
                    f"{path}: holds floating point numbers, not colours",
                    mend="save it as an image of 8 or 16 bits",
                )
            # Before decoding, which forgets the bits; the orientation of a PNG may come after it.
            facts = _facts(image) if look else None
            rgb = to_rgb(image)
            if facts is not None:
                facts = dataclasses.replace(
                    facts,
                    orientation=_orientation(image),
                    is_transparent=facts.has_alpha and _is_transparent(image),
                    peak=max(high for _, high in rgb.getextrema()) if facts.bits > 8 else 255,  # type: ignore[misc]
                )
            return rgb, facts
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read as an image ({error})",
            mend="replace the file, or remove it with its mask",
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """As `read_rgb` does it, of an image that is open already."""
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits at 255 and leave a white image.
        grey = np.asarray(image, np.int64) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # what Pillow advises for them
    return image.convert("RGB")


def _facts(image: Image.Image) -> ImageFacts:
    tile = getattr(image, "tile", None)  # of every opened file, but not of every Image
    raw_mode = str(tile[0].args) if tile else ""
    deep = image.mode.startswith("I") or ";16" in raw_mode
    return ImageFacts(
        size=image.size,
        mode=image.mode,
        bits=16 if deep else 8,
        orientation=_orientation(image),
        has_alpha=image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info,
    )


def _orientation(image: Image.Image) -> int:
    if not any(key in image.info for key in _EXIF_KEYS):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # whatever a broken block makes of Pillow: viewers show such images upright
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _is_transparent(image: Image.Image) -> bool:
    alpha = image.convert("RGBA").getchannel("A").getextrema()
    return alpha[0] < 255  # type: ignore[operator]


def read_index_mask(path: Path) -> Image.Image:
    """Decode a mask; the result has mode L and holds the file's own values.

    Raises:
        DataError: not an image, damaged, or not an index mask.
    """
    try:
        with Image.open(path) as image:
            packed = _PACKED_GREY.get(str(image.tile[0].args)) if image.tile else None
            image.load()
            if image.mode not in ("L", "P"):
                raise DataError(
                    f"{path}: a mask must hold class numbers (PNG of mode L or P), "
                    f"this one has mode {image.mode}",
                    mend="save it as an 8-bit index PNG; a colour-coded mask must be converted",
                )
            # Not convert("L"): for mode P that would give the palette's brightness.
            numbers = np.asarray(image, dtype=np.uint8)
            return Image.fromarray(numbers // (255 // packed) if packed else numbers)
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read as a mask ({error})",
            mend="replace the file, or remove it: its image then counts as unlabeled",
        ) from None


def read_labels(path: Path, info: DatasetInfo) -> Array:
    """Decode a mask to classes and IGNORE; uint8, (height, width).

    Raises:
        DataError: as `read_index_mask`.
    """
    return to_labels(np.asarray(read_index_mask(path)), info)


def to_labels(mask: Array, info: DatasetInfo) -> Array:
    """What the values of a mask file mean: classes and IGNORE, in an array of its own."""
    # As fast as looking for ignore_index alone, and faster than an index of numpy's.
    labels = bytearray(mask.tobytes()).translate(info.lookup)
    return np.frombuffer(labels, np.uint8).reshape(mask.shape)


def cut_image(image: Image.Image, crop: Crop) -> Array:
    """Scale, cut, pad and mirror an image; uint8, (height, width, 3)."""
    window = _window(image, crop, Image.Resampling.BILINEAR)
    if window.shape[:2] == (crop.height, crop.width):
        return window.copy()  # Pillow's own memory is read-only
    canvas = _padding(crop.height, crop.width).copy()
    canvas[: window.shape[0], _columns(window, crop)] = window
    return canvas


def cut_mask(mask: Image.Image, crop: Crop, info: DatasetInfo) -> Array:
    """The same for a mask as the file has it, without mixing labels; uint8, (height, width)."""
    canvas = np.full((crop.height, crop.width), IGNORE, np.uint8)
    window = _window(mask, crop, Image.Resampling.NEAREST)
    canvas[: window.shape[0], _columns(window, crop)] = to_labels(window, info)
    return canvas


@lru_cache(maxsize=1)
def _padding(height: int, width: int) -> Array:
    """All padding; to copy it takes a tenth of the time that to write the colour takes."""
    return np.full((height, width, 3), PADDING_RGB, np.uint8)


def _columns(window: Array, crop: Crop) -> slice:
    """Where a window lies across its crop: what is mirrored has its padding to the left."""
    width = window.shape[1]
    return slice(crop.width - width, None) if crop.mirror else slice(0, width)


def valid_pixels(size: tuple[int, int], crop: Crop) -> NDArray[np.bool_]:
    """Where a crop of an image of `size` (width, height) is image and not padding."""
    valid = np.zeros((crop.height, crop.width), np.bool_)
    width, height = _scaled(size, crop.scale)
    valid[: min(height, crop.height), : min(width, crop.width)] = True
    return np.ascontiguousarray(valid[:, ::-1]) if crop.mirror else valid


def scaled_image(image: Image.Image, image_scale: float) -> Array:
    """A whole image as the network sees it in evaluation; uint8, (height, width, 3)."""
    if image_scale != 1.0:
        image = image.resize(_scaled(image.size, image_scale), Image.Resampling.BILINEAR)
    return np.array(image)  # a copy: torch wants to own writable memory


def _window(image: Image.Image, crop: Crop, resampling: Image.Resampling) -> Array:
    """What a crop shows of an image, mirrored if the crop is."""
    width, height = _scaled(image.size, crop.scale)
    visible = (min(width, crop.width), min(height, crop.height))
    left = int(crop.left * (width - visible[0] + 1))
    top = int(crop.top * (height - visible[1] + 1))
    # One resampling of just the window: Pillow maps `box`, in pixels of the original, onto it.
    across, down = image.width / width, image.height / height
    box = (
        left * across,
        top * down,
        min((left + visible[0]) * across, image.width),
        min((top + visible[1]) * down, image.height),
    )
    window = image.resize(visible, resampling, box=box)
    # By Pillow: numpy takes three times as long for both.
    if crop.mirror:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(window.convert("RGB") if window.mode == "RGBX" else window)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
