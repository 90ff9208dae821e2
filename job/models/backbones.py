"""Dilated backbones of output stride 8, built from torchvision's ResNets.

Shape legend: N batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

RESNETS: dict[str, Callable[..., Any]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
}
BACKBONES = ("tiny", *RESNETS)


class Backbone(nn.Module):
    """Images in, features of an eighth of their size out.

    Parameters carry torchvision's names, so that its state dicts load as they are.
    Shape: float32 (N, 3, H, W) normalised -> (N, `out_channels`, h, w) with h and w about an
    eighth (321 -> 41).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        source = _tiny() if name == "tiny" else RESNETS[name](weights=None)
        self.conv1: nn.Module = source.conv1
        self.bn1: nn.Module = source.bn1
        self.relu: nn.Module = source.relu
        self.maxpool: nn.Module = source.maxpool
        self.layer1: nn.Module = source.layer1
        self.layer2: nn.Module = source.layer2
        self.layer3: nn.Module = source.layer3
        self.layer4: nn.Module = source.layer4
        self.out_channels: int = source.fc.in_features
        # DeepLab's own: a pixel more at the border, so that 321 -> 161 -> 81 -> 41.
        if isinstance(self.maxpool, nn.MaxPool2d):
            self.maxpool.ceil_mode = True
        # Every block of a stage is dilated, the first too. torchvision's own switch
        # (replace_stride_with_dilation) keeps the old dilation there, and refuses the basic
        # blocks of ResNet-18 and 34 altogether.
        _stride_to_dilation(self.layer3, dilation=2)
        _stride_to_dilation(self.layer4, dilation=4)

    def forward(self, images: Tensor) -> Tensor:
        """Run the stem and the four layers."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = layer(features)
        assert isinstance(features, Tensor)
        return features


def _tiny() -> Any:
    """A ResNet of one narrow basic block a stage, 0.5 million parameters, for CPUs."""
    widths = (24, 32, 64, 96, 96)
    net = nn.Module()
    net.conv1 = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
    net.bn1 = nn.BatchNorm2d(widths[0])
    net.relu = nn.ReLU(inplace=True)
    net.maxpool = nn.Identity()
    for index, stride in enumerate((2, 2, 2, 1)):
        net.add_module(f"layer{index + 1}", _stage(widths[index], widths[index + 1], stride))
    net.fc = nn.Linear(widths[-1], 1)
    return net


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
        nn.BatchNorm2d(channels_out),
    )
    return nn.Sequential(BasicBlock(channels_in, channels_out, stride, shortcut))


def _stride_to_dilation(stage: nn.Module, *, dilation: int) -> None:
    """Keep a stage's field of view without its subsampling (Chen et al. 2017, arXiv:1606.00915)."""
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
            if layer.kernel_size == (3, 3):
                layer.dilation = (dilation, dilation)
                layer.padding = (dilation, dilation)
