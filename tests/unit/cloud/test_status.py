"""How a run is, by its files and by what Batch knows of its jobs."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from job import run
from job.checkpoint.lease import acquire
from job.cloud.machines import Prices
from job.cloud.show import cost_of, print_cost, print_run, print_runs
from job.cloud.status import RunStatus, status_of, statuses_at
from job.config import load_config
from job.errors import StorageError
from job.storage import ObjectStore, open_store
from tests.unit.cloud.test_jobs import Stub, describes, job, submitted
from tests.unit.cloud.test_jobs import store as store  # a run in a bucket

CONFIG = load_config("demo")
NOW = time.time()
Events = list[dict[str, Any]]


class FixedPrices(Prices):
    """A dollar an hour on demand, 30 cents on spot."""

    def on_demand(self, machine: str, zone: str) -> float | None:
        return 1.0 if machine == "g5.xlarge" else None

    def spot(self, machine: str, zone: str, since: float, until: float) -> float | None:
        return 0.3 if machine == "g5.xlarge" else None


def attempt(
    number: int,
    *,
    began: float,
    resumed_at: int,
    until: int,
    code: int | None = None,
    reason: str = "",
    life_cycle: str = "spot",
    machine: str = "g5.xlarge",
    **started: Any,
) -> Events:
    """Lines of an attempt that starts `began` hours ago and takes one; a minute to begin."""
    head = {"attempt": number}
    start = NOW - 3600 * began
    events: Events = [
        {"event": "attempt_started", **head, "time": start, **started},
        {
            "event": "machine",
            **head,
            "time": start,
            "instance_type": machine,
            "life_cycle": life_cycle,
            "zone": "us-east-1a",
        },
        {"event": "training_started", **head, "time": start + 60, "resumed_at": resumed_at},
        {
            "event": "train",
            "iteration": until,
            **head,
            "time": start + 3000,
            "images_per_s": 12.5,
        },
        {
            "event": "eval",
            "train_miou": 0.5,
            "iteration": until,
            **head,
            "time": start + 3060,
            "val_miou": until / 1e4,
        },
        {"event": "checkpoint", **head, "time": start + 3060, "saved_at": until},
        {"event": "note", **head, "time": start + 3600},
    ]
    if code is not None:
        ending = {"exit_code": code, "reason": reason, "fingerprint": ""}
        events.append({"event": "attempt_ended", **head, "time": start + 3600, **ending})
    return events


def lay(store: ObjectStore, *attempts: Events) -> None:
    """A run with these attempts."""
    lines = [json.dumps(event) for one in attempts for event in one]
    store.write(run.LEDGER, ("\n".join(lines) + "\n").encode())
    store.write(run.CONFIG, CONFIG.to_yaml().encode())
    store.write(run.IDENTITY, b"{}")


def looked(store: ObjectStore) -> RunStatus:
    return status_of(store, FixedPrices())


@pytest.fixture
def local(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "run"))


# ---------------------------------------------------------------- by the run's files


@pytest.mark.parametrize(
    ("code", "reason", "state", "detail"),
    [
        (75, "Stopped by SIGTERM", "stopped", "Stopped by SIGTERM"),
        (130, "", "stopped", ""),
        (70, "Loss_CE is NaN", "failed", "Loss_CE is NaN"),
        (None, "", "interrupted", "its process was killed"),
        (0, "", "finished", ""),
    ],
)
def test_how_it_ended(
    local: ObjectStore, code: int | None, reason: str, state: str, detail: str
) -> None:
    lay(local, attempt(1, began=2, resumed_at=0, until=600, code=code, reason=reason))
    if code == 0:
        local.write(run.SUMMARY, b"{}")
    found = looked(local)
    assert (found.state, found.detail) == (state, detail)
    assert (found.iteration, found.iterations) == (600, 1200)
    assert found.val_miou == 0.06
    assert found.images_per_s == 12.5
    assert found.seconds_left is None
    assert found.job_id == ""


def did_not_begin(number: int, *, began: float) -> Events:
    """Lines of an attempt whose command was mistyped."""
    head = {"attempt": number, "time": NOW - 3600 * began}
    ending = {"exit_code": 78, "reason": "x/typo: no such data folder", "fingerprint": "x"}
    return [{"event": "attempt_started", **head}, {"event": "attempt_ended", **head, **ending}]


def test_a_finished_run_stays_so_whatever_is_mistyped_later(local: ObjectStore) -> None:
    done = attempt(1, began=3, resumed_at=0, until=1200, code=0, reason="finished")
    lay(local, done, did_not_begin(2, began=1))
    local.write(run.SUMMARY, b"{}")
    found = looked(local)
    assert (found.state, found.iteration) == ("finished", 1200)
    assert found.detail == "attempt 2 did not begin: x/typo: no such data folder"


def test_a_run_that_is_not_finished_is_failed_if_it_cannot_go_on(local: ObjectStore) -> None:
    half = attempt(1, began=3, resumed_at=0, until=600, code=75, reason="SIGTERM")
    lay(local, half, did_not_begin(2, began=1))
    found = looked(local)
    assert (found.state, found.detail) == ("failed", "x/typo: no such data folder")


def test_a_finished_run_whose_summary_is_gone_is_not_called_failed(local: ObjectStore) -> None:
    lay(local, attempt(1, began=2, resumed_at=0, until=1200, code=0))
    found = looked(local)
    assert found.state == "interrupted"
    assert found.detail.startswith("it has finished, but its summary.json is gone")


def test_a_job_that_succeeded_without_a_ledger(store: ObjectStore, stub: Stub) -> None:
    store.write(run.IDENTITY, b"{}")
    submitted(store, "job-1")
    describes(stub, [job("job-1", "SUCCEEDED")])
    found = looked(store)
    assert found.state == "failed"
    assert found.detail == "its job is SUCCEEDED, but its metrics.jsonl is not there"


@pytest.mark.parametrize(
    "change", [{"renewed_at": "now"}, {"renewed_at": 1e30}, {"attempt": None}, {"holder": []}]
)
def test_a_lease_that_somebody_has_changed_is_named(
    local: ObjectStore, change: dict[str, Any]
) -> None:
    acquire(local, on_lost=lambda: None).release()
    text = {**json.loads(local.read(run.LEASE)), **change}
    local.write(run.LEASE, json.dumps(text).encode())
    with pytest.raises(StorageError, match=r"lease\.json: not a lease"):
        looked(local)


def test_a_run_that_has_not_begun(local: ObjectStore) -> None:
    local.write(run.IDENTITY, b"{}")
    found = looked(local)
    assert (found.state, found.iteration, found.iterations) == ("new", 0, None)
    assert found.attempts == ()
    assert (found.usd, found.goodput) == (None, None)


def test_a_living_process_trains_and_its_pace_tells_what_is_left(local: ObjectStore) -> None:
    lease = acquire(local, on_lost=lambda: None)
    lay(local, attempt(1, began=1, resumed_at=0, until=600))
    found = looked(local)
    lease.release()
    assert found.state == "training"
    assert found.seconds_left == pytest.approx(3000)  # as long again as the first half
    (one,) = found.attempts
    assert one.ended == ""
    assert one.seconds == pytest.approx(time.time() - one.started, abs=5)
    assert one.redone_s == 0


def test_time_and_dollars_of_all_attempts(local: ObjectStore) -> None:
    lay(
        local,
        attempt(1, began=3, resumed_at=0, until=500, code=75, reason="a spot notice. Saved."),
        attempt(2, began=2, resumed_at=500, until=800, life_cycle="on-demand", gpus=4),
        attempt(3, began=1, resumed_at=800, until=1200, code=0),
    )
    found = looked(local)
    first, second, _third = found.attempts
    assert (first.seconds, first.useful_s, first.redone_s, first.idle_s) == pytest.approx(
        (3600, 3000, 540, 60)
    )
    assert (first.usd, first.on_demand_usd) == pytest.approx((0.3, 1.0))
    assert (second.usd, second.on_demand_usd) == pytest.approx((1.0, 1.0))
    assert [one.ended for one in found.attempts] == ["a spot notice", "killed", ""]
    assert found.usd == pytest.approx(1.6)
    assert found.on_demand_usd == pytest.approx(3.0)
    assert found.goodput == pytest.approx(9000 / 10_800)
    costs = cost_of(found)
    assert costs["gpu_hours"] == pytest.approx(6)
    assert costs["useful"] == pytest.approx(5)
    assert costs["redone"] == pytest.approx((540 + 4 * 540) / 3600)
    assert costs["useful"] + costs["redone"] + costs["idle"] == pytest.approx(6)


def test_what_is_not_known_is_not_guessed(
    local: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(
        local,
        attempt(1, began=2, resumed_at=0, until=500, code=75),
        attempt(2, began=1, resumed_at=500, until=800, machine="p9.huge", code=75),
    )
    found = looked(local)
    assert found.attempts[0].usd == pytest.approx(0.3)
    assert (found.usd, found.usd_is_complete) == (pytest.approx(0.3), False)
    assert cost_of(found)["usd_is_complete"] is False
    print_cost([found], Prices())
    assert "cost at least $0.30, saved against on demand $0.70 (70%)" in capsys.readouterr().out


def test_a_ledger_that_cannot_be_read_is_named(store: ObjectStore) -> None:
    store.write(run.LEDGER, b"nonsense\n")
    with pytest.raises(StorageError, match=r"s3://bucket/runs/first/metrics\.jsonl: line 1"):
        looked(store)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"event": "train", "iteration": 1}, "images_per_s is None, not a number"),
        ({"event": "eval", "iteration": None, "val_miou": 0.5}, "iteration is None, not a number"),
        ({"event": "note", "attempt": "one"}, "attempt is 'one', not a number"),
        ({"event": "note", "time": None}, "time is None, not seconds since 1970"),
        ({"event": "note", "time": 1e30}, "time is 1e+30, not seconds since 1970"),
        ({"event": "machine", "zone": "a"}, "instance_type is None, not text"),
        ({"event": "machine", "instance_type": "g5", "zone": 5}, "zone is 5, not text"),
        ({"event": "attempt_ended", "exit_code": 0}, "reason is None, not text"),
        ({"event": "attempt_started", "gpus": "four"}, "gpus is 'four', not a number"),
        ({"event": "attempt_started", "gpus": None}, "gpus is None, not a number"),
        ({"event": "attempt_started", "nodes": 0}, "nodes is 0, not a number"),
    ],
)
def test_a_line_without_its_numbers_is_named(
    local: ObjectStore, line: dict[str, Any], said: str
) -> None:
    lay(local, [{"attempt": 1, "time": NOW, **line}])
    with pytest.raises(StorageError, match=rf"metrics\.jsonl: line 1: {re.escape(said)}"):
        looked(local)


def test_a_score_that_is_no_number_is_no_best_one(local: ObjectStore) -> None:
    lines = attempt(1, began=2, resumed_at=0, until=600)
    lay(local, [*lines, {**lines[4], "val_miou": float("nan")}])
    assert looked(local).val_miou == 0.06


# ---------------------------------------------------------------- by its jobs


@pytest.mark.parametrize(
    ("known", "state", "detail"),
    [
        (job("job-1", "SUBMITTED"), "waiting", "Batch has not looked at it yet"),
        (
            job("job-1", "RUNNABLE", statusReason="CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY - x"),
            "waiting",
            "AWS has no such machine free",
        ),
        (job("job-1", "STARTING"), "starting", "the image is being fetched"),
        (job("job-1", "RUNNING"), "starting", "has not begun with the run yet"),
        (
            job(
                "job-1",
                "FAILED",
                statusReason="Task failed to start",
                container={"reason": "CannotPullContainerError: not found"},
            ),
            "failed",
            "Task failed to start; CannotPullContainerError: not found",
        ),
        (None, "submitted", "AWS no longer knows its job"),
    ],
)
def test_before_the_run_begins_its_job_tells(
    store: ObjectStore, stub: Stub, known: Any, state: str, detail: str
) -> None:
    record = submitted(store, "job-1")
    store.write(run.job_config(record.name), CONFIG.to_yaml().encode())
    describes(stub, [known] if known else [])
    found = looked(store)
    assert found.state == state
    assert detail in found.detail
    assert (found.job_id, found.iterations) == ("job-1", 1200)


def test_a_run_that_waits_for_its_next_machine_keeps_what_it_has(
    store: ObjectStore, stub: Stub
) -> None:
    submitted(store, "job-1")
    lay(store, attempt(1, began=2, resumed_at=0, until=600, job="job-1", job_attempt=1))
    reclaimed = {"statusReason": "Host EC2 (instance i-0123) terminated.", "container": {}}
    describes(stub, [job("job-1", "PENDING", attempts=[reclaimed])])
    found = looked(store)
    assert (found.state, found.iteration) == ("waiting", 600)
    (one,) = found.attempts
    assert one.ended == "its spot machine was taken back before it could save"


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        ({"statusReason": "Job attempt duration exceeded timeout"}, "it took longer than it may"),
        ({"container": {"reason": "OutOfMemoryError: Container killed"}}, "OutOfMemoryError"),
        ({}, "killed"),
    ],
)
def test_an_attempt_that_had_no_time_for_words(
    store: ObjectStore, stub: Stub, said: dict[str, Any], ended: str
) -> None:
    submitted(store, "job-1")
    lay(store, attempt(1, began=2, resumed_at=0, until=600, job="job-1", job_attempt=1))
    describes(stub, [job("job-1", "FAILED", attempts=[said])])
    assert looked(store).attempts[0].ended.startswith(ended)


def test_tries_that_never_came_to_the_run_are_told_and_not_counted(
    store: ObjectStore, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, "job-1")
    lay(store, attempt(1, began=2, resumed_at=0, until=600, code=75, job="job-1", job_attempt=2))
    unpulled = {"startedAt": 0, "container": {"reason": "CannotPullContainerError"}}
    fenced = {"startedAt": 10_000, "stoppedAt": 190_000, "container": {"exitCode": 76}}
    ran = {"startedAt": 200_000, "stoppedAt": 900_000, "container": {"exitCode": 75}}
    describes(stub, [job("job-1", "FAILED", attempts=[unpulled, ran, fenced])])
    found = looked(store)
    assert found.unrecorded is not None
    assert (found.unrecorded.tries, found.unrecorded.seconds) == (2, 180.0)
    assert found.unrecorded.ended.startswith("exit code 76")
    assert len(found.attempts) == 1
    assert json.loads(json.dumps(found.to_dict()))["unrecorded"]["tries"] == 2
    print_run(found, FixedPrices())
    print_cost([found], FixedPrices())
    said = "not counted: 2 tries of its jobs that never came to the run, 3 min together"
    assert capsys.readouterr().out.count(said) == 2


def test_a_job_that_was_cancelled_says_so(store: ObjectStore, stub: Stub) -> None:
    submitted(store, "job-1")
    stopped = attempt(
        1, began=2, resumed_at=0, until=600, code=75, reason="Stopped by SIGTERM", job="job-1"
    )
    lay(store, stopped)
    describes(stub, [job("job-1", "FAILED", statusReason="too dear")])
    found = looked(store)
    assert (found.state, found.detail) == ("stopped", "Stopped by SIGTERM (too dear)")


def with_two_jobs(store: ObjectStore, stub: Stub, first: Any, second: Any) -> None:
    """A run that was submitted twice, as Batch describes its job-1 and job-2."""
    submitted(store, "job-1", 1)
    submitted(store, "job-2", 2)
    describes(stub, [first, second])


def test_a_new_job_that_fails_before_the_run_is_not_hidden_by_the_old_ones_end(
    store: ObjectStore, stub: Stub
) -> None:
    failed = job("job-2", "FAILED", statusReason="Task failed to start")
    with_two_jobs(store, stub, job("job-1", "FAILED"), failed)
    lay(store, attempt(1, began=2, resumed_at=0, until=600, code=75, job="job-1"))
    found = looked(store)
    assert (found.state, found.detail) == ("failed", "Task failed to start")


def test_a_job_that_came_too_late_does_not_hide_the_finished_run(
    store: ObjectStore, stub: Stub
) -> None:
    """Two were submitted at the same moment; the lease let one train."""
    late = job("job-2", "FAILED", statusReason="x")
    with_two_jobs(store, stub, job("job-1", "SUCCEEDED"), late)
    lay(store, attempt(1, began=2, resumed_at=0, until=1200, code=0, job="job-1"))
    store.write(run.SUMMARY, b"{}")
    found = looked(store)
    assert (found.state, found.detail) == ("finished", "")


def test_the_job_that_has_not_ended_is_the_one_that_counts(store: ObjectStore, stub: Stub) -> None:
    with_two_jobs(store, stub, job("job-1", "STARTING"), job("job-2", "FAILED"))
    lay(store, attempt(1, began=2, resumed_at=0, until=600, job="job-1"))
    found = looked(store)
    assert (found.state, found.job_id) == ("starting", "job-1")


def test_a_killed_run_is_where_it_would_go_on(local: ObjectStore) -> None:
    lines = attempt(1, began=2, resumed_at=0, until=600)
    lost = {**lines[3], "iteration": 700, "time": lines[3]["time"] + 500}
    lay(local, [*lines, lost])
    found = looked(local)
    assert (found.state, found.iteration) == ("interrupted", 600)


def test_goodput_is_of_gpus_not_of_attempts(local: ObjectStore) -> None:
    lay(
        local,
        attempt(1, began=2, resumed_at=0, until=600, code=75, gpus=3),
        [
            {"event": "attempt_started", "attempt": 2, "time": NOW - 3600},
            {"event": "note", "attempt": 2, "time": NOW},
        ],
    )
    found = looked(local)
    costs = cost_of(found)
    assert found.goodput == pytest.approx(costs["useful"] / costs["gpu_hours"], abs=1e-6)
    assert found.goodput == pytest.approx(3 * 3000 / (4 * 3600), abs=1e-3)


def test_a_living_attempt_is_measured_by_its_own_clock(local: ObjectStore) -> None:
    """Its machine's is two hours ahead of ours."""
    lease = acquire(local, on_lost=lambda: None)
    lay(local, attempt(1, began=-2, resumed_at=0, until=600))
    (one,) = looked(local).attempts
    lease.release()
    assert one.seconds == pytest.approx(3600)
    assert one.usd == pytest.approx(0.3)
    assert (one.useful_s, one.idle_s) == pytest.approx((3540, 60))


# ---------------------------------------------------------------- what is printed


def test_of_several_runs_a_damaged_one_is_said_to_be(
    two: list[RunStatus], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a" / run.LEDGER).write_text("nonsense\n")
    found = statuses_at(str(tmp_path), FixedPrices())
    assert [one.state for one in found] == ["unreadable", "finished"]
    assert "metrics.jsonl: line 1 is no event" in found[0].detail
    print_runs(found, str(tmp_path), Prices())
    assert "unreadable  0  " in capsys.readouterr().out
    with pytest.raises(StorageError, match="line 1 is no event"):
        statuses_at(str(tmp_path / "a"), FixedPrices())


def test_brackets_in_what_others_wrote_are_printed(
    local: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "no [red]machine[/red] :smile: [g5.xlarge]"
    lay(local, attempt(1, began=2, resumed_at=0, until=600, code=74, reason=reason))
    print_run(looked(local), Prices())
    out = capsys.readouterr().out
    assert f"failed: {reason}" in out
    assert out.count(reason) == 2


def test_without_a_spot_price_the_one_on_demand_is_a_bound(
    local: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FixedPrices, "spot", lambda *_: None)
    lay(local, attempt(1, began=2, resumed_at=0, until=600, code=75))
    found = looked(local)
    assert (found.usd, found.on_demand_usd) == (None, pytest.approx(1.0))
    print_run(found, Prices())
    assert capsys.readouterr().out.count("< $1.00") == 2


def test_several_machines_cost_several_times_as_much(
    local: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    two_machines = {"life_cycle": "on-demand", "gpus": 8, "nodes": 2}
    lay(local, attempt(1, began=2, resumed_at=0, until=600, code=75, **two_machines))
    found = looked(local)
    assert found.usd == pytest.approx(2.0)
    assert cost_of(found)["gpu_hours"] == pytest.approx(8)
    print_cost([found], Prices())
    assert "2 x g5.xlarge on-demand" in capsys.readouterr().out


def test_of_a_machine_with_more_gpus_the_share_is_counted(local: ObjectStore) -> None:
    class Dear(FixedPrices):
        def on_demand(self, machine: str, zone: str) -> float | None:
            return 8.0

    one = {"life_cycle": "on-demand", "machine": "g5.12xlarge"}
    lay(local, attempt(1, began=2, resumed_at=0, until=600, code=75, gpus=1, **one))
    prices = Dear()
    assert status_of(local, prices).usd == pytest.approx(2.0)
    assert list(prices.notes) == [
        "of a g5.12xlarge's price, 1 of its 4 GPUs are counted; what no job uses of it is paid "
        "for too"
    ]
    lay(local, attempt(1, began=2, resumed_at=0, until=600, code=75, gpus=8, nodes=2, **one))
    assert status_of(local, Dear()).usd == pytest.approx(16.0)


@pytest.fixture
def two(tmp_path: Path) -> list[RunStatus]:
    """An interrupted run and a finished one."""
    lay(open_store(str(tmp_path / "a")), attempt(1, began=2, resumed_at=0, until=600))
    done = open_store(str(tmp_path / "deep/b"))
    lay(done, attempt(1, began=2, resumed_at=0, until=1200, code=0))
    done.write(run.SUMMARY, b"{}")
    return statuses_at(str(tmp_path), FixedPrices())


def test_several_runs_are_a_table(
    two: list[RunStatus], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_runs(two, f"{tmp_path}/", Prices())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:3] == ["a", "interrupted", "600/1200"]
    assert lines[3][:2] == ["deep/b", "finished"]
    assert lines[2][-3:] == ["$0.30", "$0.70", "(70%)"]
    assert lines[4][0] == "a:"


def test_one_run_is_told_in_full(two: list[RunStatus], capsys: pytest.CaptureFixture[str]) -> None:
    prices = Prices()
    prices.notes["prices are from the table"] = None
    print_run(two[0], prices)
    out = capsys.readouterr().out
    assert "interrupted: its process was killed" in out
    assert "600/1200 (50%)" in out
    assert "$0.30, saved against on demand $0.70 (70%)" in out
    assert "g5.xlarge spot" in out
    assert "note: prices are from the table" in out


def test_costs_are_added_up(two: list[RunStatus], capsys: pytest.CaptureFixture[str]) -> None:
    print_cost(two, Prices())
    out = capsys.readouterr().out
    assert "GPU hours 1.00: useful 0.83, trained again 0.15, idle 0.02; goodput 83%" in out
    assert "together $0.60" in out


def test_all_of_it_is_json(two: list[RunStatus]) -> None:
    read = json.loads(json.dumps([one.to_dict() for one in two]))
    assert [one["state"] for one in read] == ["interrupted", "finished"]
    assert read[0]["attempts"][0]["instance_type"] == "g5.xlarge"
    assert read[0]["goodput"] == pytest.approx(0.83, abs=0.01)
    assert json.loads(json.dumps(cost_of(two[0])))["usd"] == pytest.approx(0.3)


def test_looking_at_a_run_takes_nothing_from_it(local: ObjectStore) -> None:
    lease = acquire(local, on_lost=lambda: None)
    looked(local)
    lease.check()
    lease.release()
