"""How well borders are met: the boundary F-score of each class.

Shape legend: N images, K classes, H/W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from job.data.dataset import IGNORE

TOLERANCE = 0.0075
"""Of the image's diagonal. Source: Csurka et al. 2013, "What is a good evaluation measure for
semantic segmentation?", BMVC."""


class BoundaryScore:
    """Mean over images of the F-score of each class's border.

    A border pixel counts as met if the other one has a border of that class within the tolerance.
    Ignored pixels within the tolerance of labeled ones go to those, as PASCAL VOC draws a band of
    them along every border, which would leave no border to meet. Of what is farther inside an
    ignored area, or beside it, nothing is asked.

    Args:
        num_classes: K.
        tolerance: of the diagonal.
    """

    def __init__(self, num_classes: int, tolerance: float = TOLERANCE) -> None:
        self._tolerance = tolerance
        self._sums = [0.0] * num_classes
        self._counts = [0] * num_classes

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Take an image in.

        Shape: integers (H, W); truth may hold IGNORE.
        """
        radius = max(1, round(self._tolerance * math.hypot(*truth.shape)))
        truth = _shared(truth, radius)
        valid = truth != IGNORE
        disk = _disk(radius, truth.device)
        for index in range(len(self._counts)):
            wanted = _border((truth == index) & valid, valid)
            given = _border((prediction == index) & valid, valid)
            if not (wanted.any() or given.any()):
                continue
            self._counts[index] += 1
            met = (
                float((given & _near(wanted, disk)).sum()),
                float((wanted & _near(given, disk)).sum()),
            )
            if all(met):
                precision, recall = met[0] / float(given.sum()), met[1] / float(wanted.sum())
                self._sums[index] += 2 * precision * recall / (precision + recall)

    def class_scores(self) -> list[float | None]:
        """Of each class; None for one that has no border in any image."""
        return [
            total / count if count else None
            for total, count in zip(self._sums, self._counts, strict=True)
        ]

    def mean(self) -> float:
        """Over the classes that have one; 0 if none has."""
        found = [score for score in self.class_scores() if score is not None]
        return sum(found) / len(found) if found else 0.0


_BESIDE = (
    (slice(1, None), slice(None)),
    (slice(None, -1), slice(None)),
    (slice(None), slice(1, None)),
    (slice(None), slice(None, -1)),
)
"""Of an image, what has a neighbour above, below, to the left, to the right."""


def _shared(truth: Tensor, steps: int) -> Tensor:
    """Ignored pixels given to the labels beside them, from their edges inwards, so many deep."""
    labels = truth
    for _ in range(steps):
        before, labels = labels, labels.clone()
        for number, at in enumerate(_BESIDE):
            neighbour = before[_BESIDE[number ^ 1]]
            free = (labels[at] == IGNORE) & (neighbour != IGNORE)
            labels[at] = torch.where(free, neighbour, labels[at])
        if torch.equal(before, labels):
            break
    return labels


def _border(mask: Tensor, valid: Tensor) -> Tensor:
    """Pixels of a mask beside one that is not in it; the image's edge is no border."""
    outside = ~mask & valid
    beside = torch.zeros_like(mask)
    beside[1:] |= outside[:-1]
    beside[:-1] |= outside[1:]
    beside[:, 1:] |= outside[:, :-1]
    beside[:, :-1] |= outside[:, 1:]
    return mask & beside


def _disk(radius: int, device: torch.device) -> Tensor:
    steps = torch.arange(-radius, radius + 1, device=device)
    return (steps[:, None] ** 2 + steps[None] ** 2 <= radius**2).float()[None, None]


def _near(border: Tensor, disk: Tensor) -> Tensor:
    """Pixels within a disk of a border."""
    spread = F.conv2d(border[None, None].float(), disk, padding=disk.shape[-1] // 2)
    return spread[0, 0] > 0.5
