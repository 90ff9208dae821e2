"""Several runs from one command, and how a child of an array job finds its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.cloud.sweep import INDEX_VARIABLE, own_point, points_file, sweep_points
from job.config import load_config
from job.errors import ConfigError

CONFIG = load_config("demo")
PLACE = "s3://bucket/runs/cats"


def test_without_a_sweep_there_is_one_run() -> None:
    (point,) = sweep_points(CONFIG, PLACE + "/")
    assert (point.run_uri, point.config) == (PLACE, CONFIG)


def test_seeds_count_up_from_the_configurations_own() -> None:
    points = sweep_points(CONFIG, PLACE, seeds=3)
    first = CONFIG.train.seed
    assert [point.config.train.seed for point in points] == [first, first + 1, first + 2]
    assert [point.run_uri for point in points] == [f"{PLACE}/seed={first + n}" for n in range(3)]


def test_each_combination_is_a_run_of_its_own() -> None:
    points = sweep_points(
        CONFIG, PLACE, seeds=2, sweeps=["loss.threshold_st=0.1,0.2", "data.random_mirror=true"]
    )
    assert [
        (point.config.loss.threshold_st, point.config.train.seed, point.config.data.random_mirror)
        for point in points
    ] == [(0.1, 0, True), (0.1, 1, True), (0.2, 0, True), (0.2, 1, True)]
    assert points[0].run_uri == f"{PLACE}/loss.threshold_st=0.1/data.random_mirror=True/seed=0"
    assert len({point.run_uri for point in points}) == 4


def test_values_may_be_lists() -> None:
    points = sweep_points(CONFIG, PLACE, sweeps=["data.crop_size=[64,64],[96,128]"])
    assert [point.config.data.crop_size for point in points] == [(64, 64), (96, 128)]
    assert points[1].run_uri == f"{PLACE}/data.crop_size=96x128"
    (point,) = sweep_points(CONFIG, PLACE, sweeps=["wandb.tags=[a/b,c]"])
    assert point.run_uri == f"{PLACE}/wandb.tags=a-bxc"


@pytest.mark.parametrize(
    ("seeds", "sweeps", "message"),
    [
        (0, [], "--seeds 0: must be at least 1"),
        (None, ["threshold_st=0.1"], "not of the form"),
        (None, ["loss.threshold_st="], "not of the form"),
        (None, ["loss.threshold_st"], "not of the form"),
        (None, ["loss.threshold_st=[0.1"], "not valid YAML"),
        (None, ["loss.threshold_st=0.1,0.1"], "0.1 is given twice"),
        (None, ["loss.threshold_st=0.1", "loss.threshold_st=0.2"], "swept twice"),
        (2, ["train.seed=1,2"], "train.seed is swept twice"),
        (None, ["loss.threshold_st=0.1,much"], "threshold_st"),
        (None, ["loss.treshold_st=0.1"], "loss.threshold_st"),
        (10_001, [], "more than 10000 runs"),
    ],
)
def test_what_cannot_be_swept_is_said(seeds: int | None, sweeps: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep_points(CONFIG, PLACE, seeds=seeds, sweeps=sweeps)
    assert message in str(caught.value)


def test_a_child_finds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "points.json"
    path.write_bytes(points_file([("runs/a", "a.yaml"), ("runs/b", "b.yaml")]))
    monkeypatch.setenv(INDEX_VARIABLE, "1")
    assert own_point(str(path)) == ("runs/b", "b.yaml")


@pytest.mark.parametrize(
    ("index", "text", "message"),
    [
        (None, b"[]", "is no array job"),
        ("2", b'[{"run": "a", "config": "b"}]', "has no run of number 2"),
        ("0", b"[1]", "has no run of number 0"),
        ("0", b"{", "has no run of number 0"),
        ("0", None, "no such file"),
    ],
)
def test_a_child_that_finds_nothing_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: str | None,
    text: bytes | None,
    message: str,
) -> None:
    monkeypatch.delenv(INDEX_VARIABLE, raising=False)
    if index is not None:
        monkeypatch.setenv(INDEX_VARIABLE, index)
    if text is not None:
        (tmp_path / "points.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        own_point(str(tmp_path / "points.json"))


def test_two_values_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"wandb\.project=a-b: the sweep has this run twice"):
        sweep_points(CONFIG, PLACE, sweeps=["wandb.project=a/b,a-b"])


def test_one_value_written_in_two_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match="the sweep has this run twice"):
        sweep_points(CONFIG, PLACE, sweeps=['loss.threshold_st=0.1,"0.1"'])


def test_lists_may_be_swept_over_a_preset_that_has_a_ratio() -> None:
    points = sweep_points(
        load_config("paper-voc"), "s3://b/r", seeds=None, sweeps=["data.labeled_list=a.txt,b.txt"]
    )
    assert [point.config.data.labeled_ratio for point in points] == [1.0, 1.0]
