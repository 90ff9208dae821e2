"""What a finished run leaves: final weights, checklist, summary, report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from job import run
from job.attempt.attempt import Attempt
from job.attempt.training import Tracking
from job.checkpoint.manager import CheckpointManager
from job.monitor.ledger import read_ledger
from job.monitor.report import BestEvaluation, Report, facts_of, report_html
from job.monitor.summary import Check, checklist, summary, summary_json
from job.monitor.verdict import Verdict, verdict
from job.training.state import TrainState


def finish(
    attempt: Attempt,
    manager: CheckpointManager,
    state: TrainState,
    tracking: Tracking,
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
    final = manager.save_file(attempt.model_file(state, "generator"), run.FINAL_MODEL)
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


def _print_end(
    attempt: Attempt, state: TrainState, checks: list[Check], health: Verdict, stopped: str
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
