"""S4GAN's step written down as the paper's reference code goes about it, to measure ours against.

The same arithmetic as `job.training.step` for the presets that have no teacher and no changed
views, done plainly: labels become class maps on the CPU, class by class; the gate asks for each
image by itself and copies what it accepts to the CPU and back; pixels are picked by boolean
indexing; the discriminator sees fake and real twice; everything is float32, channels first, and the
optimizers go through their tensors one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from job.config import Config
from job.data.dataset import IGNORE
from job.data.images import Crop
from job.data.streams import Batch
from job.models.discriminator import discriminator_input
from job.training.state import ADAM_BETAS, TrainState


@dataclass(frozen=True)
class PlainLosses:
    """Of one iteration."""

    ce: float
    fm: float
    st: float
    d: float
    st_count: int


def with_plain_optimizers(state: TrainState, config: Config) -> TrainState:
    """The state with optimizers that go through their tensors one at a time."""
    groups = [
        {"params": group["params"], "lr": group["lr"]} for group in state.optimizer_G.param_groups
    ]
    train = config.train
    state.optimizer_G = torch.optim.SGD(
        groups, lr=0.1, momentum=train.momentum, weight_decay=train.weight_decay, foreach=False
    )
    state.optimizer_D = torch.optim.Adam(
        state.discriminator.parameters(), lr=train.learning_rate_D, betas=ADAM_BETAS, foreach=False
    )
    return state


def plain_step(state: TrainState, batch: Batch, config: Config, iteration: int) -> PlainLosses:
    """One iteration; losses are read back at once, as the reference prints them each time.

    Args:
        state: with learning rates set; changed in place.
        batch: on the networks' device; `train.accumulate` must be 1.
        config: of the run.
        iteration: from 1.
    """
    assert batch.unlabeled_images is not None
    assert batch.unlabeled_valid is not None
    assert batch.real_images is not None
    assert batch.real_masks is not None
    generator, discriminator = state.generator, state.discriminator
    state.optimizer_G.zero_grad()
    state.optimizer_D.zero_grad()
    discriminator.requires_grad_(False)

    logits = generator(batch.labeled_images)
    ce = picked_cross_entropy(logits, batch.labeled_masks)
    unlabeled_logits = generator(batch.unlabeled_images)
    valid = batch.unlabeled_valid & (batch.real_masks != IGNORE)
    maps = unlabeled_logits.softmax(dim=1)
    fake = discriminator_input(maps, batch.unlabeled_images.float(), valid)
    fake_scores, fake_features = discriminator(fake)
    real_maps = class_maps_on_cpu(batch.real_masks, logits.shape[1]).to(logits.device)
    real = discriminator_input(real_maps, batch.real_images.float(), valid)
    _, real_features = discriminator(real)
    fm = (real_features.mean(dim=0) - fake_features.mean(dim=0)).abs().mean()
    st, accepted = picked_self_training(
        unlabeled_logits, fake_scores.sigmoid(), batch.unlabeled_valid, config.loss.threshold_st
    )
    loss = ce + config.loss.lambda_fm * fm
    if accepted and iteration > config.loss.st_start:
        loss = loss + config.loss.lambda_st * st
    else:
        st = torch.zeros(())
    loss.backward()

    discriminator.requires_grad_(True)
    fake_again, _ = discriminator(fake.detach())
    real_again, _ = discriminator(real.detach())
    halves = [
        F.binary_cross_entropy(scores.sigmoid(), torch.full_like(scores, truth))
        for scores, truth in ((fake_again, 0.0), (real_again, 1.0))
    ]
    d = (halves[0] + halves[1]) / 2
    d.backward()
    state.optimizer_G.step()
    state.optimizer_D.step()
    return PlainLosses(ce.item(), fm.item(), st.item(), d.item(), accepted)


def class_maps_on_cpu(masks_NHW: Tensor, num_classes: int) -> Tensor:
    """One class after the other, in NumPy."""
    labels = masks_NHW.cpu().numpy()
    maps = np.zeros((len(labels), num_classes, *labels.shape[1:]), np.float32)
    for index in range(num_classes):
        maps[:, index] = labels == index
    return torch.from_numpy(maps)


def picked_cross_entropy(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Of the pixels that have a label, gathered."""
    known = labels_NHW != IGNORE
    pixels = logits_NKHW.permute(0, 2, 3, 1)[known]
    return F.cross_entropy(pixels, labels_NHW[known].long())


def picked_self_training(
    logits_NKHW: Tensor, probabilities_N: Tensor, valid_NHW: Tensor, threshold: float
) -> tuple[Tensor, int]:
    """Loss of the images that look real enough, and how many there are."""
    chosen = [index for index in range(len(probabilities_N)) if probabilities_N[index] > threshold]
    if not chosen:
        return torch.zeros((), device=logits_NKHW.device), 0
    kept = torch.stack([logits_NKHW[index].cpu() for index in chosen])
    labels = np.stack([np.argmax(one.detach().numpy(), axis=0) for one in kept])
    pixels = kept.to(logits_NKHW.device).permute(0, 2, 3, 1)[valid_NHW[chosen]]
    wanted = torch.from_numpy(labels).to(logits_NKHW.device)[valid_NHW[chosen]]
    return F.cross_entropy(pixels, wanted), len(chosen)


MEAN_BGR = np.array([104.0, 116.7, 122.7], np.float32)


def scaled_then_cut(
    image: Image.Image, mask: Image.Image, crop: Crop
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A crop by way of the whole image: scaled, made float, padded and only then cut.

    Shape: float32 (3, H, W) and (H, W).
    """
    size = (round(image.width * crop.scale), round(image.height * crop.scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    labels = np.asarray(mask.resize(size, Image.Resampling.NEAREST), np.float32)
    pixels = pixels[:, :, ::-1] - MEAN_BGR
    below, right = (max(0, crop.height - size[1]), max(0, crop.width - size[0]))
    pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)))
    labels = np.pad(labels, ((0, below), (0, right)), constant_values=IGNORE)
    top = int(crop.top * (labels.shape[0] - crop.height + 1))
    left = int(crop.left * (labels.shape[1] - crop.width + 1))
    window = (slice(top, top + crop.height), slice(left, left + crop.width))
    chosen, cut = pixels[window].transpose(2, 0, 1), labels[window]
    if crop.mirror:
        chosen, cut = chosen[:, :, ::-1], cut[:, ::-1]
    return chosen.copy(), cut.copy()
