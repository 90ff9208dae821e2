"""The table of recipes, by hand-computed numbers, and how a recipe is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from job import recipes
from job.checkpoint.lease import acquire
from job.config import DataConfig
from job.errors import ConfigError, DataError, JobError
from job.recipes import DEFAULT_RECIPES, Recipe, Score, bench_recipes, markdown
from job.storage import open_store
from tests.conftest import MakeData, write_data
from tests.layouts import WRITERS, write_voc


def score(recipe: str, seed: int, miou: float, **changes: Any) -> Score:
    facts = {
        "class_iou": {"sky": miou, "sea": None},
        "val_miou": miou + 0.1,
        "scored": "best model on test",
        "hours": 0.5,
        **changes,
    }
    return Score(recipe=recipe, seed=seed, miou=miou, **facts)


def test_means_spreads_and_gains_are_those_computed_by_hand() -> None:
    table = markdown(
        ["a", "b"],
        [score("a", 0, 0.30), score("a", 1, 0.40), score("b", 0, 0.33), score("b", 1, 0.47)],
    )
    rows = [line for line in table.splitlines() if line.startswith(("| a ", "| b "))]
    # Standard deviations of samples: 0.1 / sqrt(2), 0.14 / sqrt(2), 0.04 / sqrt(2).
    assert rows[0] == ("| a | **0.3500 ± 0.0707** |  | 0.3000 | 0.4000 | 0.4500 ± 0.0707 | 0.50 |")
    assert rows[1] == (
        "| b | **0.4000 ± 0.0990** | +0.0500 ± 0.0283 | 0.3300 | 0.4700 | 0.5000 ± 0.0990 | 0.50 |"
    )
    assert rows[2:] == ["| a | 0.350 | - |", "| b | 0.400 | - |"]
    assert table.startswith("mIoU, best model on test; 2 seeds")


def test_a_single_seed_has_no_spread() -> None:
    table = markdown(["a", "b"], [score("a", 0, 0.30), score("b", 0, 0.28)])
    assert "| b | **0.2800** | -0.0200 | 0.2800 | 0.3800 | 0.50 |" in table


def test_every_row_has_as_many_cells_as_its_head() -> None:
    table = markdown(["a"], [score("a", seed, 0.3) for seed in range(3)])
    for block in table.split("\n\n"):
        rows = [line.count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1


@pytest.mark.parametrize("text", DEFAULT_RECIPES)
def test_the_recipes_of_the_house_are_valid(text: str) -> None:
    recipe = Recipe.parse(text)
    config = recipe.config(7, {"train.iterations": 100})
    assert config.train.seed == 7
    assert config.train.iterations == 100
    assert config.train.supervised_only == (recipe.name == "supervised")


def test_what_all_have_in_common_comes_over_the_recipe() -> None:
    recipe = Recipe.parse("mine=guide,train.batch_size=2,loss.threshold_st=0.5")
    config = recipe.config(0, {"train.batch_size": 8})
    assert (config.train.batch_size, config.loss.threshold_st) == (8, 0.5)


@pytest.mark.parametrize("text", ["guide", "=guide", "a=", "a b=guide", "../x=guide"])
def test_a_recipe_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form NAME=PRESET") as caught:
        Recipe.parse(text)
    assert "for example" in caught.value.mend


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        (["a=guide", "a=modern"], "two recipes have the same name"),
        (["a=nothing"], "no such preset"),
        (["a=guide,train.iteration=3"], "did you mean train.iterations"),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_trained(
    recipes: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        bench_recipes(
            [Recipe.parse(text) for text in recipes],
            data="nowhere",
            out=tmp_path / "out",
            seeds=1,
            common={},
            test=None,
            parallel=1,
            tell=print,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("common", "test", "said"),
    [({"train.seed": 5}, None, "--seeds says which"), ({}, "nowhere", "--test nowhere")],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    common: dict[str, Any], test: str | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=said):
        bench_recipes(
            [Recipe.parse("a=guide")],
            data="nowhere",
            out=tmp_path / "out",
            seeds=1,
            common=common,
            test=test,
            parallel=1,
            tell=print,
        )
    assert not (tmp_path / "out").exists()


def bench(tmp_path: Path, data: Path, test: Path, **test_data: Any) -> None:
    bench_recipes(
        [Recipe.parse("a=guide")],
        data=str(data),
        out=tmp_path / "out",
        seeds=1,
        common={},
        test=str(test),
        test_data=DataConfig(**test_data),
        parallel=1,
        tell=print,
    )


def test_a_test_set_of_two_layouts_has_to_be_told(tmp_path: Path, make_data: MakeData) -> None:
    data, test = make_data(), tmp_path / "test"
    write_voc(test)
    write_data(test)
    with pytest.raises(DataError, match=f"--test {test}: .*holds more than one") as caught:
        bench(tmp_path, data, test)
    assert "--test-layout folder" in caught.value.mend
    with pytest.raises(DataError, match="has 3 classes, the masks of this layout have 21"):
        bench(tmp_path, data, test, layout="voc")
    with pytest.raises(DataError, match="no such file, which --test-list names"):
        bench(tmp_path, data, test, layout="folder", val_list="list.txt")


@pytest.mark.parametrize("layout", WRITERS)
def test_a_test_set_of_other_classes_is_refused_before_anything_is_trained(
    layout: str, tmp_path: Path, make_data: MakeData
) -> None:
    test = tmp_path / "test"
    WRITERS[layout](test)
    with pytest.raises(DataError, match=f"are not those of --data {tmp_path}/data") as caught:
        bench(tmp_path, make_data(), test)
    assert "dataset.yaml in it may name its classes" in caught.value.mend
    assert not (tmp_path / "out").exists()


def test_a_test_set_without_masks_is_refused(tmp_path: Path, make_data: MakeData) -> None:
    test = make_data(name="test", val=0)
    with pytest.raises(DataError, match="holds no image with a mask") as caught:
        bench(tmp_path, make_data(), test)
    assert "--test-list" in caught.value.mend


def test_a_run_that_is_still_trained_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the child of a command that was killed, which is about to save."""
    monkeypatch.setattr(recipes, "POLL_S", 0)
    lease = acquire(open_store(str(tmp_path)), on_lost=lambda: None)
    recipe = Recipe.parse("a=guide")
    one = recipes._Run(recipe, 0, recipe.config(0, {}), tmp_path)
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        lease.release()

    recipes._await_predecessor(one, recipes._Children(), tell)
    assert told == [f"a, seed 0: waiting for process {os.getpid()}, which trains it"]
    recipes._await_predecessor(one, recipes._Children(), tell)
    assert len(told) == 1
