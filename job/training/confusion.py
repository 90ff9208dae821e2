"""Confusion matrix and the scores made from it."""

from __future__ import annotations

import torch
from torch import Tensor

from job.data.dataset import IGNORE


class ConfusionMatrix:
    """Counts of (truth, prediction) pairs over pixels; ignored pixels do not count.

    Shape: `counts` int64 (K, K), rows truth, columns prediction.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)

    @classmethod
    def of(cls, counts_KK: Tensor) -> ConfusionMatrix:
        """From counts, which it keeps."""
        matrix = cls(len(counts_KK), counts_KK.device)
        matrix.counts = counts_KK
        return matrix

    def class_iou(self) -> list[float | None]:
        """Intersection over union of each class; None for one in neither truth nor prediction."""
        counts = self.counts.double().cpu()
        hits = counts.diagonal()
        union = counts.sum(dim=0) + counts.sum(dim=1) - hits
        return [float(h / u) if u > 0 else None for h, u in zip(hits, union, strict=True)]

    def miou(self) -> float:
        """Mean IoU over the classes that occur; 0 if none does."""
        present = [iou for iou in self.class_iou() if iou is not None]
        return sum(present) / len(present) if present else 0.0

    def miou_all(self) -> float:
        """Mean IoU over all classes; one that occurs in neither counts as 0.

        That is what the S4GAN reference's metric does; over a few images it is lower.
        """
        return sum(iou or 0.0 for iou in self.class_iou()) / self.num_classes

    def class_accuracy(self) -> list[float | None]:
        """Share of each class's pixels that are predicted right; None for one not in the truth."""
        counts = self.counts.double().cpu()
        pairs = zip(counts.diagonal(), counts.sum(dim=1), strict=True)
        return [float(hits / pixels) if pixels > 0 else None for hits, pixels in pairs]

    def mean_class_accuracy(self) -> float:
        """Over the classes of the truth; 0 if there is none."""
        present = [one for one in self.class_accuracy() if one is not None]
        return sum(present) / len(present) if present else 0.0

    def frequency_weighted_iou(self) -> float:
        """IoU of the classes, each weighted by its share of the truth's pixels.

        Source: Long et al. 2015, arXiv:1411.4038, section 5.
        """
        counts = self.counts.double().cpu()
        shares = counts.sum(dim=1) / counts.sum().clamp_min(1)
        pairs = zip(shares, self.class_iou(), strict=True)
        return sum(float(share) * (iou or 0.0) for share, iou in pairs)

    def pixel_accuracy(self) -> float:
        """Share of pixels predicted right; 0 if there is none."""
        counts = self.counts.double().cpu()
        return float(counts.diagonal().sum() / counts.sum().clamp_min(1))


def counts_of_each(predictions_NHW: Tensor, truths_NHW: Tensor, num_classes: int) -> Tensor:
    """Counts of (truth, prediction) pairs, image by image; ignored pixels do not count.

    Shape: integers (N, H, W), predictions 0..K-1, truths 0..K-1 or IGNORE -> int64 (N, K, K).
    """
    count = len(truths_NHW)
    pairs = truths_NHW.long() * num_classes + predictions_NHW.long()
    cells = num_classes**2 + 1  # the last is of what is ignored
    pairs = pairs.masked_fill_(truths_NHW == IGNORE, cells - 1)
    pairs += cells * torch.arange(count, device=pairs.device).view(-1, 1, 1)
    counts = torch.bincount(pairs.flatten(), minlength=count * cells)
    return counts.view(count, cells)[:, :-1].reshape(count, num_classes, num_classes)
