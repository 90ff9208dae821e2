"""Small configurations, states and batches for the tests of `job.training`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from job.config import Config, config_from_dict
from job.data.images import IGNORE
from job.data.streams import Batch
from job.training.state import TrainState, new_train_state

CPU = torch.device("cpu")
CLASSES = 3
SIZE = 32

_DEFAULTS: Mapping[str, Any] = {
    "data.crop_size": SIZE,
    "model.backbone": "tiny",
    "model.weights": "none",
    "model.discriminator_channels": 8,
    "train.iterations": 5,
    "train.batch_size": 2,
    "train.accumulate": 1,
    "train.learning_rate": 0.01,
    "train.log_every": 1,
    "train.eval_every": 1000,
    "loss.threshold_st": 0.0,
    "loss.st_start": 0,
    "checkpoint.every": 1000,
    "checkpoint.keep_every": 1000,
}


def tiny_config(**changes: Any) -> Config:
    """`changes` are written section__key=value."""
    raw: dict[str, dict[str, Any]] = {}
    for dotted, value in {
        **_DEFAULTS,
        **{name.replace("__", ".", 1): value for name, value in changes.items()},
    }.items():
        section, _, key = dotted.partition(".")
        raw.setdefault(section, {})[key] = value
    return config_from_dict(raw, source="test")


def new_state(config: Config) -> TrainState:
    return new_train_state(config, CLASSES, CPU)[0]


def random_images(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def random_masks(generator: torch.Generator, count: int) -> Tensor:
    """With an ignored stripe at the top."""
    masks = torch.randint(0, CLASSES, (count, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    masks[:, :3] = IGNORE
    return masks


def random_batch(config: Config, seed: int = 1) -> Batch:
    """Full size; masks have an ignored stripe at the top, unlabeled images padding at the right."""
    generator = torch.Generator().manual_seed(seed)
    count = config.train.batch_size * config.train.accumulate
    batch = Batch(random_images(generator, count), random_masks(generator, count))
    if not config.train.supervised_only:
        batch.unlabeled_images = random_images(generator, count)
        batch.unlabeled_valid = torch.ones(count, SIZE, SIZE, dtype=torch.bool)
        batch.unlabeled_valid[:, :, -5:] = False
        batch.real_images = random_images(generator, count)
        batch.real_masks = random_masks(generator, count)
    return batch
