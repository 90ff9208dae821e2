"""One iteration of S4GAN: gradients from every accumulated batch, then one update of each network.

Shape legend: N batch, K classes, H/W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import backward, grad

from job.config import Config
from job.data.dataset import IGNORE
from job.data.streams import Batch
from job.models.discriminator import (
    Discriminator,
    discriminator_input,
    discriminator_input_of_labels,
)
from job.training import losses
from job.training.precision import computed_in, number_format, weights_cast_once
from job.training.ranks import Ranks, RunningStatistics
from job.training.state import TrainState
from job.training.views import Mix, changed_colours, distorted

ALONE = Ranks()
FAKE, REAL = 0.0, 1.0
"""What the discriminator is to say of predictions and of labels."""
_STEP, _VIEW, _LABELED_VIEW = 4, 5, 6
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
    mlmt: Tensor
    """Of the branch that says which classes an image holds; 0 without it."""

    @classmethod
    def zeros(cls, device: torch.device) -> StepLosses:
        """To add to."""
        return cls(*(torch.zeros((), device=device) for _ in range(7)))


def train_step(
    state: TrainState, batch: Batch, config: Config, iteration: int, ranks: Ranks = ALONE
) -> StepLosses:
    """Compute all gradients of an iteration and update both networks.

    The networks must be in training mode and their learning rates set. `batch` holds this rank's
    share of the batch_size * accumulate images of each stream, on the networks' device.
    """
    device = batch.labeled_images.device
    total = StepLosses.zeros(device)
    state.optimizer_G.zero_grad(set_to_none=True)
    state.optimizer_D.zero_grad(set_to_none=True)

    statistics = RunningStatistics(state.generator, ranks)
    parts = batch.split(config.train.batch_size)
    with weights_cast_once(device):
        for number, part in enumerate(parts, start=ranks.rank * len(parts)):
            torch.manual_seed(_seed(config, iteration, number))
            # Supervised: its own forward and backward, so that only one graph is alive at a time
            # and batch norm sees labeled and unlabeled images apart (as in the reference).
            _labeled_part(state, part, config, iteration, number, total)
            if part.unlabeled_images is not None:
                _unlabeled_part(state, part, config, iteration, number, total)

    if not ranks.alone:
        updates = len(parts) * (1 if batch.unlabeled_images is None else 2)
        ranks.add_up([*_gradients(state), *statistics.own_part(updates), *vars(total).values()])
        statistics.finish(updates)
    state.scaler.step(state.optimizer_G)
    if batch.unlabeled_images is not None:
        state.scaler.step(state.optimizer_D)
    state.scaler.update()
    state.update_teacher(iteration, config.train.ema_decay)
    total.g = (
        total.ce
        + config.loss.lambda_fm * total.fm
        + config.loss.lambda_st * total.st
        + config.loss.lambda_mlmt * total.mlmt
    )
    return total


def _labeled_part(
    state: TrainState, part: Batch, config: Config, iteration: int, number: int, total: StepLosses
) -> None:
    """What the labels of one batch teach the generator; arguments as of `_unlabeled_part`."""
    share = 1 / config.train.accumulate
    device = part.labeled_images.device
    shown = part.labeled_images
    if config.data.photometric_distortion:
        shown = distorted(shown, _rng(config, _LABELED_VIEW, iteration, number))
    with computed_in(number_format(config.train, device), device):
        logits, presence = state.generator.with_presence(shown)
    ce = losses.cross_entropy(logits, part.labeled_masks)
    mlmt = torch.zeros_like(ce)
    if presence is not None:
        mlmt = losses.presence(presence, part.labeled_masks)
    backward(state.scaler.scale(share * (ce + config.loss.lambda_mlmt * mlmt)))
    total.ce += share * ce.detach()
    total.mlmt += share * mlmt.detach()


def _unlabeled_part(
    state: TrainState, part: Batch, config: Config, iteration: int, number: int, total: StepLosses
) -> None:
    """Feature matching, self-training and the discriminator's own loss for one batch.

    Args:
        state: of the networks; their gradients, as its scaler scales them, are added to.
        part: the batch.
        config: of the run.
        iteration: from 1.
        number: of the batch within the iteration.
        total: losses, added to.
    """
    assert part.unlabeled_images is not None
    assert part.unlabeled_valid is not None
    assert part.real_images is not None
    assert part.real_masks is not None
    share = 1 / config.train.accumulate
    discriminator, scaled = state.discriminator, state.scaler.scale
    shown, mixed = _view(part.unlabeled_images, config, iteration, number)

    device = part.labeled_images.device
    precision = number_format(config.train, device)
    with computed_in(precision, device):
        logits, presence = state.generator.with_presence(shown)
    maps = logits.softmax(dim=1)
    # One mask for the pair: padding of the fake and void of the real are blank in both, or the
    # discriminator would tell them apart by their holes. By the boxes it may not tell them apart
    # either, so the real ones are mixed alike.
    real_masks = mixed(part.real_masks)
    valid = mixed(part.unlabeled_valid) & (real_masks != IGNORE)

    # Discriminator: labels are real, predictions are not. One pass of each is enough for both
    # networks, as its weights do not change in between; of labels first, whose graph then goes.
    weights = list(discriminator.parameters())
    real = discriminator_input_of_labels(
        real_masks, logits.shape[1], mixed(part.real_images), valid
    )
    with computed_in(precision, device):
        score_of_real, real_features = discriminator(real)
    d_real = losses.discriminator_loss(score_of_real, REAL)
    backward(scaled(share * d_real / 2), inputs=weights)
    del real

    # Cut here: each network gets its own gradient.
    fake = discriminator_input(maps.detach(), mixed(part.unlabeled_images), valid).requires_grad_()
    with computed_in(precision, device):
        score_of_fake, fake_features = discriminator(fake)
    fm = losses.feature_matching(fake_features, real_features)
    (wish,) = grad(scaled(fm), fake, retain_graph=True)
    # How the class maps should change; nothing is wished where nothing was seen of them.
    wish = wish[:, : logits.shape[1]].masked_fill(~valid.unsqueeze(1), 0.0)
    d_fake = losses.discriminator_loss(score_of_fake, FAKE)
    backward(scaled(share * d_fake / 2), inputs=weights)

    # Which predictions look real, and what they are told to be.
    mlmt = torch.zeros_like(fm)
    if _labels_itself(config):
        with computed_in(precision, device):
            score = _score(discriminator, fake.detach())
        label_maps = maps.detach()
    else:
        unmixed_valid = part.unlabeled_valid & (part.real_masks != IGNORE)
        with computed_in(precision, device):
            unmixed, taught = _teachers(state, part.unlabeled_images)
            score = _score(
                discriminator,
                discriminator_input(unmixed, part.unlabeled_images, unmixed_valid),
            )
        label_maps = mixed(unmixed)
        if presence is not None and taught is not None:
            # Not of images with a box of another one: nobody knows what is left in them.
            whole = torch.from_numpy(np.array(mixed.whole)).to(device, non_blocking=True)
            mlmt = losses.presence_consistency(presence, taught, whole)
    threshold = losses.gate_threshold(config.loss, iteration)
    accepted = losses.gate(score, threshold, config.loss.gate_share)
    st = torch.zeros_like(fm)
    if iteration > config.loss.st_start:
        counted = mixed(accepted[:, None, None] & part.unlabeled_valid)
        probability, labels = losses.most_probable(label_maps, counted)
        confident = probability > config.loss.confidence
        st = losses.self_training(logits, labels, counted, confident)

    # Generator: look real to the discriminator, and learn from what already does.
    rest = config.loss.lambda_st * st + config.loss.lambda_mlmt * mlmt
    roots, gradients = [maps], [share * config.loss.lambda_fm * wish]
    if rest.requires_grad:
        roots, gradients = [*roots, scaled(share * rest)], [*gradients, torch.ones_like(rest)]
    backward(roots, gradients)

    total.fm += share * fm.detach()
    total.st += share * st.detach()
    total.d += share * (d_real.detach() + d_fake.detach()) / 2
    total.mlmt += share * mlmt.detach()
    total.st_count += accepted.sum()


def _view(images: Tensor, config: Config, iteration: int, number: int) -> tuple[Tensor, Mix]:
    """What the generator is shown of a batch, and how everything that belongs to it is mixed."""
    data = config.data
    rng = _rng(config, _VIEW, iteration, number)
    height, width = images.shape[-2:]
    mixed = Mix.drawn(len(images), (height, width), data.cutmix, rng)
    return mixed(changed_colours(images, rng) if data.strong_augment else images), mixed


def _labels_itself(config: Config) -> bool:
    """Whether a prediction is its own pseudo-label, as in the paper.

    Not so if there is a teacher, or if the generator is shown something else than what is labeled.
    """
    data = config.data
    return not (config.train.ema_decay or data.strong_augment or data.cutmix)


def _teachers(state: TrainState, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Class maps, and logits of which classes there are, of the images as they are.

    By the teacher, or the generator if there is none.
    """
    labeler = state.predictor
    training = labeler.training
    labeler.eval()
    with torch.no_grad():
        logits, presence = labeler.with_presence(images)
    labeler.train(training)
    return logits.softmax(dim=1), presence


def _gradients(state: TrainState) -> list[Tensor]:
    """Of both networks, as far as there are some; the same ones on every rank."""
    parameters = (*state.generator.parameters(), *state.discriminator.parameters())
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _seed(config: Config, iteration: int, part: int) -> int:
    """Of what a part of an iteration draws (dropout): the same after a resume, on any process."""
    return int(_rng(config, _STEP, iteration, part).integers(2**63))


def _rng(config: Config, purpose: int, iteration: int, part: int) -> np.random.Generator:
    """Of one purpose: `_STEP`, `_VIEW` or `_LABELED_VIEW`."""
    return np.random.default_rng([config.train.seed, purpose, iteration, part])


def _score(discriminator: Discriminator, fake: Tensor) -> Tensor:
    """The discriminator's logits without dropout, so that the gate is no lottery; (N,)."""
    discriminator.eval()
    with torch.no_grad():
        score, _ = discriminator(fake)
    discriminator.train()
    assert isinstance(score, Tensor)
    return score
