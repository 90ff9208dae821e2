"""The losses of S4GAN, each a scalar that is never NaN for want of pixels or images.

Source: Mittal et al. 2019, arXiv:1908.05724.

Shape legend: N batch, K classes, C channels, H/W pixels.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from job.config import LossConfig
from job.data.dataset import IGNORE
from job.models.discriminator import one_hot_maps


def cross_entropy(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Mean over the pixels that have a label; 0, with a graph, if none has.

    Shape: float32 logits, unbounded; uint8 labels, classes or IGNORE.
    """
    return _mean_over(logits_NKHW, labels_NHW, labels_NHW != IGNORE)


def _mean_over(logits_NKHW: Tensor, labels_NHW: Tensor, counted_NHW: Tensor) -> Tensor:
    """Cross-entropy of the pixels that have a label, as a mean over those that are counted."""
    count = counted_NHW.sum().clamp_min(1)
    if _on_host(logits_NKHW):
        return cast(Tensor, _ImageByImage.apply(logits_NKHW, labels_NHW, count))
    total = F.cross_entropy(logits_NKHW, labels_NHW.long(), ignore_index=IGNORE, reduction="sum")
    return total / count


def _on_host(values: Tensor) -> bool:
    """Whether looking at a number, to save what it makes needless, waits for nothing."""
    return values.device.type == "cpu"


_SAFE = 60.0
"""Logits up to which float32 holds the sum of the exponentials of any number of classes."""


class _ImageByImage(torch.autograd.Function):
    """`_mean_over` for CPUs, in a fifth of the time of torch's own for whole batches.

    What is computed of one image stays in the caches. Each exponential is taken once, for the loss
    and its gradient, which is made at once; torch takes it again from the logarithms it keeps. An
    image without a label is passed over.
    """

    @staticmethod
    def forward(ctx: Any, logits_NKHW: Tensor, labels_NHW: Tensor, count: Tensor) -> Tensor:
        # NumPy's zeros are memory that nothing has touched: torch would write those of images that
        # are passed over.
        gradient = torch.from_numpy(np.zeros(logits_NKHW.shape, np.float32))
        total = logits_NKHW.new_zeros(())
        for logits, labels, own in zip(logits_NKHW, labels_NHW, gradient, strict=True):
            known = labels != IGNORE
            if not known.any():
                continue
            index = labels.masked_fill(~known, 0).long().unsqueeze(0)
            low, high = torch.aminmax(logits)
            if high < _SAFE and low > -_SAFE:
                shifted = logits
            else:  # their exponentials would be infinite, or their sum 0
                shifted = torch.sub(logits, logits.amax(dim=0), out=own)
            of_label = shifted.gather(0, index).squeeze(0)
            of_all = torch.exp(shifted, out=own).sum(dim=0)
            total += (of_all.log() - of_label).masked_fill_(~known, 0.0).sum()
            share = known / count
            own.mul_(share / of_all).scatter_add_(0, index, -share.unsqueeze(0))
        ctx.gradient = gradient
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # changed in place, so it serves once
        assert gradient is not None, "goes back once"
        return gradient if of_mean == 1 else gradient.mul_(of_mean), None, None


def feature_matching(fake_NC: Tensor, real_NC: Tensor) -> Tensor:
    """Mean absolute difference of the batches' mean features; gradients flow to `fake_NC` alone.

    Shape: the discriminator's pooled features of predictions and of labels.
    Source: Salimans et al. 2016, arXiv:1606.03498, section 3.1; L1 as in S4GAN.
    """
    return (fake_NC.mean(dim=0) - real_NC.detach().mean(dim=0)).abs().mean()


def gate(score_logits_N: Tensor, threshold: float, share: float = 0.0) -> Tensor:
    """Which images the discriminator takes for real: probability strictly above the threshold.

    And the share of them that look most real, rounded up to whole images, whatever it says of them.

    Shape: float (N,) logits -> bool (N,), on the same device.
    """
    scores_N = score_logits_N.detach()
    accepted_N = scores_N.sigmoid() > threshold
    count = math.ceil(round(share * len(scores_N), 6))  # of 10 images 0.7 are 7, not 8
    most_real = scores_N.nan_to_num(nan=-math.inf).topk(count).indices
    return accepted_N.index_fill(0, most_real, True)


def gate_threshold(loss: LossConfig, iteration: int) -> float:
    """Score that an image has to exceed in an iteration: from 1, where none does, to the final one.

    Source: the idea of a threshold that falls is the S4GAN reference's (its WRN-38 script).
    """
    if loss.gate_warmup == 0:
        return loss.threshold_st
    done = min(1.0, max(0.0, (iteration - loss.st_start) / loss.gate_warmup))
    return 1 - done * (1 - loss.threshold_st)


def most_probable(maps_NKHW: Tensor, wanted_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and number of each pixel's class; anything in images of which none is wanted.

    Of equals the first; of NaN the probability is NaN.

    Shape: probabilities of the classes; bool -> float and integer (N, H, W).
    """
    if not _on_host(maps_NKHW):  # nothing may depend on the data
        # Both at once: argmax alone takes three times as long.
        probability, labels = maps_NKHW.max(dim=1)
        return probability, labels
    # Compared with the largest, image by image in the caches: a third of the time of `max`.
    from_ignore = (IGNORE - torch.arange(maps_NKHW.shape[1])).to(torch.uint8).view(-1, 1, 1)
    probability = torch.zeros_like(maps_NKHW[:, 0])
    labels = torch.zeros_like(probability, dtype=torch.uint8)
    for number, wanted in enumerate(wanted_NHW):
        if wanted.any():
            maps = maps_NKHW[number]
            torch.amax(maps, 0, out=probability[number])
            largest = (maps == probability[number]).view(torch.uint8)
            torch.sub(IGNORE, largest.mul_(from_ignore).amax(0), out=labels[number])
    return probability, labels


def self_training(
    logits_NKHW: Tensor, pseudo_labels_NHW: Tensor, accepted_NHW: Tensor, confident_NHW: Tensor
) -> Tensor:
    """Cross-entropy of accepted predictions with pseudo-labels.

    Mean over the pixels of accepted images, of which those that are not confident count as 0; 0,
    with a graph, if there is none. Masked, not selected: the shapes do not depend on the data, and
    nothing waits for the device.

    Shape: logits unbounded; integer labels; bool masks, of which the first is False on padding.
    """
    labels = pseudo_labels_NHW.masked_fill(~(accepted_NHW & confident_NHW), IGNORE)
    return _mean_over(logits_NKHW, labels, accepted_NHW)


def presence(logits_NK: Tensor, labels_NHW: Tensor) -> Tensor:
    """Binary cross-entropy of which classes an image holds with those of its mask.

    Shape: float logits; uint8 labels, classes or IGNORE. Images without a label count for nothing.
    Source: Mittal et al. 2019, arXiv:1908.05724, the MLMT branch.
    """
    truth = one_hot_maps(labels_NHW, logits_NK.shape[1]).amax(dim=(2, 3))
    known = truth.amax(dim=1, keepdim=True)
    losses = F.binary_cross_entropy_with_logits(logits_NK, truth, reduction="none")
    return (known * losses).mean(dim=1).sum() / known.sum().clamp_min(1)


def presence_consistency(logits_NK: Tensor, teacher_logits_NK: Tensor, counted_N: Tensor) -> Tensor:
    """Mean squared difference of probabilities from the teacher's, over the images that count.

    Source: Tarvainen and Valpola 2017, arXiv:1703.01780; the reference takes the cosine.
    """
    difference = (logits_NK.sigmoid() - teacher_logits_NK.detach().sigmoid()).square().mean(dim=1)
    return torch.where(counted_N, difference, 0.0).sum() / counted_N.sum().clamp_min(1)


def discriminator_loss(logits_N: Tensor, truth: float) -> Tensor:
    """Binary cross-entropy of taking predictions (0) for such, or labels (1).

    The discriminator's loss is the mean of both; 0.693 (log 2) is what guessing costs.
    """
    return F.binary_cross_entropy_with_logits(logits_N, torch.full_like(logits_N, truth))
