"""What a W&B run shows of a ledger: each line once, the guide's names, and its targets."""

from __future__ import annotations

from typing import Any

import pytest

from job.config import config_from_dict
from job.monitor.ledger import best_of
from job.monitor.setting import Setting
from job.monitor.wandb_rows import (
    KINDS,
    NOTHING,
    class_scores,
    findings_of,
    rows_of,
    sent_so_far,
    target_charts,
    train_row,
)
from tests.series import CLASSES, lines

CONFIG = config_from_dict({"train": {"iterations": 5000}, "loss": {"st_start": 100}}, source="test")
SETTING = Setting(CONFIG, CLASSES)
NAMES = [f"c{index}" for index in range(CLASSES)]


def test_every_line_is_a_row_and_every_evaluation_says_where_the_run_stands() -> None:
    events = list(lines(CONFIG))
    rows = list(rows_of(events, SETTING, NAMES))
    for kind, number in (("train", 50), ("eval", 10), ("health", 10), ("end", 0)):
        assert sum(row.kind == kind for row in rows) == number
    iterations = [row.iteration for row in rows]
    assert iterations == sorted(iterations)
    first = rows[0].to_dict()
    assert (first["iteration"], first["sent/train"]) == (100, 100)
    assert first["_timestamp"] == events[0]["time"]
    scored = next(row for row in rows if row.kind == "eval").to_dict()
    assert scored["IoU/c20"] == 0.5


def test_a_line_of_an_earlier_version_sends_what_it_has() -> None:
    assert train_row({"iteration": 3, "loss_ce": 1.0}).to_dict() == {
        "iteration": 3,
        "Training Loss/Cross Entropy": 1.0,
        "sent/train": 3,
    }


@pytest.mark.parametrize(
    ("names", "shown"),
    [(("a", "b"), ["a", "b"]), ((), ["class 0", "class 1"]), (("a",), ["class 0", "class 1"])],
)
def test_classes_have_their_names_where_they_fit(names: Any, shown: list[str]) -> None:
    scores = class_scores({"class_iou": [0.25, None]}, names)
    assert scores == list(zip(shown, [0.25, None], strict=True))


def test_the_best_is_the_first_of_equals_and_none_before_an_evaluation() -> None:
    events = [{"event": "eval", "val_miou": v, "iteration": n} for n, v in enumerate([1, 3, 3])]
    best = best_of([{"event": "train"}, *events])
    assert best is not None
    assert best["iteration"] == 1
    assert best_of([{"event": "train"}]) is None


@pytest.mark.parametrize(
    ("summary", "sent"),
    [
        ({}, (NOTHING, NOTHING, NOTHING, NOTHING)),
        ({"iteration": 500}, (500, 500, 500, NOTHING)),
        ({"iteration": 700, "sent/train": 700, "sent/eval": 500}, (700, 500, NOTHING, NOTHING)),
        ({"iteration": "x"}, (NOTHING, NOTHING, NOTHING, NOTHING)),
    ],
    ids=["new", "of an earlier version", "ours", "changed by hand"],
)
def test_what_w_and_b_has_is_read_from_its_summary(summary: Any, sent: tuple[int, ...]) -> None:
    assert tuple(sent_so_far(summary)[kind] for kind in KINDS) == sent


def test_targets_are_scaled_to_the_run_and_lie_around_a_healthy_one() -> None:
    charts = {chart.name: chart for chart in target_charts(list(lines(CONFIG)), SETTING)}
    assert len(charts) == 7
    scores = charts["Targets/Validation mIoU"]
    assert [at for at, _ in scores.low] == [
        SETTING.scale.at(at) for at in (500, 5_000, 10_000, 25_000, 50_000)
    ]
    assert scores.low[-1] == (5000, 0.65)
    assert scores.high[-1] == (5000, 0.80)
    low, value, high = (series[-1][1] for series in (scores.low, scores.measured, scores.high))
    assert low < value < high
    assert charts["Targets/Cross Entropy"].low[0] == (0, 3.0)
    assert charts["Targets/Cross Entropy"].high[-1] == (5000, 0.5)
    assert charts["Targets/Self-Training"].low[0] == (100, 1.0)  # where self-training begins


def test_a_long_series_is_thinned_and_keeps_its_last_point() -> None:
    config = config_from_dict({"train": {"iterations": 5000, "log_every": 1}}, source="test")
    events = list(lines(config, until=4999))
    for chart in target_charts(events, Setting(config, CLASSES)):
        assert len(chart.measured) <= 200
    measured = target_charts(events, Setting(config, CLASSES))[0].measured
    assert measured[-1][0] == 4999
    assert len(measured) > 100


def test_without_a_discriminator_there_are_no_targets_of_one() -> None:
    config = config_from_dict(
        {"train": {"iterations": 5000, "supervised_only": True}}, source="test"
    )
    names = {chart.name for chart in target_charts(list(lines(config)), Setting(config, CLASSES))}
    assert names == {
        "Targets/Cross Entropy", "Targets/Training mIoU", "Targets/Validation mIoU",
    }  # fmt: skip


def test_a_run_without_a_line_has_neither_targets_nor_findings() -> None:
    assert target_charts([], SETTING) == []
    assert findings_of([], SETTING) == []
