"""Model files (`best_model.pth` and its kin): weights with all that is needed to use them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from job.errors import ConfigError, reason
from job.models.generator import Generator
from job.storage.files import local_copy

FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """What a model is, and how an image must be prepared for it."""

    backbone: str
    classes: tuple[str, ...]
    ignore_index: int
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, float, float]
    """RGB, of pixels in 0..1."""
    std: tuple[float, float, float]
    image_scale: float
    """The image is resized by this factor first; logits are taken at its original size."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)


def model_file(
    network: nn.Module, card: ModelCard, *, kind: str, iteration: int, **facts: Any
) -> dict[str, Any]:
    """Content of a model file: plain values and tensors only, so that it loads safely.

    Args:
        network: a generator or discriminator.
        card: travels with it.
        kind: "generator" or "discriminator".
        iteration: after which the weights stand.
        facts: anything else worth knowing (val_miou, provenance); JSON values.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "card": asdict(card),
        "iteration": iteration,
        **facts,
        "state_dict": {name: value.detach().cpu() for name, value in network.state_dict().items()},
    }


def load_generator(
    weights: str | Path, device: torch.device
) -> tuple[Generator, ModelCard, dict[str, Any]]:
    """Read a generator from a model file, ready to predict (evaluation mode).

    Args:
        weights: path or URI of the file.
        device: where the network goes.

    Returns:
        The network, its card, and the file's other facts.

    Raises:
        ConfigError: not there, damaged, or not a generator's model file.
    """
    mend = "give best_model.pth or final_model.pth of a run"
    path = f"{weights}"
    with local_copy(path, name="--weights", mend=mend) as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its unpickler stumbles over
            raise ConfigError(f"--weights {path}: damaged ({reason(error)})", mend=mend) from None
    if not isinstance(content, dict) or content.get("kind") != "generator":
        raise ConfigError(f"--weights {path}: not a generator of this program", mend=mend)
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"--weights {path}: has format {content.get('format')}, this version reads {FORMAT}",
            mend="use the version of s4gan that wrote it",
        )
    try:
        raw = content.pop("card")
        raw["palette"] = tuple(tuple(colour) for colour in raw["palette"])
        card = ModelCard(**{**raw, "classes": tuple(raw["classes"])})
        generator = Generator(card.backbone, card.num_classes)
        generator.load_state_dict(content.pop("state_dict"))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"--weights {path}: damaged ({reason(error)})", mend=mend) from None
    return generator.eval().to(device), card, content
