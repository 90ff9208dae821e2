"""The three streams of training images (labeled, unlabeled, real) as one loader of iterations.

Which images an iteration gets, and how each is cut, is a pure function of (seed, stream, place in
the stream). The loader has no state: to resume, it is simply asked to start at another iteration.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from job.config import Config
from job.data.dataset import DatasetInfo
from job.data.decoded import decoder
from job.data.images import (
    Crop,
    cut_image,
    cut_mask,
    random_crop,
    valid_pixels,
)
from job.data.paths import PathTable
from job.data.splits import SplitItems
from job.errors import DataError, JobError, StorageError

log = logging.getLogger(__name__)

_STREAMS = {"labeled": 1, "unlabeled": 2, "real": 3}
_ORDER, _CROP = 1, 2
"""Parts of every random seed; never renumber, or old runs resume with other data."""

_PREFETCH = 2
"""Batches that each loader process makes ahead."""
_BATCHES_IN_USE = 2
"""One that is trained on and one on its way to the device."""
_SHARED_MEMORY = "/dev/shm"
_MEND_SHARED = "in a container: docker run --shm-size 2g"


@dataclass
class Batch:
    """All images of one iteration; N = batch_size * accumulate.

    Shape: images uint8 (N, 3, H, W), RGB; masks uint8 (N, H, W), classes or IGNORE; valid bool
    (N, H, W). The unlabeled and real parts are None when training on the labels alone.
    """

    labeled_images: Tensor
    labeled_masks: Tensor
    unlabeled_images: Tensor | None = None
    unlabeled_valid: Tensor | None = None
    """False on padding."""
    real_images: Tensor | None = None
    """A second, independent draw of labeled images: what the discriminator learns as real."""
    real_masks: Tensor | None = None
    unreadable: list[str] = field(default_factory=list)
    """Files that could not be decoded; another image stands in their place."""

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **changed)

    def pin_memory(self) -> Batch:
        """In page-locked memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    def share_memory(self) -> Batch:
        """In memory that another process can read.

        Raises:
            RuntimeError: there is too little of it.
        """
        return self._map(Tensor.share_memory_)

    def to(self, device: torch.device) -> Batch:
        """On a device, without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` images each, for gradient accumulation."""
        count = len(self.labeled_images) // size
        return [
            self._map(lambda tensor, start=i * size: tensor[start : start + size])  # type: ignore[misc]
            for i in range(count)
        ]


class IterationDataset(Dataset[Batch]):
    """Map-style data set whose index is the iteration, counted from 1.

    Of `world` ranks, each has the images of its own stretch of the iteration.
    """

    def __init__(
        self,
        items: SplitItems,
        info: DatasetInfo,
        config: Config,
        rank: int = 0,
        world: int = 1,
        decoded: Path | None = None,
    ) -> None:
        # What goes to each loader process, and stays there: no more of the items than this.
        self._labeled_images = PathTable(item.image for item in items.labeled)
        self._labeled_masks = PathTable(item.mask for item in items.labeled if item.mask)
        self._unlabeled_images = PathTable(item.image for item in items.unlabeled)
        self._decoder = decoder(items, config.data, decoded)
        self._info = info
        self._config = config
        self._images_per_iteration = config.train.batch_size * config.train.accumulate
        self._share = self._images_per_iteration // world
        self._first = rank * self._share

    def __getitem__(self, iteration: int) -> Batch:
        """Load, cut and stack the images of an iteration."""
        unreadable: list[str] = []
        images, masks = self._labeled("labeled", iteration, unreadable)
        batch = Batch(images, masks, unreadable=unreadable)
        if not self._config.train.supervised_only:
            batch.unlabeled_images, batch.unlabeled_valid = self._unlabeled(iteration, unreadable)
            batch.real_images, batch.real_masks = self._labeled("real", iteration, unreadable)
        return batch

    def _labeled(self, stream: str, iteration: int, unreadable: list[str]) -> tuple[Tensor, Tensor]:
        images, masks = [], []
        for index, crop in self._drawn(stream, len(self._labeled_images), iteration):
            image, mask = self._read_or_next(
                self._labeled_images, self._labeled_masks, index, unreadable
            )
            assert mask is not None
            images.append(cut_image(image, crop))
            masks.append(cut_mask(mask, crop, self._info))
        return _to_nchw(images), torch.from_numpy(np.stack(masks))

    def _unlabeled(self, iteration: int, unreadable: list[str]) -> tuple[Tensor, Tensor]:
        images, valid = [], []
        for index, crop in self._drawn("unlabeled", len(self._unlabeled_images), iteration):
            image, _ = self._read_or_next(self._unlabeled_images, None, index, unreadable)
            images.append(cut_image(image, crop))
            valid.append(valid_pixels(image.size, crop))
        return _to_nchw(images), torch.from_numpy(np.stack(valid))

    def _read_or_next(
        self, images: PathTable, masks: PathTable | None, index: int, unreadable: list[str]
    ) -> tuple[Image.Image, Image.Image | None]:
        """Image and mask, or the next ones that can be decoded, so that a batch stays full."""
        for offset in range(len(images)):
            place = (index + offset) % len(images)
            path = images[place]
            try:
                image = self._decoder.image(path)
                if masks is None:
                    return image, None
                path = masks[place]
                return image, self._decoder.mask(path)
            except DataError:
                unreadable.append(str(path))
        raise DataError(
            f"none of {len(images)} training images can be read any more (last: {unreadable[-1]})",
            mend="check that the data folder is still there",
        )

    def _drawn(self, stream: str, num_items: int, iteration: int) -> list[tuple[int, Crop]]:
        """Index and crop of each image of an iteration."""
        data, seed, number = self._config.data, self._config.train.seed, _STREAMS[stream]
        first = (iteration - 1) * self._images_per_iteration + self._first
        return [
            (
                drawn_index(seed, number, num_items, place),
                random_crop(
                    np.random.default_rng([seed, number, _CROP, place]),
                    data.crop_size,
                    image_scale=data.image_scale,
                    scale_range=data.scale_range if data.random_scale else None,
                    random_mirror=data.random_mirror,
                ),
            )
            for place in range(first, first + self._share)
        ]


def drawn_index(seed: int, stream: int, num_items: int, place: int) -> int:
    """Index of the image at a place of an endless stream that shuffles anew for each pass."""
    epoch, offset = divmod(place, num_items)
    return int(_permutation(seed, stream, num_items, epoch)[offset])


@lru_cache(maxsize=8)
def _permutation(seed: int, stream: int, num_items: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, stream, _ORDER, epoch]).permutation(num_items)


def _to_nchw(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


class _ErrorsAsItems(Dataset[Any]):
    """Hands an error on as an item: raised in a loader process, torch would rewrite its text."""

    def __init__(self, dataset: IterationDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, iteration: int) -> Batch | JobError:
        try:
            batch = self._dataset[iteration]
        except DataError as error:
            return error
        if get_worker_info() is None:
            return batch
        try:
            # On its way to the main process it goes through shared memory. Done here, because a
            # failure of the queue that does it is printed and lost, and all would wait for ever.
            return batch.share_memory()
        except RuntimeError:
            return StorageError(f"the shared memory ({_SHARED_MEMORY}) is full", mend=_MEND_SHARED)


class _IterationLoader(DataLoader[Any]):
    """A DataLoader whose iterator raises those errors, and can be closed."""

    def __iter__(self) -> Generator[Batch, None, None]:  # type: ignore[override]
        iterator = super().__iter__()
        try:
            # Counted, so that torch does not see the end and close by itself: see `_close`.
            for _ in range(len(self)):
                item = next(iterator)
                if isinstance(item, JobError):
                    raise item
                yield item
        finally:
            # Not left to the garbage collector: an error's traceback would keep the loader
            # processes alive, and the interpreter would wait for them at its end.
            if self.num_workers:
                _close(iterator)


def _close(iterator: Any) -> None:
    """End the loader processes, whatever state they are in: nothing of theirs is needed."""
    try:
        iterator._shutdown_workers()
    except RuntimeError as error:
        # One died of a signal while it was asked to leave. That is no failure of the training,
        # and the others must not be left behind.
        log.debug("a loader process: %s", error)
        for queue in iterator._index_queues:
            queue.cancel_join_thread()
    for worker in iterator._workers:
        worker.kill()  # one that hangs in a read would be waited for as well


def iteration_loader(
    items: SplitItems,
    info: DatasetInfo,
    config: Config,
    *,
    first: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    decoded: Path | None = None,
) -> _IterationLoader:
    """Batches of the iterations `first` to the last one, in order, loaded ahead by processes.

    Of `world` ranks that train together on one machine, `rank` gets its share of each. Images that
    are decoded may be kept in the folder `decoded`, if there is one (`job.data.decoded`).
    Close its iterator (contextlib.closing) when leaving early, so that the processes end.
    """
    workers = _num_workers(config, device, world)
    return _IterationLoader(
        _ErrorsAsItems(IterationDataset(items, info, config, rank, world, decoded)),
        batch_size=None,
        sampler=range(first, config.train.iterations + 1),
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=_prepare_worker,
        # Without its own generator the loader would draw from the global one at every start,
        # and a resumed run would no longer be bit-identical.
        generator=torch.Generator(),
        # The trackers' threads make a plain fork unsafe. Of the two others only spawn makes the
        # loaders our own children, who notice when we are killed and leave too.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=device.type == "cuda",
    )


def _num_workers(config: Config, device: torch.device, world: int) -> int:
    if config.data.workers != "auto":
        wanted = config.data.workers
    elif device.type != "cuda":  # a CPU run computes on every core already
        wanted = 0
    else:
        cores = len(os.sched_getaffinity(0))  # a container may have fewer than the machine
        wanted = min(8, max(1, cores // world - 1))
    possible = min(wanted, _workers_that_fit(config))
    if possible < wanted:
        log.warning(
            "the shared memory (%s) is too small for %d loader processes; %s (%s)",
            _SHARED_MEMORY,
            wanted,
            f"{possible} load the images" if possible else "the trainer loads the images itself",
            _MEND_SHARED,
        )
    return possible


def _workers_that_fit(config: Config) -> int:
    """How many loader processes the shared memory has room for; an engine's default is 64 MB."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:  # not on this system
        return sys.maxsize
    images = config.train.batch_size * config.train.accumulate
    streams = 1 if config.train.supervised_only else len(_STREAMS)
    height, width = config.data.crop_size
    batch_bytes = images * streams * height * width * (3 + 1)  # RGB, and a mask or what is valid
    # Several ranks share it, but each has its share of a batch only: the count is that of each.
    batches = status.f_bavail * status.f_frsize // batch_bytes
    return max(0, batches - _BATCHES_IN_USE) // _PREFETCH


def _prepare_worker(_worker: int) -> None:
    """Ctrl-C, and a closed terminal, reach the whole process group: the main process acts on it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Without the destructors of C++: about one process in twenty aborted in them ("terminate
    # called without an active exception", torch 2.15), which the main process takes for a crash.
    atexit.register(os._exit, 0)
