"""The generator: a dilated backbone, and the head of DeepLabv2 or DeepLabv3+.

Shape legend: N batch, K classes, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from job.config import ModelConfig
from job.models.backbones import make_backbone
from job.models.normalization import NORMALIZATIONS, Normalization, Normalize
from job.models.precision import in_float32

ATROUS_RATES = (6, 12, 18, 24)
"""Of DeepLabv2. Source: Chen et al. 2017, arXiv:1606.00915, section 4.1 (ASPP-L)."""
ATROUS_RATES_V3 = {8: (12, 24, 36), 16: (6, 12, 18)}
"""By output stride. Source: Chen et al. 2017, arXiv:1706.05587, section 3.3."""
PYRAMID_CHANNELS = 256
LOW_CHANNELS = 48
"""Both of DeepLabv3+. Source: Chen et al. 2018, arXiv:1802.02611, sections 3.1 and 4.1."""


@dataclass(frozen=True)
class Architecture:
    """What it takes to build a generator anew; travels with every model file."""

    backbone: str
    """A name of `model.backbone`."""
    num_classes: int
    """K."""
    head: Literal["deeplabv2", "deeplabv3plus"] = "deeplabv2"
    aspp_branches: int = len(ATROUS_RATES)
    """Of DeepLabv2."""
    output_stride: Literal[8, 16] = 8
    stride_in: Literal["3x3", "1x1"] = "3x3"
    normalization: Normalization = NORMALIZATIONS["imagenet"]
    mlmt_threshold: float | None = None
    """Classes less probable in an image than this are ruled out; None: no branch says so."""

    @classmethod
    def of(cls, model: ModelConfig, num_classes: int) -> Architecture:
        """What a configuration asks for."""
        return cls(
            backbone=model.backbone,
            num_classes=num_classes,
            head=model.head,
            aspp_branches=model.aspp_branches,
            output_stride=model.output_stride,
            stride_in=model.stride_in,
            normalization=NORMALIZATIONS[model.normalization],
            mlmt_threshold=model.mlmt_threshold,
        )


class PyramidHead(nn.Module):
    """DeepLabv2: parallel dilated convolutions whose outputs are added up.

    Args:
        channels: C, of the backbone's last stage.
        num_classes: K.
        branches: how many of `ATROUS_RATES` there are.

    Shape: low-level features, which are not used; (N, C, h, w) -> logits (N, K, h, w).
    """

    def __init__(self, channels: int, num_classes: int, branches: int = len(ATROUS_RATES)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate)
            for rate in ATROUS_RATES[:branches]
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(branch.bias)  # type: ignore[arg-type]

    def forward(self, _low: Tensor, features: Tensor) -> Tensor:
        """Sum over the branches."""
        return torch.stack([branch(features) for branch in self.branches]).sum(dim=0)


class DecoderHead(nn.Module):
    """DeepLabv3+: a pyramid, then a decoder that sharpens it with low-level features.

    The pyramid is torchvision's. Its pooled branch sees one pixel an image, so in training a batch
    needs two images.

    Args:
        low_channels: of the backbone's first stage.
        channels: C, of its last one.
        num_classes: K.
        output_stride: of the backbone; decides the dilations.

    Shape: (N, `low_channels`, H/4, W/4), (N, C, h, w) -> logits (N, K, H/4, W/4).
    Source: Chen et al. 2018, arXiv:1802.02611, with plain instead of separable convolutions.
    """

    def __init__(
        self, low_channels: int, channels: int, num_classes: int, output_stride: Literal[8, 16]
    ) -> None:
        super().__init__()
        self.pyramid = ASPP(channels, list(ATROUS_RATES_V3[output_stride]), PYRAMID_CHANNELS)
        self.low = _convolution(low_channels, LOW_CHANNELS, kernel=1)
        self.decoder = nn.Sequential(
            _convolution(PYRAMID_CHANNELS + LOW_CHANNELS, PYRAMID_CHANNELS, kernel=3),
            _convolution(PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3),
            nn.Conv2d(PYRAMID_CHANNELS, num_classes, 1),
        )

    def forward(self, low: Tensor, features: Tensor) -> Tensor:
        """Decode the pyramid of `features` at the resolution of `low`."""
        pyramid = F.interpolate(
            self.pyramid(features), low.shape[-2:], mode="bilinear", align_corners=True
        )
        logits = self.decoder(torch.cat([pyramid, self.low(low)], dim=1))
        assert isinstance(logits, Tensor)
        return logits


def _convolution(channels_in: int, channels_out: int, *, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Generator(nn.Module):
    """Segmentation network, with the preparation of its images.

    Args:
        architecture: what it is made of.

    Shape: images RGB of 0..255, uint8 or floating point (N, 3, H, W) -> logits (N, K, H, W),
    unbounded.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = make_backbone(
            architecture.backbone, architecture.output_stride, architecture.stride_in
        )
        self.normalize = Normalize(architecture.normalization)
        self.head: PyramidHead | DecoderHead = (
            PyramidHead(
                self.backbone.out_channels, architecture.num_classes, architecture.aspp_branches
            )
            if architecture.head == "deeplabv2"
            else DecoderHead(
                self.backbone.low_channels,
                self.backbone.out_channels,
                architecture.num_classes,
                architecture.output_stride,
            )
        )
        self.presence = (
            None
            if architecture.mlmt_threshold is None
            else nn.Linear(self.backbone.out_channels, architecture.num_classes)
        )
        self._statistics_are_fixed = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits in the size of the images.

        In evaluation mode, classes that the branch of `mlmt_threshold` does not see are ruled out.
        """
        logits, presence = self.with_presence(images)
        if presence is None or self.training:
            return logits
        return ruled_out(logits, presence.sigmoid(), self.architecture.mlmt_threshold or 0.0)

    def with_presence(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits as they are, and those of which classes an image holds, (N, K), if it is asked."""
        normalized = self.normalize(images)
        if normalized.is_cuda:  # whose convolutions are faster so, in half precision above all
            normalized = normalized.contiguous(memory_format=torch.channels_last)
        low, features = self.backbone(normalized)
        # In float32 from here on, whatever the convolutions were computed in.
        logits = F.interpolate(
            self.head(low, features).float(),
            images.shape[-2:],
            mode="bilinear",
            align_corners=True,
        )
        presence = None
        if self.presence is not None:
            with in_float32(features):
                presence = self.presence(features.float().mean(dim=(2, 3)))
        return logits, presence

    def freeze_batch_norm_affine(self) -> None:
        """Fix scale and shift of the backbone's batch norms, as the reference does.

        Statistics are still those of the batch in training, and running averages still move.
        """
        for module in _batch_norms(self.backbone):
            module.weight.requires_grad_(False)
            module.bias.requires_grad_(False)

    def freeze_batch_norm(self) -> None:
        """Fix the backbone's batch norms altogether: statistics are the pretrained ones."""
        self.freeze_batch_norm_affine()
        self._statistics_are_fixed = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Generator:
        """As `nn.Module.train`; batch norms that are fixed stay in evaluation mode."""
        super().train(mode)
        if self._statistics_are_fixed:
            for module in _batch_norms(self.backbone):
                module.eval()
        return self

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the backbone, each once."""
        return (p for p in self.backbone.parameters() if p.requires_grad)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the head, each once."""
        heads = [self.head] if self.presence is None else [self.head, self.presence]
        return (p for head in heads for p in head.parameters() if p.requires_grad)


RULED_OUT = -1e4
"""A logit that no other falls below; finite in half precision, and so that differences are, too."""


def ruled_out(logits_NKHW: Tensor, presence_NK: Tensor, threshold: float) -> Tensor:
    """Logits without the classes that an image does not hold; its likeliest one always stays.

    Shape: logits unbounded; probabilities.
    Source: Mittal et al. 2019, arXiv:1908.05724, the MLMT branch. The reference multiplies logits
    by 0, which then may still exceed negative ones.
    """
    absent = (presence_NK < threshold) & (presence_NK < presence_NK.amax(dim=1, keepdim=True))
    return logits_NKHW.masked_fill(absent[:, :, None, None], RULED_OUT)


def _batch_norms(network: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
