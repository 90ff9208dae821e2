"""Photographs instead of drawings: CamVid's JPEGs through the whole program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from job.drill.attempt import AttemptProcess

EVERY = 10
"""One image in ten of CamVid is enough to see the mechanics work."""


@pytest.fixture
def camvid(shared_data: Path, tmp_path: Path) -> Path:
    """A tenth of CamVid, as links."""
    source, target = shared_data / "camvid", tmp_path / "camvid"
    for part in ("train", "val"):
        for sub in ("images", "masks"):
            (target / part / sub).mkdir(parents=True)
            for path in sorted((source / part / sub).iterdir())[::EVERY]:
                (target / part / sub / path.name).symlink_to(path)
    (target / "dataset.yaml").write_text((source / "dataset.yaml").read_text())
    return target


@pytest.mark.slow
def test_camvid_trains_evaluates_and_predicts(camvid, tmp_path):
    run = tmp_path / "run"
    settings = {
        "model.backbone": "tiny",
        "model.discriminator_channels": 8,
        "data.labeled_ratio": 0.25,
        "train.iterations": 12,
        "train.log_every": 4,
        "train.eval_every": 12,
        "loss.st_start": 4,
    }
    training = AttemptProcess(
        [
            "train",
            "--config=camvid",
            f"--data={camvid}",
            f"--run={run}",
            *(f"--set={key}={value}" for key, value in settings.items()),
        ]
    )
    assert training.finish() == 0, training.output
    assert "data: 10 labeled, 27 unlabeled, 11 validation images, 11 classes" in training.output
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (e for e in events if e["event"] == "train" and e["iteration"] in (4, 12))
    assert last["loss_ce"] < first["loss_ce"]

    out = tmp_path / "out"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "job",
            "predict",
            f"--weights={run / 'best_model.pth'}",
            f"--images={camvid / 'val' / 'images'}",
            f"--out={out}",
        ],
        check=True,
    )
    names = yaml.safe_load((camvid / "dataset.yaml").read_text())["classes"]
    for path in out.glob("*_overlay.png"):
        with Image.open(path) as overlay, Image.open(out / path.name.replace("_overlay", "")) as p:
            assert overlay.size == p.size == (480, 360)
            assert np.asarray(p).max() < len(names)
    assert len(list(out.iterdir())) == 2 * 11
