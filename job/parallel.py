"""The processes of a run on several GPUs of one machine: how they start, meet and end.

The first is the run itself, as with one GPU: it alone has the lease, saves, reports and is sent
signals; its exit code is the run's. The others (`python -m job.parallel`) get from it what they
need, train along, and end with it: their standard input is a pipe that it holds open.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from job.checkpoint.manager import BestModel
from job.config import Config, check_gpus, config_from_dict
from job.data.dataset import scan_dataset
from job.data.splits import Splits, items_of
from job.errors import ConfigError, ExitCode, JobError, RankLost
from job.events import Notice
from job.monitor import Trackers
from job.preemption import StopRequest
from job.training.loop import Surroundings, train
from job.training.ranks import LEADER, Ranks
from job.training.saving import NoSaving
from job.training.state import TrainState, new_train_state

HOST = "127.0.0.1"
PATIENCE = datetime.timedelta(minutes=10)
"""For the others, in any step that needs all of them."""
NOTICED_S = 20.0
"""After a rank has died: until the others' absence is noticed by who waits for them. NCCL may wait
for ever, so that the process is then ended from beside."""
LEAVING_S = 10.0


def check_ranks(config: Config, count: int, device: torch.device) -> None:
    """Refuse a number of processes that this machine or this configuration cannot have.

    Raises:
        ConfigError: says what would be possible.
    """
    check_gpus(config, count)
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise ConfigError(
            f"--gpus {count}: this machine has {torch.cuda.device_count()}",
            mend="give fewer, or make more of them visible (docker run --gpus all)",
        )


@dataclass(frozen=True)
class _Assignment:
    """All that a rank has to know, besides where the data lie."""

    config: dict[str, Any]
    splits: bytes
    state: dict[str, Any]


class Crew:
    """The other processes of a run, as the leader sees them.

    Args:
        count: of all ranks.
        device: of the leader.
        tell: is told when one is lost, from another thread.
    """

    def __init__(self, count: int, device: torch.device, tell: Callable[[Notice], None]) -> None:
        self._count = count
        self._device = device
        self._tell = tell
        self._leaving = threading.Event()
        self._processes = [self._start(rank) for rank in range(1, count)]
        self._lost = ""
        for rank, process in enumerate(self._processes, start=1):
            watch = threading.Thread(
                target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True
            )
            watch.start()

    def _start(self, rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "job.parallel"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **_environment(self._device, self._count)},
        )

    def meet(self, config: Config, splits: Splits, folder: Path, state: TrainState) -> Ranks:
        """Make the process group and give every rank the state.

        Raises:
            RankLost: one did not come.
        """
        if self._count == 1:
            return Ranks()
        os.environ.update(_environment(self._device, self._count))
        _share_cores(self._device, self._count)
        store = TCPStore(
            HOST, 0, self._count, is_master=True, wait_for_workers=False, timeout=PATIENCE
        )
        for rank, process in enumerate(self._processes, start=1):
            line = {"rank": rank, "world": self._count, "port": store.port, "folder": str(folder)}
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has died: `_watch` sees to it
                process.stdin.write(json.dumps(line) + "\n")
                process.stdin.flush()
        ranks = _join(LEADER, self._count, store, self._device)
        # Over the CPU: tensors of another device would come to it again.
        state_dict = _on_cpu(state.state_dict())
        ranks.from_leader(_Assignment(config.to_dict(), splits.to_json(), state_dict))
        return ranks

    def leave(self) -> None:
        """End the others: they have nothing to do without us."""
        self._leaving.set()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(LEAVING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._count > 1 and dist.is_initialized():
            # Collective with NCCL: not after a rank was lost, nor a failure that left the others.
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def explain(self, error: RankLost) -> RankLost:
        """The same error with what is known of who is gone."""
        self._leaving.wait(0 if self._lost else 2.0)  # the operating system tells it a little later
        return RankLost(self._lost, mend=_MEND) if self._lost else error

    def _watch(self, rank: int, process: subprocess.Popen[str]) -> None:
        status = process.wait()
        if status == 0 or self._leaving.is_set():
            return
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self._lost = f"the process of rank {rank} ended with {how}"
        self._tell(Notice("rank_lost", f"error: {self._lost}", {"rank": rank, "status": status}))
        if not self._leaving.wait(NOTICED_S):
            os._exit(ExitCode.PREEMPTED)


_MEND = "the next attempt goes on from the last save; memory is what most often ends a process"


@contextlib.contextmanager
def crew(count: int, device: torch.device, tell: Callable[[Notice], None]) -> Iterator[Crew]:
    """The other processes, for the length of a block.

    Raises:
        RankLost: one of them is gone, and which.
    """
    others = Crew(count, device, tell)
    try:
        yield others
    except RankLost as error:
        raise others.explain(error) from None
    finally:
        others.leave()


def _environment(device: torch.device, count: int) -> dict[str, str]:
    """One machine: gloo need not find out by which name others would call it."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback)}


def _share_cores(device: torch.device, count: int) -> None:
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))


def _join(rank: int, world: int, store: TCPStore, device: torch.device) -> Ranks:
    cuda = device.type == "cuda"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
        )
    except RuntimeError as error:
        raise RankLost(f"the processes did not find each other: {error}") from error
    return Ranks(rank, world, store)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_on_cpu(inner) for inner in value]
    return value


# ---------------------------------------------------------------- the others


def main() -> None:
    """Train along, as the line on standard input says, until the leader has done with it."""
    logging.basicConfig(level=logging.ERROR)
    # The leader is asked to stop, and then all of us stop together.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        return
    threading.Thread(target=_end_with_the_leader, name="leader", daemon=True).start()
    told = json.loads(line)
    try:
        _train_along(told["rank"], told["world"], told["port"], Path(told["folder"]))
    except JobError:
        return  # all ranks see the same, and the leader says it; or it is the leader who is gone


def _end_with_the_leader() -> NoReturn:
    sys.stdin.read()
    os._exit(0)


def _train_along(rank: int, world: int, port: int, folder: Path) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    _share_cores(device, world)
    store = TCPStore(HOST, port, world, is_master=False, timeout=PATIENCE)
    ranks = _join(rank, world, store, device)
    assignment: _Assignment = ranks.from_leader()
    config = config_from_dict(assignment.config, source="the leader")
    dataset = scan_dataset(folder)
    state, _ = new_train_state(config, dataset.info.num_classes, device, pretrained=False)
    state.load_state_dict(assignment.state)
    train(
        state,
        Surroundings(
            config=config,
            items=items_of(dataset, Splits.from_json(assignment.splits)),
            info=dataset.info,
            device=device,
            tracker=Trackers([]),
            saving=NoSaving(),
            save_best=lambda state, val_miou: BestModel("", state.iteration, val_miou),
            stop=StopRequest(),
            ranks=ranks,
        ),
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
