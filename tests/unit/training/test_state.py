"""What a state holds, how it is saved and brought back to the bit, and what it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from job.checkpoint.manager import BestModel
from job.errors import ConfigError
from job.models.generator import Architecture, Generator
from job.training.state import TrainState, new_train_state
from job.training.step import StepLosses, train_step
from tests.unit.training.tiny import CLASSES, CPU, new_state, random_batch, tiny_config

BEST = BestModel(id="000000003-a0001-abcdef", iteration=3, val_miou=0.5)


def same(one: Any, other: Any) -> bool:
    """Equality to the bit of nested dictionaries, sequences, tensors and plain values."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def through_a_file(state: TrainState, folder: Path) -> dict[str, Any]:
    torch.save(state.state_dict(), folder / "state.pth")
    loaded: dict[str, Any] = torch.load(folder / "state.pth", weights_only=True)
    return loaded


def trained_state(steps: int = 2, **changes: Any) -> TrainState:
    config = tiny_config(**changes)
    state = new_state(config)
    for iteration in range(1, steps + 1):
        state.set_learning_rates(iteration, config)
        train_step(state, random_batch(config, seed=iteration), config, iteration)
        state.iteration = iteration
    return state


# ---------------------------------------------------------------------------- saving and loading


def test_everything_comes_back_from_a_file(tmp_path: Path) -> None:
    state = trained_state()
    state.evaluated_iteration = 1
    state.best = BEST
    state.unreadable = {"b.png", "a.png"}
    state.run_facts = {"run_id": "abc"}
    saved = through_a_file(state, tmp_path)
    assert saved["run"] == {"run_id": "abc"}

    other = new_state(tiny_config(train__seed=5))
    other.load_state_dict(saved)
    assert other.iteration == 2
    assert other.evaluated_iteration == 1
    assert other.best == BEST
    assert other.unreadable == {"a.png", "b.png"}
    other.run_facts = state.run_facts
    assert same(other.state_dict(), state.state_dict())


def test_a_teacher_comes_back_from_a_file(tmp_path: Path) -> None:
    state = trained_state(train__ema_decay=0.9)
    assert not same(state.teacher.state_dict(), state.generator.state_dict())
    other = new_state(tiny_config(train__ema_decay=0.9, train__seed=5))
    other.load_state_dict(through_a_file(state, tmp_path))
    assert same(other.state_dict(), state.state_dict())
    assert other.predictor is other.teacher
    assert not any(p.requires_grad for p in other.teacher.parameters())


def test_a_teacher_that_a_run_did_not_begin_with_starts_as_its_generator(tmp_path: Path) -> None:
    state = trained_state()
    other = new_state(tiny_config(train__ema_decay=0.9))
    other.load_state_dict(through_a_file(state, tmp_path))
    assert same(other.teacher.state_dict(), state.generator.state_dict())


def test_without_a_teacher_the_generator_is_what_is_used() -> None:
    state = new_state(tiny_config())
    assert state.predictor is state.generator
    assert "teacher" not in state.state_dict()


@pytest.mark.parametrize(
    ("wish", "scale_learns", "statistics_move"),
    [("trained", True, True), ("affine_frozen", False, True), ("frozen", False, False)],
)
def test_batch_norm_is_as_configured(
    wish: str, scale_learns: bool, statistics_move: bool, tmp_path: Path
) -> None:
    weights = tmp_path / "w.pth"
    torch.save(Generator(Architecture("tiny", CLASSES)).backbone.state_dict(), weights)
    config = tiny_config(model__weights=str(weights), model__batch_norm=wish)
    state = new_state(config)
    norm = state.generator.backbone.bn1
    scale, mean = norm.weight.clone(), norm.running_mean.clone()
    state.set_learning_rates(1, config)
    train_step(state, random_batch(config), config, 1)
    assert (not torch.equal(norm.weight, scale)) == scale_learns
    assert (not torch.equal(norm.running_mean, mean)) == statistics_move


def test_a_state_without_a_best_model_comes_back_without(tmp_path: Path) -> None:
    saved = through_a_file(trained_state(), tmp_path)
    other = new_state(tiny_config())
    other.best = BEST
    other.load_state_dict(saved)
    assert other.best is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_next_step_is_bit_identical_dropout_included(tmp_path: Path, accumulate: int) -> None:
    config = tiny_config(train__accumulate=accumulate)
    batches = [random_batch(config, seed=seed) for seed in (8, 9)]
    original = trained_state(train__accumulate=accumulate)
    saved = through_a_file(original, tmp_path)

    def go_on(state: TrainState) -> list[StepLosses]:
        losses = []
        for iteration, batch in enumerate(batches, start=3):
            state.set_learning_rates(iteration, config)
            losses.append(train_step(state, batch, config, iteration))
        return losses

    straight = go_on(original)
    resumed_state = new_state(tiny_config(train__seed=5))
    torch.rand(100)  # somewhere else in the stream of random numbers
    resumed_state.load_state_dict(saved)
    resumed = go_on(resumed_state)
    for one, other in zip(straight, resumed, strict=True):
        assert same(vars(one), vars(other))
    assert same(original.state_dict(), resumed_state.state_dict())


def test_what_dropout_draws_depends_on_seed_iteration_and_part_alone(tmp_path: Path) -> None:
    config = tiny_config()
    saved = through_a_file(trained_state(), tmp_path)
    batch = random_batch(config)

    def loss_d(iteration: int, **changes: Any) -> Tensor:
        state = new_state(config)
        state.load_state_dict(saved)
        torch.rand(7)
        return train_step(state, batch, tiny_config(**changes), iteration).d

    first = loss_d(3)
    assert torch.equal(loss_d(3), first)
    assert not torch.equal(loss_d(4), first)
    assert not torch.equal(loss_d(3, train__seed=9), first)


def test_a_loaded_network_is_still_in_training_mode(tmp_path: Path) -> None:
    saved = through_a_file(trained_state(), tmp_path)
    other = new_state(tiny_config())
    other.load_state_dict(saved)
    assert other.generator.training
    assert other.discriminator.training


def test_a_saved_state_holds_plain_values_and_tensors_only() -> None:
    def check(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                assert isinstance(key, (str, int))
                check(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner)
        else:
            assert value is None or isinstance(value, (bool, int, float, str, Tensor))

    state = trained_state()
    state.best = BEST
    check(state.state_dict())


# ---------------------------------------------------------------------------- a new state


def weights(state: TrainState) -> dict[str, Tensor]:
    return {**state.generator.state_dict(), **state.discriminator.state_dict()}


def test_the_seed_decides_the_initial_weights() -> None:
    torch.rand(7)
    first = weights(new_state(tiny_config(train__seed=3)))
    torch.rand(11)
    again = weights(new_state(tiny_config(train__seed=3)))
    other = weights(new_state(tiny_config(train__seed=4)))
    assert same(first, again)
    for name in ("backbone.conv1.weight", "head.branches.0.weight", "convolutions.0.weight"):
        assert not torch.equal(first[name], other[name])


def test_the_seed_decides_the_first_dropout_too() -> None:
    config = tiny_config()
    first = train_step(new_state(config), random_batch(config), config, 1)
    torch.rand(3)
    again = train_step(new_state(config), random_batch(config), config, 1)
    assert same(vars(first), vars(again))


def test_a_new_state_stands_at_the_beginning() -> None:
    state = new_state(tiny_config())
    assert (state.iteration, state.evaluated_iteration, state.best) == (0, 0, None)
    assert state.unreadable == set()
    assert state.generator.training
    assert state.discriminator.training


def test_the_largest_seed_works() -> None:
    state = new_state(tiny_config(train__seed=2**63 - 1))
    assert torch.isfinite(state.generator.backbone.conv1.weight).all()


def backbone_file(folder: Path) -> str:
    """Weights to begin with, unlike any seed's."""
    state = Generator(Architecture("tiny", CLASSES)).backbone.state_dict()
    path = folder / "backbone.pth"
    torch.save({name: torch.full_like(value, 0.5) for name, value in state.items()}, path)
    return str(path)


def test_pretrained_weights_are_loaded_and_batch_norm_is_frozen(tmp_path: Path) -> None:
    config = tiny_config(model__weights=backbone_file(tmp_path))
    state, note = new_train_state(config, CLASSES, CPU)
    assert "backbone.pth" in note
    assert (state.generator.backbone.conv1.weight == 0.5).all()
    norms = [m for m in state.generator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())


def test_the_names_of_classes_are_held_against_those_of_the_weights(tmp_path: Path) -> None:
    trained = new_state(tiny_config())
    names = tuple(f"class {index}" for index in range(CLASSES))
    path = tmp_path / "best_model.pth"
    torch.save({"card": {"classes": names}, "state_dict": trained.generator.state_dict()}, path)
    config = tiny_config(model__weights=str(path))
    _, note = new_train_state(config, CLASSES, CPU, classes=names)
    assert "and its head" in note
    _, note = new_train_state(config, CLASSES, CPU, classes=("sky", *names[1:]))
    assert "its head is random, as that of the file is for other classes (0 is class 0" in note


def test_from_scratch_batch_norm_is_learned() -> None:
    state, note = new_train_state(tiny_config(), CLASSES, CPU)
    assert "random" in note
    assert all(p.requires_grad for p in state.generator.parameters())


def test_a_state_about_to_be_loaded_does_not_need_the_weights(tmp_path: Path) -> None:
    # The file may be gone, or the machine offline, when a run goes on.
    pretrained = tiny_config(model__weights=backbone_file(tmp_path))
    saved = new_state(pretrained)
    content = through_a_file(saved, tmp_path)
    gone = tiny_config(model__weights=str(tmp_path / "gone.pth"))
    state, note = new_train_state(gone, CLASSES, CPU, pretrained=False)
    state.load_state_dict(content)
    assert note == ""
    assert same(weights(state), weights(saved))
    assert not state.generator.backbone.bn1.weight.requires_grad


def test_weights_that_are_not_there_are_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        new_state(tiny_config(model__weights=str(tmp_path / "gone.pth")))


# ---------------------------------------------------------------------------- optimizers


def assert_each_trainable_parameter_is_in_one_group(state: TrainState) -> None:
    groups = [*state.optimizer_G.param_groups, *state.optimizer_D.param_groups]
    listed = [id(p) for group in groups for p in group["params"]]
    networks = (state.generator, state.discriminator)
    trainable = {id(p) for net in networks for p in net.parameters() if p.requires_grad}
    assert len(listed) == len(set(listed))
    assert set(listed) == trainable


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    # The reference lists most convolutions three times, and so triples their learning rate.
    assert_each_trainable_parameter_is_in_one_group(new_state(tiny_config()))


def test_frozen_batch_norm_is_in_no_group(tmp_path: Path) -> None:
    state = new_state(tiny_config(model__weights=backbone_file(tmp_path)))
    assert_each_trainable_parameter_is_in_one_group(state)
    count = sum(len(group["params"]) for group in state.optimizer_G.param_groups)
    assert count == len(list(state.generator.parameters())) - 2 * 13


def test_each_network_has_its_own_optimizer() -> None:
    state = new_state(tiny_config())
    of_g = {id(p) for g in state.optimizer_G.param_groups for p in g["params"]}
    of_d = {id(p) for g in state.optimizer_D.param_groups for p in g["params"]}
    assert of_g == {id(p) for p in state.generator.parameters()}
    assert of_d == {id(p) for p in state.discriminator.parameters()}


def test_the_optimizers_are_set_as_configured() -> None:
    config = tiny_config(
        train__learning_rate=0.02,
        train__learning_rate_D=0.003,
        train__momentum=0.8,
        train__weight_decay=0.01,
    )
    state = new_state(config)
    backbone, head = state.optimizer_G.param_groups
    assert isinstance(state.optimizer_G, torch.optim.SGD)
    assert (backbone["lr"], head["lr"]) == (0.02, 0.02 * 10)
    for group in (backbone, head):
        assert (group["momentum"], group["weight_decay"]) == (0.8, 0.01)
        assert not group["nesterov"]
    (of_d,) = state.optimizer_D.param_groups
    assert isinstance(state.optimizer_D, torch.optim.Adam)
    assert (of_d["lr"], of_d["betas"], of_d["weight_decay"]) == (0.003, (0.9, 0.99), 0)


def test_learning_rates_of_an_iteration_depend_on_nothing_else() -> None:
    config = tiny_config(train__iterations=10, train__power=1.0, train__learning_rate_D=1e-3)
    state = new_state(config)
    state.set_learning_rates(9, config)
    lr_g, lr_d = state.set_learning_rates(6, config)
    assert lr_g == pytest.approx(0.01 / 2)
    assert lr_d == pytest.approx(1e-3 / 2)
    backbone, head = state.optimizer_G.param_groups
    assert {id(p) for p in head["params"]} == {id(p) for p in state.generator.head.parameters()}
    assert (backbone["lr"], head["lr"]) == (lr_g, 10 * lr_g)
    assert state.optimizer_D.param_groups[0]["lr"] == lr_d
