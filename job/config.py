"""The configuration: frozen pydantic models, loaded from a preset or YAML file, checked once.

Defaults are those of the S4GAN monitoring guide; where it is silent, the reference's. Every field
here turns something in the program (a test walks the source to prove it). Knows nothing of torch,
so that a job can be submitted without it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from job.errors import ConfigError
from job.preset_files import PRESETS_DIR, preset_names

FREE_ON_RESUME = frozenset(
    {
        "data.workers",
        "data.cache",
        "train.log_every",
        "checkpoint.every",
        "checkpoint.keep_every",
    }
)
"""Fields a resumed run may change: they alter no weight."""
FREE_SECTIONS = ("stop.", "monitor.", "wandb.")
"""All of these likewise."""


_Layout = Literal["auto", "folder", "voc", "cityscapes", "context"]
LAYOUTS: tuple[str, ...] = get_args(_Layout)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BASIC_BLOCKS = ("tiny", "resnet18", "resnet34")
"""Backbones without bottlenecks."""
TIMM = "timm:"
"""Before the name of a network of timm's."""


def _backbone(name: str) -> str:
    if name in ("tiny", *RESNETS) or (name.startswith(TIMM) and name != TIMM):
        return name
    raise ValueError(f"input should be tiny, {', '.join(RESNETS)} or {TIMM}NAME")


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("the first of the two should not be larger than the second")
    return bounds


def _pair(value: Any) -> Any:
    """A single number stands for both sides of a crop."""
    if isinstance(value, (int, str)):
        return (value, value)
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """Which images are trained on, and how they are cut and varied."""

    layout: _Layout = "auto"
    """How the data folder is laid out: as our own (`folder`), or as PASCAL VOC 2012, Cityscapes or
    PASCAL-Context come; auto looks."""
    labeled_list: str | None = Field(None, min_length=1)
    """File that names the labeled images, or images and their masks, one a line. Relative to the
    data folder; or an absolute path, or s3://. Given on the command line, it takes the place of the
    `labeled_ratio` of a preset or file."""
    unlabeled_list: str | None = Field(None, min_length=1)
    """The same for the unlabeled images; without it, all other training images are unlabeled."""
    val_list: str | None = Field(None, min_length=1)
    """The same for the validation images, instead of the layout's own."""
    permutation: str | None = Field(None, min_length=1)
    """File with the numbers 0..N-1 in another order (text, .npy, .pkl): the first
    int(labeled_ratio * N) are the places of the labeled images in the layout's training list, or in
    `labeled_list`. Rounded down, as the S4GAN reference does with its split files."""
    labeled_ratio: float = Field(1.0, gt=0, le=1)
    """Fraction of the training masks to use; the other images count as unlabeled. Nested: for one
    seed the 1/8 subset lies inside the 1/4 subset. Rounded up, as the published splits are."""
    val_split: float = Field(0.2, gt=0, le=0.9)
    """Fraction of the labeled images held out for validation when there is no `val/` folder."""
    crop_size: Annotated[
        tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]], BeforeValidator(_pair)
    ] = (321, 321)
    """Height and width of a training crop in pixels, after `image_scale`; one number: a square."""
    image_scale: float = Field(1.0, gt=0, le=4)
    """Images are resized by this factor when loaded, in training and after; metrics are taken at
    the masks' full resolution all the same."""
    random_mirror: bool = False
    """Mirror a training crop left to right, every second one on average."""
    random_scale: bool = False
    """Scale a training image by a random factor of `scale_range` before it is cropped."""
    scale_range: Annotated[
        tuple[Annotated[float, Field(gt=0, le=8)], Annotated[float, Field(gt=0, le=8)]],
        AfterValidator(_rising),
    ] = (0.5, 1.5)
    """Least and most of `random_scale`, uniform between. Source: the S4GAN reference on VOC."""
    photometric_distortion: bool = False
    """The generator sees labeled images with random brightness, contrast, saturation and hue, as
    another camera or hour might show them (Liu et al. 2016, arXiv:1512.02325)."""
    strong_augment: bool = False
    """The generator sees unlabeled images with random brightness, contrast, saturation, hue, grey
    and blur, and learns what it says of them as they are (Sohn et al. 2020, arXiv:2001.07685)."""
    cutmix: float = Field(0.0, ge=0, le=1)
    """Share of the unlabeled images into which a box of another one is pasted (French et al. 2020,
    arXiv:1906.01916); the discriminator's labels are mixed alike."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that load images; auto takes the spare cores, up to 8. Never changes results."""

    cache: Literal["auto", "disk", "none"] = "auto"
    """Whether decoded images are kept on the local disk (S4GAN_SCRATCH) while training goes on;
    auto: if they fit into half of the free memory. Never changes results."""

    @property
    def lists(self) -> dict[str, str]:
        """Files that choose images, by their keys; without those that are not given."""
        given = {
            "data.labeled_list": self.labeled_list,
            "data.unlabeled_list": self.unlabeled_list,
            "data.val_list": self.val_list,
            "data.permutation": self.permutation,
        }
        return {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _one_choice_of_labels(self) -> DataConfig:
        if self.labeled_list and self.labeled_ratio != 1 and not self.permutation:
            raise ValueError(
                f"data.labeled_ratio: is {self.labeled_ratio:g}, but data.labeled_list says "
                "already which images are labeled, all of them; leave the ratio out, or give "
                "the data.permutation that chooses among the list"
            )
        return self


class ModelConfig(_Section):
    """The two networks."""

    backbone: Annotated[str, AfterValidator(_backbone)] = "resnet101"
    """Dilated backbone of the generator: resnet18, 34, 50 or 101; `tiny`, a small net of ours for
    CPUs; or `timm:NAME`, a convolutional network of timm (an extra: s4gan-job[timm])."""
    head: Literal["deeplabv2", "deeplabv3plus"] = "deeplabv2"
    """What makes classes of the backbone's features: the paper's, or the sharper and heavier one of
    Chen et al. 2018 (arXiv:1802.02611)."""
    aspp_branches: Literal[2, 4] = 4
    """Dilated convolutions of DeepLabv2's head; 2 is what the S4GAN reference computes by a slip
    (its `return` stands inside the loop over the four)."""
    output_stride: Literal[8, 16] = 8
    """Pixels of the image to one of the features; 16 takes a third of the arithmetic."""
    stride_in: Literal["3x3", "1x1"] = "3x3"
    """Which convolution of a bottleneck subsamples: the second as in torchvision's weights, or the
    first as in Caffe's. Weights must come from the same kind."""
    normalization: Literal["imagenet", "half", "caffe", "reference-voc", "reference-cityscapes"] = (
        "imagenet"
    )
    """How images are prepared: as the weights want it (torchvision's imagenet, others of timm's
    half, Caffe's caffe), or as the S4GAN reference does it."""
    batch_norm: Literal["auto", "trained", "affine_frozen", "frozen"] = "auto"
    """Of the backbone. trained: all of it; affine_frozen: statistics of the batch, but scale and
    shift as they are, as in the S4GAN reference; frozen: statistics as they are, too; auto:
    affine_frozen with pretrained weights, else trained."""
    mlmt_threshold: float | None = Field(None, gt=0, lt=1)
    """Adds the paper's second branch, multi-label mean teacher: which classes does an image hold?
    In use, classes less probable than this are ruled out (0.2 in the S4GAN reference); null: none.
    It shares the backbone here; in the paper it is a network of its own. Of no use where every
    image holds nearly every class (the paper leaves it out on Cityscapes)."""
    weights: str = "imagenet"
    """Where the network starts: `imagenet` (torchvision's or timm's, downloaded once), `none`, or a
    file (also s3://): a state dict with torchvision's names, or a model of this program."""
    discriminator_channels: int = Field(64, ge=8)
    """Channels of the discriminator's first convolution; each of the next three doubles them."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.aspp_branches != 4 and self.head != "deeplabv2":
            raise ValueError(f"model.aspp_branches {self.aspp_branches} is for the head deeplabv2")
        if self.stride_in == "1x1" and (
            self.backbone in BASIC_BLOCKS or self.backbone.startswith(TIMM)
        ):
            raise ValueError(f"model.stride_in 1x1: {self.backbone} has no such blocks")
        if self.weights == "none" and self.batch_norm in ("affine_frozen", "frozen"):
            raise ValueError(
                f"model.batch_norm {self.batch_norm}: without pretrained weights there is nothing "
                "to keep; give --weights, or --set model.batch_norm=trained"
            )
        return self


class TrainConfig(_Section):
    """The optimisation."""

    iterations: int = Field(50_000, ge=1)
    """Optimizer updates of the whole run."""
    batch_size: int = Field(4, ge=1)
    """Labeled, and as many unlabeled, images that pass through the networks at once."""
    accumulate: int = Field(4, ge=1)
    """Batches whose gradients are added up for one iteration."""
    learning_rate: float = Field(2.5e-4, gt=0)
    """Generator backbone, start of the polynomial decay."""
    head_factor: float = Field(10.0, gt=0)
    """The generator's head learns so many times faster than its backbone. Source: DeepLabv2."""
    learning_rate_D: float = Field(1.0e-4, ge=0)
    """Discriminator, start of the polynomial decay."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of the generator's SGD."""
    weight_decay: float = Field(5e-4, ge=0)
    """Of the generator's SGD."""
    power: float = Field(0.9, ge=0)
    """Of the polynomial learning rate decay of both networks."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Of the generator's moving average, the teacher (Tarvainen and Valpola 2017, arXiv:1703.01780)
    that labels the unlabeled images, is evaluated, and is the model to use; 0: there is none."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What convolutions are computed in while training; auto: bfloat16 on a GPU that has it,
    float16 on one that is fast in that alone (T4, V100), else float32.
    Weights, losses and evaluation are float32 in any case (products in TF32 on a GPU)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides the labeled subset, the data order, every augmentation and the initial weights."""
    supervised_only: bool = False
    """Train the generator on the labeled images alone: no discriminator, no unlabeled images. The
    baseline to hold S4GAN against."""
    log_every: int = Field(100, ge=1)
    """Iterations between two lines of losses."""
    eval_every: int = Field(500, ge=1)
    """Iterations between two evaluations."""


class LossConfig(_Section):
    """Weights and gates of the losses (Mittal et al. 2019, arXiv:1908.05724)."""

    lambda_fm: float = Field(0.1, ge=0)
    """Weight of the feature matching loss."""
    lambda_st: float = Field(1.0, ge=0)
    """Weight of the self-training loss."""
    lambda_mlmt: float = Field(1.0, ge=0)
    """Weight of the losses of `model.mlmt_threshold`'s branch."""
    threshold_st: float = Field(0.2, ge=0, le=1)
    """An unlabeled image trains on its own prediction when the discriminator's score is above."""
    st_start: int = Field(1000, ge=0)
    """Last iteration without self-training."""
    gate_warmup: int = Field(0, ge=0)
    """Iterations after `st_start` in which the threshold comes down from 1 to `threshold_st`: while
    the networks are young only what looks most real is learned from."""
    gate_share: float = Field(0.0, ge=0, le=1)
    """At least this share of a batch passes the gate, those that look most real; 0: those above the
    threshold alone. A discriminator that tells everything apart would end self-training (the most
    reliable half: Yang et al. 2022, arXiv:2106.05095)."""
    confidence: float = Field(0.0, ge=0, lt=1)
    """Of an accepted image only pixels train whose class is more probable than this; 0: all (Sohn
    et al. 2020, arXiv:2001.07685)."""

    @property
    def warm_up(self) -> int:
        """Last iteration in which self-training does not act as it will."""
        return self.st_start + self.gate_warmup


class CheckpointConfig(_Section):
    """When the state is saved."""

    every: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Iterations between two recovery checkpoints; auto weighs what a save costs against how often
    the run is interrupted."""
    keep_every: int = Field(5000, ge=1)
    """Iterations between two numbered checkpoints that are kept for good."""


class StopConfig(_Section):
    """When training ends before its last iteration. May be changed at any time."""

    patience: int = Field(10_000, ge=0)
    """Iterations without a better validation mIoU; 0: as many as there are."""
    degrading: bool = True
    """End when validation mIoU keeps falling: the median of three is 0.05 below the best such."""
    target_miou: float | None = Field(None, gt=0, le=1)
    """End as soon as validation mIoU is that high."""


class MonitorConfig(_Section):
    """What is done when training goes wrong. May be changed at any time."""

    on_divergence: Literal["stop", "rollback"] = "stop"
    """Of NaN; rollback: to before it (or before Loss_CE has jumped), with half the learning rates,
    at most three times."""
    on_oom: Literal["stop", "halve"] = "stop"
    """When the GPU's memory is not enough; halve: half the batch, accumulated twice as often."""


class WandbConfig(_Section):
    """Weights & Biases."""

    project: str = Field("s4gan", min_length=1)
    entity: str | None = None
    """Team or user; the key's default when empty."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a key, else offline."""
    tags: tuple[str, ...] = ()
    model_artifact: Literal["none", "reference", "upload"] = "reference"
    """The best model as an artifact of the W&B run, at the end: where it is (s3:// or a path, which
    sends no weights and takes no storage there), the file itself, or nothing."""


class Config(_Section):
    """All there is to configure; a YAML file has the same sections and keys."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stop: StopConfig = StopConfig()
    monitor: MonitorConfig = MonitorConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.model.head == "deeplabv3plus" and self.train.batch_size == 1:
            raise ValueError(
                "train.batch_size 1: the head deeplabv3plus needs 2 or more, as batch norm after "
                "its global pooling has one value an image"
            )
        if self.model.mlmt_threshold is not None and not self.train.ema_decay:
            raise ValueError(
                "model.mlmt_threshold: a mean teacher needs train.ema_decay, for example 0.99"
            )
        return self

    def without_effect(self) -> list[str]:
        """What is set and does nothing because of something else that is set; for warnings."""
        data, train, loss = self.data, self.train, self.loss
        found = []
        if not train.supervised_only and loss.st_start >= train.iterations:
            found.append(
                f"self-training never begins: loss.st_start is {loss.st_start}, and the run has "
                f"{train.iterations} iterations"
            )
        if not train.supervised_only and data.cutmix and train.batch_size == 1:
            found.append("data.cutmix mixes images of one batch, and train.batch_size is 1")
        if not data.random_scale and data.scale_range != DataConfig().scale_range:
            found.append("data.scale_range is not used without data.random_scale")
        if train.supervised_only:
            default = LossConfig()
            unused = [
                f"loss.{name}"
                for name, value in loss
                if name != "lambda_mlmt" and value != getattr(default, name)
            ]
            if train.learning_rate_D != TrainConfig().learning_rate_D:
                unused.append("train.learning_rate_D")
            if unused:
                found.append(f"train.supervised_only has no use for {', '.join(unused)}")
        return found

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionaries, lists and scalars: what YAML, JSON and checkpoints hold."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The text of `config.yaml`: every key, in the order of this file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_config(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Load a preset or a YAML file over the defaults, then apply the overrides.

    Args:
        name_or_file: a name of `preset_names()`, or the path of a YAML file.
        overrides: "section.key" to value; text is read as YAML would read it.

    Raises:
        ConfigError: no such preset or file, an unknown key (names the nearest valid one), or a
            value out of range.
    """
    source, text = _read_source(name_or_file)
    return config_from_yaml(text, source=source, overrides=overrides)


def config_from_dict(raw: Mapping[str, Any], *, source: str) -> Config:
    """Validate nested dictionaries; `source` names them in an error.

    Raises:
        ConfigError: lists every wrong key and value at once.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "\n  ".join(problems)) from None


def config_from_yaml(
    text: str, *, source: str, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Inverse of `Config.to_yaml`, with overrides as in `load_config`.

    Raises:
        ConfigError: not YAML, or not a configuration of this version.
    """
    return config_from_dict(_apply_overrides(_parse(text, source), overrides or {}), source=source)


def parse_assignment(text: str) -> tuple[str, Any]:
    """`section.key=value`, as given to `--set`, with the value read as YAML.

    Raises:
        ConfigError: no `=` or no dot.
    """
    key, separator, value = text.partition("=")
    if not separator or "." not in key:
        near = _nearest(key.strip()) if separator else None
        raise ConfigError(
            f"--set {text}: not of the form section.key=value",
            mend=(f"did you mean {near}? " if near else "")
            + "for example: --set train.iterations=20000",
        )
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML ({error})") from None


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations would train differently: key to (ours, theirs)."""
    other = dict(_flatten(theirs))
    return {
        key: (value, other[key])
        for key, value in _flatten(ours)
        if value != other[key] and key not in FREE_ON_RESUME and not key.startswith(FREE_SECTIONS)
    }


def check_gpus(config: Config, gpus: int, nodes: int = 1) -> None:
    """Refuse a number of GPUs that cannot share the batches of an iteration.

    Args:
        config: what is to be trained.
        gpus: of each machine.
        nodes: how many machines.

    Raises:
        ConfigError: says what would be possible.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: must be at least 1")
    if nodes < 1:
        raise ConfigError(f"--nodes {nodes}: must be at least 1")
    count = gpus * nodes
    accumulate, batch_size = config.train.accumulate, config.train.batch_size
    if accumulate % count:
        named = f"--gpus {gpus}" if nodes == 1 else f"--gpus {gpus} on {nodes} machines"
        raise ConfigError(
            f"{named}: train.accumulate is {accumulate}, and a batch of train.batch_size "
            f"{batch_size} is not cut",
            mend=f"make train.accumulate a multiple of {count}; to keep the images of an iteration "
            f"at {accumulate * batch_size}, change train.batch_size along",
        )


def valid_keys() -> list[str]:
    """Every "section.key"."""
    return [key for key, _ in _flatten(Config())]


def _flatten(config: Config) -> Iterator[tuple[str, Any]]:
    for section, fields in config.to_dict().items():
        for key, value in fields.items():
            yield f"{section}.{key}", value


def _read_source(name_or_file: str) -> tuple[str, str]:
    path = Path(name_or_file)
    if name_or_file in preset_names():
        path = PRESETS_DIR / f"{name_or_file}.yaml"
    elif path.exists() and not path.is_file():
        raise ConfigError(f"--config {name_or_file}: is no file", mend="give that of a YAML file")
    elif not path.is_file():
        known = ", ".join(preset_names())
        near = difflib.get_close_matches(name_or_file, preset_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--config {name_or_file}: no such preset, and no such file",
            mend=f"{hint}presets are {known}; or give the path of a YAML file",
        )
    try:
        return str(name_or_file), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {name_or_file}: cannot be read ({error})") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML ({error})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must hold sections such as 'train:', not {raw!r}")
    # A section with nothing under it (`train:`) means its defaults.
    return {section: {} if fields is None else fields for section, fields in raw.items()}


def _apply_overrides(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = {
        section: dict(fields) if isinstance(fields, dict) else fields
        for section, fields in raw.items()
    }
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        fields = merged.setdefault(section, {})
        if isinstance(fields, dict):
            fields[key] = value
    data = merged.get("data")
    if (
        overrides.get("data.labeled_list")
        and isinstance(data, dict)
        and not data.get("permutation")
        and "data.labeled_ratio" not in overrides
    ):
        # The ratio that stood there chose among masks; now a list says which are used.
        data["labeled_ratio"] = 1.0
    return merged


def _explain(item: Any) -> str:
    """One of pydantic's errors as a sentence that names the key, the value and the mend."""
    # Below section and key come only the names of union branches and tuple positions.
    dotted = ".".join(str(part) for part in item["loc"][:2])
    if item["type"] == "extra_forbidden":
        # Of an unknown section each key is looked for: it may be one of another section.
        within = item["input"] if len(item["loc"]) == 1 and isinstance(item["input"], dict) else {}
        unknown = [f"{dotted}.{key}" for key in within] or [dotted]
        return "\n  ".join(f"unknown key {key} ({_hint(key)})" for key in unknown)
    if item["type"] == "value_error":  # of our own validators
        message = str(item["ctx"]["error"])
        if len(item["loc"]) < 2:  # of several keys, which it names
            return message
    else:
        message = item["msg"][0].lower() + item["msg"][1:]
    return f"{dotted}: {message}, got {item['input']!r}"


_WHOLE_WORDS = {"lr": "rate", "wd": "decay", "iters": "iterations", "bs": "size"}


def _hint(dotted: str) -> str:
    near = _nearest(dotted)
    return f"did you mean {near}?" if near else f"valid: {', '.join(valid_keys())}"


def _nearest(dotted: str) -> str | None:
    """The key, or section, that was perhaps meant."""
    keys = valid_keys()
    candidates = keys + sorted({key.partition(".")[0] for key in keys})
    near = difflib.get_close_matches(dotted, candidates, n=1, cutoff=0.5)
    # A right key in the wrong section is as common as a misspelt one.
    same_name = [key for key in keys if key.rpartition(".")[2] == dotted.rpartition(".")[2]]
    words = {_WHOLE_WORDS.get(word, word) for word in re.split(r"[._]", dotted)}
    same_words = [key for key in keys if words <= set(re.split(r"[._]", key))]
    # All words in one key say more than the last one does: eval.every is not checkpoint.every.
    best = (same_words if len(same_words) == 1 else []) or same_name or same_words or near
    return best[0] if best else None
