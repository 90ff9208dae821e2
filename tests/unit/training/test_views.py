"""What the generator is shown of images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import RandomPhotometricDistort

from job.training.views import BOX_AREA, BOX_ASPECT, Box, Mix, _box, changed_colours, distorted


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(count: int = 3) -> torch.Tensor:
    """Smooth colours, so that a blur or a turn of hue shows."""
    rows = torch.linspace(0, 255, 40).view(1, 1, 40, 1)
    columns = torch.linspace(255, 0, 30).view(1, 1, 1, 30)
    image = torch.cat([rows + 0 * columns, 0 * rows + columns, (rows + columns) / 2], dim=1)
    return image.expand(count, 3, 40, 30).round().to(torch.uint8)


# ---------------------------------------------------------------------------- colours


View = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]
both = pytest.mark.parametrize("view", [changed_colours, distorted])


@both
def test_colours_change_and_shape_and_type_do_not(view: View) -> None:
    images = photo()
    before = images.clone()
    seen = view(images, rng())
    assert seen.shape == images.shape
    assert seen.dtype == torch.uint8
    assert not torch.equal(seen, images)
    assert torch.equal(images, before)


@both
def test_each_image_is_changed_by_its_own_numbers(view: View) -> None:
    seen = view(photo(6), rng(1))
    assert len({image.numpy().tobytes() for image in seen}) > 3


@both
def test_the_same_numbers_give_the_same_view(view: View) -> None:
    assert torch.equal(view(photo(), rng(3)), view(photo(), rng(3)))
    assert not torch.equal(view(photo(), rng(3)), view(photo(), rng(4)))


def test_some_are_grey_some_blurred_and_some_left_alone() -> None:
    noise = torch.randint(0, 256, (300, 3, 12, 12), dtype=torch.uint8)
    seen = changed_colours(noise, rng(5))
    grey = (seen[:, 0] == seen[:, 1]).all(dim=(1, 2)) & (seen[:, 1] == seen[:, 2]).all(dim=(1, 2))
    same = (seen == noise).all(dim=(1, 2, 3))
    assert 30 < grey.sum() < 95  # 20 %
    assert 8 < same.sum() < 45  # 0.2 * 0.8 * 0.5


def test_a_distortion_is_that_of_torchvision_without_swapped_channels() -> None:
    images = photo(200)
    torchs = RandomPhotometricDistort()
    draws = rng(6)
    wanted = []
    for image in images:
        used = draws.random(4) < torchs.p
        first = bool(draws.random() < 0.5)
        ranges = (torchs.brightness, torchs.contrast, torchs.saturation, torchs.hue)
        parameters: dict[str, object] = {
            f"{name}_factor": (low + high + (high - low) * by) / 2 if use else None
            for name, (low, high), by, use in zip(
                ("brightness", "contrast", "saturation", "hue"),
                ranges,
                draws.uniform(-1, 1, 4),
                used,
                strict=True,
            )
        }
        parameters |= {"contrast_before": first, "channel_permutation": None}
        wanted.append(torchs.transform(image, parameters))
    seen = distorted(images, rng(6))
    # A level apart at most: the factors are computed in another order.
    assert (seen.int() - torch.stack(wanted).int()).abs().max() <= 1
    alone = (seen == images).all(dim=(1, 2, 3)).sum()
    assert 3 < alone < 26  # 1 in 16


@both
def test_what_one_image_draws_does_not_move_the_next_ones(view: View) -> None:
    three, two = photo(3), photo(3).clone()
    two[0] = 0
    assert torch.equal(view(three, rng(7))[1:], view(two, rng(7))[1:])


# ---------------------------------------------------------------------------- boxes


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(1, 400),
    width=st.integers(1, 400),
)
def test_a_box_lies_within_the_image(seed: int, height: int, width: int) -> None:
    box = _box((height, width), 1.0, rng(seed))
    assert box.height > 0
    assert box.width > 0
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


def test_boxes_have_the_area_and_the_shapes_asked_for() -> None:
    boxes = [_box((300, 300), 1.0, rng(seed)) for seed in range(400)]
    areas = [box.height * box.width / 90_000 for box in boxes]
    shapes = [box.height / box.width for box in boxes]
    assert min(areas) > BOX_AREA[0] * 0.8
    assert max(areas) < BOX_AREA[1] * 1.02
    assert np.mean(areas) == pytest.approx(np.mean(BOX_AREA), abs=0.03)
    assert min(shapes) > BOX_ASPECT[0] * 0.95
    assert max(shapes) < BOX_ASPECT[1] * 1.05
    assert 0.4 < np.mean([shape > 1 for shape in shapes]) < 0.6


@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.0, 0, 0), (0.5, 420, 580), (1.0, 1000, 1000)]
)
def test_so_many_images_get_a_box(share: float, low: int, high: int) -> None:
    assert low <= sum(_box((32, 32), share, rng(seed)).height > 0 for seed in range(1000)) <= high


# ---------------------------------------------------------------------------- mixing


def test_a_box_comes_from_the_next_image_and_the_last_ones_from_the_first() -> None:
    values = torch.arange(3).view(3, 1, 1, 1).expand(3, 2, 4, 5).clone()
    mixed = Mix([Box(1, 2, 2, 3), Box(), Box(0, 0, 1, 1)])(values)
    wanted = values.clone()
    wanted[0, :, 1:3, 2:5] = 1
    wanted[2, :, 0, 0] = 0
    assert torch.equal(mixed, wanted)
    assert torch.equal(values[0], torch.zeros(2, 4, 5, dtype=torch.int64))


def test_images_labels_and_masks_stay_in_step() -> None:
    labels = torch.randint(0, 5, (4, 32, 40))
    images = labels.unsqueeze(1).repeat(1, 3, 1, 1).float()
    mix = Mix.drawn(4, (32, 40), 1.0, rng(2))
    assert not torch.equal(mix(labels), labels)
    assert torch.equal(mix(images)[:, 1], mix(labels).float())
    assert torch.equal(mix(labels > 2), mix(labels) > 2)


def test_an_image_alone_is_not_mixed() -> None:
    values = torch.rand(1, 3, 32, 32)
    assert torch.equal(Mix.drawn(1, (32, 32), 1.0, rng())(values), values)


def test_without_boxes_nothing_is_copied() -> None:
    values = torch.rand(2, 3, 32, 32)
    assert Mix.drawn(2, (32, 32), 0.0, rng())(values) is values
