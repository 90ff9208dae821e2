"""The attempt's own line in the run's history: that it began, what happened, how it ended."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from job import run
from job.checkpoint.lease import Lease
from job.config import Config
from job.errors import ExitCode, JobError, NoProgress, OutOfMemory, StorageError, reason
from job.events import Notice
from job.monitor.attempts import crash_loop, fingerprint
from job.monitor.health import OUT_OF_MEMORY
from job.monitor.ledger import Ledger, LedgerMirror, read_ledger
from job.nodes import Node
from job.storage import ObjectStore

log = logging.getLogger(__name__)


class Record:
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


@contextlib.contextmanager
def recorded(
    store: ObjectStore,
    lease: Lease,
    scratch: Path,
    console: Console,
    config: Config,
    gpus: int,
    node: Node,
) -> Iterator[Record]:
    """The ledger, told of the attempt's start and of how it ended.

    Raises:
        NoProgress: the attempt failed as several before it, none of which saved anything.
    """
    path = store.local_path(run.LEDGER) or scratch / run.LEDGER
    mirror = LedgerMirror(store, lease, path)
    ledger = Ledger(path, attempt=lease.attempt, shown=f"{store.uri}/{run.LEDGER}")
    record = Record(ledger, mirror, console)
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
    except torch.OutOfMemoryError:  # before the training; `remedying` sees the others
        failure = out_of_memory(config)
        raise failure from None
    except BaseException as error:
        failure = error
        raise
    finally:
        code, why = how_it_ended(failure)
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


def how_it_ended(failure: BaseException | None) -> tuple[ExitCode, str]:
    """Exit code and reason of an attempt, by the exception that ended it."""
    if failure is None:
        return ExitCode.OK, "finished"
    if isinstance(failure, JobError):
        return failure.exit_code, failure.message
    if isinstance(failure, torch.OutOfMemoryError):
        return ExitCode.BAD_CONFIG, OUT_OF_MEMORY
    return ExitCode.SOFTWARE, reason(failure)


def out_of_memory(config: Config) -> OutOfMemory:
    """The error of a GPU that is too small for a configuration, with the batch size to try."""
    train = config.train
    message = f"{OUT_OF_MEMORY} with batches of {train.batch_size}"
    if train.batch_size == 1:
        return OutOfMemory(
            message, mend="start a new run with a smaller data.crop_size, or a smaller network"
        )
    by_itself = "; or go on with this one, which then does it by itself: "
    return OutOfMemory(
        message,
        mend="start a new run with the same images an iteration in smaller batches: "
        f"--batch-size {train.batch_size // 2} --set train.accumulate={train.accumulate * 2}"
        + (f"{by_itself}--set monitor.on_oom=halve" if config.monitor.on_oom == "stop" else ""),
    )
