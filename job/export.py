"""A trained model for other programs: ONNX and safetensors."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from job.data.find import images_at
from job.data.images import Array, read_rgb, scaled_image
from job.errors import ConfigError, DataError
from job.models.files import SAFETENSORS, load_generator, model_file, write_safetensors
from job.storage.files import write_file
from job.storage.progress import Silent, TransferProgress

ONNX = ".onnx"
TOLERANCE = 1e-3
"""Largest difference of a logit from torch's."""
INPUT, OUTPUT = "image", "logits"
_TRACED = (2, 3, 97, 129)
_CHECKED = ((96, 96), (193, 257), (321, 500))
"""Sizes of the images that are checked if there are none of the user's."""
_MAX_IMAGES = 5


@dataclass(frozen=True)
class Exported:
    """What was written."""

    uri: str
    size: int
    """Bytes."""
    checked: int = 0
    """Images on which it was compared with torch."""
    difference: float | None = None
    """The largest of a logit from torch's; None where weights were only copied."""


def export(
    weights: str,
    out: str,
    format_: str,
    *,
    images: str | None = None,
    progress: TransferProgress | None = None,
) -> Exported:
    """Write a model in another format; not at all if it does not compute the same.

    ONNX: input "image" (batch, 3, height, width), uint8 RGB, any size from 32 pixels; output
    "logits" of the same size. Normalisation is inside, resizing by `image_scale` is not: that
    number, the classes, palette and ignore_index stand in the model's metadata.

    Args:
        weights: path or URI of a model file.
        out: path or URI of the file to be written.
        format_: "onnx" or "safetensors".
        images: to compare on, as `s4gan predict` takes them; noise if there are none. What cannot
            be decoded is left out.
        progress: told how far images of a store are on their way here, and what is left out.

    Raises:
        ConfigError: a package is missing, the format is unknown, or the weights cannot be used.
        DataError: the exported model computes something else, and nothing was written; or there is
            no image that can be decoded.
    """
    ending = {"onnx": ONNX, "safetensors": SAFETENSORS}.get(format_)
    if ending is None:
        raise ConfigError(f"--format {format_}: must be onnx or safetensors")
    if not out.endswith(ending):
        raise ConfigError(f"--out {out}: must end in {ending}", mend=f"--out model{ending}")
    if images is not None and format_ != "onnx":
        raise ConfigError(
            f"--images {images}: nothing is compared for --format {format_}",
            mend="leave it out",
        )
    generator, card, facts = load_generator(weights, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="s4gan-") as folder:
        path = Path(folder) / f"model{ending}"
        difference, checked = None, 0
        if format_ == "safetensors":
            known = {"format", "kind", "iteration"}
            more = {name: value for name, value in facts.items() if name not in known}
            content = model_file(
                generator, card, kind="generator", iteration=facts["iteration"], **more
            )
            write_safetensors(content, path)
        else:
            inputs = _inputs(images, card.image_scale, progress or Silent())
            _write_onnx(generator, path, {"card": asdict(card), **facts})
            difference, checked = _difference(generator, path, inputs), len(inputs)
            if not difference < TOLERANCE:
                raise DataError(
                    f"--weights {weights}: in ONNX a logit differs by {difference:.2g} from "
                    f"torch's, more than {TOLERANCE}; nothing was written",
                    mend="please report it, with the versions of torch, onnxscript and onnxruntime",
                )
        data = path.read_bytes()
        write_file(out, data, name="--out")
    return Exported(out, len(data), checked, difference)


def _write_onnx(generator: torch.nn.Module, path: Path, facts: dict[str, Any]) -> None:
    onnx = _installed("onnx")
    for needed in ("onnxscript", "onnxruntime"):  # before the minutes that the rest takes
        _installed(needed)
    any_size = torch.export.Dim.DYNAMIC
    with _quiet():
        program = torch.onnx.export(
            generator,
            (torch.zeros(_TRACED, dtype=torch.uint8),),
            dynamo=True,
            dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
        assert program is not None
        program.save(str(path))
    model = onnx.load(str(path))
    _name_sizes(model)
    card = facts["card"]
    for key, value in {
        "classes": card["classes"],
        "palette": card["palette"],
        "ignore_index": card["ignore_index"],
        "image_scale": card["image_scale"],
        "s4gan": {name: value for name, value in facts.items() if name != "card"},
    }.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _name_sizes(model: Any) -> None:
    """Instead of torch's own s34, s14 and s54."""
    sizes = ("batch", "", "height", "width")
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {dim.dim_param: name for dim, name in zip(dims, sizes, strict=True) if dim.dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _difference(generator: torch.nn.Module, path: Path, inputs: Sequence[Array]) -> float:
    """The largest of any logit between torch and ONNX's own runtime."""
    runtime = _installed("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for image in inputs:
        batch = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
        with torch.no_grad():
            wanted = generator(torch.from_numpy(batch)).numpy()
        found = session.run([OUTPUT], {INPUT: batch})[0]
        if found.shape != wanted.shape or not np.isfinite(found).all():
            return float("inf")
        worst = max(worst, float(np.abs(found - wanted).max()))
    return worst


def _inputs(images: str | None, image_scale: float, progress: TransferProgress) -> list[Array]:
    if images is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, 256, (*size, 3), np.uint8) for size in _CHECKED]
    found: list[Array] = []
    unreadable: list[DataError] = []
    with images_at(images, progress) as (_, paths):
        for path in paths:
            try:
                found.append(scaled_image(read_rgb(path), image_scale))
            except DataError as error:
                unreadable.append(error)
            if len(found) == _MAX_IMAGES:
                break
    if not found:
        raise DataError(
            f"--images {images}: none of its {len(unreadable)} images can be decoded (first: "
            f"{unreadable[0].message})",
            mend="give others, or none: then the two are compared on noise",
        )
    if unreadable:
        progress.say(
            f"warning: --images {images}: {len(unreadable)} cannot be decoded and are left out "
            f"(first: {unreadable[0].message})"
        )
    return found


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"--format onnx: {name} is not installed", mend="pip install 's4gan-job[export]'"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter tells much that is no concern of a user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
