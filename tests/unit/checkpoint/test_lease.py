"""Of several attempts at one run exactly one may publish."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from job import run
from job.checkpoint import lease as lease_module
from job.checkpoint.lease import Holder, acquire
from job.errors import Fenced, Preempted, StorageError
from job.storage import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def take(store, **options):
    return acquire(store, on_lost=options.pop("on_lost", lambda: None), **options)


def rewrite(store: LocalStore, **changes: object) -> None:
    """Change the lease file as another machine would."""
    raw = json.loads(store.read(run.LEASE))
    holder = {**raw["holder"], **changes.pop("holder", {})}  # type: ignore[dict-item]
    store.write(run.LEASE, json.dumps({**raw, "holder": holder, **changes}).encode())


def test_attempts_are_numbered_over_releases(store):
    for number in (1, 2, 3):
        lease = take(store)
        assert lease.attempt == number
        lease.check()
        lease.release()


def test_a_living_holder_on_this_machine_keeps_the_run(store):
    lease = take(store)
    with pytest.raises(Fenced, match="is training in") as caught:
        take(store)
    assert caught.value.exit_code == 76
    lease.check()
    lease.release()


def test_a_dead_holder_on_this_machine_is_replaced_at_once(store):
    lease = take(store)
    lease.release()
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    rewrite(store, released=False, holder={"pid": process.pid, "started": "1"})
    began = time.monotonic()
    successor = take(store)
    assert successor.attempt == 2
    assert time.monotonic() - began < lease_module.LEASE_TIME_S / 2
    successor.release()


def test_a_reused_process_number_is_not_taken_for_the_holder(store):
    take(store).release()
    me = Holder.this_process()
    rewrite(store, released=False, holder={"pid": me.pid, "started": "12345"})
    take(store).release()


def test_a_zombie_process_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.monotonic() + 20
    holder = dataclasses.replace(
        Holder.this_process(), pid=process.pid, started=lease_module._process(process.pid)[1]
    )
    while lease_module._process(process.pid)[0] != "Z":  # it has ended, nobody has waited for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert holder.is_known_dead(Holder.this_process())
    process.wait()


def test_a_silent_holder_elsewhere_is_waited_for(store, monkeypatch, caplog):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 2.0)
    take(store).release()
    rewrite(store, released=False, renewed_at=time.time(), holder={"machine": "elsewhere//"})
    began = time.monotonic()
    lease = take(store)
    assert time.monotonic() - began >= 1.0
    assert lease.attempt == 2
    assert "may still be alive" in caplog.text
    lease.release()


def test_a_holder_elsewhere_that_renews_keeps_the_run(store, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 30.0)
    take(store).release()
    rewrite(store, released=False, renewed_at=time.time(), holder={"machine": "elsewhere//"})
    timer = threading.Timer(0.3, lambda: rewrite(store, renewed_at=time.time()))
    timer.start()
    with pytest.raises(Fenced, match="elsewhere"):
        take(store)
    timer.join()


def test_waiting_can_be_stopped(store):
    take(store).release()
    rewrite(store, released=False, renewed_at=time.time(), holder={"machine": "elsewhere//"})
    with pytest.raises(Preempted):
        take(store, stopped=lambda: True)


def test_a_fenced_attempt_may_not_publish_and_is_told(store, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 0.2)
    told = threading.Event()
    old = take(store, on_lost=told.set)
    rewrite(store, attempt=2, holder={"machine": "elsewhere//"})
    with pytest.raises(Fenced, match="newer one has taken over"):
        old.check()
    assert told.wait(10)
    old.release()
    assert json.loads(store.read(run.LEASE))["attempt"] == 2, "a lost lease is not given back"


def test_of_attempts_at_the_same_moment_exactly_one_wins(store):
    results: list[object] = []
    barrier = threading.Barrier(6)

    def contend() -> None:
        barrier.wait()
        try:
            results.append(take(store))
        except Fenced as error:
            results.append(error)

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [result for result in results if not isinstance(result, Fenced)]
    assert len(winners) == 1
    winners[0].check()  # type: ignore[attr-defined]
    winners[0].release()  # type: ignore[attr-defined]


def test_a_lease_is_renewed_in_the_background(store, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 0.2)
    lease = take(store)
    before = json.loads(store.read(run.LEASE))["renewed_at"]
    deadline = time.monotonic() + 20
    while json.loads(store.read(run.LEASE))["renewed_at"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.release()


def test_a_run_deleted_under_an_attempt_is_said_to_be_deleted(store):
    lease = take(store)
    store.delete(run.LEASE)
    with pytest.raises(StorageError, match="somebody has deleted") as caught:
        lease.check()
    assert not isinstance(caught.value, Fenced)
    lease.release()


def test_a_foreign_lease_file_is_an_error(store):
    store.write(run.LEASE, b"not json")
    with pytest.raises(StorageError, match="not a lease"):
        take(store)
