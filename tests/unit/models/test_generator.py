"""DeepLabv2: parameter count, shapes, all branches of the pyramid, frozen batch norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from job.models.generator import (
    ATROUS_RATES,
    RULED_OUT,
    Architecture,
    Generator,
    PyramidHead,
    ruled_out,
)


def test_resnet101_with_21_classes_has_the_papers_parameter_count() -> None:
    with torch.device("meta"):
        generator = Generator(Architecture("resnet101", 21))
    # 44,048,532: DeepLabv2 with all four branches.
    assert sum(p.numel() for p in generator.parameters()) == 44_048_532


def test_resnet101_trains_43943188_parameters_once_batch_norm_is_frozen() -> None:
    with torch.device("meta"):
        generator = Generator(Architecture("resnet101", 21))
    generator.freeze_batch_norm_affine()
    assert sum(p.numel() for p in generator.parameters() if p.requires_grad) == 43_943_188


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (41, 37), (64, 35)])
def test_logits_have_the_images_size(size: tuple[int, int]) -> None:
    logits = Generator(Architecture("tiny", 5))(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(321, 321), (333, 499), (320, 322)])
def test_logits_of_the_resnets_have_the_images_size(backbone: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        generator = Generator(Architecture(backbone, 21)).eval()
        assert generator(torch.zeros(1, 3, *size)).shape == (1, 21, *size)


def test_upsampling_puts_corners_on_corners() -> None:
    # 41 = 5 * 8 + 1 and 49 = 6 * 8 + 1: every 8th pixel is one feature's own.
    generator = Generator(Architecture("tiny", 3)).eval()
    images = torch.randn(1, 3, 41, 49)
    with torch.no_grad():
        small = generator.head(*generator.backbone(generator.normalize(images)))
        logits = generator(images)
    assert small.shape[-2:] == (6, 7)
    torch.testing.assert_close(logits[..., ::8, ::8], small)


def test_the_pyramid_has_the_four_rates_of_the_paper() -> None:
    head = PyramidHead(8, 3)
    assert ATROUS_RATES == (6, 12, 18, 24)
    assert [branch.dilation for branch in head.branches] == [(r, r) for r in ATROUS_RATES]


def test_the_pyramid_adds_up_all_its_branches() -> None:
    head = PyramidHead(8, 3)
    features = torch.randn(2, 8, 30, 27)
    wanted = sum(
        F.conv2d(features, branch.weight, branch.bias, padding=rate, dilation=rate)
        for branch, rate in zip(head.branches, ATROUS_RATES, strict=True)
    )
    torch.testing.assert_close(head(torch.empty(0), features), wanted)


def test_every_branch_of_the_pyramid_gets_gradients() -> None:
    # The reference returns from inside its loop, so that rates 18 and 24 never learn.
    generator = Generator(Architecture("tiny", 3))
    generator(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for branch in generator.head.branches:
        assert branch.weight.grad.abs().sum() > 0
        assert branch.bias.grad.abs().sum() > 0


def test_every_parameter_gets_gradients() -> None:
    generator = Generator(Architecture("tiny", 3))
    generator(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


def test_the_head_starts_small_and_without_bias() -> None:
    head = PyramidHead(512, 21)
    for branch in head.branches.requires_grad_(False):
        assert float(branch.weight.std()) == pytest.approx(0.01, rel=0.05)
        assert float(branch.weight.mean()) == pytest.approx(0, abs=1e-3)
        assert not branch.bias.any()


def test_backbone_and_head_parameters_are_all_each_once() -> None:
    generator = Generator(Architecture("tiny", 3))
    groups = [*generator.backbone_parameters(), *generator.head_parameters()]
    assert len({id(p) for p in groups}) == len(groups)
    assert {id(p) for p in groups} == {id(p) for p in generator.parameters()}


def test_freezing_fixes_scale_and_shift_of_every_batch_norm_and_nothing_else() -> None:
    generator = Generator(Architecture("tiny", 3))
    generator.freeze_batch_norm_affine()
    for module in generator.modules():
        own = list(module.parameters(recurse=False))
        frozen = isinstance(module, nn.BatchNorm2d)
        assert all(p.requires_grad is not frozen for p in own)
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 13
    trainable = sum(1 for p in generator.parameters() if p.requires_grad)
    given = [*generator.backbone_parameters(), *generator.head_parameters()]
    assert len(given) == trainable


def test_frozen_batch_norm_still_uses_and_follows_the_batch() -> None:
    generator = Generator(Architecture("tiny", 3))
    generator.freeze_batch_norm_affine()
    before = generator.backbone.bn1.running_mean.clone()
    images = torch.randn(2, 3, 32, 32)
    generator(images).sum().backward()
    assert not torch.equal(generator.backbone.bn1.running_mean, before)
    with torch.no_grad():
        features = generator.backbone.bn1(generator.backbone.conv1(images))
    torch.testing.assert_close(features.mean(dim=(0, 2, 3)), torch.zeros(24), atol=1e-5, rtol=0)
    assert generator.backbone.bn1.weight.grad is None


# ---------------------------------------------------------------------------- DeepLabv3+


def decoding(backbone: str = "tiny", **changes: Any) -> Generator:
    return Generator(Architecture(backbone, 5, head="deeplabv3plus", **changes))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("size", [(32, 32), (65, 97), (321, 321)])
def test_the_decoders_logits_have_the_images_size(stride: int, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        generator = decoding("resnet50", output_stride=stride)
        assert generator(torch.zeros(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize(("stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18])])
def test_the_decoders_pyramid_has_the_papers_rates(stride: int, rates: list[int]) -> None:
    with torch.device("meta"):
        head = decoding("resnet50", output_stride=stride).head
    dilations = [
        layer.dilation[0]
        for layer in head.pyramid.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    ]
    assert dilations == rates


def test_the_decoder_sees_the_low_level_features() -> None:
    generator = decoding().eval()
    low, features = generator.backbone(torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        one = generator.head(low, features)
        other = generator.head(low + 1, features)
    assert one.shape[-2:] == low.shape[-2:] == (16, 16)
    assert not torch.allclose(one, other)


def test_every_parameter_of_the_decoder_learns() -> None:
    generator = decoding()
    generator(torch.rand(2, 3, 64, 64) * 255).square().sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_pyramid_of_two_branches_is_what_the_reference_computes() -> None:
    generator = Generator(Architecture("tiny", 3, aspp_branches=2))
    assert [branch.dilation for branch in generator.head.branches] == [(6, 6), (12, 12)]


# ---------------------------------------------------------------------------- batch norm


def test_a_fixed_batch_norm_keeps_its_statistics_in_training() -> None:
    generator = decoding()
    generator.freeze_batch_norm()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    generator.train()
    generator(torch.rand(2, 3, 64, 64) * 255).sum().backward()
    moved = {
        name
        for name, value in generator.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved  # the head's go on
    assert all(name.startswith("head.") for name in moved)
    assert generator.backbone.bn1.weight.grad is None
    assert generator.head.decoder[0][1].weight.grad is not None


def test_a_fixed_batch_norm_is_fixed_after_an_evaluation_too() -> None:
    generator = decoding()
    generator.freeze_batch_norm()
    generator.eval()
    generator.train()
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
    in_backbone = [m for m in generator.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training for norm in in_backbone)
    assert all(norm.training for norm in norms if norm not in in_backbone)


def test_freezing_leaves_the_heads_batch_norm_alone() -> None:
    generator = decoding()
    generator.freeze_batch_norm_affine()
    assert all(p.requires_grad for p in generator.head.parameters())
    assert not generator.backbone.bn1.weight.requires_grad


# ----------------------------------------------------------------- which classes an image holds


def test_a_class_that_is_not_seen_is_ruled_out() -> None:
    logits = torch.tensor([[-3.0, -5.0, -4.0]]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    kept = ruled_out(logits, torch.tensor([[0.1, 0.9, 0.3]]), 0.2)
    # In the reference the first would get 0, and win.
    assert kept.argmax(dim=1).unique().tolist() == [2]
    assert kept[:, 1:].equal(logits[:, 1:])


def test_the_likeliest_class_stays_whatever_the_threshold() -> None:
    logits = torch.randn(2, 3, 4, 4)
    kept = ruled_out(logits, torch.tensor([[0.1, 0.05, 0.02], [0.3, 0.1, 0.4]]), 0.5)
    assert kept.argmax(dim=1).flatten(1).unique(dim=1).T.unique(dim=0).tolist() == [[0, 2]]


def test_classes_are_ruled_out_in_use_and_not_in_training() -> None:
    generator = Generator(Architecture("tiny", 3, mlmt_threshold=0.2))
    images = torch.rand(2, 3, 32, 32) * 255
    with torch.no_grad():
        generator.presence.bias.copy_(torch.tensor([5.0, -5.0, 5.0]))
        assert generator(images)[:, 1].min() > RULED_OUT
        generator.eval()
        logits, presence = generator.with_presence(images)
        used = generator(images)
    assert presence.shape == (2, 3)
    assert (used[:, 1] == RULED_OUT).all()
    assert torch.equal(used[:, ::2], logits[:, ::2])


def test_the_branch_is_trained_with_the_head() -> None:
    generator = Generator(Architecture("tiny", 3, mlmt_threshold=0.2))
    given = {id(p) for p in (*generator.backbone_parameters(), *generator.head_parameters())}
    assert given == {id(p) for p in generator.parameters()}
