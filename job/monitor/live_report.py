"""The run's page while it is trained: made anew after evaluations, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from job.errors import reason

log = logging.getLogger(__name__)

EVERY_S = 30.0
"""Between two pages, at least: making one takes a second of the processor that also trains."""
CLOSE_S = 20.0


class LiveReport:
    """Does what is asked for, in order, and makes the page when there is something new.

    Args:
        make_page: makes and publishes it.
        every_s: seconds between two pages, at least; the last evaluation's may wait for the next.
    """

    def __init__(self, make_page: Callable[[], None], *, every_s: float = EVERY_S) -> None:
        self._make_page = make_page
        self._every_s = every_s
        self._made_at: float | None = None
        self._first: Callable[[], None] | None = None
        self._wanted = False
        self._closing = False
        self._failed = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="report", daemon=True)
        self._thread.start()

    def ask(self, first: Callable[[], None] | None = None) -> None:
        """Want a new page.

        Args:
            first: to be done before; takes the place of one that has not begun yet.
        """
        with self._condition:
            self._first = first or self._first
            self._wanted = True
            self._condition.notify()

    def close(self, within_s: float | None = None) -> None:
        """Wait until what is asked for is done.

        Args:
            within_s: seconds, at most; None: some.
        """
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(CLOSE_S if within_s is None else max(0.0, min(CLOSE_S, within_s)))

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._wanted or self._closing)
                if not self._wanted:
                    return
                first, self._first, self._wanted = self._first, None, False
            if first is not None:
                self._try(first)
            early = self._made_at is not None and time.monotonic() - self._made_at < self._every_s
            if not early or self._closing:
                self._try(self._make_page)
                self._made_at = time.monotonic()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a page must not end what it shows
            if not self._failed:
                log.warning("the report could not be made: %s", reason(error))
            self._failed = True
