"""Several processes that train as one: each computes its parts of every batch.

Data parallel without a wrapper around the networks: the gradients of an iteration are summed over
all ranks once, before the optimizers' step, so that every rank makes the same step. A part is
computed by one rank as a whole, so batch norm sees what it would see in a single process; the
running statistics are put together as one process would have formed them, part after part. What
remains is the order of floating-point sums.

Source of the terms: torch.distributed (rank, world size).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from job.errors import RankLost

LEADER = 0
"""The rank that saves, reports, and decides when to stop."""
_STOP = "stop"

_Thing = TypeVar("_Thing")


class Ranks:
    """This process's place among those that train together; the default is to be alone.

    Args:
        rank: of this process.
        world: how many there are.
        store: key-value store that all of them reach; None if there is one.
    """

    def __init__(self, rank: int = LEADER, world: int = 1, store: TCPStore | None = None) -> None:
        self.rank = rank
        self.world = world
        self._store = store

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.world == 1

    def mine(self, things: Sequence[_Thing]) -> Sequence[_Thing]:
        """The share of this rank in what anybody could do."""
        return things[self.rank :: self.world]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; of one type, on one device."""
        if self.alone:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _together():
            dist.all_reduce(flat)
        sums = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; all of them have to ask."""
        if self.alone:
            return flag
        flags = torch.tensor([int(flag)])
        with _together():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def gather(self, things: list[_Thing]) -> list[_Thing]:
        """The lists of all ranks, one after the other; all of them have to ask."""
        if not self.any(bool(things)):
            return []
        if self.alone:
            return things
        lists: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(lists, things)
        return [thing for part in lists for thing in part]

    def from_leader(self, thing: _Thing | None = None) -> _Thing:
        """What the leader gives, on every rank; plain values and tensors."""
        box = [thing]
        with _together():
            dist.broadcast_object_list(box, src=LEADER)
        return box[0]  # type: ignore[return-value]

    def stop_is_near(self, requested: bool) -> bool:
        """Whether the leader was asked to stop, for work that each rank does on its own.

        Unlike `any` it waits for nobody, and ranks may hear of it at different moments.
        """
        if self._store is None:
            return requested
        with _together():
            if self.rank != LEADER:
                return bool(self._store.check([_STOP]))
            if requested:
                self._store.set(_STOP, "1")
        return requested


class RunningStatistics:
    """Batch norm's running means and variances over one iteration of several ranks.

    One process updates r <- (1 - m) r + m s with the statistics s of one part after the other. A
    rank that begins with r0 and makes k updates ends with (1 - m)^k r0 + S; what all of them would
    have reached in order of their ranks follows from the ends alone, for it is linear in the S.

    Args:
        network: holds the layers.
        ranks: their updates come in this order.
    """

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        self._ranks = ranks
        layers = [] if ranks.alone else _batch_norms(network)
        self._counts = [
            layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None
        ]
        self._now: list[Tensor] = []
        self._keep: list[float] = []
        for layer in layers:
            for value in (layer.running_mean, layer.running_var):
                if value is not None:
                    self._now.append(value)
                    self._keep.append(1.0 - (layer.momentum or 0.0))
        self._before = [value.clone() for value in self._now]

    def own_part(self, updates: int) -> list[Tensor]:
        """What has to be added up over the ranks after each of them has made so many updates.

        `finish` then puts it in place.
        """
        later = updates * (self._ranks.world - 1 - self._ranks.rank)
        for now, before, keep in zip(self._now, self._before, self._keep, strict=True):
            now.sub_(keep**updates * before).mul_(keep**later)
        return self._now

    def finish(self, updates: int) -> None:
        """Called with the sums in place of the parts."""
        for now, before, keep in zip(self._now, self._before, self._keep, strict=True):
            now.add_(keep ** (updates * self._ranks.world) * before)
        for count in self._counts:
            count.add_(updates * (self._ranks.world - 1))


def _batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Those that follow the batches; fixed ones are in evaluation mode."""
    return [
        module
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d) and module.training
    ]


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What needs the others fails when one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"a process that trained with this one is gone: {str(error).splitlines()[0][:200]}"
        ) from error
