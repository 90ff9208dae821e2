"""bfloat16 where it may be, float32 where it must be; on the CPU, which has both."""

from __future__ import annotations

import copy

import pytest
import torch

from job.training.precision import number_format
from job.training.state import TrainState
from job.training.step import StepLosses, train_step
from tests.unit.training.tiny import CPU, new_state, random_batch, tiny_config

MODERN = {
    "data__photometric_distortion": True,
    "data__strong_augment": True,
    "data__cutmix": 1.0,
    "train__ema_decay": 0.9,
    "model__head": "deeplabv3plus",
    "model__mlmt_threshold": 0.2,
}


def stepped(precision: str, **changes: object) -> tuple[TrainState, StepLosses]:
    config = tiny_config(train__precision=precision, **changes)
    state = new_state(config)
    state.discriminator.dropout.p = 0.0
    for iteration in (1, 2, 3):
        state.set_learning_rates(iteration, config)
        losses = train_step(state, random_batch(config, seed=iteration), config, iteration)
    return state, losses


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["guide", "modern"])
def test_bfloat16_computes_about_the_same(changes: dict[str, object]) -> None:
    plain, plain_losses = stepped("fp32", **changes)
    reduced, reduced_losses = stepped("bf16", **changes)
    for name, value in vars(plain_losses).items():
        other = getattr(reduced_losses, name)
        assert other.dtype == torch.float32 or name == "st_count"
        if name != "st_count":  # a score near the threshold may fall to its other side
            assert other.item() == pytest.approx(value.item(), rel=0.05, abs=0.003), name
    differences = [
        float((value - reduced.generator.state_dict()[name]).abs().max())
        for name, value in plain.generator.state_dict().items()
        if value.is_floating_point()
    ]
    assert 0 < max(differences) < 0.05


def test_weights_optimizers_and_statistics_stay_in_float32() -> None:
    state, _ = stepped("bf16", **MODERN)
    for network in (state.generator, state.discriminator, state.teacher):
        assert network is not None
        assert {v.dtype for v in network.state_dict().values() if v.is_floating_point()} == {
            torch.float32
        }
    for optimizer in (state.optimizer_G, state.optimizer_D):
        for values in optimizer.state.values():
            for value in values.values():
                assert not isinstance(value, torch.Tensor) or value.dtype == torch.float32


def test_what_the_losses_are_given_is_float32() -> None:
    state = new_state(tiny_config(model__mlmt_threshold=0.2, train__ema_decay=0.9))
    images = torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        low, features = state.generator.backbone(torch.rand(2, 3, 33, 47))
        logits, presence = state.generator.with_presence(images)
        scores, pooled = state.discriminator(torch.rand(2, 6, 33, 47))
    assert features.dtype == torch.bfloat16  # else this shows nothing
    assert presence is not None
    assert {t.dtype for t in (logits, presence, scores, pooled)} == {torch.float32}
    assert low.shape[0] == 2


def test_on_the_cpu_auto_is_float32() -> None:
    assert number_format(tiny_config().train, CPU) == torch.float32
    assert number_format(tiny_config(train__precision="bf16").train, CPU) == torch.bfloat16
    one, _ = stepped("auto")
    other, _ = stepped("fp32")
    wanted = other.generator.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in one.generator.state_dict().items())


def test_a_step_in_bfloat16_is_the_same_after_a_resume() -> None:
    config = tiny_config(train__precision="bf16")
    state = new_state(config)
    state.set_learning_rates(1, config)
    train_step(state, random_batch(config), config, 1)
    saved = copy.deepcopy(state.state_dict())
    other = new_state(tiny_config(train__precision="bf16", train__seed=3))
    other.load_state_dict(saved)
    for one in (state, other):
        one.set_learning_rates(2, config)
        train_step(one, random_batch(config, seed=2), config, 2)
    wanted = other.generator.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in state.generator.state_dict().items())
