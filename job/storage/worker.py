"""A process that fetches small objects for `job.storage.transfer`: python -m job.storage.worker FD.

One Python process cannot sign, check and write fast enough for many small files. Workers are plain
subprocesses, never forks (torch and its threads live in the parent) and not multiprocessing's,
which would import the parent's main module again. They end with the parent, however it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from job.errors import JobError
from job.storage.get import Credentials, Getter, ObjectChanged
from job.storage.units import fetch_group


def main() -> None:
    """Serve groups of units until the parent closes the connection or is gone."""
    # Ctrl-C and a scheduler's signal go to the whole process group: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection: Connection = Connection(int(sys.argv[1]))
    address, folder, threads = connection.recv()
    lanes = _Lanes(connection, Path(folder))
    lanes.getter = address.getter(lambda: lanes.credentials)
    workers = [threading.Thread(target=lanes.serve, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _end_with_parent() -> None:
    os.read(0, 1)  # the parent never writes: this returns when it closes the pipe or dies
    os._exit(0)


class _Lanes:
    """Threads that each take a group, fetch it, and send what arrived (or what went wrong)."""

    getter: Getter

    def __init__(self, connection: Connection, folder: Path) -> None:
        self.credentials: Credentials | None = None
        self._connection = connection
        self._folder = folder
        self._receiving = threading.Lock()
        self._sending = threading.Lock()

    def serve(self) -> None:
        """One lane."""
        while True:
            try:
                with self._receiving:
                    group, self.credentials = self._connection.recv()
            except (EOFError, OSError):
                return
            result: object
            try:
                result = fetch_group(self.getter, self._folder, group)
            except (JobError, ObjectChanged) as error:
                result = error
            except BaseException:
                result = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
            try:
                with self._sending:
                    self._connection.send(result)
            except OSError:
                return


if __name__ == "__main__":
    main()
