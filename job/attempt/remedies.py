"""What is done about a failure of the training when the configuration asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from job.attempt.attempt import Attempt
from job.attempt.record import out_of_memory
from job.checkpoint.manager import CheckpointManager
from job.errors import Diverged
from job.events import Notice
from job.monitor.divergence import BATCH_HALVED, MAX_ROLLBACKS, ROLLED_BACK, Guard, Remedies
from job.monitor.ledger import read_ledger


@contextlib.contextmanager
def remedying(attempt: Attempt, manager: CheckpointManager, guard: Guard) -> Iterator[None]:
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
        short = out_of_memory(done.applied(attempt.config))
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
    attempt: Attempt,
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
