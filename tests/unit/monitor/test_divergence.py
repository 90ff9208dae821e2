"""What is done about a training that has diverged, by what the ledger tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from job.config import Config, config_from_yaml
from job.errors import Diverged
from job.events import TrainEvent
from job.monitor.divergence import CERTAIN, Guard, Remedies

ROLLED_BACK = {"event": "rolled_back"}
HALVED = {"event": "batch_halved"}


def config(**changes: Any) -> Config:
    return config_from_yaml(
        "", source="x", overrides={key.replace("__", "."): value for key, value in changes.items()}
    )


def changed(*lines: str) -> dict[str, Any]:
    return {"event": "configuration_changed", "changes": list(lines)}


def event(iteration: int, loss_ce: float) -> TrainEvent:
    return TrainEvent(iteration, loss_ce, 0.01, 0.5, 0.4, loss_ce, 4, 1e-4, 1e-4, 10.0)


# ---------------------------------------------------------------- what it is trained with


def test_each_rollback_halves_both_learning_rates() -> None:
    before = config(train__learning_rate=0.01, train__learning_rate_D=0.002)
    after = Remedies(rollbacks=2).applied(before)
    assert after.train.learning_rate == 0.0025
    assert after.train.learning_rate_D == 0.0005
    unchanged = {"train": before.train}
    assert after.model_copy(update=unchanged) == before.model_copy(update=unchanged)


def test_a_halved_batch_is_accumulated_twice_as_often() -> None:
    before = config(train__batch_size=8, train__accumulate=2)
    after = Remedies(halvings=2).applied(before).train
    assert (after.batch_size, after.accumulate) == (2, 8)
    assert Remedies(halvings=2).can_halve(before)
    assert not Remedies(halvings=3).can_halve(before)
    assert not Remedies().can_halve(config(train__batch_size=3))


def test_nothing_done_is_nothing_changed() -> None:
    assert Remedies.of([]).applied(config()) == config()


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([ROLLED_BACK, HALVED, {"event": "train", "iteration": 3}, ROLLED_BACK], (2, 1)),
        ([ROLLED_BACK, changed("loss.lambda_st: 1.0 in the run, 0.5 now")], (1, 0)),
        ([ROLLED_BACK, HALVED, changed("train.learning_rate: 1 in the run, 2 now")], (0, 1)),
        ([ROLLED_BACK, HALVED, changed("train.learning_rate_D: 1 in the run, 2 now")], (0, 1)),
        ([ROLLED_BACK, HALVED, changed("train.batch_size: 4 in the run, 2 now")], (1, 0)),
        ([ROLLED_BACK, HALVED, changed("train.accumulate: 4 in the run, 8 now")], (1, 0)),
    ],
)
def test_whoever_changes_the_same_has_taken_over(events: Any, expected: tuple[int, int]) -> None:
    found = Remedies.of(events)
    assert (found.rollbacks, found.halvings) == expected


def test_a_change_that_a_rollback_repeats_takes_nothing_over() -> None:
    """Else a run would roll back for ever to before the change that makes it diverge."""
    line = changed("train.learning_rate: 0.01 in the run, 30.0 now")
    assert Remedies.of([line, ROLLED_BACK, line, ROLLED_BACK, line]).rollbacks == 2
    other = changed("train.learning_rate: 0.01 in the run, 3.0 now")
    assert Remedies.of([line, ROLLED_BACK, line, ROLLED_BACK, other]).rollbacks == 0


# ---------------------------------------------------------------- the guard


def ends_at(losses: Sequence[float], guard: Guard) -> tuple[int, int | None] | None:
    """Iteration where it ends the training, and since when; None if it does not."""
    for iteration, loss in enumerate(losses, start=1):
        try:
            guard.train(event(iteration, loss))
        except Diverged:
            return iteration, guard.since
    return None


def acting() -> Guard:
    return Guard(config(monitor__on_divergence="rollback"))


@pytest.mark.parametrize(
    ("losses", "ended"),
    [
        ([1.0] * 10 + [10.0] * 5, (13, 11)),
        ([1.0] * 10 + [10.0, 10.0, 1.0, 10.0, 10.0, 1.0], None),
        ([1.0] * 10 + [4.9] * 20, None),
        ([0.1] * 10 + [1.0] * 20, None),  # ten times as much, and yet little
        ([2.0] + [19.0] * 20, None),  # too few to tell
        ([1e9] * 20, (3, 1)),  # ruined from the first line on
        ([1.0] * 10 + [10.0, float("nan"), float("inf")], (13, 11)),
        ([3.0 * 0.9**n for n in range(40)], None),
    ],
)
def test_a_jump_that_stays_is_no_single_bad_batch(
    losses: list[float], ended: tuple[int, int] | None
) -> None:
    assert ends_at(losses, acting()) == ended


def test_it_says_what_it_saw_and_what_may_help() -> None:
    guard = acting()
    assert ends_at([1.0] * 10 + [10.0, 11.0], guard) is None
    with pytest.raises(Diverged, match=r"Loss_CE is 12\.000, and was 1\.000 before") as caught:
        guard.train(event(13, 12.0))
    assert "--learning-rate 0.000125 --learning-rate-D 5e-05" in caught.value.mend
    assert "on_divergence" not in caught.value.mend  # it is set already


def test_by_default_it_only_listens() -> None:
    guard = Guard(config())
    assert ends_at([1.0] * 10 + [100.0] * 10, guard) is None
    assert not guard.suspects


def test_it_suspects_from_the_first_line_on_and_until_it_is_over() -> None:
    guard = acting()
    suspected = []
    for iteration, loss in enumerate([1.0] * 10 + [10.0] * (CERTAIN - 1) + [1.0], start=1):
        guard.train(event(iteration, loss))
        suspected.append(guard.suspects)
    assert suspected == [False] * 10 + [True] * (CERTAIN - 1) + [False]


def test_a_resumed_run_judges_as_one_never_stopped() -> None:
    losses = [1.0] * 10 + [10.0] * 5
    lines = [
        {"event": "train", "iteration": iteration, "loss_ce": loss}
        for iteration, loss in enumerate(losses, start=1)
    ]
    rolls_back = config(monitor__on_divergence="rollback")
    guard = Guard(rolls_back, [{"event": "eval", "iteration": 5}, *lines[:11]])
    assert guard.suspects
    guard.train(event(12, 10.0))
    with pytest.raises(Diverged):
        guard.train(event(13, 10.0))
    assert guard.since == 11
