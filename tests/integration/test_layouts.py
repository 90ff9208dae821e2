"""VOC, Cityscapes and Context as a user brings them: checked, trained on, scored, packed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.drill.proof import training_lines
from job.storage.s3 import S3Store
from job.storage.sync import data_folder
from tests.integration.conftest import command
from tests.layouts import (
    CITY_TRAIN_IDS,
    WRITERS,
    city_ids,
    translated,
    voc_ids,
    write_cityscapes,
    write_lines,
    write_voc,
)
from tests.services import BUCKET

SHORT = {"train__iterations": 6, "train__eval_every": 3, "loss__st_start": 2}
TRAIN, VAL = voc_ids(6), voc_ids(4, 2009)


def losses(run: Path) -> list[float]:
    """Of the labeled images, iteration by iteration."""
    return [line["loss_ce"] for line in training_lines(run) if line["event"] == "train"]


def splits_of(run: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((run / "splits.json").read_text())
    return found


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of samples is written where the user is."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("layout", WRITERS)
def test_the_check_knows_each_layout(s4gan, tmp_path, own_folder, layout):
    data = tmp_path / "data"
    WRITERS[layout](data)
    ended = s4gan(["data", "check", data, "--set=data.labeled_ratio=0.7", "--batch-size=2"])
    assert ended.code == 0, ended.err
    unlabeled = "3" if layout == "cityscapes" else "1"
    classes = {"voc": "background, aero", "cityscapes": "road, side", "context": "background, aero"}
    assert f"{data}: good; 5 labeled, {unlabeled} unlabeled" in ended.out
    assert f"4 validation images, classes {classes[layout]}" in ended.out
    page = Path("data-check.html").read_text()
    assert "unexpected label 3" not in page
    assert "ignored 2.5%" in page  # the border row of 40, whatever ids the void has


def test_a_wrong_id_is_a_problem_and_is_shown(s4gan, tmp_path, own_folder):
    data = write_cityscapes(tmp_path / "data")
    mask = next(data.glob("gtFine/train/aachen/*_labelIds.png"))
    numbers = np.array(Image.open(mask))
    numbers[7, 7] = 77
    Image.fromarray(numbers).save(mask)
    ended = s4gan(["data", "check", data, "--batch-size=2"])
    assert ended.code == 78
    assert "holds the label 77 (1 pixels)" in ended.out
    assert "unexpected label 77" in Path("data-check.html").read_text()


def test_voc_trains_resumes_and_is_scored(s4gan, tmp_path):
    data = tmp_path / "data"
    base = write_voc(data / "VOCdevkit" / "VOC2012", augmented=6)
    permutation = np.random.default_rng(0).permutation(12)
    (base / "split_0.pkl").write_bytes(pickle.dumps(permutation, protocol=2))
    run = tmp_path / "run"
    changes = {**SHORT, "data__permutation": "split_0.pkl", "data__labeled_ratio": 0.45}
    ended = s4gan(command(data, run, **{**changes, "train__iterations": 4}))
    assert ended.code == 0, ended.err
    assert "data: 5 labeled, 7 unlabeled, 4 validation images, 21 classes of voc; " in ended.out
    splits = splits_of(run)
    order = [*TRAIN[::-1], *voc_ids(6, 2008)]
    assert splits["labeled"] == sorted(order[index] for index in permutation[:5])
    assert splits["val"] == VAL
    assert not {*splits["unlabeled"]} & {*VAL, *splits["labeled"]}

    ended = s4gan([*command(data, run, **changes), "--resume-anyway"])
    assert ended.code == 0, ended.err
    assert training_lines(run)[-1]["iteration"] == 6

    score = s4gan(["evaluate", "--weights", run / "best_model.pth", "--data", data, "--json"])
    assert score.code == 0, score.err
    found = json.loads(score.out)
    assert found["images"] == 4
    assert len(found["class_iou"]) == 21
    summary = json.loads((run / "summary.json").read_text())
    assert found["miou"] == pytest.approx(summary["best"]["val_miou"], abs=1e-12)
    arguments = ["predict", "--weights", run / "best_model.pth", "--out", tmp_path / "out"]
    predicted = s4gan([*arguments, "--images", base / "JPEGImages"])
    assert predicted.code == 0, predicted.err
    with Image.open(tmp_path / "out" / f"{TRAIN[0]}.png") as index:
        assert tuple(index.getpalette()[45:48]) == (192, 128, 128)  # VOC's person


@pytest.mark.slow
def test_cityscapes_trains_on_ids_as_on_train_ids(s4gan, tmp_path):
    """To the bit: the network sees the same labels."""
    found = []
    for name, train_ids in (("ids", False), ("trainids", True)):
        data = write_cityscapes(tmp_path / name, train_ids=train_ids, extra=2)
        run = tmp_path / f"run-{name}"
        ended = s4gan(command(data, run, **SHORT))
        assert ended.code == 0, ended.err
        assert "data: 6 labeled, 4 unlabeled, 4 validation images, 19 classes" in ended.out
        found.append(losses(run))
        assert (run / "predictions.png").is_file()
        assert "road" in (run / "report.html").read_text()
    assert found[0] == found[1]
    assert len(found[0]) == 6
    arguments = ["evaluate", "--weights", tmp_path / "run-ids/best_model.pth", "--split=train"]
    score = s4gan([*arguments, "--data", tmp_path / "ids", "--json"])
    assert json.loads(score.out)["images"] == 6


@pytest.mark.slow
def test_context_trains(s4gan, tmp_path):
    WRITERS["context"](tmp_path / "data")
    changes = {**SHORT, "data__labeled_ratio": 0.5}
    ended = s4gan(command(tmp_path / "data", tmp_path / "run", **changes))
    assert ended.code == 0, ended.err
    assert "data: 3 labeled, 3 unlabeled, 4 validation images, 60 classes" in ended.out


@pytest.mark.slow
def test_two_processes_read_the_same_lists(start, tmp_path):
    data = write_voc(tmp_path / "data", augmented=6)
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png"
    write_lines(data / "labeled.txt", [line.format(name) for name in TRAIN[:4]])
    changes = {**SHORT, "data__labeled_list": "labeled.txt", "train__learning_rate": 0.0005}
    for gpus in (1, 2):
        arguments = command(data, tmp_path / f"run{gpus}", **changes)
        training = start([*arguments, "--gpus", str(gpus)], forked=gpus == 1)
        assert training.finish() == 0, training.output
    assert losses(tmp_path / "run1") == pytest.approx(losses(tmp_path / "run2"), rel=1e-3)


def test_evaluate_is_told_layout_and_list(s4gan, tmp_path):
    data = tmp_path / "data"
    base = write_voc(data)
    run = tmp_path / "run"
    write_lines(base / "val2.txt", VAL[1:3])
    changes = {**SHORT, "data__val_list": "val2.txt", "data__labeled_ratio": 0.5}
    assert s4gan(command(data, run, **changes)).code == 0
    arguments = ["evaluate", "--weights", run / "best_model.pth", "--data", data, "--json"]
    score = s4gan([*arguments, "--layout=voc", "--val-list=val2.txt"])
    found = json.loads(score.out)
    assert found["images"] == 2
    summary = json.loads((run / "summary.json").read_text())
    assert found["miou"] == pytest.approx(summary["best"]["val_miou"], abs=1e-12)
    ended = s4gan([*arguments, "--layout=cityscapes"])
    assert ended.code == 78
    assert "is not of the layout cityscapes" in ended.err
    ended = s4gan([*arguments, "--layout=coco"])
    assert ended.code == 78
    assert "--layout coco: must be one of auto, folder, voc, cityscapes, context" in ended.err
    ended = s4gan([*arguments, "--val-list="])
    assert ended.code == 78
    assert "--val-list is empty" in ended.err
    ended = s4gan([*arguments, "--val-list=val3.txt"])
    assert "val3.txt: no such file, which --val-list names" in ended.err


def test_a_model_of_other_classes_is_refused(s4gan, tmp_path):
    voc, city = write_voc(tmp_path / "voc"), write_cityscapes(tmp_path / "city")
    run = tmp_path / "run"
    assert s4gan(command(voc, run, **SHORT, data__labeled_ratio=0.5)).code == 0
    ended = s4gan(["evaluate", "--weights", run / "best_model.pth", "--data", city])
    assert ended.code == 78
    assert f"{city}: its classes (road, " in ended.err
    assert "dataset.yaml in it may name its classes otherwise" in ended.err


@pytest.mark.parametrize("layout", WRITERS)
def test_a_pack_of_each_layout_trains(s4gan, tmp_path, layout):
    data, packed = tmp_path / "data", tmp_path / "packed"
    WRITERS[layout](data)
    assert s4gan(["data", "pack", data, packed]).code == 0
    with data_folder(str(packed)) as folder:
        ours = {path.relative_to(data) for path in data.rglob("*") if path.is_file()}
        theirs = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        assert {path for path in theirs if not path.name.startswith(".")} >= ours
        for path in ours:
            assert (folder / path).read_bytes() == (data / path).read_bytes()
    changes = {**SHORT, "train__iterations": 3, "data__labeled_ratio": 0.7}
    ended = s4gan(command(packed, tmp_path / "run", **changes))
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_lists_travel_to_a_bucket_with_the_data(s4gan, tmp_path, bucket, s3_env):
    data = write_cityscapes(tmp_path / "data")
    names = city_ids("aachen", 3)
    write_lines(data / "splits" / "labeled.txt", names)
    store = S3Store(f"s3://{BUCKET}/city")
    for path in data.rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(data).as_posix())
    write_lines(tmp_path / "val.txt", city_ids("munster", 2))
    S3Store(f"s3://{BUCKET}/lists").upload(tmp_path / "val.txt", "val.txt")
    changes = {
        **SHORT,
        "data__labeled_list": "splits/labeled.txt",
        "data__val_list": f"s3://{BUCKET}/lists/val.txt",
    }
    run = tmp_path / "run"
    ended = s4gan(command(f"s3://{BUCKET}/city", run, **changes))
    assert ended.code == 0, ended.err
    assert splits_of(run)["labeled"] == names
    assert splits_of(run)["val"] == city_ids("munster", 2)
    write_lines(tmp_path / "bad.txt", ["nobody"])
    S3Store(f"s3://{BUCKET}/city").upload(tmp_path / "bad.txt", "splits/labeled.txt")
    ended = s4gan(command(f"s3://{BUCKET}/city", run, **changes))
    assert ended.code == 78
    assert f"s3://{BUCKET}/city/splits/labeled.txt: names 1 of 1 images" in ended.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__labeled_list": "nope.txt"}, "nope.txt: no such file, which data.labeled_list"),
        ({"data__labeled_list": "l.txt", "data__labeled_ratio": 0.5}, "leave the ratio out"),
        ({"data__layout": "cityscapes"}, "is not of the layout cityscapes"),
        ({"data__layout": "coco"}, "data.layout: input should be 'auto', 'folder', 'voc'"),
        ({"data__val_list": "../v.txt"}, "leads out of the data folder"),
        ({"data__permutation": "evil.pkl"}, "it names posix.system"),
    ],
)
def test_what_is_wrong_is_said(s4gan, tmp_path, own_folder, changes, said):
    data = write_voc(tmp_path / "data")
    (data / "evil.pkl").write_bytes(b"cposix\nsystem\n(S'touch evil'\ntR.")
    ended = s4gan(command(data, tmp_path / "run", **changes))
    assert ended.code == 78
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not Path("evil").exists()


def test_masks_of_two_runs_are_what_was_drawn(tmp_path):
    """The builders themselves: what the tests above compare with."""
    data = write_cityscapes(tmp_path, train_ids=True)
    for path in data.glob("gtFine/*/*/*_labelTrainIds.png"):
        values = set(np.unique(np.array(Image.open(path))))
        assert values <= set(CITY_TRAIN_IDS.values())
    assert translated(np.array([[0, 2]]), CITY_TRAIN_IDS).tolist() == [[0, 11]]
