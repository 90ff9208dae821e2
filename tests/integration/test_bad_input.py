"""What a user can get wrong: the message names the thing and the mend, the exit code is 78."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.drill.proof import training_lines
from tests.conftest import IGNORE_INDEX
from tests.integration.conftest import command


@pytest.fixture
def train(s4gan, tmp_path):
    """Run a small training in this process."""

    def run(data: Path, *, folder: str = "run", **changes: object) -> tuple[int, str, str]:
        return s4gan(command(data, tmp_path / folder, **changes))

    return run


def change_mask(data: Path, change) -> Path:
    path = data / "train" / "masks" / "train_0003.png"
    mask = np.array(Image.open(path))
    Image.fromarray(change(mask)).save(path)
    return path


def relabel(mask: np.ndarray) -> np.ndarray:
    mask[5, 5] = 77
    return mask


def break_image(data: Path) -> None:
    (data / "train/images/train_0003.png").write_bytes(b"not an image")


def break_unlabeled_image(data: Path) -> None:
    (data / "train/images/train_0012.png").write_bytes(b"not an image")


def resize_mask(data: Path) -> None:
    change_mask(data, lambda mask: mask[::2])


def unknown_label(data: Path) -> None:
    change_mask(data, relabel)


def colour_mask(data: Path) -> None:
    change_mask(data, lambda mask: np.stack([mask] * 3, axis=-1))


def no_labels(data: Path) -> None:
    shutil.rmtree(data / "train/masks")


def few_labels(data: Path) -> None:
    for path in sorted((data / "train/masks").iterdir())[1:]:
        path.unlink()


def no_images(data: Path) -> None:
    shutil.rmtree(data / "train")
    (data / "train/images").mkdir(parents=True)


def empty_folder(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def no_folder(data: Path) -> None:
    shutil.rmtree(data)


def no_dataset_yaml(data: Path) -> None:
    (data / "dataset.yaml").unlink()


def all_masks_empty(data: Path) -> None:
    for path in (data / "train/masks").iterdir():
        Image.fromarray(np.full((40, 48), IGNORE_INDEX, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("spoil", "named", "mend"),
    [
        (break_image, "train/images/train_0003.png: cannot be read", "replace the file"),
        (break_unlabeled_image, "train/images/train_0012.png: cannot be read", "replace or remove"),
        (resize_mask, "train_0003.png: is 48x20, its image train_0003.png 48x40", "nearest"),
        (unknown_label, "train_0003.png: holds the label 77 (1 pixels)", "correct the mask"),
        (colour_mask, "train_0003.png: a mask must hold class numbers", "8-bit index PNG"),
        (no_labels, "train/masks: no image has a mask", "label some images"),
        (few_labels, "only 1 labeled training images, fewer than the batch of 2", "--batch-size"),
        (no_images, "train/images: holds no image", "images end in"),
        (empty_folder, "data: is of no known layout", "dataset.yaml, train/images/ and train/m"),
        (no_folder, "no such data folder", "check its path"),
        (no_dataset_yaml, "dataset.yaml: not there", "write one"),
        (all_masks_empty, "every training mask is empty", "ignore_index"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_data_end_before_the_first_iteration(make_data, train, tmp_path, spoil, named, mend):
    data = make_data()
    spoil(data)
    code, out, err = train(data)
    assert code == 78
    assert err.startswith("error: ")
    assert named in err
    assert mend in err
    assert "Traceback" not in out + err
    assert "Iter 1/" not in out
    assert not (tmp_path / "run" / "latest_checkpoint.pth").exists()


def test_data_can_be_mended_and_the_same_run_folder_used(make_data, train):
    data = make_data()
    path = data / "train/masks/train_0003.png"
    good = path.read_bytes()
    change_mask(data, relabel)
    assert train(data, train__iterations=2)[0] == 78
    path.write_bytes(good)
    # Nothing was trained, so another configuration is no contradiction either.
    code, _, err = train(data, train__iterations=3)
    assert code == 0, err


def test_some_empty_masks_are_a_warning_with_a_count(make_data, train):
    data = make_data()
    change_mask(data, lambda mask: np.full_like(mask, IGNORE_INDEX))
    code, out, _ = train(data, train__iterations=2)
    assert code == 0
    assert "warning: 1 of 8 training masks are empty" in out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__batch_sise": 2}, "unknown key train.batch_sise (did you mean train.batch_size?)"),
        ({"loss__threshold_st": 2}, "loss.threshold_st: input should be less than or equal to 1"),
        ({"model__backbone": "vgg"}, "model.backbone"),
        ({"model__weights": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"model__weights": "imagenet"}, "there are none for the backbone tiny"),
    ],
)
def test_wrong_configuration(make_data, train, changes, named):
    code, out, err = train(make_data(), **changes)
    assert code == 78
    assert named in err
    assert "Traceback" not in out + err


def test_a_run_of_another_configuration_is_not_resumed(make_data, train, tmp_path):
    data = make_data()
    assert train(data, train__iterations=3)[0] == 0
    before = (tmp_path / "run" / "latest_checkpoint.pth").read_bytes()
    code, _, err = train(data, train__iterations=3, train__learning_rate=0.5)
    assert code == 78
    assert "train.learning_rate: 0.01 in the run, 0.5 now" in err
    assert "another --run" in err
    assert (tmp_path / "run" / "latest_checkpoint.pth").read_bytes() == before
    # What alters no weight may change.
    assert train(data, train__iterations=3, train__log_every=2, checkpoint__every=9)[0] == 0


def test_a_run_is_not_resumed_on_other_images(make_data, train):
    data = make_data()
    assert train(data, train__iterations=3)[0] == 0
    (data / "train/masks/train_0000.png").unlink()
    code, _, err = train(data, train__iterations=3)
    assert code == 78
    assert "labeled +0 -1 (-train_0000" in err
    assert "unlabeled +1 -0 (+train_0000" in err


def test_one_image_that_breaks_during_training_is_skipped_counted_and_reported(
    make_data, train, tmp_path
):
    data = make_data()
    # A good header, damaged pixels: only decoding finds it.
    path = data / "train/images/train_0012.png"
    path.write_bytes(path.read_bytes()[:-200])
    code, out, err = train(data, train__iterations=8)
    assert code == 0, err
    assert out.count(f"{path} cannot be decoded; skipped (1 so far)") == 1
    events = [e for e in training_lines(tmp_path / "run") if e["event"] == "unreadable_image"]
    assert [event["path"] for event in events] == [str(path)]
    assert "[ ] Training completed without errors: 1 images could not be decoded" in out


def test_more_than_one_percent_of_broken_images_end_the_run(make_data, train):
    data = make_data()
    for index in (10, 12):
        path = data / f"train/images/train_{index:04d}.png"
        path.write_bytes(path.read_bytes()[:-200])
    code, _, err = train(data, train__iterations=20)
    assert code == 78
    assert "2 of 16 training images cannot be decoded" in err
    assert "mend: replace or remove them" in err


def test_a_diverged_run_exits_70_and_says_what_to_do(make_data, train, tmp_path):
    code, _, err = train(make_data(), train__learning_rate="1e30", train__log_every=2)
    assert code == 70
    assert "--learning-rate 5e+29" in err
    assert "--learning-rate-D" in err
    ended = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ][-1]
    assert (ended["event"], ended["exit_code"]) == ("attempt_ended", 70)


def test_all_labeled_needs_a_decision(make_data, train):
    data = make_data(unlabeled=0)
    code, _, err = train(data, train__iterations=2)
    assert code == 78
    assert "train.supervised_only=true" in err
    code, out, _ = train(data, train__iterations=2, train__supervised_only="true")
    assert code == 0
    assert "Loss_D: 0.000 | ST_Count: 0" in out


def test_data_and_run_must_not_be_the_same_folder(make_data, s4gan):
    data = make_data()
    code, _, err = s4gan(["train", "--data", str(data), "--run", f"{data}/"])
    assert code == 78
    assert "lies in --data" in err


def test_a_run_folder_that_cannot_be_written_is_an_error_not_a_traceback(
    make_data, train, tmp_path
):
    (tmp_path / "run").write_text("a file")
    code, out, err = train(make_data())
    assert code == 74
    assert "choose another folder" in err
    assert "Traceback" not in out + err


def test_an_unknown_scheme(make_data, s4gan):
    code, _, err = s4gan(["train", "--data", str(make_data()), "--run", "gs://bucket/run"])
    assert code == 78
    assert "gs://" in err


def test_a_fault_is_recorded_as_a_fault(make_data, train, tmp_path, monkeypatch):
    from job.training import loop

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(ZeroDivisionError):
        train(make_data())
    *_, ended = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert ended["reason"] == "a fault of the program"
    assert ended["exit_code"] == 1
    assert "saved_at" not in ended
    assert json.loads((tmp_path / "run/lease.json").read_text())["released"]


def test_a_run_is_not_resumed_with_other_classes(make_data, train):
    data = make_data()
    assert train(data, train__iterations=2)[0] == 0
    path = data / "dataset.yaml"
    path.write_text(path.read_text().replace("disc", "ball"))
    code, _, err = train(data, train__iterations=2)
    assert code == 78
    assert "classes are background, square, ball, were background, square, disc" in err


def test_three_attempts_that_fail_alike_exit_93_with_their_story(make_data, train, monkeypatch):
    from job.training import loop

    failures = iter(range(100))

    def broken(*_: object) -> None:
        raise ZeroDivisionError(f"a fault of the program, number {next(failures)}")

    data = make_data()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", broken)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                train(data)
        code, _, err = train(data)
    assert code == 93
    for number in (0, 1, 2):
        story = rf"attempt {number + 1}: after \d+ s, exit code 1: a fault of the program"
        assert re.search(story, err)
    assert "running it again will not help" in err
    assert "Traceback" in err, "whoever mends it needs to see where"
    # Mended, it goes on.
    assert train(data, train__iterations=40)[0] == 0


def test_other_networks_cannot_be_resumed_even_when_asked(s4gan, make_data, tmp_path):
    data = make_data()
    assert s4gan(command(data, tmp_path / "run", train__iterations=2))[0] == 0
    other = command(data, tmp_path / "run", train__iterations=4, model__discriminator_channels=16)
    code, _, err = s4gan([*other, "--resume-anyway"])
    assert code == 78
    assert "does not fit the networks of this configuration" in err
    assert "Discriminator" in err
    assert "Traceback" not in err
    # With networks that fit the same run goes on, longer than it was to be.
    longer = command(data, tmp_path / "run", train__iterations=4)
    code, out, err = s4gan([*longer, "--resume-anyway"])
    assert code == 0, err
    assert "train.iterations: 2 in the run, 4 now" in out
    assert (tmp_path / "run" / "checkpoint_4.pth").exists()


def test_a_run_that_has_lost_its_checkpoints_does_not_begin_anew(s4gan, make_data, tmp_path):
    data = make_data()
    run = tmp_path / "run"
    assert s4gan(command(data, run, train__iterations=3))[0] == 0
    (run / "checkpoints/latest.json").unlink()
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    kept = {path: path.read_bytes() for path in run.rglob("*.pth")}
    for ledger in ("there", "gone"):
        code, _, err = s4gan(command(data, run, train__iterations=3))
        assert code == 74
        assert "the checkpoints of this run are gone" in err
        assert {path: path.read_bytes() for path in run.rglob("*.pth")} == kept
        if ledger == "there":
            (run / "metrics.jsonl").unlink()


def test_a_run_cannot_go_back_to_fewer_iterations(s4gan, make_data, tmp_path):
    data = make_data()
    assert s4gan(command(data, tmp_path / "run", train__iterations=4))[0] == 0
    shorter = command(data, tmp_path / "run", train__iterations=2)
    code, _, err = s4gan([*shorter, "--resume-anyway"])
    assert code == 78
    assert "the run is at iteration 4 already, train.iterations is 2" in err
    assert "give at least 4" in err


def test_what_cannot_be_gone_on_with_does_not_change_the_run(s4gan, make_data, tmp_path):
    data = make_data()
    right = command(data, tmp_path / "run", train__iterations=2)
    assert s4gan(right)[0] == 0
    before = (tmp_path / "run/config.yaml").read_text()
    other = command(data, tmp_path / "run", train__iterations=2, model__discriminator_channels=16)
    assert s4gan([*other, "--resume-anyway"])[0] == 78
    assert (tmp_path / "run/config.yaml").read_text() == before
    assert s4gan(right)[0] == 0


@pytest.mark.parametrize("name", ["splits.json", "run.json", "config.yaml", "metrics.jsonl"])
def test_a_damaged_small_file_of_a_run_is_named(s4gan, make_data, tmp_path, name):
    data = make_data()
    right = command(data, tmp_path / "run", train__iterations=2)
    assert s4gan(right)[0] == 0
    (tmp_path / "run" / name).write_bytes(b'{"x\xff\n')
    code, out, err = s4gan(right)
    assert code in (74, 78)
    assert f"run/{name}" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--weights=w.pth", "--images=i", "--out=o", "--coco=s3://bucket/c.json"],
        ["pull", "s3://bucket/run", "s3://bucket/elsewhere"],
    ],
)
def test_a_uri_where_only_a_folder_can_be_is_refused(s4gan, arguments):
    code, _, err = s4gan(arguments)
    assert code == 78
    assert "must be a local folder" in err


def test_a_drill_deletes_nothing_of_the_users(s4gan, make_data, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("years")
    code, _, err = s4gan(["drill", f"--data={make_data()}", f"--folder={precious}"])
    assert code == 78
    assert "is not empty, and was not made by a drill" in err
    code, _, err = s4gan(["drill", "--data=nowhere", f"--folder={tmp_path / 'new'}"])
    assert code == 78
    assert "nowhere: is of no known layout" in err
    assert (precious / "thesis").read_text() == "years"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3:/bucket/run", "two slashes after the colon"),
        ("s3:bucket/run", "two slashes after the colon"),
        ("s3://bucket/runs//one", "has '//' or a dot for a folder in it"),
        ("s3://bucket/runs/../one", "has '//' or a dot for a folder in it"),
    ],
)
def test_a_misspelt_run_is_refused(s4gan, make_data, tmp_path, monkeypatch, uri, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = s4gan(command(make_data(), uri, train__iterations=2))
    assert code == 78
    assert said in err
    assert not (tmp_path / "s3:").exists()
