"""The discriminator: does a segmentation look like one drawn by hand?

Shape legend: N batch, K classes, H/W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from job.models.precision import in_float32

LEAK = 0.2
DROPOUT = 0.5


class Discriminator(nn.Module):
    """Four strided convolutions, a global average, one logit an image.

    Pooling is global whatever the size of the crop (the reference pools a fixed 20x20 window, so
    that another crop either fails or is judged by its top left corner). No sigmoid: losses take
    logits, which stay exact far from zero.

    Args:
        num_classes: K.
        channels: of the first convolution; each of the next three doubles them.

    Shape: `discriminator_input` (N, K+3, H, W), H and W at least 16 -> logits (N,),
    features (N, 8 * channels).
    Source: Mittal et al. 2019, arXiv:1908.05724.
    """

    def __init__(self, num_classes: int, channels: int = 64) -> None:
        super().__init__()
        widths = (num_classes + 3, channels, 2 * channels, 4 * channels, 8 * channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1) for i in range(4)
        )
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Linear(widths[-1], 1)

    def forward(self, segmentation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (positive: looks real) and the pooled features that are matched."""
        features = segmentation
        if features.is_cuda:  # see the generator
            features = features.contiguous(memory_format=torch.channels_last)
        last = len(self.convolutions) - 1
        for index, convolution in enumerate(self.convolutions):
            features = F.leaky_relu(convolution(features), LEAK)
            if index < last:
                features = self.dropout(features)
        pooled = features.float().mean(dim=(2, 3))
        # What the gate and the losses look at closely is float32.
        with in_float32(pooled):
            return self.classifier(pooled).squeeze(1), pooled


def discriminator_input(class_maps: Tensor, images: Tensor, valid: Tensor) -> Tensor:
    """What the discriminator sees: class maps, then the image, blank where not valid.

    The image is stretched to 0..1 by the extremes of its own valid pixels, so that neither the rest
    of the batch nor what the holes hide can be read from its brightness. Blanking the same pixels
    in real and fake keeps "has a hole" from telling them apart.

    Shape: class_maps float (N, K, H, W), each pixel summing to 1; images float (N, 3, H, W), any
    range; valid bool (N, H, W) -> (N, K+3, H, W).
    """
    with torch.no_grad():
        hidden = ~valid.unsqueeze(1)
        low = images.masked_fill(hidden, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
        high = images.masked_fill(hidden, -torch.inf).amax(dim=(1, 2, 3), keepdim=True)
        scaled = (images - low) / (high - low).clamp_min(1e-6)
    # Filled, not multiplied: with nothing valid the extremes are infinite, and 0 * inf is NaN.
    return torch.cat([class_maps, scaled], dim=1).masked_fill(hidden, 0.0)
