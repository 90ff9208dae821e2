"""What several ranks share, and the running statistics that they put together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from job.errors import RankLost
from job.training.ranks import Ranks, RunningStatistics, _together


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
        nn.BatchNorm2d(2, momentum=0.01),
    )


@pytest.mark.parametrize(("world", "each"), [(2, 1), (2, 3), (3, 2), (4, 4)])
def test_running_statistics_are_those_of_one_process(world: int, each: int) -> None:
    torch.manual_seed(0)
    parts = [3 * torch.randn(2, 3, 5, 5) + index for index in range(world * each)]
    alone = network().double()
    ranks = [network().double() for _ in range(world)]
    for one in ranks:
        one.load_state_dict(alone.state_dict())

    for _ in range(2):
        for part in parts:
            alone(part.double())
        statistics = []
        own = []
        for rank, one in enumerate(ranks):
            statistics.append(RunningStatistics(one, Ranks(rank, world)))
            for part in parts[rank * each : (rank + 1) * each]:
                one(part.double())
            own.append(statistics[-1].own_part(each))
        for tensors in zip(*own, strict=True):
            total = torch.stack(tensors).sum(dim=0)
            for tensor in tensors:
                tensor.copy_(total)
        for one in statistics:
            one.finish(each)

    for one in ranks:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_running_statistics_that_are_fixed_stay_as_they_are() -> None:
    one = network()
    one[1].eval()
    before = {name: value.clone() for name, value in one[1].state_dict().items()}
    statistics = RunningStatistics(one, Ranks(0, 2))
    one(torch.randn(2, 3, 5, 5))
    assert len(statistics.own_part(1)) == 2
    statistics.finish(1)
    for name, value in one[1].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_alone_everything_is_as_it_was() -> None:
    ranks = Ranks()
    tensor = torch.ones(3)
    ranks.add_up([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert [ranks.any(flag) for flag in (True, False)] == [True, False]
    assert ranks.gather(["a"]) == ["a"]
    assert ranks.mine([1, 2, 3]) == [1, 2, 3]
    assert [ranks.stop_is_near(flag) for flag in (True, False)] == [True, False]


def test_each_thing_belongs_to_one_rank() -> None:
    things = list(range(11))
    shares = [Ranks(rank, 3).mine(things) for rank in range(3)]
    assert sorted(thing for share in shares for thing in share) == things


def test_what_fails_because_others_are_gone_says_so() -> None:
    with pytest.raises(RankLost, match="gone: Connection closed by peer"), _together():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nand more")
