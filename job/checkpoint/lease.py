"""The lease: one attempt at a time may publish into a run.

`lease.json` names the attempt that owns the run. It is only ever written conditionally, on the
version its writer has read, so of two attempts that start at the same moment exactly one gets it.
An attempt that finds its lease taken is fenced: it publishes nothing more.

How long a holder has been silent is told by the storage's clock and by our own, never by comparing
the clocks of two machines.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from job import run
from job.errors import (
    STORAGE_FAILURES,
    Fenced,
    ObjectNotFound,
    PreconditionFailed,
    Preempted,
    RunDeleted,
    StorageError,
)
from job.storage import ABSENT, ObjectStore

log = logging.getLogger(__name__)

LEASE_TIME_S = 60.0
"""A holder that has been silent for so long is taken for dead."""
RENEWALS = 4
"""Renewals within a lease time, so that a few may fail."""
POLL_S = 1.0
"""Between two looks at a lease that is waited for."""


@dataclass(frozen=True)
class Holder:
    """A process on a machine, and the job it works for, so that others can tell when it is gone."""

    machine: str
    """Host, boot and process namespace; only within one do process numbers mean anything."""
    pid: int
    started: str
    """Start time in the kernel's own clock, as a process number is used again."""
    job: str = ""
    """The scheduler's id of the job; empty outside of one."""
    job_attempt: int = 0
    """The scheduler's number of this try of the job."""

    @classmethod
    def this_process(cls) -> Holder:
        """The caller. Source of the names: AWS Batch User Guide, job environment variables."""
        boot = _read("/proc/sys/kernel/random/boot_id")
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = ""
        machine = f"{socket.gethostname()}/{boot}/{namespace}"
        attempt = os.environ.get("AWS_BATCH_JOB_ATTEMPT", "")
        return cls(
            machine=machine,
            pid=os.getpid(),
            started=_process(os.getpid())[1],
            # Of a job on several machines, #0 is the one that has the lease.
            job=os.environ.get("AWS_BATCH_JOB_ID", "").partition("#")[0],
            job_attempt=int(attempt) if attempt.isdecimal() else 0,
        )

    def is_known_dead(self, successor: Holder) -> bool:
        """Whether `successor` need not wait for it.

        A scheduler starts the next try of a job only after it has given up the one before. A
        process is known to be gone only on its own machine.
        """
        if self.job and self.job == successor.job and self.job_attempt < successor.job_attempt:
            return True
        if self.machine != successor.machine:
            return False
        state, started = _process(self.pid)
        return not _exists(self.pid) or state in ("Z", "X") or started != self.started

    def process_here(self) -> int | None:
        """Number of the process if it runs on the caller's machine; None if it does not."""
        here = Holder.this_process()
        return self.pid if self.machine == here.machine and not self.is_known_dead(here) else None

    def is_known_alive(self, successor: Holder) -> bool:
        """Whether waiting for it is in vain; asked of those that are not known to be dead."""
        if self.machine == successor.machine:
            return True
        return bool(self.job) and self.job == successor.job and self != successor


@dataclass(frozen=True)
class _Content:
    """`lease.json`."""

    attempt: int
    holder: Holder
    renewed_at: Annotated[float, Field(ge=0, lt=1e11)]
    """Seconds since 1970, by the holder's clock; to be read by people and for its own durations."""
    released: bool = False

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> _Content:
        return TypeAdapter(cls).validate_json(text, strict=True)


@dataclass(frozen=True)
class Predecessor:
    """The attempt that held the run before."""

    attempt: int
    last_seen: float
    """Seconds since 1970, by its own clock."""
    released: bool
    """Whether it ended by itself; False if it was killed."""


@dataclass(frozen=True)
class Holding:
    """Who has a run, as somebody sees who does not want it."""

    attempt: int
    holder: Holder
    is_live: bool
    """It has not given the run back, and was heard of within the lease time or is seen here."""
    renewed_at: float
    """Seconds since 1970, by its own clock."""
    silent_s: float
    """Since then, by the storage's clock."""


def look(store: ObjectStore) -> Holding | None:
    """Who has a run; None if nobody ever had.

    Raises:
        StorageError: the storage failed, or the lease is none.
    """
    try:
        current = _parse(store.read(run.LEASE), store)
        silent_s = store.age_s(run.LEASE)
    except ObjectNotFound:
        return None
    if current is None:
        return None
    here = Holder.this_process()
    gone = current.released or current.holder.is_known_dead(here)
    # A process that was stopped (SIGSTOP) renews nothing, and yet goes on some day.
    live = not gone and (silent_s < LEASE_TIME_S or current.holder.is_known_alive(here))
    return Holding(current.attempt, current.holder, live, current.renewed_at, silent_s)


class Lease:
    """A held lease; use `acquire`. Renews itself on a thread of its own until released."""

    def __init__(
        self,
        store: ObjectStore,
        content: _Content,
        version: str,
        on_lost: Callable[[], None],
        predecessor: Predecessor | None,
    ) -> None:
        self.predecessor = predecessor
        self._store = store
        self._content = content
        self._version = version
        self._on_lost = on_lost
        self._lost = False
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    @property
    def attempt(self) -> int:
        """Number of this attempt; the run's first is 1."""
        return self._content.attempt

    @property
    def holder(self) -> Holder:
        """This process."""
        return self._content.holder

    def check(self) -> None:
        """Prove that this attempt still owns the run; called before anything is published.

        Raises:
            Fenced: it does not.
            StorageError: it cannot be told.
        """
        self._renew()

    def raise_if_lost(self) -> None:
        """As `check`, by what is known already, without asking the storage.

        Raises:
            Fenced: another attempt has taken over.
        """
        if self._lost:
            raise self._fenced()

    def publish(self, key: str, data: bytes, version: str) -> str:
        """Write an object that only the holder of the lease may write; returns its version.

        Args:
            key: where.
            data: its content, which nobody else writes.
            version: the one last read or written.

        Raises:
            Fenced: another attempt has taken over; nothing was written.
        """
        while True:
            self.raise_if_lost()
            try:
                return self._store.write(key, data, expected=version)
            except PreconditionFailed:
                # Either we are the stale attempt (then this raises), or a stale one had passed its
                # own check just before we took the lease: the lease decides, so we write again.
                self.check()
                _, version = self._store.read_versioned(key)

    def release(self) -> None:
        """Give the run back, so that the next attempt need not wait; harmless if it is lost."""
        self._done.set()
        self._thread.join()
        try:
            self._renew(released=True)
        except (Fenced, RunDeleted, *STORAGE_FAILURES) as error:
            log.info("lease not released: %s", error.message)

    def _renew(self, *, released: bool = False) -> None:
        with self._lock:
            while not self._lost:
                content = replace(self._content, renewed_at=time.time(), released=released)
                try:
                    self._version = self._store.write(
                        run.LEASE, content.to_json(), expected=self._version
                    )
                    return
                except PreconditionFailed:
                    self._version = self._version_if_still_ours()
            raise self._fenced()

    def _fenced(self) -> Fenced:
        return Fenced(
            f"attempt {self.attempt} no longer owns {self._store.uri}: a newer one has taken over",
            mend="nothing: the newer attempt goes on",
        )

    def _version_if_still_ours(self) -> str:
        """Look again: a renewal that failed on the network may have arrived all the same."""
        text, version = self._store.read_versioned(run.LEASE)
        found = _parse(text, self._store)
        if found is None:
            raise RunDeleted(
                f"{self._store.uri}: its {run.LEASE} is gone; somebody has deleted "
                "the run, or a part of it",
                mend="start again, with another --run if this one is to stay deleted",
            )
        ours = (self._content.attempt, self._content.holder)
        self._lost = (found.attempt, found.holder) != ours
        return version

    def _keep_renewing(self) -> None:
        while not self._done.wait(LEASE_TIME_S / RENEWALS):
            try:
                self._renew()
            except (Fenced, RunDeleted):
                self._on_lost()
                return
            except STORAGE_FAILURES as error:
                log.warning("lease not renewed, trying again: %s", error.message)


def acquire(
    store: ObjectStore,
    *,
    on_lost: Callable[[], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Lease:
    """Take the run over, as its next attempt.

    At once if nobody holds it, if the holder gave it back, or if it is known to be dead; otherwise
    after it has been silent for the lease time.

    Args:
        store: the run's.
        on_lost: called from another thread when a newer attempt has taken over.
        stopped: asked while waiting; True gives up.

    Raises:
        Fenced: another attempt is alive and holds the run, or got it first.
        Preempted: given up.
        StorageError: the storage failed.
    """
    holder = Holder.this_process()
    waiting_since_s: float | None = None
    waited_for = ABSENT
    while True:
        text, version = store.read_versioned(run.LEASE)
        current = _parse(text, store)
        if (
            current is not None
            and not current.released
            and not current.holder.is_known_dead(holder)
        ):
            renewed = waiting_since_s is not None and version != waited_for
            if renewed or current.holder.is_known_alive(holder):
                raise Fenced(
                    f"another attempt (process {current.holder.pid} on "
                    f"{current.holder.machine.partition('/')[0]}) is training in {store.uri}",
                    mend="wait for it, stop it, or choose another --run",
                )
            if stopped():
                raise Preempted("stopped while waiting for the last attempt to be gone")
            if waiting_since_s is None:
                try:
                    silent_s = store.age_s(run.LEASE)
                except ObjectNotFound:  # given up between the two requests
                    continue
                waiting_since_s, waited_for = time.monotonic() - silent_s, version
                if silent_s < LEASE_TIME_S:
                    log.warning(
                        "the last attempt may still be alive; waiting up to %.0f s for it",
                        LEASE_TIME_S - silent_s,
                    )
            if time.monotonic() - waiting_since_s < LEASE_TIME_S:
                time.sleep(POLL_S)
                continue
        content = _Content(
            attempt=(current.attempt if current else 0) + 1,
            holder=holder,
            renewed_at=time.time(),
        )
        try:
            version = store.write(run.LEASE, content.to_json(), expected=version)
        except PreconditionFailed:
            raise Fenced(
                f"another attempt took {store.uri} at this very moment",
                mend="wait for it, stop it, or choose another --run",
            ) from None
        before = (
            Predecessor(current.attempt, current.renewed_at, current.released) if current else None
        )
        return Lease(store, content, version, on_lost, before)


def _parse(text: bytes, store: ObjectStore) -> _Content | None:
    if not text:
        return None
    try:
        return _Content.from_json(text)
    except ValueError:
        raise StorageError(
            f"{store.uri}/{run.LEASE}: not a lease of this program",
            mend="make sure no attempt is running, then delete the file",
        ) from None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _process(pid: int) -> tuple[str, str]:
    """State letter and start time of a process, fields 3 and 22 of /proc/PID/stat (proc(5)).

    Empty where there is no such file.
    """
    # The command's name, in parentheses, may itself contain spaces and parentheses.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
