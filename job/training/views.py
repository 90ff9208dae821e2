"""What the generator is shown of an image: other colours, and boxes of other images.

All that is drawn comes from NumPy on the host, so that it is the same on every device; all that is
computed stays on the device.

Shape legend: N batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

JITTER_SHARE = 0.8
JITTER = 0.5
"""Brightness, contrast and saturation change by a factor of 1 - JITTER to 1 + JITTER."""
HUE = 0.25
"""Turned by as much, of a full circle of 1."""
GREY_SHARE = 0.2
BLUR_SHARE = 0.5
BLUR_SIGMA = (0.1, 2.0)
"""Pixels. Source of the six: the published code of UniMatch (arXiv:2208.09910)."""

DISTORTION_SHARE = 0.5
DISTORTION_BRIGHTNESS = 0.125
DISTORTION_CONTRAST = 0.5
DISTORTION_SATURATION = 0.5
DISTORTION_HUE = 0.05
"""Source of the five: the defaults of torchvision's RandomPhotometricDistort, made for SSD."""

BOX_AREA = (0.02, 0.4)
"""Of the image."""
BOX_ASPECT = (0.3, 1 / 0.3)
"""Height over width. Source of both: as UniMatch draws the boxes of CutMix (arXiv:1905.04899)."""


def distorted(images_NCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """Random brightness, contrast, saturation and hue, each image by its own: for labeled ones.

    Shape: uint8 RGB (N, 3, H, W) -> the same.
    Source: Liu et al. 2016, arXiv:1512.02325; the contrast comes first or last, as there.
    """
    return torch.stack([_distorted(image, rng) for image in images_NCHW])


def _distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    # Everything is drawn whether it is used or not: one image does not move another's.
    brightness, contrast, saturation, hue = rng.random(4) < DISTORTION_SHARE
    contrast_first = rng.random() < 0.5
    by = rng.uniform(-1, 1, 4)
    if brightness:
        image = TF.adjust_brightness(image, 1 + DISTORTION_BRIGHTNESS * by[0])
    if contrast and contrast_first:
        image = TF.adjust_contrast(image, 1 + DISTORTION_CONTRAST * by[1])
    if saturation:
        image = TF.adjust_saturation(image, 1 + DISTORTION_SATURATION * by[2])
    if hue:
        image = TF.adjust_hue(image, DISTORTION_HUE * by[3])
    if contrast and not contrast_first:
        image = TF.adjust_contrast(image, 1 + DISTORTION_CONTRAST * by[1])
    return image


def changed_colours(images_NCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """Random brightness, contrast, saturation, hue, grey and blur, each image by its own.

    Shape: uint8 RGB (N, 3, H, W) -> the same.
    """
    return torch.stack([_changed(image, rng) for image in images_NCHW])


def _changed(image: Tensor, rng: np.random.Generator) -> Tensor:
    # Everything is drawn whether it is used or not: one image does not move another's.
    jitter, grey, blur = rng.random(3)
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, 3)
    hue = rng.uniform(-HUE, HUE)
    sigma = rng.uniform(*BLUR_SIGMA)
    if jitter < JITTER_SHARE:
        image = TF.adjust_brightness(image, brightness)
        image = TF.adjust_contrast(image, contrast)
        image = TF.adjust_saturation(image, saturation)
        image = TF.adjust_hue(image, hue)
    if grey < GREY_SHARE:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if blur < BLUR_SHARE:
        image = TF.gaussian_blur(image, _kernel(sigma), [sigma, sigma])
    return image


def _kernel(sigma: float) -> list[int]:
    """Odd, and wide enough for three standard deviations to each side."""
    size = 2 * max(1, round(3 * sigma)) + 1
    return [size, size]


@dataclass(frozen=True)
class Box:
    """Of pixels; empty if nothing is pasted."""

    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0


class Mix:
    """CutMix: into each image a box of the next one of the batch, at the same place.

    The same for everything that belongs to the images, so that images, labels and masks stay in
    step.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes

    @classmethod
    def drawn(
        cls, count: int, size: tuple[int, int], share: float, rng: np.random.Generator
    ) -> Mix:
        """Boxes for a batch.

        Args:
            count: N; of one image alone nothing can be mixed.
            size: H and W.
            share: of the images that get a box.
            rng: drawn from.
        """
        return cls([_box(size, share, rng) if count > 1 else Box() for _ in range(count)])

    @property
    def whole(self) -> list[bool]:
        """Of each image, whether nothing of another one is in it."""
        return [box.height == 0 for box in self._boxes]

    def __call__(self, values: Tensor) -> Tensor:
        """Shape: (N, ..., H, W) -> the same; the values given are left as they are."""
        if not any(box.height for box in self._boxes):
            return values
        mixed = values.clone()
        for index, box in enumerate(self._boxes):
            other = values[(index + 1) % len(self._boxes)]
            rows = slice(box.top, box.top + box.height)
            columns = slice(box.left, box.left + box.width)
            mixed[index, ..., rows, columns] = other[..., rows, columns]
        return mixed


def _box(size: tuple[int, int], share: float, rng: np.random.Generator) -> Box:
    """One that lies within the image, whatever its shape; everything is drawn in any case."""
    coin, area, top, left = rng.random(4)
    aspect = float(np.exp(rng.uniform(*np.log(BOX_ASPECT))))
    if coin >= share:
        return Box()
    pixels = (BOX_AREA[0] + (BOX_AREA[1] - BOX_AREA[0]) * area) * size[0] * size[1]
    height = min(size[0], max(1, round((pixels * aspect) ** 0.5)))
    width = min(size[1], max(1, round((pixels / aspect) ** 0.5)))
    return Box(
        top=int(top * (size[0] - height + 1)),
        left=int(left * (size[1] - width + 1)),
        height=height,
        width=width,
    )
