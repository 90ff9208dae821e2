"""`s4gan data check` as a user runs it, and what `s4gan train` says of the same data."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import IGNORE_INDEX, write_data
from tests.integration.conftest import command
from tests.services import BUCKET, s3_client


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page is written where the user is."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def spoil(data: Path) -> None:
    """An empty mask, a leak into validation, and a class that no labeled image holds."""
    shutil.copy(data / "train/images/train_0002.png", data / "val/images/val_0001.png")
    for path in sorted((data / "train/masks").iterdir()):
        mask = np.array(Image.open(path))
        mask[mask == 2] = 0
        Image.fromarray(mask).save(path)
    Image.new("L", (48, 40), IGNORE_INDEX).save(data / "train/masks/train_0004.png")


WARNINGS = (
    "warning: 1 of 8 training masks are empty (all ignore_index)",
    "warning: no labeled image holds disc",
    "warning: 1 of 4 validation images are training images, too",
)


def test_good_data(s4gan, make_data, own_folder):
    data = make_data()
    ended = s4gan(["data", "check", data])
    assert ended.code == 0, ended.err
    assert "warning" not in ended.out
    assert "disc" in ended.out
    assert ended.out.splitlines()[-1] == (
        f"{data}: good; 8 labeled, 8 unlabeled, 4 validation images, "
        "classes background, square, disc"
    )
    page = own_folder / "data-check.html"
    assert f"{page.name}: " in ended.out
    assert page.read_text().startswith("<!doctype html>")


def test_warnings_do_not_fail_it_and_training_says_the_same(s4gan, make_data, tmp_path):
    data = make_data()
    spoil(data)
    ended = s4gan(["data", "check", data, "--no-page"])
    assert ended.code == 0, ended.err
    training = s4gan(command(data, tmp_path / "run", train__iterations=1, train__log_every=1))
    assert training.code == 0, training.err
    for warning in WARNINGS:
        assert warning in ended.out
        assert warning in training.out
    assert list(Path.cwd().iterdir()) == []


def test_a_problem_is_78_and_the_page_shows_it(s4gan, make_data, tmp_path):
    data = make_data()
    Image.new("L", (48, 40), 77).save(data / "train/masks/train_0004.png")
    page = tmp_path / "labels.html"
    ended = s4gan(["data", "check", data, "--page", page])
    assert ended.code == 78
    assert "problem: " in ended.out
    assert "holds the label 77" in ended.out
    assert ended.err.splitlines()[-1].startswith(
        f"error: {data}: cannot be trained on: {data}/train/masks/train_0004.png: holds the label"
    )
    assert "unexpected label 77" in page.read_text()


def test_json(s4gan, make_data):
    data = make_data()
    spoil(data)
    ended = s4gan(["data", "check", data, "--json"])
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found["good"] is True
    assert found["problems"] == []
    assert len(found["warnings"]) == 4
    assert found["warnings"][3].startswith("copies of one image with different masks: 1")
    assert found["images"] == {"labeled": 8, "set_aside": 0, "unlabeled": 8, "val": 4}
    assert [one["name"] for one in found["classes"]] == ["background", "square", "disc"]
    assert found["classes"][2]["labeled"] == {"share": 0.0, "images": 0}
    assert found["classes"][2]["val"]["images"] > 0
    assert found["duplicates"]["exact"] == [
        [str(data / "train/images/train_0002.png"), str(data / "val/images/val_0001.png")]
    ]
    assert found["duplicates"]["near_pairs"] == {"train_val": 0, "labeled": 0}
    assert found["page"] == "data-check.html"


def test_json_of_a_problem_is_whole_and_78(s4gan, make_data):
    data = make_data()
    Image.new("L", (48, 40), 77).save(data / "train/masks/train_0004.png")
    ended = s4gan(["data", "check", data, "--json", "--no-page"])
    assert ended.code == 78
    found = json.loads(ended.out)
    assert found["good"] is False
    assert "holds the label 77" in found["problems"][0]
    assert found["page"] is None


def test_the_split_is_that_of_the_flags(s4gan, make_data, tmp_path):
    data = make_data(labeled=20, val=0)
    config = tmp_path / "my.yaml"
    config.write_text("data: {labeled_ratio: 0.5}\n")

    def images(*flags: str) -> dict[str, int]:
        ended = s4gan(["data", "check", data, "--json", "--no-page", *flags])
        assert ended.code == 0, ended.err
        return json.loads(ended.out)["images"]

    few, many = images("--val-split=0.1"), images("--val-split=0.6")
    assert few["val"] < many["val"]
    assert images("--set", "data.labeled_ratio=0.5")["set_aside"] > 0
    assert images("--config", str(config))["set_aside"] > 0
    ended = s4gan(["data", "check", data, "--no-page", "--batch-size=30"])
    assert ended.code == 78
    assert "fewer than the batch of 30" in ended.out


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda data: shutil.rmtree(data), "no such data folder"),
        (lambda data: (data / "dataset.yaml").unlink(), "dataset.yaml: not there"),
        (lambda data: shutil.rmtree(data / "train/masks"), "no image has a mask"),
        (lambda data: shutil.rmtree(data / "train/images"), "no such folder"),
    ],
    ids=["no folder", "no dataset.yaml", "no masks", "no images"],
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_what_is_no_data_set_is_78_with_a_mend(s4gan, make_data, break_it, said, flags):
    data = make_data()
    break_it(data)
    ended = s4gan(["data", "check", data, *flags])
    assert ended.code == 78
    assert ended.out == ""
    assert said in ended.err
    assert "mend: " in ended.err
    assert "Traceback" not in ended.err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--page", "gone/page.html"], "--page gone/page.html: cannot be a file there"),
        (["--page", "."], "--page .: cannot be a file there"),
        (["--page", "s3://bucket/page.html"], "must be a local folder"),
        (["--page", "a.html", "--no-page"], "--page and --no-page are both given"),
        (["--config", "gide"], "gide"),
        (["--set", "data.labeled_rate=1"], "labeled_ratio"),
    ],
)
def test_wrong_flags_are_78_before_anything_is_read(s4gan, tmp_path, flags, said):
    ended = s4gan(["data", "check", tmp_path / "not looked at", *flags])
    assert ended.code == 78
    assert said in ended.err
    assert "mend: " in ended.err or "did you mean" in ended.err


def test_a_page_nobody_asked_for_does_not_fail_a_check(s4gan, make_data, own_folder):
    (own_folder / "data-check.html").mkdir()
    ended = s4gan(["data", "check", make_data()])
    assert ended.code == 0
    assert "warning: no page of samples: cannot write data-check.html" in ended.err


def test_a_broken_exif_block_is_passed_over_without_noise(start, tmp_path):
    data = write_data(tmp_path / "data")
    exif = Image.Exif()
    exif[0x010F] = "a camera's maker"
    image = Image.open(data / "train/images/train_0009.png")
    (data / "train/images/train_0009.png").unlink()
    image.save(data / "train/images/train_0009.jpg", exif=exif.tobytes()[:20])
    checking = start(["data", "check", str(data), "--no-page"], forked=False)
    assert checking.finish() == 0, checking.output
    assert "arning" not in checking.output


# ---------------------------------------------------------------- S3


@pytest.fixture
def uploaded(tmp_path, bucket, s3_env, s3_server, monkeypatch) -> str:
    monkeypatch.setenv("S4GAN_SCRATCH", str(tmp_path / "scratch"))
    data = write_data(tmp_path / "original")
    spoil(data)
    return upload(s3_server, bucket, data)


def upload(server, bucket: str, data: Path) -> str:
    with s3_client(server) as client:
        for path in sorted(data.rglob("*")):
            if path.is_file():
                key = f"data/scenes/{path.relative_to(data).as_posix()}"
                client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    return f"s3://{bucket}/data/scenes"


def test_data_in_s3_are_named_as_there(s4gan, uploaded, tmp_path, own_folder):
    ended = s4gan(["data", "check", uploaded])
    assert ended.code == 0, ended.err
    for warning in WARNINGS:
        assert warning in ended.out
    assert f"first: {uploaded}/train/masks/train_0004.png" in ended.out
    page = (own_folder / "data-check.html").read_text()
    assert f"{uploaded}/train/images/train_0002.png" in page
    assert str(tmp_path) not in ended.out + page

    run = tmp_path / "run"
    training = s4gan(command(uploaded, run, train__iterations=1, train__log_every=1))
    assert training.code == 0, training.err
    assert f"first: {uploaded}/train/masks/train_0004.png" in training.out


def test_a_data_set_that_is_labeled_throughout_is_named_as_there(
    s4gan, tmp_path, bucket, s3_env, s3_server, monkeypatch
):
    monkeypatch.setenv("S4GAN_SCRATCH", str(tmp_path / "scratch"))
    uri = upload(s3_server, bucket, write_data(tmp_path / "original", unlabeled=0))
    ended = s4gan(["data", "check", uri, "--no-page"])
    assert ended.code == 78
    assert f"problem: {uri}: every training image is labeled" in ended.out
    assert "train.supervised_only=true" in ended.out


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (f"s3://{BUCKET}/data/scens", "data/scens"),
        ("s3://no-such-bucket-of-ours/data", "no-such-bucket-of-ours"),
        ("s4://bucket/data", "s4://"),
    ],
)
def test_a_typo_in_the_uri_is_78_and_named(s4gan, uploaded, uri, said):
    ended = s4gan(["data", "check", uri, "--json"])
    assert ended.code == 78
    assert said in ended.err
    assert "mend: " in ended.err


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stop_ends_it_within_a_second(start, tmp_path, number, code):
    data = write_data(tmp_path / "data", labeled=4, unlabeled=4, val=1)
    large = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3)).astype(np.uint8)
    first = data / "train/images/large_0000.png"
    Image.fromarray(large).save(first)
    for index in range(1, 2000):
        (data / f"train/images/large_{index:04d}.png").symlink_to(first)
    checking = start(["data", "check", str(data)], forked=False)
    time.sleep(6)
    began_s = time.monotonic()
    checking.send(number)
    assert checking.finish() == code, checking.output
    assert time.monotonic() - began_s < 3  # a second, and what a busy machine adds
    assert "Traceback" not in checking.output
    assert not Path("data-check.html").exists()
