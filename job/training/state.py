"""`TrainState`: everything the next iteration reads, and how it is saved and brought back.

What is not here is a pure function of the configuration and the iteration: the order of the data,
every crop, the learning rates, what dropout draws.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from job.checkpoint.manager import BestModel
from job.config import Config
from job.models.discriminator import Discriminator
from job.models.generator import Architecture, Generator
from job.models.weights import load_weights
from job.storage import ObjectStore
from job.training.precision import gradient_scaler, prepare
from job.training.schedule import polynomial

ADAM_BETAS = (0.9, 0.99)
"""Of the discriminator's Adam. Source: the S4GAN reference."""


@dataclass
class TrainState:
    """Both networks, both optimizers, and where the run stands."""

    generator: Generator
    discriminator: Discriminator
    optimizer_G: torch.optim.Optimizer
    optimizer_D: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False)
    )
    """Of the losses of both networks, for float16."""
    teacher: Generator | None = None
    """Moving average of the generator, if `train.ema_decay` asks for one; in evaluation mode."""
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
        backbone["lr"], head["lr"] = lr_g, lr_g * train.head_factor
        self.optimizer_D.param_groups[0]["lr"] = lr_d
        return lr_g, lr_d

    @property
    def predictor(self) -> Generator:
        """The network that labels, is evaluated and is saved to be used."""
        return self.teacher or self.generator

    @torch.no_grad()
    def update_teacher(self, iteration: int, decay: float) -> None:
        """Move the teacher towards the generator, after an iteration's update.

        At first it forgets faster, so that it does not keep the random weights it began with.
        Batch norm's running statistics are averaged like the weights.
        Source: Tarvainen and Valpola 2017, arXiv:1703.01780, appendix B.
        """
        if self.teacher is None:
            return
        keep = min(decay, 1 - 1 / (iteration + 1))
        pairs = zip(
            self.teacher.state_dict().values(), self.generator.state_dict().values(), strict=True
        )
        averages: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        counts: list[torch.Tensor] = []  # how many batches the statistics are of
        counted: list[torch.Tensor] = []
        for average, value in pairs:
            (averages if average.is_floating_point() else counts).append(average)
            (values if average.is_floating_point() else counted).append(value)
        torch._foreach_lerp_(averages, values, 1 - keep)
        if counts:
            torch._foreach_copy_(counts, counted)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.state_dict()}
        return {
            "iteration": self.iteration,
            "evaluated_iteration": self.evaluated_iteration,
            "best": self.best.to_dict() if self.best else None,
            "unreadable": sorted(self.unreadable),
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer_G": self.optimizer_G.state_dict(),
            "optimizer_D": self.optimizer_D.state_dict(),
            "scaler": self.scaler.state_dict(),
            **teacher,
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
        if self.scaler.is_enabled() and state.get("scaler"):  # else the run began without one
            self.scaler.load_state_dict(state["scaler"])
        if self.teacher is not None:
            # A run that goes on with a teacher it did not begin with: from the generator.
            self.teacher.load_state_dict(state.get("teacher", state["generator"]))


def new_train_state(
    config: Config,
    num_classes: int,
    device: torch.device,
    *,
    pretrained: bool = True,
    classes: Sequence[str] = (),
    mirror: ObjectStore | None = None,
) -> tuple[TrainState, str]:
    """The state before the first iteration, drawn from `train.seed`.

    Args:
        config: the run's.
        num_classes: K.
        device: where to train.
        pretrained: False leaves `model.weights` unread, for a state about to be loaded.
        classes: their names, in index order; what `model.weights` says of itself is held against
            them. Empty: not known.
        mirror: the run, which may hold the weights of `imagenet` for machines without a network.

    Returns:
        The state, and a sentence on where the generator's weights come from.

    Raises:
        ConfigError: the weights are not to be had or do not fit.
    """
    torch.manual_seed(config.train.seed)  # all devices
    generator = Generator(Architecture.of(config.model, num_classes))
    discriminator = Discriminator(num_classes, config.model.discriminator_channels)
    source = config.model.weights
    note = ""
    if pretrained:
        note = load_weights(generator, source, classes=classes, mirror=mirror)
    _fix_batch_norm(generator, config)
    prepare(device)
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    generator.to(device).to(memory_format=layout).train()
    discriminator.to(device).to(memory_format=layout).train()
    return TrainState(
        generator,
        discriminator,
        _sgd(generator, config),
        _adam(discriminator, config),
        scaler=gradient_scaler(config.train, device),
        teacher=_teacher(generator) if config.train.ema_decay else None,
    ), note


def _fix_batch_norm(generator: Generator, config: Config) -> None:
    wish = config.model.batch_norm
    if wish == "auto":
        # Scale and shift of a net from scratch are still at 1 and 0 and have to be learned.
        wish = "trained" if config.model.weights == "none" else "affine_frozen"
    if wish == "affine_frozen":
        generator.freeze_batch_norm_affine()
    elif wish == "frozen":
        generator.freeze_batch_norm()


def _teacher(generator: Generator) -> Generator:
    teacher = copy.deepcopy(generator).eval()
    return teacher.requires_grad_(False)


def _sgd(generator: Generator, config: Config) -> torch.optim.SGD:
    train = config.train
    return torch.optim.SGD(
        [
            {"params": list(generator.backbone_parameters()), "lr": train.learning_rate},
            {
                "params": list(generator.head_parameters()),
                "lr": train.learning_rate * train.head_factor,
            },
        ],
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        fused=True,  # one kernel instead of one for each of some 300 tensors
    )


def _adam(discriminator: nn.Module, config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(
        discriminator.parameters(), lr=config.train.learning_rate_D, betas=ADAM_BETAS, fused=True
    )
