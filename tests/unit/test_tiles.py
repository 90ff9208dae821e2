"""Tiles cover an image, each with what is around it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from job.training.tiling import MARGIN, tiled


def by_place(image: Image.Image) -> np.ndarray:
    """A network that looks at nothing but the pixel: its red."""
    return np.asarray(image)[..., 0].copy()


@pytest.mark.parametrize("side", [64, 100, 128, 1000])
@pytest.mark.parametrize("image_scale", [1.0, 0.5])
def test_tiles_cover_every_pixel_once(side: int, image_scale: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (301, 217, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(tiled(image, image_scale, side, by_place), pixels[..., 0])


def test_a_tile_sees_what_is_around_it_and_no_more() -> None:
    sizes = []

    def look(part: Image.Image) -> np.ndarray:
        sizes.append(part.size)
        return by_place(part)

    tiled(Image.new("RGB", (1000, 300)), 1.0, 400, look)
    assert sizes == [(400 + MARGIN, 300), (400 + 2 * MARGIN, 300), (200 + MARGIN, 300)]
