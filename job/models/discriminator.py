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
        self.dropout = nn.Dropout2d(DROPOUT, inplace=True)
        self.classifier = nn.Linear(widths[-1], 1)

    def forward(self, segmentation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (positive: looks real) and the pooled features that are matched."""
        features = segmentation
        if features.is_cuda:  # see the generator
            features = features.contiguous(memory_format=torch.channels_last)
        last = len(self.convolutions) - 1
        for index, convolution in enumerate(self.convolutions):
            features = convolution(features)
            if index < last:
                features = self.dropout(features)
            # After the dropout, which gives the same (a channel is doubled, or 0), so that both
            # write over what the convolution gave, and only that is kept for the way back.
            features = F.leaky_relu(features, LEAK, inplace=True)
        pooled = features.float().mean(dim=(2, 3))
        # What the gate and the losses look at closely is float32.
        with in_float32(pooled):
            return self.classifier(pooled).squeeze(1), pooled


def discriminator_input(class_maps: Tensor, images: Tensor, valid: Tensor) -> Tensor:
    """What the discriminator sees: class maps, then the image, blank where not valid.

    The image is stretched to 0..1 by the extremes of its own valid pixels, so that neither the rest
    of the batch nor what the holes hide can be read from its brightness. Blanking the same pixels
    in real and fake keeps "has a hole" from telling them apart.

    Shape: class_maps float (N, K, H, W), each pixel summing to 1; images (N, 3, H, W), any
    numbers; valid bool (N, H, W) -> (N, K+3, H, W).
    """
    hidden = ~valid.unsqueeze(1)
    seen = torch.cat([class_maps, _stretched(images, hidden)], dim=1)
    # Filled, not multiplied: with nothing valid the image may become infinite, and 0 * inf is NaN.
    return seen.masked_fill_(hidden, 0.0)


def discriminator_input_of_labels(
    labels_NHW: Tensor, num_classes: int, images: Tensor, valid: Tensor
) -> Tensor:
    """The same of labels, with `one_hot_maps` of them.

    Shape: labels uint8 (N, H, W), of K classes; images and valid as above -> (N, K+3, H, W).
    """
    hidden = ~valid.unsqueeze(1)
    count, height, width = labels_NHW.shape
    seen = torch.empty(count, num_classes + 3, height, width, device=images.device)
    # Each written once, where it is to be: maps of their own would be copied twice. K is no class.
    shown = labels_NHW.masked_fill(hidden.squeeze(1), num_classes)
    one_hot_maps(shown, num_classes, out=seen[:, :num_classes])
    seen[:, num_classes:] = _stretched(images, hidden).masked_fill_(hidden, 0.0)
    return seen


def one_hot_maps(labels_NHW: Tensor, num_classes: int, out: Tensor | None = None) -> Tensor:
    """Labels as class maps; labels that are no class are 0 in every class.

    Args:
        labels_NHW: of any K classes, and others.
        num_classes: K.
        out: where to write them.

    Shape: uint8 (N, H, W) -> float32 (N, K, H, W).
    """
    classes = torch.arange(num_classes, dtype=labels_NHW.dtype, device=labels_NHW.device)
    if out is None:
        count, height, width = labels_NHW.shape
        out = torch.empty(count, num_classes, height, width, device=labels_NHW.device)
    # Written once, as what they are to be: half the time of zeros that are filled in.
    return torch.eq(labels_NHW.unsqueeze(1), classes.view(-1, 1, 1), out=out)


@torch.no_grad()
def _stretched(images: Tensor, hidden: Tensor) -> Tensor:
    """Images to 0..1 by the extremes of what is not hidden; anything where they are hidden."""
    limits = torch.finfo if images.is_floating_point() else torch.iinfo
    most, least = limits(images.dtype).max, limits(images.dtype).min
    low = images.masked_fill(hidden, most).amin(dim=(1, 2, 3), keepdim=True).float()
    high = images.masked_fill(hidden, least).amax(dim=(1, 2, 3), keepdim=True).float()
    return (images - low).div_((high - low).clamp_min(1e-6))
