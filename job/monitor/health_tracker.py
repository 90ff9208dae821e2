"""The rules while training goes on: findings to console, ledger, W&B, and whoever else is told.

On a thread of its own, so that neither judging nor telling holds up the training.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from job.errors import reason
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor.health import ENDS_THE_ATTEMPT, Finding, Standing, Watch

log = logging.getLogger(__name__)

CLOSE_S = 10.0
"""For what is still queued at the end."""


class HealthTracker:
    """A tracker that watches the training.

    Args:
        watch: that nothing was fed to yet.
        tell: for console and ledger.
        say: for the console alone.
        before: the run's ledger up to where it goes on from.
        rolled_back: lines that were dropped, as their iterations will be trained again; what they
            tell of is not said to anybody a second time.
        on_finding: told of each finding that begins.
        on_standing: told at each evaluation where the run stands.
    """

    def __init__(
        self,
        watch: Watch,
        *,
        tell: Callable[[Notice], None],
        say: Callable[[str], None],
        before: Iterable[Mapping[str, Any]] = (),
        rolled_back: Sequence[Mapping[str, Any]] = (),
        on_finding: Sequence[Callable[[Finding], None]] = (),
        on_standing: Sequence[Callable[[Standing, int], None]] = (),
    ) -> None:
        self._watch = watch
        self._tell = tell
        self._say = say
        self._on_finding = tuple(on_finding)
        self._on_standing = tuple(on_standing)
        self._again = {
            (event["rule"], event.get("ended") is not None)
            for event in rolled_back
            if event["event"] == "health"
        }
        self._reached = max((event.get("iteration", 0) for event in rolled_back), default=0)
        written = set()
        for event in before:
            watch.observe(event)
            if event["event"] == "health":
                written.add((event["rule"], event.get("ended")))
        # A process that was killed may not have come to it.
        self._owed = [one for one in watch.findings if (one.rule, one.ended) not in written]
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, name="health", daemon=True)
        self._thread.start()

    def train(self, event: TrainEvent) -> None:
        """Queue a line of losses."""
        self._queue.put({"event": "train", **event.to_dict()})

    def evaluation_started(self, iteration: int) -> None:
        """Nothing: the result is what counts."""

    def evaluation(self, event: EvalEvent) -> None:
        """Queue the scores."""
        self._queue.put({"event": "eval", **asdict(event)})

    def step_done(self, iteration: int) -> None:
        """Nothing."""

    def notice(self, notice: Notice) -> None:
        """Nothing: what else happens to a run is no matter of health."""

    def ended(self, exit_code: int, why: str) -> None:
        """How the training ended, which may be a finding, too.

        Args:
            exit_code: of the attempt.
            why: its reason.
        """
        self._queue.put({"event": "attempt_ended", "exit_code": exit_code, "reason": why})

    def close(self, within_s: float | None = None) -> None:
        """Wait until all that is queued has been told.

        Args:
            within_s: seconds, at most; None: a few.
        """
        self._queue.put(None)
        self._thread.join(CLOSE_S if within_s is None else max(0.0, min(CLOSE_S, within_s)))

    def _serve(self) -> None:
        for finding in self._owed:
            self._report(finding)
        while (event := self._queue.get()) is not None:
            try:
                for finding in self._watch.observe(event):
                    self._report(finding)
                if event["event"] == "eval":
                    self._report_standing()
            except Exception as error:  # watching must not end what it watches
                log.warning("the training is not watched at this point: %s", reason(error))

    def _report(self, finding: Finding) -> None:
        at = finding.iteration if finding.ended is None else finding.ended
        again = at <= self._reached and (finding.rule, finding.ended is not None) in self._again
        # An attempt that ends by it says so itself.
        line = "" if again or finding.rule in ENDS_THE_ATTEMPT else finding.line()
        self._tell(Notice("health", line, finding.to_dict()))
        if not again and finding.ended is None:
            for listener in self._on_finding:
                listener(finding)

    def _report_standing(self) -> None:
        standing = self._watch.standing()
        if standing is None:
            return
        self._say(standing.line())
        for listener in self._on_standing:
            listener(standing, len(self._watch.open))
