"""What the networks are given of an image, against other people's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from job.data.images import PADDING_RGB
from job.models.normalization import IMAGENET_MEAN, IMAGENET_STD, NORMALIZATIONS, Normalize


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)


def test_imagenet_is_torchvisions(images: torch.Tensor) -> None:
    wanted = torch.stack([TF.normalize(x / 255, IMAGENET_MEAN, IMAGENET_STD) for x in images])
    torch.testing.assert_close(Normalize(NORMALIZATIONS["imagenet"])(images), wanted)


def test_caffes_is_blue_first_and_not_divided() -> None:
    image = Image.new("RGB", (1, 1), (200, 100, 50))
    bgr = np.asarray(image, np.float32)[0, 0, ::-1] - (104.00698793, 116.66876762, 122.67891434)
    given = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    seen = Normalize(NORMALIZATIONS["caffe"])(given).flatten()
    torch.testing.assert_close(seen, torch.tensor(bgr.copy(), dtype=torch.float32))


def test_the_references_voc_is_caffes_with_red_first(images: torch.Tensor) -> None:
    seen = Normalize(NORMALIZATIONS["reference-voc"])(images)
    torch.testing.assert_close(seen.flip(1), Normalize(NORMALIZATIONS["caffe"])(images))


def test_the_references_cityscapes_is_blue_first_and_small() -> None:
    given = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    seen = Normalize(NORMALIZATIONS["reference-cityscapes"])(given).flatten()
    wanted = [(50 - 73.15835921) / 255, (100 - 82.90891754) / 255, (200 - 72.39239876) / 255]
    torch.testing.assert_close(seen, torch.tensor(wanted))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_bytes_and_floats_give_the_same(name: str, images: torch.Tensor) -> None:
    one = Normalize(NORMALIZATIONS[name])
    assert torch.equal(one(images), one(images.float()))


@pytest.mark.parametrize("name", ["imagenet", "caffe", "reference-voc"])
def test_padding_is_almost_0(name: str) -> None:
    one = Normalize(NORMALIZATIONS[name])
    padding = torch.tensor(PADDING_RGB, dtype=torch.uint8).view(1, 3, 1, 1)
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert one(padding).abs().max() < 0.02 * one(white).abs().max()
