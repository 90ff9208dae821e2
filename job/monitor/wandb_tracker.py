"""Weights & Biases as a mirror of the ledger that may be down at any time.

Everything that talks to wandb happens on one thread of our own behind a queue: starting a run can
take minutes when the server does not answer, and must neither delay nor end the training.
"""

from __future__ import annotations

import logging
import os
import queue
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.config import Config
from job.errors import reason
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor import wandb_run
from job.monitor.health import Finding, Standing
from job.monitor.ledger import best_of
from job.monitor.pictures import Example
from job.monitor.setting import Setting
from job.monitor.wandb_rows import (
    NOTHING,
    Kind,
    Row,
    eval_row,
    findings_of,
    health_row,
    rows_of,
    sent_so_far,
    target_charts,
    train_row,
)
from job.monitor.wandb_run import INIT_TIMEOUT_S, ModelFile, RunFacts, has_key
from job.run import RunIdentity

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 20
"""A spot notice leaves two minutes for everything."""
JOIN_TIMEOUT_S = INIT_TIMEOUT_S + FINISH_TIMEOUT_S + 15
UPLOAD_TIMEOUT_S = 300
"""More, for a model that is uploaded when the training is over and nothing waits any more."""
ALERT_EVERY_S = 900
"""Between two alerts of the same rule; W&B drops what comes sooner."""
SHOWN_TIMES = 10
"""Most pictures of new best models in a run; with the charts and tables beside them they are what
costs room in W&B. Those of the end come on top."""


@dataclass(frozen=True)
class _Shown:
    """Pictures of the best model so far."""

    iteration: int
    examples: Sequence[Example]


class WandbTracker:
    """A tracker that mirrors to W&B.

    What the ledger has and W&B does not, since an earlier attempt was offline or killed, is sent
    first; what W&B has already, since it was rolled back and is trained again, is not sent twice.

    Args:
        config: the run's.
        identity: gives the W&B run its fixed id, so that every attempt continues it.
        directory: for wandb's files.
        tell: for console and ledger.
        facts: of the run.
        before: the run's ledger up to where it goes on from.
    """

    def __init__(
        self,
        config: Config,
        identity: RunIdentity,
        directory: Path,
        tell: Callable[[Notice], None],
        *,
        facts: RunFacts | None = None,
        before: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._config = config
        self._identity = identity
        self._directory = directory
        self._tell = tell
        self._facts = facts or RunFacts()
        self._setting = Setting(config, len(self._facts.classes) or None)
        self._queue: queue.Queue[Callable[[Any], object] | None] = queue.Queue()
        self._run: Any = None
        self._events = list(before)
        """The ledger, as far as it is known here. Of the thread, once that is started."""
        self._sent: dict[Kind, int] = {}
        """Up to where W&B has rows of each kind; empty where that is not known. Of the thread."""
        self._pictured = NOTHING
        """Iteration of the last pictures. Of the training's thread."""
        self._pictures: _Shown | None = None
        """To be shown with the evaluation that they belong to. Of the training's thread."""
        self._uploads = False
        self._finished_online = False
        self.url: str | None = None
        """Of the W&B run; None while it is not online."""
        self.outcome = "disabled by wandb.mode"
        """How the mirror ended, for the checklist."""
        self._mode = _resolve_mode(config.wandb.mode)
        self._thread: threading.Thread | None = None
        if self._mode != "disabled":
            self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
            self._thread.start()

    @property
    def is_on(self) -> bool:
        """Whether anything is kept, online or offline."""
        return self._thread is not None

    @property
    def finished_online(self) -> bool:
        """Whether everything reached the server. Only meaningful after `close`."""
        return self._finished_online

    def train(self, event: TrainEvent) -> None:
        """Queue the guide's charts of one line of losses."""
        line = {"event": "train", **event.to_dict()}

        def send(run: Any) -> None:
            self._events.append(line)
            self._send(run, train_row(line))

        self._put(send)

    def evaluation_started(self, iteration: int) -> None:
        """Nothing."""

    def evaluation(self, event: EvalEvent) -> None:
        """Queue the guide's charts of one evaluation, with the pictures of a new best model."""
        line = {"event": "eval", **asdict(event)}
        pictures, self._pictures = self._pictures, None

        def send(run: Any) -> None:
            self._events.append(line)
            is_new = self._send(run, eval_row(line, self._facts.classes))
            if is_new and pictures is not None:
                self._exhibit(run, event.iteration, pictures)

        self._put(send)

    def step_done(self, iteration: int) -> None:
        """Nothing."""

    def notice(self, notice: Notice) -> None:
        """Nothing: the ledger has it."""

    def finding(self, finding: Finding) -> None:
        """Queue an alert, which W&B sends on as the user has set it up there."""
        levels = {"note": "INFO", "warning": "WARN", "problem": "ERROR"}
        since = f"Since iteration {finding.since}. To try:"
        text = "\n".join([finding.message, since, *finding.remedies])

        def alert(run: Any) -> None:
            run.alert(
                title=finding.rule,  # shorter than 64 characters
                text=text,
                level=levels[finding.severity],
                wait_duration=ALERT_EVERY_S,
            )

        self._put(alert)

    def standing(self, standing: Standing, open_findings: int) -> None:
        """Queue the charts of the run's health."""
        self._put(lambda run: self._send(run, health_row(standing, open_findings)))

    def wants_pictures(self, iteration: int) -> bool:
        """Whether a new best model of this iteration is to be shown.

        The first is, and later ones after another tenth of the run.
        """
        if not self.is_on:
            return False
        every = self._config.train.iterations / SHOWN_TIMES
        return self._pictured == NOTHING or iteration - self._pictured >= every

    def pictures(self, iteration: int, examples: Sequence[Example]) -> None:
        """Predictions of the new best model, to be sent with its evaluation.

        Args:
            iteration: of the model.
            examples: validation images, the same each time.
        """
        self._pictured = iteration
        self._pictures = _Shown(iteration, tuple(examples))

    def ended(self, iteration: int, examples: Sequence[Example], model: ModelFile) -> None:
        """Queue what a finished run shows: pictures, tables, targets, and its model.

        Args:
            iteration: the last one.
            examples: validation images as the best model sees them.
            model: the best one.
        """
        how = self._config.wandb.model_artifact
        self._uploads = how == "upload"

        def show(run: Any) -> None:
            if iteration > self._sent.get("end", NOTHING):
                self._exhibit(run, iteration, _Shown(model.iteration, examples), at_end=True)
                self._send(run, Row("end", iteration, {}))
            # wandb keeps offline no copy of a file; `wandb-sync` sends it.
            if how == "none" or (how == "upload" and self._mode == "offline"):
                return
            self._extra(
                f"{how} of the model",
                lambda: self._send_model(run, model, how),
            )

        self._put(show)

    def close(self, *, exit_code: int, preempted: bool, within_s: float | None = None) -> None:
        """Send what is queued and finish the W&B run, within a bounded time. Never raises.

        Args:
            exit_code: of the attempt.
            preempted: whether it will go on; W&B then shows it so.
            within_s: seconds until the machine is gone, if that is known.
        """
        if self._thread is None:
            return
        most_s = JOIN_TIMEOUT_S + (UPLOAD_TIMEOUT_S if self._uploads else 0)
        timeout_s = most_s if within_s is None else max(0.0, min(most_s, within_s))

        def finish(run: Any) -> None:
            if preempted:
                run.mark_preempting()
            run.finish(exit_code=exit_code)

        self._queue.put(finish)
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.outcome = (
                f"did not finish within {round(timeout_s, 1):g} s; its files are in "
                + str(self._directory / "wandb")
            )
            self._say("unfinished", self.outcome)

    def _put(self, act: Callable[[Any], object]) -> None:
        if self._thread is not None:
            self._queue.put(act)

    def _send(self, run: Any, row: Row) -> bool:
        """Log a row, unless W&B has one of its kind for that iteration; whether it was logged."""
        if row.iteration <= self._sent.get(row.kind, NOTHING):
            return False
        # Without a step: wandb's own counter cannot go back after a rollback.
        run.log(row.to_dict())
        self._sent[row.kind] = row.iteration
        return True

    def _exhibit(self, run: Any, at: int, shown: _Shown, *, at_end: bool = False) -> None:
        """The best model so far, in pictures and tables, and the targets."""
        classes, best = self._facts.classes, best_of(self._events)
        self._extra("pictures", lambda: wandb_run.log_pictures(run, shown.examples, classes, at))
        if best is not None:
            self._extra("table of classes", lambda: self._show_best(run, best, at))
        charts = target_charts(self._events, self._setting)
        self._extra("targets", lambda: wandb_run.log_targets(run, charts, at))
        findings = findings_of(self._events, self._setting) if at_end else []
        if findings:
            self._extra("table of findings", lambda: wandb_run.log_findings(run, findings, at))

    def _show_best(self, run: Any, best: Mapping[str, Any], at: int) -> None:
        wandb_run.note_best(run, best)
        wandb_run.log_class_table(run, best, self._facts.classes, at)

    def _send_model(self, run: Any, model: ModelFile, how: str) -> None:
        artifact = wandb_run.log_model(run, model, how, self._facts.data_uri)
        if self._mode == "online" and how == "upload":
            artifact.wait(timeout=UPLOAD_TIMEOUT_S)

    def _extra(self, what: str, send: Callable[[], object]) -> None:
        """Send what the curves do not depend on: they go on without it."""
        try:
            send()
        except Exception as error:
            self._say("not_sent", f"the {what} could not be sent ({reason(error)})")

    def _serve(self) -> None:
        """The thread: start, work off the queue, end. No error leaves it."""
        try:
            self._run = self._start()
            if self._mode == "online":
                self._catch_up(self._run)
        except Exception as error:
            self._give_up(f"could not start ({reason(error)})")
        while (act := self._queue.get()) is not None:
            if self._run is None:
                continue
            try:
                act(self._run)
            except Exception as error:
                self._give_up(f"stopped working ({reason(error)})")
        if self._run is not None:
            self._finished_online = self._mode == "online"
            self.outcome = self._run.url if self._finished_online else self._offline_outcome()

    def _start(self) -> Any:
        import wandb

        # Before anything else of wandb's: it would announce where it found the key.
        wandb.setup(wandb.Settings(silent=True))
        if self._mode == "online":
            try:
                run = self._init()
                self.url = run.url
                self._say("online", run.url, url=run.url)
                return run
            except wandb.Error as error:
                self._mode = "offline"
                self._say("offline", f"not reachable ({reason(error)}); going on offline")
                # Without it the next init fails with "run ID is in use" (seen with wandb 0.31).
                wandb.teardown()
        else:
            files = self._directory / "wandb"
            hint = "" if has_key() else " (set WANDB_API_KEY to go online)"
            self._say("offline", f"offline, files in {files}{hint}")
        return self._init()

    def _init(self) -> Any:
        return wandb_run.start_run(
            self._config,
            self._facts,
            run_id=self._identity.wandb_id,
            mode="online" if self._mode == "online" else "offline",
            resume="allow",
            directory=self._directory,
            finish_timeout_s=FINISH_TIMEOUT_S,
        )

    def _catch_up(self, run: Any) -> None:
        """Send what the ledger has and W&B does not."""
        self._sent = sent_so_far(run.summary) if run.resumed else {}
        for row in rows_of(self._events, self._setting, self._facts.classes):
            self._send(run, row)

    def _give_up(self, why: str) -> None:
        self._run = None
        self.outcome = f"{why}; training was not affected, the ledger has everything"
        self._say("given_up", self.outcome)

    def _offline_outcome(self) -> str:
        # Not `wandb sync`: it would lay the files of several attempts over each other.
        return f"offline; upload with: s4gan wandb-sync {shlex.quote(self._facts.uri)}"

    def _say(self, state: str, what: str, **fields: Any) -> None:
        self._tell(Notice("wandb", f"W&B: {what}", {"state": state, "said": what, **fields}))


def _resolve_mode(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if has_key() else "offline"
