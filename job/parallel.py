"""The processes of a run on several GPUs: how they start, meet and end.

The first is the run itself, as with one GPU: it alone has the lease, saves, reports and heeds
signals; its exit code is the run's. The others (`python -m job.parallel`) get from it what they
need, train along, and end with it: their standard input is a pipe that it holds open. On other
machines such a pipe is held by a process that `follow`s; that those machines are alive the leader
sees by counters in the store where all processes meet.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from job.checkpoint.manager import BestModel
from job.config import Config, check_gpus, config_from_dict
from job.data.decoded import decoded_folder
from job.data.scan import scan_dataset
from job.data.splits import Splits, items_of
from job.errors import ConfigError, ExitCode, JobError, RankLost
from job.events import Notice
from job.heartbeat import beat
from job.monitor import Trackers
from job.nodes import PORT_VARIABLE, Node
from job.preemption import StopRequest
from job.training.loop import Surroundings, train
from job.training.ranks import LEADER, Ranks
from job.training.saving import NoSaving
from job.training.state import TrainState, new_train_state

HOST = "127.0.0.1"
PATIENCE = datetime.timedelta(minutes=10)
"""For the others, in any step that needs all of them."""
COMING = datetime.timedelta(hours=2)
"""For other machines until they are there: each of them brings the data to its own disk."""
ALIVE_EVERY_S = 5.0
"""Between two signs of life of a process on another machine."""
GONE_S = 25.0
"""Without one."""
NOTICED_S = 20.0
"""After a rank has died: until the others' absence is noticed by who waits for them. NCCL may wait
for ever, so that the process is then ended from beside."""
LEAVING_S = 10.0


def check_ranks(config: Config, gpus: int, node: Node, device: torch.device) -> None:
    """Refuse a number of processes that this machine or this configuration cannot have.

    Args:
        config: what is to be trained.
        gpus: of each machine.
        node: this machine's place.
        device: the first of its devices.

    Raises:
        ConfigError: says what would be possible.
    """
    check_gpus(config, gpus, node.count)
    if device.type == "cuda" and gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--gpus {gpus}: this machine has {torch.cuda.device_count()}",
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
        gpus: processes of each machine.
        node: this machine's place.
        device: of the leader.
        tell: is told when one is lost, from another thread.
    """

    def __init__(
        self, gpus: int, node: Node, device: torch.device, tell: Callable[[Notice], None]
    ) -> None:
        self._gpus = gpus
        self._node = node
        self._world = gpus * node.count
        self._device = device
        self._tell = tell
        self._leaving = threading.Event()
        self._processes = [_start_rank(node) for _ in range(1, gpus)]
        self._lost = ""
        for rank, process in enumerate(self._processes, start=1):
            watch = threading.Thread(
                target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True
            )
            watch.start()

    def meet(
        self, config: Config, splits: Splits, folder: Path, state: TrainState, stop: StopRequest
    ) -> Ranks:
        """Make the process group and give every rank the state.

        Raises:
            RankLost: one did not come.
            Preempted: it was asked to stop while other machines were waited for.
        """
        if self._world == 1:
            return Ranks()
        os.environ.update(_environment(self._node))
        _share_cores(self._device, self._gpus)
        port = 0 if self._node.alone else self._node.port
        try:
            store = TCPStore(
                HOST, port, self._world, is_master=True, wait_for_workers=False, timeout=PATIENCE
            )
        except RuntimeError as error:
            raise ConfigError(
                f"the port {port}, where other machines find this one, cannot be used ({error})",
                mend=f"choose another one on all of them: {PORT_VARIABLE}",
            ) from None
        for rank, process in enumerate(self._processes, start=1):
            place = _Place(rank, rank, self._world, self._gpus, HOST, store.port, folder)
            _assign(process, place)
        afar = range(self._gpus, self._world)
        self._await(store, afar, stop)
        ranks = _join(LEADER, self._world, store, self._device)
        # Over the CPU: tensors of another device would come to it again.
        state_dict = _on_cpu(state.state_dict())
        ranks.from_leader(_Assignment(config.to_dict(), splits.to_json(), state_dict))
        return ranks

    def _await(self, store: TCPStore, afar: range, stop: StopRequest) -> None:
        """Until the ranks of other machines are there; from then on they are watched."""
        deadline = time.monotonic() + COMING.total_seconds()
        missing = set(afar)
        while missing:
            missing = {rank for rank in missing if not store.check([_alive(rank)])}
            stop.raise_if_requested()
            if missing and time.monotonic() > deadline:
                raise RankLost(f"ranks {sorted(missing)} of other machines did not come")
            beat()  # waiting for them is no stall
            time.sleep(0.2 if missing else 0)
        if afar:
            # Over a connection of its own: one is not for several threads.
            own = TCPStore(HOST, store.port, self._world, is_master=False, timeout=PATIENCE)
            threading.Thread(
                target=self._watch_afar, args=(own, afar), name="ranks-afar", daemon=True
            ).start()

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
        if self._world > 1 and dist.is_initialized():
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
        self._give_up(rank, f"the process of rank {rank} ended with {how}", status)

    def _watch_afar(self, store: TCPStore, afar: range) -> None:
        """Notice that a process of another machine, or all of it, is gone."""
        seen = dict.fromkeys(afar, b"")
        since_s = dict.fromkeys(afar, time.monotonic())
        while not self._leaving.wait(ALIVE_EVERY_S):
            for rank in afar:
                try:
                    count = store.get(_alive(rank))
                except RuntimeError:
                    return  # the store is ours, so we are leaving
                if count == _DONE.encode():
                    since_s[rank] = math.inf
                elif count != seen[rank]:
                    seen[rank], since_s[rank] = count, time.monotonic()
                elif time.monotonic() - since_s[rank] > GONE_S:
                    sentence = f"the process of rank {rank}, on another machine, is gone"
                    self._give_up(rank, sentence, None)
                    return

    def _give_up(self, rank: int, sentence: str, status: int | None) -> None:
        self._lost = sentence
        self._tell(Notice("rank_lost", f"error: {sentence}", {"rank": rank, "status": status}))
        if not self._leaving.wait(NOTICED_S):
            os._exit(ExitCode.PREEMPTED)


_MEND = "the next attempt goes on from the last save; memory is what most often ends a process"


@contextlib.contextmanager
def crew(
    gpus: int, node: Node, device: torch.device, tell: Callable[[Notice], None]
) -> Iterator[Crew]:
    """The other processes, for the length of a block.

    Raises:
        RankLost: one of them is gone, and which.
    """
    others = Crew(gpus, node, device, tell)
    try:
        yield others
    except RankLost as error:
        raise others.explain(error) from None
    finally:
        others.leave()


def follow(gpus: int, node: Node, folder: Path) -> None:
    """Train along on a machine that is not the main one, until that has done.

    Args:
        gpus: processes of each machine.
        node: this machine's place.
        folder: of the data, on this machine.

    Raises:
        RankLost: one of them has died.
    """
    first, world = node.position * gpus, gpus * node.count
    processes = [_start_rank(node) for _ in range(gpus)]
    try:
        for local, process in enumerate(processes):
            rank = first + local
            place = _Place(rank, local, world, gpus, node.main_address, node.port, folder)
            _assign(process, place)
        while any(process.poll() is None for process in processes):
            beat()  # the processes train; that they get on the leader sees
            for rank, process in enumerate(processes, start=first):
                if process.poll():
                    raise RankLost(f"the process of rank {rank} has died", mend=_MEND)
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start_rank(node: Node) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "job.parallel"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **_environment(node)},
    )


def _assign(process: subprocess.Popen[str], place: _Place) -> None:
    """Tell a process who it is, and where it finds the leader and the data."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has died: who watches it sees to that
        process.stdin.write(json.dumps({**vars(place), "folder": str(place.folder)}) + "\n")
        process.stdin.flush()


_DONE = "done"


def _alive(rank: int) -> str:
    """Key of a counter that goes up as long as a rank lives."""
    return f"alive/{rank}"


def _environment(node: Node) -> dict[str, str]:
    """On one machine gloo need not find out by which name others would call it."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    interface = loopback if node.alone else node.interface()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", interface)
    return {"GLOO_SOCKET_IFNAME": chosen} if chosen else {}


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
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        return
    threading.Thread(target=_end_with_the_leader, name="leader", daemon=True).start()
    told = json.loads(line)
    try:
        _train_along(_Place(**{**told, "folder": Path(told["folder"])}))
    except JobError:
        return  # all ranks see the same, and the leader says it; or it is the leader who is gone


def _end_with_the_leader() -> NoReturn:
    sys.stdin.read()
    os._exit(0)


@dataclass(frozen=True)
class _Place:
    """Who a process is, as the line on its standard input says."""

    rank: int
    local: int
    """Number on its own machine."""
    world: int
    gpus: int
    """Of its machine."""
    host: str
    """Of the leader."""
    port: int
    folder: Path
    """Of the data."""


def _train_along(place: _Place) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    _share_cores(device, place.gpus)
    store = TCPStore(place.host, place.port, place.world, is_master=False, timeout=COMING)
    with _showing_life(place):
        ranks = _join(place.rank, place.world, store, device)
        assignment: _Assignment = ranks.from_leader()
        config = config_from_dict(assignment.config, source="the leader")
        dataset = scan_dataset(place.folder, config.data)
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
                decoded=decoded_folder(place.folder),
            ),
        )
    dist.destroy_process_group()


@contextlib.contextmanager
def _showing_life(place: _Place) -> Iterator[None]:
    """Within this block a counter in the leader's store goes up; if it cannot, the leader is gone.

    Then so are we: some collectives wait for ever.
    """
    store = TCPStore(place.host, place.port, place.world, is_master=False, timeout=PATIENCE)
    done = threading.Event()

    def count() -> None:
        number = 0
        while True:
            number += 1
            try:
                store.set(_alive(place.rank), str(number))
            except RuntimeError:
                if not done.wait(NOTICED_S):
                    os._exit(0)
                return
            if done.wait(ALIVE_EVERY_S):
                return

    thread = threading.Thread(target=count, name="alive", daemon=True)
    thread.start()
    in_order = False
    try:
        yield
        in_order = True
    except JobError:
        in_order = True
        raise
    finally:
        done.set()
        thread.join(ALIVE_EVERY_S)
        if in_order:
            with contextlib.suppress(RuntimeError):  # the leader was quicker
                store.set(_alive(place.rank), _DONE)


if __name__ == "__main__":
    main()
