"""Model files: what goes in comes out, and anything else is refused with a mend."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import ConfigError
from job.models.discriminator import Discriminator
from job.models.files import FORMAT, ModelCard, load_generator, model_file
from job.models.generator import Architecture, Generator

CPU = torch.device("cpu")
CARD = ModelCard(
    architecture=Architecture("tiny", 3),
    classes=("background", "square", "disc"),
    ignore_index=200,
    palette=((0, 0, 0), (200, 30, 30), (30, 30, 200)),
    image_scale=0.5,
)


@pytest.fixture
def trained() -> Generator:
    """Whose batch norm has seen something."""
    generator = Generator(Architecture("tiny", 3))
    for _ in range(3):
        generator(torch.randn(2, 3, 32, 32) * 2 + 1)
    return generator


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def generator_file(trained: Generator, path: Path, **facts: object) -> Path:
    return written(path, model_file(trained, CARD, kind="generator", iteration=7, **facts))


def test_a_round_trip_gives_identical_logits_and_an_equal_card(
    trained: Generator, tmp_path: Path
) -> None:
    path = generator_file(trained, tmp_path / "m.pth", val_miou=0.25, run_id="abc")
    loaded, card, facts = load_generator(path, CPU)
    images = torch.randn(2, 3, 33, 47)
    trained.eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), trained(images))
    assert card == CARD
    assert facts == {
        "format": FORMAT,
        "kind": "generator",
        "iteration": 7,
        "val_miou": 0.25,
        "run_id": "abc",
    }


def test_a_loaded_generator_is_ready_to_predict(trained: Generator, tmp_path: Path) -> None:
    loaded, _, _ = load_generator(generator_file(trained, tmp_path / "m.pth"), CPU)
    assert not any(module.training for module in loaded.modules())


def test_a_card_knows_its_number_of_classes() -> None:
    assert CARD.num_classes == 3


def test_a_file_loads_without_running_code(trained: Generator, tmp_path: Path) -> None:
    path = generator_file(trained, tmp_path / "m.pth")
    content = torch.load(path, weights_only=True)
    assert set(content) == {"format", "kind", "card", "iteration", "state_dict"}
    assert json.loads(json.dumps(content["card"]))["classes"] == list(CARD.classes)


def test_tensors_of_a_file_carry_no_graph(trained: Generator) -> None:
    content = model_file(trained, CARD, kind="generator", iteration=1)
    assert not any(value.requires_grad for value in content["state_dict"].values())
    assert set(content["state_dict"]) == set(trained.state_dict())


def test_writing_a_file_leaves_the_network_training(trained: Generator) -> None:
    model_file(trained, CARD, kind="generator", iteration=1)
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--weights .*nowhere\.pth: no such file") as caught:
        load_generator(tmp_path / "nowhere.pth", CPU)
    assert "best_model.pth" in caught.value.mend


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_damaged(trained: Generator, tmp_path: Path, share: float) -> None:
    path = generator_file(trained, tmp_path / "m.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match="damaged") as caught:
        load_generator(path, CPU)
    assert "best_model.pth" in caught.value.mend


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="png"),
        pytest.param(b"PK\x03\x04 not a zip", id="zip"),
        pytest.param(b"<html>not found</html>", id="html"),
        pytest.param(b"backbone: tiny\n", id="yaml"),
        pytest.param(b"hello", id="text"),
    ],
)
def test_a_file_that_torch_did_not_write_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"damaged \((it|the file) "):
        load_generator(path, CPU)


def test_an_onnx_file_is_for_others(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"onnx")
    with pytest.raises(ConfigError, match="is for other programs"):
        load_generator(path, CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"card": None}, "what it says of itself is incomplete"),
        ({"card": {"architecture": {"of": 3}}}, "what it says of itself is incomplete"),
        ({"state_dict": {}}, "its tensors are not those of the network"),
        ({"state_dict": 3}, "its tensors are not those of the network"),
        ({"kind": "", "run": 5}, "not a generator"),
    ],
)
def test_a_file_that_somebody_has_changed_is_told_of_in_words(
    trained: Generator, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    content = torch.load(generator_file(trained, tmp_path / "m.pth"), weights_only=True) | change
    kept = {name: value for name, value in content.items() if value != ""}
    with pytest.raises(ConfigError, match=said):
        load_generator(written(tmp_path / "m.pth", kept), CPU)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "m.pth", {"kind": "generator", "path": tmp_path})
    with pytest.raises(ConfigError, match="damaged"):
        load_generator(path, CPU)


def test_a_discriminators_file_is_refused(tmp_path: Path) -> None:
    network = Discriminator(3, channels=8)
    content = model_file(network, CARD, kind="discriminator", iteration=7)
    with pytest.raises(ConfigError, match="not a generator of this program"):
        load_generator(written(tmp_path / "best_model_D.pth", content), CPU)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="empty"),
        pytest.param([1, 2], id="list"),
        pytest.param(torch.zeros(3), id="tensor"),
        pytest.param({"conv1.weight": torch.zeros(3)}, id="state-dict"),
        pytest.param({"iteration": 5, "generator": {}}, id="checkpoint"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError, match="not a generator of this program") as caught:
        load_generator(written(tmp_path / "m.pth", content), CPU)
    assert "best_model.pth" in caught.value.mend


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"kind": "generator"}, id="no-format"),
        pytest.param({"kind": "generator", "format": FORMAT}, id="no-card"),
        pytest.param({"kind": "generator", "format": FORMAT, "card": {}}, id="empty-card"),
    ],
)
def test_a_foreign_file_that_calls_itself_a_generator_is_refused(
    tmp_path: Path, content: object
) -> None:
    with pytest.raises(ConfigError):
        load_generator(written(tmp_path / "m.pth", content), CPU)


def test_weights_that_do_not_fit_their_card_are_refused(trained: Generator, tmp_path: Path) -> None:
    content = model_file(trained, CARD, kind="generator", iteration=1)
    del content["state_dict"]["backbone.conv1.weight"]
    with pytest.raises(ConfigError):
        load_generator(written(tmp_path / "m.pth", content), CPU)


def test_a_file_of_another_format_says_which_one_is_read(
    trained: Generator, tmp_path: Path
) -> None:
    content = model_file(trained, CARD, kind="generator", iteration=1) | {"format": FORMAT + 1}
    with pytest.raises(ConfigError, match=f"has format {FORMAT + 1}.*reads {FORMAT}") as caught:
        load_generator(written(tmp_path / "m.pth", content), CPU)
    assert "version" in caught.value.mend


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_checkpoint_is_a_model_too(
    trained: Generator, tmp_path: Path, with_teacher: bool
) -> None:
    """`paper-voc` is scored after 30,000 of its 40,000 iterations."""
    other = Generator(Architecture("tiny", 3))
    content = {
        "iteration": 30,
        "generator": (other if with_teacher else trained).state_dict(),
        "run": {"config": {}, "card": asdict(CARD)},
    }
    if with_teacher:
        content["teacher"] = trained.state_dict()
    loaded, card, facts = load_generator(written(tmp_path / "checkpoint_30.pth", content), CPU)
    images = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        assert torch.equal(loaded(images), trained.eval()(images))
    assert (card, facts["iteration"]) == (CARD, 30)
