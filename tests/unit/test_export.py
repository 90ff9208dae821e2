"""ONNX computes what torch does, at sizes it was not traced at; safetensors brings all back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open

import job
from job.errors import ConfigError, DataError
from job.export import TOLERANCE, export
from job.models.files import ModelCard, load_generator, model_file
from job.models.generator import Architecture, Generator
from job.storage.progress import ConsoleProgress
from tests.unit.training.tiny import CPU

CLASSES = ("background", "square", "disc")
PALETTE = ((0, 0, 0), (200, 30, 30), (30, 30, 200))


def model(folder: Path, backbone: str = "tiny", scale: float = 1.0, **changes: Any) -> str:
    """With logits of the size that trained networks have."""
    torch.manual_seed(3)
    generator = Generator(Architecture(backbone, 3, **changes))
    with torch.no_grad():
        for _ in range(3):
            generator(torch.rand(4, 3, 64, 64) * 255)
        for name, parameter in generator.head.named_parameters():
            if parameter.dim() == 4 and parameter.shape[0] == 3:
                parameter.mul_(5 / generator.eval()(torch.rand(1, 3, 64, 64) * 255).abs().max())
                assert name
    card = ModelCard(generator.architecture, CLASSES, 200, PALETTE, scale)
    path = folder / "best_model.pth"
    content = model_file(generator, card, kind="generator", iteration=7, val_miou=0.5, run_id="abc")
    torch.save(content, path)
    return str(path)


def logits_of(path: Path, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": batch})
    return found


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("tiny", {}),
        pytest.param(
            "tiny",
            {"head": "deeplabv3plus", "output_stride": 16, "mlmt_threshold": 0.2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "resnet18", {"head": "deeplabv3plus", "output_stride": 8}, marks=pytest.mark.slow
        ),
    ],
)
def test_onnx_computes_what_torch_does_at_any_size(
    backbone: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    weights = model(tmp_path, backbone, **changes)
    done = export(weights, str(tmp_path / "m.onnx"), "onnx")
    assert done.checked == 3
    assert done.difference is not None
    assert done.difference < TOLERANCE
    generator, _, _ = load_generator(weights, CPU)
    rng = np.random.default_rng(0)
    for shape in ((1, 3, 40, 48), (3, 3, 101, 77), (2, 3, 128, 33)):
        batch = rng.integers(0, 256, shape).astype(np.uint8)
        with torch.no_grad():
            wanted = generator(torch.from_numpy(batch)).numpy()
        found = logits_of(tmp_path / "m.onnx", batch)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < TOLERANCE


@pytest.mark.slow
def test_onnx_on_photographs(shared_data: Path, tmp_path: Path) -> None:
    weights = model(tmp_path, "resnet18", output_stride=16, scale=0.5)
    images = shared_data / "camvid" / "val" / "images"
    done = export(weights, str(tmp_path / "m.onnx"), "onnx", images=str(images))
    assert done.checked == 5
    assert done.difference is not None
    assert done.difference < TOLERANCE


def test_an_onnx_file_knows_its_classes_and_names_its_sizes(tmp_path: Path) -> None:
    export(model(tmp_path, scale=0.5), str(tmp_path / "m.onnx"), "onnx")
    content = onnx.load(str(tmp_path / "m.onnx"))
    facts = {entry.key: json.loads(entry.value) for entry in content.metadata_props}
    assert facts["classes"] == list(CLASSES)
    assert facts["palette"] == [list(colour) for colour in PALETTE]
    assert (facts["ignore_index"], facts["image_scale"]) == (200, 0.5)
    assert facts["s4gan"]["run_id"] == "abc"
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (content.graph.input[0], content.graph.output[0])
    ]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 3, "height", "width"]]


def test_a_broken_image_is_left_out_of_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.export._write_onnx", lambda _, path, __: path.write_bytes(b""))
    monkeypatch.setattr("job.export._difference", lambda *_: 0.0)
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no image")
    weights, out = model(tmp_path), str(tmp_path / "m.onnx")
    with pytest.raises(DataError, match="none of its 1 images can be decoded") as caught:
        export(weights, out, "onnx", images=str(images))
    assert "noise" in caught.value.mend
    for name in ("b", "c"):
        Image.new("RGB", (40, 40)).save(images / f"{name}.png")
    progress = ConsoleProgress(Console())
    assert export(weights, out, "onnx", images=str(images), progress=progress).checked == 2
    said = capsys.readouterr().out
    assert "1 cannot be decoded and are left out" in said
    assert "a.png" in said


def test_a_model_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.export.TOLERANCE", 0.0)
    with pytest.raises(DataError, match="nothing was written"):
        export(model(tmp_path), str(tmp_path / "m.onnx"), "onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_safetensors_bring_everything_back(tmp_path: Path) -> None:
    weights = model(tmp_path, head="deeplabv3plus")
    out = tmp_path / "m.safetensors"
    assert export(weights, str(out), "safetensors").difference is None
    one, card, facts = load_generator(weights, CPU)
    other, other_card, other_facts = load_generator(str(out), CPU)
    assert card == other_card
    assert facts == other_facts
    wanted = one.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in other.state_dict().items())
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["s4gan"])["card"]["classes"] == list(CLASSES)


@pytest.mark.parametrize(
    ("out", "format_", "said"),
    [
        ("m.onnx", "tflite", "must be onnx or safetensors"),
        ("m.pth", "onnx", "must end in .onnx"),
        ("m.onnx", "safetensors", "must end in .safetensors"),
    ],
)
def test_wrong_wishes_are_named(out: str, format_: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        export("w.pth", str(tmp_path / out), format_)


@pytest.mark.parametrize(
    ("package", "format_"),
    [("onnx", "onnx"), ("onnxruntime", "onnx"), ("safetensors.torch", "safetensors")],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match="is not installed") as caught:
        export(model(tmp_path), str(tmp_path / f"m.{format_}"), format_)
    assert "s4gan-job[export]" in caught.value.mend


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"hello")
    with pytest.raises(ConfigError, match=r"damaged \(it is no file of safetensors"):
        load_generator(str(path), CPU)


# ---------------------------------------------------------------------------- load_model


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_model_is_loaded_in_one_line(kind: str, tmp_path: Path) -> None:
    weights = model(tmp_path, scale=0.5)
    if kind == "safetensors":
        weights = export(weights, str(tmp_path / "m.safetensors"), kind).uri
    loaded = job.load_model(weights)
    assert isinstance(loaded, torch.nn.Module)
    assert not loaded.training
    assert loaded.classes == CLASSES
    assert loaded.palette == PALETTE
    assert loaded.facts["val_miou"] == 0.5

    array = np.random.default_rng(0).integers(0, 256, (64, 90, 3)).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    given = (array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png"))
    found = [loaded.predict(image) for image in given]
    assert found[0].shape == (64, 90)
    assert found[0].dtype == np.uint8
    assert all(np.array_equal(one, found[0]) for one in found)

    tensor = loaded.transforms(array)
    assert tensor.shape == (3, 32, 45)
    with torch.no_grad():
        logits = loaded(tensor[None])
        large = torch.nn.functional.interpolate(
            logits, (64, 90), mode="bilinear", align_corners=True
        )
    assert np.array_equal(large.argmax(dim=1)[0].numpy(), found[0])


def test_a_model_keeps_the_mode_it_is_in(tmp_path: Path) -> None:
    loaded = job.load_model(model(tmp_path)).train()
    loaded.predict(np.zeros((40, 40, 3), np.uint8))
    assert loaded.generator.training


@pytest.mark.parametrize(
    "image", [b"x", None, np.zeros((0, 10, 3), np.uint8), np.zeros((4, 4), np.uint8)]
)
def test_what_is_no_image_is_said(image: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        job.load_model(model(tmp_path)).predict(image)
    assert "PIL image" in caught.value.mend
