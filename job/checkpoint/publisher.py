"""Saving without making the training wait: copy on its thread, everything else on another.

The training thread pays for copying the tensors and no more. Serialising, uploading, publishing
and pruning happen in order on one thread of our own, through the `CheckpointManager`. What the
storage refuses stays owed and is tried again with the next save, unless that makes it pointless;
only `finish`, before an attempt ends, waits until all is durable, and raises if it cannot be.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from job.checkpoint.manager import BestModel, CheckpointManager, SaveCost
from job.errors import STORAGE_FAILURES, ConfigError, Fenced, StorageError
from job.events import Notice

FINISH_ATTEMPTS = 4
RETRY_WAIT_S = (2.0, 10.0, 30.0)
"""Before each repetition in `finish`; a storage that is down for longer fails the attempt."""
LOOK_AGAIN_S = 0.5
"""While waiting, at how much time is left."""
MAX_OWED_STATES = 3
"""Copies of the state that are held for a storage that is down."""
MAX_TRIES = 10
"""Of a numbered checkpoint that keeps later states waiting."""


def _for_ever() -> float | None:
    return None


@dataclass(eq=False)
class _Save:
    """A state on its way."""

    state: Mapping[str, Any]
    best: BestModel | None
    numbered: bool
    pause_s: float
    tries: int = 0
    """That have failed."""

    @property
    def iteration(self) -> int:
        return int(self.state["iteration"])

    @property
    def name(self) -> str:
        return f"iteration {self.iteration}"


@dataclass(eq=False)
class _Best:
    """The files of a best model on their way."""

    best: BestModel
    files: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        return "the best model"


@dataclass
class _Shared:
    """What both threads see, under one condition."""

    owed: list[_Save | _Best] = field(default_factory=list)
    """Not durable yet, oldest first."""
    trying: _Save | _Best | None = None
    """The first of them while the thread works at it."""
    wake: bool = False
    """Whether the thread should try what is owed."""
    closed: bool = False
    error: StorageError | ConfigError | None = None
    """Why something failed last."""
    fatal: BaseException | None = None
    """What ended the thread."""
    saved_iteration: int | None = None
    cost: SaveCost | None = None


class Publisher:
    """Publishes checkpoints and best models of one attempt in the background.

    Args:
        manager: does the work, from now on on this object's thread alone.
        tell: takes a notice for ledger and console; called from either thread.
        before_pointer: makes the ledger durable, see `CheckpointManager.save`.
        on_fenced: called once when another attempt turns out to have taken over.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        *,
        tell: Callable[[Notice], None],
        before_pointer: Callable[[], None],
        on_fenced: Callable[[], None],
    ) -> None:
        self._manager = manager
        self._tell = tell
        self._before_pointer = before_pointer
        self._on_fenced = on_fenced
        self._last_warning = ""
        self._shared = _Shared()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="publisher", daemon=True)
        self._thread.start()

    @property
    def saved_iteration(self) -> int | None:
        """Iteration of the newest checkpoint this attempt has made durable."""
        return self._shared.saved_iteration

    @property
    def cost(self) -> SaveCost | None:
        """Of the last published state; None before the first."""
        return self._shared.cost

    def save(self, state: Mapping[str, Any], *, best: BestModel | None, numbered: bool) -> float:
        """Copy a state and leave the rest to the background; returns the pause in seconds.

        Never waits for the storage. A save that can as well come later should, while `busy`.

        Args:
            state: tensors, which may change afterwards, and plain values.
            best: the best model at this point.
            numbered: see `CheckpointManager.save`.

        Raises:
            Fenced: another attempt has taken over.
        """
        began_s = time.monotonic()
        job = _Save(copy_tensors(state), best, numbered, 0.0)
        job.pause_s = time.monotonic() - began_s
        self._put(job)
        return job.pause_s

    @property
    def busy(self) -> bool:
        """Whether a state is on its way, and nothing has gone wrong with it yet.

        Raises:
            Fenced: another attempt has taken over.
        """
        with self._changed:
            self._raise_if_dead()
            return self._has_save_under_way()

    def wait_until_free(self, within_s: float) -> bool:
        """Wait until not `busy`; whether it came to that in time.

        Raises:
            Fenced: another attempt has taken over.
        """
        deadline_s = time.monotonic() + within_s
        return self._wait_until(
            lambda: not self._has_save_under_way(), lambda: deadline_s - time.monotonic()
        )

    def save_best(
        self, files: Mapping[str, Mapping[str, Any]], *, iteration: int, val_miou: float
    ) -> BestModel:
        """Copy the files of a new best model; they are published before any later state.

        Args:
            files: plain name to content, whose tensors may change afterwards.
            iteration: of the weights.
            val_miou: their score, 0..1.

        Raises:
            Fenced: another attempt has taken over.
        """
        best = self._manager.new_best(iteration, val_miou)
        self._put(_Best(best, copy_tensors(files)))
        return best

    def finish(self, seconds_left: Callable[[], float | None] = _for_ever) -> None:
        """Wait until everything is durable.

        Args:
            seconds_left: how long it may still take, None for as long as the storage makes
                progress; asked again and again, as a spot notice may come meanwhile.

        Raises:
            Fenced: another attempt has taken over.
            StorageError or ConfigError: it could not be made durable, in several attempts or in
                time.
        """
        for attempt in range(FINISH_ATTEMPTS):
            if not self._wait_until(self._is_idle, seconds_left):
                raise StorageError("the state is not durable, and no time is left")
            if not self._shared.owed:
                return
            assert self._shared.error is not None
            if attempt == FINISH_ATTEMPTS - 1:
                raise self._shared.error
            if not self._pause(RETRY_WAIT_S[attempt], seconds_left):
                raise self._shared.error
            with self._changed:
                self._shared.wake = True
                self._changed.notify_all()

    def close(self, within_s: float | None = None) -> None:
        """End the thread after what it is doing; nothing is waited for that has not begun.

        Args:
            within_s: leave the thread to the end of the process after so long.
        """
        with self._changed:
            self._shared.closed = True
            self._shared.wake = False
            self._changed.notify_all()
        self._thread.join(within_s if within_s is None else max(0.0, within_s))

    def _is_idle(self) -> bool:
        return self._shared.trying is None and not self._shared.wake

    def _has_save_under_way(self) -> bool:
        shared = self._shared
        return isinstance(shared.trying, _Save) or (
            (shared.wake or shared.trying is not None)
            and any(isinstance(job, _Save) for job in shared.owed)
        )

    def _wait_until(
        self, true: Callable[[], bool], seconds_left: Callable[[], float | None] = _for_ever
    ) -> bool:
        with self._changed:
            while not true():
                self._raise_if_dead()
                left_s = seconds_left()
                if left_s is not None and left_s <= 0:
                    return False
                self._changed.wait(LOOK_AGAIN_S if left_s is None else min(left_s, LOOK_AGAIN_S))
            self._raise_if_dead()
        return True

    def _pause(self, wait_s: float, seconds_left: Callable[[], float | None]) -> bool:
        """Wait before another try; False as soon as it is clear that there is no time for it."""
        again_s = time.monotonic() + wait_s
        left_s = seconds_left()
        if left_s is not None and left_s < wait_s:
            return False
        return self._wait_until(lambda: time.monotonic() >= again_s, seconds_left)

    def _raise_if_dead(self) -> None:
        if self._shared.fatal is not None:
            raise self._shared.fatal

    def _put(self, job: _Save | _Best) -> None:
        with self._changed:
            self._raise_if_dead()
            shared = self._shared
            kept = [*needed([*shared.owed, job])]
            dropped = [one for one in shared.owed if one not in kept and one is not shared.trying]
            shared.owed = [one for one in [*shared.owed, job] if one not in dropped]
            shared.wake = True
            self._changed.notify_all()
        self._tell_given_up(dropped)

    def _tell_given_up(self, dropped: Sequence[_Save | _Best]) -> None:
        for one in dropped:
            if isinstance(one, _Save) and one.numbered:
                self._tell(
                    Notice(
                        "save_given_up",
                        f"warning: {one.name} will have no checkpoint of its own: the storage "
                        f"takes nothing, and no more than {MAX_OWED_STATES} states are held for it",
                        {"of_iteration": one.iteration},
                    )
                )

    def _serve(self) -> None:
        """The thread. What a storage refuses is told and stays owed; anything else ends it."""
        try:
            self._work()
        except BaseException as error:  # raised again on the training thread
            with self._changed:
                self._shared.trying = None
                self._shared.fatal = error
                self._changed.notify_all()
            if isinstance(error, Fenced):
                self._on_fenced()

    def _work(self) -> None:
        shared = self._shared
        while True:
            with self._changed:
                while not shared.wake:
                    if shared.closed:
                        return
                    self._changed.wait()
                # Set again by whoever puts something while this is tried, so that it is not
                # forgotten if this fails.
                shared.wake = False
                job = shared.trying = shared.owed[0]
            error: StorageError | ConfigError | None = None
            dropped: list[_Save | _Best] = []
            try:
                self._publish(job)
            except STORAGE_FAILURES as raised:
                error = raised
                self._tell_failure(job, error)
            with self._changed:
                shared.trying = None
                if error is None:
                    shared.owed.remove(job)
                    shared.wake = bool(shared.owed) and not shared.closed
                else:
                    shared.error = error
                    if isinstance(job, _Save):
                        job.tries += 1
                    kept = needed(shared.owed)
                    dropped = [one for one in shared.owed if one not in kept]
                    shared.owed = kept
                self._changed.notify_all()
            self._tell_given_up(dropped)

    def _publish(self, job: _Save | _Best) -> None:
        if isinstance(job, _Best):
            self._manager.save_best(job.best, job.files)
            return
        cost = self._manager.save(
            job.state, best=job.best, numbered=job.numbered, before_pointer=self._before_pointer
        )
        self._shared.cost = cost
        self._shared.saved_iteration = job.iteration
        self._tell(
            Notice(
                "checkpoint",
                "",
                {
                    "saved_at": job.iteration,
                    "bytes": cost.size,
                    "pause_s": round(job.pause_s, 4),
                    "serialise_s": round(cost.serialise_s, 4),
                    "publish_s": round(cost.publish_s, 4),
                },
            )
        )

    def _tell_failure(self, job: _Save | _Best, error: StorageError | ConfigError) -> None:
        text = f"warning: {job.name} could not be saved; the next save will do it again: {error}"
        # The ledger has every time; on the console the same words once are enough.
        message = "" if text == self._last_warning else text
        self._last_warning = text
        self._tell(Notice("save_failed", message, {"reason": error.message}))


def needed(owed: Sequence[_Save | _Best]) -> list[_Save | _Best]:
    """Those of the jobs, oldest first, that a later one has not made pointless.

    A later state replaces a recovery checkpoint, but not a numbered one (until there are too many
    of them, or it has failed too often: it may be the only thing that is refused); a later best
    model replaces one that no state refers to.
    """
    saves = [job for job in owed if isinstance(job, _Save)]
    kept_saves = [job for job in saves[:-1] if job.numbered and job.tries < MAX_TRIES] + saves[-1:]
    kept_saves = kept_saves[-MAX_OWED_STATES:]
    referred = {job.best.id for job in kept_saves if job.best is not None}
    bests = [job for job in owed if isinstance(job, _Best)]
    kept_bests = [job for job in bests[:-1] if job.best.id in referred] + bests[-1:]
    return [job for job in owed if job in kept_saves or job in kept_bests]


def copy_tensors(value: Any) -> Any:
    """A deep copy of nested dictionaries and lists whose tensors are on the CPU.

    Copies from a GPU go to pinned memory, all at once, and are waited for together.
    """
    copied = _copy(value)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        source = value.detach()
        if source.device.type != "cuda":
            return source.clone()
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return target.copy_(source, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
