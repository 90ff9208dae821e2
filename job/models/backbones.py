"""Dilated backbones: torchvision's ResNets, a tiny one, and timm's networks.

Shape legend: N batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from job.config import TIMM
from job.errors import ConfigError, reason

RESNETS: dict[str, Callable[..., Any]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
}
BACKBONES = ("tiny", *RESNETS)
DILATIONS = {8: {"layer3": 2, "layer4": 4}, 16: {"layer4": 2}}
"""By output stride, of the stages that no longer subsample."""


class Backbone(nn.Module):
    """Images in, features of an eighth or a sixteenth of their size out.

    Parameters carry torchvision's names, so that its state dicts load as they are.

    Args:
        name: one of `BACKBONES`.
        output_stride: 8 or 16: how many pixels of the image are one of the features.
        stride_in: convolution of a bottleneck block that subsamples: "3x3" (torchvision, V1.5), or
            "1x1" (Caffe and the S4GAN reference, V1). Weights must come from the same kind.

    Shape: float32 (N, 3, H, W) normalised -> features of the first stage, (N, `low_channels`, h, w)
    of about a quarter, and of the last one, (N, `out_channels`, h, w) (321 -> 81, and 41 or 21).
    """

    def __init__(self, name: str, output_stride: int = 8, stride_in: str = "3x3") -> None:
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
        self.low_channels: int = _width(source.layer1)
        # DeepLab's own: a pixel more at the border, so that 321 -> 161 -> 81 -> 41.
        if isinstance(self.maxpool, nn.MaxPool2d):
            self.maxpool.ceil_mode = True
        if stride_in == "1x1":
            _stride_into_1x1(self)
        # Every block of a stage is dilated, the first too. torchvision's own switch
        # (replace_stride_with_dilation) keeps the old dilation there, and refuses the basic
        # blocks of ResNet-18 and 34 altogether.
        for stage, dilation in DILATIONS[output_stride].items():
            _stride_to_dilation(getattr(self, stage), dilation=dilation)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the stem and the four layers."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        low: Tensor = self.layer1(features)
        features = low
        for layer in (self.layer2, self.layer3, self.layer4):
            features = layer(features)
        return low, features


class TimmBackbone(nn.Module):
    """A convolutional network of timm, as features of its stages.

    Args:
        name: timm's, without the "timm:" of the configuration.
        output_stride: 8 or 16.
        pretrained: with timm's weights, downloaded.

    Shape: as `Backbone`.

    Raises:
        ConfigError: timm is not installed, has no such network, or it has no such features; its
            weights cannot be had.
    """

    def __init__(self, name: str, output_stride: int = 8, *, pretrained: bool = False) -> None:
        super().__init__()
        timm = _timm()
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.partition('.')[0]}*")[:3]
            raise ConfigError(
                f"model.backbone {TIMM}{name}: timm {timm.__version__} has no such network",
                mend=f"for example {', '.join(near)}" if near else "see timm.list_models()",
            )
        try:
            self.body: Any = timm.create_model(
                name, features_only=True, output_stride=output_stride, pretrained=pretrained
            )
        # timm asserts, and raises whatever a network's own constructor does not take.
        except (TypeError, AssertionError, RuntimeError, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"model.backbone {TIMM}{name}: cannot give features at output stride "
                f"{output_stride} ({reason(error)})",
                mend="choose a ResNet, RegNet, EfficientNet or their like",
            ) from None
        except OSError as error:  # urllib, requests and huggingface_hub alike
            raise ConfigError(
                f"model.weights imagenet: timm could not get those of {name} ({reason(error)})",
                mend="connect to the network once, or give a file with --set model.weights=FILE",
            ) from None
        strides = self.body.feature_info.reduction()
        if 4 not in strides or strides[-1] != output_stride:
            raise ConfigError(
                f"model.backbone {TIMM}{name}: has features at strides {strides}; needed are 4 and "
                f"{output_stride}",
                mend="choose a ResNet, RegNet, EfficientNet or their like",
            )
        channels = self.body.feature_info.channels()
        self._low = strides.index(4)
        self.low_channels: int = channels[self._low]
        self.out_channels: int = channels[-1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the stage of stride 4, and of the last one."""
        features = self.body(images)
        return features[self._low], features[-1]


def make_backbone(name: str, output_stride: int, stride_in: str) -> Backbone | TimmBackbone:
    """The backbone of a name of the configuration, with random weights.

    Raises:
        ConfigError: as `TimmBackbone`.
    """
    if name.startswith(TIMM):
        return TimmBackbone(name.removeprefix(TIMM), output_stride)
    return Backbone(name, output_stride, stride_in)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError(
            "model.backbone timm:...: timm is not installed",
            mend="install it: pip install 's4gan-job[timm]', or choose one of "
            f"{', '.join(BACKBONES)}",
        ) from None
    return timm


def _width(stage: nn.Module) -> int:
    """Channels that a stage of a ResNet gives out."""
    last = list(stage.children())[-1]
    assert isinstance(last, BasicBlock | Bottleneck)
    final = last.conv3 if isinstance(last, Bottleneck) else last.conv2
    return int(final.out_channels)


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


def _stride_into_1x1(network: nn.Module) -> None:
    """Let a bottleneck subsample in its first convolution, as the networks of Caffe do."""
    for block in network.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
