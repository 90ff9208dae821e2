"""The first iterations of a small run, number by number: a refactor must not change them.

To change results on purpose, write the file anew and say why in CHANGELOG.md:

    S4GAN_WRITE_GOLDEN=1 .venv/bin/pytest tests/golden
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from job.drill.attempt import AttemptProcess
from job.drill.proof import training_lines
from tests.conftest import write_data
from tests.integration.conftest import command

CURVE = Path(__file__).with_name("loss_curve.json")
CALM = 0.0005
"""Small enough that rounding does not grow from step to step."""
KEYS = (
    "iteration",
    "loss_ce",
    "loss_fm",
    "loss_st",
    "loss_d",
    "loss_g",
    "st_count",
    "lr_g",
    "lr_d",
)


def test_losses_are_those_on_record(tmp_path):
    data = write_data(tmp_path / "data")
    training = AttemptProcess(
        command(data, tmp_path / "run", train__iterations=16, train__learning_rate=CALM)
    )
    assert training.finish() == 0, training.output
    curve = [
        {key: event[key] for key in KEYS}
        for event in training_lines(tmp_path / "run")
        if event["event"] == "train"
    ]
    if os.environ.get("S4GAN_WRITE_GOLDEN"):
        CURVE.write_text(json.dumps(curve, indent=1) + "\n")
    recorded = json.loads(CURVE.read_text())
    assert len(curve) == len(recorded) == 16
    for now, then in zip(curve, recorded, strict=True):
        # Other processors round otherwise (1e-7 seen); a change of the method is larger.
        assert now == pytest.approx(then, rel=1e-4, abs=1e-6), f"iteration {then['iteration']}"
