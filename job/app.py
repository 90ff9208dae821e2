"""The life of one attempt at a run, top to bottom."""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import io
import logging
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from job import run
from job.checkpoint.interval import SaveSchedule
from job.checkpoint.lease import Lease, acquire
from job.checkpoint.manager import BestModel, CheckpointManager
from job.checkpoint.publisher import Publisher
from job.checkpoint.resumable import (
    config_of_run,
    has_checkpoints,
    refuse_nested,
    refuse_other_config,
    refuse_same_place,
)
from job.config import Config, DataConfig, config_from_dict
from job.data.checks import check_data
from job.data.dataset import FOLDER, DatasetInfo
from job.data.decoded import decoded_folder, kept_within
from job.data.images import read_labels, read_rgb
from job.data.report import named_as
from job.data.scan import scan_dataset
from job.data.splits import SplitItems, Splits, check_same, items_of, make_splits
from job.errors import (
    ConfigError,
    Diverged,
    ExitCode,
    JobError,
    NoProgress,
    ObjectNotFound,
    OutOfMemory,
    Preempted,
    StorageError,
    TrainingFailure,
    reason,
)
from job.events import EvalEvent, Notice, Tracker
from job.inference import choose_device, examples
from job.models.files import ModelCard, load_generator, model_file
from job.models.generator import Architecture, Generator
from job.monitor import Trackers
from job.monitor.attempts import crash_loop, fingerprint, interruption_history
from job.monitor.console import ConsoleTracker
from job.monitor.divergence import BATCH_HALVED, MAX_ROLLBACKS, ROLLED_BACK, Guard, Remedies
from job.monitor.health import OUT_OF_MEMORY, Watch
from job.monitor.health_tracker import HealthTracker
from job.monitor.ledger import Ledger, LedgerMirror, read_ledger
from job.monitor.live_report import LiveReport
from job.monitor.notify import Notifier
from job.monitor.pictures import Example, prediction_sheet
from job.monitor.report import (
    BestEvaluation,
    Report,
    best_evaluation_json,
    facts_of,
    open_checklist,
    report_html,
    shown_of,
)
from job.monitor.setting import Setting
from job.monitor.stall import stall_minutes, watch_stall
from job.monitor.start import StartClock, StartTracker
from job.monitor.stopping import StopRules
from job.monitor.summary import Check, checklist, provenance, summary, summary_json
from job.monitor.verdict import Verdict, verdict
from job.monitor.wandb_run import ModelFile, RunFacts
from job.monitor.wandb_tracker import WandbTracker
from job.nodes import Node
from job.parallel import check_ranks, crew, follow
from job.preemption import StopRequest, watch_spot
from job.run import RunIdentity
from job.storage import LocalStore, ObjectStore, open_store
from job.storage.progress import ConsoleProgress
from job.storage.sync import data_folder, scratch_root
from job.training.evaluation import Evaluation, Predicted, evaluate
from job.training.loop import EXAMPLES, BestModelWriter, Show, Surroundings
from job.training.loop import train as run_loop
from job.training.saving import Saving
from job.training.state import TrainState, new_train_state

log = logging.getLogger(__name__)

WANDB_IMAGES = 6
"""Validation images in W&B: the same each time, so that one sees them change."""


def train(
    config: Config,
    *,
    data_uri: str,
    run_uri: str,
    console: Console,
    gpus: int = 1,
    resume_anyway: bool = False,
) -> ExitCode:
    """Train a run: one attempt, and another one as often as something was done about a failure.

    Args and errors: as `attempt_at`.
    """
    clock = StartClock.of_process()
    while True:
        try:
            return attempt_at(
                config,
                data_uri=data_uri,
                run_uri=run_uri,
                console=console,
                gpus=gpus,
                resume_anyway=resume_anyway,
                clock=clock,
            )
        except TrainingFailure as failure:
            if not failure.goes_on:
                raise
            if not Node.here().alone:  # all machines have to begin anew
                raise Preempted(f"{failure.message}; the next attempt goes on") from None
        # By now nothing holds the networks any more; without this they would still be there.
        gc.collect()
        torch.cuda.empty_cache()
        clock = StartClock()


def attempt_at(
    config: Config,
    *,
    data_uri: str,
    run_uri: str,
    console: Console,
    gpus: int = 1,
    resume_anyway: bool = False,
    clock: StartClock | None = None,
) -> ExitCode:
    """One attempt: take the run over, go on from its newest checkpoint, train, leave its files.

    Args:
        config: what to train.
        data_uri: folder or s3:// prefix of the data set.
        run_uri: folder or s3:// prefix of the run; the same one resumes.
        console: where to print.
        gpus: how many GPUs of this machine train together; without any, so many processes.
        resume_anyway: go on with another configuration or other images than the run began with.
        clock: of its start; by default that is now.

    Returns:
        OK: the run is finished.

    Raises:
        Preempted: it was asked to stop, and is saved.
        JobError: with the exit code of what went wrong; the run's checkpoints stay good.
    """
    # 1. Resolve the run.
    clock = clock or StartClock()
    clock.done("imports")
    patience_minutes = stall_minutes()
    notifier = Notifier.from_environment(run_uri)
    store = open_store(run_uri)
    refuse_same_place(open_store(data_uri), store)
    refuse_nested(store)
    changed = refuse_other_config(config_of_run(store), config, store, resume_anyway)
    device = choose_device()
    node = Node.here()
    check_ranks(config, gpus, node, device)
    if not node.is_main:
        return _follow(gpus, node, data_uri, console)
    # 2. Take the lease, open the ledger, listen for the end.
    with (
        StopRequest().on_signals() as stop,
        _leased(store, stop) as lease,
        _scratch(store, lease) as scratch,
        _recorded(store, lease, scratch, console, config, gpus, node) as record,
        watch_spot(stop, record.tell),
        watch_stall(patience_minutes, record.ledger.path, record.tell, record.mirror.publish),
        crew(gpus, node, device, record.tell) as others,
        # 3. Bring the data, look at it, split it as the run began.
        _brought(data_uri, stop, console, clock) as folder,
    ):
        data = _prepare_data(store, config, data_uri, folder, stop, console, resume_anyway)
        clock.done("checks")
        identity = _identity(store)
        # 4. Restore the newest checkpoint that verifies, or begin.
        manager = CheckpointManager(store, lease, scratch)
        attempt = _Attempt(
            config, store, scratch, lease, identity, data, device, gpus, console, record
        )
        state = _restore_or_begin(attempt, manager, changed, resume_anyway)
        before = read_ledger(record.ledger.path)
        trained_with = Remedies.of(before).applied(config)
        stop_rules = StopRules(config, before)
        guard = Guard(trained_with, before)
        ended = _ended_before(state, config, stop_rules)
        if not ended and store.stat(run.SUMMARY):
            # Of a run that is not finished any more.
            lease.raise_if_lost()
            store.delete(run.SUMMARY)
        # Only now: what cannot be gone on with must not be written over what can.
        store.write(run.CONFIG, config.to_yaml().encode())
        store.write(run.SPLITS, data.splits.to_json())
        stop.raise_if_requested()
        clock.done("networks")
        ranks = others.meet(trained_with, data.splits, folder, state, stop)
        # 5. Start the trackers and the publisher.
        with (
            _remedying(attempt, manager, guard),
            _tracking(attempt, state, stop, notifier, clock) as tracking,
        ):
            decoded = decoded_folder(folder)
            with (
                _publishing(attempt, manager, stop) as publisher,
                _showing(attempt, stop) as show,
                kept_within(decoded),
            ):
                # 6. Train.
                complete = run_loop(
                    state,
                    Surroundings(
                        config=trained_with,
                        items=data.items,
                        info=data.info,
                        device=device,
                        tracker=tracking.trackers,
                        saving=Saving(
                            config,
                            publisher,
                            _save_schedule(attempt),
                            stop,
                            tracking.trackers,
                            state.iteration,
                        ),
                        save_best=_best_writer(attempt, publisher, tracking.wandb),
                        stop=stop,
                        ranks=ranks,
                        stop_rule=stop_rules,
                        guard=guard,
                        show=show,
                        decoded=decoded,
                    ),
                )
            if not complete:
                # 7. Asked to stop; the loop has saved, if there was time.
                saved = record.resumed_at if record.saved_at is None else record.saved_at
                raise Preempted(
                    f"Stopped by {stop.reason}; saved after iteration {saved} of "
                    f"{config.train.iterations}. Run the same command again to go on from there."
                )
            if state.iteration < config.train.iterations and not ended:
                told = {"iteration": state.iteration, "reason": stop_rules.reason}
                record.tell(Notice("stopped_early", f"Stopped: {stop_rules.reason}", told))
            # 8. Done: pictures, final weights, checklist, report. Doing this twice is harmless.
            shown = _show_best(attempt, manager, state, tracking.wandb)
        _finish(attempt, manager, state, tracking, stop_rules.reason, shown)
        return ExitCode.OK


@dataclass(frozen=True)
class _Data:
    """A data set that has been looked at."""

    uri: str
    info: DatasetInfo
    splits: Splits
    items: SplitItems


class _Record:
    """The attempt's own line in the run's history, and how others add to it."""

    def __init__(self, ledger: Ledger, mirror: LedgerMirror, console: Console) -> None:
        self.ledger = ledger
        self.mirror = mirror
        self.resumed_at = 0
        self.rolled_back: list[dict[str, Any]] = []
        """Lines of iterations that will be trained again."""
        self.saved_at: int | None = None
        """Iteration of the newest checkpoint of this attempt."""
        self._console = console

    def tell(self, notice: Notice) -> None:
        """A notice for console and ledger; callable from any thread, never raises."""
        if notice.message:
            self._console.print(notice.message)
        if notice.kind == "checkpoint":
            self.saved_at = notice.fields["saved_at"]
        try:
            self.ledger.notice(notice)
        except StorageError as error:
            log.warning("%s", error.message)


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
    gpus: int
    console: Console
    record: _Record

    @property
    def live_folder(self) -> Path:
        """Where files grow while training: the run itself if it is a folder."""
        return self.store.local_path("") or self.scratch

    @property
    def num_images(self) -> dict[str, int]:
        """By what they are for."""
        splits = self.data.splits
        return {
            "labeled": len(splits.labeled),
            "unlabeled": len(splits.unlabeled),
            "validation": len(splits.val),
        }

    @property
    def card(self) -> ModelCard:
        """Travels with every model file."""
        info = self.data.info
        return ModelCard(
            architecture=Architecture.of(self.config.model, info.num_classes),
            classes=info.classes,
            ignore_index=info.ignore_index,
            palette=info.palette,
            image_scale=self.config.data.image_scale,
        )


@dataclass(frozen=True)
class _Tracking:
    """The trackers of an attempt."""

    trackers: Tracker
    wandb: WandbTracker


# ---------------------------------------------------------------- on another machine


def _follow(gpus: int, node: Node, data_uri: str, console: Console) -> ExitCode:
    """Bring the data and train along; the run itself is the main node's, which also stops us."""
    console.print(f"machine {node.position + 1} of {node.count}; the first one reports")
    with (
        StopRequest().on_signals() as stop,
        data_folder(
            data_uri, progress=ConsoleProgress(console), stopped=lambda: stop.requested
        ) as folder,
        kept_within(decoded_folder(folder)),
    ):
        follow(gpus, node, folder)
    return ExitCode.OK


# ---------------------------------------------------------------- 1 and 2: the run and its lease


@contextlib.contextmanager
def _leased(store: ObjectStore, stop: StopRequest) -> Iterator[Lease]:
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
def _scratch(store: ObjectStore, lease: Lease) -> Iterator[Path]:
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
def _recorded(
    store: ObjectStore,
    lease: Lease,
    scratch: Path,
    console: Console,
    config: Config,
    gpus: int,
    node: Node,
) -> Iterator[_Record]:
    """The ledger, told of the attempt's start and of how it ended.

    Raises:
        NoProgress: the attempt failed as several before it, none of which saved anything.
    """
    path = store.local_path(run.LEDGER) or scratch / run.LEDGER
    mirror = LedgerMirror(store, lease, path)
    ledger = Ledger(path, attempt=lease.attempt, shown=f"{store.uri}/{run.LEDGER}")
    record = _Record(ledger, mirror, console)
    before = lease.predecessor
    fields: dict[str, Any] = {"gpus": gpus * node.count, "nodes": node.count}
    if before is not None:
        fields |= {"predecessor": before.attempt, "predecessor_last_seen": before.last_seen}
    if lease.holder.job:
        fields |= {"job": lease.holder.job, "job_attempt": lease.holder.job_attempt}
    record.tell(Notice("attempt_started", "", fields))
    failure: BaseException | None = None
    try:
        yield record
    except torch.OutOfMemoryError:  # before the training; `_remedying` sees the others
        failure = _out_of_memory(config)
        raise failure from None
    except BaseException as error:
        failure = error
        raise
    finally:
        code, why = _how_it_ended(failure)
        ending: dict[str, Any] = {"reason": why, "exit_code": int(code)}
        if record.saved_at is not None:
            ending["saved_at"] = record.saved_at
        if failure is not None:
            ending["reached"] = ledger.reached
            ending["fingerprint"] = fingerprint(failure)
        record.tell(Notice("attempt_ended", "", ending))
        ledger.close()
        mirror.close()
        story = crash_loop(read_ledger(path)) if failure is not None else None
        if story is not None:
            if not isinstance(failure, JobError):
                traceback.print_exception(failure)
            raise NoProgress(
                f"{store.uri}: several attempts in a row failed alike, without a new checkpoint\n  "
                + story,
                mend="running it again will not help: mend the cause above first",
            ) from failure


def _how_it_ended(failure: BaseException | None) -> tuple[ExitCode, str]:
    """Exit code and reason of an attempt, by the exception that ended it."""
    if failure is None:
        return ExitCode.OK, "finished"
    if isinstance(failure, JobError):
        return failure.exit_code, failure.message
    if isinstance(failure, torch.OutOfMemoryError):
        return ExitCode.BAD_CONFIG, OUT_OF_MEMORY
    return ExitCode.SOFTWARE, reason(failure)


# ------------------------------------------------------------------------- 3: the data


@contextlib.contextmanager
def _brought(
    data_uri: str, stop: StopRequest, console: Console, clock: StartClock
) -> Iterator[Path]:
    """The data in a local folder; what came before on the clock was to take the run over."""
    clock.done("run")
    with data_folder(
        data_uri, progress=ConsoleProgress(console), stopped=lambda: stop.requested
    ) as folder:
        clock.done("data")
        yield folder


def _prepare_data(
    store: ObjectStore,
    config: Config,
    data_uri: str,
    folder: Path,
    stop: StopRequest,
    console: Console,
    resume_anyway: bool,
) -> _Data:
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
    for warning in [*unused, *dataset.warnings, *warnings]:
        console.print(f"warning: {named_as(warning, folder, data_uri)}")
    return _Data(data_uri, dataset.info, splits, items)


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


def _identity(store: ObjectStore) -> RunIdentity:
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


# ------------------------------------------------------------------------- 4: the state


def _restore_or_begin(
    attempt: _Attempt, manager: CheckpointManager, changed: list[str], resume_anyway: bool
) -> TrainState:
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
        mirror=attempt.store,
    )
    state.run_facts = {
        "config": config.to_dict(),
        "card": asdict(attempt.card),  # with it a checkpoint can be evaluated as it is
        **asdict(attempt.identity),
    }
    console.print(f"device: {_device_name(attempt.device, attempt.gpus)}")
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


def _refuse_lost_checkpoints(attempt: _Attempt) -> None:
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


# ------------------------------------------------------------------------- 5 and 6: training


@contextlib.contextmanager
def _tracking(
    attempt: _Attempt, state: TrainState, stop: StopRequest, notifier: Notifier, clock: StartClock
) -> Iterator[_Tracking]:
    """Console, ledger, W&B, and the rules; the last two are told how the attempt ended."""
    total = attempt.config.train.iterations
    data = attempt.data
    origin = provenance()
    told = {"data_uri": data.uri, "classes": list(data.info.classes), "provenance": origin}
    attempt.record.tell(Notice("origin", "", told))
    before = read_ledger(attempt.record.ledger.path)
    progress = ConsoleTracker(attempt.console, total, state.iteration)
    wandb = WandbTracker(
        attempt.config,
        attempt.identity,
        attempt.live_folder,
        attempt.record.tell,
        facts=RunFacts(attempt.store.uri, data.uri, data.info.classes, origin),
        before=before,
    )
    trained_with = Remedies.of(before).applied(attempt.config)
    health = HealthTracker(
        Watch(Setting(trained_with, attempt.data.info.num_classes)),
        tell=attempt.record.tell,
        say=attempt.console.print,
        before=before,
        rolled_back=attempt.record.rolled_back,
        on_finding=[wandb.finding, notifier.finding],
        on_standing=[wandb.standing],
    )
    start = StartTracker(clock, attempt.record.tell)
    trackers = Trackers([attempt.record.ledger, progress, wandb, health, start])
    failure: BaseException | None = None
    try:
        with progress:
            yield _Tracking(trackers, wandb)
    except BaseException as error:
        failure = error
        raise
    finally:
        code, why = _how_it_ended(failure)
        health.ended(code, why)
        health.close(within_s=stop.seconds_left)
        notifier.close(within_s=stop.seconds_left)
        wandb.close(
            exit_code=int(code),
            preempted=code is ExitCode.PREEMPTED,
            within_s=stop.seconds_left,
        )
        if stop.seconds_left is None:  # otherwise they are not worth the time
            _keep_wandb_files(attempt, wandb)


def _keep_wandb_files(attempt: _Attempt, wandb: WandbTracker) -> None:
    """Move what W&B has written offline from this machine's disk into the run."""
    if attempt.live_folder != attempt.scratch or wandb.finished_online:
        return
    files = [path for path in (attempt.scratch / "wandb").rglob("*") if path.is_file()]
    try:
        for path in files:
            if not path.is_symlink():
                attempt.store.upload(path, path.relative_to(attempt.scratch).as_posix())
    except JobError as error:
        log.warning("W&B's offline files were not kept: %s", error.message)


@contextlib.contextmanager
def _publishing(
    attempt: _Attempt, manager: CheckpointManager, stop: StopRequest
) -> Iterator[Publisher]:
    publisher = Publisher(
        manager,
        tell=attempt.record.tell,
        before_pointer=attempt.record.mirror.publish,
        on_fenced=lambda: stop.request("a newer attempt"),
    )
    try:
        yield publisher
    finally:
        publisher.close(within_s=stop.seconds_left)


@contextlib.contextmanager
def _showing(attempt: _Attempt, stop: StopRequest) -> Iterator[Show]:
    """The run's report, pictures and confusion matrix, after each evaluation."""
    live = LiveReport(lambda: _publish_report(attempt))

    def show(event: EvalEvent, evaluation: Evaluation) -> None:
        first = None
        if event.is_best:
            found = _best_evaluation(attempt, event.iteration, evaluation)
            examples = list(evaluation.extremes)

            def first() -> None:
                _write_best_evaluation(attempt, found, examples)

        live.ask(first)

    try:
        yield show
    finally:
        live.close(within_s=stop.seconds_left)


def _publish_report(attempt: _Attempt) -> None:
    """Of a run that goes on."""
    attempt.lease.raise_if_lost()
    events = read_ledger(attempt.record.ledger.path)  # in S3 it comes later
    best, pictures = shown_of(attempt.store)
    report = Report(
        run_uri=attempt.store.uri,
        config=attempt.config,
        classes=attempt.data.info.classes,
        events=events,
        checks=open_checklist(events),
        best=best,
        pictures=pictures,
        facts=_facts(attempt),
    )
    attempt.store.write(run.REPORT, report_html(report).encode())


def _facts(attempt: _Attempt) -> dict[str, Any]:
    images = {f"{name} images": count for name, count in attempt.num_images.items()}
    return {"data": attempt.data.uri, **images, **provenance()}


def _best_evaluation(attempt: _Attempt, iteration: int, evaluation: Evaluation) -> BestEvaluation:
    counts = evaluation.matrix.counts.cpu().tolist()
    return BestEvaluation(
        iteration=iteration,
        classes=attempt.data.info.classes,
        confusion=tuple(tuple(row) for row in counts),
        images=evaluation.scores,
    )


def _write_best_evaluation(
    attempt: _Attempt, found: BestEvaluation, shown: Sequence[Predicted]
) -> None:
    attempt.lease.raise_if_lost()
    attempt.store.write(run.PREDICTIONS, _prediction_sheet(attempt, shown))
    attempt.store.write(run.BEST_EVALUATION, best_evaluation_json(found))


def _save_schedule(attempt: _Attempt) -> SaveSchedule:
    events = read_ledger(attempt.record.ledger.path)
    history = interruption_history(events, attempt.lease.attempt)
    return SaveSchedule(attempt.config.checkpoint.every, history)


@contextlib.contextmanager
def _remedying(attempt: _Attempt, manager: CheckpointManager, guard: Guard) -> Iterator[None]:
    """Do about a failure of the training what the configuration says; the next attempt goes on.

    Raises:
        Diverged, OutOfMemory: always; `goes_on` tells whether something was done.
    """
    record, monitor = attempt.record, attempt.config.monitor
    try:
        yield
    except Diverged as failure:
        done = Remedies.of(read_ledger(record.ledger.path))
        if monitor.on_divergence == "rollback" and done.rollbacks < MAX_ROLLBACKS:
            record.tell(_roll_back(attempt, manager, guard, failure, done))
            failure.goes_on = True
        elif done.rollbacks >= MAX_ROLLBACKS:
            failure.message += f" (rolled back {done.rollbacks} times already)"
        raise
    except torch.OutOfMemoryError:
        done = Remedies.of(read_ledger(record.ledger.path))
        halved = replace(done, halvings=done.halvings + 1)
        short = _out_of_memory(done.applied(attempt.config))
        if monitor.on_oom == "halve" and done.can_halve(attempt.config):
            train = halved.applied(attempt.config).train
            facts = {"batch_size": train.batch_size, "accumulate": train.accumulate}
            record.tell(
                Notice(
                    BATCH_HALVED,
                    f"warning: {short.message}; going on with batches of {train.batch_size}, "
                    f"{train.accumulate} of them an iteration: the same images",
                    facts,
                )
            )
            short.goes_on = True
        raise short from None


def _roll_back(
    attempt: _Attempt,
    manager: CheckpointManager,
    guard: Guard,
    failure: Diverged,
    done: Remedies,
) -> Notice:
    """Put aside what was saved since it went wrong; what is done, for console and ledger."""
    why = failure.message
    if guard.since is None:
        to = manager.set_aside(attempt.config.train.iterations + 1, why)  # all of it is finite
    else:
        to = manager.set_aside(guard.since, why)
    then = replace(done, rollbacks=done.rollbacks + 1)
    train = then.applied(attempt.config).train
    return Notice(
        ROLLED_BACK,
        f"warning: {why}\nRolled back ({then.rollbacks} of {MAX_ROLLBACKS}) to iteration "
        f"{to or 0}; going on with --learning-rate {train.learning_rate:g} --learning-rate-D "
        f"{train.learning_rate_D:g}",
        {
            "rollback": then.rollbacks,
            "to": to or 0,
            "since": guard.since,
            "learning_rate": train.learning_rate,
            "learning_rate_D": train.learning_rate_D,
            "reason": why,
        },
    )


def _out_of_memory(config: Config) -> OutOfMemory:
    train = config.train
    return OutOfMemory(
        f"{OUT_OF_MEMORY} with batches of {train.batch_size}",
        mend="start a new run with the same images an iteration in smaller batches: "
        f"--batch-size {max(1, train.batch_size // 2)} "
        f"--set train.accumulate={train.accumulate * 2}; or go on with this one, which then does "
        "it by itself: --set monitor.on_oom=halve",
    )


def _best_writer(attempt: _Attempt, publisher: Publisher, wandb: WandbTracker) -> BestModelWriter:
    def save_best(state: TrainState, val_miou: float) -> BestModel:
        if wandb.wants_pictures(state.iteration):
            _picture(attempt, state, wandb)
        return publisher.save_best(
            {
                run.BEST_MODEL: _model_file(attempt, state, "generator", val_miou=val_miou),
                run.BEST_MODEL_D: _model_file(attempt, state, "discriminator", val_miou=val_miou),
            },
            iteration=state.iteration,
            val_miou=val_miou,
        )

    return save_best


def _picture(attempt: _Attempt, state: TrainState, wandb: WandbTracker) -> None:
    """Show a new best model in W&B, which is no reason for a training to end."""
    try:
        shown = _examples(attempt, state.predictor, attempt.config.data.image_scale)
    except JobError as error:
        log.warning("no pictures of iteration %d: %s", state.iteration, error.message)
        return
    wandb.pictures(state.iteration, shown)


def _model_file(attempt: _Attempt, state: TrainState, kind: str, **facts: Any) -> dict[str, Any]:
    return model_file(
        state.predictor if kind == "generator" else state.discriminator,
        attempt.card,
        kind=kind,
        iteration=state.iteration,
        run_id=attempt.identity.run_id,
        **facts,
    )


def _ended_before(state: TrainState, config: Config, stop_rules: StopRules) -> bool:
    """Whether an attempt before has come to the end of the training."""
    is_last = state.iteration == config.train.iterations
    stopped = state.iteration == state.evaluated_iteration > 0 and stop_rules.reason != ""
    return is_last or stopped


# ------------------------------------------------------------------------- 8: the end


def _show_best(
    attempt: _Attempt, manager: CheckpointManager, state: TrainState, wandb: WandbTracker
) -> BestEvaluation:
    """Verify the best model and leave its pictures, in the run and in W&B, while that is open."""
    store = attempt.store
    assert state.best is not None  # a complete run has evaluated at least once
    path = manager.verify_best(state.best)
    generator, card, _ = load_generator(path, attempt.device)
    found = _of_best_model(attempt, state.best, generator)
    key = run.best_file(state.best.id, run.BEST_MODEL)
    model = ModelFile(
        uri=str(store.local_path(key) or f"{store.uri}/{key}"),
        path=path,
        sha256=manager.best_files(state.best)[run.BEST_MODEL].sha256,
        iteration=state.best.iteration,
        val_miou=state.best.val_miou,
    )
    shown = _examples(attempt, generator, card.image_scale) if wandb.is_on else []
    wandb.ended(state.iteration, shown, model)
    return found


def _finish(
    attempt: _Attempt,
    manager: CheckpointManager,
    state: TrainState,
    tracking: _Tracking,
    stopped: str,
    shown: BestEvaluation,
) -> None:
    """Leave the files of a finished run.

    Args:
        attempt: which has come to the end.
        manager: of its checkpoints.
        state: after the last iteration.
        tracking: closed.
        stopped: why the last evaluation ended it, if it did.
        shown: of its best model.
    """
    if state.iteration == attempt.config.train.iterations:
        stopped = ""  # it had come to its end by itself
    store, data = attempt.store, attempt.data
    assert state.best is not None  # it has been shown
    final = manager.save_file(_model_file(attempt, state, "generator"), run.FINAL_MODEL)
    events = read_ledger(attempt.record.ledger.path)
    checks = checklist(
        events=events,
        best_path=f"{store.uri}/{run.BEST_MODEL}",
        best_verified=True,
        finished=True,
        wandb_finished=tracking.wandb.finished_online,
        wandb_outcome=tracking.wandb.outcome,
    )
    health = verdict(events, attempt.config, len(data.info.classes))
    content = summary(
        run_uri=store.uri,
        data_uri=data.uri,
        identity=attempt.identity,
        config=attempt.config.to_dict(),
        classes=data.info.classes,
        num_images=attempt.num_images,
        files={name: asdict(record) for name, record in manager.best_files(state.best).items()}
        | {run.FINAL_MODEL: asdict(final)},
        events=events,
        checks=checks,
        health=health,
        iterations=state.iteration,
        stopped=stopped,
        wandb_url=tracking.wandb.url,
    )
    store.write(run.SUMMARY, summary_json(content))
    report = Report(
        run_uri=store.uri,
        config=attempt.config,
        classes=data.info.classes,
        events=events,
        checks=checks,
        finished=True,
        stopped=stopped,
        best=shown,
        pictures=store.read(run.PREDICTIONS),
        facts=facts_of(content),
        health=health,
    )
    store.write(run.REPORT, report_html(report).encode())
    _print_end(attempt, state, checks, health, stopped)


def _examples(attempt: _Attempt, generator: Generator, image_scale: float) -> list[Example]:
    """A few validation images as a model sees them: the same each time, spread over the set."""
    val = attempt.data.items.val
    step = max(1, len(val) // WANDB_IMAGES)
    return examples(
        generator,
        val[::step][:WANDB_IMAGES],
        attempt.data.info,
        image_scale=image_scale,
        device=attempt.device,
    )


def _of_best_model(attempt: _Attempt, best: BestModel, generator: Generator) -> BestEvaluation:
    """As it was written when the model was found; made again if a kill came before that."""
    before, pictures = shown_of(attempt.store)
    if before is not None and before.iteration == best.iteration and pictures:
        return before
    evaluation = evaluate(
        generator,
        attempt.data.items.val,
        attempt.data.info,
        image_scale=attempt.card.image_scale,
        device=attempt.device,
        keep=EXAMPLES,
    )
    assert evaluation is not None
    found = _best_evaluation(attempt, best.iteration, evaluation)
    _write_best_evaluation(attempt, found, evaluation.extremes)
    return found


def _prediction_sheet(attempt: _Attempt, shown: Sequence[Predicted]) -> bytes:
    """Validation images as the best model sees them, the worst first."""
    info, card = attempt.data.info, attempt.card
    worst = len(shown) - len(shown) // 2
    examples = []
    for number, one in enumerate(shown):
        assert one.item.mask is not None
        which = "worst" if number < worst else "best"
        examples.append(
            Example(
                one.item.id,
                np.asarray(read_rgb(one.item.image)),
                read_labels(one.item.mask, info),
                one.prediction,
                caption=f"{which}: {one.item.id}, mIoU {one.miou:.4f}",
            )
        )
    sheet = io.BytesIO()
    prediction_sheet(examples, card.palette, card.classes).save(sheet, format="PNG")
    return sheet.getvalue()


def _print_end(
    attempt: _Attempt, state: TrainState, checks: list[Check], health: Verdict, stopped: str
) -> None:
    uri, best = attempt.store.uri, state.best
    assert best is not None
    # As it was called, so that the lines below can be pasted: it may not be on the PATH.
    weights = shlex.quote(f"{uri}/{run.BEST_MODEL}")
    s4gan = sys.argv[0] if Path(sys.argv[0]).name == "s4gan" else "s4gan"
    lines = [
        "",
        f"Finished after {state.iteration} iterations; best validation mIoU {best.val_miou:.4f} "
        f"at iteration {best.iteration}.",
        *([f"Stopped early: {stopped}."] if stopped else []),
        "",
        *(
            f"  [{'x' if check.passed else ' '}] {check.name}"
            + (f": {check.detail}" if check.detail else "")
            for check in checks
        ),
        "",
        *(finding.line() for finding in health.counting),
        health.conclusion(),
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
