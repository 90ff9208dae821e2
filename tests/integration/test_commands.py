"""The other verbs, and what they make of a finished run."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.drill.attempt import AttemptProcess
from job.drill.proxy import Hold
from job.storage.s3 import S3Store
from tests.conftest import CLASSES, PALETTE, write_data
from tests.integration.conftest import command
from tests.services import BUCKET

VOK = ["--protocol", "vok"]
PREDICT = ("predict", "--weights", "{run}/best_model.pth", "--images", "{data}/val/images")
NO_CSV = ["--csv", "nowhere/x.csv"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Data, a finished run, and its console output."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_data(folder / "data")
    training = AttemptProcess(command(data, folder / "run", train__iterations=30))
    assert training.finish() == 0, training.output
    return data, folder / "run", training.output


def test_a_run_says_how_long_it_took_to_begin(finished):
    _, run, output = finished
    assert len(re.findall(r"^first iteration after \d+\.\d s \(imports ", output, re.M)) == 1
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "first_iteration"]
    stages = told["stages_s"]
    assert list(stages) == ["imports", "run", "data", "checks", "networks", "iteration"]
    assert told["after_s"] == pytest.approx(sum(stages.values()), abs=0.01)


def test_evaluate_agrees_with_the_run(finished, s4gan):
    data, run, _ = finished
    result = s4gan(["evaluate", "--weights", run / "best_model.pth", "--data", data, "--json"])
    assert result.code == 0, result.err
    scores = json.loads(result.out)
    summary = json.loads((run / "summary.json").read_text())
    assert scores["miou"] == pytest.approx(summary["best"]["val_miou"], abs=1e-12)
    assert scores["class_iou"] == pytest.approx(summary["best"]["class_iou"], abs=1e-12)
    assert scores["images"] == 4

    table = s4gan(["evaluate", "--weights", run / "best_model.pth", "--data", data])
    assert f"mIoU                   {scores['miou']:.4f}" in table.out
    assert all(name in table.out for name in CLASSES)


def test_evaluate_writes_tables_for_people_and_programs(finished, tmp_path, s4gan):
    data, run, _ = finished
    arguments = ["evaluate", "--weights", run / "best_model.pth", "--data", data]
    result = s4gan(
        [
            *arguments,
            "--markdown",
            "--boundary",
            *("--protocol=voc", "--window=32x40", "--stride=20", "--flip", "--scales=0.75,1"),
            f"--csv={tmp_path / 'classes.csv'}",
            f"--per-image={tmp_path / 'images.csv'}",
        ]
    )
    assert result.code == 0, result.err
    said = "protocol voc (pad_to 505x505, window 32x40, stride 20x20, flip on, scales 0.75 and 1.0)"
    assert said in result.out
    assert "| mIoU |" in result.out
    assert "| class | IoU | accuracy | boundary F |" in result.out
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == [*CLASSES, "(mean)", "(pixels)"]
    assert f"{float(rows[-1]['IoU']):.4f}" in result.out
    images = list(csv.DictReader((tmp_path / "images.csv").read_text().splitlines()))
    assert sorted(row["image"] for row in images) == [f"val_{i:04d}" for i in range(4)]
    scores = [float(row["mIoU"]) for row in images]
    assert scores == sorted(scores)


def test_predict_writes_outlines_and_goes_on_after_a_broken_image(finished, tmp_path, s4gan):
    data, run, _ = finished
    images = tmp_path / "images"
    shutil.copytree(data / "val/images", images)
    (images / "broken.png").write_text("no image")
    result = s4gan(
        [
            *("predict", "--weights", run / "best_model.pth", "--images", f"{images}/*.png"),
            *("--out", tmp_path / "out", "--no-overlay", "--batch=2", "--flip"),
            *("--coco", tmp_path / "coco.json", "--polygons", tmp_path / "polygons.json"),
        ]
    )
    assert result.code == 78
    assert "4 images predicted" in result.out
    assert "broken.png" in result.err
    assert "1 left out" in result.err
    assert len(list((tmp_path / "out").iterdir())) == 4
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [f"val_000{i}.png" for i in range(4)]
    assert sum(annotation["area"] for annotation in coco["annotations"]) == 4 * 40 * 48
    assert len(json.loads((tmp_path / "polygons.json").read_text())["images"]) == 4


def test_export_says_how_far_it_is_from_torch(finished, tmp_path, s4gan):
    data, run, _ = finished
    result = s4gan(
        [
            *("export", "--weights", run / "best_model.pth", "--format=onnx"),
            *("--out", tmp_path / "m.onnx", "--images", data / "val/images"),
        ]
    )
    assert result.code == 0, result.err
    assert "(4 images)" in result.out
    assert (tmp_path / "m.onnx").stat().st_size > 1_000_000


def test_a_window_that_nothing_slides_in_is_told(finished, s4gan):
    data, run, _ = finished
    evaluate = ["evaluate", "--weights", run / "best_model.pth", "--data", data, "--window"]
    large, small = s4gan([*evaluate, "4000"]), s4gan([*evaluate, "32"])
    assert "the window of 4000x4000 is larger than any image" in large.err
    assert "larger than any image" not in small.err


def test_evaluate_on_the_training_images(finished, s4gan):
    data, run, _ = finished
    result = s4gan(
        [
            "evaluate",
            "--weights",
            run / "final_model.pth",
            "--data",
            data,
            "--split=train",
            "--json",
        ]
    )
    assert json.loads(result.out)["images"] == 8


def test_predict_writes_index_and_overlay(finished, tmp_path, s4gan):
    data, run, _ = finished
    out = tmp_path / "out"
    result = s4gan(
        [
            "predict",
            "--weights",
            run / "best_model.pth",
            "--images",
            data / "val/images",
            "--out",
            out,
        ]
    )
    assert result.code == 0, result.err
    assert "4 images predicted" in result.out
    with Image.open(out / "val_0000.png") as index:
        assert (index.mode, index.size) == ("P", (48, 40))
        assert np.asarray(index).max() < len(CLASSES)
        assert tuple(index.getpalette()[3:6]) == PALETTE[1]
    with Image.open(out / "val_0000_overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (48, 40))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["evaluate", "--weights", "none.pth", "--data", "{data}"], "none.pth: no such file"),
        (["evaluate", "--weights", "{run}/config.yaml", "--data", "{data}"], "damaged"),
        (
            ["evaluate", "--weights", "{run}/best_model_D.pth", "--data", "{data}"],
            "not a generator",
        ),
        (["evaluate", "--weights", "{run}/best_model.pth", "--data", "nowhere"], "no such data"),
        (
            [
                "evaluate",
                "--weights",
                "{run}/best_model.pth",
                "--data",
                "{data}",
                "--split",
                "test",
            ],
            "val or train",
        ),
        (
            ["predict", "--weights", "{run}/best_model.pth", "--images", "no", "--out", "o"],
            "no such",
        ),
        (
            [
                "predict",
                "--weights",
                "{run}/best_model.pth",
                "--images",
                "{run}/best",
                "--out",
                "o",
            ],
            "holds no image",
        ),
        (
            [
                "predict",
                "--weights",
                "{run}/best_model.pth",
                "--images",
                "{data}/val/images",
                "--out",
                "{data}/val/images",
            ],
            "choose another",
        ),
        (
            ["evaluate", *("--weights", "{run}/best_model.pth", "--data", "{data}"), *VOK],
            "no such protocol",
        ),
        (
            ["evaluate", *("--weights", "{run}/best_model.pth", "--data", "{data}"), *NO_CSV],
            "there is no folder",
        ),
        (
            [*PREDICT, "--out", "o", "--coco", "a.json", "--polygons", "./a.json"],
            "--coco and --polygons a.json: are one file",
        ),
        (["train", "--data", "{data}", "--run", "x", "--config", "giude"], "did you mean guide"),
    ],
)
def test_wrong_use_is_told_in_words(finished, arguments, named, s4gan):
    data, run, _ = finished
    result = s4gan([text.format(data=data, run=run) for text in arguments])
    assert result.code == 78
    assert named in result.err
    assert "Traceback" not in result.err


def test_a_checkpoint_scores_as_the_model_of_its_iteration(finished, s4gan):
    data, run, _ = finished
    scores = []
    for name in ("latest_checkpoint.pth", "final_model.pth"):
        result = s4gan(["evaluate", f"--weights={run}/{name}", f"--data={data}", "--json"])
        assert result.code == 0, result.err
        scores.append(json.loads(result.out)["miou"])
    assert scores[0] == scores[1]


def test_evaluate_refuses_other_classes(finished, tmp_path, s4gan):
    _, run, _ = finished
    other = write_data(tmp_path / "other")
    text = (other / "dataset.yaml").read_text().replace("disc", "ball")
    (other / "dataset.yaml").write_text(text)
    result = s4gan(["evaluate", "--weights", run / "best_model.pth", "--data", other])
    assert result.code == 78
    assert "are not the model's" in result.err


def test_the_head_of_other_classes_is_not_trained_on(finished, tmp_path):
    _, run, _ = finished
    other = write_data(tmp_path / "other")
    text = (other / "dataset.yaml").read_text().replace("disc", "ball")
    (other / "dataset.yaml").write_text(text)
    weights = {"model__weights": run / "best_model.pth", "train__iterations": 1}
    training = AttemptProcess(command(other, tmp_path / "run", **weights))
    assert training.finish() == 0, training.output
    said = " ".join(training.output.split())
    assert "its head is random, as that of the file is for other classes" in said
    assert "is disc there and ball here" in said


def test_the_console_prints_the_guides_lines(finished):
    _, _, output = finished
    assert re.search(
        r"^Iter 30/30 \| Loss_CE: \d+\.\d{3} \| Loss_FM: \d+\.\d{3} \| Loss_ST: \d+\.\d{3} "
        r"\| Loss_D: \d+\.\d{3} \| ST_Count: \d+$",
        output,
        re.M,
    )
    rule = "=" * 60
    assert re.search(
        rf"^{rule}\nEvaluating at iteration 10\.\.\.\n{rule}\nTraining mIoU: 0\.\d{{4}}\n"
        rf"Validation mIoU: 0\.\d{{4}}\n\u2713 New best validation mIoU: 0\.\d{{4}}\n{rule}$",
        output,
        re.M,
    )


def test_the_end_says_what_came_out_and_how_to_go_on(finished):
    data, run, output = finished
    assert "[x] best_model.pth exists and verifies" in output
    assert f"s4gan evaluate --weights {run}/best_model.pth --data {data}" in output
    summary = json.loads((run / "summary.json").read_text())
    assert [check["name"] for check in summary["checklist"]] == [
        "Best validation mIoU recorded",
        "best_model.pth exists and verifies",
        "Training completed without errors",
        "Final train/val gap < 0.15",
        "W&B run finished successfully",
    ]
    assert set(summary["files"]) == {"best_model.pth", "best_model_D.pth", "final_model.pth"}


def test_the_guides_flags_reach_the_configuration(finished, tmp_path):
    data, _, _ = finished
    training = AttemptProcess(
        [
            *command(data, tmp_path / "run", train__iterations=1),
            "--learning-rate=0.003",
            "--learning-rate-D=0.0004",
            "--threshold-st=0.35",
            "--val-split=0.3",
            "--no-random-mirror",
            "--random-scale",
            "--batch-size=3",
        ]
    )
    assert training.finish() == 0, training.output
    import yaml

    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["train"]["learning_rate"] == 0.003
    assert config["train"]["learning_rate_D"] == 0.0004
    assert config["loss"]["threshold_st"] == 0.35
    assert config["data"]["val_split"] == 0.3
    assert "warning: data.val_split is not used: the data have validation" in training.output
    assert config["data"]["random_mirror"] is False
    assert config["data"]["random_scale"] is True
    assert config["train"]["batch_size"] == 3


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['s4gan', 'train', '--help']\n"
        "from job.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'wandb', 'matplotlib', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for flag in ("--learning-rate-D", "--threshold-st", "--no-random-mirror", "--set"):
        assert flag in result.stdout


def test_version(s4gan):
    assert re.fullmatch(r"s4gan \d+\.\d+\.\d+\n", s4gan(["--version"]).out)


def test_the_checkpoint_knows_its_run(finished):
    import torch

    _, run, _ = finished
    state = torch.load(run / "latest_checkpoint.pth", weights_only=True)
    identity = json.loads((run / "run.json").read_text())
    assert state["run"]["wandb_id"] == identity["wandb_id"]
    assert state["run"]["config"]["train"]["iterations"] == 30
    assert set(state) >= {"generator", "discriminator", "optimizer_G", "optimizer_D"}
    assert Path(run / "checkpoint_30.pth").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_pull_that_is_stopped_says_how_to_go_on(
    start, tmp_path, s3_env, fault_proxy, number, code
):
    store = S3Store(f"s3://{BUCKET}/runs/first")
    store.write("config.yaml", b"{}")
    store.write("best_model.pth", bytes(100))
    held = fault_proxy.add(Hold(method="GET", match="best_model.pth", times=None))
    environment = {**s3_env, "AWS_ENDPOINT_URL": fault_proxy.endpoint}
    pulling = start(["pull", store.uri, str(tmp_path / "here")], environment=environment)
    assert held.reached.wait(120)
    pulling.send(number)
    assert pulling.finish() == code
    assert "run the same command again" in pulling.output
    assert "Traceback" not in pulling.output


def test_a_pattern_that_the_shell_has_replaced_is_called_so(tmp_path, s4gan):
    ended = s4gan(["predict", "--weights", "x", "--out", tmp_path, "--images", "a.jpg", "b.jpg"])
    assert ended.code == 78
    assert "1 words too many: b.jpg" in ended.err
    assert "quote a pattern" in ended.err
