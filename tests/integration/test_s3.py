"""Whole runs in a bucket of a real S3 server, by a job that may do no more than it must."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job import run
from job.drill.attempt import AttemptProcess
from job.drill.imds import FakeImds
from job.drill.proof import compare_runs
from job.drill.proxy import CutUpload, FaultProxy, Hold, LoseReply, Status, Throttle
from job.drill.seaweed import Identity, SeaweedServer
from job.preemption.spot import POLL_S
from job.storage.pull import pull
from job.storage.s3 import S3Store
from tests.conftest import write_data
from tests.integration.conftest import Ended, command
from tests.services import BUCKET, JOB, s3_client, wait_until

ITERATIONS = 40
DATA = f"s3://{BUCKET}/data/scenes"
RUN = f"s3://{BUCKET}/runs/first"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data in a folder, and a run in a folder that was never stopped."""
    folder = tmp_path_factory.mktemp("twin")
    data = write_data(folder / "data")
    attempt = AttemptProcess(command(data, folder / "run", train__iterations=ITERATIONS))
    assert attempt.finish() == 0, attempt.output
    return data, folder / "run"


@pytest.fixture
def uploaded(twin: tuple[Path, Path], bucket: str, s3_server: SeaweedServer) -> str:
    """The same data in the bucket, put there by its administrator."""
    data, _ = twin
    with s3_client(s3_server) as client:
        for path in sorted(data.rglob("*")):
            if path.is_file():
                key = f"data/scenes/{path.relative_to(data).as_posix()}"
                client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    return DATA


class Cloud:
    """Starts attempts as a job in the cloud would run: its identity, its network, its disk."""

    def __init__(
        self,
        start: Any,
        s4gan: Any,
        monkeypatch: pytest.MonkeyPatch,
        server: SeaweedServer,
        proxy: FaultProxy,
        scratch: Path,
    ) -> None:
        self._start = start
        self._s4gan = s4gan
        self._monkeypatch = monkeypatch
        self._server = server
        self._proxy = proxy
        self._scratch = scratch
        self._jobs = 0

    def __call__(
        self,
        *,
        identity: Identity = JOB,
        job_attempt: int | None = None,
        environment: dict[str, str] | None = None,
        data: str = DATA,
        run_uri: str = RUN,
        arguments: tuple[str, ...] = (),
        **changes: Any,
    ) -> AttemptProcess:
        self._jobs += 1
        changes.setdefault("train__iterations", ITERATIONS)
        attempt: AttemptProcess = self._start(
            [*command(data, run_uri, **changes), *arguments],
            environment=self._environment(identity, job_attempt or self._jobs)
            | (environment or {}),
        )
        return attempt

    def refuses(
        self,
        *,
        data: str = DATA,
        run_uri: str = RUN,
        environment: dict[str, str] | None = None,
        **changes: Any,
    ) -> Ended:
        """An attempt that ends before it trains, in this process."""
        self._jobs += 1
        for name, value in (self._environment(JOB, self._jobs) | (environment or {})).items():
            self._monkeypatch.setenv(name, value)
        changes.setdefault("train__iterations", ITERATIONS)
        ended: Ended = self._s4gan(command(data, run_uri, **changes))
        assert "Traceback" not in ended.err
        assert "Iter 1/" not in ended.out
        return ended

    def _environment(self, identity: Identity, job_attempt: int) -> dict[str, str]:
        return {
            **self._server.environment(identity),
            "AWS_ENDPOINT_URL": self._proxy.endpoint,
            "S4GAN_SCRATCH": str(self._scratch),
            "AWS_BATCH_JOB_ID": "11111111-2222",
            "AWS_BATCH_JOB_ATTEMPT": str(job_attempt),
        }


@pytest.fixture
def cloud(
    start: Any,
    s4gan: Any,
    monkeypatch: pytest.MonkeyPatch,
    s3_server: SeaweedServer,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    uploaded: str,
) -> Cloud:
    return Cloud(start, s4gan, monkeypatch, s3_server, fault_proxy, tmp_path / "scratch")


@pytest.fixture
def store(s3_env: dict[str, str]) -> Iterator[S3Store]:
    """The run, as its administrator sees it."""
    opened = S3Store(RUN)
    with contextlib.closing(opened.client):
        yield opened


def ledger(store: S3Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read(run.LEDGER).splitlines()]


def notice_comes(attempt: AttemptProcess, imds: FakeImds, in_s: float) -> None:
    """At the next poll, before which a fast machine would be done: the attempt stands still."""
    attempt.send(signal.SIGSTOP)
    imds.notice(in_s + POLL_S)
    time.sleep(POLL_S)
    attempt.send(signal.SIGCONT)


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


@pytest.mark.slow
def test_a_job_with_least_privilege_is_interrupted_and_ends_as_its_twin(
    twin: tuple[Path, Path],
    cloud: Cloud,
    fault_proxy: FaultProxy,
    imds: FakeImds,
    store: S3Store,
    tmp_path: Path,
) -> None:
    """SIGTERM, SIGKILL and a spot notice, each with a network that misbehaves."""
    attempt = cloud()
    attempt.wait_for_iteration(8)
    fault_proxy.add(Status(status=503, method="PUT", times=4))
    attempt.send(signal.SIGTERM)
    assert attempt.finish() == 75, attempt.output
    fault_proxy.clear()

    fault_proxy.forget()
    attempt = cloud()
    attempt.wait_for(r"resuming after iteration \d+")
    attempt.wait_for_iteration(17)
    gets = [r for r in fault_proxy.requests if r.method == "GET" and "/data/" in r.path]
    assert [r for r in gets if "list-type" not in r.query] == [], "data on this disk came again"
    fault_proxy.add(LoseReply(method="PUT", match=run.LATEST_POINTER))
    attempt.send(signal.SIGKILL)
    attempt.finish()
    fault_proxy.clear()

    attempt = cloud(environment=imds.environment())
    attempt.wait_for_iteration(26)
    fault_proxy.add(CutUpload(method="PUT", match="state.pth", after_bytes=9_000))
    notice_comes(attempt, imds, 120)
    assert attempt.finish() == 75, attempt.output
    assert "Spot notice: this machine will terminate" in attempt.output
    fault_proxy.clear()

    attempt = cloud()
    assert attempt.finish() == 0, attempt.output

    events = ledger(store)
    assert [event["attempt"] for event in of(events, "attempt_started")] == [1, 2, 3, 4]
    assert [event["exit_code"] for event in of(events, "attempt_ended")] == [75, 75, 0]
    (in_time,) = of(events, "saved_in_time")
    assert 0 < in_time["seconds_left"] < 120
    resumed = of(events, "training_started")[-1]["resumed_at"]
    assert resumed == in_time["saved_at"], "a notice loses nothing"
    assert all(event["pause_s"] >= 0 for event in of(events, "checkpoint"))

    recovery = {
        info.key.split("/")[1] for info in store.list(run.CHECKPOINTS) if "state" in info.key
    }
    assert len(recovery) == 3, "older ones are deleted"
    files = pull(RUN, tmp_path / "pulled", everything=True).files
    assert {file.name for file in files} >= {"best_model.pth", "checkpoint_40.pth", "report.html"}
    assert compare_runs(tmp_path / "pulled", twin[1], ITERATIONS) == []


@pytest.mark.slow
def test_a_notice_too_late_for_a_save_is_admitted(
    cloud: Cloud, imds: FakeImds, fault_proxy: FaultProxy, store: S3Store
) -> None:
    attempt = cloud(environment=imds.environment())
    attempt.wait_for_iteration(9)
    wait_until(lambda: store.stat(run.LATEST_POINTER) is not None)
    held = fault_proxy.add(Hold(method="PUT", match="state.pth", times=None))
    notice_comes(attempt, imds, 2)
    assert attempt.finish() == 75, attempt.output
    held.remove()
    assert "warning: no time to save iteration" in attempt.output
    resumed = cloud()
    line = resumed.wait_for(r"resuming after iteration \d+")
    saved = int(line.partition("iteration ")[2].split()[0])
    assert f"saved after iteration {saved} of 40" in attempt.output
    (skipped,) = of(ledger(store), "save_skipped")
    assert skipped["reached"] > saved


@pytest.mark.slow
def test_a_notice_comes_while_a_slow_network_carries_an_upload(
    twin: tuple[Path, Path],
    cloud: Cloud,
    imds: FakeImds,
    fault_proxy: FaultProxy,
    store: S3Store,
    tmp_path: Path,
) -> None:
    """An upload takes five seconds, longer than the training between two saves."""
    fault_proxy.add(Throttle(800_000, method="PUT", times=None))
    attempt = cloud(environment=imds.environment())
    part = Hold(method="PUT", match="state.pth", at="upload", after_bytes=400_000)
    on_the_wire = fault_proxy.add(part)
    assert on_the_wire.reached.wait(120)
    notice_comes(attempt, imds, 120)
    on_the_wire.release()
    assert attempt.finish() == 75, attempt.output
    fault_proxy.clear()
    (in_time,) = of(ledger(store), "saved_in_time")
    resumed = cloud()
    resumed.wait_for(f"resuming after iteration {in_time['saved_at']} of")
    assert resumed.finish() == 0, resumed.output
    pull(RUN, tmp_path / "pulled", everything=True)
    assert compare_runs(tmp_path / "pulled", twin[1], ITERATIONS) == []


@pytest.mark.slow
def test_a_zombie_wakes_after_its_successor_and_publishes_nothing(
    twin: tuple[Path, Path], cloud: Cloud, store: S3Store, tmp_path: Path
) -> None:
    zombie = cloud(job_attempt=1)
    zombie.wait_for_iteration(9)
    zombie.send(signal.SIGSTOP)
    successor = cloud(job_attempt=2)
    successor.wait_for(r"^attempt 2: resuming after iteration|^Iter 1/")
    zombie.send(signal.SIGCONT)
    assert zombie.finish() == 76, zombie.output
    assert successor.finish() == 0, successor.output
    pull(RUN, tmp_path / "pulled", everything=True)
    assert compare_runs(tmp_path / "pulled", twin[1], ITERATIONS) == []


@pytest.mark.slow
def test_an_older_try_of_the_job_is_refused(cloud: Cloud) -> None:
    newer = cloud(job_attempt=2, train__iterations=4000)
    newer.wait_for_iteration(2)
    older = cloud(job_attempt=1, train__iterations=4000)
    assert older.finish() == 76
    assert "is training in" in older.output
    newer.send(signal.SIGTERM)
    assert newer.finish() == 75


@pytest.mark.slow
def test_of_two_attempts_at_the_same_moment_one_trains(cloud: Cloud) -> None:
    both = [cloud(job_attempt=1), cloud(job_attempt=1)]
    codes = sorted(attempt.finish() for attempt in both)
    assert codes == [0, 76], [attempt.output for attempt in both]


@pytest.mark.slow
def test_sigterm_while_the_state_is_restored(cloud: Cloud, fault_proxy: FaultProxy) -> None:
    attempt = cloud()
    attempt.wait_for_iteration(8)
    attempt.send(signal.SIGTERM)
    assert attempt.finish() == 75
    held = fault_proxy.add(Hold(method="GET", match="state.pth"))
    attempt = cloud()
    assert held.reached.wait(120)
    attempt.send(signal.SIGTERM)
    held.release()
    assert attempt.finish() == 75, attempt.output
    assert "before training began" in attempt.output
    resumed = cloud()
    resumed.wait_for(r"resuming after iteration \d+")
    resumed.send(signal.SIGTERM)
    assert resumed.finish() == 75


@pytest.mark.slow
def test_sigterm_during_an_evaluation(
    twin: tuple[Path, Path], cloud: Cloud, tmp_path: Path, s3_env: dict[str, str]
) -> None:
    attempt = cloud()
    attempt.wait_for("Evaluating at iteration 20")
    attempt.send(signal.SIGTERM)
    assert attempt.finish() == 75, attempt.output
    assert cloud().finish() == 0
    pull(RUN, tmp_path / "pulled", everything=True)
    assert compare_runs(tmp_path / "pulled", twin[1], ITERATIONS) == []


@pytest.mark.slow
def test_training_goes_on_while_storage_is_down(
    twin: tuple[Path, Path],
    cloud: Cloud,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    s3_env: dict[str, str],
) -> None:
    attempt = cloud()
    attempt.wait_for_iteration(8)
    fault_proxy.down = True
    attempt.wait_for_iteration(30)
    fault_proxy.down = False
    assert attempt.finish() == 0, attempt.output
    pull(RUN, tmp_path / "pulled", everything=True)
    assert compare_runs(tmp_path / "pulled", twin[1], ITERATIONS) == []


# ---------------------------------------------------------------- what the user can get wrong

READER = Identity("reader", "readerkey", "readersecret", (f"Read:{BUCKET}", f"List:{BUCKET}"))


@pytest.mark.parametrize(
    ("arrange", "code", "named", "mend"),
    [
        (
            {"environment": {"AWS_SECRET_ACCESS_KEY": "wrong"}},
            78,
            "the AWS credentials are not valid here (SignatureDoesNotMatch)",
            "AWS_SECRET_ACCESS_KEY",
        ),
        (
            {"environment": {"AWS_ACCESS_KEY_ID": "nobody"}},
            78,
            "the AWS credentials are not valid here (InvalidAccessKeyId)",
            "AWS_ACCESS_KEY_ID",
        ),
        ({"run_uri": f"s3://{BUCKET}/elsewhere/first"}, 74, "access denied", "s3:"),
        ({"run_uri": f"s3://{BUCKET}/runs/second"}, 74, "access denied", "s3:"),
        ({"data": f"s3://{BUCKET}/private"}, 74, "access denied", "s3:ListBucket"),
        ({"data": f"s3://{BUCKET}/data/nothing"}, 78, "data/nothing", "check"),
        ({"run_uri": f"{DATA}/runs/first"}, 78, "lies in --data", "another place"),
        ({"run_uri": "s3://"}, 78, "names no bucket", "s3://BUCKET/PREFIX"),
    ],
    ids=[
        "secret",
        "key",
        "place denied",
        "run denied",
        "data denied",
        "no data",
        "run in data",
        "no bucket",
    ],
)
def test_what_is_wrong_shows_before_training(
    cloud: Cloud, arrange: dict[str, Any], code: int, named: str, mend: str
) -> None:
    ended = cloud.refuses(**arrange)
    assert ended.code == code, ended
    assert named in ended.err
    assert mend in ended.err


def test_a_bucket_that_is_not_there(cloud: Cloud, s3_env: dict[str, str]) -> None:
    ended = cloud.refuses(run_uri="s3://no-such-bucket/run", environment=s3_env)
    assert ended.code == 78, ended
    assert "there is no bucket no-such-bucket" in ended.err


def test_a_read_only_run_shows_before_training(cloud: Cloud, fault_proxy: FaultProxy) -> None:
    fault_proxy.add(Status(status=403, method="PUT", times=None))
    ended = cloud.refuses()
    assert ended.code == 74, ended
    assert "access denied" in ended.err
    assert "s3:PutObject" in ended.err
    assert "generator:" not in ended.out


def test_without_the_right_to_list_nothing_is_taken_for_absent(
    cloud: Cloud, fault_proxy: FaultProxy, store: S3Store
) -> None:
    attempt = cloud()
    attempt.wait_for_iteration(8)
    attempt.send(signal.SIGTERM)
    assert attempt.finish() == 75
    pointer = store.read(run.LATEST_POINTER)
    # AWS answers so for whatever is not there, when the right to list is missing.
    fault_proxy.add(Status(status=403, match="/checkpoints/", times=None))
    ended = cloud.refuses()
    assert ended.code == 74, ended
    assert "s3:ListBucket" in ended.err
    assert store.read(run.LATEST_POINTER) == pointer


@pytest.mark.slow
def test_evaluate_and_predict_take_uris(
    twin: tuple[Path, Path],
    uploaded: str,
    store: S3Store,
    start: Any,
    tmp_path: Path,
    s3_env: dict[str, str],
) -> None:
    _, finished = twin
    store.upload(finished / run.BEST_MODEL, run.BEST_MODEL)
    environment = {**s3_env, "S4GAN_SCRATCH": str(tmp_path / "scratch")}
    weights = f"--weights={RUN}/{run.BEST_MODEL}"
    scored = start(["evaluate", weights, f"--data={DATA}"], environment=environment)
    assert scored.finish() == 0, scored.output
    best = json.loads((finished / run.SUMMARY).read_text())["best"]["val_miou"]
    assert f"mIoU                   {best:.4f}" in scored.output
    images = f"--images={DATA}/val/images"
    predicted = start(
        ["predict", weights, images, f"--out={RUN}/predicted"], environment=environment
    )
    assert predicted.finish() == 0, predicted.output
    keys = [info.key for info in store.list("predicted/")]
    assert len(keys) == 8
    assert "predicted/val_0000_overlay.png" in keys
    missing = start(
        ["evaluate", f"--weights={RUN}/x.pth", f"--data={DATA}"], environment=environment
    )
    assert missing.finish() == 78
    assert f"--weights {RUN}/x.pth: no such file" in missing.output


@pytest.mark.slow
def test_another_configuration_is_refused_or_taken_when_asked(cloud: Cloud, store: S3Store) -> None:
    attempt = cloud()
    attempt.wait_for_iteration(8)
    attempt.send(signal.SIGTERM)
    assert attempt.finish() == 75
    refused = cloud.refuses(train__learning_rate=0.005)
    assert refused.code == 78
    assert "train.learning_rate: 0.01 in the run, 0.005 now" in refused.err
    assert "--resume-anyway" in refused.err
    taken = cloud(train__learning_rate=0.005, arguments=("--resume-anyway",))
    assert taken.finish() == 0, taken.output
    assert "warning: going on with another configuration, as asked" in taken.output
    (changed,) = of(ledger(store), "configuration_changed")
    assert changed["changes"] == ["train.learning_rate: 0.01 in the run, 0.005 now"]
    assert f"--config {RUN}/config.yaml" in refused.err
    # Which is how to go on as before.
    assert training_lines_of(store)[-1]["iteration"] == ITERATIONS


def training_lines_of(store: S3Store) -> list[dict[str, Any]]:
    return [event for event in ledger(store) if "iteration" in event]


@pytest.mark.slow
def test_one_that_is_replaced_before_it_trains_is_fenced_not_preempted(
    cloud: Cloud, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Found by the soak: the scheduler would have started it again."""
    held = fault_proxy.add(Hold(method="GET", match="/data/scenes/dataset.yaml"))
    zombie = cloud(job_attempt=1, train__iterations=4000)
    assert held.reached.wait(120)
    zombie.send(signal.SIGSTOP)
    successor = cloud(
        job_attempt=2,
        train__iterations=4000,
        environment={"S4GAN_SCRATCH": str(tmp_path / "another")},
    )
    successor.wait_for("^device: ")
    zombie.send(signal.SIGCONT)
    # Its lease finds out at the next renewal, while the data still do not come.
    wait_until(lambda: "stopped" in zombie.output or zombie.process.poll() is not None)
    held.release()
    assert zombie.finish() == 76, zombie.output
    successor.send(signal.SIGTERM)
    assert successor.finish() == 75
