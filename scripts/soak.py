"""Interrupt runs at random until enough interruptions have happened, and look for any difference.

Every attempt of every run meets one interruption at a random moment of its life (while it starts,
restores, trains, saves, evaluates or ends) and a network with random faults. All runs train the
same; each must end equal to the bit to one that was never interrupted, and no attempt may resume
before what an earlier one had made durable. Prints a Markdown table.

    python scripts/soak.py --data demo/data --folder demo/soak --interruptions 200
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from job import run
from job.drill.attempt import AttemptProcess
from job.drill.environment import empty_folder, in_environment
from job.drill.imds import FakeImds
from job.drill.proof import compare_runs
from job.drill.proxy import (
    CorruptReply,
    CutReply,
    CutUpload,
    Fault,
    FaultProxy,
    Latency,
    LoseReply,
    Reset,
    Status,
)
from job.drill.seaweed import SeaweedServer
from job.errors import ExitCode
from job.storage.pack import pack
from job.storage.pull import pull
from job.storage.s3 import S3Store

DATA_URI = "s3://s4gan-data/soak"
ITERATIONS = 150
SETTINGS = {
    "data.crop_size": 48,
    "data.image_scale": 0.5,
    "model.discriminator_channels": 8,
    "train.iterations": ITERATIONS,
    "train.batch_size": 2,
    "train.log_every": 1,
    "train.eval_every": 50,
    "loss.st_start": 30,
    "checkpoint.every": 10,
    "checkpoint.keep_every": 75,
    "data.workers": 0,
    "wandb.mode": "disabled",
}
DAMAGE = "damaged checkpoint"
KINDS = ("SIGKILL", "SIGTERM", "spot notice", "zombie", DAMAGE)
EXPECTED = {
    "SIGKILL": (-signal.SIGKILL,),
    "SIGTERM": (ExitCode.PREEMPTED,),
    "spot notice": (ExitCode.PREEMPTED,),
    "zombie": (ExitCode.FENCED,),
    DAMAGE: (-signal.SIGKILL,),
}
MEAN_LIFE_S = 14.0
"""Of an attempt before its interruption; starting takes about half of that."""


@dataclass
class Tally:
    """What all lanes have seen."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    lost: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Iterations trained again, by kind of interruption."""
    faults: int = 0
    """Requests that met a fault of the network."""
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def interruptions(self) -> int:
        """So far."""
        return sum(len(lost) for lost in self.lost.values())


class Lane:
    """Runs one run after the other, with a network and a metadata service of its own."""

    def __init__(self, number: int, seed: int, arguments: argparse.Namespace, tally: Tally) -> None:
        self.number = number
        self.random = random.Random(seed * 1000 + number)
        self.folder: Path = arguments.folder
        self.wanted: int = arguments.interruptions
        self.until_s = time.monotonic() + 60 * arguments.minutes
        self.tally = tally

    def work(self, server: SeaweedServer) -> None:
        """Until all lanes together have seen enough."""
        with FaultProxy(server.endpoint) as proxy, FakeImds() as imds:
            count = 0
            while (
                self.tally.interruptions < self.wanted
                and time.monotonic() < self.until_s
                and not self.tally.failures
            ):
                count += 1
                try:
                    self.one_run(f"lane{self.number}-run{count}", server, proxy, imds)
                except Exception as error:  # the other lanes must end too
                    self.fail(f"lane {self.number}, run {count}: {error!r}")
                    raise

    def one_run(self, name: str, server: SeaweedServer, proxy: FaultProxy, imds: FakeImds) -> None:
        """Interrupt a run again and again until an attempt gets through."""
        uri = f"s3://s4gan-runs/{name}"
        environment = {
            **server.environment(),
            "AWS_ENDPOINT_URL": proxy.endpoint,
            **imds.environment(),
            "S4GAN_SCRATCH": str(self.folder / "scratch" / name),
            "AWS_BATCH_JOB_ID": name,
            "OMP_NUM_THREADS": "1",
        }
        number, durable, at = 1, 0, 0
        pending: list[str] = []
        damaged: set[str] = set()
        attempt = start(uri, environment, number, self.folder)
        while True:
            kind = self.random.choice(KINDS)
            armed = [proxy.add(fault) for fault in self.some_faults()]
            end_s = time.monotonic() + self.random.uniform(0.0, 2 * MEAN_LIFE_S)
            while time.monotonic() < end_s and attempt.process.poll() is None:
                time.sleep(0.05)
            asleep_at = attempt.reached
            # An interruption that comes too late changes nothing.
            over = attempt.process.poll() is not None or "Finished after" in attempt.output
            successor = None
            if kind == "zombie" and "device: " not in attempt.output:
                kind = "SIGKILL"  # asleep with the lock of this disk's data it would bar the next
            if not over:
                successor = self.interrupt(kind, attempt, imds, uri, environment, number)
            code = attempt.finish()
            proxy.clear()
            imds.clear()
            with self.tally.lock:
                self.tally.faults += sum(one.fired for one in armed)
            resumed = resumed_at(attempt)
            if resumed is not None and pending:
                # A damaged checkpoint has cost it, else the first of them: the others came before
                # anything was trained again.
                guilty = DAMAGE if DAMAGE in pending else pending[0]
                pending.remove(guilty)
                self.note(guilty, at - resumed)
                for kind_of_other in pending:
                    self.note(kind_of_other, 0)
                pending.clear()
            if resumed is not None and resumed < durable:
                self.fail(f"{name}: attempt {number} resumed at {resumed}, {durable} was durable")
            if resumed is not None:
                # What a zombie trains when it has been replaced is not the run's.
                at = max(attempt.reached if successor is None else asleep_at, resumed)
            if code == ExitCode.OK:
                if successor is not None:
                    successor.kill()
                break
            unborn = code == -signal.SIGTERM and not attempt.output  # before Python was there
            if not (over or code in EXPECTED[kind] or code == ExitCode.IO_ERROR or unborn):
                self.fail(f"{name}: {kind} ended with {code}:\n{attempt.output[-3000:]}")
                return
            if over and code != ExitCode.IO_ERROR:
                self.fail(f"{name}: ended by itself with {code}:\n{attempt.output[-3000:]}")
                return
            store = S3Store(uri)
            if kind == DAMAGE and not over:
                damaged.update(damage_newest(store))
            if successor is None:  # otherwise the successor is writing already
                durable = newest(store, damaged)
            if not over:
                pending.append(kind)
            number += 1
            if successor is not None:
                attempt, number = successor, number
            else:
                attempt = start(uri, environment, number, self.folder)
        here = self.folder / "pulled" / name
        pull(uri, here, everything=True)
        different = compare_runs(here, self.folder / "pulled" / "twin", ITERATIONS)
        if different:
            self.fail(f"{name}: differs from its twin: {different[:5]}")
        else:
            shutil.rmtree(here)
        with self.tally.lock:
            self.tally.runs += 1
            print(f"{self.tally.interruptions} interruptions, {self.tally.runs} runs", flush=True)

    def interrupt(
        self,
        kind: str,
        attempt: AttemptProcess,
        imds: FakeImds,
        uri: str,
        environment: dict[str, str],
        number: int,
    ) -> AttemptProcess | None:
        """Do it; returns the successor where one was started already."""
        if kind in ("SIGKILL", DAMAGE):
            attempt.send(signal.SIGKILL)
        elif kind == "SIGTERM":
            attempt.send(signal.SIGTERM)
        elif kind == "spot notice":
            imds.notice(self.random.choice((120, 60, 30)))
        else:
            attempt.send(signal.SIGSTOP)
            successor = start(uri, environment, number + 1, self.folder)
            with contextlib.suppress(Exception):
                successor.wait_for("^device: ")
            attempt.send(signal.SIGCONT)
            return successor
        return None

    def some_faults(self) -> list[Fault]:
        """None to three, that botocore or the program has to live with."""
        pick = self.random
        faults: list[Fault] = [
            Status(status=503, times=pick.randint(1, 5), skip=pick.randint(0, 30)),
            Status(status=500, method="PUT", times=2, skip=pick.randint(0, 10)),
            LoseReply(method="PUT", times=pick.randint(1, 3), skip=pick.randint(0, 20)),
            CutUpload(method="PUT", match="state.pth", after_bytes=pick.randint(0, 200_000)),
            CutReply(method="GET", match="state.pth", after_bytes=pick.randint(0, 200_000)),
            CorruptReply(method="GET", match="state.pth", offset=pick.randint(0, 200_000)),
            Reset(times=pick.randint(1, 3), skip=pick.randint(0, 30)),
            Latency(seconds=pick.uniform(0.05, 0.5), times=20),
        ]
        return pick.sample(faults, pick.randint(0, 3))

    def note(self, kind: str, lost: int) -> None:
        """An interruption is over: the next attempt has gone on."""
        with self.tally.lock:
            self.tally.lost[kind].append(max(0, lost))

    def fail(self, text: str) -> None:
        """Something was lost or is wrong."""
        with self.tally.lock:
            self.tally.failures.append(text)


def start(uri: str, environment: dict[str, str], number: int, folder: Path) -> AttemptProcess:
    """The next attempt at a run, as the scheduler would start it."""
    log = folder / "logs" / f"{uri.rpartition('/')[2]}-{number}.txt"
    return AttemptProcess(
        [
            *("train", "--config", "demo", "--data", DATA_URI, "--run", uri),
            *(f"--set={key}={value}" for key, value in SETTINGS.items()),
        ],
        {**environment, "AWS_BATCH_JOB_ATTEMPT": str(number)},
        log,
    )


def resumed_at(attempt: AttemptProcess) -> int | None:
    """Where it went on; None if it did not come so far."""
    found = re.search(r"resuming after iteration (\d+)", attempt.output)
    if found:
        return int(found[1])
    return 0 if "generator: " in attempt.output else None


def newest(store: S3Store, damaged: Set[str]) -> int:
    """Iteration of the newest durable checkpoint that was left as it is; 0 if there is none."""
    text, _ = store.read_versioned(run.LATEST_POINTER)
    ids = json.loads(text)["checkpoints"] if text else []
    return next((int(id_.partition("-")[0]) for id_ in ids if id_ not in damaged), 0)


def damage_newest(store: S3Store) -> Sequence[str]:
    """Flip a bit of the newest checkpoint, unless it is the only one; returns its id."""
    text, _ = store.read_versioned(run.LATEST_POINTER)
    ids = json.loads(text)["checkpoints"] if text else []
    if len(ids) < 2 or store.stat(run.checkpoint_state(ids[0])) is None:
        return ()
    state = bytearray(store.read(run.checkpoint_state(ids[0])))
    state[random.randrange(len(state))] ^= 1
    store.write(run.checkpoint_state(ids[0]), bytes(state))
    return ids[:1]


def main() -> int:
    """Run all lanes; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--folder", type=Path, required=True, help="for everything; emptied")
    parser.add_argument("--interruptions", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120, help="begin no run after so long")
    parser.add_argument("--lanes", type=int, default=2, help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    empty_folder(arguments.folder)
    (arguments.folder / "logs").mkdir()
    tally = Tally()
    began_s = time.monotonic()
    with (
        SeaweedServer(arguments.folder / "s3", buckets=("s4gan-data", "s4gan-runs")) as server,
        in_environment(server.environment()),
    ):
        pack(arguments.data, DATA_URI)
        twin = start(
            "s3://s4gan-runs/twin",
            {
                **server.environment(),
                "S4GAN_SCRATCH": str(arguments.folder / "scratch" / "twin"),
                "OMP_NUM_THREADS": "1",
            },
            1,
            arguments.folder,
        )
        if twin.finish() != ExitCode.OK:
            print(twin.output, file=sys.stderr)
            return 1
        pull("s3://s4gan-runs/twin", arguments.folder / "pulled" / "twin", everything=True)
        lanes = [
            Lane(number, arguments.seed, arguments, tally) for number in range(arguments.lanes)
        ]
        threads = [threading.Thread(target=lane.work, args=(server,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print_table(tally, time.monotonic() - began_s)
    for failure in tally.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if tally.failures else 0


def print_table(tally: Tally, seconds: float) -> None:
    """The result, as Markdown."""
    print("\n| interruption | times | iterations lost: median | largest |")
    print("|---|---|---|---|")
    for kind in KINDS:
        lost = tally.lost[kind]
        if lost:
            print(f"| {kind} | {len(lost)} | {statistics.median(lost):g} | {max(lost)} |")
    print(
        f"\n{tally.interruptions} interruptions and {tally.faults} requests with a network fault "
        f"over {tally.runs} runs of {ITERATIONS} iterations in {seconds / 60:.0f} minutes; "
        f"{len(tally.failures)} runs lost, corrupt or different from the uninterrupted one"
    )


if __name__ == "__main__":
    sys.exit(main())
