"""Predicting images of any size: large ones tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from job.data.images import Array, scaled_image
from job.models.files import ModelCard
from job.models.generator import Generator
from job.training.evaluation import predict
from job.training.protocols import PLAIN, Protocol

TILED_ABOVE = 4_000_000
"""Pixels, as the network sees them: larger images go through it in tiles."""
TILE = 1024
MIN_TILE = 64
MARGIN = 192
"""All in pixels as the network sees them. What is predicted nearer to a tile's edge than the
margin is left to the neighbour, which sees what is around it: as far as DeepLabv2's widest branch
reaches, 24 positions of 8 pixels."""


def classes_of(
    generator: Generator,
    card: ModelCard,
    images: Sequence[Image.Image],
    device: torch.device,
    protocol: Protocol = PLAIN,
    *,
    tile: int | None = None,
) -> list[Array]:
    """The class of each pixel of images of one size, each uint8 (H, W).

    Args:
        generator: on `device`, in evaluation mode.
        card: of it.
        images: RGB; together in one batch, unless they go in tiles.
        device: where to compute.
        protocol: how an image, or a tile, is looked at.
        tile: side of a tile in pixels as the network sees them; None: TILE for images above
            TILED_ABOVE, and others go whole.
    """
    width, height = images[0].size

    def look(some: Sequence[Image.Image]) -> Array:
        scaled = np.stack([scaled_image(image, card.image_scale) for image in some])
        size = (some[0].height, some[0].width)
        classes = predict(generator, scaled, size, device, protocol)
        found: Array = classes.to(torch.uint8).cpu().numpy()
        return found

    if tile is not None or height * width * card.image_scale**2 > TILED_ABOVE:
        side = tile or TILE
        return [
            tiled(image, card.image_scale, side, lambda part: look([part])[0]) for image in images
        ]
    return list(look(images))


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
