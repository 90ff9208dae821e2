"""What is done to the numbers of an image before a network sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""RGB, of pixels in 0..1. Source: torchvision, "Models and pre-trained weights"."""


@dataclass(frozen=True)
class Normalization:
    """(pixel / 255 - mean) / std, each channel by itself, in the order the network takes them."""

    mean: tuple[float, float, float]
    """RGB, of pixels in 0..1."""
    std: tuple[float, float, float]
    """RGB."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order in which the network takes them."""


class Normalize(nn.Module):
    """A `Normalization` as a layer.

    Its numbers lie on the network's device: to bring them there for each batch would make the host
    wait for a GPU each time. They are no part of the state.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        for name, values in (("mean", normalization.mean), ("std", normalization.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self._is_bgr = normalization.channels == "bgr"

    def forward(self, images: Tensor) -> Tensor:
        """What a network takes.

        Shape: RGB of 0..255, uint8 or floating point (N, 3, H, W) -> floating point (N, 3, H, W).
        """
        normalized = (images.float() / 255).sub_(self.mean).div_(self.std)
        return normalized.flip(1) if self._is_bgr else normalized


_BYTE = (1 / 255, 1 / 255, 1 / 255)
_CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)
_CITYSCAPES_MEAN = (72.39239876 / 255, 82.90891754 / 255, 73.15835921 / 255)

NORMALIZATIONS = {
    # torchvision's and most of timm's weights.
    "imagenet": Normalization(IMAGENET_MEAN, IMAGENET_STD),
    # Some of timm's.
    "half": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # Weights converted from Caffe, DeepLab's own among them: 0..255 less the mean, blue first.
    "caffe": Normalization(_CAFFE_MEAN, _BYTE, "bgr"),
    # The S4GAN reference on VOC: Caffe's numbers, but red first, whatever its comment says.
    "reference-voc": Normalization(_CAFFE_MEAN, _BYTE),
    # The S4GAN reference on Cityscapes: less the mean of that set, over 255, blue first.
    "reference-cityscapes": Normalization(_CITYSCAPES_MEAN, (1.0, 1.0, 1.0), "bgr"),
}
"""By the values of `model.normalization`."""
