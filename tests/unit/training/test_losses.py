"""Every loss against numbers worked out by hand, and none of them ever NaN."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from job.config import LossConfig
from job.data.images import IGNORE
from job.training import losses
from job.training.losses import (
    cross_entropy,
    discriminator_loss,
    feature_matching,
    gate,
    gate_threshold,
    most_probable,
    presence,
    self_training,
)


def labels(*values: int) -> torch.Tensor:
    """One image of one row."""
    return torch.tensor([[values]], dtype=torch.uint8)


def logits_of(*pixels: tuple[float, ...]) -> torch.Tensor:
    """One image of one row; each pixel's logits."""
    return torch.tensor(pixels).T[None, :, None, :].clone().requires_grad_()


# ---------------------------------------------------------------------------- cross-entropy


def test_cross_entropy_is_the_mean_over_labeled_pixels() -> None:
    logits = logits_of((2.0, 0.0), (2.0, 0.0), (9.0, -9.0))
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    loss = cross_entropy(logits, labels(0, 1, IGNORE))
    assert loss.item() == pytest.approx((right + wrong) / 2)


def test_cross_entropy_of_equal_logits_is_log_k() -> None:
    logits = torch.zeros(2, 5, 4, 4)
    loss = cross_entropy(logits, torch.zeros(2, 4, 4, dtype=torch.uint8))
    assert loss.item() == pytest.approx(math.log(5))


def test_cross_entropy_weighs_pixels_not_images() -> None:
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]]], [[[4.0, 4.0]], [[0.0, 0.0]]]])
    truth = torch.tensor([[[0, 0]], [[1, IGNORE]]], dtype=torch.uint8)
    wanted = (2 * math.log(2) + math.log1p(math.exp(4))) / 3
    assert cross_entropy(logits, truth).item() == pytest.approx(wanted)


def test_cross_entropy_over_no_labeled_pixel_is_0_with_zero_gradient() -> None:
    # The reference gives NaN, and one such batch ends its training.
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ignored_pixels_get_no_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    truth = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    truth[:, 1] = IGNORE
    cross_entropy(logits, truth).backward()
    assert not logits.grad[:, :, 1].any()
    rest = logits.grad[:, :, [0, 2, 3]]
    assert (rest != 0).all()


def test_cross_entropy_equals_torchs_own_mean() -> None:
    logits = torch.randn(2, 3, 5, 6)
    truth = torch.randint(0, 3, (2, 5, 6), dtype=torch.uint8)
    truth[0, :2] = IGNORE
    wanted = F.cross_entropy(logits, truth.long(), ignore_index=IGNORE)
    torch.testing.assert_close(cross_entropy(logits, truth), wanted)


# ---------------------------------------------------------------------------- feature matching


def test_image_by_image_equals_torchs_own_mean_and_gradient() -> None:
    source = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(3, 5, 7, 6, generator=source)
    logits[0, 1] = 500  # all other probabilities of that image are 0, whose logarithm is no number
    labels = torch.randint(0, 5, (3, 7, 6), generator=source).to(torch.uint8)
    labels[1] = IGNORE
    labels[2, 2:4] = IGNORE
    ours, torchs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    share = 0.25
    (share * cross_entropy(ours, labels)).backward()
    wanted = F.cross_entropy(torchs, labels.long(), ignore_index=IGNORE)
    (share * wanted).backward()
    torch.testing.assert_close(cross_entropy(logits, labels), wanted.detach())
    torch.testing.assert_close(ours.grad, torchs.grad)


def test_feature_matching_is_the_mean_distance_of_the_mean_features() -> None:
    fake = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # mean 2, 3
    real = torch.tensor([[0.0, 10.0]])
    assert feature_matching(fake, real).item() == pytest.approx((2 + 7) / 2)


def test_feature_matching_of_equal_means_is_0_even_if_no_image_is_equal() -> None:
    fake = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    real = torch.tensor([[3.0, 2.0], [1.0, 4.0]])
    assert feature_matching(fake, real).item() == 0


def test_feature_matching_pulls_on_the_fake_features_alone() -> None:
    fake = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    real = torch.tensor([[0.0, 10.0]], requires_grad=True)
    feature_matching(fake, real).backward()
    # d/df of mean_c |mean_b f - r|: the sign over batch size and channels.
    assert torch.equal(fake.grad, torch.tensor([[0.25, -0.25], [0.25, -0.25]]))
    assert real.grad is None


# ---------------------------------------------------------------------------- the gate


def test_a_score_exactly_at_the_threshold_is_not_accepted() -> None:
    assert gate(torch.tensor([0.0]), 0.5).tolist() == [False]
    assert gate(torch.tensor([1e-3]), 0.5).tolist() == [True]
    assert gate(torch.tensor([-1e-3]), 0.5).tolist() == [False]


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_no_score_is_above_itself(values: list[float]) -> None:
    scores = torch.tensor(values)
    for index, probability in enumerate(scores.sigmoid().tolist()):
        accepted = gate(scores, probability)
        assert not accepted[index]
        assert accepted.tolist() == [p > probability for p in scores.sigmoid().tolist()]


def test_the_gate_compares_probabilities_not_logits() -> None:
    quarter = math.log(0.25 / 0.75)
    scores = torch.tensor([quarter - 0.01, quarter + 0.01, 0.2])
    assert gate(scores, 0.25).tolist() == [False, True, True]


def test_threshold_0_takes_all_and_1_takes_none() -> None:
    scores = torch.tensor([-50.0, 0.0, 50.0])
    assert gate(scores, 0.0).all()
    assert not gate(scores, 1.0).any()


@pytest.mark.parametrize(
    ("share", "accepted"),
    [
        (0.0, [False, False, True, False]),
        (0.25, [False, False, True, False]),
        (0.3, [False, True, True, False]),
        (0.75, [True, True, True, False]),
        (1.0, [True, True, True, True]),
    ],
)
def test_the_most_real_share_passes_a_gate_that_lets_nobody_pass(
    share: float, accepted: list[bool]
) -> None:
    scores = torch.tensor([-7.0, -6.0, 3.0, -9.0])
    assert gate(scores, 0.2, share).tolist() == accepted
    assert gate(scores, 1.0, share).sum() == math.ceil(4 * share)


def test_a_share_in_floating_point_is_no_image_more() -> None:
    assert gate(torch.full((10,), -9.0), 0.2, 0.7).sum() == 7


def test_the_gate_is_outside_the_graph() -> None:
    accepted = gate(torch.zeros(2, requires_grad=True), 0.2)
    assert accepted.dtype == torch.bool
    assert accepted.shape == (2,)
    assert not accepted.requires_grad


# ---------------------------------------------------------------------------- self-training


def self_trained(logits: Tensor, accepted: Tensor, valid: Tensor) -> Tensor:
    """With the own most likely class, and confidence in all."""
    return self_training(
        logits,
        logits.detach().argmax(dim=1),
        accepted[:, None, None] & valid,
        torch.ones_like(valid),
    )


def test_self_training_is_the_cross_entropy_with_the_own_most_likely_class() -> None:
    logits = logits_of((2.0, 0.0), (0.0, 1.0))
    loss = self_trained(logits, torch.tensor([True]), torch.ones(1, 1, 2, dtype=torch.bool))
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert loss.item() == pytest.approx(wanted)


def test_self_training_leaves_out_padding_and_refused_images() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, :, 2:] = False
    loss = self_trained(logits, torch.tensor([True, False]), valid)
    loss.backward()
    kept = logits[0, :, :, :2]
    wanted = F.cross_entropy(kept[None], kept[None].argmax(dim=1))
    torch.testing.assert_close(loss, wanted)
    assert not logits.grad[1].any()
    assert not logits.grad[0, :, :, 2:].any()
    assert (logits.grad[0, :, :, :2] != 0).all()


@pytest.mark.parametrize("why", ["none accepted", "none valid"])
def test_self_training_on_nothing_is_0_with_zero_gradient(why: str) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = self_trained(
        logits,
        torch.full((2,), why != "none accepted"),
        torch.full((2, 4, 4), why != "none valid"),
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@given(seed=st.integers(0, 2**16), count=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_masking_equals_selecting(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 4, 5, 6, generator=generator, requires_grad=True)
    accepted = torch.rand(count, generator=generator) < 0.5
    valid = torch.rand(count, 5, 6, generator=generator) < 0.8
    masked = self_trained(logits, accepted, valid)
    masked_gradient = torch.autograd.grad(masked, logits)[0]

    # As the reference does: pick images, then pixels; nothing picked gives no loss at all.
    chosen = logits[accepted].permute(0, 2, 3, 1)[valid[accepted]]
    if len(chosen) == 0:
        assert masked.item() == 0
        assert not masked_gradient.any()
        return
    selected = F.cross_entropy(chosen, chosen.argmax(dim=1))
    torch.testing.assert_close(masked, selected)
    torch.testing.assert_close(masked_gradient, torch.autograd.grad(selected, logits)[0])


def test_self_training_makes_the_prediction_more_certain() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    self_trained(logits, torch.tensor([True]), valid).backward()
    before = logits.detach()
    after = before - logits.grad
    assert (after.softmax(1).amax(1) > before.softmax(1).amax(1)).all()


def test_pixels_that_are_not_confident_count_as_0() -> None:
    logits = logits_of((2.0, 0.0), (0.0, 1.0))
    everything = torch.ones(1, 1, 2, dtype=torch.bool)
    confident = torch.tensor([[[True, False]]])
    loss = self_training(logits, torch.tensor([[[0, 1]]]), everything, confident)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)) / 2)
    loss.backward()
    assert not logits.grad[..., 1].any()


@pytest.mark.parametrize("size", [1.0, 70.0, 1e4, 1e30])
def test_cross_entropy_of_logits_of_any_size_is_torchs_own(size: float) -> None:
    noise = torch.Generator().manual_seed(0)
    logits = (size * torch.randn(3, 5, 6, 7, generator=noise)).requires_grad_()
    truth = torch.randint(0, 5, (3, 6, 7), dtype=torch.uint8, generator=noise)
    truth[:, 0] = IGNORE
    expected = F.cross_entropy(logits, truth.long(), ignore_index=IGNORE)
    (wanted,) = torch.autograd.grad(expected, logits)
    (found,) = torch.autograd.grad(cross_entropy(logits, truth), logits)
    torch.testing.assert_close(cross_entropy(logits, truth), expected)
    torch.testing.assert_close(found, wanted)


def test_the_most_probable_class_is_told_of_the_images_that_are_wanted() -> None:
    maps = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    wanted = torch.zeros(4, 6, 7, dtype=torch.bool)
    wanted[1, 2, 3] = True
    wanted[3] = True
    probability, labels = most_probable(maps, wanted)
    expected = maps.max(dim=1)
    for number in (1, 3):
        assert torch.equal(probability[number], expected.values[number])
        assert torch.equal(labels[number], expected.indices[number])


def test_of_equally_probable_classes_the_first_counts_and_nan_is_none() -> None:
    maps = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [math.nan] * 3]).T[None, :, None]
    probability, labels = most_probable(maps, torch.ones(1, 1, 3, dtype=torch.bool))
    assert labels.tolist() == [[[0, 1, IGNORE]]]
    assert probability.isnan().tolist() == [[[False, False, True]]]


def test_labels_may_come_from_somebody_else() -> None:
    logits = logits_of((2.0, 0.0), (0.0, 1.0))
    everything = torch.ones(1, 1, 2, dtype=torch.bool)
    loss = self_training(logits, torch.tensor([[[1, 1]]]), everything, everything)
    wanted = (math.log1p(math.exp(2)) + math.log1p(math.exp(-1))) / 2
    assert loss.item() == pytest.approx(wanted)


def test_the_threshold_comes_down_to_its_place() -> None:
    loss = LossConfig(threshold_st=0.2, st_start=100, gate_warmup=400)
    found = [gate_threshold(loss, iteration) for iteration in (1, 100, 200, 500, 501, 10**6)]
    assert found == pytest.approx([1, 1, 0.8, 0.2, 0.2, 0.2])


def test_without_a_warmup_the_threshold_stays() -> None:
    loss = LossConfig(threshold_st=0.6, st_start=100)
    assert {gate_threshold(loss, iteration) for iteration in (1, 100, 101, 10**6)} == {0.6}


# ---------------------------------------------------------- which classes an image holds


def test_presence_is_the_cross_entropy_with_the_classes_of_the_mask() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.0]])
    loss = presence(logits, labels(0, 0, IGNORE, 2))
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log(2)) / 3
    assert loss.item() == pytest.approx(wanted)


def test_an_image_without_a_label_says_nothing_of_what_it_holds() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    masks = torch.cat([labels(0, 1), labels(IGNORE, IGNORE)])
    loss = presence(logits, masks)
    loss.backward()
    assert loss.item() == pytest.approx(presence(logits[:1], masks[:1]).item())
    assert not logits.grad[1].any()
    assert presence(logits, torch.full_like(masks, IGNORE)).item() == 0


# ---------------------------------------------------------------------------- discriminator


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_a_guessing_discriminator_costs_log_2(truth: float) -> None:
    assert discriminator_loss(torch.zeros(4), truth).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("truth", "sign"), [(0.0, 1), (1.0, -1)])
def test_discriminator_loss_is_binary_cross_entropy(truth: float, sign: int) -> None:
    wanted = (math.log1p(math.exp(sign)) + math.log1p(math.exp(-2 * sign))) / 2
    assert discriminator_loss(torch.tensor([1.0, -2.0]), truth).item() == pytest.approx(wanted)


def test_discriminator_loss_pushes_fake_down_and_real_up() -> None:
    fake = torch.zeros(2, requires_grad=True)
    real = torch.zeros(2, requires_grad=True)
    (discriminator_loss(fake, 0.0) + discriminator_loss(real, 1.0)).backward()
    assert torch.equal(fake.grad, torch.full((2,), 0.25))
    assert torch.equal(real.grad, torch.full((2,), -0.25))


@pytest.mark.parametrize(("logit", "truth"), [(1000.0, 0.0), (-1000.0, 1.0)])
def test_a_discriminator_sure_of_the_wrong_thing_costs_much_but_not_infinity(
    logit: float, truth: float
) -> None:
    assert discriminator_loss(torch.tensor([logit]), truth).item() == pytest.approx(1000)


# ---------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_host", [True, False])
def test_what_a_void_pixel_says_does_not_matter(
    number: float, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_on_host", lambda _: on_host)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5)).to(torch.uint8)
    labels[0, 1, 2] = IGNORE
    wanted = cross_entropy(logits, labels).item()
    logits[0, :, 1, 2] = number
    assert cross_entropy(logits, labels).item() == pytest.approx(wanted)
    logits[0, 0, 0, 0] = math.nan
    assert cross_entropy(logits, labels).isnan()


def test_a_score_that_is_no_number_is_not_among_the_most_real() -> None:
    scores = torch.tensor([math.nan, 1.0, -5.0, math.inf])
    assert gate(scores, 0.5, 0.5).tolist() == [False, True, False, True]
    assert gate(scores, 1.0, 0.25).tolist() == [False, False, False, True]
