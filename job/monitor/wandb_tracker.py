"""Weights & Biases as a mirror of the ledger that may be down at any time.

Everything that talks to wandb happens on one thread of our own behind a queue: starting a run can
take minutes when the server does not answer, and must neither delay nor end the training.
"""

from __future__ import annotations

import logging
import netrc
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from job.config import Config
from job.errors import reason
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor.health import Finding, Standing
from job.run import RunIdentity

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30
"""wandb adds about 10 s of its own."""
FINISH_TIMEOUT_S = 20
"""A spot notice leaves two minutes for everything."""
JOIN_TIMEOUT_S = INIT_TIMEOUT_S + FINISH_TIMEOUT_S + 15
ALERT_EVERY_S = 900
"""Between two alerts of the same rule; W&B drops what comes sooner."""
FLUSH_INTERVAL_S = 1
"""wandb's own 15 s would lose that much of an offline run at a kill."""


class WandbTracker:
    """A tracker that mirrors to W&B.

    Args:
        config: the run's.
        identity: gives the W&B run its fixed id, so that every attempt continues it.
        directory: for wandb's files.
        say: prints a line to the user.
    """

    def __init__(
        self, config: Config, identity: RunIdentity, directory: Path, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._identity = identity
        self._directory = directory
        self._say = say
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue()
        self._run: Any = None
        self._finished_online = False
        self.outcome = "disabled by wandb.mode"
        """How the mirror ended, for the checklist."""
        self._mode = _resolve_mode(config.wandb.mode)
        self._thread: threading.Thread | None = None
        if self._mode != "disabled":
            self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
            self._thread.start()

    @property
    def finished_online(self) -> bool:
        """Whether everything reached the server. Only meaningful after `close`."""
        return self._finished_online

    def train(self, event: TrainEvent) -> None:
        """Queue the guide's charts of one line of losses."""
        self._log(
            event.iteration,
            {
                "Training Loss/Cross Entropy": event.loss_ce,
                "Training Loss/Feature Matching": event.loss_fm,
                "Training Loss/Self-Training": event.loss_st,
                "Training Loss/Discriminator": event.loss_d,
                "Training Loss/Total Generator": event.loss_g,
                "Self-Training/Confidence Count": event.st_count,
                "Learning Rate/Generator": event.lr_g,
                "Learning Rate/Discriminator": event.lr_d,
            },
        )

    def evaluation_started(self, iteration: int) -> None:
        """Nothing."""

    def evaluation(self, event: EvalEvent) -> None:
        """Queue the guide's charts of one evaluation."""
        self._log(
            event.iteration,
            {
                "Metrics/Training mIoU": event.train_miou,
                "Metrics/Validation mIoU": event.val_miou,
                "Metrics/Train-Val Gap": event.train_miou - event.val_miou,
            },
        )

    def step_done(self, iteration: int) -> None:
        """Nothing."""

    def notice(self, notice: Notice) -> None:
        """Nothing: the ledger has it."""

    def finding(self, finding: Finding) -> None:
        """Queue an alert, which W&B sends on as the user has set it up there."""
        if self._thread is None:
            return
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

        self._queue.put(alert)

    def standing(self, standing: Standing, open_findings: int) -> None:
        """Queue the charts of the run's health."""
        self._log(
            standing.iteration,
            {
                "Health/Phase": standing.number,
                "Health/On Track": int(standing.on_track),
                "Health/Open Findings": open_findings,
            },
        )

    def close(self, *, exit_code: int, preempted: bool, within_s: float | None = None) -> None:
        """Send what is queued and finish the W&B run, within a bounded time. Never raises.

        Args:
            exit_code: of the attempt.
            preempted: whether it will go on; W&B then shows it so.
            within_s: seconds until the machine is gone, if that is known.
        """
        if self._thread is None:
            return
        timeout_s = JOIN_TIMEOUT_S if within_s is None else max(0.0, min(JOIN_TIMEOUT_S, within_s))

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
            self._say(f"W&B: {self.outcome}")

    def _log(self, iteration: int, values: dict[str, float]) -> None:
        if self._thread is not None:
            # Our own step: wandb's counter cannot go back after a rollback.
            self._queue.put(lambda run: run.log({"iteration": iteration, **values}))

    def _serve(self) -> None:
        """The thread: start, work off the queue, end. No error leaves it."""
        try:
            self._run = self._start()
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
                run = self._init(wandb)
                self._say(f"W&B: {run.url}")
                return run
            except wandb.Error as error:
                self._say(f"W&B: not reachable ({reason(error)}); going on offline")
                # Without it the next init fails with "run ID is in use" (seen with wandb 0.31).
                wandb.teardown()
                self._mode = "offline"
        else:
            files = self._directory / "wandb"
            hint = " (set WANDB_API_KEY to go online)" if not _has_key() else ""
            self._say(f"W&B: offline, files in {files}{hint}")
        return self._init(wandb)

    def _init(self, wandb: Any) -> Any:
        settings = self._config.wandb
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            tags=list(settings.tags),
            id=self._identity.wandb_id,
            resume="allow",
            mode=self._mode,
            dir=str(self._directory),
            config=self._config.to_dict(),
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
                console="off",
                silent=True,
            ),
        )
        run.define_metric("iteration", hidden=True)
        run.define_metric("*", step_metric="iteration")
        run.define_metric("Metrics/Validation mIoU", step_metric="iteration", summary="max")
        return run

    def _give_up(self, why: str) -> None:
        self._run = None
        self.outcome = f"{why}; training was not affected, the ledger has everything"
        self._say(f"W&B: {self.outcome}")

    def _offline_outcome(self) -> str:
        return f"offline; upload with: wandb sync {Path(self._run.dir).parent}"


def _resolve_mode(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether wandb would find a key: in the environment, or in the netrc file of `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        hosts = netrc.netrc(path).hosts
    except (netrc.NetrcParseError, OSError, ValueError, RuntimeError):
        return False  # no such file, not one we can read, or a user without a home
    import wandb

    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    # Logins of wandb before 0.31 are kept under its former server, and still used.
    return bool({urlparse(server).netloc, "api.wandb.ai"} & set(hosts))
