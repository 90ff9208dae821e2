"""What stands around the training: trackers, publisher, the live report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from job import run
from job.attempt.attempt import Attempt
from job.attempt.best import best_evaluation, examples_of, write_best_evaluation
from job.attempt.record import how_it_ended
from job.checkpoint.interval import SaveSchedule
from job.checkpoint.manager import BestModel, CheckpointManager
from job.checkpoint.publisher import Publisher
from job.errors import ExitCode, JobError
from job.events import EvalEvent, Notice, Tracker
from job.monitor import Trackers
from job.monitor.attempts import interruption_history
from job.monitor.console import ConsoleTracker
from job.monitor.divergence import Remedies
from job.monitor.health import Watch
from job.monitor.health_tracker import HealthTracker
from job.monitor.ledger import read_ledger
from job.monitor.live_report import LiveReport
from job.monitor.notify import Notifier
from job.monitor.report import Report, open_checklist, report_html, shown_of
from job.monitor.setting import Setting
from job.monitor.start import PaceTracker, StartClock, StartTracker
from job.monitor.summary import provenance
from job.monitor.wandb_run import RunFacts
from job.monitor.wandb_tracker import WandbTracker
from job.preemption import StopRequest
from job.training.evaluation import Evaluation
from job.training.loop import BestModelWriter, Show
from job.training.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracking:
    """The trackers of an attempt."""

    trackers: Tracker
    wandb: WandbTracker


@contextlib.contextmanager
def tracking_of(
    attempt: Attempt, state: TrainState, stop: StopRequest, notifier: Notifier, clock: StartClock
) -> Iterator[Tracking]:
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
    on_cpu = "presets camvid and demo (--config) are made for CPUs, this one is for a GPU"
    advice = on_cpu if attempt.device.type == "cpu" else ""
    pace = PaceTracker(total, attempt.console.print, advice)
    trackers = Trackers([attempt.record.ledger, progress, wandb, health, start, pace])
    failure: BaseException | None = None
    try:
        with progress:
            yield Tracking(trackers, wandb)
    except BaseException as error:
        failure = error
        raise
    finally:
        code, why = how_it_ended(failure)
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


def _keep_wandb_files(attempt: Attempt, wandb: WandbTracker) -> None:
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
def publishing(
    attempt: Attempt, manager: CheckpointManager, stop: StopRequest
) -> Iterator[Publisher]:
    """What saves beside the training; closed in the time there is left."""
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
def showing(attempt: Attempt, stop: StopRequest) -> Iterator[Show]:
    """The run's report, pictures and confusion matrix, after each evaluation."""
    live = LiveReport(lambda: _publish_report(attempt))

    def show(event: EvalEvent, evaluation: Evaluation) -> None:
        first = None
        if event.is_best:
            found = best_evaluation(attempt, event.iteration, evaluation)
            examples = list(evaluation.extremes)

            def first() -> None:
                write_best_evaluation(attempt, found, examples)

        live.ask(first)

    try:
        yield show
    finally:
        live.close(within_s=stop.seconds_left)


def _publish_report(attempt: Attempt) -> None:
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
        facts=attempt.facts,
    )
    attempt.store.write(run.REPORT, report_html(report).encode())


def save_schedule(attempt: Attempt) -> SaveSchedule:
    """When to save, by how long the attempts before this one lived."""
    events = read_ledger(attempt.record.ledger.path)
    history = interruption_history(events, attempt.lease.attempt)
    return SaveSchedule(attempt.config.checkpoint.every, history)


def best_writer(attempt: Attempt, publisher: Publisher, wandb: WandbTracker) -> BestModelWriter:
    """What the loop calls with each new best model: its files, and pictures in W&B."""

    def save_best(state: TrainState, val_miou: float) -> BestModel:
        if wandb.wants_pictures(state.iteration):
            _picture(attempt, state, wandb)
        return publisher.save_best(
            {
                run.BEST_MODEL: attempt.model_file(state, "generator", val_miou=val_miou),
                run.BEST_MODEL_D: attempt.model_file(state, "discriminator", val_miou=val_miou),
            },
            iteration=state.iteration,
            val_miou=val_miou,
        )

    return save_best


def _picture(attempt: Attempt, state: TrainState, wandb: WandbTracker) -> None:
    """Show a new best model in W&B, which is no reason for a training to end."""
    try:
        shown = examples_of(attempt, state.predictor, attempt.config.data.image_scale)
    except JobError as error:
        log.warning("no pictures of iteration %d: %s", state.iteration, error.message)
        return
    wandb.pictures(state.iteration, shown)
