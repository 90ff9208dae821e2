"""Predicting images of any size: large ones tile by tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from job.data.images import Array, scaled_image
from job.models.files import ModelCard
from job.models.generator import Generator
from job.training import tiling
from job.training.evaluation import predict, predict_in_tiles
from job.training.protocols import PLAIN, Protocol


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
        tile: side of a tile in pixels as the network sees them; None: large images go in tiles,
            others whole.
    """
    if tile is not None or tiling.is_large(images[0].size, card.image_scale):
        return [
            predict_in_tiles(generator, image, card.image_scale, device, protocol, tile)
            for image in images
        ]
    width, height = images[0].size
    scaled = np.stack([scaled_image(image, card.image_scale) for image in images])
    classes = predict(generator, scaled, (height, width), device, protocol)
    return list(classes.to(torch.uint8).cpu().numpy())
