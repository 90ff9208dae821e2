"""`s4gan drill`: the preemption simulator.

Interrupts a real run in every way we know, resumes it each time, and proves that the end equals
that of a run that was never interrupted.

Everything is real but the cloud: a real S3 server, real processes and signals, a network that
fails on demand, and a metadata service that announces what EC2's would.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from job import run
from job.data.layouts import detect, in_store
from job.drill.attempt import AttemptProcess, UnexpectedEnd
from job.drill.environment import empty_folder, in_environment
from job.drill.imds import FakeImds
from job.drill.proof import compare_runs
from job.drill.proxy import CutUpload, FaultProxy, LoseReply, Status
from job.drill.seaweed import SeaweedServer
from job.errors import ExitCode
from job.monitor.attempts import attempts_of
from job.storage import open_store
from job.storage.pack import pack
from job.storage.pull import pull
from job.storage.s3 import S3Store

DATA_URI = "s3://s4gan-data/drill"
RUN_URI = "s3://s4gan-runs/drill"
TWIN_URI = "s3://s4gan-runs/twin"
NOTICE_S = 120.0
"""What EC2 gives."""
OUTAGE_S = 8.0
JOB_ID = "drill-0000-4444-8888"


@dataclass
class Interruption:
    """A row of the closing table."""

    what: str
    at: int
    """Iteration reached."""
    resumed_at: int = 0
    durable_s: float | None = None
    """Seconds from the notice or signal to a durable checkpoint; None if there was no warning."""
    outcome: str = ""

    @property
    def lost(self) -> int:
        """Iterations that were trained again."""
        return max(0, self.at - self.resumed_at)


@dataclass
class Scene:
    """What the acts of the drill share."""

    console: Console
    folder: Path
    arguments: list[str]
    environment: dict[str, str]
    server: SeaweedServer
    proxy: FaultProxy
    imds: FakeImds
    iterations: int
    attempts: list[AttemptProcess] = field(default_factory=list)
    rows: list[Interruption] = field(default_factory=list)

    def start(self, *, run_uri: str = RUN_URI, job_attempt: int | None = None) -> AttemptProcess:
        """An attempt, as the scheduler would start it."""
        number = len(self.attempts) + 1 if job_attempt is None else job_attempt
        twin = run_uri == TWIN_URI
        environment = {
            **self.environment,
            "AWS_BATCH_JOB_ID": f"{JOB_ID}-{run_uri.rpartition('/')[2]}",
            "AWS_BATCH_JOB_ATTEMPT": str(number),
            # The twin has a network of its own, and a machine that nobody takes away.
            **(self.server.environment() if twin else {}),
        }
        name = "twin" if twin else f"attempt{number}"
        attempt = AttemptProcess(
            [*self.arguments, "--run", run_uri], environment, self.folder / "logs" / f"{name}.txt"
        )
        if not twin:
            self.attempts.append(attempt)
        return attempt

    def resume(self, row: Interruption) -> AttemptProcess:
        """The next attempt; notes where it went on."""
        attempt = self.start()
        line = attempt.wait_for(r"resuming after iteration \d+")
        row.resumed_at = _number_in(line, "iteration")
        self.rows.append(row)
        self.say(f"  attempt {len(self.attempts)} goes on after iteration {row.resumed_at}")
        return attempt

    def say(self, text: str) -> None:
        """A line for the user."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def at(self, share: float) -> int:
        """An iteration, as a share of the run."""
        return round(self.iterations * share)


def run_drill(data: str, folder: Path, *, config: str, iterations: int) -> bool:
    """Run the whole drill.

    Args:
        data: folder of the data set.
        folder: for everything the drill makes; emptied first.
        config: preset or YAML file to train by.
        iterations: of the run and of its twin.

    Returns:
        Whether the interrupted run equals the other one, and each act went as it should.

    Raises:
        ConfigError: the S3 server is not installed, or a setting is wrong.
    """
    console = Console()
    with _scene(console, data, folder, config, iterations) as scene:
        began_s = time.monotonic()
        twin = scene.start(run_uri=TWIN_URI, job_attempt=1)
        try:
            last = _play(scene)
            code = last.finish()
            if code != ExitCode.OK:
                raise UnexpectedEnd(f"the last attempt ended with {code}:\n{last.output[-2000:]}")
            if twin.finish() != ExitCode.OK:
                raise UnexpectedEnd(f"the twin failed:\n{twin.output[-2000:]}")
        except UnexpectedEnd as error:
            scene.say(f"the drill FAILED: {error}")
            return False
        finally:
            for attempt in (twin, *scene.attempts):
                attempt.kill()
        for uri in (RUN_URI, TWIN_URI):
            pull(uri, scene.folder / uri.rpartition("/")[2], everything=True)
        different = compare_runs(scene.folder / "drill", scene.folder / "twin", iterations)
        _print_table(scene, time.monotonic() - began_s)
    if different:
        scene.say("the drill FAILED: the interrupted run is not its uninterrupted twin:")
        for place in different[:20]:
            scene.say(f"  {place}")
        return False
    scene.say(
        f"passed: weights, optimizers, random state and ledger of the interrupted run equal those "
        f"of the uninterrupted one to the bit ({iterations} iterations)"
    )
    return True


def _play(scene: Scene) -> AttemptProcess:
    """All acts, in order; returns the attempt that will finish the run."""
    attempt = scene.start()
    attempt.wait_for_iteration(1)
    for act in (_sigkill, _spot_notice, _outage, _sigterm, _zombie, _bad_checkpoint):
        attempt = act(scene, attempt)
    return attempt


def _sigkill(scene: Scene, attempt: AttemptProcess) -> AttemptProcess:
    attempt.wait_for_iteration(scene.at(0.15))
    scene.say("SIGKILL")
    attempt.send(signal.SIGKILL)
    attempt.finish()
    return scene.resume(Interruption("SIGKILL", attempt.reached, outcome="killed"))


def _spot_notice(scene: Scene, attempt: AttemptProcess) -> AttemptProcess:
    attempt.wait_for_iteration(scene.at(0.3))
    scene.say(f"spot notice: {NOTICE_S:.0f} s; the first upload of the state will break off")
    scene.proxy.add(CutUpload(method="PUT", match="state.pth", after_bytes=50_000))
    row = _warned(scene, attempt, "spot notice", lambda: scene.imds.notice(NOTICE_S))
    scene.imds.clear()
    scene.proxy.clear()
    return scene.resume(row)


def _outage(scene: Scene, attempt: AttemptProcess) -> AttemptProcess:
    attempt.wait_for_iteration(scene.at(0.4))
    scene.say(f"the network is gone for {OUTAGE_S:.0f} s, then S3 says SlowDown and loses replies")
    before = attempt.reached
    scene.proxy.down = True
    time.sleep(OUTAGE_S)
    during = attempt.reached
    scene.proxy.down = False
    scene.proxy.add(Status(status=503, method="PUT", times=6))
    scene.proxy.add(LoseReply(method="PUT", match=run.LATEST_POINTER, times=2))
    attempt.wait_for_iteration(scene.at(0.5))
    scene.proxy.clear()
    row = Interruption("network outage", during, resumed_at=during)
    row.outcome = f"training went on, {during - before} iterations meanwhile"
    scene.rows.append(row)
    return attempt


def _sigterm(scene: Scene, attempt: AttemptProcess) -> AttemptProcess:
    attempt.wait_for_iteration(scene.at(0.55))
    scene.say("SIGTERM")
    row = _warned(scene, attempt, "SIGTERM", lambda: attempt.send(signal.SIGTERM))
    return scene.resume(row)


def _zombie(scene: Scene, zombie: AttemptProcess) -> AttemptProcess:
    zombie.wait_for_iteration(scene.at(0.65))
    scene.say("the attempt falls asleep (SIGSTOP); the scheduler starts its successor")
    zombie.send(signal.SIGSTOP)
    row = Interruption("zombie", zombie.reached)
    successor = scene.resume(row)
    successor.wait_for_iteration(scene.at(0.75))
    scene.say("  the zombie wakes up")
    zombie.send(signal.SIGCONT)
    code = zombie.finish()
    row.outcome = f"the zombie left with exit code {code}"
    if code != ExitCode.FENCED:
        raise UnexpectedEnd(f"the zombie ended with {code}, not {ExitCode.FENCED}")
    return successor


def _bad_checkpoint(scene: Scene, attempt: AttemptProcess) -> AttemptProcess:
    attempt.wait_for_iteration(scene.at(0.9))
    scene.say("SIGKILL, and a bit of the newest checkpoint flips")
    attempt.send(signal.SIGKILL)
    attempt.finish()
    with in_environment(scene.server.environment()):
        store = S3Store(RUN_URI)
        newest = json.loads(store.read(run.LATEST_POINTER))["checkpoints"][0]
        state = bytearray(store.read(run.checkpoint_state(newest)))
        state[len(state) // 2] ^= 1
        store.write(run.checkpoint_state(newest), bytes(state))
    row = Interruption("SIGKILL + damaged checkpoint", attempt.reached)
    successor = scene.resume(row)
    bad = f"checkpoint {newest} is bad and will not be tried again"
    if bad not in successor.output:
        raise UnexpectedEnd(f"it has not said {bad!r}:\n{successor.output[-2000:]}")
    row.outcome = "put aside; the one before was used"
    return successor


def _warned(
    scene: Scene, attempt: AttemptProcess, what: str, warn: Callable[[], None]
) -> Interruption:
    """Warn an attempt and wait until it has left."""
    warned_s, warned = time.monotonic(), time.time()
    warn()
    code = attempt.finish()
    if code != ExitCode.PREEMPTED:
        raise UnexpectedEnd(f"it ended with {code}, not {ExitCode.PREEMPTED}:\n{attempt.output}")
    left_s = (attempt.ended_s or time.monotonic()) - warned_s
    with in_environment(scene.server.environment()):
        text = S3Store(RUN_URI).read(run.LEDGER).decode()
    saves = [
        event for event in map(json.loads, text.splitlines()) if event["event"] == "checkpoint"
    ]
    row = Interruption(what, attempt.reached, durable_s=saves[-1]["time"] - warned)
    row.outcome = f"exit code {code}, {left_s:.1f} s after it"
    return row


@contextlib.contextmanager
def _scene(
    console: Console, data: str, folder: Path, config: str, iterations: int
) -> Iterator[Scene]:
    detect(in_store(open_store(data)), "auto", called=data)
    empty_folder(folder)
    (folder / "logs").mkdir()
    arguments = ["train", "--config", config, "--data", DATA_URI]
    settings = {
        "train.iterations": iterations,
        "train.log_every": 1,
        "train.eval_every": max(1, iterations // 4),
        "loss.st_start": iterations // 4,
        "checkpoint.every": max(1, iterations // 16),
        "checkpoint.keep_every": max(1, iterations // 2),
        "wandb.mode": "offline",
    }
    arguments += [f"--set={key}={value}" for key, value in settings.items()]
    with (
        SeaweedServer(folder / "s3", buckets=("s4gan-data", "s4gan-runs")) as server,
        FaultProxy(server.endpoint) as proxy,
        FakeImds() as imds,
    ):
        environment = {
            **server.environment(),
            "AWS_ENDPOINT_URL": proxy.endpoint,
            **imds.environment(),
            "S4GAN_SCRATCH": str(folder / "scratch"),
            # Sums in another order round differently: one thread, whoever else is at work, and no
            # GPU.
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with in_environment(server.environment()):
            pack(data, DATA_URI)
            yield Scene(console, folder, arguments, environment, server, proxy, imds, iterations)


def _number_in(line: str, word: str) -> int:
    return int(line.partition(f"{word} ")[2].split()[0])


def _print_table(scene: Scene, total_s: float) -> None:
    table = Table("interruption", "at", "resumed at", "lost", "durable after", "outcome")
    for row in scene.rows:
        durable = "" if row.durable_s is None else f"{row.durable_s:.1f} s"
        table.add_row(
            row.what, str(row.at), str(row.resumed_at), str(row.lost), durable, row.outcome
        )
    scene.console.print(table)
    events = _ledger(scene)
    useful_s, busy_s = goodput(events, scene.attempts)
    pauses = [event["pause_s"] for event in events if event["event"] == "checkpoint"]
    scene.say(
        f"{len(scene.attempts)} attempts, {sum(row.lost for row in scene.rows)} iterations trained "
        f"twice of {scene.iterations}, {total_s:.0f} s in all\n"
        f"goodput {useful_s / busy_s:.0%}: {useful_s:.0f} s of training that counted in "
        f"{busy_s:.0f} s of attempts (starting Python and torch included)\n"
        f"pause of the training for a save: median {1000 * statistics.median(pauses):.1f} ms, "
        f"longest {1000 * max(pauses):.1f} ms ({len(pauses)} saves)"
    )


def _ledger(scene: Scene) -> list[dict[str, Any]]:
    path = scene.folder / "drill" / run.LEDGER
    return [json.loads(line) for line in path.read_text().splitlines()]


def goodput(events: list[dict[str, Any]], attempts: list[AttemptProcess]) -> tuple[float, float]:
    """Seconds of training that counted, and seconds that all attempts took.

    Args:
        events: the finished run's ledger, which holds the lines that were not rolled back.
        attempts: all of them, in order.
    """
    useful_s = sum(attempt.useful_s for attempt in attempts_of(events))
    busy_s = sum((attempt.ended_s or time.monotonic()) - attempt.began_s for attempt in attempts)
    return useful_s, busy_s
