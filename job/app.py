"""The life of one attempt at a run, top to bottom."""

from __future__ import annotations

import gc

import torch
from rich.console import Console

from job import run
from job.attempt.attempt import Attempt
from job.attempt.beginning import (
    brought,
    ended_before,
    identity_of,
    leased,
    prepare_data,
    restore_or_begin,
    scratch_of,
)
from job.attempt.best import show_best
from job.attempt.finish import finish
from job.attempt.record import recorded
from job.attempt.remedies import remedying
from job.attempt.training import best_writer, publishing, save_schedule, showing, tracking_of
from job.checkpoint.manager import CheckpointManager
from job.checkpoint.resumable import (
    config_of_run,
    refuse_nested,
    refuse_other_config,
    refuse_same_place,
)
from job.config import Config
from job.data.decoded import decoded_folder
from job.errors import ExitCode, Preempted, TrainingFailure
from job.events import Notice
from job.inference import choose_device
from job.monitor.divergence import Guard, Remedies
from job.monitor.ledger import read_ledger
from job.monitor.notify import Notifier
from job.monitor.stall import stall_minutes, watch_stall
from job.monitor.start import StartClock
from job.monitor.stopping import StopRules
from job.nodes import Node
from job.parallel import check_ranks, crew, follow
from job.preemption import StopRequest, watch_spot
from job.storage import open_store
from job.storage.held import kept_within
from job.storage.progress import ConsoleProgress
from job.storage.sync import data_folder
from job.training.loop import Surroundings
from job.training.loop import train as run_loop
from job.training.saving import Saving


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
        leased(store, stop) as lease,
        scratch_of(store, lease) as scratch,
        recorded(store, lease, scratch, console, config, gpus, node) as record,
        watch_spot(stop, record.tell),
        watch_stall(patience_minutes, record.ledger.path, record.tell, record.mirror.publish),
        crew(gpus, node, device, record.tell) as others,
        # 3. Bring the data, look at it, split it as the run began.
        brought(data_uri, stop, console, clock) as folder,
    ):
        data = prepare_data(store, config, data_uri, folder, stop, console, resume_anyway)
        clock.done("checks")
        identity = identity_of(store)
        # 4. Restore the newest checkpoint that verifies, or begin.
        manager = CheckpointManager(store, lease, scratch)
        attempt = Attempt(
            config, store, scratch, lease, identity, data, device, gpus, console, record
        )
        state = restore_or_begin(attempt, manager, changed, resume_anyway)
        before = read_ledger(record.ledger.path)
        trained_with = Remedies.of(before).applied(config)
        stop_rules = StopRules(config, before)
        guard = Guard(trained_with, before)
        ended = ended_before(state, config, stop_rules)
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
            remedying(attempt, manager, guard),
            tracking_of(attempt, state, stop, notifier, clock) as tracking,
        ):
            decoded = decoded_folder(folder)
            with (
                publishing(attempt, manager, stop) as publisher,
                showing(attempt, stop) as show,
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
                            save_schedule(attempt),
                            stop,
                            tracking.trackers,
                            state.iteration,
                        ),
                        save_best=best_writer(attempt, publisher, tracking.wandb),
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
            shown = show_best(attempt, manager, state, tracking.wandb)
        finish(attempt, manager, state, tracking, stop_rules.reason, shown)
        return ExitCode.OK


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
