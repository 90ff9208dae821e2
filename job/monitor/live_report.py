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
SETTLE_S = 2.0
"""After an evaluation: those of a small run come fast, and its last page is made at its end."""
CLOSE_S = 20.0


class LiveReport:
    """Does what is asked for, and then makes the page.

    Args:
        make_page: makes and publishes it.
        every_s: seconds between two pages, at least.
        settle_s: seconds between asking and the page, at least.
    """

    def __init__(
        self,
        make_page: Callable[[], None],
        *,
        every_s: float = EVERY_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._make_page = make_page
        self._every_s = every_s
        self._settle_s = settle_s
        self._first: Callable[[], None] | None = None
        self._due_at: float | None = None
        self._not_before = 0.0
        self._closing = False
        self._failed = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="report", daemon=True)
        self._thread.start()

    def ask(self, first: Callable[[], None] | None = None) -> None:
        """Want a new page, soon.

        Args:
            first: to be done before, at once; takes the place of one that has not begun yet.
        """
        with self._condition:
            self._first = first or self._first
            self._due_at = self._due_at or time.monotonic() + self._settle_s
            self._condition.notify()

    def close(self, within_s: float | None = None) -> None:
        """Do what was to be done first, but make no page: whoever ends a run makes its last one.

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
                while self._first is None and not self._closing and not self._is_due():
                    self._condition.wait(self._patience_s())
                first, self._first = self._first, None
                is_due = self._is_due() and not self._closing
                if is_due:
                    self._due_at = None
                if first is None and self._closing:
                    return
            if first is not None:
                self._try(first)
            if is_due:
                self._try(self._make_page)
                self._not_before = time.monotonic() + self._every_s

    def _is_due(self) -> bool:
        return self._due_at is not None and time.monotonic() >= max(self._due_at, self._not_before)

    def _patience_s(self) -> float | None:
        """Until the next page; None if none is wanted."""
        if self._due_at is None:
            return None
        return max(0.0, max(self._due_at, self._not_before) - time.monotonic())

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a page must not end what it shows
            if not self._failed:
                log.warning("the report could not be made: %s", reason(error))
            self._failed = True
