"""Moves many small and few large objects into a folder, each verified before it has its name.

Small ones are shared out in groups to threads, of worker processes where there are many; large
ones go in chunks (`job.storage.large`). All of it can be stopped at any moment, and killed.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.connection
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from job.errors import Preempted, StorageError
from job.heartbeat import beat
from job.storage.get import Address, Credentials
from job.storage.large import fetch_large
from job.storage.units import SPAN_BYTES, Arrived, Member, Span, Whole, fetch_group

POLL_S = 0.2
THREADS = 8
"""Of each process."""
MAX_PROCESSES = 8
PROCESSES_FROM = 500
"""Files; fewer are not worth the 0.2 s that a process takes to start."""
GROUP = 8
SPAN_GAP_BYTES = 64 * 2**10
SPAN_MEMBERS = 256
LARGE_AT_ONCE = 4
"""Large objects; their chunks share THREADS threads."""

Group = tuple[Whole | Span, ...]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Origin:
    """Where objects come from."""

    address: Address
    credentials: Callable[[], Credentials | None]
    """Asked again and again, for they expire."""


def transfer(
    origin: Origin,
    units: Sequence[Whole | Span],
    folder: Path,
    *,
    arrived: Callable[[Sequence[Arrived]], None],
    came: Callable[[int], None] = lambda size: None,
    stopped: Callable[[], bool] = lambda: False,
    lock: int | None = None,
    processes: int | None = None,
) -> None:
    """Fetch all units into a folder. Both callbacks are called by one thread at a time.

    Args:
        origin: where from.
        units: small, large and packed objects, mixed.
        folder: where to; folders in it are made.
        arrived: told of complete and verified files.
        came: told of the bytes of large objects as they come; negative when some were wrong. Those
            of small ones come with `arrived`.
        stopped: asked several times a second.
        lock: descriptor of a lock on the folder; worker processes inherit it, so that it lasts
            until the last of them has written, even if this process is killed.
        processes: how many workers; by default as many as there are cores, none for a few files.

    Raises:
        ObjectChanged: an object is not the listed one any more, or is gone.
        StorageError: one cannot be fetched or does not verify, or the folder cannot be written.
        Preempted: stopped; what has arrived stays.
    """
    large = [unit for unit in units if isinstance(unit, Whole) and unit.is_large]
    small = [unit for unit in units if not (isinstance(unit, Whole) and unit.is_large)]
    if processes is None:
        files = sum(len(unit.members) if isinstance(unit, Span) else 1 for unit in small)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        processes = min(cores, MAX_PROCESSES) if files >= PROCESSES_FROM else 0

    def came_in(size: int) -> None:
        beat()
        came(size)

    if small:
        groups = list(_groups(small))
        if processes:
            results = _in_processes(origin, folder, groups, processes, stopped, lock)
        else:
            results = _in_threads(origin, folder, groups, stopped)
        with contextlib.closing(results):
            for result in results:
                beat()
                arrived(result)
    if large:
        _fetch_all_large(origin, folder, large, arrived, came_in, stopped)


def spans(key: str, etag: str, members: Iterable[Member]) -> Iterator[Span]:
    """Stretches of a shard that bring these members; what lies between may be fetched with them.

    Args:
        key: of the shard.
        etag: of the shard.
        members: sorted by offset.
    """
    chosen: list[Member] = []
    for member in members:
        if chosen:
            first, end = chosen[0].offset, chosen[-1].offset + chosen[-1].size
            far = member.offset - end > SPAN_GAP_BYTES
            long = member.offset + member.size - first > SPAN_BYTES
            if far or long or len(chosen) == SPAN_MEMBERS:
                yield Span(key, etag, tuple(chosen))
                chosen = []
        chosen.append(member)
    if chosen:
        yield Span(key, etag, tuple(chosen))


def _groups(units: Sequence[Whole | Span]) -> Iterator[Group]:
    wholes = (unit for unit in units if isinstance(unit, Whole))
    while group := tuple(itertools.islice(wholes, GROUP)):
        yield group
    yield from ((unit,) for unit in units if isinstance(unit, Span))


# ---------------------------------------------------------------- threads


def _in_threads(
    origin: Origin, folder: Path, groups: Sequence[Group], stopped: Callable[[], bool]
) -> Generator[list[Arrived], None, None]:
    getter = origin.address.getter(origin.credentials)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = {pool.submit(fetch_group, getter, folder, group) for group in groups}
        try:
            yield from _results(waiting, stopped)
        except BaseException:
            # Nothing may be written after we have left: break off what hangs on the network.
            pool.shutdown(wait=False, cancel_futures=True)
            getter.stop()
            raise
        finally:
            pool.shutdown()
            getter.close()


def _results(waiting: set[Future[_Result]], stopped: Callable[[], bool]) -> Iterator[_Result]:
    """Results as they come; the first error is raised, and so is Preempted."""
    while waiting:
        done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()
        if stopped():
            raise _stopped()


def _stopped() -> Preempted:
    return Preempted("stopped while data was fetched; run the same command again")


def _fetch_all_large(
    origin: Origin,
    folder: Path,
    units: Sequence[Whole],
    arrived: Callable[[Sequence[Arrived]], None],
    came: Callable[[int], None],
    stopped: Callable[[], bool],
) -> None:
    getter = origin.address.getter(origin.credentials)
    lock = threading.Lock()

    def locked_came(size: int) -> None:
        with lock:
            came(size)

    def fetch(unit: Whole, chunks: ThreadPoolExecutor) -> Arrived:
        return fetch_large(getter, folder, unit, chunks, came=locked_came)

    with ThreadPoolExecutor(THREADS) as chunks, ThreadPoolExecutor(LARGE_AT_ONCE) as pool:
        waiting = {pool.submit(fetch, unit, chunks) for unit in units}
        try:
            for result in _results(waiting, stopped):
                with lock:
                    arrived([result])
        except BaseException:
            # The first error is the cause; what the others say when they are broken off is not.
            pool.shutdown(wait=False, cancel_futures=True)
            getter.stop()
            raise
        finally:
            pool.shutdown()
            chunks.shutdown()
            getter.close()


# ---------------------------------------------------------------- processes


def _in_processes(
    origin: Origin,
    folder: Path,
    groups: Sequence[Group],
    processes: int,
    stopped: Callable[[], bool],
    lock: int | None,
) -> Generator[list[Arrived], None, None]:
    first = (origin.address, str(folder), THREADS)
    queue = iter(groups)
    with contextlib.ExitStack() as stack:
        workers = {}
        for _ in range(processes):
            worker = stack.enter_context(_Worker(first, lock))
            workers[worker.connection] = worker
            # One more than it has threads, so that none waits; so few that sending never blocks.
            for group in itertools.islice(queue, THREADS + 1):
                worker.send(group, origin.credentials())
        while any(worker.owed for worker in workers.values()):
            for ready in multiprocessing.connection.wait(list(workers), timeout=POLL_S):
                worker = workers[ready]  # type: ignore[index]
                result = worker.receive()
                for group in itertools.islice(queue, 1):
                    worker.send(group, origin.credentials())
                yield result
            if stopped():
                raise _stopped()


class _Worker:
    """A worker process for the length of a `with` block; killed at its end."""

    def __init__(self, first: object, lock: int | None) -> None:
        self.owed = 0
        """Groups sent and not answered."""
        self.connection: Connection
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "job.storage.worker", str(theirs.fileno())],
                stdin=subprocess.PIPE,  # its end tells the worker that we are gone
                pass_fds=[theirs.fileno(), *([] if lock is None else [lock])],
            )
        self.connection.send(first)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.connection.close()

    def send(self, group: Group, credentials: Credentials | None) -> None:
        """Give it a group to fetch."""
        self.owed += 1
        with contextlib.suppress(OSError):  # it has died: `receive` will say so
            self.connection.send((group, credentials))

    def receive(self) -> list[Arrived]:
        """What came of one of the groups.

        Raises:
            JobError, ObjectChanged: what went wrong with it.
        """
        try:
            result = self.connection.recv()
        except (EOFError, OSError):
            raise StorageError(
                f"a process that fetches data ended with status {self._process.wait()}",
                mend="look for what killed it (little memory?); the same command then goes on",
            ) from None
        self.owed -= 1
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, list)
        return result
