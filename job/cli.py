"""The `s4gan` command: parses, calls what does the work, prints, exits. No logic of its own.

Nothing here imports torch, boto3 or pydantic before a verb needs it, so that `--help` and errors
come at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import job
from job import options
from job.errors import ConfigError, DataError, ExitCode, JobError, StorageError

if TYPE_CHECKING:
    from job.cloud.submit import SubmittedRun
    from job.storage.progress import ConsoleProgress

DATA_PAGE = "data-check.html"
"""Where `data check` writes its page."""

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
    # It logs a traceback of what it raises, too, and that is said in our words.
    logging.getLogger("botocore.credentials").setLevel(logging.CRITICAL)
    # Pillow's about broken EXIF blocks, which name no file and harm nothing.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    # Before torch is imported: large tensors on a CPU then lie in pages of 2 MB, where Linux has
    # them to give, with less than a third of the page faults (1 to 14% off an iteration).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
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


def _print_json(value: Any) -> None:
    """For programs; what is no number is null, as JSON knows neither NaN nor infinity."""
    from pydantic_core import to_json

    print(to_json(value, indent=1, inf_nan_mode="null").decode())


def _stopped_early(number: int, _frame: FrameType | None) -> NoReturn:
    # Not print, whose buffer the signal may have interrupted.
    with contextlib.suppress(OSError):
        name = signal.Signals(number).name
        how = ", with --skip-existing" * ("predict" in sys.argv[1:2])
        os.write(2, f"\nstopped by {name}; run the same command again{how}\n".encode())
    sys.exit(ExitCode.PREEMPTED if number == signal.SIGTERM else ExitCode.KILLED_BY_USER)


def _leave(code: ExitCode) -> NoReturn:
    """Exit, without waiting for an upload that there was no time for."""
    if any(thread.name == "publisher" for thread in threading.enumerate()):
        # boto3's threads would hold the interpreter until the upload ends, or the machine does.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _refuse_uri(name: str, folder: Path) -> None:
    if re.match(r"[a-z0-9]+:/", str(folder)):
        raise ConfigError(f"{name} {folder}: must be a local folder", mend="give its path")


def _refuse_no_files(**files: Path | None) -> None:
    """That can be written, later, when it has cost time; each for one thing.

    Args:
        files: by the name of their flag, with _ for -.
    """
    seen: dict[Path, str] = {}
    for name, file in files.items():
        if file is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        _refuse_uri(flag, file)
        if file.is_dir():
            raise ConfigError(f"{flag} {file}: is a folder", mend="give a file's path")
        if not file.parent.is_dir():
            raise ConfigError(
                f"{flag} {file}: there is no folder {file.parent}", mend="make it first"
            )
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ConfigError(f"{flag} {file}: cannot be written", mend="give another place")
        other = seen.setdefault(file.resolve(), flag)
        if other != flag:
            raise ConfigError(f"{other} and {flag} {file}: are one file", mend="give each its own")


def _transfer_progress() -> ConsoleProgress:
    """On stderr: stdout is for results."""
    from rich.console import Console

    from job.storage.progress import ConsoleProgress

    return ConsoleProgress(Console(stderr=True))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


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
    data: options.DataUri,
    run: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix; the same one again resumes.")
    ] = None,
    config: options.ConfigName = None,
    learning_rate: options.LearningRate = None,
    learning_rate_D: options.LearningRateD = None,
    threshold_st: options.ThresholdSt = None,
    val_split: options.ValSplit = None,
    random_mirror: options.RandomMirror = None,
    random_scale: options.RandomScale = None,
    batch_size: options.BatchSize = None,
    target_miou: options.TargetMiou = None,
    weights: options.Weights = None,
    assignments: options.Assignments = None,
    gpus: Annotated[int, typer.Option(help="GPUs of this machine that train together.")] = 1,
    resume_anyway: options.ResumeAnyway = False,
    array: Annotated[
        str | None,
        typer.Option(help="Instead of --config and --run: as child of a job for several runs."),
    ] = None,
    stop_with_parent: Annotated[bool, typer.Option("--stop-with-stdin", hidden=True)] = False,
) -> None:
    """Train, or go on training; ends with best_model.pth, a report and a checklist in the run."""
    if stop_with_parent:  # of bench-recipe
        from job.preemption import stop_with_stdin

        stop_with_stdin()
    changes = options.overrides(
        learning_rate=learning_rate,
        learning_rate_D=learning_rate_D,
        threshold_st=threshold_st,
        val_split=val_split,
        random_mirror=random_mirror,
        random_scale=random_scale,
        batch_size=batch_size,
        target_miou=target_miou,
        weights=weights,
        assignments=assignments,
    )
    if array is not None:
        from job.cloud.sweep import own_point

        if run is not None or config is not None:
            raise ConfigError(
                "--array says what to train, --run and --config too", mend="leave out one"
            )
        run, config = own_point(array)
    if run is None:
        raise ConfigError("--run is missing", mend="say where the run is to be: --run FOLDER")
    resolved = options.read_config(config, changes)

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
    layout: options.Layout = "auto",
    val_list: Annotated[
        str | None, typer.Option(help="File that names the images of val, as data.val_list.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="plain, voc, cityscapes, cityscapes-full or context.")
    ] = "plain",
    window: options.Window = None,
    stride: options.Stride = None,
    flip: options.Flip = False,
    scales: options.Scales = None,
    boundary: Annotated[
        bool, typer.Option("--boundary", help="Boundary F-score too; slower.")
    ] = False,
    boundary_tolerance: Annotated[
        float | None,
        typer.Option(min=0.0001, max=0.5, help="Of the image's diagonal. [default: 0.0075]"),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the classes' scores there.")] = None,
    per_image: Annotated[
        Path | None, typer.Option(help="Write each image's mIoU there, as CSV.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Score a model on labeled images.

    mIoU, IoU and accuracy of each class, and more, at the masks' full resolution, unless the
    protocol says otherwise. Probabilities are averaged over windows, mirrored images and scales.
    """
    if split not in ("val", "train"):
        raise ConfigError(f"--split {split}: must be val or train")
    of_data = options.scored_data(layout, val_list, layout_flag="--layout", list_flag="--val-list")
    if boundary_tolerance is not None and not boundary:
        raise ConfigError("--boundary-tolerance: without --boundary", mend="add --boundary")
    if val_list is not None and split != "val":
        raise ConfigError("--val-list: is for --split val", mend="leave one of the two out")
    if as_json and markdown:
        raise ConfigError("--json and --markdown are both given", mend="leave out one")
    _refuse_no_files(csv=csv, per_image=per_image)
    from job.inference import choose_device, evaluate_weights
    from job.training.boundary import TOLERANCE
    from job.training.protocols import protocol_named

    looked_at = protocol_named(protocol).changed(
        window=window, stride=stride, flip=flip, scales=scales
    )
    scores = evaluate_weights(
        weights,
        data,
        split,
        choose_device(),
        of_data,
        _transfer_progress(),
        protocol=looked_at,
        boundary=(boundary_tolerance or TOLERANCE) if boundary else None,
    )
    for warning in scores.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        _print_json(vars(scores))
    else:
        print(scores.markdown() if markdown else scores.text())
    for file, text in ((csv, scores.csv), (per_image, scores.per_image_csv)):
        if file is not None:
            try:
                file.write_text(text(), encoding="utf-8")
            except OSError as error:
                raise StorageError.from_os("write", file, error) from error


@app.command(context_settings={"allow_extra_args": True})  # or what a shell makes of a pattern
def predict(
    context: typer.Context,
    weights: Annotated[
        str, typer.Option(help="best_model.pth or final_model.pth of a run; a path or s3://.")
    ],
    images: Annotated[
        str, typer.Option(help="Folder, s3:// prefix, image, or pattern ('photos/*.jpg').")
    ],
    out: Annotated[
        str, typer.Option(help="Folder or s3:// prefix for NAME.png and NAME_overlay.png.")
    ],
    window: options.Window = None,
    stride: options.Stride = None,
    flip: options.Flip = False,
    scales: options.Scales = None,
    tile: Annotated[
        int | None,
        typer.Option(min=64, help="Side of a tile. [1024, of images above 4 megapixels]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of one size at once.")] = 1,
    no_overlay: Annotated[bool, typer.Option("--no-overlay", help="Class numbers only.")] = False,
    coco: Annotated[Path | None, typer.Option(help="COCO annotations (run lengths) too.")] = None,
    polygons: Annotated[Path | None, typer.Option(help="Polygons too, as JSON.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there already.")
    ] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out what is predicted already.")
    ] = False,
) -> None:
    """Segment images.

    Class numbers as PNG, and a colour overlay to look at.

    An image that cannot be decoded is named and left out; the exit code is then 78.
    """
    if context.args:
        more = context.args
        raise ConfigError(
            f"{len(more)} words too many: {' '.join(more[:3])}{' ...' * (len(more) > 3)}",
            mend="quote a pattern, so that the shell leaves it alone: --images 'photos/*.jpg'",
        )
    _refuse_no_files(coco=coco, polygons=polygons)
    if overwrite and skip_existing:
        raise ConfigError("--overwrite and --skip-existing are opposites", mend="give one of them")
    from job.inference import choose_device
    from job.outlines import CocoOutlines, PolygonOutlines
    from job.prediction import Wish, predict_images
    from job.training.protocols import PLAIN

    protocol = PLAIN.changed(window=window, stride=stride, flip=flip, scales=scales)
    kinds = ((coco, CocoOutlines), (polygons, PolygonOutlines))
    wanted = [(file, kind) for file, kind in kinds if file is not None]
    outcome = predict_images(
        weights,
        images,
        out,
        choose_device(),
        Wish(
            protocol,
            tile,
            batch,
            with_overlay=not no_overlay,
            existing="replace" if overwrite else "skip" if skip_existing else "refuse",
        ),
        outlines=[kind for _, kind in wanted],
        progress=_transfer_progress(),
    )
    for (file, _), outline in zip(wanted, outcome.outlines, strict=True):
        file.write_bytes(outline.to_json())
    skipped = f", {outcome.skipped} were there already" if outcome.skipped else ""
    print(f"{outcome.written} images predicted into {out}{skipped}")
    if outcome.unreadable:
        raise DataError(
            "\n".join([*outcome.unreadable[:5], f"{len(outcome.unreadable)} left out"]),
            mend="replace these files; the predictions of the others are there",
        )


@app.command()
def export(
    weights: Annotated[
        str, typer.Option(help="best_model.pth or final_model.pth of a run; a path or s3://.")
    ],
    format_: Annotated[str, typer.Option("--format", help="onnx or safetensors.")],
    out: Annotated[str, typer.Option(help="File to be written; a path or s3://.")],
    images: Annotated[
        str | None, typer.Option(help="Images to compare ONNX and torch on. [noise]")
    ] = None,
) -> None:
    """Write a model as ONNX or safetensors.

    ONNX is compared with torch before the file is left.
    """
    from job.export import export as export_model

    done = export_model(weights, out, format_, images=images, progress=_transfer_progress())
    print(f"{done.uri}: {done.size / 2**20:.1f} MiB")
    if done.difference is not None:
        print(
            f"its logits differ from torch's by {done.difference:.1e} at most "
            f"({done.checked} images)"
        )


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
    config: options.ConfigName = None,
    val_split: options.ValSplit = None,
    batch_size: options.BatchSize = None,
    assignments: options.Assignments = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="HTML page of samples with their masks over them.", show_default=DATA_PAGE
        ),
    ] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Write no page.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Look at images and labels, as training does before it begins and more; exit code 78 if wrong.

    Classes, duplicates, formats, and a page to see whether the masks fit. --config and its kin say
    which images are labeled and which are held out, as for train.
    """
    if page is not None:
        if no_page:
            raise ConfigError("--page and --no-page are both given", mend="leave out one")
        _refuse_uri("--page", page)
        if not page.parent.is_dir() or page.is_dir():
            raise ConfigError(f"--page {page}: cannot be a file there", mend="give a file's path")
    changes = options.overrides(val_split=val_split, batch_size=batch_size, assignments=assignments)
    resolved = options.read_config(config, changes)
    from job.data.checks import inspect
    from job.data.scan import scan_dataset
    from job.monitor.data_page import write_data_page
    from job.storage.sync import data_folder

    progress = _transfer_progress()
    with data_folder(uri, progress=progress) as folder:
        report = inspect(scan_dataset(folder, resolved.data), resolved, uri=uri, progress=progress)
        if not as_json:
            print(report.text())
        written = None
        if not no_page:
            written = page or Path(DATA_PAGE)
            try:
                samples = write_data_page(report, written)
            except StorageError as error:
                if page is not None:
                    raise
                written = None  # nobody asked for it, and the folder may be read-only for good
                print(f"warning: no page of samples: {error.message}", file=sys.stderr)
    if as_json:
        _print_json(report.to_dict() | {"page": None if written is None else str(written)})
    else:
        if written is not None:
            print(f"{written}: {samples} samples with their masks over them; open it in a browser")
        if report.is_good:
            print(report.headline)
    if not report.is_good:
        raise DataError(report.headline)


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


@app.command("bench-recipe")
def bench_recipe(
    data: Annotated[str, typer.Option(help="Data to train on; folder or s3:// prefix.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs and the table.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PRESET[,KEY=VALUE]",
            help="Repeatable; the first is what the others are compared with.",
            show_default="supervised, guide, modern",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe.")] = 3,
    test: Annotated[
        str | None,
        typer.Option(
            help="Data whose val/ scores the best models; else the last ones are scored on the "
            "validation images."
        ),
    ] = None,
    test_layout: options.Layout = "auto",
    test_list: Annotated[
        str | None, typer.Option(help="File that names the images of --test to score on.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    assignments: options.Assignments = None,
) -> None:
    """Compare recipes over several seeds.

    Ends with one Markdown table; the same command goes on after a stop. --set goes to every recipe:
    the same iterations, network and crop for all.
    """
    _refuse_uri("--out", out)
    if test is None and (test_list is not None or test_layout != "auto"):
        raise ConfigError("--test-layout and --test-list: without --test", mend="add --test")
    test_data = options.scored_data(
        test_layout, test_list, layout_flag="--test-layout", list_flag="--test-list"
    )
    from job.recipes import DEFAULT_RECIPES, Recipe, bench_recipes

    table = bench_recipes(
        [Recipe.parse(text) for text in recipe or DEFAULT_RECIPES],
        data=data,
        out=out,
        seeds=seeds,
        common=options.overrides(assignments=assignments),
        test=test,
        test_data=test_data,
        parallel=parallel,
        tell=_to_stderr,
    )
    print(table)


@app.command()
def submit(
    data: Annotated[str, typer.Option(help="s3:// prefix of the data set.")],
    run: Annotated[str, typer.Option(help="s3:// prefix; the same one again resumes.")],
    config: options.ConfigName = None,
    learning_rate: options.LearningRate = None,
    learning_rate_D: options.LearningRateD = None,
    threshold_st: options.ThresholdSt = None,
    val_split: options.ValSplit = None,
    random_mirror: options.RandomMirror = None,
    random_scale: options.RandomScale = None,
    batch_size: options.BatchSize = None,
    target_miou: options.TargetMiou = None,
    weights: options.Weights = None,
    assignments: options.Assignments = None,
    gpus: Annotated[int, typer.Option(help="GPUs of one machine that train together.")] = 1,
    nodes: Annotated[
        int, typer.Option(help="Machines with --gpus each that train together; --on-demand only.")
    ] = 1,
    seeds: Annotated[
        int | None, typer.Option(help="So many runs below --run that differ in train.seed.")
    ] = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="SECTION.KEY=VALUE,VALUE",
            help="A run below --run for each value; repeatable: for each combination.",
        ),
    ] = None,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="No spot machines: dearer, not interrupted.")
    ] = False,
    max_hours: Annotated[
        float | None, typer.Option(help="An attempt that takes longer saves and ends the job.")
    ] = None,
    resume_anyway: options.ResumeAnyway = False,
    stack: options.Stack = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the request; needs no account.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train on AWS Batch, in the stack that `infra deploy` made; the same run again resumes it."""
    from job.cloud.aws import stack_name
    from job.cloud.preflight import Wish
    from job.cloud.submit import dry_run as request_only
    from job.cloud.submit import submit as submit_runs
    from job.cloud.sweep import sweep_points

    changes = options.overrides(
        learning_rate=learning_rate,
        learning_rate_D=learning_rate_D,
        threshold_st=threshold_st,
        val_split=val_split,
        random_mirror=random_mirror,
        random_scale=random_scale,
        batch_size=batch_size,
        target_miou=target_miou,
        weights=weights,
        assignments=assignments,
    )
    resolved = options.read_config(config, changes)
    wish = Wish(
        points=sweep_points(resolved, run, seeds=seeds, sweeps=sweeps or ()),
        run_uri=run,
        data_uri=data,
        stack=stack_name(stack),
        on_demand=on_demand,
        nodes=nodes,
        gpus=gpus,
        max_hours=max_hours,
        resume_anyway=resume_anyway,
    )
    if dry_run:
        request, costs = request_only(wish)
        _print_json(request)
        print("\n".join(costs), file=sys.stderr)
        return
    _print_submitted(submit_runs(wish, _to_stderr), run, as_json)


def _print_submitted(submitted: list[SubmittedRun], place: str, as_json: bool) -> None:
    """Jobs, and the commands to follow them."""
    if as_json:
        _print_json([vars(one) for one in submitted])
        return
    for one in submitted:
        print(f"job  {one.job_id}\nrun  {one.run_uri}")
        if one.wandb_url:
            print(f"W&B  {one.wandb_url}")
    first = shlex.quote(submitted[0].run_uri)
    place = first if len(submitted) == 1 else shlex.quote(place)
    print(f"\ns4gan status {place}\ns4gan logs {first} --follow")
    print(f"s4gan cancel {place}\ns4gan pull {first} DIR")


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(help="Run or a place with several; without one, all of the stack."),
    ] = None,
    stack: options.Stack = None,
    as_json: options.AsJson = False,
) -> None:
    """Say how far a run is, or all at a place, how good, what interrupted it, what it costs."""
    from job.cloud.machines import Prices
    from job.cloud.show import print_run, print_runs
    from job.cloud.status import statuses_at

    prices = Prices()
    place = run or _all_runs(stack)
    found = statuses_at(place, prices)
    if as_json:
        _print_json([one.to_dict() for one in found])
    elif len(found) == 1:
        print_run(found[0], prices)
    else:
        print_runs(found, place, prices)


@app.command()
def diagnose(
    run: Annotated[
        str,
        typer.Argument(
            help="Run, its metrics.jsonl, or what training has printed; or s3://; - reads a pipe."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(
            help="Preset or YAML file that a log is of; a run itself says.", metavar="NAME"
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what is wrong with a training and what to try; exit code 1 if something is.

    Also of a run that is being trained.
    """
    from job.monitor.diagnose import diagnose as diagnose_run

    chosen = options.read_config(config, {}) if config is not None else None
    found = diagnose_run(run, chosen)
    if as_json:
        _print_json(found.to_dict())
    else:
        print(found.text())
    raise typer.Exit(0 if found.is_healthy else 1)


@app.command("wandb-sync")
def wandb_sync(
    run: Annotated[str, typer.Argument(help="Run folder or s3:// prefix, or its metrics.jsonl.")],
    entity: Annotated[str | None, typer.Option(help="Team or user. [as configured]")] = None,
    project: Annotated[str | None, typer.Option(help="Project. [as configured]")] = None,
    run_id: Annotated[
        str | None, typer.Option("--id", help="Of the W&B run. [the run's own]")
    ] = None,
    offline: Annotated[
        Path | None,
        typer.Option(help="Send nothing; write files for `wandb sync` into this folder."),
    ] = None,
) -> None:
    """Make one clean Weights & Biases run of a run's ledger, whatever interrupted it.

    For runs that were offline; a run that W&B has already is never added to.
    """
    from job.monitor.wandb_sync import replay

    for flag, value in (("--entity", entity), ("--project", project), ("--id", run_id)):
        if value is not None and not value.strip():
            raise ConfigError(f"{flag} is empty", mend="say a name, or leave it out")
    if offline is not None:
        _refuse_uri("--offline", offline)
    made = replay(
        run, entity=entity, project=project, run_id=run_id, offline=offline, say=_to_stderr
    )
    print(f"{made.rows} rows up to iteration {made.last_iteration} as W&B run {made.run_id}")
    upload = f"upload with: wandb sync {shlex.quote(made.where)}"
    print(made.where if offline is None else upload)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Run folder or s3:// address, or its metrics.jsonl.")],
    out: Annotated[
        str | None,
        typer.Option(
            help="File or s3:// address to write. [in the run's folder; of one in S3, here]"
        ),
    ] = None,
) -> None:
    """Make a run's report.html from its files, whether it is finished or not; with its costs."""
    from job.cloud.show import cost_sentences
    from job.monitor.ledger import open_run
    from job.monitor.report import report_html, report_of
    from job.storage.files import write_file

    store = open_run(run)
    page = report_html(report_of(store, cost_sentences(store)))
    target = out or str(store.local_path("report.html") or "report.html")
    write_file(target, page.encode(), name="--out")
    print(target)


@app.command()
def cost(
    run: Annotated[str, typer.Argument(help="Run, or a place with several.")],
    as_json: options.AsJson = False,
) -> None:
    """Add up a run's GPU hours and dollars: what was of use, what was trained again, what was idle.

    From an attempt's first sign of life to its last; the minutes in which its machine came up and
    went are not in it.
    """
    from job.cloud.machines import Prices
    from job.cloud.show import cost_of, print_cost
    from job.cloud.status import statuses_at

    prices = Prices()
    found = statuses_at(run, prices)
    if as_json:
        _print_json([cost_of(one) for one in found])
    else:
        print_cost(found, prices)


def _all_runs(stack: str | None) -> str:
    from job.cloud.aws import stack_name
    from job.cloud.stack import outputs

    return f"s3://{outputs(stack_name(stack))['Bucket']}/runs"


@app.command()
def resubmit(
    run: Annotated[str, typer.Argument(help="Run that was submitted before.")],
    on_demand: Annotated[
        bool | None,
        typer.Option("--on-demand/--spot", help="Other machines than the last job asked for."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Submit a run's last job again: same configuration, data and machines; it resumes."""
    from job.cloud.submit import resubmit as submit_again

    _print_submitted(submit_again(run, on_demand=on_demand, say=_to_stderr), run, as_json)


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(help="Run, or a place with several.")],
    reason: Annotated[str, typer.Option(help="Shown in the job's history.")] = ("by s4gan cancel"),
    as_json: options.AsJson = False,
) -> None:
    """Stop what trains a run: it saves first, and submitting or training it again goes on."""
    from job.cloud.jobs import cancel as cancel_run
    from job.cloud.jobs import runs_at

    if not reason.strip():
        raise ConfigError("--reason is empty", mend="say why, or leave it out")
    stores = runs_at(run)
    stopped, failed = [], ExitCode.OK
    for store in stores:
        try:
            what = cancel_run(store, reason)
            stopped.append({"run": store.uri, "stopped": what})
            if not as_json:
                print(f"{store.uri}: asked {what} to save and end")
        except JobError as error:
            if len(stores) == 1:
                raise
            if error.exit_code == ExitCode.BAD_CONFIG:
                print(error.message, file=sys.stderr)
            else:  # that one may go on, and cost
                print(error, file=sys.stderr)
                failed = error.exit_code
    if as_json:
        _print_json(stopped)
    if failed or not stopped:
        raise typer.Exit(failed or ExitCode.BAD_CONFIG)


@app.command()
def logs(
    run: Annotated[str, typer.Argument(help="s3:// prefix of the run.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until its last job has ended.")
    ] = False,
    last: Annotated[bool, typer.Option("--last", help="The newest attempt's only.")] = False,
) -> None:
    """Show what a run's jobs have printed, attempt by attempt."""
    from job.cloud.jobs import run_lines
    from job.storage import open_store

    for line in run_lines(open_store(run), last=last, follow=follow):
        print(line, flush=follow)


infra_app = typer.Typer(help="The AWS stack that jobs run on.", **_TYPER_STYLE)
app.add_typer(infra_app, name="infra")

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
    stack: options.Stack = None,
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
    stack: options.Stack = None,
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
    stack: options.Stack = None,
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
