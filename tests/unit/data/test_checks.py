"""Looking at every file before training: what is refused, what is warned of, and in which words."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config import config_from_dict
from job.data.checks import MAX_SHOWN, check_data
from job.data.dataset import Dataset
from job.data.scan import scan_dataset
from job.data.splits import SplitItems, items_of, make_splits
from job.errors import DataError, ExitCode, Preempted
from tests.conftest import IGNORE_INDEX, MakeData

HEIGHT, WIDTH = 40, 48  # of make_data


def split(folder: Path, *, ratio: float = 1.0) -> tuple[Dataset, SplitItems]:
    dataset = scan_dataset(folder)
    raw = {"data": {"labeled_ratio": ratio}, "train": {"batch_size": 1}}
    return dataset, items_of(dataset, make_splits(dataset, config_from_dict(raw, source="test")))


def check(folder: Path, **options: Any) -> list[str]:
    dataset, items = split(folder)
    return check_data(items, dataset.info, **options)


def refused(folder: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        check(folder)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG == 78
    return caught.value


def image_path(folder: Path, name: str) -> Path:
    return folder / name.split("_")[0] / "images" / f"{name}.png"


def mask_path(folder: Path, name: str) -> Path:
    return folder / name.split("_")[0] / "masks" / f"{name}.png"


def write_mask(
    folder: Path, name: str, value: int, *, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> None:
    Image.new("L", size, value).save(mask_path(folder, name))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---------------------------------------------------------------- good data


def test_good_data_passes_without_a_word(make_data: MakeData) -> None:
    assert check(make_data()) == []


def test_good_data_without_a_val_folder_passes(make_data: MakeData) -> None:
    assert check(make_data(labeled=20, val=0)) == []


def test_an_indexed_mask_and_a_jpeg_image_pass(make_data: MakeData) -> None:
    folder = make_data()
    path = image_path(folder, "train_0000")
    with Image.open(path) as image:
        image.save(path.with_suffix(".jpg"))
    path.unlink()
    with Image.open(mask_path(folder, "train_0000")) as mask:
        indexed = Image.fromarray(np.asarray(mask))
    indexed.putpalette([9] * 768)
    indexed.save(mask_path(folder, "train_0000"))
    assert check(folder) == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["train_0002", "train_0009", "val_0001"])
def test_a_file_that_is_no_image_is_named(make_data: MakeData, name: str) -> None:
    """A labeled, an unlabeled and a validation image."""
    folder = make_data()
    image_path(folder, name).write_text("not an image")
    text = str(refused(folder))
    assert text.startswith(f"{image_path(folder, name)}: cannot be read as an image")
    assert "mend: replace" in text


@pytest.mark.parametrize("name", ["train_0002", "val_0001"])
def test_a_labeled_image_cut_short_is_named(make_data: MakeData, name: str) -> None:
    folder = make_data()
    cut_short(image_path(folder, name))
    text = str(refused(folder))
    assert str(image_path(folder, name)) in text
    assert "mend: replace the file, or remove it with its mask" in text


def test_a_jpeg_cut_short_is_named(make_data: MakeData) -> None:
    folder = make_data()
    path = image_path(folder, "train_0001")
    jpeg = path.with_suffix(".jpg")
    with Image.open(path) as image:
        image.save(jpeg)
    path.unlink()
    cut_short(jpeg)
    assert str(jpeg) in str(refused(folder))


def test_of_unlabeled_images_only_the_header_is_read(make_data: MakeData) -> None:
    folder = make_data()
    cut_short(image_path(folder, "train_0009"))
    assert check(folder) == []


def test_an_unlabeled_image_that_has_vanished_is_named(make_data: MakeData) -> None:
    folder = make_data()
    dataset, items = split(folder)
    items.unlabeled[0].image.unlink()
    with pytest.raises(DataError, match=r"train_0008\.png: cannot be read as an image"):
        check_data(items, dataset.info)


def test_a_broken_mask_is_named_with_the_mend(make_data: MakeData) -> None:
    folder = make_data()
    mask_path(folder, "train_0003").write_bytes(b"")
    text = str(refused(folder))
    assert text.startswith(f"{mask_path(folder, 'train_0003')}: cannot be read as a mask")
    assert "its image then counts as unlabeled" in text


def test_a_colour_coded_mask_is_refused_with_the_mend(make_data: MakeData) -> None:
    folder = make_data()
    Image.new("RGB", (WIDTH, HEIGHT)).save(mask_path(folder, "val_0002"))
    text = str(refused(folder))
    assert f"{mask_path(folder, 'val_0002')}: a mask must hold class numbers" in text
    assert "mode RGB" in text
    assert "colour-coded mask must be converted" in text


def test_a_mask_of_another_size_than_its_image_is_refused_with_both(make_data: MakeData) -> None:
    folder = make_data()
    write_mask(folder, "train_0004", 0, size=(24, 20))
    text = str(refused(folder))
    assert f"{mask_path(folder, 'train_0004')}: is 24x20, its image train_0004.png 48x40" in text
    assert "mend: save the mask in its image's size (nearest neighbour)" in text


def test_a_mask_turned_by_a_quarter_is_refused(make_data: MakeData) -> None:
    folder = make_data()
    write_mask(folder, "train_0004", 0, size=(HEIGHT, WIDTH))
    assert "is 40x48" in str(refused(folder))


@pytest.mark.parametrize("label", [3, 100, 199, 201, 255])
def test_a_label_outside_the_classes_is_named_with_its_pixels(
    make_data: MakeData, label: int
) -> None:
    folder = make_data()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[0] = IGNORE_INDEX
    mask[5, 7:12] = label
    Image.fromarray(mask).save(mask_path(folder, "train_0005"))
    text = str(refused(folder))
    assert (
        f"{mask_path(folder, 'train_0005')}: holds the label {label} (5 pixels), the classes are "
        f"0..2 and ignore_index {IGNORE_INDEX}" in text
    )
    assert "mend: correct the mask, or the classes in dataset.yaml" in text


def test_of_several_wrong_labels_those_with_most_pixels_are_named(make_data: MakeData) -> None:
    folder = make_data()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[0], mask[1, :3], mask[2, :4] = 250, 7, 9
    Image.fromarray(mask).save(mask_path(folder, "train_0005"))
    named = f"holds the labels 250 ({WIDTH} pixels), 9 (4 pixels), 7 (3 pixels), the classes"
    assert named in str(refused(folder))
    mask[3, :7] = range(101, 108)
    Image.fromarray(mask).save(mask_path(folder, "train_0005"))
    assert "7 (3 pixels), 101 (1 pixels), 102 (1 pixels) and 5 more, the" in str(refused(folder))


@pytest.mark.parametrize("value", [0, 2, IGNORE_INDEX])
def test_every_class_and_ignore_index_are_allowed(make_data: MakeData, value: int) -> None:
    folder = make_data()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[0], mask[1] = 1, value
    Image.fromarray(mask).save(mask_path(folder, "train_0005"))
    assert check(folder) == []


def test_a_mask_that_is_set_aside_is_not_looked_at(make_data: MakeData) -> None:
    folder = make_data(labeled=8, unlabeled=0)
    dataset, items = split(folder, ratio=0.5)
    for item in items.unlabeled:
        mask_path(folder, item.id).write_text("broken")
    assert check_data(items, dataset.info) == []


@pytest.mark.parametrize("name", ["train_0000", "train_0008"])
def test_an_image_too_large_for_pillow_is_refused_by_name(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = make_data()
    Image.new("RGB", (100, 100)).save(image_path(folder, name))
    if name == "train_0000":
        write_mask(folder, name, 0, size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT)
    assert str(image_path(folder, name)) in str(refused(folder))


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([1, 2, 3], "hold the labels 1 to 3, and none holds 0: they seem to count from 1"),
        ([0, 128, 255], "hold the labels 0, 128, 255: they seem to be grey levels"),
        ([0, 1, 77], ""),
        ([1, 2, 77], ""),
    ],
)
def test_what_is_wrong_with_all_masks_alike_is_said_first(
    make_data: MakeData, table: list[int], said: str
) -> None:
    folder = make_data()
    for path in folder.glob("*/masks/*.png"):
        with Image.open(path) as picture:
            labels = np.asarray(picture)
        mapped = np.array(table, np.uint8)[np.minimum(labels, 2)]
        mapped[0, :3] = table
        Image.fromarray(mapped).save(path)
    lines = str(refused(folder)).splitlines()
    assert (said in lines[0]) if said else (": holds the label" in lines[0])
    assert sum(": holds the label" in line for line in lines) == MAX_SHOWN
    wrong = len(list(folder.glob("*/masks/*.png")))
    assert lines[-1] == f"... and {wrong - MAX_SHOWN} more files"


def test_several_problems_are_listed_together_each_with_its_mend(make_data: MakeData) -> None:
    folder = make_data()
    image_path(folder, "train_0001").write_text("x")
    write_mask(folder, "train_0002", 77)
    image_path(folder, "train_0010").write_text("x")
    text = str(refused(folder))
    for path in (
        image_path(folder, "train_0001"),
        mask_path(folder, "train_0002"),
        image_path(folder, "train_0010"),
    ):
        assert str(path) in text
    assert text.count("mend: ") == 3
    assert "more files" not in text


def test_five_problems_are_all_shown(make_data: MakeData) -> None:
    folder = make_data()
    for index in range(MAX_SHOWN):
        write_mask(folder, f"train_{index:04d}", 77)
    text = str(refused(folder))
    assert text.count("holds the label 77") == 5
    assert "more files" not in text


def test_of_more_than_five_problems_the_first_are_shown_and_the_rest_counted(
    make_data: MakeData,
) -> None:
    folder = make_data(labeled=8, unlabeled=3)
    for index in range(8):
        write_mask(folder, f"train_{index:04d}", 77)
    image_path(folder, "train_0009").write_text("x")
    text = str(refused(folder))
    shown = [line for line in text.splitlines() if "holds the label" in line]
    assert [line.split(":")[0] for line in shown] == [
        str(mask_path(folder, f"train_{index:04d}")) for index in range(5)
    ]
    assert text.endswith("... and 4 more files")


def test_a_held_out_image_is_reported_once(make_data: MakeData) -> None:
    folder = make_data(labeled=20, val=0)
    dataset, items = split(folder)
    assert items.val[0].mask is not None
    items.val[0].mask.write_text("x")
    with pytest.raises(DataError) as caught:
        check_data(items, dataset.info)
    assert str(caught.value).count("cannot be read as a mask") == 1


# ---------------------------------------------------------------- empty masks


def test_some_empty_masks_are_a_warning_with_count_and_first(make_data: MakeData) -> None:
    folder = make_data()
    for name in ("train_0006", "train_0002", "val_0003"):
        write_mask(folder, name, IGNORE_INDEX)
    assert check(folder) == [
        "2 of 8 training masks are empty (all ignore_index), "
        f"first: {mask_path(folder, 'train_0002')}",
        "1 of 4 validation masks are empty (all ignore_index), "
        f"first: {mask_path(folder, 'val_0003')}",
    ]


@pytest.mark.parametrize(
    ("prefix", "count", "named"), [("train", 8, "training"), ("val", 4, "validation")]
)
def test_only_empty_masks_are_refused(
    make_data: MakeData, prefix: str, count: int, named: str
) -> None:
    folder = make_data()
    for index in range(count):
        write_mask(folder, f"{prefix}_{index:04d}", IGNORE_INDEX)
    error = refused(folder)
    assert error.message == f"every {named} mask is empty: all of it is ignore_index"
    assert "ignore_index in dataset.yaml" in error.mend


def test_masks_of_one_class_alone_are_refused(make_data: MakeData) -> None:
    folder = make_data()
    for index in range(8):
        write_mask(folder, f"train_{index:04d}", 0 if index % 2 else IGNORE_INDEX)
    error = refused(folder)
    assert error.message == (
        "all training masks hold one class alone, background: there is nothing to learn"
    )
    assert "255" in error.mend


def test_a_mask_of_nothing_but_background_is_not_empty_and_worth_a_look(
    make_data: MakeData,
) -> None:
    folder = make_data()
    write_mask(folder, "train_0006", 0)
    (warning,) = check(folder)
    assert warning.startswith("1 of 8 labeled masks holds nothing but background (first: ")
    assert str(mask_path(folder, "train_0006")) in warning


# ---------------------------------------------------------------- stopping


def test_a_stop_ends_the_check_as_preempted(make_data: MakeData) -> None:
    with pytest.raises(Preempted) as caught:
        check(make_data(), stopped=lambda: True)
    assert caught.value.exit_code == ExitCode.PREEMPTED == 75


def test_a_stop_on_the_way_wins_over_problems_found(make_data: MakeData) -> None:
    folder = make_data()
    for index in range(8):
        write_mask(folder, f"train_{index:04d}", 77)
    asked = itertools.count()
    with pytest.raises(Preempted):
        check(folder, stopped=lambda: next(asked) >= 3)


def test_after_a_stop_no_more_files_are_opened(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data()
    opened = []
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path))
    with pytest.raises(Preempted):
        check(folder, stopped=lambda: True)
    assert opened == []
