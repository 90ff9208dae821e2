"""Half precision where it may be, float32 where it must be; on the CPU, which has all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from job.errors import ConfigError
from job.training.precision import is_emulated, number_format
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
    for iteration in (1, 2):
        state.set_learning_rates(iteration, config)
        losses = train_step(state, random_batch(config, seed=iteration), config, iteration)
    return state, losses


HALF = pytest.mark.parametrize("half", ["bf16", "fp16"])


@HALF
@pytest.mark.parametrize("changes", [{}, MODERN], ids=["guide", "modern"])
def test_half_precision_computes_about_the_same(changes: dict[str, object], half: str) -> None:
    plain, plain_losses = stepped("fp32", **changes)
    reduced, reduced_losses = stepped(half, **changes)
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


@HALF
def test_weights_optimizers_and_statistics_stay_in_float32(half: str) -> None:
    state, _ = stepped(half, **MODERN)
    for network in (state.generator, state.discriminator, state.teacher):
        assert network is not None
        assert {v.dtype for v in network.state_dict().values() if v.is_floating_point()} == {
            torch.float32
        }
    for optimizer in (state.optimizer_G, state.optimizer_D):
        for values in optimizer.state.values():
            for value in values.values():
                assert not isinstance(value, torch.Tensor) or value.dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_what_the_losses_are_given_is_float32(half: torch.dtype) -> None:
    state = new_state(tiny_config(model__mlmt_threshold=0.2, train__ema_decay=0.9))
    images = torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8)
    with torch.autocast("cpu", half):
        low, features = state.generator.backbone(torch.rand(2, 3, 33, 47))
        logits, presence = state.generator.with_presence(images)
        scores, pooled = state.discriminator(torch.rand(2, 6, 33, 47))
    assert features.dtype == half  # else this shows nothing
    assert presence is not None
    assert {t.dtype for t in (logits, presence, scores, pooled)} == {torch.float32}
    assert low.shape[0] == 2


def test_on_the_cpu_auto_is_float32() -> None:
    assert number_format(tiny_config().train, CPU) == torch.float32
    assert number_format(tiny_config(train__precision="bf16").train, CPU) == torch.bfloat16
    assert number_format(tiny_config(train__precision="fp16").train, CPU) == torch.float16
    one, _ = stepped("auto")
    other, _ = stepped("fp32")
    wanted = other.generator.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in one.generator.state_dict().items())


@HALF
def test_a_step_in_half_precision_is_the_same_after_a_resume(half: str) -> None:
    config = tiny_config(train__precision=half)
    state = new_state(config)
    state.set_learning_rates(1, config)
    train_step(state, random_batch(config), config, 1)
    saved = copy.deepcopy(state.state_dict())
    other = new_state(tiny_config(train__precision=half, train__seed=3))
    other.load_state_dict(saved)
    for one in (state, other):
        one.set_learning_rates(2, config)
        train_step(one, random_batch(config, seed=2), config, 2)
    wanted = other.generator.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in state.generator.state_dict().items())


def networks_parameters(state: TrainState) -> list[torch.nn.Parameter]:
    return [*state.generator.parameters(), *state.discriminator.parameters()]


def test_each_weight_is_cast_once_an_iteration() -> None:
    class Casts(TorchDispatchMode):
        shapes: list[torch.Size]

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "_to_copy" in str(func) and (kwargs or {}).get("dtype") == torch.bfloat16:
                self.shapes.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    config = tiny_config(train__precision="bf16", train__accumulate=2)
    state = new_state(config)
    casts = Casts()
    casts.shapes = []
    with casts:
        train_step(state, random_batch(config), config, 1)
    weights = {p.shape for p in networks_parameters(state) if p.ndim == 4}
    for shape in weights:
        own = sum(p.shape == shape for p in networks_parameters(state))
        assert casts.shapes.count(shape) == own, shape


def test_the_scale_is_taken_out_of_all_gradients_again() -> None:
    def of(precision: str) -> list[torch.Tensor]:
        config = tiny_config(train__precision=precision, train__accumulate=2, loss__lambda_fm=1e3)
        state = new_state(config)
        state.discriminator.dropout.p = 0.0
        for optimizer in (state.optimizer_G, state.optimizer_D):
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        train_step(state, random_batch(config), config, 1)
        assert state.scaler.get_scale() == (65536 if precision == "fp16" else 1)
        return [p.grad for p in networks_parameters(state) if p.grad is not None]

    far = [
        float((half - single).norm() / single.norm())
        for half, single in zip(of("fp16"), of("fp32"), strict=True)
    ]
    assert max(far) < 0.25


def test_an_update_whose_gradients_overflow_is_left_out_and_the_scale_halved() -> None:
    config = tiny_config(train__precision="fp16")
    state = new_state(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy([p.detach() for p in networks_parameters(state)])
    losses = train_step(state, random_batch(config), config, 1)
    assert all(bool(value.isfinite()) for value in vars(losses).values())
    assert state.scaler.get_scale() == 2.0**39
    for now, then in zip(networks_parameters(state), before, strict=True):
        assert torch.equal(now, then)


def test_the_scale_goes_on_after_a_resume() -> None:
    config = tiny_config(train__precision="fp16")
    state = new_state(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for iteration in (1, 2):
        train_step(state, random_batch(config), config, iteration)
    other = new_state(config)
    other.load_state_dict(copy.deepcopy(state.state_dict()))
    train_step(other, random_batch(config), config, 3)
    assert other.scaler.state_dict()["scale"] == 2.0**10
    assert other.scaler.state_dict()["_growth_tracker"] == 3


@pytest.mark.parametrize("before", ["fp32", "of an older version"])
def test_float16_goes_on_from_a_state_without_a_scale(before: str) -> None:
    saved = new_state(tiny_config(train__precision="fp32")).state_dict()
    if before == "of an older version":
        del saved["scaler"]
    config = tiny_config(train__precision="fp16")
    state = new_state(config)
    state.load_state_dict(saved)
    train_step(state, random_batch(config), config, 1)
    assert state.scaler.get_scale() == 65536


def test_float32_goes_on_from_a_state_of_float16() -> None:
    state, _ = stepped("fp16")
    config = tiny_config(train__precision="fp32")
    other = new_state(config)
    other.load_state_dict(state.state_dict())
    train_step(other, random_batch(config), config, 3)
    assert other.scaler.state_dict() == {}


@pytest.mark.parametrize(
    ("name", "capability", "has_bf16", "wanted"),
    [
        ("NVIDIA L4", (8, 9), True, torch.bfloat16),
        ("Tesla T4", (7, 5), False, torch.float16),
        ("Tesla V100-SXM2-16GB", (7, 0), False, torch.float16),
        ("NVIDIA GeForce GTX 1660", (7, 5), False, torch.float32),
        ("Tesla P100-PCIE-16GB", (6, 0), False, torch.float32),
    ],
)
def test_auto_is_what_the_gpu_is_fast_in(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    has_bf16: bool,
    wanted: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    gpu = torch.device("cuda")
    assert number_format(tiny_config().train, gpu) == wanted
    assert number_format(tiny_config(train__precision="fp32").train, gpu) == torch.float32


def test_bfloat16_asked_of_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ConfigError, match="Tesla T4 does not have it") as caught:
        number_format(tiny_config(train__precision="bf16").train, torch.device("cuda"))
    assert "fp16" in caught.value.mend


@pytest.mark.parametrize(
    ("flags", "emulated"),
    [
        ("flags : fpu avx2 avx512f", {"bf16", "fp16"}),
        ("flags : fpu avx512f avx512_bf16", {"fp16"}),
        ("flags : fpu avx512_bf16 amx_bf16 avx512_fp16", set()),
        ("Features : fp asimd fphp asimdhp bf16", set()),
    ],
)
def test_a_cpu_without_units_for_a_format_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, emulated: set[str]
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr("job.training.precision._CPU_FACTS", facts)
    for name, number in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert is_emulated(number, CPU) == (name in emulated)
        assert not is_emulated(number, torch.device("cuda"))
    assert not is_emulated(torch.float32, CPU)
