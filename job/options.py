"""Options that several verbs take, and what they resolve to.

Imports `job.config` only where it is used: `--help` does not need it, and it is slow to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from job.preset_files import preset_names

if TYPE_CHECKING:
    from job.config import Config, DataConfig

DEFAULT_CONFIG = "guide"

DataUri = Annotated[
    str, typer.Option(help="Folder or s3:// prefix: dataset.yaml, train/, val/; or VOC, ...")
]
ConfigName = Annotated[
    str | None,
    typer.Option(
        help=f"Preset ({', '.join(preset_names())}) or YAML file.", show_default=DEFAULT_CONFIG
    ),
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", help="Generator. [guide: 2.5e-4]")
]
LearningRateD = Annotated[
    float | None, typer.Option("--learning-rate-D", help="Discriminator. [guide: 1.0e-4]")
]
ThresholdSt = Annotated[
    float | None, typer.Option(help="Score above which an image trains itself. [guide: 0.2]")
]
ValSplit = Annotated[
    float | None, typer.Option(help="Share held out when there is no val/. [guide: 0.2]")
]
RandomMirror = Annotated[
    bool | None, typer.Option("--random-mirror/--no-random-mirror", help="Mirror crops.")
]
RandomScale = Annotated[
    bool | None, typer.Option("--random-scale/--no-random-scale", help="Scale images.")
]
TargetMiou = Annotated[
    float | None, typer.Option(help="Validation mIoU at which training ends. [guide: none]")
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="Where the generator starts: imagenet, none, or a file."),
]
BatchSize = Annotated[int | None, typer.Option(help="Images that pass at once. [guide: 4]")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other key; repeatable."),
]
ResumeAnyway = Annotated[
    bool,
    typer.Option(
        "--resume-anyway",
        help="Go on with another configuration or other images than the run began with.",
    ),
]
Stack = Annotated[str | None, typer.Option("--stack", help="Its name. [$S4GAN_STACK or s4gan]")]
Window = Annotated[
    str | None,
    typer.Option(
        metavar="HxW", help="The network sees so much at a time, with overlaps; its own pixels."
    ),
]
Stride = Annotated[
    str | None, typer.Option(metavar="HxW", help="From window to window. [2/3 of one]")
]
Flip = Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")]
Scales = Annotated[
    str | None, typer.Option(metavar="S,S,...", help="Average over these sizes: 0.75,1,1.25.")
]
Layout = Annotated[str, typer.Option(help="folder, voc, cityscapes or context; auto looks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def overrides(
    *,
    learning_rate: float | None = None,
    learning_rate_D: float | None = None,
    threshold_st: float | None = None,
    val_split: float | None = None,
    random_mirror: bool | None = None,
    random_scale: bool | None = None,
    batch_size: int | None = None,
    target_miou: float | None = None,
    weights: str | None = None,
    assignments: list[str] | None = None,
) -> dict[str, Any]:
    """What the command line says of the configuration, by "section.key"; flags before `--set`."""
    from job.config import parse_assignment

    flags = {
        "train.learning_rate": learning_rate,
        "train.learning_rate_D": learning_rate_D,
        "loss.threshold_st": threshold_st,
        "data.val_split": val_split,
        "data.random_mirror": random_mirror,
        "data.random_scale": random_scale,
        "train.batch_size": batch_size,
        "stop.target_miou": target_miou,
        "model.weights": weights,
    }
    found = dict(parse_assignment(text) for text in assignments or [])
    return found | {key: value for key, value in flags.items() if value is not None}


def scored_data(
    layout: str, val_list: str | None, *, layout_flag: str, list_flag: str
) -> DataConfig:
    """The layout and images that a command which scores is told by flags.

    Raises:
        ConfigError: no such layout, or no name of a file; says the flag.
    """
    from job.config import LAYOUTS, DataConfig
    from job.errors import ConfigError

    if layout not in LAYOUTS:
        raise ConfigError(f"{layout_flag} {layout}: must be one of {', '.join(LAYOUTS)}")
    if val_list == "":
        raise ConfigError(f"{list_flag} is empty", mend="name a file, or leave it out")
    return DataConfig.model_validate({"layout": layout, "val_list": val_list})


def read_config(name_or_uri: str | None, changes: dict[str, Any]) -> Config:
    """As `load_config`, and from s3:// too; None is the default."""
    from job.config import config_from_yaml, load_config

    name_or_uri = name_or_uri or DEFAULT_CONFIG
    if "://" not in name_or_uri:
        return load_config(name_or_uri, changes)
    from job.storage.files import local_copy

    with local_copy(name_or_uri, name="--config", mend="give a preset or a YAML file") as path:
        text = path.read_text(encoding="utf-8", errors="replace")
    return config_from_yaml(text, source=name_or_uri, overrides=changes)
