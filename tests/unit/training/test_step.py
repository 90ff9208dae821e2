"""One iteration: who gets which gradient, what the gate sees, and what must not matter."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from job.config import Config
from job.data.images import IGNORE
from job.data.streams import Batch
from job.models.discriminator import Discriminator, discriminator_input
from job.models.normalization import IMAGENET_MEAN, IMAGENET_STD
from job.training import losses
from job.training.losses import one_hot_maps
from job.training.state import TrainState
from job.training.step import StepLosses, _view, train_step
from tests.unit.training.tiny import CLASSES, CPU, SIZE, new_state, random_batch, tiny_config

Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True, params=["as on a CPU", "as on a GPU"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test twice: what only GPUs take the time for is computed here as well."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(losses, "_on_host", lambda _: False)


def gradients(network: nn.Module) -> Gradients:
    """Of every parameter; fails if one has none."""
    found = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_same(one: Gradients, other: Gradients) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(one: Gradients, other: Gradients) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        scale = float(other[name].abs().max())
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5 * scale + 1e-9)


def differ(one: Gradients, other: Gradients) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def still_state(config: Config, *, dropout: bool = True) -> TrainState:
    """A state whose weights a step does not change, so that its gradients can be looked at."""
    state = new_state(config)
    for group in (*state.optimizer_G.param_groups, *state.optimizer_D.param_groups):
        group["lr"] = 0.0
    if not dropout:
        state.discriminator.dropout.p = 0.0
    # As if trained for a while: gradients of a head that is almost 0 say little.
    with torch.no_grad():
        for branch in state.generator.head.branches:
            branch.weight.mul_(5)
    return state


def step(
    config: Config, batch: Batch, *, iteration: int = 1, dropout: bool = True
) -> tuple[StepLosses, Gradients, Gradients]:
    """Losses and both networks' gradients of one step from one and the same state."""
    state = still_state(config, dropout=dropout)
    losses = train_step(state, batch, config, iteration)
    of_d = gradients(state.discriminator) if batch.unlabeled_images is not None else {}
    return losses, gradients(state.generator), of_d


# ------------------------------------------------------- against an independent computation


def slow_step(
    state: TrainState, batch: Batch, config: Config, *, self_training: bool
) -> tuple[dict[str, float], Gradients, Gradients]:
    """The paper's formulas, part by part, with autograd asked for each network's own gradients.

    Selects where the program masks, and shares no function with it but the two networks.
    """
    generator, discriminator = state.generator, state.discriminator
    of_g = [torch.zeros_like(p) for p in generator.parameters()]
    of_d = [torch.zeros_like(p) for p in discriminator.parameters()]
    sums = dict.fromkeys(("ce", "fm", "st", "d", "st_count"), 0.0)
    parts = config.train.accumulate

    def predicted(images: Tensor) -> Tensor:
        floats = images.float() / 255
        seen = torch.stack([TF.normalize(x, IMAGENET_MEAN, IMAGENET_STD) for x in floats])
        logits = generator.head(*generator.backbone(seen))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)

    def seen(maps: Tensor, images: Tensor, valid: Tensor) -> Tensor:
        rows = []
        for m, x, v in zip(maps, images.float(), valid, strict=True):
            stretched = (x - x.min()) / (x.max() - x.min())
            rows.append(torch.cat([m, stretched]) * v)
        return torch.stack(rows)

    for index in range(parts):
        part = slice(index * config.train.batch_size, (index + 1) * config.train.batch_size)
        truth = batch.labeled_masks[part].long()
        ce = F.cross_entropy(predicted(batch.labeled_images[part]), truth, ignore_index=IGNORE)
        assert batch.unlabeled_images is not None
        assert batch.unlabeled_valid is not None
        assert batch.real_images is not None
        assert batch.real_masks is not None
        unlabeled_valid = batch.unlabeled_valid[part]
        real_masks = batch.real_masks[part].long()
        logits = predicted(batch.unlabeled_images[part])
        both = unlabeled_valid & (real_masks != IGNORE)
        maps = F.one_hot(real_masks.clamp_max(CLASSES), CLASSES + 1)[..., :CLASSES]
        fake = seen(logits.softmax(dim=1), batch.unlabeled_images[part], both)
        real = seen(maps.permute(0, 3, 1, 2).float(), batch.real_images[part], both)
        fake_score, fake_features = discriminator(fake)
        real_score, real_features = discriminator(real)
        fm = F.l1_loss(fake_features.mean(dim=0), real_features.mean(dim=0).detach())
        picked = [i for i, p in enumerate(fake_score.sigmoid()) if p > config.loss.threshold_st]
        chosen = logits[picked].permute(0, 2, 3, 1)[unlabeled_valid[picked]]
        st = F.cross_entropy(chosen, chosen.argmax(dim=1)) if picked and self_training else 0 * ce
        g = ce + config.loss.lambda_fm * fm + config.loss.lambda_st * st
        probabilities = discriminator(fake.detach())[0].sigmoid()
        fake_half = F.binary_cross_entropy(probabilities, torch.zeros_like(probabilities))
        real_half = F.binary_cross_entropy(real_score.sigmoid(), torch.ones_like(real_score))
        d = (fake_half + real_half) / 2
        for total, more in zip(
            of_g, torch.autograd.grad(g, list(generator.parameters())), strict=True
        ):
            total += more / parts
        for total, more in zip(
            of_d, torch.autograd.grad(d, list(discriminator.parameters())), strict=True
        ):
            total += more / parts
        values = {"ce": ce, "fm": fm, "st": st, "d": d}
        for name, value in values.items():
            sums[name] += value.item() / parts
        sums["st_count"] += len(picked)
    names_g = [name for name, _ in generator.named_parameters()]
    names_d = [name for name, _ in discriminator.named_parameters()]
    return (
        sums,
        dict(zip(names_g, of_g, strict=True)),
        dict(zip(names_d, of_d, strict=True)),
    )


@pytest.mark.parametrize("self_training", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_computes_what_the_paper_says(accumulate: int, self_training: bool) -> None:
    config = tiny_config(
        train__accumulate=accumulate,
        loss__lambda_fm=3.0,
        loss__lambda_st=0.7,
        loss__st_start=0 if self_training else 1,
    )
    batch = random_batch(config)
    state = still_state(config, dropout=False)
    threshold = sorted(scores(state, batch))[accumulate - 1]  # some pass, some do not
    config = with_threshold(config, threshold)
    wanted, wanted_g, wanted_d = slow_step(
        copy.deepcopy(state), batch, config, self_training=self_training
    )
    losses = train_step(state, batch, config, 1)
    assert 0 < losses.st_count.item() < config.train.batch_size * accumulate
    for name, value in wanted.items():
        assert getattr(losses, name).item() == pytest.approx(value, rel=1e-4), name
    total = wanted["ce"] + 3.0 * wanted["fm"] + 0.7 * wanted["st"]
    assert losses.g.item() == pytest.approx(total, rel=1e-4)
    assert_close(gradients(state.generator), wanted_g)
    assert_close(gradients(state.discriminator), wanted_d)


def scores(state: TrainState, batch: Batch) -> list[float]:
    """Probability of each unlabeled image to be real, without dropout, part by part."""
    state = copy.deepcopy(state)
    state.discriminator.eval()
    found: list[float] = []
    with torch.no_grad():
        for part in batch.split(2):
            assert part.unlabeled_images is not None
            assert part.unlabeled_valid is not None
            assert part.real_masks is not None
            maps = state.generator(part.unlabeled_images).softmax(dim=1)
            valid = part.unlabeled_valid & (part.real_masks != IGNORE)
            fake = discriminator_input(maps, part.unlabeled_images.float(), valid)
            found += state.discriminator(fake)[0].sigmoid().tolist()
    return found


def with_threshold(config: Config, threshold: float) -> Config:
    loss = config.loss.model_copy(update={"threshold_st": threshold})
    return config.model_copy(update={"loss": loss})


# ---------------------------------------------------------------------------- who gets what


def test_the_discriminator_learns_nothing_from_the_generators_losses() -> None:
    batch = random_batch(tiny_config())
    _, of_g, of_d = step(tiny_config(loss__lambda_fm=0.0, loss__lambda_st=0.0), batch)
    _, of_g_much, of_d_much = step(tiny_config(loss__lambda_fm=1e4, loss__lambda_st=1e4), batch)
    assert differ(of_g, of_g_much)
    assert_same(of_d, of_d_much)


def test_the_generator_learns_nothing_from_the_discriminators_loss() -> None:
    # With both weights 0 all that reaches the generator is the cross-entropy, to the bit.
    config = tiny_config(loss__lambda_fm=0.0, loss__lambda_st=0.0)
    batch = random_batch(config)
    _, of_g, of_d = step(config, batch)
    assert all(float(value.abs().sum()) > 0 for value in of_d.values())
    alone = tiny_config(train__supervised_only=True)
    labels_only = dataclasses.replace(
        batch, unlabeled_images=None, unlabeled_valid=None, real_images=None, real_masks=None
    )
    _, wanted, _ = step(alone, labels_only)
    assert_same(of_g, wanted)


def test_feature_matching_reaches_backbone_and_head() -> None:
    batch = random_batch(tiny_config())
    _, without, _ = step(tiny_config(loss__lambda_fm=0.0), batch)
    _, with_fm, _ = step(tiny_config(loss__lambda_fm=1.0), batch)
    for name in ("backbone.conv1.weight", "head.branches.3.weight"):
        assert not torch.equal(without[name], with_fm[name])


def test_gradients_of_the_last_step_do_not_leak_into_the_next() -> None:
    config = tiny_config()
    batch = random_batch(config)
    state = still_state(config, dropout=False)
    train_step(state, random_batch(config, seed=2), config, 1)
    train_step(state, batch, config, 1)
    _, wanted_g, wanted_d = step(config, batch, dropout=False)
    assert_same(gradients(state.generator), wanted_g)
    assert_same(gradients(state.discriminator), wanted_d)


def test_the_discriminators_parameters_require_gradients_again_after_a_step() -> None:
    config = tiny_config()
    state = new_state(config)
    train_step(state, random_batch(config), config, 1)
    assert all(p.requires_grad for p in state.discriminator.parameters())


def test_both_networks_move() -> None:
    config = tiny_config(train__learning_rate_D=1e-3)
    state = new_state(config)
    before = copy.deepcopy(state)
    train_step(state, random_batch(config), config, 1)
    for name in ("generator", "discriminator"):
        old = dict(getattr(before, name).named_parameters())
        for key, value in getattr(state, name).named_parameters():
            assert not torch.equal(value, old[key]), key


def test_both_networks_stay_in_training_mode() -> None:
    config = tiny_config()
    state = new_state(config)
    train_step(state, random_batch(config), config, 1)
    for network in (state.generator, state.discriminator):
        assert all(module.training for module in network.modules())


def test_losses_carry_no_graph() -> None:
    config = tiny_config()
    losses = train_step(new_state(config), random_batch(config), config, 1)
    assert not any(value.requires_grad for value in vars(losses).values())
    assert all(value.shape == () for value in vars(losses).values())


def test_batch_norm_sees_labeled_and_unlabeled_images_apart() -> None:
    config = tiny_config()
    state = new_state(config)
    train_step(state, random_batch(config), config, 1)
    assert state.generator.backbone.bn1.num_batches_tracked.item() == 2
    batch = random_batch(config)
    assert batch.unlabeled_images is not None
    dark = dataclasses.replace(batch, unlabeled_images=batch.unlabeled_images // 4)
    assert step(config, batch)[0].ce.item() == step(config, dark)[0].ce.item()


# ---------------------------------------------------------------------------- the gate


@contextmanager
def recorded(discriminator: Discriminator) -> Iterator[list[tuple[bool, bool, Tensor]]]:
    """Each call: whether in training mode, whether its weights learn, and the logits."""
    calls: list[tuple[bool, bool, Tensor]] = []

    def note(module: nn.Module, _inputs: Any, outputs: Any) -> None:
        learns = any(p.requires_grad for p in module.parameters())
        calls.append((module.training, learns, outputs[0].detach().clone()))

    handle = discriminator.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def test_the_gate_scores_without_dropout_and_all_else_with() -> None:
    config = tiny_config()
    state, batch = still_state(config), random_batch(config)
    runs = []
    for seed in (1, 2):
        with recorded(state.discriminator) as calls:
            train_step(state, batch, tiny_config(train__seed=seed), 1)
        runs.append(calls)
    first, second = runs
    scored = [i for i, (training, _, _) in enumerate(first) if not training]
    assert len(scored) == 1
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one[2], other[2]) is (i in scored)


def test_one_pass_of_each_serves_both_networks() -> None:
    config = tiny_config()
    state = new_state(config)
    with recorded(state.discriminator) as calls:
        train_step(state, random_batch(config), config, 1)
    assert [training for training, _, _ in calls] == [True, True, False]  # real, fake; the gate
    assert all(learns for _, learns, _ in calls)


def test_the_gate_is_no_lottery_and_strict() -> None:
    config = tiny_config(train__accumulate=3)
    batch = random_batch(config)
    state = still_state(config)
    by_score = sorted(scores(state, batch))
    assert len(set(by_score)) == 6
    for passing, threshold in ((5, by_score[0]), (3, by_score[2]), (0, by_score[-1])):
        strict = with_threshold(config, threshold)
        counts = set()
        for seed in range(3):
            torch.manual_seed(seed)
            counts.add(train_step(state, batch, strict, 1).st_count.item())
        assert counts == {passing}


def test_self_training_is_off_up_to_st_start_and_on_after() -> None:
    config = tiny_config(loss__st_start=3)
    batch = random_batch(config)
    losses = {i: step(config, batch, iteration=i) for i in (1, 2, 3, 4, 100)}
    assert [losses[i][0].st.item() > 0 for i in losses] == [False, False, False, True, True]
    without = {i: step(tiny_config(loss__lambda_st=0.0), batch, iteration=i)[1] for i in (3, 4)}
    assert_same(losses[3][1], without[3])
    assert differ(losses[4][1], without[4])


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 1), (2, 3), (3, 2), (1, 4)])
@pytest.mark.parametrize("st_start", [0, 10])
def test_st_count_counts_every_accumulated_batch_before_st_start_too(
    batch_size: int, accumulate: int, st_start: int
) -> None:
    config = tiny_config(
        train__batch_size=batch_size, train__accumulate=accumulate, loss__st_start=st_start
    )
    batch = random_batch(config)
    assert step(config, batch)[0].st_count.item() == batch_size * accumulate
    assert step(with_threshold(config, 1.0), batch)[0].st_count.item() == 0


def test_no_accepted_image_gives_no_self_training_and_a_finite_step() -> None:
    config = tiny_config(loss__threshold_st=1.0)
    batch = random_batch(config)
    losses, of_g, _ = step(config, batch)
    assert losses.st.item() == 0
    assert_same(of_g, step(tiny_config(loss__lambda_st=0.0), batch)[1])


def test_padding_does_not_train_itself() -> None:
    config = tiny_config(loss__lambda_fm=0.0)
    batch = random_batch(config)
    all_padding = dataclasses.replace(
        batch, unlabeled_valid=torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    )
    assert step(config, batch)[0].st.item() > 0
    losses, of_g, of_d = step(config, all_padding)
    assert losses.st.item() == 0
    assert_same(of_g, step(tiny_config(loss__lambda_fm=0.0, loss__lambda_st=0.0), batch)[1])
    assert all(torch.isfinite(value).all() for value in of_d.values())


# ---------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 2), (1, 3), (2, 3)])
def test_accumulated_gradients_are_the_mean_of_the_parts(batch_size: int, accumulate: int) -> None:
    config = tiny_config(train__batch_size=batch_size, train__accumulate=accumulate)
    one_part = tiny_config(train__batch_size=batch_size)
    batch = random_batch(config)
    losses, of_g, of_d = step(config, batch, dropout=False)
    parts = [step(one_part, part, dropout=False) for part in batch.split(batch_size)]
    assert len(parts) == accumulate
    for name in ("ce", "fm", "st", "d", "g"):
        mean = sum(getattr(part, name).item() for part, _, _ in parts) / accumulate
        assert getattr(losses, name).item() == pytest.approx(mean, rel=1e-5)
    for total, index in ((of_g, 1), (of_d, 2)):
        mean_of_parts = {
            name: torch.stack([part[index][name] for part in parts]).mean(dim=0) for name in total
        }
        assert_close(total, mean_of_parts)


def test_each_network_is_updated_once_an_iteration() -> None:
    config = tiny_config(train__accumulate=3)
    state = new_state(config)
    train_step(state, random_batch(config), config, 1)
    steps = {int(entry["step"]) for entry in state.optimizer_D.state.values()}
    assert steps == {1}


# ---------------------------------------------------------------------------- special cases


def test_on_labels_alone_the_discriminator_is_not_touched() -> None:
    config = tiny_config(train__supervised_only=True, train__learning_rate_D=1.0)
    state = new_state(config)
    before = copy.deepcopy(state.discriminator.state_dict())
    head = state.generator.head.branches[0].weight.clone()
    losses = train_step(state, random_batch(config), config, 5)
    after = state.discriminator.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not state.optimizer_D.state
    assert all(p.grad is None for p in state.discriminator.parameters())
    assert not torch.equal(state.generator.head.branches[0].weight, head)
    assert losses.g.item() == losses.ce.item() > 0
    assert [v.item() for v in (losses.fm, losses.st, losses.d, losses.st_count)] == [0] * 4


def test_labels_that_are_all_ignored_give_a_finite_step() -> None:
    config = tiny_config()
    batch = random_batch(config)
    assert batch.real_masks is not None
    batch.labeled_masks[:] = IGNORE
    batch.real_masks[:] = IGNORE
    state = new_state(config)
    losses = train_step(state, batch, config, 1)
    assert losses.ce.item() == 0
    assert all(math.isfinite(value.item()) for value in vars(losses).values())
    for network in (state.generator, state.discriminator):
        assert all(torch.isfinite(p).all() for p in network.parameters())


def test_constant_images_give_a_finite_step() -> None:
    config = tiny_config()
    batch = random_batch(config)
    for images in (batch.labeled_images, batch.unlabeled_images, batch.real_images):
        assert images is not None
        images[:] = 7
    state = new_state(config)
    losses = train_step(state, batch, config, 1)
    assert all(math.isfinite(value.item()) for value in vars(losses).values())
    assert all(torch.isfinite(p).all() for p in state.generator.parameters())


# ------------------------------------------------------------- what the discriminator must not see


class PerPixel(nn.Module):
    """A generator whose logits at a pixel depend on that pixel alone.

    With the real one, what a hole shows is also seen by its neighbours, through the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Conv2d(3, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.weights(images.float() / 255)
        return result

    def with_presence(self, images: Tensor) -> tuple[Tensor, None]:
        return self(images), None


def per_pixel_losses(batch: Batch, config: Config) -> dict[str, Tensor]:
    """Losses and the discriminator's gradients, everything from one seed."""
    state = new_state(config)
    torch.manual_seed(3)
    generator = PerPixel()
    state = TrainState(
        generator,  # type: ignore[arg-type]
        state.discriminator,
        torch.optim.SGD(generator.parameters(), lr=0.0),
        torch.optim.SGD(state.discriminator.parameters(), lr=0.0),
    )
    losses = train_step(state, batch, config, 1)
    return {
        **{name: getattr(losses, name) for name in ("ce", "fm", "st", "d", "st_count")},
        **gradients(state.discriminator),
        **gradients(generator),
    }


def holes_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Pixels that must not matter: of the unlabeled images (padding), of the real ones (void)."""
    assert batch.unlabeled_valid is not None
    assert batch.real_masks is not None
    void = batch.real_masks == IGNORE
    return ~batch.unlabeled_valid, void | ~batch.unlabeled_valid


def bounded_batch(config: Config, low: int, high: int) -> Batch:
    """All values within the bounds, and both bounds reached where both images are valid."""
    batch = random_batch(config)
    for images in (batch.unlabeled_images, batch.real_images):
        assert images is not None
        images[:] = images.float().div(255).mul(high - low).add(low).round().to(torch.uint8)
        images[:, :, SIZE // 2, 0], images[:, :, SIZE // 2, 1] = low, high
    return batch


def painted(images: Tensor | None, where: Tensor, paint: Callable[[Tensor], Tensor]) -> Tensor:
    assert images is not None
    return torch.where(where.unsqueeze(1), paint(images), images)


@pytest.mark.parametrize("stream", ["unlabeled", "real"])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(0, 255, id="full-contrast"),
        pytest.param(100, 150, id="low-contrast"),
    ],
)
def test_what_padding_and_void_show_does_not_matter(stream: str, low: int, high: int) -> None:
    config = tiny_config()
    batch = bounded_batch(config, low, high)
    padding, void = holes_of(batch)
    hole = padding if stream == "unlabeled" else void
    images = batch.unlabeled_images if stream == "unlabeled" else batch.real_images
    repainted = painted(images, hole, lambda images: 255 - images // 8)
    changed = dataclasses.replace(batch, **{f"{stream}_images": repainted})
    before, after = per_pixel_losses(batch, config), per_pixel_losses(changed, config)
    assert_close(after, before)


def test_what_a_labeled_image_shows_under_ignored_labels_does_not_matter() -> None:
    config = tiny_config()
    batch = random_batch(config)
    ignored = batch.labeled_masks == IGNORE
    repainted = painted(batch.labeled_images, ignored, lambda images: 255 - images)
    changed = dataclasses.replace(batch, labeled_images=repainted)
    assert_close(per_pixel_losses(changed, config), per_pixel_losses(batch, config))


def test_what_is_visible_does_matter() -> None:
    # Else the test above would prove less than it says.
    config = tiny_config()
    batch = bounded_batch(config, 0, 255)
    padding, void = holes_of(batch)
    for stream, hole in (("unlabeled", padding), ("real", void)):
        images = batch.unlabeled_images if stream == "unlabeled" else batch.real_images
        repainted = painted(images, ~hole, lambda images: 255 - images)
        changed = dataclasses.replace(batch, **{f"{stream}_images": repainted})
        assert (
            per_pixel_losses(changed, config)["d"].item()
            != per_pixel_losses(batch, config)["d"].item()
        )


def test_labels_under_the_padding_of_the_fake_do_not_matter() -> None:
    config = tiny_config()
    batch = random_batch(config)
    padding, _ = holes_of(batch)
    assert batch.real_masks is not None
    changed = dataclasses.replace(
        batch, real_masks=torch.where(padding, (batch.real_masks + 1) % CLASSES, batch.real_masks)
    )
    assert_same(per_pixel_losses(changed, config), per_pixel_losses(batch, config))


def test_fake_and_real_have_the_same_holes() -> None:
    config = tiny_config()
    batch = random_batch(config)
    padding, void = holes_of(batch)
    state = new_state(config)
    seen: list[Tensor] = []
    handle = state.discriminator.register_forward_pre_hook(
        lambda _module, inputs: seen.extend(inputs[0].detach().split(2))
    )
    train_step(state, batch, config, 1)
    handle.remove()
    for given in seen:
        blank = (given == 0).all(dim=1)
        assert torch.equal(blank, padding | void)


def test_real_samples_show_the_labels_and_fakes_the_predictions() -> None:
    config = tiny_config()
    batch = random_batch(config)
    assert batch.real_masks is not None
    _, void = holes_of(batch)
    state = new_state(config)
    seen: list[Tensor] = []
    handle = state.discriminator.register_forward_pre_hook(
        lambda _module, inputs: seen.extend(inputs[0].detach()[:, :CLASSES].split(2))
    )
    train_step(state, batch, config, 1)
    handle.remove()
    wanted = one_hot_maps(batch.real_masks, CLASSES) * ~void.unsqueeze(1)
    is_real = [torch.equal(given, wanted) for given in seen]
    assert sum(is_real) == 1  # once for both networks
    for given in [given for given, real in zip(seen, is_real, strict=True) if not real]:
        sums = given.sum(dim=1)
        torch.testing.assert_close(sums[~void], torch.ones_like(sums[~void]))
        assert float(given.max()) < 1


# ------------------------------------------------------------------ a teacher and changed views


MODERN = {
    "data__strong_augment": True,
    "data__cutmix": 1.0,
    "train__ema_decay": 0.9,
    "loss__confidence": 0.45,
}


def slow_modern_losses(state: TrainState, batch: Batch, config: Config) -> dict[str, float]:
    """Feature matching, self-training and the discriminator's loss, image by image.

    The boxes and colours are taken as they come: their own tests are in test_views.py.
    """
    shown, mixed = _view(batch.unlabeled_images, config, 1, 0)
    images, masks = mixed(batch.unlabeled_images), mixed(batch.real_masks)
    valid = mixed(batch.unlabeled_valid) & (masks != IGNORE)
    maps = F.one_hot(masks.long().clamp_max(CLASSES), CLASSES + 1)[..., :CLASSES]
    with torch.no_grad():
        logits = copy.deepcopy(state.generator)(shown)
        fake = discriminator_input(logits.softmax(dim=1), images.float(), valid)
        real = discriminator_input(
            maps.permute(0, 3, 1, 2).float(), mixed(batch.real_images).float(), valid
        )
        teacher_maps = state.teacher(batch.unlabeled_images).softmax(dim=1)
        plain = discriminator_input(
            teacher_maps,
            batch.unlabeled_images.float(),
            batch.unlabeled_valid & (batch.real_masks != IGNORE),
        )
        (fake_score, fake_features), (real_score, real_features) = map(
            state.discriminator, (fake, real)
        )
        scores = state.discriminator(plain)[0].sigmoid()
    accepted = scores > config.loss.threshold_st
    probability, label = teacher_maps.max(dim=1)
    per_pixel = F.cross_entropy(logits, mixed(label), reduction="none")
    counts = mixed((accepted[:, None, None] & batch.unlabeled_valid).clone())
    sure = mixed(probability) > config.loss.confidence
    total, counted = float(per_pixel[counts & sure].sum()), int(counts.sum())
    halves = [
        F.binary_cross_entropy(score.sigmoid(), torch.full_like(score, truth))
        for score, truth in ((fake_score, 0.0), (real_score, 1.0))
    ]
    return {
        "fm": float((fake_features.mean(0) - real_features.mean(0)).abs().mean()),
        "st": total / counted,
        "d": float(sum(halves) / 2),
        "st_count": float(accepted.sum()),
    }


def modern_state(config: Config) -> TrainState:
    """With a teacher that differs from its generator."""
    state = still_state(config, dropout=False)
    assert state.teacher is not None
    with torch.no_grad():
        for branch in state.teacher.head.branches:
            branch.weight.mul_(300)  # of some pixels it is sure, of others not
        state.teacher.head.branches[0].bias.add_(0.05)
    return state


def test_a_modern_step_computes_what_it_says() -> None:
    config = tiny_config(**MODERN)
    batch = random_batch(config)
    state = modern_state(config)
    wanted = slow_modern_losses(copy.deepcopy(state), batch, config)
    losses = train_step(state, batch, config, 1)
    assert wanted["st"] > 0
    for name, value in wanted.items():
        assert getattr(losses, name).item() == pytest.approx(value, rel=1e-4), name


def test_confidence_leaves_pixels_out() -> None:
    batch = random_batch(tiny_config())
    found = []
    for confidence in (0.0, 0.45, 0.999):
        config = tiny_config(**MODERN | {"loss__confidence": confidence})
        found.append(train_step(modern_state(config), batch, config, 1).st.item())
    assert found[0] > found[1] > found[2] == 0


def test_distorted_labeled_images_change_what_is_learned_of_them_alone() -> None:
    batch = random_batch(tiny_config())
    found = []
    for on in (False, True):
        config = tiny_config(data__photometric_distortion=on)
        found.append(train_step(still_state(config, dropout=False), batch, config, 1))
    plain, distorted = found
    assert plain.ce.item() != distorted.ce.item()
    for name in ("fm", "st", "d", "st_count"):
        assert getattr(plain, name).item() == getattr(distorted, name).item(), name


def test_a_distortion_depends_on_the_iteration_and_the_batch_alone() -> None:
    config = tiny_config(data__photometric_distortion=True, train__supervised_only=True)
    batch = random_batch(config)

    def ce(iteration: int) -> float:
        return train_step(still_state(config, dropout=False), batch, config, iteration).ce.item()

    first = ce(1)
    assert ce(2) != first
    assert ce(1) == first


@pytest.mark.parametrize("change", ["data__strong_augment", "data__cutmix"])
def test_a_changed_view_changes_what_is_learned_and_not_what_is_labeled(change: str) -> None:
    on, off = {change: 1}, {change: 0}
    batch = random_batch(tiny_config())
    config = tiny_config(**MODERN | on)
    one = train_step(modern_state(config), batch, config, 1)
    config = tiny_config(**MODERN | off)
    other = train_step(modern_state(config), batch, config, 1)
    assert one.ce.item() == other.ce.item()
    assert one.st_count.item() == other.st_count.item()
    assert one.st.item() != other.st.item()
    assert one.fm.item() != other.fm.item()


def test_without_a_teacher_the_generator_labels_its_own_weak_view() -> None:
    config = tiny_config(data__strong_augment=True)
    batch = random_batch(config)
    state = still_state(config, dropout=False)
    before = state.generator.backbone.bn1.num_batches_tracked.item()
    losses = train_step(state, batch, config, 1)
    assert losses.st.item() > 0
    # Labeled and unlabeled; labeling moves no statistics and leaves the network in training.
    assert state.generator.backbone.bn1.num_batches_tracked.item() == before + 2
    assert state.generator.training


def test_no_gradient_reaches_the_teacher() -> None:
    config = tiny_config(**MODERN)
    state = modern_state(config)
    train_step(state, random_batch(config), config, 1)
    assert all(p.grad is None for p in state.teacher.parameters())


@pytest.mark.parametrize(("iteration", "keep"), [(1, 0.5), (3, 0.75), (1000, 0.9)])
def test_the_teacher_moves_towards_the_generator(iteration: int, keep: float) -> None:
    config = tiny_config(**MODERN, train__iterations=2000)
    state = new_state(config)
    before = {name: value.clone() for name, value in state.teacher.state_dict().items()}
    state.set_learning_rates(iteration, config)
    train_step(state, random_batch(config), config, iteration)
    after, own = state.teacher.state_dict(), state.generator.state_dict()
    moved = 0
    for name, value in after.items():
        if value.is_floating_point():
            wanted = keep * before[name] + (1 - keep) * own[name]
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
            moved += not torch.equal(value, before[name])
        else:
            assert torch.equal(value, own[name])
    assert moved > 20
    assert not any(module.training for module in state.teacher.modules())


def test_views_depend_on_seed_iteration_and_part_alone() -> None:
    images = random_batch(tiny_config()).unlabeled_images

    def seen(iteration: int, part: int, seed: int = 0) -> bytes:
        config = tiny_config(**MODERN, train__seed=seed)
        return bytes(_view(images, config, iteration, part)[0].numpy().tobytes())

    torch.manual_seed(1)
    one = seen(4, 0)
    torch.manual_seed(2)
    assert seen(4, 0) == one
    assert len({one, seen(5, 0), seen(4, 1), seen(4, 0, seed=1)}) == 4


# ----------------------------------------------------------------- which classes an image holds


MLMT = {"model__mlmt_threshold": 0.2, "train__ema_decay": 0.9}


def test_the_branch_learns_from_masks_and_from_the_teacher() -> None:
    config = tiny_config(**MLMT, loss__lambda_mlmt=0.5)
    batch = random_batch(config)
    state = still_state(config, dropout=False)
    with torch.no_grad():
        state.teacher.presence.bias.add_(1.0)
        apart = copy.deepcopy(state.generator)
        _, of_labeled = apart.with_presence(batch.labeled_images)
        _, of_unlabeled = apart.with_presence(batch.unlabeled_images)
        _, taught = state.teacher.with_presence(batch.unlabeled_images)
    held = [[float((mask == k).any()) for k in range(CLASSES)] for mask in batch.labeled_masks]
    wanted = F.binary_cross_entropy(of_labeled.sigmoid(), torch.tensor(held))
    wanted += (of_unlabeled.sigmoid() - taught.sigmoid()).square().mean()
    losses = train_step(state, batch, config, 1)
    assert losses.mlmt.item() == pytest.approx(wanted.item(), rel=1e-4)
    rest = losses.ce + 0.1 * losses.fm + losses.st
    assert losses.g.item() == pytest.approx((rest + 0.5 * losses.mlmt).item(), rel=1e-5)
    assert state.generator.presence.weight.grad.abs().sum() > 0
    assert state.teacher.presence.weight.grad is None


def test_images_with_a_box_of_another_one_teach_nothing_about_what_they_hold() -> None:
    batch = random_batch(tiny_config())
    found = []
    for cutmix in (0.0, 1.0):
        config = tiny_config(**MLMT, data__cutmix=cutmix)
        state = still_state(config, dropout=False)
        with torch.no_grad():
            state.teacher.presence.bias.add_(1.0)
        found.append(train_step(state, batch, config, 1).mlmt.item())
    of_masks = found[1]
    assert found[0] > of_masks + 0.01


class _Results(TorchDispatchMode):
    """Numbers and shapes that depend on what a GPU has computed."""

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").partition(".")[0]
        indices = args[1] if name.startswith("index") else ()
        by_mask = isinstance(indices, (list, tuple)) and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in indices
        )
        if name in self.OPS or by_mask:
            self._note(name)
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Numbers of the host that are brought to a GPU, which then has to be done with all else."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if sys._getframe(1).f_code.co_filename.startswith(os.path.dirname(torch.optim.__file__)):
            return func(*args, **kwargs)  # which moves numbers to where they are already
        named = (*args[1:], kwargs.get("device"))
        if any(isinstance(one, torch.device) for one in named) and (
            func in (torch.tensor, torch.as_tensor)
            or (func is Tensor.to and not kwargs.get("non_blocking"))
        ):
            self._note(func.__name__)
        return func(*args, **kwargs)


@contextmanager
def waiting() -> Iterator[list[str]]:
    """Each thing that would make the host wait for a GPU, and where."""
    seen: list[str] = []

    def note(name: str) -> None:
        calls = [frame for frame in traceback.extract_stack() if "/job/" in frame.filename]
        seen.append(f"{name}: {calls[-1].name}, {calls[-1].line}" if calls else name)

    with _Results(note), _Copies(note):
        yield seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        MODERN | {"data__photometric_distortion": True, "loss__gate_share": 0.5},
        {"model__mlmt_threshold": 0.2, "train__ema_decay": 0.9, "train__accumulate": 2},
        {"model__normalization": "caffe", "model__head": "deeplabv3plus"},
        {"train__precision": "fp16", "train__accumulate": 2},
    ],
)
def test_a_step_never_waits_for_a_gpu(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_on_host", lambda _: False)
    config = tiny_config(**changes)
    state, batch = new_state(config), random_batch(config)
    train_step(state, batch, config, 1)  # the optimizers make their state
    with waiting() as seen:
        train_step(state, batch, config, 2)
    assert seen == []


def test_the_watch_for_waiting_sees_it() -> None:
    values = torch.arange(4)
    for wait in (
        lambda: values[values > 1],
        lambda: bool(values.any()),
        lambda: values.sum().item(),
        lambda: torch.tensor([1.0], device=values.device),
        lambda: values.to(CPU),
    ):
        with waiting() as seen:
            wait()
        assert len(seen) == 1


def test_without_the_branch_there_is_no_such_loss() -> None:
    config = tiny_config()
    assert train_step(new_state(config), random_batch(config), config, 1).mlmt.item() == 0
