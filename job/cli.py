"""The `s4gan` command: parses, calls what does the work, prints, exits. No logic of its own.

Nothing here imports torch before a verb needs it, so that `--help` and errors come at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import job
from job.config import Config, config_from_yaml, load_config, parse_assignment, preset_names
from job.errors import ConfigError, ExitCode, JobError

if TYPE_CHECKING:
    from job.storage.progress import ConsoleProgress

_TYPER_STYLE: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # rich would cut the names of options on a narrow terminal
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    name="s4gan",
    help="Semi-supervised segmentation (S4GAN) as a job that survives being killed.",
    **_TYPER_STYLE,
)


def main() -> None:
    """Entry point: errors of the user become two lines on stderr and an exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.ERROR, "error")
    # Until the run has its own handlers, seconds of imports away, nothing is there to be saved.
    signal.signal(signal.SIGTERM, _stopped_early)
    signal.signal(signal.SIGINT, _stopped_early)
    try:
        app()
    except JobError as error:
        # Being stopped before anything was trained is no error.
        prefix = "" if error.exit_code is ExitCode.PREEMPTED else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        _leave(error.exit_code)
    except OSError as error:  # what the system refuses outside a run's own storage
        print(f"error: {error}", file=sys.stderr)
        if error.errno == errno.ENOENT and error.filename is None:  # tempfile's; torch wants one
            print(
                "  mend: set TMPDIR to a folder that can be written; in a container mount one at "
                "/scratch",
                file=sys.stderr,
            )
        sys.exit(ExitCode.IO_ERROR)
    finally:
        # All is said and done: a signal now must not change the exit code that tells it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stopped_early(number: int, _frame: FrameType | None) -> NoReturn:
    # Not print, whose buffer the signal may have interrupted.
    with contextlib.suppress(OSError):
        name = signal.Signals(number).name
        os.write(2, f"\nstopped by {name}; the same command goes on\n".encode())
    sys.exit(ExitCode.PREEMPTED if number == signal.SIGTERM else ExitCode.KILLED_BY_USER)


def _leave(code: ExitCode) -> NoReturn:
    """Exit, without waiting for an upload that there was no time for."""
    if any(thread.name == "publisher" for thread in threading.enumerate()):
        # boto3's threads would hold the interpreter until the upload ends, or the machine does.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _load_config(name_or_uri: str, overrides: dict[str, Any]) -> Config:
    """As `load_config`, and from s3:// too."""
    if "://" not in name_or_uri:
        return load_config(name_or_uri, overrides)
    from job.storage.files import local_copy

    with local_copy(name_or_uri, name="--config", mend="give a preset or a YAML file") as path:
        text = path.read_text(encoding="utf-8", errors="replace")
    return config_from_yaml(text, source=name_or_uri, overrides=overrides)


def _refuse_uri(name: str, folder: Path) -> None:
    if re.match(r"[a-z0-9]+:/", str(folder)):
        raise ConfigError(f"{name} {folder}: must be a local folder", mend="give its path")


def _transfer_progress() -> ConsoleProgress:
    """On stderr: stdout is for results."""
    from rich.console import Console

    from job.storage.progress import ConsoleProgress

    return ConsoleProgress(Console(stderr=True))


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
    data: Annotated[str, typer.Option(help="Folder or s3:// prefix (dataset.yaml, train/, val/).")],
    run: Annotated[str, typer.Option(help="Folder or s3:// prefix; the same one again resumes.")],
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
    gpus: Annotated[int, typer.Option(help="GPUs of this machine that train together.")] = 1,
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
    resolved = _load_config(config, overrides)

    # An exception would abort the process where torch's own start-up calls back into Python.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.PREEMPTED))
    signal.signal(signal.SIGINT, lambda *_: os._exit(ExitCode.KILLED_BY_USER))
    from job.app import train as run_attempt
    from job.monitor.console import make_console

    code = run_attempt(
        resolved,
        data_uri=data,
        run_uri=run,
        console=make_console(),
        gpus=gpus,
        resume_anyway=resume_anyway,
    )
    raise typer.Exit(code)


@app.command()
def evaluate(
    weights: Annotated[
        str, typer.Option(help="best_model.pth or final_model.pth of a run; a path or s3://.")
    ],
    data: Annotated[str, typer.Option(help="Data folder or s3:// prefix.")],
    split: Annotated[str, typer.Option(help="val or train: all labeled images of it.")] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model: mIoU, IoU of each class, pixel accuracy, at the masks' full resolution."""
    if split not in ("val", "train"):
        raise ConfigError(f"--split {split}: must be val or train")
    from job.inference import choose_device, evaluate_weights

    scores = evaluate_weights(weights, data, split, choose_device(), _transfer_progress())
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
    weights: Annotated[
        str, typer.Option(help="best_model.pth or final_model.pth of a run; a path or s3://.")
    ],
    images: Annotated[str, typer.Option(help="Folder or s3:// prefix of images.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.png and NAME_overlay.png.")],
) -> None:
    """Segment a folder of images: class numbers as PNG, and a colour overlay to look at."""
    from job.inference import choose_device, predict_folder

    _refuse_uri("--out", out)
    predicted = predict_folder(weights, images, out, choose_device(), _transfer_progress())
    print(f"{sum(1 for _ in predicted)} images predicted into {out}")


@app.command()
def pull(
    run: Annotated[str, typer.Argument(help="Run folder or s3:// prefix.")],
    folder: Annotated[Path, typer.Argument(help="Local folder.")],
    everything: Annotated[
        bool, typer.Option("--all", help="All files, checkpoints for resuming included.")
    ] = False,
) -> None:
    """Bring a run's files here, verified; again after an interruption fetches only the rest."""
    _refuse_uri("DIR", folder)
    from job.storage.pull import pull as pull_run
    from job.storage.pull import table

    result = pull_run(run, folder, everything=everything, progress=_transfer_progress())
    print(table(result))


data_app = typer.Typer(help="Look at a data set, or pack it for quick transfer.", **_TYPER_STYLE)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(
    uri: Annotated[str, typer.Argument(help="Data folder or s3:// prefix.")],
) -> None:
    """Look at every file, as training does before it begins; names what is wrong, exit code 78."""
    from job.data.checks import check_everything
    from job.data.dataset import scan_dataset
    from job.storage.sync import data_folder

    with data_folder(uri, progress=_transfer_progress()) as folder:
        dataset = scan_dataset(folder)
        warnings = check_everything(dataset)
    labeled = sum(item.mask is not None for item in dataset.train)
    for warning in warnings:
        print(f"warning: {warning}")
    print(
        f"{uri}: good; {labeled} labeled, {len(dataset.train) - labeled} unlabeled, "
        f"{len(dataset.val)} validation images, classes {', '.join(dataset.info.classes)}"
    )


@data_app.command("pack")
def data_pack(
    source: Annotated[str, typer.Argument(help="Data folder or s3:// prefix.")],
    target: Annotated[str, typer.Argument(help="Empty folder or prefix, or an earlier pack.")],
) -> None:
    """Pack a data set of many small files into a few tar files, which arrive several times faster.

    --data takes the packed one as it takes the loose one.
    """
    from job.storage.pack import describe
    from job.storage.pack import pack as pack_data

    print(describe(pack_data(source, target, progress=_transfer_progress())))


@app.command()
def drill(
    data: Annotated[str, typer.Option(help="Data folder to train on.")],
    folder: Annotated[Path, typer.Option(help="For the server, the runs and the logs; emptied.")],
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "demo",
    iterations: Annotated[int, typer.Option(min=60, help="Of each run.")] = 240,
) -> None:
    """Prove on this machine that a run survives: a local S3 server, a schedule of interruptions.

    Ends with a table, and exit code 1 if the interrupted run differs from one never stopped.
    """
    from job.drill.drill import run_drill

    raise typer.Exit(0 if run_drill(data, folder, config=config, iterations=iterations) else 1)


infra_app = typer.Typer(help="The AWS stack that jobs run on.", **_TYPER_STYLE)
app.add_typer(infra_app, name="infra")

_Stack = Annotated[str | None, typer.Option("--stack", help="Its name. [$S4GAN_STACK or s4gan]")]
_Template = Annotated[Path | None, typer.Option(help="Another template than infra/stack.yaml.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@infra_app.command("validate")
def infra_validate(template: _Template = None) -> None:
    """Check the stack's template without an account: cfn-lint, and the project's own rules."""
    from job.cloud.stack import TEMPLATE, validate

    path = template or TEMPLATE
    findings = validate(path)
    for finding in findings:
        print(finding)
    if findings:
        raise typer.Exit(ExitCode.BAD_CONFIG)
    print(f"{path}: good")


@infra_app.command("deploy")
def infra_deploy(
    stack: _Stack = None,
    template: _Template = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="KEY=VALUE", help="See infra/README.md; repeatable."),
    ] = None,
    yes: _Yes = False,
) -> None:
    """Make or change the stack; shows what would change, and asks."""
    from job.cloud.aws import stack_name
    from job.cloud.stack import TEMPLATE, deploy, parameters_from, table

    name = stack_name(stack)

    def agreed(changes: Any) -> bool:
        print(f"The stack {name} would change so:\n{table(changes)}")
        return yes or _confirmed("Do it?")

    outputs = deploy(
        name, template or TEMPLATE, parameters_from(parameters or []), say=print, agreed=agreed
    )
    if outputs is None:
        print("Nothing was changed.")
        raise typer.Exit(ExitCode.SOFTWARE)
    for key, value in sorted(outputs.items()):
        print(f"{key:<18} {value}")


@infra_app.command("destroy")
def infra_destroy(
    stack: _Stack = None,
    delete_bucket: Annotated[
        bool, typer.Option("--delete-bucket", help="With all data and runs in it.")
    ] = False,
    yes: _Yes = False,
) -> None:
    """Remove the stack; its bucket, with all runs, stays unless it is told to go."""
    from job.cloud.aws import stack_name
    from job.cloud.stack import destroy

    def agreed(gone: str) -> bool:
        print(f"This deletes {gone}.")
        return yes or _confirmed("Do it?")

    if not destroy(stack_name(stack), delete_bucket=delete_bucket, say=print, agreed=agreed):
        print("Nothing was deleted.")
        raise typer.Exit(ExitCode.SOFTWARE)


@infra_app.command("push")
def infra_push(
    image: Annotated[str, typer.Option(help="Local image, as `make image` made it.")] = (
        "s4gan:latest"
    ),
    tag: Annotated[str, typer.Option(help="In the repository; the stack's ImageTag.")] = "latest",
    docker: Annotated[str, typer.Option(help="Docker's command line.")] = "docker",
    stack: _Stack = None,
) -> None:
    """Put the image into the stack's repository, where jobs find it."""
    from job.cloud.aws import stack_name
    from job.cloud.image import push

    print(f"pushed {push(image, tag, stack_name(stack), docker)}")


def _confirmed(question: str) -> bool:
    """A yes on the terminal; without one, no."""
    if not sys.stdin.isatty():
        raise ConfigError("there is nobody to ask", mend="say --yes")
    return typer.confirm(question)
