"""Pretrained backbones: every value arrives, and a file that does not fit is refused."""

from __future__ import annotations

import http.client
import io
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from job.errors import ConfigError
from job.models.backbones import RESNETS
from job.models.generator import Architecture, Generator
from job.models.weights import load_weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet18_state() -> State:
    """Of torchvision's network, every float tensor random: batch norm's too."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.tensor(7)
        for name, value in state.items()
    }


@pytest.fixture
def tiny() -> Generator:
    return Generator(Architecture("tiny", 3))


def saved(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def shapes_of(name: str) -> State:
    """A state dict of the right names and shapes that takes no room on the disk."""
    with torch.device("meta"):
        state = RESNETS[name](weights=None).state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


def assert_arrived(generator: Generator, state: State) -> None:
    own = generator.backbone.state_dict()
    for name, value in own.items():
        assert value.dtype == (torch.int64 if name.endswith("tracked") else torch.float32)
        torch.testing.assert_close(value, state[name], check_dtype=False, rtol=0, atol=0)


# ---------------------------------------------------------------------------- what loads


def test_all_values_of_a_torchvision_file_arrive(resnet18_state: State, tmp_path: Path) -> None:
    generator = Generator(Architecture("resnet18", 3))
    head = {name: value.clone() for name, value in generator.head.state_dict().items()}
    note = load_weights(generator, saved(resnet18_state, tmp_path / "w.pth"))
    assert_arrived(generator, resnet18_state)
    assert "resnet18" in note
    assert "w.pth" in note
    for name, value in generator.head.state_dict().items():
        assert torch.equal(value, head[name])


def test_half_precision_weights_are_cast(tiny: Generator, tmp_path: Path) -> None:
    state = {
        name: torch.rand(value.shape).half() if value.is_floating_point() else value
        for name, value in tiny.backbone.state_dict().items()
    }
    load_weights(tiny, saved(state, tmp_path / "half.pth"))
    assert_arrived(tiny, {name: value.float() for name, value in state.items()})


def test_files_from_before_num_batches_tracked_load(tiny: Generator, tmp_path: Path) -> None:
    # torchvision's old files, resnet101-5d3b4d8f.pth among them, do not have it.
    state = {
        name: torch.rand(value.shape)
        for name, value in tiny.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    load_weights(tiny, saved(state, tmp_path / "old.pth"))
    own = tiny.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


def test_the_classifier_of_the_file_is_not_needed(tiny: Generator, tmp_path: Path) -> None:
    state = {name: torch.rand(v.shape) for name, v in tiny.backbone.state_dict().items()}
    state |= {"fc.weight": torch.rand(1000, 96), "fc.bias": torch.rand(1000)}
    load_weights(tiny, saved(state, tmp_path / "with_fc.pth"))
    assert torch.equal(tiny.backbone.conv1.weight, state["conv1.weight"])


def test_none_leaves_the_random_weights(tiny: Generator) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    assert "random" in load_weights(tiny, "none")
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


# ---------------------------------------------------------------------------- what is refused


def test_a_missing_file_is_named(tiny: Generator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file") as caught:
        load_weights(tiny, str(tmp_path / "nowhere.pth"))
    assert "'imagenet' or 'none'" in caught.value.mend


def test_a_folder_is_no_file(tiny: Generator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_weights(tiny, str(tmp_path))


@pytest.mark.parametrize(
    ("given", "backbone"), [("resnet18", "resnet34"), ("resnet50", "resnet18")]
)
def test_weights_of_another_depth_are_refused(given: str, backbone: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        generator = Generator(Architecture(backbone, 3))
    source = saved(shapes_of(given), tmp_path / f"{given}.pth")
    with pytest.raises(ConfigError, match=f"does not fit {backbone}") as caught:
        load_weights(generator, source)
    assert "same depth" in caught.value.mend
    assert "first: layer" in caught.value.message


@pytest.mark.parametrize(
    ("given", "backbone"), [("resnet34", "resnet18"), ("resnet101", "resnet50")]
)
def test_weights_of_a_deeper_net_are_refused(given: str, backbone: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        generator = Generator(Architecture(backbone, 3))
    source = saved(shapes_of(given), tmp_path / f"{given}.pth")
    with pytest.raises(ConfigError, match=f"does not fit {backbone}"):
        load_weights(generator, source)


def test_a_refused_file_changes_no_weight(tiny: Generator, tmp_path: Path) -> None:
    state = {name: torch.rand(v.shape) for name, v in tiny.backbone.state_dict().items()}
    del state["layer4.0.conv2.weight"]
    before = tiny.backbone.conv1.weight.clone()
    with pytest.raises(ConfigError, match=r"1 of \d+ tensors .*layer4\.0\.conv2\.weight"):
        load_weights(tiny, saved(state, tmp_path / "partial.pth"))
    assert torch.equal(tiny.backbone.conv1.weight, before)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([1, 2], id="list"),
        pytest.param(torch.zeros(3), id="tensor"),
        pytest.param({"epoch": 3}, id="checkpoint without weights"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tiny: Generator, tmp_path: Path, content: object
) -> None:
    with pytest.raises(ConfigError, match="not a state dict"):
        load_weights(tiny, saved(content, tmp_path / "other.pth"))


def test_a_file_that_would_run_code_is_refused(tiny: Generator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a state dict"):
        load_weights(tiny, saved({"path": tmp_path}, tmp_path / "code.pth"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="png"),
        pytest.param(b"<html>not found</html>", id="html"),
        pytest.param(b"backbone: tiny\n", id="yaml"),
        pytest.param(b"hello", id="text"),
    ],
)
def test_a_file_that_torch_did_not_write_is_refused(
    tiny: Generator, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a state dict"):
        load_weights(tiny, str(path))


def test_a_truncated_file_is_refused(tiny: Generator, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(tiny.backbone.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ConfigError, match="not a state dict"):
        load_weights(tiny, str(path))


def test_a_state_dict_with_numbered_names_is_refused(tiny: Generator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_weights(tiny, saved({0: torch.zeros(1)}, tmp_path / "numbers.pth"))


# ---------------------------------------------------------------------------- imagenet


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's cache, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def cached_name(backbone: str) -> str:
    return torchvision.models.get_model_weights(backbone).DEFAULT.url.rpartition("/")[2]


def test_there_is_no_imagenet_for_the_tiny_backbone(tiny: Generator) -> None:
    with pytest.raises(ConfigError, match="none for the backbone tiny") as caught:
        load_weights(tiny, "imagenet")
    assert "model.weights=none" in caught.value.mend


def test_imagenet_comes_from_torchvisions_cache(resnet18_state: State, torch_home: Path) -> None:
    torch.save(resnet18_state, torch_home / cached_name("resnet18"))
    generator = Generator(Architecture("resnet18", 3))
    assert "imagenet" in load_weights(generator, "imagenet")
    assert_arrived(generator, resnet18_state)


def test_without_a_network_imagenet_names_three_mends(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_args: object, **_options: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with torch.device("meta"):
        generator = Generator(Architecture("resnet18", 3))
    with pytest.raises(ConfigError, match="no route to host") as caught:
        load_weights(generator, "imagenet")
    assert cached_name("resnet18") in caught.value.message
    for way in ("connect", "model.weights=FILE", "model.weights=none"):
        assert way in caught.value.mend


class LoginPage(io.BytesIO):
    """What a captive portal answers instead of the file."""

    def info(self) -> http.client.HTTPMessage:
        return http.client.HTTPMessage()


def test_a_download_that_is_not_the_file_is_a_configuration_error(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.urlopen", lambda *_a, **_o: LoginPage(b"<html>log in</html>"))
    with torch.device("meta"):
        generator = Generator(Architecture("resnet18", 3))
    with pytest.raises(ConfigError):
        load_weights(generator, "imagenet")
    assert list(torch_home.iterdir()) == []


def test_a_damaged_cached_file_is_a_configuration_error(torch_home: Path) -> None:
    (torch_home / cached_name("resnet18")).write_bytes(b"<html>log in</html>")
    with torch.device("meta"):
        generator = Generator(Architecture("resnet18", 3))
    with pytest.raises(ConfigError):
        load_weights(generator, "imagenet")
