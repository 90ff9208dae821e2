"""The thorough look at a data set: its problems, its warnings, and what is told of both."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config import config_from_dict
from job.data import checks
from job.data.checks import check_data, inspect
from job.data.images import read_rgb
from job.data.report import LABELED, SET_ASIDE, UNLABELED, VAL, CheckReport
from job.data.scan import scan_dataset
from job.data.splits import items_of, make_splits
from job.errors import DataError, Preempted
from tests.conftest import IGNORE_INDEX, MakeData
from tests.unit.data.test_checks import (
    HEIGHT,
    WIDTH,
    cut_short,
    image_path,
    mask_path,
    write_mask,
)


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A couple of validation images is not what these tests are about."""
    monkeypatch.setattr("job.data.splits.FEW_VALIDATION_IMAGES", 1)


def look(folder: Path, *, ratio: float = 1.0, batch: int = 1, **options: Any) -> CheckReport:
    raw = {"data": {"labeled_ratio": ratio}, "train": {"batch_size": batch}}
    config = config_from_dict(raw, source="test")
    return inspect(scan_dataset(folder), config, uri=options.pop("uri", str(folder)), **options)


def at_start(folder: Path, *, ratio: float = 1.0) -> list[str]:
    """The warnings of `s4gan train`."""
    raw = {"data": {"labeled_ratio": ratio}, "train": {"batch_size": 1}}
    dataset = scan_dataset(folder)
    splits = make_splits(dataset, config_from_dict(raw, source="test"))
    return check_data(items_of(dataset, splits), dataset.info)


def copy_of(folder: Path, source: str, target: str, *, mask: bool = True) -> None:
    shutil.copy(image_path(folder, source), image_path(folder, target))
    if mask:
        shutil.copy(mask_path(folder, source), mask_path(folder, target))


def photograph(folder: Path, name: str, seed: int) -> Image.Image:
    """Replace an image by a larger one of soft shapes, with a mask of all classes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)
    image.save(image_path(folder, name))
    mask = np.tile(np.arange(3, dtype=np.uint8), (240, 107))[:, :320]
    Image.fromarray(mask.copy()).save(mask_path(folder, name))
    return image


# ---------------------------------------------------------------- good data


def test_good_data_has_neither_problems_nor_warnings(make_data: MakeData) -> None:
    report = look(make_data())
    assert report.is_good
    assert (list(report.problems), list(report.warnings)) == ([], [])
    assert report.counts == {LABELED: 8, SET_ASIDE: 0, UNLABELED: 8, VAL: 4}
    assert report.exact == []
    assert report.near == []
    assert report.kinds == {"RGB": 20}
    assert report.headline.endswith(
        "good; 8 labeled, 8 unlabeled, 4 validation images, classes background, square, disc"
    )


def test_the_split_is_that_of_the_configuration(make_data: MakeData) -> None:
    folder = make_data(labeled=12, unlabeled=4)
    report = look(folder, ratio=0.25)
    assert report.counts == {LABELED: 3, SET_ASIDE: 9, UNLABELED: 4, VAL: 4}
    assert report.balances[LABELED].masks == 3
    assert report.balances[SET_ASIDE].masks == 9
    assert report.all_masks.masks == 16
    assert "(9 with a mask that data.labeled_ratio sets aside)" in report.headline


def test_what_is_held_out_counts_as_validation(make_data: MakeData) -> None:
    report = look(make_data(labeled=20, val=0))
    assert report.counts[VAL] > 0
    assert report.counts[LABELED] + report.counts[VAL] == 20


def test_the_class_table_counts_pixels_and_images(make_data: MakeData) -> None:
    folder = make_data(labeled=2, unlabeled=2, val=1)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[: HEIGHT // 2] = 2
    mask[HEIGHT // 2, :] = IGNORE_INDEX
    for name in ("train_0000", "train_0001", "val_0000"):
        Image.fromarray(mask).save(mask_path(folder, name))
    report = look(folder)
    (background, square, disc) = report.to_dict()["classes"]
    assert disc["name"] == "disc"
    assert disc["labeled"] == {"share": pytest.approx(20 / 39), "images": 2}
    assert disc["all"]["images"] == 3
    assert disc["val"]["images"] == 1
    assert square["labeled"] == {"share": 0.0, "images": 0}
    assert background["val"]["share"] == pytest.approx(19 / 39)
    assert report.to_dict()["ignored_share"]["labeled"] == pytest.approx(1 / 40)
    text = report.text()
    assert "disc        51.282%        2  51.282%        3  51.282%        1" in text
    assert "(ignored)    2.500%" in text
    assert "no mask at all holds square" in text


# ---------------------------------------------------------------- problems


def test_every_problem_is_told_with_its_mend(make_data: MakeData) -> None:
    folder = make_data()
    for index in range(7):
        write_mask(folder, f"train_{index:04d}", 77)
    image_path(folder, "train_0009").write_text("no image")
    report = look(folder)
    assert not report.is_good
    assert len(report.problems) == 8
    assert all("mend: " in finding.text for finding in report.problems)
    assert report.problems[0].places[0].item.id == "train_0000"
    assert report.headline.startswith(
        f"{report.uri}: cannot be trained on: 8 problems, the first: "
    )
    assert "train_0000.png: holds the label 77 (1920 pixels)" in report.headline
    assert "mend" not in report.headline


def test_more_problems_than_are_read_are_counted(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.data.report.PROBLEMS_SHOWN", 2)
    folder = make_data()
    for index in range(5):
        write_mask(folder, f"train_{index:04d}", 77)
    text = look(folder).text()
    assert text.count("problem: ") == 2
    assert "... and 3 more problems" in text


def test_a_split_that_cannot_be_trained_on_is_a_problem_among_others(make_data: MakeData) -> None:
    folder = make_data(labeled=4, unlabeled=0)
    write_mask(folder, "train_0001", 77)
    report = look(folder, batch=9)
    assert [finding.headline.split(":")[0] for finding in report.problems] == [
        "only 4 labeled training images, fewer than the batch of 9",
        str(mask_path(folder, "train_0001")),
    ]
    assert report.counts[LABELED] == 4


def test_without_any_mask_there_is_nothing_to_check(make_data: MakeData) -> None:
    with pytest.raises(DataError, match="no image has a mask"):
        look(make_data(labeled=0, val=0))


def test_only_empty_masks_are_a_problem(make_data: MakeData) -> None:
    folder = make_data()
    for index in range(4):
        write_mask(folder, f"val_{index:04d}", IGNORE_INDEX)
    (problem,) = look(folder).problems
    assert problem.text.startswith("every validation mask is empty")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_drawn_on_what_a_viewer_shows_is_told_so(
    make_data: MakeData, orientation: int
) -> None:
    folder = make_data()
    path = image_path(folder, "train_0003")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(path)
    image.save(path, exif=exif)
    write_mask(folder, "train_0003", 0, size=(HEIGHT, WIDTH))
    (problem,) = look(folder).problems
    assert problem.text == (
        f"{mask_path(folder, 'train_0003')}: is 40x48, its image train_0003.png 48x40 as stored, "
        f"and 40x48 only when turned as its EXIF orientation {orientation} says, which is not "
        "followed\n  mend: turn the image's pixels for good: mogrify -auto-orient, or "
        "PIL.ImageOps.exif_transpose"
    )
    assert list(look(folder).warnings) == []
    with pytest.raises(DataError, match="EXIF orientation"):
        at_start(folder)


def test_the_mend_for_a_turned_image_mends_it(make_data: MakeData) -> None:
    from PIL import ImageOps

    folder = make_data()
    path = image_path(folder, "train_0003")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    Image.open(mask_path(folder, "train_0003")).transpose(Image.Transpose.ROTATE_270).save(
        mask_path(folder, "train_0003")
    )
    assert not look(folder).is_good
    ImageOps.exif_transpose(Image.open(path)).save(path)
    report = look(folder)
    assert report.is_good
    assert list(report.warnings) == []


def test_a_mask_turned_by_a_quarter_without_exif_is_told_so(make_data: MakeData) -> None:
    folder = make_data()
    write_mask(folder, "train_0003", 0, size=(HEIGHT, WIDTH))
    (problem,) = look(folder).problems
    assert "its image train_0003.png 48x40: one of the two is turned by a quarter" in problem.text


# ---------------------------------------------------------------- what training does not read


def test_a_wrong_mask_that_is_set_aside_is_a_warning(make_data: MakeData) -> None:
    folder = make_data(labeled=8, unlabeled=2)
    report = look(folder, ratio=0.5)
    aside = next(place for place in checks._places(*_split(folder, 0.5)) if place.part == SET_ASIDE)
    write_mask(folder, aside.item.id, 77)
    report = look(folder, ratio=0.5)
    assert report.is_good
    (warning,) = report.warnings
    assert warning.startswith(
        "wrong masks or images, of those whose masks are set aside: 1 (first: "
    )
    assert "holds the label 77" in warning
    assert at_start(folder, ratio=0.5) == []


def _split(folder: Path, ratio: float) -> tuple[Any, Any]:
    raw = {"data": {"labeled_ratio": ratio}, "train": {"batch_size": 1}}
    dataset = scan_dataset(folder)
    splits = make_splits(dataset, config_from_dict(raw, source="test"))
    return items_of(dataset, splits), dataset


def test_an_unlabeled_image_cut_short_is_a_warning(make_data: MakeData) -> None:
    folder = make_data()
    cut_short(image_path(folder, "train_0009"))
    report = look(folder)
    assert report.is_good
    (warning,) = report.warnings
    assert warning.startswith("unlabeled images that cannot be decoded, which training skips: 1")
    assert "train_0009" in warning


# ---------------------------------------------------------------- duplicates


def test_a_validation_image_that_is_trained_on_is_told_at_the_start_too(
    make_data: MakeData,
) -> None:
    folder = make_data()
    copy_of(folder, "train_0002", "val_0001")
    expected = (
        "1 of 4 validation images are training images, too, pixel for pixel (first: "
        f"{image_path(folder, 'train_0002')} and {image_path(folder, 'val_0001')}): validation "
        "mIoU flatters; remove one of the two"
    )
    report = look(folder)
    assert list(report.warnings) == at_start(folder) == [expected]
    assert [[p.item.id for p in group] for group in report.exact] == [["train_0002", "val_0001"]]


def test_a_copy_in_another_format_is_found(make_data: MakeData) -> None:
    folder = make_data()
    image = read_rgb(image_path(folder, "train_0002"))
    image_path(folder, "val_0001").unlink()
    image.save(image_path(folder, "val_0001").with_suffix(".webp"), lossless=True)
    shutil.copy(mask_path(folder, "train_0002"), mask_path(folder, "val_0001"))
    assert "1 of 4 validation images are training images" in look(folder).warnings[0]


def test_an_unlabeled_copy_of_a_validation_image_is_found_by_the_thorough_look(
    make_data: MakeData,
) -> None:
    folder = make_data()
    copy_of(folder, "val_0001", "train_0012", mask=False)
    assert "1 of 4 validation images are training images" in look(folder).warnings[0]
    assert at_start(folder) == []


def test_labeled_copies_and_what_their_masks_say(make_data: MakeData) -> None:
    folder = make_data()
    copy_of(folder, "train_0002", "train_0005")
    (warning,) = look(folder).warnings
    assert warning.startswith("1 of 8 labeled images are copies of another, pixel for pixel")
    mask = np.asarray(Image.open(mask_path(folder, "train_0002")))
    Image.fromarray(mask[:, ::-1].copy()).save(mask_path(folder, "train_0005"))
    for warnings in (look(folder).warnings, at_start(folder)):
        assert warnings[1].startswith("copies of one image with different masks: 1")
        assert warnings[1].endswith("at most one of the masks is right")


def test_copies_among_unlabeled_or_validation_images_alone_are_no_warning(
    make_data: MakeData,
) -> None:
    folder = make_data()
    copy_of(folder, "train_0010", "train_0012", mask=False)
    copy_of(folder, "val_0001", "val_0002")
    report = look(folder)
    assert list(report.warnings) == []
    assert len(report.exact) == 2


def test_pictures_that_differ_in_one_pixel_are_no_copies(make_data: MakeData) -> None:
    """Whichever row it is in: the start of training compares some rows first."""
    folder = make_data()
    image = Image.open(image_path(folder, "train_0002"))
    for row in range(0, HEIGHT, 7):
        other = image.copy()
        other.putpixel((3, row), (1, 2, 3))
        other.save(image_path(folder, "val_0001"))
        assert at_start(folder) == []
        assert look(folder).exact == []


def test_near_duplicates_are_found_by_the_thorough_look_only(make_data: MakeData) -> None:
    folder = make_data()
    for name, seed in (("train_0001", 1), ("train_0002", 2), ("val_0003", 3)):
        photograph(folder, name, seed)
    for name, seed in (("val_0000", 1), ("train_0007", 2)):
        image = photograph(folder, name, seed)
        path = image_path(folder, name)
        path.unlink()
        image.save(path.with_suffix(".jpg"), quality=60)
    report = look(folder)
    assert [(pair.first.item.id, pair.second.item.id) for pair in report.near] == [
        ("train_0001", "val_0000"),
        ("train_0002", "train_0007"),
    ]
    assert report.near_counts == {"train_val": 1, "labeled": 1}
    across, within = report.warnings
    assert across.startswith("pairs of a training and a validation image that look the same: 1")
    assert within.startswith("pairs of labeled images that look the same: 1")
    assert at_start(folder) == []


# ---------------------------------------------------------------- balance and formats


def test_a_missing_class_is_told_at_the_start_too(make_data: MakeData) -> None:
    folder = make_data()
    for index in range(8):
        path = mask_path(folder, f"train_{index:04d}")
        mask = np.array(Image.open(path))
        mask[mask == 2] = 0
        Image.fromarray(mask).save(path)
    expected = "no labeled image holds disc, which is not learned then; label images that do"
    assert at_start(folder) == list(look(folder).warnings) == [expected]


def test_odd_formats_are_told_at_the_start_too(make_data: MakeData) -> None:
    folder = make_data()
    path = image_path(folder, "train_0001")
    rgba = Image.open(path).convert("RGBA")
    rgba.putalpha(90)
    rgba.save(path)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(image_path(folder, "val_0001")).save(image_path(folder, "val_0001"), exif=exif)
    report = look(folder)
    assert len(report.warnings) == 2
    assert report.kinds == {"RGB": 19, "RGB with alpha": 1}
    assert "1 images are RGB with alpha: alpha is dropped" in report.text()
    assert at_start(folder) == list(report.warnings)


# ---------------------------------------------------------------- names, limits, stopping


def test_files_are_named_as_the_user_knows_them(make_data: MakeData) -> None:
    folder = make_data()
    write_mask(folder, "train_0001", 77)
    write_mask(folder, "train_0002", IGNORE_INDEX)
    report = look(folder, uri="s3://bucket/data/")
    text = json.dumps(report.to_dict()) + report.text()
    assert str(folder) not in text
    assert "s3://bucket/data/train/masks/train_0001.png: holds the label 77" in text
    assert "first: s3://bucket/data/train/masks/train_0002.png" in text


def test_a_name_that_is_no_utf8_can_be_printed(make_data: MakeData) -> None:
    folder = make_data()
    odd = b"odd\xff.png".decode(errors="surrogateescape")
    shutil.copy(image_path(folder, "train_0001"), folder / "train/images" / odd)
    Image.new("L", (3, 3)).save(mask_path(folder, "train_0001").with_name("a.png"))
    (folder / "train/masks/a.png").rename(folder / "train/masks" / odd)
    report = look(folder)
    (report.text() + json.dumps(report.to_dict())).encode()
    assert "odd\\udcff.png" in report.text()


def test_few_pictures_are_held_at_any_time(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the caller is, the threads are only a little ahead."""
    folder = make_data(labeled=4, unlabeled=200, val=1, height=8, width=8)
    ahead, most, lock = 0, 0, threading.Lock()
    original = checks._look

    def counted(*arguments: Any) -> Any:
        nonlocal ahead, most
        with lock:
            ahead += 1
            most = max(most, ahead)
        return original(*arguments)

    monkeypatch.setattr(checks, "_look", counted)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 1)
    places = checks._places(*_split(folder, 1.0))
    for _ in checks._looked_at(places, scan_dataset(folder).info, lambda: False, thorough=True):
        with lock:
            ahead -= 1
    assert most <= 4 * 2 + 1


def test_a_stop_ends_the_look(make_data: MakeData) -> None:
    asked = itertools.count()
    with pytest.raises(Preempted):
        look(make_data(), stopped=lambda: next(asked) > 5)


def test_an_exception_of_the_caller_leaves_no_files_to_look_at(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C raises one."""
    folder = make_data(labeled=4, unlabeled=200, val=1, height=8, width=8)
    opened = []
    original = checks._look
    monkeypatch.setattr(checks, "_look", lambda *a: opened.append(1) or original(*a))

    def interrupted(self: Any, place: Any, look: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checks._Seen, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        look(folder)
    assert len(opened) < 150


def test_a_mask_of_nothing_but_background_is_shown(make_data: MakeData) -> None:
    folder = make_data()
    write_mask(folder, "train_0003", 0)
    (shown,) = look(folder).notable
    assert shown.text == "the mask holds nothing but background"
    assert shown.places[0].item.mask == mask_path(folder, "train_0003")
