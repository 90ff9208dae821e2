"""The life of one attempt at a run, top to bottom."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from job import run
from job.checkpoint.lease import Lease, acquire
from job.checkpoint.manager import BestModel, CheckpointManager
from job.config import Config, config_from_dict, config_from_yaml, differences
from job.data.checks import check_data
from job.data.dataset import DatasetInfo, scan_dataset
from job.data.images import IMAGENET_MEAN, IMAGENET_STD
from job.data.splits import SplitItems, Splits, check_same, items_of, make_splits
from job.errors import ConfigError, ExitCode, JobError, ObjectNotFound, reason
from job.events import Notice, Tracker
from job.inference import choose_device, examples
from job.models.files import ModelCard, load_generator, model_file
from job.monitor import Trackers
from job.monitor.console import ConsoleTracker
from job.monitor.ledger import Ledger, read_ledger
from job.monitor.pictures import prediction_sheet
from job.monitor.report import report_html
from job.monitor.summary import Check, checklist, summary, summary_json
from job.monitor.wandb_tracker import WandbTracker
from job.preemption import StopRequest
from job.run import RunIdentity
from job.storage import LocalStore, ObjectStore, open_store
from job.storage.sync import bring_data
from job.training.loop import BestModelWriter, Surroundings
from job.training.loop import train as run_loop
from job.training.state import TrainState, new_train_state

log = logging.getLogger(__name__)

SHEET_IMAGES = 6
"""Validation images on `predictions.png`."""


def train(config: Config, *, data_uri: str, run_uri: str, console: Console) -> ExitCode:
    """One attempt: take the run over, go on from its newest checkpoint, train, leave its files.

    Returns:
        OK when the run is finished, PREEMPTED when it was asked to stop and is saved.

    Raises:
        JobError: with the exit code of what went wrong; the run's checkpoints stay good.
    """
    # 1. Resolve the run.
    store = open_store(run_uri)
    _refuse_same_place(data_uri, run_uri)
    _refuse_other_config(_config_of_run(store), config, store)
    device = choose_device()
    # 2. Take the lease.
    with (
        StopRequest().on_signals() as stop,
        _leased(store, stop) as lease,
        _scratch(store) as scratch,
    ):
        # 3. Bring the data, look at it, split it as the run began.
        data = _prepare_data(store, config, data_uri, stop, console)
        identity = _open_run(store, config, data)
        # 4. Restore the newest checkpoint that verifies, or begin.
        checkpoints = CheckpointManager(store, lease, scratch)
        attempt = _Attempt(config, store, scratch, lease, identity, data, device, console)
        state = _restore_or_begin(attempt, checkpoints)
        stop.raise_if_requested()
        # 5. Start the trackers.
        with _tracking(attempt, state, stop) as tracking:
            # 6. Train.
            complete = run_loop(
                state,
                Surroundings(
                    config=config,
                    items=data.items,
                    info=data.info,
                    device=device,
                    tracker=tracking.trackers,
                    checkpoints=checkpoints,
                    save_best=_best_writer(attempt, checkpoints),
                    stop=stop,
                ),
            )
        if not complete:
            # 7. Asked to stop; the loop has saved.
            console.print(
                f"Stopped by {stop.reason}; saved after iteration {state.iteration} of "
                f"{config.train.iterations}. Run the same command again to go on from there."
            )
            return ExitCode.PREEMPTED
        # 8. Done: final weights, pictures, checklist, report. Doing this twice is harmless.
        _finish(attempt, checkpoints, state, tracking)
        return ExitCode.OK


@dataclass(frozen=True)
class _Data:
    """A data set that has been looked at."""

    uri: str
    info: DatasetInfo
    splits: Splits
    items: SplitItems


@dataclass(frozen=True)
class _Attempt:
    """What the stages of one attempt share."""

    config: Config
    store: ObjectStore
    scratch: Path
    lease: Lease
    identity: RunIdentity
    data: _Data
    device: torch.device
    console: Console

    @property
    def live_folder(self) -> Path:
        """Where files grow while training: the run itself if it is a folder."""
        return self.store.local_path("") or self.scratch

    @property
    def card(self) -> ModelCard:
        """Travels with every model file."""
        info = self.data.info
        return ModelCard(
            backbone=self.config.model.backbone,
            classes=info.classes,
            ignore_index=info.ignore_index,
            palette=info.palette,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            image_scale=self.config.data.image_scale,
        )


@dataclass(frozen=True)
class _Tracking:
    """The trackers of an attempt."""

    trackers: Tracker
    wandb: WandbTracker
    ledger_path: Path


# ---------------------------------------------------------------- 1 and 2: the run and its lease


def _refuse_same_place(data_uri: str, run_uri: str) -> None:
    data, store = open_store(data_uri).local_path(""), open_store(run_uri).local_path("")
    if data is not None and store is not None and data.resolve() == store.resolve():
        raise ConfigError(
            f"--data and --run are both {run_uri}", mend="choose another folder for --run"
        )


def _config_of_run(store: ObjectStore) -> Config | None:
    """The configuration a run has begun with; None if it has no checkpoint, so nothing to lose."""
    if store.stat(run.LATEST_POINTER) is None:
        return None
    try:
        text = store.read(run.CONFIG).decode()
    except ObjectNotFound:
        return None
    return config_from_yaml(text, source=f"{store.uri}/{run.CONFIG}")


def _refuse_other_config(before: Config | None, now: Config, store: ObjectStore) -> None:
    changed = differences(before, now) if before is not None else {}
    if changed:
        fields = "\n  ".join(
            f"{key}: {old!r} in the run, {new!r} now" for key, (old, new) in changed.items()
        )
        raise ConfigError(
            f"{store.uri}: this run began with another configuration\n  {fields}",
            mend=f"choose another --run, or go on with --config {store.uri}/{run.CONFIG}",
        )


@contextlib.contextmanager
def _leased(store: ObjectStore, stop: StopRequest) -> Iterator[Lease]:
    lease = acquire(
        store,
        on_lost=lambda: stop.request("a newer attempt"),
        stopped=lambda: stop.requested,
    )
    try:
        yield lease
    finally:
        lease.release()


@contextlib.contextmanager
def _scratch(store: ObjectStore) -> Iterator[Path]:
    """A local folder for files on their way; on the run's own disk, so that moving is free."""
    if isinstance(store, LocalStore):
        store.remove_leftovers()
        folder = store.root / ".work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    else:
        folder = Path(tempfile.mkdtemp(prefix="s4gan-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------- 3: the data


def _prepare_data(
    store: ObjectStore, config: Config, data_uri: str, stop: StopRequest, console: Console
) -> _Data:
    dataset = scan_dataset(bring_data(data_uri))
    splits = make_splits(dataset, config)
    if store.stat(run.LATEST_POINTER) is not None:
        check_same(Splits.from_json(store.read(run.SPLITS)), splits)
    items = items_of(dataset, splits)
    console.print(
        f"data: {len(splits.labeled)} labeled, {len(splits.unlabeled)} unlabeled, "
        f"{len(splits.val)} validation images, {dataset.info.num_classes} classes; checking them"
    )
    warnings = check_data(items, dataset.info, stopped=lambda: stop.requested)
    for warning in [*dataset.warnings, *warnings]:
        console.print(f"warning: {warning}")
    return _Data(data_uri, dataset.info, splits, items)


def _open_run(store: ObjectStore, config: Config, data: _Data) -> RunIdentity:
    """Write what says which run this is; the identity is made once and stays."""
    store.write(run.CONFIG, config.to_yaml().encode())
    store.write(run.SPLITS, data.splits.to_json())
    try:
        return RunIdentity.from_json(store.read(run.IDENTITY))
    except ObjectNotFound:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        identity = RunIdentity.create(now)
        store.write(run.IDENTITY, identity.to_json())
        return identity


# ------------------------------------------------------------------------- 4: the state


def _restore_or_begin(attempt: _Attempt, checkpoints: CheckpointManager) -> TrainState:
    console, config = attempt.console, attempt.config
    saved = checkpoints.restore()
    if saved is not None:
        raw = saved["run"]["config"]
        _refuse_other_config(config_from_dict(raw, source="the checkpoint"), config, attempt.store)
    state, note = new_train_state(
        config, attempt.data.info.num_classes, attempt.device, pretrained=saved is None
    )
    state.run_facts = {"config": config.to_dict(), **asdict(attempt.identity)}
    console.print(f"device: {_device_name(attempt.device)}")
    if saved is None:
        console.print(f"backbone: {note}")
        return state
    state.load_state_dict(saved)
    if state.best is not None:
        try:
            checkpoints.point_best(state.best)
        except ObjectNotFound as error:
            log.warning("the best model so far is gone (%s); looking for a new one", error.message)
            state.best = None
    console.print(
        f"attempt {attempt.lease.attempt}: resuming after iteration {state.iteration} of "
        f"{config.train.iterations}"
    )
    return state


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return "cpu (no GPU found)"


# ------------------------------------------------------------------------- 5 and 6: training


@contextlib.contextmanager
def _tracking(attempt: _Attempt, state: TrainState, stop: StopRequest) -> Iterator[_Tracking]:
    """Console, ledger and W&B, told of the attempt's start and of how it ended."""
    ledger_path = attempt.live_folder / run.LEDGER
    ledger = Ledger(
        ledger_path,
        attempt=attempt.lease.attempt,
        iteration=state.iteration,
        evaluated_iteration=state.evaluated_iteration,
    )
    total = attempt.config.train.iterations
    progress = ConsoleTracker(attempt.console, total, state.iteration)
    wandb = WandbTracker(
        attempt.config, attempt.identity, attempt.live_folder, attempt.console.print
    )
    trackers = Trackers([ledger, progress, wandb])
    trackers.notice(Notice("attempt_started", "", {"resumed_at": state.iteration}))
    code, ended = ExitCode.OK, "finished"
    try:
        with progress:
            yield _Tracking(trackers, wandb, ledger_path)
        if state.evaluated_iteration < total:
            code, ended = ExitCode.PREEMPTED, stop.reason or "stopped"
    except torch.OutOfMemoryError:
        code, ended = ExitCode.BAD_CONFIG, "out of memory"
        raise _out_of_memory(attempt.config) from None
    except JobError as error:
        code, ended = error.exit_code, error.message
        raise
    except BaseException as error:
        code, ended = ExitCode.SOFTWARE, reason(error)
        raise
    finally:
        fields: dict[str, Any] = {"reason": ended, "exit_code": int(code)}
        if code in (ExitCode.OK, ExitCode.PREEMPTED):
            # Otherwise the loop raised, and what was saved last stands in an older line.
            fields["saved_at"] = state.iteration
        try:
            ledger.notice(Notice("attempt_ended", "", fields))
        finally:
            ledger.close()
            wandb.close(exit_code=int(code), preempted=code is ExitCode.PREEMPTED)


def _out_of_memory(config: Config) -> ConfigError:
    train = config.train
    return ConfigError(
        f"CUDA out of memory with batches of {train.batch_size}",
        mend="start a new run with the same images an iteration in smaller batches: "
        f"--batch-size {max(1, train.batch_size // 2)} "
        f"--set train.accumulate={train.accumulate * 2}",
    )


def _best_writer(attempt: _Attempt, checkpoints: CheckpointManager) -> BestModelWriter:
    def save_best(state: TrainState, val_miou: float) -> BestModel:
        return checkpoints.save_best(
            {
                run.BEST_MODEL: _model_file(attempt, state, "generator", val_miou=val_miou),
                run.BEST_MODEL_D: _model_file(attempt, state, "discriminator", val_miou=val_miou),
            },
            iteration=state.iteration,
            val_miou=val_miou,
        )

    return save_best


def _model_file(attempt: _Attempt, state: TrainState, kind: str, **facts: Any) -> dict[str, Any]:
    return model_file(
        state.generator if kind == "generator" else state.discriminator,
        attempt.card,
        kind=kind,
        iteration=state.iteration,
        run_id=attempt.identity.run_id,
        **facts,
    )


# ------------------------------------------------------------------------- 8: the end


def _finish(
    attempt: _Attempt, checkpoints: CheckpointManager, state: TrainState, tracking: _Tracking
) -> None:
    store, data = attempt.store, attempt.data
    assert state.best is not None  # a complete run has evaluated at least once
    final = checkpoints.save_file(_model_file(attempt, state, "generator"), run.FINAL_MODEL)
    best_path = checkpoints.verify_best(state.best)
    store.write(run.PREDICTIONS, _prediction_sheet(attempt, best_path))

    events = read_ledger(tracking.ledger_path)
    checks = checklist(
        events=events,
        best_path=f"{store.uri}/{run.BEST_MODEL}",
        best_verified=True,
        wandb_finished=tracking.wandb.finished_online,
        wandb_outcome=tracking.wandb.outcome,
    )
    content = summary(
        run_uri=store.uri,
        data_uri=data.uri,
        identity=attempt.identity,
        config=attempt.config.to_dict(),
        classes=data.info.classes,
        num_images={
            "labeled": len(data.splits.labeled),
            "unlabeled": len(data.splits.unlabeled),
            "validation": len(data.splits.val),
        },
        files={name: asdict(record) for name, record in state.best.files.items()}
        | {run.FINAL_MODEL: asdict(final)},
        events=events,
        checks=checks,
    )
    store.write(run.SUMMARY, summary_json(content))
    page = report_html(
        content,
        events,
        config_yaml=attempt.config.to_yaml(),
        predictions_png=store.read(run.PREDICTIONS),
    )
    store.write(run.REPORT, page.encode())
    _print_end(attempt, state, checks)


def _prediction_sheet(attempt: _Attempt, best_path: Path) -> bytes:
    """A few validation images, spread over the set, as the best model sees them."""
    generator, card, _ = load_generator(best_path, attempt.device)
    val = attempt.data.items.val
    step = max(1, len(val) // SHEET_IMAGES)
    shown = examples(
        generator,
        val[::step][:SHEET_IMAGES],
        attempt.data.info,
        image_scale=card.image_scale,
        device=attempt.device,
    )
    sheet = io.BytesIO()
    prediction_sheet(shown, card.palette, card.classes).save(sheet, format="PNG")
    return sheet.getvalue()


def _print_end(attempt: _Attempt, state: TrainState, checks: list[Check]) -> None:
    uri, best = attempt.store.uri, state.best
    assert best is not None
    # As it was called, so that the lines below can be pasted: it may not be on the PATH.
    weights = shlex.quote(f"{uri}/{run.BEST_MODEL}")
    s4gan = sys.argv[0] if Path(sys.argv[0]).name == "s4gan" else "s4gan"
    lines = [
        "",
        f"Finished after {state.iteration} iterations; best validation mIoU {best.val_miou:.4f} "
        f"at iteration {best.iteration}.",
        "",
        *(
            f"  [{'x' if check.passed else ' '}] {check.name}"
            + (f": {check.detail}" if check.detail else "")
            for check in checks
        ),
        "",
        f"Model:     {uri}/{run.BEST_MODEL}",
        f"Pictures:  {uri}/{run.PREDICTIONS}",
        f"Report:    {uri}/{run.REPORT}",
        "",
        "Go on with:",
        f"  {s4gan} evaluate --weights {weights} --data {shlex.quote(attempt.data.uri)}",
        f"  {s4gan} predict --weights {weights} --images FOLDER --out FOLDER",
    ]
    attempt.console.print("\n".join(lines))
