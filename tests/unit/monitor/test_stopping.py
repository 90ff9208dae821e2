"""When training ends before its last iteration: the guide's three reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from job.config import Config, config_from_yaml
from job.events import EvalEvent
from job.monitor.stopping import StopRules

PLATEAU = [0.3, 0.4, 0.5, *[0.49] * 40]


def config(**stop: Any) -> Config:
    return config_from_yaml(
        "", source="x", overrides={f"stop.{key}": value for key, value in stop.items()}
    )


def ends(scores: Sequence[float], **stop: Any) -> tuple[int | None, str]:
    """Iteration and reason, with an evaluation every 500."""
    rules = StopRules(config(**stop))
    for number, score in enumerate(scores, start=1):
        rules.evaluation(EvalEvent(500 * number, score, score, (), 0.9, score, None))
        if rules.reason:
            return 500 * number, rules.reason
    return None, ""


def test_without_improvement_for_as_long_as_one_has_patience() -> None:
    assert ends(PLATEAU) == (
        11_500,
        "validation mIoU has not improved for 10000 iterations "
        "(the best is 0.5000 at iteration 1500)",
    )
    assert ends(PLATEAU, patience=2_000)[0] == 3_500
    assert ends(PLATEAU, patience=0)[0] is None
    assert ends([*PLATEAU[:20], 0.51, *PLATEAU[:19]])[0] is None


def test_an_equal_score_is_no_improvement() -> None:
    assert ends([0.5] * 40)[0] == 10_500


def test_while_it_keeps_falling() -> None:
    falling = [0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.55, 0.53, 0.52, 0.5]
    at, reason = ends(falling)
    assert at == 4_500
    assert reason == (
        "validation mIoU has been falling since iteration 3000 "
        "(the best is 0.6000 at iteration 2000)"
    )
    assert ends(falling, degrading="false")[0] is None
    assert ends([0.3, 0.6, 0.6, 0.6, 0.5, 0.6, 0.6, 0.52, 0.6, 0.6])[0] is None  # dips


def test_at_the_target() -> None:
    rising = [0.5, 0.6, 0.7, 0.76, 0.8]
    assert ends(rising)[0] is None
    assert ends(rising, target_miou=0.75) == (
        2_000,
        "validation mIoU 0.7600 has reached the target of 0.75",
    )


def test_a_resumed_run_decides_as_one_never_stopped() -> None:
    lines = [
        {"event": "eval", "iteration": 500 * number, "val_miou": score}
        for number, score in enumerate(PLATEAU, start=1)
    ]
    rules = StopRules(config(), [{"event": "train", "iteration": 100}, *lines[:15]])
    assert rules.reason == ""
    for line in lines[15:23]:
        score = line["val_miou"]
        rules.evaluation(EvalEvent(line["iteration"], score, score, (), 0.9, 0.5, 0.5))
    assert rules.reason.startswith("validation mIoU has not improved for 10000 iterations")
    assert StopRules(config(), lines[:23]).reason == rules.reason
    assert StopRules(config(patience=0), lines[:23]).reason == ""


def test_a_score_that_is_no_number_decides_nothing() -> None:
    assert ends([math.nan] * 50)[0] is None


@pytest.mark.parametrize("wrong", [{"patience": -1}, {"target_miou": 0}, {"target_miou": 75}])
def test_what_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(Exception, match=f"stop.{next(iter(wrong))}"):
        config(**wrong)
