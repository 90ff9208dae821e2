"""The generator: DeepLabv2, a dilated ResNet with an atrous spatial pyramid on top.

Shape legend: N batch, K classes, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from job.models.backbones import Backbone

ATROUS_RATES = (6, 12, 18, 24)
"""Source: Chen et al. 2017, arXiv:1606.00915, section 4.1 (ASPP-L). The S4GAN reference defines
four branches and by a slip uses the first two."""


class PyramidHead(nn.Module):
    """Four parallel dilated convolutions whose outputs are added up.

    Shape: (N, C, h, w) -> logits (N, K, h, w).
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate)
            for rate in ATROUS_RATES
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(branch.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Sum over the branches."""
        return torch.stack([branch(features) for branch in self.branches]).sum(dim=0)


class Generator(nn.Module):
    """Segmentation network.

    Args:
        backbone: a name of `BACKBONES`.
        num_classes: K.

    Shape: images float32 (N, 3, H, W), normalised -> logits (N, K, H, W), unbounded.
    """

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)
        self.head = PyramidHead(self.backbone.out_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits in the size of the images."""
        logits = self.head(self.backbone(images))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)

    def freeze_batch_norm_affine(self) -> None:
        """Fix scale and shift of every batch norm, as the reference does for pretrained nets.

        Statistics are still those of the batch in training, and running averages still move.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)
                module.bias.requires_grad_(False)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the backbone, each once."""
        return (p for p in self.backbone.parameters() if p.requires_grad)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the head, each once."""
        return (p for p in self.head.parameters() if p.requires_grad)
