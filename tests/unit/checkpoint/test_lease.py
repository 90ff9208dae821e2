"""Of several attempts at one run exactly one may publish."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from job import run
from job.checkpoint import lease as lease_module
from job.checkpoint.lease import Holder, acquire, look
from job.drill.proxy import FaultProxy, Hold, LoseReply
from job.errors import ConfigError, Fenced, Preempted, RunDeleted, StorageError
from job.storage import ObjectStore
from job.storage.s3 import S3Store
from tests.services import wait_until
from tests.unit.stores import Passing

on_s3 = pytest.mark.parametrize("store", ["bucket"], indirect=True)


def take(store, **options):
    return acquire(store, on_lost=options.pop("on_lost", lambda: None), **options)


def rewrite(store: ObjectStore, **changes: object) -> None:
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


def test_a_dead_holder_on_this_machine_is_replaced_at_once(store, monkeypatch):
    lease = take(store)
    lease.release()
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    rewrite(store, released=False, holder={"pid": process.pid, "started": "1"})
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 1e9)
    successor = take(store)  # returns
    assert successor.attempt == 2
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
    looks: list[int] = []
    watched = Passing(store)
    watched.age_s = lambda key: 0.0
    watched.read_versioned = lambda key: (looks.append(1), store.read_versioned(key))[1]
    lease = take(watched)
    assert lease.attempt == 2
    assert len(looks) >= 2, "it was looked at again before it was taken"
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
    with pytest.raises(RunDeleted, match="somebody has deleted") as caught:
        lease.check()
    assert caught.value.exit_code == 74
    lease.release()


def test_a_foreign_lease_file_is_an_error(store):
    store.write(run.LEASE, b"not json")
    with pytest.raises(StorageError, match="not a lease"):
        take(store)


# ---------------------------------------------------------------- attempts of a scheduler's job


@pytest.fixture
def attempt(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes the lease as that try of a job, on a machine of its own."""

    def take_as(number: int, job: str = "job", **options: Any) -> Any:
        with monkeypatch.context() as batch:
            batch.setenv("AWS_BATCH_JOB_ID", job)
            batch.setenv("AWS_BATCH_JOB_ATTEMPT", str(number))
            batch.setattr("socket.gethostname", lambda: f"host{number}")
            return take(store, **options)

    return take_as


def test_the_next_try_of_a_job_takes_over_at_once(attempt):
    told = threading.Event()
    first = attempt(1, on_lost=told.set)
    second = attempt(2)  # does not wait for the lease time
    assert (first.attempt, second.attempt) == (1, 2)
    assert second.predecessor.attempt == 1
    assert not second.predecessor.released
    with pytest.raises(Fenced):
        first.check()
    second.check()
    first.release()
    second.check()
    second.release()


def test_an_earlier_or_equal_try_of_a_job_is_refused(attempt):
    second = attempt(2)
    for number in (1, 2):
        with pytest.raises(Fenced, match="host2"):
            attempt(number)
    second.check()
    second.release()


def test_another_job_waits_for_the_lease_time(attempt, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 4.0)
    first = attempt(1)
    with pytest.raises(Fenced):  # the first one has renewed it meanwhile
        attempt(1, job="another")
    first.release()
    attempt(1, job="another").release()


def test_a_number_that_is_none_is_no_attempt(monkeypatch):
    monkeypatch.setenv("AWS_BATCH_JOB_ATTEMPT", "x")
    assert Holder.this_process().job_attempt == 0


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_is_hours_off_makes_no_difference(store, monkeypatch, hours):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 2.0)
    take(store).release()
    rewrite(
        store,
        released=False,
        renewed_at=time.time() + hours * 3600,
        holder={"machine": "elsewhere//"},
    )
    lease = take(store)  # neither never nor at once: it is waited for
    assert lease.attempt == 2
    lease.check()
    lease.release()


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_is_hours_off_takes_nothing_from_a_living_holder(store, monkeypatch, hours):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 30.0)
    take(store).release()
    rewrite(store, released=False, renewed_at=0, holder={"machine": "elsewhere//"})
    renewed_at = time.time() + hours * 3600
    timer = threading.Timer(0.3, lambda: rewrite(store, renewed_at=renewed_at))
    timer.start()
    with pytest.raises(Fenced, match="elsewhere"):
        take(store)
    timer.join()


# ---------------------------------------------------------------- what only its holder may write


def test_only_the_holder_publishes(store, attempt):
    first = attempt(1)
    version = first.publish("key", b"1", "")
    second = attempt(2)
    second.publish("key", b"2", version)
    with pytest.raises(Fenced):
        first.publish("key", b"3", version)
    assert store.read("key") == b"2"
    first.release()
    second.release()


def test_the_holder_overrides_what_a_stale_attempt_wrote(store, attempt):
    lease = attempt(1)
    version = lease.publish("key", b"1", "")
    store.write("key", b"stale")
    lease.publish("key", b"2", version)
    assert store.read("key") == b"2"
    store.delete("key")
    lease.publish("key", b"3", version)
    assert store.read("key") == b"3"
    lease.release()


def test_who_knows_that_it_is_fenced_writes_nothing_even_where_nobody_has(store, attempt):
    first = attempt(1)
    second = attempt(2)
    with pytest.raises(Fenced):
        first.check()
    with pytest.raises(Fenced):
        first.publish("key", b"1", "")
    assert store.stat("key") is None
    first.release()
    second.release()


# ---------------------------------------------------------------- renewals


class Unreliable(Passing):
    """Conditional writes of the lease fail, before or after they have arrived."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.error: Exception | None = None
        self.arrives = True
        self.failed = 0

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> str:
        error = self.error
        if error is None or self.arrives:
            version = self.inner.write(key, data, expected=expected)
        if error is not None:
            self.failed += 1
            raise error
        return version


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("error", [StorageError("no reply"), ConfigError("keys are renewed")])
def test_renewals_that_fail_or_whose_replies_are_lost_fence_nobody(
    store, monkeypatch, caplog, arrives, error
):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 0.2)
    told = threading.Event()
    unreliable = Unreliable(store)
    lease = take(unreliable, on_lost=told.set)
    unreliable.arrives = arrives
    unreliable.error = error
    wait_until(lambda: unreliable.failed >= 3)
    with pytest.raises(type(error)):
        lease.check()
    unreliable.error = None
    lease.check()
    before = json.loads(store.read(run.LEASE))["renewed_at"]
    wait_until(lambda: json.loads(store.read(run.LEASE))["renewed_at"] != before)
    assert "lease not renewed, trying again" in caplog.text
    assert not told.is_set()
    lease.release()
    assert json.loads(store.read(run.LEASE))["released"]


def test_a_release_that_fails_is_no_error(store, caplog):
    caplog.set_level("INFO")
    unreliable = Unreliable(store)
    lease = take(unreliable)
    unreliable.error = ConfigError("keys are gone")
    lease.release()
    assert "lease not released: keys are gone" in caplog.text
    assert not lease._thread.is_alive()


@on_s3
def test_replies_lost_on_the_network_fence_nobody(
    store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda *_, **__: 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
    through = S3Store(store.uri)
    fault_proxy.add(LoseReply(method="PUT"))
    lease = take(through)  # its very first write
    for times in (1, 3, 6, None):
        lost = fault_proxy.add(LoseReply(method="PUT", match=run.LEASE, times=times))
        if times is None:
            with pytest.raises(StorageError):
                lease.check()
        else:
            lease.check()
        assert lost.fired >= 1
        lost.remove()
    lease.check()
    lease.release()
    assert json.loads(store.read(run.LEASE))["attempt"] == 1
    through.client.close()


@on_s3
def test_a_renewal_that_arrives_after_the_lease_was_taken_over_changes_nothing(
    store, attempt, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    """A zombie on a slow network."""
    with monkeypatch.context() as slow:
        slow.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
        through = S3Store(store.uri)
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "job")
    monkeypatch.setenv("AWS_BATCH_JOB_ATTEMPT", "1")
    zombie = take(through)
    monkeypatch.delenv("AWS_BATCH_JOB_ID")
    held = fault_proxy.add(Hold(method="PUT", match=run.LEASE))
    caught: list[BaseException] = []

    def renew() -> None:
        try:
            zombie.check()
        except Fenced as error:
            caught.append(error)

    thread = threading.Thread(target=renew)
    thread.start()
    assert held.reached.wait(60)
    successor = attempt(2)
    taken = store.read(run.LEASE)
    held.release()
    thread.join(60)
    assert isinstance(caught[0], Fenced)
    assert store.read(run.LEASE) == taken
    successor.check()
    zombie.release()
    successor.release()
    through.client.close()


def test_a_deleted_lease_can_be_taken_again(store):
    lease = take(store)
    store.delete(run.LEASE)
    with pytest.raises(RunDeleted, match="somebody has deleted"):
        lease.check()
    again = take(store)
    assert again.predecessor is None
    with pytest.raises(StorageError):
        # Both are attempt 1 of this process; what tells them apart is the version.
        store.write(run.LEASE, b"", expected=lease._version)
    again.check()
    again.release()
    lease.release()


def test_a_lease_deleted_while_it_is_waited_for_is_free(store, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 3600.0)
    monkeypatch.setattr(lease_module, "POLL_S", 0.05)
    take(store).release()
    rewrite(store, released=False, holder={"machine": "elsewhere//"})
    timer = threading.Timer(0.3, lambda: store.delete(run.LEASE))
    timer.start()
    take(store).release()
    timer.join()


def test_a_lease_released_while_it_is_waited_for_is_taken(store, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 3600.0)
    monkeypatch.setattr(lease_module, "POLL_S", 0.05)
    take(store).release()
    rewrite(store, released=False, holder={"machine": "elsewhere//"})
    timer = threading.Timer(0.3, lambda: rewrite(store, released=True))
    timer.start()
    lease = take(store)
    timer.join()
    assert lease.predecessor.released
    lease.release()


# ---------------------------------------------------------------- looking without taking


def test_a_run_that_nobody_ever_had(store):
    assert look(store) is None


def test_who_looks_sees_a_living_holder_and_takes_nothing(store):
    lease = take(store)
    seen = look(store)
    assert (seen.attempt, seen.is_live) == (1, True)
    assert seen.holder.process_here() == os.getpid()
    lease.check()
    lease.release()
    assert not look(store).is_live


def test_who_looks_sees_that_the_holder_is_dead(store):
    take(store).release()
    rewrite(store, released=False, holder={"pid": 2**22 + 1})
    seen = look(store)
    assert not seen.is_live
    assert seen.holder.process_here() is None


def test_who_looks_sees_that_a_silent_holder_is_still_there(store, monkeypatch):
    """A process that was stopped, not killed (SIGSTOP), renews nothing and goes on some day."""
    lease = take(store)
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 0.0)
    assert look(store).is_live
    lease.release()


def test_who_looks_sees_a_holder_elsewhere_until_it_falls_silent(store, monkeypatch):
    take(store).release()
    rewrite(store, released=False, holder={"machine": "elsewhere/boot/pid"})
    seen = look(store)
    assert seen.is_live
    assert seen.holder.process_here() is None
    monkeypatch.setattr(lease_module, "LEASE_TIME_S", 0.0)
    assert not look(store).is_live
