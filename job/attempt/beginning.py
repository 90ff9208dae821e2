"""What comes before the training: the lease, the data, the state to go on from."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from job import run
from job.attempt.attempt import Attempt, Data
from job.checkpoint.lease import Lease, acquire
from job.checkpoint.manager import CheckpointManager
from job.checkpoint.resumable import has_checkpoints, refuse_other_config
from job.config import Config, DataConfig, config_from_dict
from job.data.checks import check_data
from job.data.dataset import FOLDER
from job.data.report import named_as
from job.data.scan import scan_dataset
from job.data.splits import Splits, check_same, items_of, make_splits, split_warnings
from job.errors import ConfigError, ObjectNotFound, Preempted, StorageError
from job.events import Notice
from job.monitor.ledger import read_ledger
from job.monitor.start import StartClock
from job.monitor.stopping import StopRules
from job.preemption import StopRequest
from job.run import RunIdentity
from job.storage import LocalStore, ObjectStore
from job.storage.progress import ConsoleProgress
from job.storage.sync import data_folder, scratch_root
from job.training.precision import is_emulated, number_format
from job.training.state import TrainState, new_train_state

log = logging.getLogger(__name__)


@contextlib.contextmanager
def leased(store: ObjectStore, stop: StopRequest) -> Iterator[Lease]:
    """The run, for as long as no newer attempt takes it over, which asks this one to stop.

    Raises:
        Preempted: asked to stop while waiting for it.
        JobError: another attempt has it; as `acquire`.
    """
    lease = acquire(
        store,
        on_lost=lambda: stop.request("a newer attempt"),
        stopped=lambda: stop.requested,
    )
    try:
        yield lease
    except Preempted:
        lease.raise_if_lost()  # if so, it was asked to stop for that
        raise
    finally:
        lease.release()


@contextlib.contextmanager
def scratch_of(store: ObjectStore, lease: Lease) -> Iterator[Path]:
    """A local folder for files on their way; on the run's own disk, so that moving is free."""
    if isinstance(store, LocalStore):
        store.remove_leftovers()
        folder = store.root / ".work"
        shutil.rmtree(folder, ignore_errors=True)
    else:
        run_hash = hashlib.sha256(store.uri.encode()).hexdigest()[:12]
        folder = scratch_root() / "work" / f"{run_hash}-a{lease.attempt:04d}"
        for left in folder.parent.glob(f"{run_hash}-a*"):
            # Of killed attempts; the last one may still be alive, without knowing it is replaced.
            if left.name < f"{run_hash}-a{lease.attempt - 1:04d}":
                shutil.rmtree(left, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.from_os("write", folder, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def brought(
    data_uri: str, stop: StopRequest, console: Console, clock: StartClock
) -> Iterator[Path]:
    """The data in a local folder; what came before on the clock was to take the run over."""
    clock.done("run")
    with data_folder(
        data_uri, progress=ConsoleProgress(console), stopped=lambda: stop.requested
    ) as folder:
        clock.done("data")
        yield folder


def prepare_data(
    store: ObjectStore,
    config: Config,
    data_uri: str,
    folder: Path,
    stop: StopRequest,
    console: Console,
    resume_anyway: bool,
) -> Data:
    """Look at a data set, split it as the run began, and warn of what is wrong with it.

    Args:
        store: of the run.
        config: of the run.
        data_uri: where the data are from, for messages.
        folder: where they are.
        stop: asked while the images are looked at.
        console: where to print.
        resume_anyway: whether the images may differ from those the run began with.

    Raises:
        DataError, ConfigError: with what is to be mended.
        Preempted: asked to stop.
    """
    dataset = scan_dataset(folder, config.data)
    splits = make_splits(dataset, config)
    before = _splits_of_run(store)
    if before is not None and not resume_anyway:
        check_same(before, splits)
    items = items_of(dataset, splits)
    of_layout = "" if dataset.layout == FOLDER else f" of {dataset.layout}"
    console.print(
        f"data: {len(splits.labeled)} labeled, {len(splits.unlabeled)} unlabeled, "
        f"{len(splits.val)} validation images, {dataset.info.num_classes} classes{of_layout}; "
        "checking them"
    )
    warnings = check_data(items, dataset.info, stopped=lambda: stop.requested)
    unused = config.without_effect()
    if dataset.val and config.data.val_split != DataConfig().val_split:
        unused.append("data.val_split is not used: the data have validation images of their own")
    few = split_warnings(dataset, splits)
    for warning in [*unused, *dataset.warnings, *few, *warnings]:
        console.print(f"warning: {named_as(warning, folder, data_uri)}")
    return Data(data_uri, dataset.info, splits, items)


def _splits_of_run(store: ObjectStore) -> Splits | None:
    """How the run began; None if it has nothing to lose, or nothing that says so."""
    if not has_checkpoints(store):
        return None
    try:
        return Splits.from_json(store.read(run.SPLITS))
    except ObjectNotFound:
        return None
    except (ValueError, TypeError, AttributeError):
        raise StorageError(
            f"{store.uri}/{run.SPLITS}: cannot be read",
            mend="delete it, if the images are those the run began with",
        ) from None


def identity_of(store: ObjectStore) -> RunIdentity:
    """Which run this is; made once and kept."""
    try:
        return RunIdentity.from_json(store.read(run.IDENTITY))
    except ObjectNotFound:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        identity = RunIdentity.create(now)
        store.write(run.IDENTITY, identity.to_json())
        return identity
    except (ValueError, TypeError):
        raise StorageError(
            f"{store.uri}/{run.IDENTITY}: cannot be read",
            mend="delete it: the run goes on, as a new run in W&B",
        ) from None


def restore_or_begin(
    attempt: Attempt, manager: CheckpointManager, changed: list[str], resume_anyway: bool
) -> TrainState:
    """The newest checkpoint that verifies, with the ledger wound back to it; else a new state.

    Args:
        attempt: that begins.
        manager: of its checkpoints.
        changed: what differs from the configuration the run began with, for the ledger.
        resume_anyway: whether it may.

    Raises:
        ConfigError: the checkpoint is of another configuration.
        StorageError: the run's checkpoints are gone.
    """
    console, config, record = attempt.console, attempt.config, attempt.record
    saved = manager.restore()
    if saved is None:
        _refuse_lost_checkpoints(attempt)
    else:
        raw = saved["run"]["config"]
        before = config_from_dict(raw, source="the checkpoint")
        changed = (
            refuse_other_config(before, config, attempt.store, resume_anyway, of_checkpoint=True)
            or changed
        )
    state, note = new_train_state(
        config,
        attempt.data.info.num_classes,
        attempt.device,
        pretrained=saved is None,
        classes=attempt.data.info.classes,
        mirror=attempt.store,
    )
    state.run_facts = {
        "config": config.to_dict(),
        "card": asdict(attempt.card),  # with it a checkpoint can be evaluated as it is
        **asdict(attempt.identity),
    }
    console.print(f"device: {_device_name(attempt.device, attempt.gpus)}{_in_half(attempt)}")
    if saved is None:
        console.print(f"generator: {note}")
    else:
        try:
            state.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:  # only after --resume-anyway
            raise ConfigError(
                f"{attempt.store.uri}: its checkpoint does not fit the networks of this "
                f"configuration: {' '.join(str(error).split())[:300]}",
                mend="put model.* and the number of classes back, or choose another --run",
            ) from None
        if state.iteration > config.train.iterations:
            raise ConfigError(
                f"{attempt.store.uri}: the run is at iteration {state.iteration} already, "
                f"train.iterations is {config.train.iterations}",
                mend=f"give at least {state.iteration}, or choose another --run",
            )
    record.rolled_back = record.ledger.rewind(
        iteration=state.iteration, evaluated_iteration=state.evaluated_iteration
    )
    record.resumed_at = state.iteration
    record.tell(Notice("training_started", "", {"resumed_at": state.iteration}))
    if changed:
        text = "\n  ".join(changed)
        record.tell(
            Notice(
                "configuration_changed",
                f"warning: going on with another configuration, as asked:\n  {text}",
                {"changes": changed},
            )
        )
    if saved is None:
        return state
    if state.best is not None:
        try:
            manager.point_best(state.best)
        except ObjectNotFound as error:
            log.warning("the best model so far is gone (%s); looking for a new one", error.message)
            state.best = None
    console.print(
        f"attempt {attempt.lease.attempt}: resuming after iteration {state.iteration} of "
        f"{config.train.iterations}"
    )
    return state


def _refuse_lost_checkpoints(attempt: Attempt) -> None:
    """Raises StorageError if the run has had a checkpoint: to begin anew would overwrite the rest.

    There may be states without a manifest (their save was interrupted), but no more than that.
    """
    saved = [
        event["saved_at"]
        for event in read_ledger(attempt.record.ledger.path)
        if event["event"] == "checkpoint" and "saved_at" in event
    ]
    if not saved and attempt.store.stat(run.LATEST_CHECKPOINT) is None:
        return
    upto = f"iteration {saved[-1]} was saved" if saved else f"there is {run.LATEST_CHECKPOINT}"
    raise StorageError(
        f"{attempt.store.uri}: the checkpoints of this run are gone ({upto})",
        mend=f"bring {attempt.store.uri}/{run.CHECKPOINTS} back (older versions of the objects, if "
        "the bucket keeps them), or choose another --run",
    )


def _device_name(device: torch.device, count: int) -> str:
    if device.type == "cuda":
        name = str(torch.cuda.get_device_name(device))
        return f"{count} x {name}" if count > 1 else name
    return f"cpu (no GPU found), {count} processes" if count > 1 else "cpu (no GPU found)"


def _in_half(attempt: Attempt) -> str:
    number = number_format(attempt.config.train, attempt.device)
    if number == torch.float32:
        return ""
    slow = is_emulated(number, attempt.device)
    name = str(number).partition(".")[2]
    return f", convolutions in {name}{', which it is slower in than in float32' * slow}"


def ended_before(state: TrainState, config: Config, stop_rules: StopRules) -> bool:
    """Whether an attempt before has come to the end of the training."""
    is_last = state.iteration == config.train.iterations
    stopped = state.iteration == state.evaluated_iteration > 0 and stop_rules.reason != ""
    return is_last or stopped
