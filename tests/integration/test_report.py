"""The report of a run that goes on, was killed, or has finished."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from job import run as keys
from job.monitor.report import BestEvaluation
from job.storage import open_store
from tests.conftest import write_data
from tests.integration.conftest import command
from tests.services import wait_until


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("report") / "data")


def best_of(run: str) -> BestEvaluation:
    return BestEvaluation.model_validate_json(open_store(run).read(keys.BEST_EVALUATION))


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_it_is_there_from_the_first_evaluation_on(
    data: Path, start: Any, s4gan: Any, s3_env: None, bucket: str, tmp_path: Path, where: str
) -> None:
    run = str(tmp_path / "run") if where == "folder" else f"s3://{bucket}/runs/first"
    training = start(command(data, run, train__iterations=4000, train__log_every=5))
    training.wait_for(r"^Iter 25/")
    store = open_store(run)
    wait_until(lambda: store.stat(keys.REPORT) is not None)
    training.send(signal.SIGKILL)
    training.finish()
    page = store.read(keys.REPORT).decode()
    assert "of 4000." in page
    assert "Confusion matrix" in page
    shown = Image.open(io.BytesIO(store.read(keys.PREDICTIONS)))
    assert shown.width > 800
    assert best_of(run).iteration % 10 == 0
    made = s4gan(["report", run, "--out", tmp_path / "again.html"])
    assert made.code == 0, made.err
    assert "At iteration" in (tmp_path / "again.html").read_text()


def test_a_finished_run_shows_its_best_model(data: Path, start: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = start(command(data, run))
    assert training.finish() == 0, training.output
    summary = json.loads((run / keys.SUMMARY).read_text())
    found = best_of(str(run))
    assert found.iteration == summary["best"]["iteration"]
    ious = []
    for number, row in enumerate(found.confusion):
        union = sum(row) + sum(other[number] for other in found.confusion) - row[number]
        ious.append(row[number] / union if union else None)
    assert ious == pytest.approx(list(summary["best"]["class_iou"].values()))
    page = (run / keys.REPORT).read_text()
    # What is lost comes back, as it was: it is made from the model.
    before = [(run / name).read_bytes() for name in (keys.BEST_EVALUATION, keys.PREDICTIONS)]
    for name in (keys.BEST_EVALUATION, keys.PREDICTIONS):
        (run / name).unlink()
    assert start(command(data, run)).finish() == 0
    after = [(run / name).read_bytes() for name in (keys.BEST_EVALUATION, keys.PREDICTIONS)]
    assert after == before
    assert (run / keys.REPORT).read_text().partition("<h2>Attempts")[0] == (
        page.partition("<h2>Attempts")[0]
    )
