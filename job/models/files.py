"""Model files (`best_model.pth` and its kin): weights with all that is needed to use them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from job.errors import CUT_OFF, NO_PLAIN_FILE, ConfigError, reason
from job.models.generator import Architecture, Generator
from job.models.normalization import Normalization
from job.storage.files import local_copy

FORMAT = 2
SAFETENSORS = ".safetensors"
_HEADER = "s4gan"
"""Key of the header that holds, as JSON, what a model file has beside its weights."""


@dataclass(frozen=True)
class ModelCard:
    """What a model is, and how an image must be prepared for it."""

    architecture: Architecture
    classes: tuple[str, ...]
    ignore_index: int
    palette: tuple[tuple[int, int, int], ...]
    image_scale: float
    """The image is resized by this factor first; logits are taken at its original size."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelCard:
        """Inverse of `dataclasses.asdict`.

        Raises:
            KeyError, TypeError: it is none.
        """
        architecture = dict(raw["architecture"])
        normalization = dict(architecture.pop("normalization"))
        normalization["mean"] = tuple(normalization["mean"])
        normalization["std"] = tuple(normalization["std"])
        return cls(
            architecture=Architecture(**architecture, normalization=Normalization(**normalization)),
            classes=tuple(raw["classes"]),
            ignore_index=raw["ignore_index"],
            palette=tuple(tuple(colour) for colour in raw["palette"]),
            image_scale=raw["image_scale"],
        )


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


def _from_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """Of the versions that knew DeepLabv2 only."""
    card = dict(content.get("card", {}))
    normalization = {"mean": card.pop("mean", None), "std": card.pop("std", None)}
    architecture = {
        "backbone": card.pop("backbone", None),
        "num_classes": len(card.get("classes", ())),
        "normalization": normalization,
    }
    return content | {"format": FORMAT, "card": {**card, "architecture": architecture}}


def _of_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's network that labels, as a model file; anything else as it is."""
    about = content.get("run")
    card = about.get("card") if isinstance(about, dict) and "kind" not in content else None
    if card is None or "generator" not in content:
        return content
    return {
        "format": FORMAT,
        "kind": "generator",
        "card": card,
        "iteration": content["iteration"],
        "state_dict": content.get("teacher") or content["generator"],
    }


def write_safetensors(content: dict[str, Any], path: Path) -> None:
    """Write the content of a model file as safetensors; all but the weights goes to its header.

    Raises:
        ConfigError: safetensors is not installed.
    """
    facts = {name: value for name, value in content.items() if name != "state_dict"}
    tensors = {name: value.contiguous() for name, value in content["state_dict"].items()}
    _safetensors().save_file(tensors, path, metadata={_HEADER: json.dumps(facts)})


class UnreadableFile(Exception):
    """A file that is none of torch's or safetensors'; its text says why, for people."""


def read_torch_file(path: Path) -> Any:
    """What torch.save has written; tensors and plain values only.

    Raises:
        UnreadableFile: it is something else, or damaged.
    """
    if path.stat().st_size == 0:
        raise UnreadableFile("the file is empty")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler stumbles over
        said = reason(error)
        if isinstance(error, OSError):
            said = error.strerror or said
        elif said not in (CUT_OFF, NO_PLAIN_FILE):
            said = "it is no file of torch"
        raise UnreadableFile(said) from None


def read_model_file(path: Path, name: str) -> Any:
    """What torch.save or `write_safetensors` has written; the ending says which.

    Args:
        path: of the file.
        name: path or URI that the user gave.

    Raises:
        UnreadableFile: it is something else, or damaged.
        ConfigError: safetensors is not installed.
    """
    return _read_safetensors(path) if name.endswith(SAFETENSORS) else read_torch_file(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError):
        raise UnreadableFile("it is no file of safetensors, or cut off") from None
    # Files of other programs have no such header, or something else in it.
    return {**(header if isinstance(header, dict) else {}), "state_dict": tensors}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ConfigError(
            "safetensors is not installed", mend="pip install 's4gan-job[export]'"
        ) from None
    return safetensors.torch


def load_generator(
    weights: str | Path, device: torch.device
) -> tuple[Generator, ModelCard, dict[str, Any]]:
    """Read a generator from a model file or a checkpoint, ready to predict (evaluation mode).

    Args:
        weights: path or URI of the file.
        device: where the network goes.

    Returns:
        The network, its card, and the file's other facts.

    Raises:
        ConfigError: not there, damaged, or not a generator's model file.
    """
    mend = "give best_model.pth or final_model.pth of a run, or what s4gan export made of one"
    path = f"{weights}"
    if path.endswith(".onnx"):
        raise ConfigError(
            f"--weights {path}: an ONNX file is for other programs",
            mend="give the best_model.pth, or .safetensors, that it was made of",
        )
    with local_copy(path, name="--weights", mend=mend) as file:
        try:
            content = read_model_file(file, path)
        except UnreadableFile as error:
            raise ConfigError(f"--weights {path}: damaged ({error})", mend=mend) from None
    if isinstance(content, dict):
        content = _of_checkpoint(content)
    if not isinstance(content, dict) or content.get("kind") != "generator":
        raise ConfigError(f"--weights {path}: not a generator of this program", mend=mend)
    if content.get("format") not in (1, FORMAT):
        raise ConfigError(
            f"--weights {path}: has format {content.get('format')}, this version reads {FORMAT}",
            mend="use the version of s4gan that wrote it",
        )
    what = "what it says of itself is incomplete, or of another version"
    try:
        if content["format"] == 1:
            content = _from_format_1(content)
        card = ModelCard.from_dict(content.pop("card"))
        generator = Generator(card.architecture)
        what = "its tensors are not those of the network that it says it is"
        generator.load_state_dict(content.pop("state_dict"))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise ConfigError(f"--weights {path}: damaged ({what})", mend=mend) from None
    return generator.eval().to(device), card, content
