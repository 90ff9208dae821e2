"""The `s4gan` command: parses, calls `app` or `inference`, prints, exits. No logic of its own.

Nothing here imports torch before a verb needs it, so that `--help` and errors come at once.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import job
from job.config import load_config, parse_assignment, preset_names
from job.errors import ConfigError, ExitCode, JobError

app = typer.Typer(
    name="s4gan",
    help="Semi-supervised segmentation (S4GAN) as a job that survives being killed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would cut the names of options on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: errors of the user become two lines on stderr and an exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.ERROR, "error")
    # Until the run has its own handlers, seconds of imports away, nothing is there to be saved.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.PREEMPTED))
    try:
        app()
    except JobError as error:
        # Being stopped before anything was trained is no error.
        prefix = "" if error.exit_code is ExitCode.PREEMPTED else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # what the system refuses outside a run's own storage
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitCode.IO_ERROR)
    except KeyboardInterrupt:
        sys.exit(ExitCode.KILLED_BY_USER)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"s4gan {job.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    data: Annotated[str, typer.Option(help="Data folder (dataset.yaml, train/, val/).")],
    run: Annotated[str, typer.Option(help="Run folder; the same one again resumes.")],
    config: Annotated[
        str, typer.Option(help=f"Preset ({', '.join(preset_names())}) or YAML file.")
    ] = "guide",
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Generator. [guide: 2.5e-4]")
    ] = None,
    learning_rate_D: Annotated[
        float | None, typer.Option("--learning-rate-D", help="Discriminator. [guide: 1.0e-4]")
    ] = None,
    threshold_st: Annotated[
        float | None, typer.Option(help="Score above which an image trains itself. [guide: 0.2]")
    ] = None,
    val_split: Annotated[
        float | None, typer.Option(help="Share held out when there is no val/. [guide: 0.2]")
    ] = None,
    random_mirror: Annotated[
        bool | None, typer.Option("--random-mirror/--no-random-mirror", help="Mirror crops.")
    ] = None,
    random_scale: Annotated[
        bool | None, typer.Option("--random-scale/--no-random-scale", help="Scale images.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images that pass at once. [guide: 4]")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other key; repeatable."),
    ] = None,
    resume_anyway: Annotated[
        bool,
        typer.Option(
            "--resume-anyway",
            help="Go on with another configuration or other images than the run began with.",
        ),
    ] = False,
) -> None:
    """Train, or go on training; ends with best_model.pth, a report and a checklist in the run."""
    flags: dict[str, Any] = {
        "train.learning_rate": learning_rate,
        "train.learning_rate_D": learning_rate_D,
        "loss.threshold_st": threshold_st,
        "data.val_split": val_split,
        "data.random_mirror": random_mirror,
        "data.random_scale": random_scale,
        "train.batch_size": batch_size,
    }
    overrides = dict(parse_assignment(text) for text in assignments or [])
    overrides |= {key: value for key, value in flags.items() if value is not None}
    resolved = load_config(config, overrides)

    from job.app import train as run_attempt
    from job.monitor.console import make_console

    code = run_attempt(
        resolved,
        data_uri=data,
        run_uri=run,
        console=make_console(),
        resume_anyway=resume_anyway,
    )
    raise typer.Exit(code)


@app.command()
def evaluate(
    weights: Annotated[Path, typer.Option(help="best_model.pth or final_model.pth of a run.")],
    data: Annotated[str, typer.Option(help="Data folder.")],
    split: Annotated[str, typer.Option(help="val or train: all labeled images of it.")] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model: mIoU, IoU of each class, pixel accuracy, at the masks' full resolution."""
    if split not in ("val", "train"):
        raise ConfigError(f"--split {split}: must be val or train")
    from job.inference import choose_device, evaluate_weights

    scores = evaluate_weights(weights, data, split, choose_device())
    if as_json:
        print(json.dumps(vars(scores), indent=1))
        return
    width = max(len(name) for name in scores.class_iou)
    print(f"{scores.images} images of {split}")
    print(f"mIoU            {scores.miou:.4f}")
    print(f"pixel accuracy  {scores.pixel_accuracy:.4f}")
    for name, iou in scores.class_iou.items():
        print(f"  {name:<{width}}  {'does not occur' if iou is None else f'{iou:.4f}'}")


@app.command()
def predict(
    weights: Annotated[Path, typer.Option(help="best_model.pth or final_model.pth of a run.")],
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.png and NAME_overlay.png.")],
) -> None:
    """Segment a folder of images: class numbers as PNG, and a colour overlay to look at."""
    from job.inference import choose_device, predict_folder

    count = sum(1 for _ in predict_folder(weights, images, out, choose_device()))
    print(f"{count} images predicted into {out}")
