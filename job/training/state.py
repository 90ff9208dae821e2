"""`TrainState`: everything the next iteration reads, and how it is saved and brought back.

What is not here is a pure function of the configuration and the iteration: the order of the data,
every crop, the learning rates, what dropout draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from job.checkpoint.manager import BestModel
from job.config import Config
from job.models.discriminator import Discriminator
from job.models.generator import Generator
from job.models.weights import load_backbone_weights
from job.training.schedule import HEAD_FACTOR, polynomial

ADAM_BETAS = (0.9, 0.99)
"""Of the discriminator's Adam. Source: the S4GAN reference."""


@dataclass
class TrainState:
    """Both networks, both optimizers, and where the run stands."""

    generator: Generator
    discriminator: Discriminator
    optimizer_G: torch.optim.Optimizer
    optimizer_D: torch.optim.Optimizer
    iteration: int = 0
    """Updates done so far."""
    evaluated_iteration: int = 0
    """Iteration of the last finished evaluation; less than `iteration` if one is still owed."""
    best: BestModel | None = None
    unreadable: set[str] = field(default_factory=set)
    """Training images that could not be decoded so far."""
    run_facts: Mapping[str, Any] = field(default_factory=dict)
    """Which run this is (configuration, ids); saved along, not restored."""

    def set_learning_rates(self, iteration: int, config: Config) -> tuple[float, float]:
        """Set both optimizers for an iteration; returns (generator's backbone, discriminator)."""
        train = config.train
        lr_g = polynomial(train.learning_rate, iteration, train.iterations, train.power)
        lr_d = polynomial(train.learning_rate_D, iteration, train.iterations, train.power)
        backbone, head = self.optimizer_G.param_groups
        backbone["lr"], head["lr"] = lr_g, lr_g * HEAD_FACTOR
        self.optimizer_D.param_groups[0]["lr"] = lr_d
        return lr_g, lr_d

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        return {
            "iteration": self.iteration,
            "evaluated_iteration": self.evaluated_iteration,
            "best": self.best.to_dict() if self.best else None,
            "unreadable": sorted(self.unreadable),
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer_G": self.optimizer_G.state_dict(),
            "optimizer_D": self.optimizer_D.state_dict(),
            "run": dict(self.run_facts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.iteration = state["iteration"]
        self.evaluated_iteration = state["evaluated_iteration"]
        self.best = BestModel.from_dict(state["best"]) if state["best"] else None
        self.unreadable = set(state["unreadable"])
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer_G.load_state_dict(state["optimizer_G"])
        self.optimizer_D.load_state_dict(state["optimizer_D"])


def new_train_state(
    config: Config, num_classes: int, device: torch.device, *, pretrained: bool = True
) -> tuple[TrainState, str]:
    """The state before the first iteration, drawn from `train.seed`.

    Args:
        config: the run's.
        num_classes: K.
        device: where to train.
        pretrained: False leaves `model.weights` unread, for a state about to be loaded.

    Returns:
        The state, and a sentence on where the backbone's weights come from.

    Raises:
        ConfigError: the weights are not to be had or do not fit.
    """
    torch.manual_seed(config.train.seed)  # all devices
    generator = Generator(config.model.backbone, num_classes)
    discriminator = Discriminator(num_classes, config.model.discriminator_channels)
    source = config.model.weights
    note = ""
    if pretrained:
        note = load_backbone_weights(generator, config.model.backbone, source)
    if source != "none":
        # Scale and shift of a net from scratch are still at 1 and 0 and have to be learned.
        generator.freeze_batch_norm_affine()
    generator.to(device).train()
    discriminator.to(device).train()
    return TrainState(
        generator, discriminator, _sgd(generator, config), _adam(discriminator, config)
    ), note


def _sgd(generator: Generator, config: Config) -> torch.optim.SGD:
    train = config.train
    return torch.optim.SGD(
        [
            {"params": list(generator.backbone_parameters()), "lr": train.learning_rate},
            {"params": list(generator.head_parameters()), "lr": train.learning_rate * HEAD_FACTOR},
        ],
        momentum=train.momentum,
        weight_decay=train.weight_decay,
    )


def _adam(discriminator: nn.Module, config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(
        discriminator.parameters(), lr=config.train.learning_rate_D, betas=ADAM_BETAS
    )
