"""Pretrained backbones: every value arrives, and a file that does not fit is refused."""

from __future__ import annotations

import http.client
import io
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from job.errors import ConfigError
from job.models.backbones import RESNETS
from job.models.discriminator import Discriminator
from job.models.files import ModelCard, model_file, write_safetensors
from job.models.generator import Architecture, Generator
from job.models.normalization import NORMALIZATIONS
from job.models.weights import load_weights
from job.storage import LocalStore

State = dict[str, Tensor]
ABC = ("a", "b", "c")


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


# ---------------------------------------------------------------- files as users have them


def random_state(generator: Generator) -> State:
    return {
        name: torch.rand(value.shape)
        for name, value in generator.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "Scale.", "module.backbone.", "encoder."])
def test_names_and_wrappings_of_other_programs_are_known(
    tiny: Generator, tmp_path: Path, wrapper: str, prefix: str
) -> None:
    state = random_state(tiny)
    content = {"epoch": 3, wrapper: {f"{prefix}{name}": v for name, v in state.items()}}
    load_weights(tiny, saved(content, tmp_path / "w.pth"))
    assert_arrived_but_counts(tiny, state)


def assert_arrived_but_counts(generator: Generator, state: State) -> None:
    own = generator.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


def reference_file(generator: Generator, classes: int) -> State:
    """As resnet101COCO-41f33a49.pth is: DeepLabv2's head under the reference's names."""
    state = random_state(generator)
    channels = generator.backbone.out_channels
    for index in range(4):
        state[f"layer5.conv2d_list.{index}.weight"] = torch.rand(classes, channels, 3, 3)
        state[f"layer5.conv2d_list.{index}.bias"] = torch.rand(classes)
    return state


def test_a_coco_file_brings_its_head_along(tmp_path: Path) -> None:
    generator = Generator(Architecture("tiny", 21))
    state = reference_file(generator, 21)
    note = load_weights(generator, saved(state, tmp_path / "coco.pth"))
    assert "and its head (8 tensors)" in note
    assert "left out" not in note
    for index, branch in enumerate(generator.head.branches):
        assert torch.equal(branch.weight, state[f"layer5.conv2d_list.{index}.weight"])
        assert torch.equal(branch.bias, state[f"layer5.conv2d_list.{index}.bias"])


def test_a_head_of_two_branches_takes_the_first_two_of_a_coco_file(tmp_path: Path) -> None:
    # As the preset paper-voc: the reference copies the file's head, and uses two branches of it.
    generator = Generator(Architecture("tiny", 21, aspp_branches=2))
    state = reference_file(generator, 21)
    note = load_weights(generator, saved(state, tmp_path / "coco.pth"))
    assert "and of its head the first 2 of 4 branches (dilations 6 and 12; 4 tensors)" in note
    assert "left out of it: head.branches.2.bias, head.branches.2.weight" in note
    assert [branch.dilation for branch in generator.head.branches] == [(6, 6), (12, 12)]
    for index, branch in enumerate(generator.head.branches):
        assert torch.equal(branch.weight, state[f"layer5.conv2d_list.{index}.weight"])
        assert torch.equal(branch.bias, state[f"layer5.conv2d_list.{index}.bias"])


def test_a_head_of_two_branches_with_other_classes_stays_random(tmp_path: Path) -> None:
    generator = Generator(Architecture("tiny", 19, aspp_branches=2))
    before = {name: value.clone() for name, value in generator.head.state_dict().items()}
    note = load_weights(generator, saved(reference_file(generator, 21), tmp_path / "coco.pth"))
    assert "its head is random (that of the file is for 21 classes" in note
    assert all(torch.equal(v, before[name]) for name, v in generator.head.state_dict().items())


def test_a_head_of_four_branches_takes_none_of_two(tmp_path: Path) -> None:
    generator = Generator(Architecture("tiny", 21))
    before = {name: value.clone() for name, value in generator.head.state_dict().items()}
    state = reference_file(generator, 21)
    two = {name: v for name, v in state.items() if "list.2" not in name and "list.3" not in name}
    note = load_weights(generator, saved(two, tmp_path / "two.pth"))
    assert "its head is random (that of the file has 2 branches and this one 4; " in note
    assert "--set model.aspp_branches=2 takes it" in note
    assert all(torch.equal(v, before[name]) for name, v in generator.head.state_dict().items())


def test_an_incomplete_head_stays_behind(tmp_path: Path) -> None:
    generator = Generator(Architecture("tiny", 21, aspp_branches=2))
    state = reference_file(generator, 21)
    del state["layer5.conv2d_list.1.bias"]
    note = load_weights(generator, saved(state, tmp_path / "coco.pth"))
    assert "its head is random (that of the file is another one)" in note


def test_a_head_for_other_classes_stays_behind_and_is_named(tmp_path: Path) -> None:
    generator = Generator(Architecture("tiny", 3))
    before = {name: value.clone() for name, value in generator.head.state_dict().items()}
    state = reference_file(generator, 21)
    note = load_weights(generator, saved(state, tmp_path / "coco.pth"))
    assert "its head is random (that of the file is for 21 classes" in note
    assert "left out of it: head.branches.0.bias, head.branches.0.weight" in note
    assert "and 4 more" in note
    assert all(torch.equal(v, before[name]) for name, v in generator.head.state_dict().items())
    assert_arrived_but_counts(
        generator, {name: v for name, v in state.items() if not name.startswith("layer5")}
    )


def test_a_head_of_another_kind_stays_behind(tmp_path: Path) -> None:
    generator = Generator(Architecture("tiny", 21, head="deeplabv3plus"))
    state = reference_file(generator, 21)
    note = load_weights(generator, saved(state, tmp_path / "coco.pth"))
    assert "that of the file is another one" in note


@pytest.mark.parametrize("head", ["deeplabv2", "deeplabv3plus"])
def test_a_best_model_is_a_start_for_another_run(head: Any, tmp_path: Path) -> None:
    architecture = Architecture("tiny", 3, head=head)
    trained, generator = Generator(architecture), Generator(architecture)
    card = ModelCard(architecture, ("a", "b", "c"), 255, ((0, 0, 0),) * 3, 1.0)
    content = model_file(trained, card, kind="generator", iteration=5)
    note = load_weights(generator, saved(content, tmp_path / "best_model.pth"))
    assert "and its head" in note
    wanted = trained.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in generator.state_dict().items())


def model_of(architecture: Architecture, path: Path, classes: tuple[str, ...] = ABC) -> str:
    """A model file, torch's or safetensors' by the ending of its name."""
    card = ModelCard(architecture, classes, 255, ((0, 0, 0),) * len(classes), 1.0)
    content = model_file(Generator(architecture), card, kind="generator", iteration=5)
    if path.suffix == ".safetensors":
        write_safetensors(content, path)
        return str(path)
    return saved(content, path)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_of_another_preparation_are_taken_with_a_word(ending: str, tmp_path: Path) -> None:
    def note_of(normalization: str) -> str:
        architecture = Architecture("tiny", 3, normalization=NORMALIZATIONS[normalization])  # type: ignore[index]
        path = model_of(architecture, tmp_path / f"{normalization}.{ending}")
        return load_weights(Generator(Architecture("tiny", 3)), path)

    assert note_of("caffe").endswith("; warning: it was trained with another normalization caffe")
    assert "warning" not in note_of("imagenet")
    assert "taken for" not in note_of("imagenet")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_of_another_stride_are_taken_with_a_word(ending: str, tmp_path: Path) -> None:
    path = model_of(Architecture("tiny", 3, stride_in="1x1"), tmp_path / f"w.{ending}")
    note = load_weights(Generator(Architecture("tiny", 3)), path)
    assert note.endswith("; warning: it was trained with another stride_in 1x1")


@pytest.mark.parametrize("header", [None, {}, {"s4gan": "[1]"}, {"format": "pt"}])
def test_safetensors_of_other_programs_are_a_start(
    tiny: Generator, tmp_path: Path, header: dict[str, str] | None
) -> None:
    state = random_state(tiny)
    save_file(state, tmp_path / "w.safetensors", metadata=header)
    note = load_weights(tiny, str(tmp_path / "w.safetensors"))
    assert note.endswith("; taken for weights of normalization imagenet")
    assert_arrived_but_counts(tiny, state)


def test_a_damaged_safetensors_file_is_no_start(tiny: Generator, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"hello")
    with pytest.raises(ConfigError, match=r"not a state dict \(it is no file of safetensors"):
        load_weights(tiny, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_head_for_as_many_but_other_classes_stays_behind(ending: str, tmp_path: Path) -> None:
    path = model_of(Architecture("tiny", 3), tmp_path / f"w.{ending}", ("sky", "tree", "road"))

    def note_of(*classes: str) -> tuple[str, bool]:
        generator = Generator(Architecture("tiny", 3))
        before = {name: value.clone() for name, value in generator.head.state_dict().items()}
        note = load_weights(generator, path, classes=classes)
        head = generator.head.state_dict()
        return note, all(torch.equal(v, before[name]) for name, v in head.items())

    note, is_random = note_of("sky", "road", "tree")
    assert is_random
    assert "warning: its head is random, as that of the file is for other classes" in note
    assert "(1 is tree there and road here)" in note
    assert "the same names in dataset.yaml" in note
    for classes in (("sky", "tree", "road"), ("Sky", "tree", "road"), ()):
        note, is_random = note_of(*classes)
        assert "and its head" in note
        assert "warning" not in note
        assert not is_random


def test_a_file_without_names_brings_its_head_along(tmp_path: Path) -> None:
    generator = Generator(Architecture("tiny", 3))
    path = saved(reference_file(generator, 3), tmp_path / "coco.pth")
    assert "and its head" in load_weights(generator, path, classes=("sky", "road", "tree"))


def test_a_checkpoint_is_a_start_for_another_run(tiny: Generator, tmp_path: Path) -> None:
    trained = Generator(Architecture("tiny", 3))
    content = {"iteration": 5, "generator": trained.state_dict()}
    load_weights(tiny, saved(content, tmp_path / "checkpoint_5.pth"))
    wanted = trained.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in tiny.state_dict().items())


def test_a_discriminator_is_no_start(tiny: Generator, tmp_path: Path) -> None:
    card = ModelCard(Architecture("tiny", 3), ("a", "b", "c"), 255, ((0, 0, 0),) * 3, 1.0)
    content = model_file(Discriminator(3, 8), card, kind="discriminator", iteration=5)
    with pytest.raises(ConfigError, match="does not fit tiny"):
        load_weights(tiny, saved(content, tmp_path / "best_model_D.pth"))


def test_what_is_left_of_a_file_is_named(tiny: Generator, tmp_path: Path) -> None:
    state = random_state(tiny) | {"fc.weight": torch.rand(1000, 96), "fc.bias": torch.rand(1000)}
    note = load_weights(tiny, saved(state, tmp_path / "w.pth"))
    assert "its head is random; left out of it: fc.bias, fc.weight" in note


def test_what_a_file_of_others_is_taken_for_is_said(tiny: Generator, tmp_path: Path) -> None:
    state = random_state(tiny)
    note = load_weights(tiny, saved(state, tmp_path / "w.pth"))
    assert note.endswith("; taken for weights of normalization imagenet")
    note = load_weights(tiny, saved(state, tmp_path / "w_caffe.pth"))
    assert "warning: by its name it is of Caffe: --set model.normalization=caffe" in note
    caffe = Generator(Architecture("tiny", 3, normalization=NORMALIZATIONS["caffe"]))
    note = load_weights(caffe, saved(state, tmp_path / "w_caffe.pth"))
    assert note.endswith("; taken for weights of normalization caffe")


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
    assert f"--set model.backbone={given}" in caught.value.mend
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
        pytest.param({"weights": {"a": torch.zeros(2)}}, id="one level too many"),
        pytest.param({1: torch.zeros(2)}, id="tensors without names"),
        pytest.param({"card": 3, "run": 5}, id="a card of something else"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tiny: Generator, tmp_path: Path, content: object
) -> None:
    with pytest.raises(ConfigError, match="not a state dict") as caught:
        load_weights(tiny, saved(content, tmp_path / "other.pth"))
    assert "object" not in caught.value.message  # Python's own words


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
    with pytest.raises(ConfigError, match=r"not a state dict \((it|the file) "):
        load_weights(tiny, str(path))


def test_weights_that_are_no_numbers_are_refused(tiny: Generator, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in tiny.backbone.state_dict().items()}
    first = next(name for name, value in state.items() if value.is_floating_point())
    state[first].view(-1)[0] = float("nan")
    with pytest.raises(ConfigError, match=r"1 of its tensors hold NaN") as caught:
        load_weights(tiny, saved(state, tmp_path / "nan.pth"))
    assert first.rpartition(".")[2] in caught.value.message


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
    with torch.device("meta"):
        generator = Generator(Architecture("resnet18", 3))
    for content in (b"<html>log in</html>", b"hello", b"", b"backbone: tiny\n"):
        (torch_home / cached_name("resnet18")).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_weights(generator, "imagenet")
        assert f"{cached_name('resnet18')} is damaged: remove it" in caught.value.message


def test_without_a_network_imagenet_may_lie_in_the_run(
    resnet18_state: State, torch_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_args: object, **_options: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    generator = Generator(Architecture("resnet18", 3))
    run = LocalStore(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        load_weights(generator, "imagenet", mirror=run)
    assert caught.value.message.endswith("(no connection: no route to host)")
    place = f"{tmp_path}/run/weights/{cached_name('resnet18')}"
    assert place in caught.value.mend
    Path(place).parent.mkdir(parents=True)
    torch.save(resnet18_state, place)
    assert place in load_weights(generator, "imagenet", mirror=run)
    assert_arrived(generator, resnet18_state)


def test_weights_of_timms_networks_have_timms_names(tmp_path: Path) -> None:
    generator = Generator(Architecture("timm:resnet26d", 3))
    other = timm.create_model("resnet26d")
    note = load_weights(generator, saved(other.state_dict(), tmp_path / "w.pth"))
    assert "left out of it: fc.bias, fc.weight" in note
    wanted = other.state_dict()
    own = generator.backbone.body.state_dict()
    assert own
    assert all(torch.equal(value, wanted[name]) for name, value in own.items())


def test_timm_without_a_network_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    generator = Generator(Architecture("timm:resnet26d", 3))
    with pytest.raises(ConfigError, match="timm could not get those of resnet26d") as caught:
        load_weights(generator, "imagenet")
    assert "model.weights=FILE" in caught.value.mend
