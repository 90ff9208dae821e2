"""Predicting whole images and scoring them at the full resolution of their masks."""

from __future__ import annotations

import bisect
import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from job.data.dataset import DatasetInfo, Item
from job.data.images import Array, read_facts, read_labels, read_rgb, scaled_image
from job.heartbeat import beat
from job.models.generator import Generator
from job.training import tiling
from job.training.confusion import ConfusionMatrix, counts_of_each
from job.training.precision import sizes_differ
from job.training.protocols import PLAIN, Protocol, logits_of, probabilities

_AHEAD = 4
"""Images decoded ahead of the network."""
PIXELS_AT_ONCE = 1 << 20
"""Of images that pass a GPU's network together: less memory than a step of training takes."""

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
    windowed: list[str] = field(default_factory=list)
    """Images that a window slid over, by id."""

    def keep(self, one: Predicted, count: int) -> None:
        """Take an image in; of the worst and of the best, `count` each stay."""
        self.scores[one.item.id] = one.miou
        bisect.insort(self.extremes, one, key=lambda other: (other.miou, other.item.id))
        if len(self.extremes) > 2 * count:
            del self.extremes[count]  # the middle one


@sizes_differ()
def evaluate(
    generator: Generator,
    items: Sequence[Item],
    info: DatasetInfo,
    *,
    image_scale: float,
    device: torch.device,
    protocol: Protocol = PLAIN,
    stopped: Callable[[], bool] = lambda: False,
    keep: int = 0,
    look: Callable[[Item, Tensor, Tensor], None] | None = None,
) -> Evaluation | None:
    """Confusion matrix of a generator over labeled images, not augmented.

    On a GPU images of one size pass together, and come in the order of their sizes. Large ones go
    through the network in tiles, unless the protocol says how much it sees at a time.

    Draws no random number and leaves the generator in the mode it was in.

    Args:
        generator: on `device`.
        items: each with a mask.
        info: their classes.
        image_scale: as in training.
        device: where to compute.
        protocol: how an image is looked at.
        stopped: asked before each image or group of them; True gives up.
        keep: of the worst images, and of the best, whose predictions are kept.
        look: shown each image's prediction and truth, both (H, W).

    Returns:
        None if given up.

    Raises:
        DataError: an image or mask can no longer be read.
    """
    scale = 1.0 if protocol.resizes else image_scale

    def in_tiles(labels: Array) -> bool:
        height, width = labels.shape
        return protocol.window is None and tiling.is_large((width, height), scale)

    def load(item: Item) -> tuple[Array, Array]:
        assert item.mask is not None
        image, labels = read_rgb(item.image), read_labels(item.mask, info)
        if protocol.resizes or protocol.centre_crop:
            image = protocol.fitted(image)
            labels = np.array(protocol.fitted(Image.fromarray(labels), labels=True))
        return np.array(image) if in_tiles(labels) else scaled_image(image, scale), labels

    def predicted(images: Array, labels: Array) -> Tensor:
        if not in_tiles(labels):
            return predict(generator, images, labels.shape, device, protocol)
        classes = [
            predict_in_tiles(generator, Image.fromarray(image), scale, device, protocol)
            for image in images
        ]
        return torch.from_numpy(np.stack(classes)).to(device, torch.int64)

    found = Evaluation(ConfusionMatrix(info.num_classes, device), {}, [])
    training = generator.training
    generator.eval()
    try:
        at_once = pixels_at_once(device, protocol)
        if at_once > 1:
            items = sorted(items, key=lambda item: _size(item.image))
        loaded = zip(items, load_ahead(load, items), strict=True)
        for group in alike(loaded, at_once):
            if stopped():
                return None
            some, images, masks = zip(*((item, *arrays) for item, arrays in group), strict=True)
            if not protocol.sees_whole(*images[0].shape[:2]):
                found.windowed.extend(item.id for item in some)
            predictions = predicted(np.stack(images), masks[0])
            truths = torch.from_numpy(np.stack(masks)).to(device)
            counts = counts_of_each(predictions, truths, info.num_classes)
            found.matrix.counts += counts.sum(dim=0)
            if look is not None:
                for item, prediction, truth in zip(some, predictions, truths, strict=True):
                    look(item, prediction, truth)
            if keep:
                classes = predictions.to(torch.uint8).cpu().numpy()
                for item, own, shown in zip(some, counts.cpu(), classes, strict=True):
                    found.keep(Predicted(ConfusionMatrix.of(own).miou(), item, shown), keep)
    finally:
        generator.train(training)
    return found


@functools.lru_cache(maxsize=100_000)
def _size(image: Path) -> tuple[int, int]:
    """Width and height, by the header; read once, not for each evaluation."""
    return read_facts(image).size


def pixels_at_once(device: torch.device, protocol: Protocol) -> int:
    """How many pixels of images pass together; a CPU gains nothing by more than one image."""
    return 1 if device.type == "cpu" or protocol.averages else PIXELS_AT_ONCE


def alike(
    loaded: Iterable[tuple[Item, tuple[Array, Array]]], at_once: int
) -> Iterator[list[tuple[Item, tuple[Array, Array]]]]:
    """Images and masks in groups of one size each, in the order given.

    Args:
        loaded: each item with its image and mask.
        at_once: pixels that a group's images, or its masks, may have; but it has at least one.
    """

    def belongs(
        group: Sequence[tuple[Item, tuple[Array, Array]]], one: tuple[Item, tuple[Array, Array]]
    ) -> bool:
        sizes = [array.shape for array in one[1]]
        pixels = (len(group) + 1) * max(math.prod(size[:2]) for size in sizes)
        return pixels <= at_once and sizes == [array.shape for array in group[0][1]]

    return in_groups(loaded, belongs)


def in_groups(
    source: Iterable[Source], belongs: Callable[[Sequence[Source], Source], bool]
) -> Iterator[list[Source]]:
    """Neighbours together, in the order given; `belongs` says whether one joins those before it."""
    group: list[Source] = []
    for one in source:
        if group and not belongs(group, one):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


@torch.no_grad()
def predict(
    generator: nn.Module,
    images: Array,
    size: tuple[int, ...],
    device: torch.device,
    protocol: Protocol = PLAIN,
) -> Tensor:
    """Most likely class of each pixel, with logits interpolated to `size` before the choice.

    Shape: images uint8 (N, h, w, 3) -> int64 (N, H, W), `size` = (H, W). The generator must be in
    eval mode.
    """
    beat()
    tensor = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    height, width = size
    if protocol.averages:
        looks = (probabilities(generator, one, (height, width), protocol) for one in tensor)
        return torch.stack([one.argmax(dim=0) for one in looks])
    logits = logits_of(generator, tensor, protocol)
    if tuple(logits.shape[-2:]) != (height, width):
        logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=True)
    return logits.argmax(dim=1)


def predict_in_tiles(
    generator: nn.Module,
    image: Image.Image,
    image_scale: float,
    device: torch.device,
    protocol: Protocol = PLAIN,
    side: int | None = None,
) -> Array:
    """The class of each pixel of an image of any size; uint8 (H, W).

    Args:
        generator: on `device`, in evaluation mode.
        image: RGB, before it is scaled.
        image_scale: of the model.
        device: where to compute.
        protocol: how a tile is looked at.
        side: of a tile in pixels as the network sees them; None: `tiling.TILE`.
    """

    def look(part: Image.Image) -> Array:
        size = (part.height, part.width)
        classes = predict(generator, scaled_image(part, image_scale)[None], size, device, protocol)
        found: Array = classes[0].to(torch.uint8).cpu().numpy()
        return found

    return tiling.tiled(image, image_scale, side or tiling.TILE, look)


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
