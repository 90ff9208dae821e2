"""A trained model as a module of torch, with all that it takes to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from job.data.images import Array, read_rgb, scaled_image, to_rgb
from job.errors import ConfigError, DataError
from job.models.files import ModelCard, load_generator
from job.models.generator import Generator
from job.tiles import classes_of
from job.training.protocols import PLAIN, Protocol
from job.training.tiling import MIN_TILE


class Model(nn.Module):
    """A generator that knows its classes and how an image is prepared for it.

    Shape: images RGB of 0..255, uint8 or floating point (N, 3, H, W), as `transforms` gives them ->
    logits (N, K, H, W), unbounded. Normalising is the network's own affair.
    """

    def __init__(self, generator: Generator, card: ModelCard, facts: dict[str, Any]) -> None:
        super().__init__()
        self.generator = generator
        self.card = card
        self.facts = facts
        """What else the file says: iteration, val_miou, run_id."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in index order."""
        return self.card.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """RGB of each class, 0..255."""
        return self.card.palette

    def forward(self, images: Tensor) -> Tensor:
        """Logits in the size of the images."""
        logits: Tensor = self.generator(images)
        return logits

    def transforms(self, image: Image.Image | Array | str | Path) -> Tensor:
        """What `forward` takes, but for the dimension of the batch: uint8 (3, H, W).

        Args:
            image: a picture, RGB of uint8 (H, W, 3), or a file's path; of any size.
        """
        scaled = scaled_image(_picture(image), self.card.image_scale)
        return torch.from_numpy(scaled).permute(2, 0, 1)

    def predict(
        self,
        image: Image.Image | Array | str | Path,
        protocol: Protocol = PLAIN,
        *,
        tile: int | None = None,
    ) -> Array:
        """The class of each pixel, at the image's own size; uint8 (H, W). As `s4gan predict`.

        Args:
            image: as for `transforms`.
            protocol: how it is looked at.
            tile: side of the tiles that the image goes through the network in, in pixels as the
                network sees them; None: of 1024 above 4 megapixels, and whole up to there.

        Raises:
            DataError: the file cannot be decoded.
            ConfigError: tiles are smaller than 64.
        """
        if tile is not None and tile < MIN_TILE:
            raise ConfigError(f"tile {tile}: is less than {MIN_TILE}")
        picture = _picture(image)
        training = self.generator.training
        self.generator.eval()
        try:
            device = next(self.generator.parameters()).device
            (classes,) = classes_of(
                self.generator, self.card, [picture], device, protocol, tile=tile
            )
        finally:
            self.generator.train(training)
        return classes


def load_model(weights: str | Path, device: str | torch.device | None = None) -> Model:
    """Read a model from `best_model.pth`, `final_model.pth` or what `s4gan export` made of one.

    Args:
        weights: path or s3:// URI.
        device: where it goes; the CPU if not said.

    Returns:
        Ready to predict (evaluation mode).

    Raises:
        ConfigError: not there, damaged, or not a model of this program.
    """
    return Model(*load_generator(weights, torch.device(device or "cpu"))).eval()


def _picture(image: Image.Image | Array | str | Path) -> Image.Image:
    if isinstance(image, (str, Path)):
        return read_rgb(Path(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(
                f"an array of {image.dtype} {image.shape} is no RGB image",
                mend="give uint8 of the shape (height, width, 3), or a PIL image",
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(
            f"{type(image).__name__} is no image", mend="give a path, an array or a PIL image"
        )
    return to_rgb(image)
