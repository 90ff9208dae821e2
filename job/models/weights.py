"""Pretrained backbones: torchvision's ImageNet weights, or a file with torchvision's names."""

from __future__ import annotations

import pickle

import torch
import torchvision
from torch import Tensor

from job.errors import ConfigError, reason
from job.models.backbones import RESNETS
from job.models.generator import Generator
from job.storage.files import local_copy


def load_backbone_weights(generator: Generator, backbone: str, source: str) -> str:
    """Start the backbone from `source` (the value of `model.weights`).

    Returns:
        A sentence for the console.

    Raises:
        ConfigError: no such weights, they cannot be downloaded, or they do not fit.
    """
    if source == "none":
        return f"{backbone}: random weights"
    state = _imagenet(backbone) if source == "imagenet" else _from_file(source)
    own = generator.backbone.state_dict()
    given = {name: value for name, value in state.items() if not str(name).startswith("fc.")}
    wrong = [
        name
        for name, value in own.items()
        if not name.endswith("num_batches_tracked")
        and (name not in given or given[name].shape != value.shape)
    ]
    wrong += [name for name in given if name not in own]  # a deeper net holds all of a shallower
    if wrong:
        raise ConfigError(
            f"model.weights {source}: does not fit {backbone}: {len(wrong)} of {len(own)} "
            f"tensors are absent, of another shape or too many (first: {wrong[0]})",
            mend="give the state dict of a torchvision ResNet of the same depth",
        )
    generator.backbone.load_state_dict(given, strict=False)
    return f"{backbone}: {len(given)} tensors from {source}"


def _imagenet(backbone: str) -> dict[str, Tensor]:
    if backbone not in RESNETS:
        raise ConfigError(
            f"model.weights imagenet: there are none for the backbone {backbone}",
            mend="add --set model.weights=none",
        )
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    # No network, a wrong hash (a login page instead of the file), a damaged file in the cache.
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(
            f"model.weights imagenet: torchvision could not get {weights.url} ({reason(error)})",
            mend="connect to the network once, give a file with --set model.weights=FILE.pth, or "
            "train from scratch with --set model.weights=none",
        ) from None
    return state


def _from_file(source: str) -> dict[str, Tensor]:
    mend = "give a file, 'imagenet' or 'none'"
    with local_copy(source, name="model.weights", mend=mend) as path:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {name: value.float() for name, value in state.items()}
        except Exception as error:  # torch raises whatever its unpickler stumbles over
            raise ConfigError(
                f"model.weights {source}: not a state dict ({reason(error)})"
            ) from None
