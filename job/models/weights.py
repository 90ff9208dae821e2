"""Pretrained networks: ImageNet weights of torchvision and timm, or a file as users have them."""

from __future__ import annotations

import contextlib
import json
import tempfile
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from job import run
from job.config import BASIC_BLOCKS, TIMM
from job.errors import ConfigError, ObjectNotFound
from job.models.backbones import RESNETS, TimmBackbone
from job.models.files import UnreadableFile, read_model_file
from job.models.generator import ATROUS_RATES, Generator
from job.models.normalization import NORMALIZATIONS
from job.storage import ObjectStore
from job.storage.files import local_copy

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "generator")
"""Where files of other programs, and our checkpoints, keep their state dict."""
PREFIXES = ("module.", "Scale.", "model.", "encoder.", "backbone.", "body.")
"""What they put before torchvision's names: DataParallel, DeepLab's multi-scale files, others."""
REFERENCE_HEAD = "layer5.conv2d_list."
"""DeepLabv2's branches in the S4GAN reference and its kin (resnet101COCO-41f33a49.pth)."""
MAX_NAMED = 4
_BY_BLOCKS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}
"""By the blocks of each stage, and whether they are bottlenecks.

Source: He et al. 2016, arXiv:1512.03385."""

Weights = dict[str, Tensor]


def load_weights(
    generator: Generator,
    source: str,
    *,
    classes: Sequence[str] = (),
    mirror: ObjectStore | None = None,
) -> str:
    """Start the generator from `source` (the value of `model.weights`).

    The backbone has to fit as a whole; the head is taken along where the file has one that fits.
    Of a DeepLabv2 head with more branches than this one, the first are taken.

    Args:
        generator: changed in place; not at all on an error.
        source: "none", "imagenet", or the path or URI of a file.
        classes: names in index order; a head that says it is for others stays behind. Empty: not
            known.
        mirror: a run; below `weights/` it may hold the file of "imagenet".

    Returns:
        For the console: what was taken from where, and what was not.

    Raises:
        ConfigError: no such weights, they cannot be downloaded, or they do not fit.
    """
    backbone = generator.architecture.backbone
    if source == "none":
        return f"{backbone}: random weights"
    if source == "imagenet":
        given, source = _imagenet(generator, mirror)
    else:
        given, card = _from_file(source)
        trained = card.get("architecture")
        other = _other_classes(classes, card.get("classes"))
        return _take(generator, given, source, other) + (
            _other_kind(generator, trained)
            if isinstance(trained, dict) and trained
            else _taken_for(generator, source)
        )
    return _take(generator, given, source)


def _other_kind(generator: Generator, trained: Mapping[str, Any]) -> str:
    """What a model of ours was made for and this generator is not: it fits, and learns badly."""
    own, trained = _as_json(asdict(generator.architecture)), _as_json(trained)
    other = [
        f"{key} {_called(trained[key])}"
        for key in ("stride_in", "normalization")
        if key in trained and trained[key] != own[key]
    ]
    return f"; warning: it was trained with another {' and '.join(other)}" if other else ""


def _as_json(value: Any) -> Any:
    """With lists for tuples, as the headers of safetensors have them."""
    return json.loads(json.dumps(value, default=str))


def _other_classes(own: Sequence[str], given: Any) -> str:
    """Where the names of classes part, for people; empty if they do not, or one side has none.

    Upper and lower case are alike. How many there are is not looked at: the head's shape says that.
    """
    if not isinstance(given, (list, tuple)):
        return ""
    for index, (mine, its) in enumerate(zip(own, given, strict=False)):
        if str(its).casefold() != mine.casefold():
            return f"{index} is {its} there and {mine} here"
    return ""


def _taken_for(generator: Generator, source: str) -> str:
    """What a file of other programs is taken for, as it does not say itself what it is."""
    kind = generator.architecture
    normalization = _called(_as_json(asdict(kind.normalization)))
    stride = "" if kind.backbone in BASIC_BLOCKS else f"stride_in {kind.stride_in} and "
    said = f"; taken for weights of {stride}normalization {normalization}"
    if "caffe" in Path(source).name.lower() and normalization != "caffe":
        said += "; warning: by its name it is of Caffe: --set model.normalization=caffe "
        said += "--set model.stride_in=1x1"
    return said


def _called(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    kinds = {name: _as_json(asdict(kind)) for name, kind in NORMALIZATIONS.items()}
    return next((name for name, kind in kinds.items() if kind == value), "(none of ours)")


def _take(
    generator: Generator, given: Mapping[str, Tensor], source: str, other_classes: str = ""
) -> str:
    """Change the generator; returns what was taken, and what was not.

    Raises:
        ConfigError: the backbone does not fit.
    """
    backbone = generator.architecture.backbone
    own = _by_plain_name(generator.backbone.state_dict())
    mine = {name: value for name, value in given.items() if name in own}
    wrong = [
        name
        for name, value in own.items()
        if not name.endswith("num_batches_tracked")
        and (name not in mine or mine[name].shape != value.shape)
    ]
    # A deeper net holds all of a shallower one.
    more = [name for name in given if name not in own and name.startswith(_stages(own))]
    if wrong or more:
        looks = _resnet_of(given)
        said = [f"{len(wrong)} of {len(own)} tensors are absent or of another shape"] * bool(wrong)
        said += [f"{len(more)} are of more layers"] * bool(more)
        raise ConfigError(
            f"model.weights {source}: does not fit {backbone}: {' and '.join(said)} "
            f"(first: {[*wrong, *more][0]})",
            mend=f"it is a {looks}: --set model.backbone={looks}"
            if looks not in (None, backbone)
            else "give the state dict of a torchvision ResNet of the same depth, or a "
            "best_model.pth with this backbone",
        )
    head, head_note = _head_of(generator, given, other_classes)
    names = {_plain(name): name for name in generator.backbone.state_dict()}
    generator.backbone.load_state_dict(
        {names[name]: value for name, value in mine.items()}, strict=False
    )
    if head:
        generator.head.load_state_dict(head)
    taken = {*mine, *(f"head.{name}" for name in head)}
    left = sorted(set(given) - taken)
    return "; ".join(
        [
            f"{backbone}: {len(mine)} tensors from {source}",
            head_note,
            *([f"left out of it: {_named(left)}"] if left else []),
        ]
    )


def _resnet_of(given: Mapping[str, Tensor]) -> str | None:
    """Which of torchvision's a state dict is of, by its blocks; None if none of them."""
    blocks = tuple(
        len({name.split(".")[1] for name in given if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    return _BY_BLOCKS.get((blocks, "layer1.0.conv3.weight" in given))


def _head_of(
    generator: Generator, given: Mapping[str, Tensor], other_classes: str
) -> tuple[Weights, str]:
    """The head's tensors if all are there and fit, and what to say of it."""
    own = generator.head.state_dict()
    found = {
        name.removeprefix("head."): value
        for name, value in given.items()
        if name.startswith("head.")
    }
    if not found:
        return {}, "its head is random"
    branches, wanted = _branches(found), _branches(own)
    if found.keys() != own.keys() and not (branches and wanted):
        return {}, "its head is random (that of the file is another one)"
    common = [name for name in own if name in found]
    if any(found[name].shape != own[name].shape for name in common):
        classes = found[common[-1]].shape[:1].numel()
        return {}, (
            f"its head is random (that of the file is for {classes} classes or other features)"
        )
    if other_classes:
        return {}, (
            "warning: its head is random, as that of the file is for other classes "
            f"({other_classes}); if they are the same, give them the same names in dataset.yaml"
        )
    if branches < wanted:
        return {}, (
            f"its head is random (that of the file has {branches} branches and this one {wanted}; "
            f"--set model.aspp_branches={branches} takes it)"
        )
    # Branches are in the order of their dilations, so the first ones are the same convolutions.
    # The reference, too, copies what has a name and shape of its own: of a COCO file, which has
    # four branches, all, of which it then uses two.
    head = {name: found[name] for name in own}
    if len(head) < len(found):
        rates = " and ".join(str(rate) for rate in ATROUS_RATES[:wanted])
        return head, (
            f"and of its head the first {wanted} of {branches} branches (dilations {rates}; "
            f"{len(head)} tensors), as model.aspp_branches is {wanted}"
        )
    return head, f"and its head ({len(head)} tensors)"


def _branches(head: Mapping[str, Tensor]) -> int:
    """How many a DeepLabv2 head has; 0: it is another one, or incomplete."""
    count = len(head) // 2
    names = {f"branches.{i}.{part}" for i in range(count) for part in ("weight", "bias")}
    return count if head.keys() == names else 0


def _named(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _stages(names: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What names of the backbone's stages begin with: "layer4."."""
    return tuple({f"{name.partition('.')[0]}." for name in names if name.startswith("layer")})


def _plain(name: str) -> str:
    """A name without what programs put before torchvision's."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    if name.startswith(REFERENCE_HEAD):
        return f"head.branches.{name.removeprefix(REFERENCE_HEAD)}"
    return name


def _by_plain_name(state: Mapping[str, Any]) -> dict[str, Any]:
    return {_plain(name): value for name, value in state.items()}


# ---------------------------------------------------------------- ImageNet


def _imagenet(generator: Generator, mirror: ObjectStore | None) -> tuple[Weights, str]:
    architecture = generator.architecture
    backbone = architecture.backbone
    if backbone.startswith(TIMM):
        pretrained = TimmBackbone(
            backbone.removeprefix(TIMM), architecture.output_stride, pretrained=True
        )
        return _by_plain_name(pretrained.state_dict()), "timm"
    if backbone not in RESNETS:
        raise ConfigError(
            f"model.weights imagenet: there are none for the backbone {backbone}",
            mend="add --set model.weights=none",
        )
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        state: Weights = weights.get_state_dict(progress=True, check_hash=True)
    except (
        Exception
    ) as error:  # of a damaged file in the cache torch raises whatever it stumbles over
        name = weights.url.rpartition("/")[2]
        if mirror is not None:
            key = f"{run.WEIGHTS}{name}"
            with _mirrored(mirror, key) as path:
                if path is not None:
                    return _read(path, f"{mirror.uri}/{key}")[0], f"{mirror.uri}/{key}"
        place = f", put the file at {mirror.uri}/{run.WEIGHTS}{name}" if mirror is not None else ""
        raise ConfigError(
            f"model.weights imagenet: torchvision could not get {weights.url} "
            f"({_why_not(error, name)})",
            mend=f"connect to the network once{place}, give a file with "
            "--set model.weights=FILE.pth, or train from scratch with --set model.weights=none",
        ) from None
    return state, "torchvision's imagenet"


def _why_not(error: Exception, name: str) -> str:
    """In words: no network, a page to log in instead of the file, a damaged file in the cache."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {getattr(error.reason, 'strerror', None) or error.reason}"
    if isinstance(error, OSError):
        return error.strerror or "no connection"
    if "hash" in str(error):
        return "what arrives is another file, perhaps a page to log in"
    return f"{Path(torch.hub.get_dir()) / 'checkpoints' / name} is damaged: remove it"


@contextlib.contextmanager
def _mirrored(mirror: ObjectStore, key: str) -> Iterator[Path | None]:
    with tempfile.TemporaryDirectory(prefix="s4gan-") as scratch:
        try:
            path = mirror.fetch(key, Path(scratch))
        except ObjectNotFound:
            yield None
            return
        yield path


# ---------------------------------------------------------------- a file


def _from_file(source: str) -> tuple[Weights, dict[str, Any]]:
    mend = "give a file, 'imagenet' or 'none'"
    with local_copy(source, name="model.weights", mend=mend) as path:
        return _read(path, source)


def _read(path: Path, called: str) -> tuple[Weights, dict[str, Any]]:
    """The tensors, and of a file of ours the card of the model they are of."""
    mend = (
        "give a file of torch.save with a dict of tensors: torchvision's, a model of this program, "
        "or torch.save(network.state_dict(), ...) of a network that was saved as a whole"
    )
    try:
        content = read_model_file(path, called)
    except UnreadableFile as error:
        raise ConfigError(
            f"model.weights {called}: not a state dict ({error})", mend=mend
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"model.weights {called}: not a state dict, but a {type(content).__name__}", mend=mend
        )
    card = _card(content)
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others or not all(isinstance(name, str) for name in content):
        what = f"its {others[0]} is no tensor" if others else "its tensors have no names"
        raise ConfigError(f"model.weights {called}: not a state dict ({what})", mend=mend)
    weights = {_plain(name): value.float() for name, value in content.items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise ConfigError(
            f"model.weights {called}: {len(broken)} of its tensors hold NaN or infinite values "
            f"(first: {broken[0]})",
            mend="the training that wrote it had failed: give an earlier file of it",
        )
    return weights, card


def _card(content: dict[str, Any]) -> dict[str, Any]:
    """Of a model or checkpoint of ours; empty if it is none."""
    about = content.get("run")
    card = content.get("card") or (about.get("card") if isinstance(about, dict) else None)
    return card if isinstance(card, dict) else {}
