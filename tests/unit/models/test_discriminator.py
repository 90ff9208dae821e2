"""The discriminator and what it sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.dataset import IGNORE
from job.models.discriminator import (
    Discriminator,
    discriminator_input,
    discriminator_input_of_labels,
    one_hot_maps,
)


def class_maps(n: int, k: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(n, k, h, w).softmax(dim=1)


def all_valid(n: int, h: int, w: int) -> torch.Tensor:
    return torch.ones(n, h, w, dtype=torch.bool)


# ---------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("classes", "count"), [(21, 2_778_561), (60, 2_818_497), (19, 2_776_513)])
def test_parameter_counts_are_the_references(classes: int, count: int) -> None:
    with torch.device("meta"):
        discriminator = Discriminator(classes)
    assert sum(p.numel() for p in discriminator.parameters()) == count


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (33, 47), (321, 321), (513, 200)])
def test_any_crop_size_gives_one_logit_and_one_feature_vector_an_image(
    size: tuple[int, int],
) -> None:
    with torch.device("meta"):
        discriminator = Discriminator(3, channels=8)
        logits, features = discriminator(torch.zeros(2, 6, *size))
    assert logits.shape == (2,)
    assert features.shape == (2, 64)


def test_a_batch_of_one_keeps_its_dimension() -> None:
    logits, features = Discriminator(3, channels=8)(torch.rand(1, 6, 33, 47))
    assert logits.shape == (1,)
    assert features.shape == (1, 64)


def test_an_image_is_judged_by_itself() -> None:
    discriminator = Discriminator(3, channels=8).eval()
    images = torch.rand(4, 6, 33, 47)
    with torch.no_grad():
        together, features = discriminator(images)
        alone = [discriminator(image.unsqueeze(0)) for image in images]
    torch.testing.assert_close(together, torch.cat([logit for logit, _ in alone]))
    torch.testing.assert_close(features, torch.cat([feature for _, feature in alone]))


def test_no_part_of_a_large_crop_is_overlooked() -> None:
    # The reference pools a fixed window: of a larger crop it sees the top left corner only.
    discriminator = Discriminator(3, channels=8).eval()
    image = torch.rand(1, 6, 128, 128, requires_grad=True)
    discriminator(image)[0].sum().backward()
    touched = image.grad.abs().sum(dim=1)[0]
    for corner in (touched[:16, :16], touched[:16, -16:], touched[-16:, :16], touched[-16:, -16:]):
        assert corner.sum() > 0


def test_logits_are_a_linear_function_of_the_features_and_not_squashed() -> None:
    discriminator = Discriminator(3, channels=8).eval()
    with torch.no_grad():
        discriminator.classifier.bias.fill_(50.0)
        logits, features = discriminator(torch.rand(2, 6, 32, 32))
    torch.testing.assert_close(logits, features @ discriminator.classifier.weight[0] + 50)
    assert (logits > 40).all()


def test_dropout_acts_in_training_and_only_there() -> None:
    discriminator = Discriminator(3, channels=8)
    images = torch.rand(2, 6, 32, 32)
    with torch.no_grad():
        assert not torch.equal(discriminator(images)[0], discriminator(images)[0])
        discriminator.eval()
        assert torch.equal(discriminator(images)[0], discriminator(images)[0])


def test_the_last_features_are_not_dropped_out() -> None:
    discriminator = Discriminator(3, channels=8)
    with torch.no_grad():
        discriminator.convolutions[3].weight.zero_()
        discriminator.convolutions[3].bias.fill_(1.0)
        _, features = discriminator(torch.rand(2, 6, 32, 32))
    assert torch.equal(features, torch.ones(2, 64))


def test_every_parameter_gets_gradients() -> None:
    discriminator = Discriminator(3, channels=8).eval()
    discriminator(torch.rand(2, 6, 32, 32))[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters())


# ---------------------------------------------------------------------------- its input


def test_class_channels_come_first_then_the_image() -> None:
    maps, images = class_maps(2, 4, 5, 6), torch.rand(2, 3, 5, 6)
    seen = discriminator_input(maps, images, all_valid(2, 5, 6))
    assert seen.shape == (2, 7, 5, 6)
    assert torch.equal(seen[:, :4], maps)
    correlated = torch.corrcoef(torch.stack([seen[0, 4:].flatten(), images[0].flatten()]))
    assert correlated[0, 1] == pytest.approx(1)


def test_each_image_is_stretched_to_0_1_by_one_factor_for_its_three_channels() -> None:
    images = torch.tensor([[[[50.0, 100.0]], [[60.0, 110.0]], [[90.0, 250.0]]]])
    seen = discriminator_input(class_maps(1, 2, 1, 2), images, all_valid(1, 1, 2))
    wanted = torch.tensor([[[0.0, 50.0]], [[10.0, 60.0]], [[40.0, 200.0]]]) / 200
    torch.testing.assert_close(seen[0, 2:], wanted)


@given(
    low=st.floats(-1000, 1000, width=32),
    room=st.floats(0.125, 1000, width=32),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_the_stretched_image_spans_0_to_1_whatever_its_range(
    low: float, room: float, seed: int
) -> None:
    noise = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    seen = discriminator_input(torch.zeros(1, 2, 4, 5), low + room * noise, all_valid(1, 4, 5))
    assert float(seen[:, 2:].min()) == 0
    assert float(seen[:, 2:].max()) == pytest.approx(1)


def test_an_images_stretching_does_not_depend_on_the_rest_of_the_batch() -> None:
    maps, images = class_maps(3, 2, 8, 9), torch.rand(3, 3, 8, 9)
    images[1] *= 1000  # in the reference this would leave the others almost black
    images[2] -= 70
    together = discriminator_input(maps, images, all_valid(3, 8, 9))
    for i in range(3):
        alone = discriminator_input(maps[i : i + 1], images[i : i + 1], all_valid(1, 8, 9))
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("value", [0.0, 7.0, 255.0])
def test_a_constant_image_is_finite(value: float) -> None:
    seen = discriminator_input(
        class_maps(1, 2, 4, 4), torch.full((1, 3, 4, 4), value), all_valid(1, 4, 4)
    )
    assert torch.isfinite(seen).all()
    assert not seen[:, 2:].any()


def test_all_channels_are_blank_where_not_valid() -> None:
    valid = torch.rand(2, 8, 9) < 0.5
    seen = discriminator_input(class_maps(2, 2, 8, 9), torch.rand(2, 3, 8, 9) + 1, valid)
    holes = ~valid.unsqueeze(1).expand_as(seen)
    assert not seen[holes].any()
    sums = seen[:, :2].sum(dim=1)
    torch.testing.assert_close(sums[valid], torch.ones_like(sums[valid]))


def test_without_a_single_valid_pixel_all_is_blank_and_finite() -> None:
    seen = discriminator_input(
        class_maps(1, 2, 4, 4), torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    )
    assert torch.equal(seen, torch.zeros(1, 5, 4, 4))


def test_class_maps_pass_gradients_through_valid_pixels_only() -> None:
    maps = class_maps(1, 2, 4, 4).requires_grad_()
    valid = torch.rand(1, 4, 4) < 0.5
    discriminator_input(maps, torch.rand(1, 3, 4, 4), valid).sum().backward()
    assert torch.equal(maps.grad, valid.unsqueeze(1).expand_as(maps).float())


def test_what_an_invalid_pixel_shows_is_not_seen() -> None:
    images = torch.full((1, 3, 4, 4), 100.0)
    images[..., 1] = 150
    valid = all_valid(1, 4, 4)
    valid[..., 3] = False
    maps = class_maps(1, 2, 4, 4)
    before = discriminator_input(maps, images, valid)
    changed = images.clone()
    changed[..., 3] = 255  # a hole brighter than all that is visible
    torch.testing.assert_close(discriminator_input(maps, changed, valid), before)


def test_images_of_bytes_are_stretched_as_their_numbers() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 9), dtype=torch.uint8)
    maps, valid = class_maps(3, 2, 8, 9), torch.rand(3, 8, 9) < 0.5
    valid[2] = False
    expected = discriminator_input(maps, images.float(), valid)
    assert torch.equal(discriminator_input(maps, images, valid), expected)


# ---------------------------------------------------------------------------- labels


@pytest.mark.parametrize("classes", [2, 21])
def test_labels_are_seen_as_their_class_maps_would_be(classes: int) -> None:
    labels = torch.randint(0, classes, (3, 8, 9), dtype=torch.uint8)
    labels[0, :2] = IGNORE
    images = torch.randint(0, 256, (3, 3, 8, 9), dtype=torch.uint8)
    valid = torch.rand(3, 8, 9) < 0.7
    expected = discriminator_input(one_hot_maps(labels, classes), images, valid)
    assert torch.equal(discriminator_input_of_labels(labels, classes, images, valid), expected)


def test_one_hot_maps_are_zero_in_every_class_where_ignored() -> None:
    maps = one_hot_maps(torch.tensor([[[2, IGNORE, 0]]], dtype=torch.uint8), 3)
    assert maps.dtype == torch.float32
    assert maps[0, :, 0].T.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("classes", [2, 21, 255])
def test_one_hot_maps_equal_torchs_own_where_labeled(classes: int) -> None:
    truth = torch.randint(0, classes, (2, 7, 5), dtype=torch.uint8)
    truth[:, 0] = IGNORE
    maps = one_hot_maps(truth, classes)
    assert maps.shape == (2, classes, 7, 5)
    wanted = F.one_hot(truth[:, 1:].long(), classes).permute(0, 3, 1, 2).float()
    assert torch.equal(maps[:, :, 1:], wanted)
    assert not maps[:, :, 0].any()
