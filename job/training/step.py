"""One iteration of S4GAN: gradients from every accumulated batch, then one update of each network.

Shape legend: N batch, K classes, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import backward

from job.config import Config
from job.data.dataset import IGNORE
from job.data.images import IMAGENET_MEAN, IMAGENET_STD
from job.data.streams import Batch
from job.models.discriminator import Discriminator, discriminator_input
from job.training import losses
from job.training.ranks import Ranks, RunningStatistics
from job.training.state import TrainState

ALONE = Ranks()
_STEP = 4
"""Part of every random seed, beside those of `job.data.streams`."""


@dataclass
class StepLosses:
    """Losses of an iteration, means over its batches, still on the device."""

    ce: Tensor
    fm: Tensor
    st: Tensor
    d: Tensor
    g: Tensor
    st_count: Tensor
    """Accepted unlabeled images of the whole iteration."""

    @classmethod
    def zeros(cls, device: torch.device) -> StepLosses:
        """To add to."""
        return cls(*(torch.zeros((), device=device) for _ in range(6)))


def train_step(
    state: TrainState, batch: Batch, config: Config, iteration: int, ranks: Ranks = ALONE
) -> StepLosses:
    """Compute all gradients of an iteration and update both networks.

    The networks must be in training mode and their learning rates set. `batch` holds this rank's
    share of the batch_size * accumulate images of each stream, on the networks' device.
    """
    total = StepLosses.zeros(batch.labeled_images.device)
    share = 1 / config.train.accumulate
    state.optimizer_G.zero_grad(set_to_none=True)
    state.optimizer_D.zero_grad(set_to_none=True)

    statistics = RunningStatistics(state.generator, ranks)
    parts = batch.split(config.train.batch_size)

    for number, part in enumerate(parts, start=ranks.rank * len(parts)):
        torch.manual_seed(_seed(config, iteration, number))
        # Supervised: its own forward and backward, so that only one graph is alive at a time
        # and batch norm sees labeled and unlabeled images apart (as in the reference).
        logits = state.generator(normalized(part.labeled_images))
        ce = losses.cross_entropy(logits, part.labeled_masks)
        backward(share * ce)
        total.ce += share * ce.detach()
        if part.unlabeled_images is not None:
            _unlabeled_part(state, part, config, iteration, total)

    if not ranks.alone:
        updates = len(parts) * (1 if batch.unlabeled_images is None else 2)
        ranks.add_up([*_gradients(state), *statistics.own_part(updates), *vars(total).values()])
        statistics.finish(updates)
    state.optimizer_G.step()
    if batch.unlabeled_images is not None:
        state.optimizer_D.step()
    total.g = total.ce + config.loss.lambda_fm * total.fm + config.loss.lambda_st * total.st
    return total


def _unlabeled_part(
    state: TrainState, part: Batch, config: Config, iteration: int, total: StepLosses
) -> None:
    """Feature matching, self-training and the discriminator's own loss for one batch."""
    assert part.unlabeled_images is not None
    assert part.unlabeled_valid is not None
    assert part.real_images is not None
    assert part.real_masks is not None
    share = 1 / config.train.accumulate
    discriminator = state.discriminator

    logits = state.generator(normalized(part.unlabeled_images))
    # One mask for the pair: padding of the fake and void of the real are blank in both, or the
    # discriminator would tell them apart by their holes.
    valid = part.unlabeled_valid & (part.real_masks != IGNORE)
    fake = discriminator_input(logits.softmax(dim=1), part.unlabeled_images.float(), valid)
    real = discriminator_input(
        losses.one_hot_maps(part.real_masks, logits.shape[1]), part.real_images.float(), valid
    )

    # Generator: look real to the discriminator, and learn from what already does.
    with _fixed(discriminator):
        _, fake_features = discriminator(fake)
        with torch.no_grad():
            _, real_features = discriminator(real)
        fm = losses.feature_matching(fake_features, real_features)
        accepted = losses.gate(_score(discriminator, fake), config.loss.threshold_st)
        if iteration > config.loss.st_start:
            st = losses.self_training(logits, accepted, part.unlabeled_valid)
        else:
            st = torch.zeros_like(fm)
        backward(share * (config.loss.lambda_fm * fm + config.loss.lambda_st * st))

    # Discriminator: labels are real, predictions are not. `detach` keeps it from the generator.
    fake_logits, _ = discriminator(fake.detach())
    real_logits, _ = discriminator(real)
    d = losses.discriminator_loss(fake_logits, real_logits)
    backward(share * d)

    total.fm += share * fm.detach()
    total.st += share * st.detach()
    total.d += share * d.detach()
    total.st_count += accepted.sum()


def _gradients(state: TrainState) -> list[Tensor]:
    """Of both networks, as far as there are some; the same ones on every rank."""
    parameters = (*state.generator.parameters(), *state.discriminator.parameters())
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _seed(config: Config, iteration: int, part: int) -> int:
    """Of what a part of an iteration draws (dropout): the same after a resume, on any process."""
    return int(np.random.default_rng([config.train.seed, _STEP, iteration, part]).integers(2**63))


def normalized(images: Tensor) -> Tensor:
    """What the generator takes: uint8 RGB (N, 3, H, W) -> float32, by ImageNet's statistics."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def _score(discriminator: Discriminator, fake: Tensor) -> Tensor:
    """The discriminator's logits without dropout, so that the gate is no lottery; (N,)."""
    discriminator.eval()
    with torch.no_grad():
        score, _ = discriminator(fake)
    discriminator.train()
    assert isinstance(score, Tensor)
    return score


@contextmanager
def _fixed(network: nn.Module) -> Iterator[None]:
    """Within the block gradients pass through a network but not into its parameters."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
