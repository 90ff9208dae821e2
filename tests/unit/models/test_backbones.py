"""Dilated backbones: output stride 8 everywhere, and torchvision's names."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from job.errors import ConfigError
from job.models.backbones import BACKBONES, RESNETS, Backbone, TimmBackbone


def shapes_only(name: str) -> Backbone:
    """A backbone without memory behind its tensors: shapes and names are the real ones."""
    with torch.device("meta"):
        return Backbone(name).eval()


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def test_the_resnets_make_41x41_features_of_the_papers_crop() -> None:
    sizes = {}
    for name in RESNETS:
        backbone = shapes_only(name)
        sizes[name] = tuple(backbone(torch.zeros(2, 3, 321, 321, device="meta"))[1].shape)
    assert sizes == {
        "resnet18": (2, 512, 41, 41),
        "resnet34": (2, 512, 41, 41),
        "resnet50": (2, 2048, 41, 41),
        "resnet101": (2, 2048, 41, 41),
    }


@pytest.mark.parametrize("name", RESNETS)
def test_the_stem_goes_321_161_81_as_deeplab_does(name: str) -> None:
    backbone = shapes_only(name)
    stem = backbone.bn1(backbone.conv1(torch.zeros(1, 3, 321, 321, device="meta")))
    assert stem.shape[-2:] == (161, 161)
    assert backbone.maxpool(stem).shape[-2:] == (81, 81)


@pytest.mark.parametrize("name", RESNETS)
def test_the_stem_gives_an_even_size_a_pixel_more_as_deeplab_does(name: str) -> None:
    backbone = shapes_only(name)
    assert backbone.maxpool(torch.zeros(1, 64, 160, 160, device="meta")).shape[-2:] == (81, 81)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(33, 33), (321, 321), (129, 65), (257, 41)])
def test_features_are_an_eighth_of_the_image(name: str, size: tuple[int, int]) -> None:
    backbone = shapes_only(name)
    _, features = backbone(torch.zeros(1, 3, *size, device="meta"))
    eighth = tuple(-(-side // 8) for side in size)
    assert features.shape == (1, backbone.out_channels, *eighth)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_smallest_crop_of_the_configuration_passes(name: str) -> None:
    _, features = shapes_only(name)(torch.zeros(1, 3, 32, 32, device="meta"))
    assert min(features.shape[-2:]) >= 4


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("stage", "dilation"), [("layer3", 2), ("layer4", 4)])
def test_every_block_of_the_last_two_stages_is_dilated_and_none_strided(
    name: str, stage: str, dilation: int
) -> None:
    blocks = list(getattr(shapes_only(name), stage))
    for block in blocks:
        assert isinstance(block, (BasicBlock, Bottleneck))
        wide = [layer for layer in convolutions(block) if layer.kernel_size == (3, 3)]
        assert len(wide) == (2 if isinstance(block, BasicBlock) else 1)
        assert {layer.dilation for layer in wide} == {(dilation, dilation)}
        assert {layer.padding for layer in wide} == {(dilation, dilation)}
        assert {layer.stride for layer in convolutions(block)} == {(1, 1)}


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("stage", ["layer1", "layer2"])
def test_the_first_two_stages_are_torchvisions(name: str, stage: str) -> None:
    with torch.device("meta"):
        original = RESNETS[name](weights=None)

    def geometry(net: nn.Module) -> list[tuple[object, ...]]:
        return [
            (layer.kernel_size, layer.stride, layer.dilation, layer.padding)
            for layer in convolutions(getattr(net, stage))
        ]

    assert geometry(shapes_only(name)) == geometry(original)


@pytest.mark.parametrize("name", RESNETS)
def test_tensors_have_torchvisions_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        original = RESNETS[name](weights=None).state_dict()
    wanted = {k: v.shape for k, v in original.items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in shapes_only(name).state_dict().items()} == wanted


def test_before_the_dilated_stages_values_are_torchvisions() -> None:
    backbone = Backbone("resnet18").eval()
    original = torchvision.models.resnet18(weights=None).eval()
    original.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        # Odd sizes: ceil mode changes nothing there.
        ours = backbone.layer2(backbone.layer1(backbone.maxpool(backbone.conv1(images))))
        theirs = original.layer2(original.layer1(original.maxpool(original.conv1(images))))
    assert torch.equal(ours, theirs)


def test_the_tiny_backbone_is_tiny() -> None:
    count = sum(p.numel() for p in Backbone("tiny").parameters())
    assert 300_000 < count < 700_000


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(33, 33), (321, 321), (129, 65)])
def test_at_output_stride_16_features_are_a_sixteenth(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = Backbone(name, 16).eval()
        low, features = backbone(torch.zeros(1, 3, *size))
    assert features.shape == (1, backbone.out_channels, *(-(-side // 16) for side in size))
    assert low.shape == (1, backbone.low_channels, *(-(-side // 4) for side in size))


@pytest.mark.parametrize("name", BACKBONES)
def test_low_features_are_those_of_the_first_stage(name: str) -> None:
    backbone = shapes_only(name)
    low, _ = backbone(torch.zeros(1, 3, 321, 321, device="meta"))
    assert low.shape == (1, backbone.low_channels, 81, 81)


def test_at_output_stride_16_only_the_last_stage_is_dilated() -> None:
    with torch.device("meta"):
        backbone = Backbone("resnet50", 16)
    assert {layer.dilation for layer in convolutions(backbone.layer3)} == {(1, 1)}
    wide = [layer for layer in convolutions(backbone.layer4) if layer.kernel_size == (3, 3)]
    assert {layer.dilation for layer in wide} == {(2, 2)}
    assert backbone.layer3[0].conv2.stride == (2, 2)


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_caffes_bottlenecks_subsample_in_their_first_convolution(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = Backbone(name, 16, "1x1"), Backbone(name, 16)
    for stage in ("layer2", "layer3"):
        first, other = getattr(ours, stage)[0], getattr(theirs, stage)[0]
        assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))
        assert (other.conv1.stride, other.conv2.stride) == ((1, 1), (2, 2))
        assert first.downsample[0].stride == (2, 2)
    for stage in ("layer1", "layer4"):
        assert {layer.stride for layer in convolutions(getattr(ours, stage))} == {(1, 1)}


def test_where_a_bottleneck_subsamples_changes_what_it_computes() -> None:
    ours, theirs = Backbone("resnet50", 8, "1x1").eval(), Backbone("resnet50", 8).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        one, other = (net(torch.randn(1, 3, 65, 65, generator=seeded())) for net in (ours, theirs))
    assert torch.equal(one[0], other[0])  # the first stage has no stride
    assert not torch.allclose(one[1], other[1])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---------------------------------------------------------------------------- timm


def test_a_network_of_timms_gives_features_at_both_strides() -> None:
    for name, stride in (("resnet26d", 8), ("resnet26d", 16), ("efficientnet_b0", 16)):
        backbone = TimmBackbone(name, stride).eval()
        with torch.no_grad():
            low, features = backbone(torch.randn(1, 3, 65, 97))
        assert low.shape[1:] == (backbone.low_channels, 17, 25)
        assert features.shape[1] == backbone.out_channels
        assert features.shape[2] == -(-65 // stride)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18x", "no such network"),
        ("vit_tiny_patch16_224", "strides|cannot give features"),
        ("vgg11", "cannot give features|strides"),
    ],
)
def test_a_network_of_timms_that_does_not_fit_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"timm:{name}.*({said})") as caught:
        TimmBackbone(name)
    assert caught.value.mend


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        TimmBackbone("resnet26d")
    assert "s4gan-job[timm]" in caught.value.mend


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError):
        Backbone("vgg16")
