"""The report while training goes on: off its thread, not too often, never in its way."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from job.monitor.live_report import LiveReport
from tests.services import wait_until


def test_a_page_is_made_when_there_is_something_new() -> None:
    pages: list[str] = []
    live = LiveReport(lambda: pages.append("page"), every_s=0, settle_s=0)
    live.ask(lambda: pages.append("first"))
    wait_until(lambda: pages == ["first", "page"])
    live.ask()
    wait_until(lambda: pages == ["first", "page", "page"])
    live.close()
    assert len(pages) == 3
    assert not live._thread.is_alive()


def test_asking_does_not_wait_and_the_newest_counts() -> None:
    go, begun = threading.Event(), threading.Event()
    done: list[Any] = []

    def slow() -> None:
        begun.set()
        go.wait()

    live = LiveReport(slow, every_s=0, settle_s=0)
    live.ask()
    assert begun.wait(10)
    for number in range(5):
        live.ask(lambda number=number: done.append(number))
    live.ask()  # nothing new to be done before, but what was asked for is not forgotten
    go.set()
    wait_until(lambda: done == [4])
    live.close()


def test_pages_are_not_made_too_often_but_what_comes_first_is_done() -> None:
    pages: list[str] = []
    live = LiveReport(lambda: pages.append("page"), every_s=1000, settle_s=0)
    live.ask()
    wait_until(lambda: pages == ["page"])
    live.ask(lambda: pages.append("first"))
    wait_until(lambda: pages == ["page", "first"])
    live.close()
    assert pages == ["page", "first"]


def test_a_page_that_came_too_early_comes_later() -> None:
    pages: list[str] = []
    live = LiveReport(lambda: pages.append("page"), every_s=0.2, settle_s=0)
    live.ask()
    wait_until(lambda: pages == ["page"])
    live.ask()
    wait_until(lambda: pages == ["page", "page"])
    live.close()


def test_at_the_end_no_page_is_made_but_what_comes_first_is_done() -> None:
    pages: list[str] = []
    live = LiveReport(lambda: pages.append("page"), settle_s=1000)
    live.ask(lambda: pages.append("first"))
    live.close()
    assert pages == ["first"]


def test_a_page_that_fails_is_said_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def broken() -> None:
        tried.append(1)
        raise ValueError("no room")

    live = LiveReport(broken, every_s=0, settle_s=0)
    for count in (1, 2):
        live.ask()
        wait_until(lambda count=count: len(tried) == count)
    live.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the report could not be made: no room"
    ]


def test_when_time_is_short_the_end_does_not_wait() -> None:
    go = threading.Event()
    live = LiveReport(lambda: go.wait() and None, every_s=0, settle_s=0)
    live.ask()
    live.close(within_s=0.0)
    go.set()
