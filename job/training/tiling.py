"""Looking at a large image tile by tile, so that its size does not decide the memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from job.data.images import Array

TILED_ABOVE = 4_000_000
"""Pixels, as the network sees them: larger images go through it in tiles."""
TILE = 1024
MIN_TILE = 64
MARGIN = 192
"""All in pixels as the network sees them. What is predicted nearer to a tile's edge than the
margin is left to the neighbour, which sees what is around it: as far as DeepLabv2's widest branch
reaches, 24 positions of 8 pixels."""


def is_large(size: tuple[int, int], image_scale: float) -> bool:
    """Whether an image goes through the network in tiles.

    Args:
        size: width and height, before it is scaled.
        image_scale: of the model.
    """
    width, height = size
    return width * height * image_scale**2 > TILED_ABOVE


def tiled(
    image: Image.Image, image_scale: float, side: int, look: Callable[[Image.Image], Array]
) -> Array:
    """Predict an image tile by tile, so that its size does not decide the memory.

    Args:
        image: of any size.
        image_scale: of the model.
        side: of a tile, margin not included, in pixels as the network sees them.
        look: predicts a part of the image.
    """
    step = max(1, round(side / image_scale))
    margin = max(1, round(MARGIN / image_scale))
    classes = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, step):
        for left in range(0, image.width, step):
            bottom, right = min(top + step, image.height), min(left + step, image.width)
            around = (
                max(0, left - margin),
                max(0, top - margin),
                min(image.width, right + margin),
                min(image.height, bottom + margin),
            )
            found = look(image.crop(around))
            rows = slice(top - around[1], bottom - around[1])
            columns = slice(left - around[0], right - around[0])
            classes[top:bottom, left:right] = found[rows, columns]
    return classes
