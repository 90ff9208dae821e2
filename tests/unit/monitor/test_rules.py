"""Every warning sign of the guide: what must fire it, what at the edge must not, and silence."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config import Config, config_from_dict, config_from_yaml, load_config, preset_names
from job.monitor.health import Watch
from job.monitor.rules import RULES, rules_by_id
from job.monitor.setting import Setting
from tests.series import CLASSES, Curve, findings, lines

# ---------------------------------------------------------------- the guide's rows

GUIDE = {
    "Loss_CE > 4.0 after 5000": "ce_not_learning",
    "Loss_CE spike": "ce_spike",
    "Loss_CE NaN or inf": "non_finite",
    "Loss_CE decreases steadily": "ce_rising",
    "Loss_FM at 0.000": "fm_zero",
    "Loss_FM increases": "fm_rising",
    "Loss_ST 0.000 after 1000": "st_never_active",
    "Loss_ST > 5.0": "st_high",
    "Loss_D at 0.693": "d_stuck",
    "Loss_D at 0.0": "d_collapsed",
    "Loss_D > 1.0": "d_unstable",
    "ST_Count always 0": "st_count_zero",
    "ST_Count drops to 0": "st_count_dropped",
    "ST_Count far below its targets": "st_seldom",
    "training mIoU < 0.20 after 5000": "train_not_learning",
    "training mIoU decreases": "train_degrading",
    "validation mIoU far below its targets": "val_not_learning",
    "table: slight overfit": "slight_overfit",
    "gap below 0.15": "large_gap",
    "table: overfitting": "overfitting",
    "table: underfitting": "underfitting",
    "validation slightly lower than training": "val_above_train",
    "generator's learning rate decreases": "lr_not_decaying",
    "discriminator's learning rate decreases": "lr_D_not_decaying",
    "problem 1: validation mIoU does not improve": "val_stuck",
    "problem 1: training rises, validation does not": "val_stagnant",
    "problem 1: some classes might be ignored": "classes_ignored",
    "problem 2: unstable": "ce_spike",
    "problem 2: unstable from the beginning": "ce_exploded",
    "problem 2: NaN or inf values": "score_non_finite",
    "problem 3: self-training does not work": "st_count_zero",
    "problem 4: overfitting": "overfitting",
    "problem 4: validation mIoU decreases": "val_degrading",
    "problem 4: validation decreases while training increases": "val_parting",
    "problem 5: out of memory": "out_of_memory",
}
"""Warnings of the guide, by topic, and the rule that covers each."""


def test_every_warning_of_the_guide_has_a_rule_and_every_rule_a_warning() -> None:
    assert set(GUIDE.values()) == set(rules_by_id())
    assert len(rules_by_id()) == len(RULES)
    assert all(rule.guide and rule.remedies for rule in RULES)


def test_the_readme_names_every_rule() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    section = readme.partition("## When training goes wrong")[2].partition("\n## ")[0]
    assert set(rules_by_id()) <= set(re.findall(r"\w+", section))


# ---------------------------------------------------------------- what fires, and what does not


def after(start: int, value: float) -> Curve:
    return lambda at: value if at >= start else None


def ramp(start: int, end: int, low: float, high: float) -> Curve:
    """Healthy before, then from low to high in a line, and staying there."""

    def at_(at: int) -> float | None:
        if at < start:
            return None
        return low + (high - low) * min(1.0, (at - start) / (end - start))

    return at_


def always(value: float) -> Curve:
    return lambda at: value


def at_once(where: int, value: float) -> Curve:
    return lambda at: value if abs(at - where) < 50 else None


def noisy(mean: float, sd: float) -> Curve:
    noise = random.Random(0)
    return lambda at: noise.gauss(mean, sd)


CASES: Mapping[str, tuple[dict[str, Any], tuple[int, int], dict[str, Any]]] = {
    "ce_not_learning": (
        {"loss_ce": noisy(4.6, 0.3)},
        (5_000, 5_600),
        {"loss_ce": ramp(0, 5_000, 4.6, 1.5)},  # high, but learning by then
    ),
    "ce_exploded": (
        {"loss_ce": always(200.0)},
        (200, 400),
        {"loss_ce": at_once(100, 30.0)},  # a single bad batch
    ),
    "ce_spike": (
        {"loss_ce": at_once(20_000, 10.0)},
        (20_000, 20_000),
        {"loss_ce": at_once(20_000, 1.4)},  # three times as much is noise
    ),
    "ce_rising": (
        {"loss_ce": ramp(10_000, 30_000, 0.5, 2.5)},
        (11_500, 17_500),
        {"loss_ce": ramp(10_000, 30_000, 0.5, 0.6)},
    ),
    "fm_zero": (
        {"loss_fm": always(0.0)},
        (1_900, 2_100),
        {"loss_fm": always(0.001)},
    ),
    "fm_rising": (
        {"loss_fm": ramp(0, 10_000, 0.01, 0.5)},
        (1_500, 4_000),
        {"loss_fm": ramp(0, 50_000, 0.01, 0.05)},  # as the guide's own targets do
    ),
    "st_count_zero": (
        {"st_count": always(0)},
        (2_000, 2_000),
        {"st_count": after(1_500, 3)},
    ),
    "st_never_active": (
        {"st_count": always(0)},
        (5_900, 6_000),
        {"st_count": lambda at: 0 if at < 5_200 else None},
    ),
    "st_seldom": (
        {"st_count": lambda at: int(at % 700 == 0)},  # 1 of 16 in every seventh line
        (6_900, 7_100),
        {"st_count": lambda at: 2 if at > 5_000 else 0},
    ),
    "st_high": (
        {"loss_st": after(8_000, 6.0), "st_count": always(8)},
        (8_200, 8_600),
        {"loss_st": after(8_000, 4.9), "st_count": always(8)},
    ),
    "st_count_dropped": (
        {"st_count": lambda at: 0 if at > 20_000 else None},
        (20_500, 20_700),
        {"st_count": lambda at: 0 if 20_000 < at < 20_550 else None},  # five zeros
    ),
    "d_stuck": (
        {"loss_d": noisy(0.693, 0.001)},
        (1_900, 2_000),
        {"loss_d": noisy(0.693, 0.05)},
    ),
    "d_collapsed": (
        {"loss_d": after(9_000, 0.0)},
        (9_200, 9_500),
        {"loss_d": after(9_000, 0.1)},
    ),
    "d_unstable": (
        {"loss_d": after(9_000, 1.2)},
        (9_200, 9_500),
        {"loss_d": after(9_000, 0.95)},
    ),
    "score_non_finite": (
        {"val_miou": after(10_000, float("nan"))},
        (10_000, 10_000),
        {"val_miou": after(10_000, 0.0)},
    ),
    "train_not_learning": (
        {"train_miou": always(0.15), "val_miou": always(0.14)},
        (6_000, 6_500),
        {"train_miou": ramp(0, 8_000, 0.1, 0.4), "val_miou": ramp(0, 8_000, 0.1, 0.4)},
    ),
    "train_degrading": (
        {"train_miou": ramp(20_000, 30_000, 0.7, 0.5)},
        (21_000, 25_000),
        {"train_miou": ramp(20_000, 30_000, 0.7, 0.68)},
    ),
    "val_not_learning": (
        {"train_miou": always(0.25), "val_miou": always(0.15)},
        (6_000, 6_500),
        {"train_miou": always(0.25), "val_miou": always(0.21)},
    ),
    "val_stuck": (
        {"train_miou": ramp(0, 20_000, 0.2, 0.34), "val_miou": always(0.25)},
        (10_000, 10_500),
        {"val_miou": ramp(0, 50_000, 0.2, 0.45)},  # slowly, but it rises
    ),
    "val_stagnant": (
        {"train_miou": ramp(0, 50_000, 0.40, 0.62), "val_miou": noisy(0.45, 0.01)},
        (20_000, 24_000),
        {"train_miou": ramp(0, 50_000, 0.40, 0.50), "val_miou": noisy(0.45, 0.01)},
    ),
    "val_degrading": (
        {"val_miou": ramp(20_000, 30_000, 0.65, 0.5)},
        (21_500, 26_000),
        {"val_miou": ramp(20_000, 30_000, 0.65, 0.62)},
    ),
    "val_parting": (
        {
            "train_miou": ramp(20_000, 23_000, 0.70, 0.82),
            "val_miou": ramp(20_000, 23_000, 0.67, 0.53),
        },
        (21_500, 23_000),
        {"train_miou": always(0.70), "val_miou": ramp(20_000, 23_000, 0.67, 0.53)},
    ),
    "overfitting": (
        {"train_miou": after(10_000, 0.85), "val_miou": after(10_000, 0.60)},
        (10_500, 11_000),
        {"train_miou": after(10_000, 0.80), "val_miou": after(10_000, 0.61)},
    ),
    "slight_overfit": (
        {"train_miou": after(10_000, 0.80), "val_miou": after(10_000, 0.68)},
        (10_500, 11_000),
        {"train_miou": after(10_000, 0.80), "val_miou": after(10_000, 0.71)},
    ),
    "large_gap": (
        {"train_miou": after(10_000, 0.80), "val_miou": after(10_000, 0.62)},
        (10_500, 11_000),
        {"train_miou": after(10_000, 0.80), "val_miou": after(10_000, 0.66)},
    ),
    "val_above_train": (
        {"train_miou": after(10_000, 0.22), "val_miou": after(10_000, 0.70)},
        (10_500, 11_000),
        {"train_miou": after(10_000, 0.55), "val_miou": after(10_000, 0.70)},
    ),
    "classes_ignored": (
        {"dead_classes": always(2)},
        (10_500, 11_500),
        {"dead_classes": lambda at: 2 if at < 10_000 else 0},
    ),
    "underfitting": (
        {"train_miou": ramp(0, 50_000, 0.22, 0.37), "val_miou": ramp(0, 50_000, 0.21, 0.35)},
        (26_000, 26_500),
        {"train_miou": always(0.45), "val_miou": always(0.42)},
    ),
    "lr_not_decaying": (
        {"lr_g": always(2.5e-4)},
        (1_000, 1_000),
        {"lr_g": ramp(0, 50_000, 2.5e-4, 2.4e-4)},
    ),
    "lr_D_not_decaying": (
        {"lr_d": ramp(0, 50_000, 1e-5, 1e-4)},
        (200, 200),
        {"lr_d": always(0.0)},  # as the user wished
    ),
}
"""A fault, where its rule has to tell of it, and what looks much alike and is none."""
OF_EVENTS = {"non_finite", "out_of_memory"}


def told_at(rule: str, **curves: Curve) -> list[int]:
    return [one.iteration for one in findings(**curves) if one.rule == rule]


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() | OF_EVENTS == rules_by_id().keys()


@pytest.mark.parametrize("rule", CASES)
def test_a_fault_is_told_of_once_and_in_time(rule: str) -> None:
    curves, (first, last), _ = CASES[rule]
    (at,) = told_at(rule, **curves)
    assert first <= at <= last


@pytest.mark.parametrize("rule", CASES)
def test_what_only_looks_like_it_is_not_told_of(rule: str) -> None:
    _, _, curves = CASES[rule]
    assert told_at(rule, **curves) == []


@pytest.mark.parametrize("rule", CASES)
def test_a_message_says_what_and_what_to_try(rule: str) -> None:
    curves, _, _ = CASES[rule]
    found = next(one for one in findings(**curves) if one.rule == rule)
    assert found.remedies
    assert not {"{", "}"} & set(found.line())
    assert found.since <= found.iteration


@pytest.mark.parametrize("sd", [0.01, 0.02, 0.03])
def test_a_plateau_that_swings_is_no_fall(sd: float) -> None:
    def told(seed: int) -> bool:
        noise = random.Random(seed)
        found = findings(
            train_miou=after(10_000, 0.62),
            val_miou=lambda at: noise.gauss(min(0.6, 0.2 + at / 25_000), sd),
        )
        return any(one.rule == "val_degrading" for one in found)

    assert sum(map(told, range(25))) <= 1


def test_a_fall_begins_where_it_begins() -> None:
    noise = random.Random(0)

    def val(at: int) -> float | None:
        fall = 0.15 * max(0, at - 30_000) / 20_000
        return noise.gauss(0.62, 0.005) - fall if at > 12_000 else None

    found = next(
        one
        for one in findings(train_miou=after(12_000, 0.66), val_miou=val)
        if one.rule == "val_degrading"
    )
    assert 28_000 <= found.since <= 33_500


@pytest.mark.parametrize("sd", [0.002, 0.006, 0.010])
@pytest.mark.parametrize("seed", range(4))
def test_guessing_in_noise_is_one_episode_and_stays_open(sd: float, seed: int) -> None:
    noise = random.Random(seed)
    found = [
        one for one in findings(loss_d=lambda at: noise.gauss(0.693, sd)) if one.rule == "d_stuck"
    ]
    assert [one.ended for one in found] == [None]


def around(gap: float, sd: float) -> dict[str, Any]:
    """Scores that are so far apart, each as noisy."""
    noise = random.Random(0)
    return {
        "train_miou": lambda at: noise.gauss(0.7 + gap / 2, sd),
        "val_miou": lambda at: noise.gauss(0.7 - gap / 2, sd),
    }


AROUND: Mapping[str, dict[str, Any]] = {
    "ce_not_learning": {"loss_ce": noisy(3.0, 0.3)},  # with 21 classes the limit is 3.04
    "st_high": {"loss_st": noisy(5.0, 0.5), "st_count": always(8)},
    "d_unstable": {"loss_d": noisy(1.0, 0.1)},
    "train_not_learning": {"train_miou": noisy(0.20, 0.02), "val_miou": noisy(0.18, 0.02)},
    "val_not_learning": {"train_miou": noisy(0.30, 0.01), "val_miou": noisy(0.20, 0.01)},
    "val_stuck": {"train_miou": ramp(0, 20_000, 0.2, 0.6), "val_miou": noisy(0.28, 0.02)},
    "val_stagnant": {
        "train_miou": lambda at: 0.4 + 0.1 * at / 15_000,
        "val_miou": lambda at: 0.4 + 0.01 * at / 15_000 + 0.01 * math.sin(at),
    },
    "underfitting": {"train_miou": noisy(0.38, 0.02), "val_miou": noisy(0.28, 0.02)},
    "slight_overfit": around(0.10, 0.014),
    "large_gap": around(0.15, 0.014),
    "overfitting": around(0.20, 0.014),
}
"""What swings around the limit of a rule for a whole run."""


@pytest.mark.parametrize("rule", AROUND)
def test_what_swings_around_a_limit_is_one_episode(rule: str) -> None:
    assert len(told_at(rule, **AROUND[rule])) == 1


@pytest.mark.parametrize("gap", [0.15, 0.20])
def test_a_gap_that_swings_between_two_of_its_rules_is_told_of_once_by_each(gap: float) -> None:
    told = [one.rule for one in findings(**around(gap, 0.014))]
    assert len(told) == len(set(told)), told


def test_a_gap_that_has_closed_is_over() -> None:
    found = [
        one
        for one in findings(train_miou=lambda at: 0.9 if at < 20_000 else None)
        if one.rule == "overfitting"
    ]
    assert found[0].ended is not None
    assert 20_000 < found[0].ended <= 24_000


def test_a_loss_that_jumps_and_stays_up_is_not_over() -> None:
    found = [
        one
        for one in findings(loss_ce=lambda at: 3.5 if 12_000 < at <= 40_000 else 0.5)
        if one.rule == "ce_spike"
    ]
    assert [one.iteration for one in found] == [12_100]
    assert found[0].ended is not None
    assert found[0].ended > 40_000


@pytest.mark.parametrize("level", [0.05, 0.08, 0.15])
def test_a_feature_loss_that_only_swings_does_not_rise(level: float) -> None:
    def told(seed: int) -> bool:
        noise = random.Random(seed)
        found = findings(loss_fm=lambda at: level * noise.lognormvariate(0, 0.5))
        return any(one.rule == "fm_rising" for one in found)

    assert not any(map(told, range(6)))


@pytest.mark.parametrize("sd", [0.36, 0.54])
def test_a_noisy_cross_entropy_does_not_jump(sd: float) -> None:
    def told(seed: int) -> bool:
        noise = random.Random(seed)
        found = findings(
            loss_ce=lambda at: 0.35 * noise.lognormvariate(0, sd) if at > 9_000 else None
        )
        return any(one.rule == "ce_spike" for one in found)

    assert sum(map(told, range(6))) <= 1


@pytest.mark.parametrize("log_every", [10, 50])
def test_logged_often_one_bad_batch_is_no_jump_and_two_lines_are(log_every: int) -> None:
    config = config_from_yaml("", source="x", overrides={"train.log_every": log_every})

    def told(lines: int) -> list[tuple[int, int]]:
        bad = range(20_000, 20_000 + lines * log_every, log_every)
        found = findings(config, until=21_000, loss_ce=lambda at: 10.0 if at in bad else 0.5)
        return [(one.since, one.iteration) for one in found if one.rule == "ce_spike"]

    assert told(1) == []
    assert told(2) == [(20_000, 20_000 + log_every)]


def test_a_learning_rate_of_nothing_is_not_to_be_halved() -> None:
    config = config_from_yaml("", source="x", overrides={"train.learning_rate": 1e-9})
    advice = rules_by_id()["train_not_learning"].advice(Setting(config), 20_000)
    assert "--learning-rate 2.5e-4 (it is 1e-09)" in advice
    assert not any("5e-10" in line for line in advice)


def test_a_short_series_that_rises_is_learning() -> None:
    """Three evaluations in all, the first ones of a run that has them late."""
    config = config_from_yaml("", source="x", overrides={"train.eval_every": 5_000})
    scores = {5_000: 0.10, 10_000: 0.15, 15_000: 0.19}
    assert not findings(
        config, until=15_000, train_miou=scores.get, val_miou=lambda at: scores[at] - 0.01
    )


def test_what_has_been_learned_and_lost_is_not_called_never_learned() -> None:
    scores = {name: ramp(30_000, 31_000, 0.6, 0.05) for name in ("train_miou", "val_miou")}
    told = {one.rule for one in findings(**scores)}
    assert {"train_degrading", "val_degrading"} <= told
    assert not {"train_not_learning", "val_not_learning"} & told


@pytest.mark.parametrize("metric", ["loss_ce", "loss_fm"])
@pytest.mark.parametrize("lines", [10, 24, 100])
def test_what_has_risen_and_stays_up_is_not_over(metric: str, lines: int) -> None:
    rule = {"loss_ce": "ce_rising", "loss_fm": "fm_rising"}[metric]
    scale = {"loss_ce": 1.0, "loss_fm": 0.1}[metric]
    noise = random.Random(1)

    def risen(at: int) -> float:
        share = min(1.0, max(0.0, (at - 20_000) / (100 * lines)))
        back = 0.05 if at > 45_000 else 1.0
        return back * scale * 0.3 * 10**share * noise.lognormvariate(0, 0.15)

    told = [one for one in findings(until=44_000, **{metric: risen}) if one.rule == rule]
    assert [(one.ended, 19_000 <= one.since <= 20_000 + 50 * lines) for one in told] == [
        (None, True)
    ]
    told = [one for one in findings(**{metric: risen}) if one.rule == rule]
    assert told[0].ended is not None
    assert told[0].ended > 45_000


def test_that_it_is_over_is_not_said_with_what_ended_it() -> None:
    (found,) = (
        one
        for one in findings(loss_ce=lambda at: 9.0 if 20_000 < at < 21_000 else 0.5)
        if one.rule == "ce_spike"
    )
    assert found.line() == (
        "over: Loss_CE has jumped, and is 9.000 now: training is unstable "
        f"(iteration 20100 to {found.ended}, ce_spike)"
    )


@pytest.mark.parametrize("step", [6.0, 8.0])
def test_a_jump_is_one_finding_whatever_level_it_stays_at(step: float) -> None:
    noise = random.Random(0)
    found = findings(
        loss_ce=lambda at: 0.5 * (step if at > 20_000 else 1.0) * noise.lognormvariate(0, 0.3)
    )
    assert [one.rule for one in found] == ["ce_spike"]


SHORT: Mapping[str, tuple[list[float], list[float], set[str]]] = {
    "a fall from a lone best": (
        [0.35, 0.50, 0.65, 0.44, 0.44, 0.44],
        [0.30, 0.45, 0.60, 0.42, 0.42, 0.42],
        {"train_degrading", "val_degrading"},
    ),
    "a collapse": (
        [0.35, 0.50, 0.62, 0.22, 0.22, 0.22],
        [0.30, 0.45, 0.60, 0.20, 0.20, 0.20],
        {"train_degrading", "val_degrading"},
    ),
    "overfitting": (
        [0.40, 0.48, 0.55, 0.57, 0.58, 0.60],
        [0.38, 0.45, 0.50, 0.47, 0.44, 0.41],
        {"val_parting"},
    ),
    "a plateau": (
        [0.40, 0.48, 0.55, 0.57, 0.56, 0.58],
        [0.38, 0.45, 0.50, 0.47, 0.49, 0.48],
        set(),
    ),
}
"""Scores on training and validation images of a run of six evaluations."""


@pytest.mark.parametrize("kind", SHORT)
def test_six_evaluations_are_enough_for_what_is_plain(kind: str) -> None:
    train, val, expected = SHORT[kind]
    config = load_config("demo")
    every = config.train.eval_every
    setting = Setting(config, 5)
    watch = Watch(setting)
    for number, (one, other) in enumerate(zip(train, val, strict=True), start=1):
        watch.observe(
            {"event": "eval", "iteration": number * every, "train_miou": one, "val_miou": other}
        )
    told = {one.rule for one in watch.findings if one.severity != "note"}
    assert told == expected


def test_since_is_where_it_began_not_where_its_window_does() -> None:
    (found,) = (one for one in findings(loss_d=after(9_000, 1.2)) if one.rule == "d_unstable")
    assert found.since == 9_000


@pytest.mark.parametrize("kind", ["three per cent a line", "in noise", "all the run"])
def test_a_slow_rise_is_a_rise(kind: str) -> None:
    noise = random.Random(0)
    curves: dict[str, Curve] = {
        "three per cent a line": lambda at: 0.005 * 1.03 ** (at / 100),
        "in noise": lambda at: (0.01 + 2 * at / 50_000) * noise.uniform(0.8, 1.2),
        "all the run": lambda at: 0.05 * 8 ** (at / 50_000) * noise.lognormvariate(0, 0.2),
    }
    assert "fm_rising" in {one.rule for one in findings(loss_fm=curves[kind])}


@pytest.mark.parametrize(
    ("changes", "rule", "never"),
    [
        ({"loss.threshold_st": 0.95}, "st_high", "--threshold-st"),
        ({"loss.threshold_st": 0.0}, "st_never_active", "--threshold-st"),
        ({"data.val_split": 0.5}, "overfitting", "--val-split"),
        ({"train.batch_size": 1}, "out_of_memory", "--batch-size"),
    ],
)
def test_nothing_is_advised_that_changes_nothing(
    changes: dict[str, Any], rule: str, never: str
) -> None:
    config = config_from_yaml("", source="x", overrides=changes)
    advice = rules_by_id()[rule].advice(Setting(config), 20_000)
    assert advice
    assert not any(never in line for line in advice)


def test_smaller_batches_hold_the_same_images_in_all() -> None:
    config = config_from_yaml(
        "", source="x", overrides={"train.batch_size": 3, "train.accumulate": 2}
    )
    advice = rules_by_id()["out_of_memory"].advice(Setting(config), 1)
    assert advice[0] == "--batch-size 1 --set train.accumulate=6"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("metric", ["loss_ce", "loss_d", "loss_st"])
def test_a_loss_that_is_no_number_is_told_of_at_once(metric: str, value: float) -> None:
    bad = {metric: after(12_000, value), "st_count": after(11_000, 8)}
    (found,) = findings(**bad)
    assert (found.rule, found.iteration) == ("non_finite", 12_000)
    assert found.to_dict()["value"] is None  # JSON has no NaN


# ---------------------------------------------------------------- silence


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), preset=st.sampled_from(["guide", "camvid", "demo"]))
def test_a_healthy_run_is_silent(seed: int, preset: str) -> None:
    assert findings(load_config(preset), seed=seed) == []


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    iterations=st.sampled_from([2_000, 20_000, 100_000]),
    share=st.sampled_from([0.02, 0.1, 0.3]),
    batch=st.sampled_from([(1, 8), (2, 8), (8, 1), (16, 2), (4, 1), (1, 1)]),
)
def test_so_is_one_of_another_length_and_other_batches(
    seed: int, iterations: int, share: float, batch: tuple[int, int]
) -> None:
    size, accumulate = batch
    config = config_from_yaml(
        "",
        source="x",
        overrides={
            "train.iterations": iterations,
            "train.batch_size": size,
            "train.accumulate": accumulate,
            "loss.st_start": round(iterations * share),
            "train.log_every": iterations // 200,
            "train.eval_every": iterations // 40,
        },
    )
    assert findings(config, seed=seed) == []


# ---------------------------------------------------------------- other runs than the guide's


def with_(**changes: Any) -> Config:
    return config_from_yaml(
        "", source="x", overrides={key.replace("__", "."): value for key, value in changes.items()}
    )


def test_without_a_discriminator_nothing_of_it_is_judged() -> None:
    config = with_(train__supervised_only=True)
    zero = always(0.0)
    assert findings(config, loss_fm=zero, loss_st=zero, loss_d=zero, st_count=zero) == []


def test_without_self_training_its_absence_is_no_fault() -> None:
    config = with_(loss__st_start=50_000)
    assert findings(config, loss_st=always(0.0), st_count=always(0)) == []


def test_the_iterations_of_a_shorter_run_are_scaled() -> None:
    config = with_(train__iterations=5_000, loss__st_start=100, train__log_every=10)
    (found,) = (f for f in findings(config, loss_ce=always(4.6)) if f.rule == "ce_not_learning")
    assert 500 <= found.iteration <= 560


def test_where_guessing_costs_less_than_the_guides_limit_guessing_is_the_limit() -> None:
    """Eleven classes: log 11 is 2.4, and a net that has learned nothing never reaches 4.0."""
    for classes, expected in ((CLASSES, True), (50, False), (None, False)):
        watch = Watch(Setting(Config(), classes))
        for line in lines(loss_ce=always(3.5)):
            watch.observe(line)
        told = any(one.rule == "ce_not_learning" for one in watch.findings)
        assert told == expected


def test_what_a_run_does_already_is_not_advised() -> None:
    rule = rules_by_id()["overfitting"]
    plain = rule.advice(Setting(with_()), 1)
    mirrored = rule.advice(Setting(with_(data__random_mirror=True)), 1)
    assert "--random-mirror" in plain
    assert set(plain) - set(mirrored) == {"--random-mirror"}


def test_to_wait_is_advised_only_while_it_is_time_to() -> None:
    rule = rules_by_id()["st_count_zero"]
    setting = Setting(with_(loss__threshold_st=0.9))
    assert rule.advice(setting, 2_000)[:2] == [
        "--threshold-st 0.2 (it is 0.9)",
        "or wait: it may begin by iteration 5000",
    ]
    assert not any("wait" in text for text in rule.advice(setting, 5_000))


@pytest.mark.parametrize("preset", preset_names())
def test_every_flag_that_is_advised_exists(preset: str) -> None:
    """And every key of --set."""
    import re

    import typer

    from job.cli import app
    from job.config import valid_keys

    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    setting = Setting(load_config(preset))
    said = " ".join(text for rule in RULES for text in rule.advice(setting, 1))
    assert set(re.findall(r"--[a-zA-Z-]+\b", said)) <= flags
    assert set(re.findall(r"--set ([\w.]+)=", said)) <= set(valid_keys())


def test_while_the_gate_opens_slowly_nothing_is_asked_of_self_training() -> None:
    config = config_from_dict(
        {"loss": {"st_start": 1000, "gate_warmup": 3000}, "train": {"iterations": 50_000}},
        source="test",
    )
    setting = Setting(config)
    by_id = {rule.id: rule for rule in RULES}
    assert by_id["st_count_zero"].first_iteration(setting) == 4001
    assert setting.scale.at(1000) == 4000
    never = config_from_dict({"loss": {"gate_warmup": 60_000}}, source="test")
    assert not Setting(never).self_trains
