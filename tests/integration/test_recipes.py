"""`s4gan bench-recipe`, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from job.monitor.ledger import read_ledger
from job.recipes import SCORES
from tests.conftest import MakeData
from tests.integration.conftest import SMALL
from tests.layouts import voc_ids, write_context, write_lines, write_voc
from tests.services import wait_until

pytestmark = pytest.mark.slow


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    settings = SMALL | {"train.iterations": 20}
    return [
        "bench-recipe",
        *(f"--data={data}", f"--out={out}", "--seeds=1", *more),
        *("--recipe=labels=guide,train.supervised_only=true", "--recipe=all=guide"),
        *(f"--set={key}={value}" for key, value in settings.items()),
    ]


def test_a_comparison_goes_on_after_a_stop_and_ends_with_a_table(
    start: Any, s4gan: Any, make_data: MakeData, tmp_path: Path
) -> None:
    data, out = make_data(), tmp_path / "out"
    test = make_data(name="test")  # the same validation images and no others
    shutil.rmtree(test / "train")
    first = start(arguments(data, out, f"--test={test}"), forked=False)
    ledger = out / "labels" / "seed-0" / "metrics.jsonl"
    wait_until(lambda: ledger.exists() and '"iteration": 5' in ledger.read_text())
    first.send(signal.SIGTERM)
    assert first.finish() == 75, first.output
    assert "the same command goes on" in first.output

    second = s4gan(arguments(data, out, f"--test={test}"))
    assert second.code == 0, second.err
    table = (out / "table.md").read_text()
    assert table in second.out
    for name in ("labels", "all"):
        folder = out / name / "seed-0"
        score = json.loads((folder / SCORES).read_text())
        summary = json.loads((folder / "summary.json").read_text())
        # The test data are the validation data here, so both ways of scoring have to agree.
        assert score["miou"] == summary["best"]["val_miou"] == score["val_miou"]
        assert f"| {name} | **{score['miou']:.4f}** |" in table
    lines = ledger.read_text().splitlines()
    assert len({json.loads(line)["attempt"] for line in lines}) == 2

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    third = s4gan(arguments(data, out, f"--test={test}"))
    assert third.code == 0, third.err
    assert "training" not in third.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")} == written

    elsewhere = s4gan(arguments(make_data(name="elsewhere"), out, f"--test={test}"))
    assert elsewhere.code == 78, elsewhere.out
    assert f"was trained on {data}" in elsewhere.err

    other = s4gan([*arguments(data, out, f"--test={test}"), "--set=train.learning_rate=0.02"])
    assert other.code == 78, other.out
    assert "train.learning_rate" in other.err
    assert "0.02 now" in other.err
    assert "training" not in other.err


def test_when_it_is_killed_its_runs_save_and_the_same_command_goes_on_at_once(
    start: Any, s4gan: Any, make_data: MakeData, tmp_path: Path
) -> None:
    data, out = make_data(), tmp_path / "out"
    given = [*arguments(data, out), "--set=train.iterations=60", "--set=train.eval_every=30"]
    given = [one for one in given if "all=guide" not in one]
    bench = start(given, forked=False)
    folder = out / "labels" / "seed-0"
    ledger = folder / "metrics.jsonl"
    wait_until(lambda: ledger.exists() and '"iteration": 5' in ledger.read_text())
    bench.send(signal.SIGKILL)
    bench.finish()
    again = s4gan(given)
    assert again.code == 0, again.err
    events = read_ledger(ledger)
    attempts = [event["attempt"] for event in events]
    assert attempts == sorted(attempts)  # one trainer at a time
    (ending,) = (event for event in events if event.get("exit_code") == 75)
    assert ending["saved_at"] == ending["reached"] < 60


def test_models_are_scored_on_the_layout_and_the_list_that_are_named(
    s4gan: Any, tmp_path: Path
) -> None:
    test = tmp_path / "both"
    data = write_voc(test / "VOCdevkit" / "VOC2012")
    write_context(test / "VOCdevkit" / "VOC2010")
    write_lines(test / "some.txt", voc_ids(3, 2009))
    settings = {"train.iterations": 4, "train.eval_every": 2, "data.labeled_ratio": 0.5}
    given = arguments(data, tmp_path / "out", f"--test={test}")
    given = [one for one in given if "all=guide" not in one]
    given += [f"--set={key}={value}" for key, value in settings.items()]
    ended = s4gan(given)
    assert ended.code == 78
    assert "--test-layout voc" in ended.err
    ended = s4gan([*given, "--test-layout=voc", "--test-list=some.txt"])
    assert ended.code == 0, ended.err
    folder = tmp_path / "out" / "labels" / "seed-0"
    score = json.loads((folder / SCORES).read_text())
    wanted = ["evaluate", f"--weights={folder}/best_model.pth", f"--data={test}", "--json"]
    found = json.loads(s4gan([*wanted, "--layout=voc", "--val-list=some.txt"]).out)
    assert found["images"] == 3
    assert score["miou"] == found["miou"]
    assert score["scored"] == f"best model on {test}, images of some.txt"


def test_a_run_that_fails_is_named_with_what_it_said(
    start: Any, make_data: MakeData, tmp_path: Path
) -> None:
    data = make_data(unlabeled=0)
    bench = start(arguments(data, tmp_path / "out", "--recipe=none=guide"), forked=False)
    assert bench.finish() == 78, bench.output
    assert "none, seed 0: ended with exit code 78" in bench.output
    assert "every training image is labeled" in bench.output
    assert "Traceback" not in bench.output
