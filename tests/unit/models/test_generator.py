"""DeepLabv2: parameter count, shapes, all branches of the pyramid, frozen batch norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from job.models.generator import ATROUS_RATES, Architecture, Generator, PyramidHead
from job.models.normalization import NORMALIZATIONS


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
        small = generator.head(*generator.backbone(NORMALIZATIONS["imagenet"].apply(images)))
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
