"""The losses of S4GAN, each a scalar that is never NaN for want of pixels or images.

Source: Mittal et al. 2019, arXiv:1908.05724.

Shape legend: N batch, K classes, C channels, H/W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from job.data.dataset import IGNORE


def cross_entropy(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Mean over the pixels that have a label; 0, with a graph, if none has.

    Shape: float logits, unbounded; uint8 labels, classes or IGNORE.
    """
    total = F.cross_entropy(logits_NKHW, labels_NHW.long(), ignore_index=IGNORE, reduction="sum")
    return total / (labels_NHW != IGNORE).sum().clamp_min(1)


def feature_matching(fake_NC: Tensor, real_NC: Tensor) -> Tensor:
    """Mean absolute difference of the batches' mean features; gradients flow to `fake_NC` alone.

    Shape: the discriminator's pooled features of predictions and of labels.
    Source: Salimans et al. 2016, arXiv:1606.03498, section 3.1; L1 as in S4GAN.
    """
    return (fake_NC.mean(dim=0) - real_NC.detach().mean(dim=0)).abs().mean()


def gate(score_logits_N: Tensor, threshold: float) -> Tensor:
    """Which images the discriminator takes for real: probability strictly above the threshold.

    Shape: float (N,) logits -> bool (N,), on the same device.
    """
    return score_logits_N.detach().sigmoid() > threshold


def self_training(logits_NKHW: Tensor, accepted_N: Tensor, valid_NHW: Tensor) -> Tensor:
    """Cross-entropy of the accepted predictions with their own most likely classes.

    Mean over the valid pixels of the accepted images; 0, with a graph, if there is none. Masked,
    not selected: the shapes do not depend on the data, and nothing waits for the device.

    Shape: logits unbounded; accepted bool (N,); valid bool, False on padding.
    """
    pseudo_labels = logits_NKHW.detach().argmax(dim=1)
    losses = F.cross_entropy(logits_NKHW, pseudo_labels, reduction="none")
    chosen = accepted_N[:, None, None] & valid_NHW
    return torch.where(chosen, losses, 0.0).sum() / chosen.sum().clamp_min(1)


def discriminator_loss(fake_logits_N: Tensor, real_logits_N: Tensor) -> Tensor:
    """Binary cross-entropy of telling predictions (0) from labels (1), mean of the two halves.

    0.693 (log 2) is what guessing costs.
    """
    fake = F.binary_cross_entropy_with_logits(fake_logits_N, torch.zeros_like(fake_logits_N))
    real = F.binary_cross_entropy_with_logits(real_logits_N, torch.ones_like(real_logits_N))
    return 0.5 * (fake + real)


def one_hot_maps(labels_NHW: Tensor, num_classes: int) -> Tensor:
    """Labels as class maps; ignored pixels are 0 in every class.

    Shape: uint8 (N, H, W) -> float32 (N, K, H, W).
    """
    classes = torch.arange(num_classes, device=labels_NHW.device, dtype=labels_NHW.dtype)
    return (labels_NHW.unsqueeze(1) == classes.view(1, -1, 1, 1)).float()
