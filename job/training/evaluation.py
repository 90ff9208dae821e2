"""Predicting whole images and scoring them at the full resolution of their masks."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from job.data.dataset import DatasetInfo, Item
from job.data.images import Array, read_labels, read_rgb, scaled_image
from job.heartbeat import beat
from job.models.generator import Generator
from job.training.confusion import ConfusionMatrix

_AHEAD = 4
"""Images decoded ahead of the network."""

Source = TypeVar("Source")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Predicted:
    """An image as the generator sees it."""

    miou: float
    """Of this image alone, over the classes in its truth or prediction."""
    item: Item
    prediction: Array
    """Classes, uint8 (H, W), of the mask's size."""


@dataclass(frozen=True)
class Evaluation:
    """Of a generator over labeled images."""

    matrix: ConfusionMatrix
    scores: dict[str, float]
    """mIoU of each image alone, by its id; empty if nothing was to be kept."""
    extremes: list[Predicted]
    """The worst and the best of them, worst first."""

    def keep(self, one: Predicted, count: int) -> None:
        """Take an image in; of the worst and of the best, `count` each stay."""
        self.scores[one.item.id] = one.miou
        bisect.insort(self.extremes, one, key=lambda other: (other.miou, other.item.id))
        if len(self.extremes) > 2 * count:
            del self.extremes[count]  # the middle one


def evaluate(
    generator: Generator,
    items: Sequence[Item],
    info: DatasetInfo,
    *,
    image_scale: float,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
    keep: int = 0,
) -> Evaluation | None:
    """Confusion matrix of a generator over labeled images, one image at a time, not augmented.

    Draws no random number and leaves the generator in the mode it was in.

    Args:
        generator: on `device`.
        items: each with a mask.
        info: their classes.
        image_scale: as in training.
        device: where to compute.
        stopped: asked before each image; True gives up.
        keep: of the worst images, and of the best, whose predictions are kept.

    Returns:
        None if given up.

    Raises:
        DataError: an image or mask can no longer be read.
    """

    def load(item: Item) -> tuple[Array, Array]:
        assert item.mask is not None
        image = scaled_image(read_rgb(item.image), image_scale)
        return image, read_labels(item.mask, info)

    found = Evaluation(ConfusionMatrix(info.num_classes, device), {}, [])
    training = generator.training
    generator.eval()
    try:
        for item, (image, mask) in zip(items, load_ahead(load, items), strict=True):
            if stopped():
                return None
            truth = torch.from_numpy(mask).to(device)
            prediction = predict(generator, image, mask.shape[-2:], device)
            if not keep:
                found.matrix.update(prediction, truth)
                continue
            alone = ConfusionMatrix(info.num_classes, device)
            alone.update(prediction, truth)
            found.matrix.counts += alone.counts
            classes = prediction.to(torch.uint8).cpu().numpy()
            found.keep(Predicted(alone.miou(), item, classes), keep)
    finally:
        generator.train(training)
    return found


@torch.no_grad()
def predict(
    generator: Generator, image: Array, size: tuple[int, ...], device: torch.device
) -> Tensor:
    """Most likely class of each pixel, with logits interpolated to `size` before the choice.

    Shape: image uint8 (h, w, 3) -> int64 `size` = (H, W). The generator must be in eval mode.
    """
    beat()
    tensor = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).to(device)
    logits = generator(tensor)
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)
    return logits.argmax(dim=1)[0]  # type: ignore[no-any-return]


def load_ahead(load: Callable[[Source], Loaded], sources: Iterable[Source]) -> Iterator[Loaded]:
    """`map(load, sources)` with a few results made ahead on threads, in order, bounded memory."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[Future[Loaded]] = deque()
        for source in sources:
            waiting.append(pool.submit(load, source))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
