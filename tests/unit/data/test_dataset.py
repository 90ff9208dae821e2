"""The folder layout and `dataset.yaml`: what is found, and what is refused and how."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from job.data.dataset import MAX_CLASSES, Item, default_palette, load_dataset_info
from job.data.scan import scan_dataset
from job.errors import DataError, ExitCode
from tests.conftest import CLASSES, IGNORE_INDEX, PALETTE, MakeData


def write_image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)
    return path


def write_mask(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)
    return path


def write_info(root: Path, **changes: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / "dataset.yaml"
    path.write_text(yaml.safe_dump({"classes": ["sky", "road"], **changes}))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a dataset.yaml of two classes and nothing else."""
    write_info(tmp_path / "data")
    return tmp_path / "data"


def ids(items: tuple[Item, ...]) -> list[str]:
    return [item.id for item in items]


# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize(
    ("name", "advice"),
    [("valid", "in val/: rename it"), ("Test", "s4gan evaluate"), ("unlabeled", "train/images")],
)
def test_a_folder_that_is_not_read_is_said(make_data: MakeData, name: str, advice: str) -> None:
    folder = make_data(labeled=2, unlabeled=1, val=1)
    assert scan_dataset(folder).warnings == ()
    (folder / name / "images").mkdir(parents=True)
    (folder / "notes").mkdir()
    (warning,) = scan_dataset(folder).warnings
    assert warning.startswith(f"{name}/ is not read")
    assert advice in warning


def test_the_layout_is_listed_with_classes_masks_and_validation(make_data: MakeData) -> None:
    folder = make_data(labeled=2, unlabeled=1, val=1)
    dataset = scan_dataset(folder)
    train = folder / "train"
    assert dataset.root == folder
    assert dataset.info.classes == CLASSES
    assert dataset.info.ignore_index == IGNORE_INDEX
    assert dataset.info.palette == PALETTE
    assert dataset.info.num_classes == 3
    assert dataset.train == (
        Item("train_0000", train / "images" / "train_0000.png", train / "masks" / "train_0000.png"),
        Item("train_0001", train / "images" / "train_0001.png", train / "masks" / "train_0001.png"),
        Item("train_0002", train / "images" / "train_0002.png", None),
    )
    assert ids(dataset.val) == ["val_0000"]
    assert dataset.val[0].mask == folder / "val" / "masks" / "val_0000.png"
    assert dataset.warnings == ()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG"])
def test_each_image_ending_is_found_and_pairs_with_a_png_mask(root: Path, ending: str) -> None:
    write_image(root / "train" / "images" / f"a{ending}")
    write_mask(root / "train" / "masks" / "a.png")
    (item,) = scan_dataset(root).train
    assert item.id == "a"
    assert item.image.name == f"a{ending}"
    assert item.mask == root / "train" / "masks" / "a.png"


def test_names_in_folders_keep_the_folder_in_the_id_and_pair_within_it(root: Path) -> None:
    for city in ("bonn", "ulm"):
        write_image(root / "train" / "images" / city / "1.jpg")
    write_mask(root / "train" / "masks" / "ulm" / "1.png")
    bonn, ulm = scan_dataset(root).train
    assert (bonn.id, bonn.mask) == ("bonn/1", None)
    assert (ulm.id, ulm.mask) == ("ulm/1", root / "train" / "masks" / "ulm" / "1.png")


def test_items_are_sorted_by_id_whatever_their_ending(root: Path) -> None:
    for name in ("c.png", "a.webp", "b.jpg"):
        write_image(root / "train" / "images" / name)
    assert ids(scan_dataset(root).train) == ["a", "b", "c"]


def test_a_dot_within_a_name_belongs_to_the_id(root: Path) -> None:
    for name in ("frame.0001.png", "frame.0002.png"):
        write_image(root / "train" / "images" / name)
    write_mask(root / "train" / "masks" / "frame.0002.png")
    assert [(item.id, item.mask is not None) for item in scan_dataset(root).train] == [
        ("frame.0001", False),
        ("frame.0002", True),
    ]


def test_without_a_masks_folder_every_image_is_unlabeled(root: Path) -> None:
    write_image(root / "train" / "images" / "a.png")
    assert [item.mask for item in scan_dataset(root).train] == [None]


def test_other_files_and_hidden_files_are_passed_over(root: Path) -> None:
    images = root / "train" / "images"
    write_image(images / "a.png")
    (images / "notes.txt").write_text("x")
    (images / "Thumbs.db").write_bytes(b"x")
    write_image(images / ".hidden.png")
    write_image(images / "._a.png")
    assert ids(scan_dataset(root).train) == ["a"]


def test_files_in_hidden_folders_are_passed_over(root: Path) -> None:
    write_image(root / "train" / "images" / "a.png")
    write_image(root / "train" / "images" / ".ipynb_checkpoints" / "a-checkpoint.png")
    assert ids(scan_dataset(root).train) == ["a"]


def test_a_folder_named_like_an_image_is_not_an_image(root: Path) -> None:
    write_image(root / "train" / "images" / "clip.png" / "1.png")
    assert ids(scan_dataset(root).train) == ["clip.png/1"]


def test_images_in_a_linked_folder_are_found(root: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "1.png")
    write_image(root / "train" / "images" / "a.png")
    os.symlink(tmp_path / "elsewhere", root / "train" / "images" / "bonn")
    assert ids(scan_dataset(root).train) == ["a", "bonn/1"]


def test_a_link_to_a_folder_above_is_not_followed_in_circles(root: Path) -> None:
    images = root / "train" / "images"
    write_image(images / "a.png")
    os.symlink(images, images / "again")
    assert ids(scan_dataset(root).train) == ["a"]


def test_the_images_folder_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "1.png")
    (root / "train").mkdir()
    os.symlink(tmp_path / "elsewhere", root / "train" / "images")
    assert ids(scan_dataset(root).train) == ["1"]


def test_no_image_is_opened_by_listing(root: Path) -> None:
    path = root / "train" / "images" / "a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not an image")
    assert ids(scan_dataset(root).train) == ["a"]


# ---------------------------------------------------------------- what is refused


def test_a_mask_without_its_image_is_refused_by_name_with_the_near_one(root: Path) -> None:
    for index in range(3):
        write_image(root / "train" / "images" / f"frame_{index}.png")
    orphan = write_mask(root / "train" / "masks" / "frame_1_mask.png")
    with pytest.raises(DataError) as caught:
        scan_dataset(root)
    error = caught.value
    assert error.exit_code == ExitCode.BAD_CONFIG == 78
    assert str(orphan) in error.message
    assert str(root / "train" / "images") in error.message
    assert "did you mean frame_1?" in error.message
    assert "1 such masks" in error.message
    assert "same name" in error.mend


def test_masks_without_images_are_counted(root: Path) -> None:
    write_image(root / "train" / "images" / "a.png")
    for index in range(4):
        write_mask(root / "train" / "masks" / f"zzzzzz{index}.png")
    with pytest.raises(DataError, match="4 such masks") as caught:
        scan_dataset(root)
    assert "did you mean" not in caught.value.message


def test_an_orphan_mask_in_val_is_refused_too(make_data: MakeData) -> None:
    folder = make_data(val=2)
    (folder / "val" / "images" / "val_0001.png").unlink()
    with pytest.raises(DataError, match=r"val/masks/val_0001\.png"):
        scan_dataset(folder)


def test_two_images_of_one_name_are_refused_naming_both(root: Path) -> None:
    write_image(root / "train" / "images" / "a.jpg")
    write_image(root / "train" / "images" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: has the same name as a\.jpg") as caught:
        scan_dataset(root)
    assert caught.value.mend == "remove one of the two"


def test_one_stem_in_two_folders_is_fine(root: Path) -> None:
    write_image(root / "train" / "images" / "x" / "a.jpg")
    write_image(root / "train" / "images" / "y" / "a.jpg")
    assert ids(scan_dataset(root).train) == ["x/a", "y/a"]


def test_an_absent_data_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such data folder") as caught:
        scan_dataset(tmp_path / "nowhere")
    assert "its path" in caught.value.mend


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="no such data folder"):
        scan_dataset(path)


def test_an_absent_images_folder_says_where_images_go(root: Path) -> None:
    with pytest.raises(DataError, match=r"train/images: no such folder") as caught:
        scan_dataset(root)
    assert "train/masks" in caught.value.mend


def test_an_empty_images_folder_says_which_endings_count(root: Path) -> None:
    (root / "train" / "images").mkdir(parents=True)
    (root / "train" / "images" / "a.tiff").write_bytes(b"II")
    with pytest.raises(DataError, match=r"train/images: holds no image") as caught:
        scan_dataset(root)
    assert caught.value.mend == "images end in .jpeg, .jpg, .png, .webp"


# ---------------------------------------------------------------- val/


def test_without_a_val_folder_there_is_no_validation_part(make_data: MakeData) -> None:
    assert scan_dataset(make_data(val=0)).val == ()


def test_validation_images_without_masks_are_left_out_with_a_warning(make_data: MakeData) -> None:
    folder = make_data(val=4)
    for index in (1, 3):
        (folder / "val" / "masks" / f"val_000{index}.png").unlink()
    dataset = scan_dataset(folder)
    assert ids(dataset.val) == ["val_0000", "val_0002"]
    (warning,) = dataset.warnings
    assert warning.startswith("2 images in val/images have no mask")
    assert "val_0001.png" in warning


def test_a_val_folder_without_any_mask_is_refused_with_the_way_out(make_data: MakeData) -> None:
    folder = make_data(val=2)
    shutil.rmtree(folder / "val" / "masks")
    with pytest.raises(DataError, match="holds no image with a mask") as caught:
        scan_dataset(folder)
    assert str(folder / "val") in caught.value.message
    assert "--val-split" in caught.value.mend


def test_an_empty_val_folder_is_refused(make_data: MakeData) -> None:
    folder = make_data(val=0)
    (folder / "val").mkdir()
    with pytest.raises(DataError, match="holds no image with a mask"):
        scan_dataset(folder)


def test_pictures_of_other_formats_are_told_of(make_data: MakeData) -> None:
    folder = make_data(val=2)
    (folder / "train" / "images" / "more.tif").touch()
    (folder / "val" / "images" / "more.bmp").touch()
    first, second = scan_dataset(folder).warnings
    assert "1 files in" in first
    assert "more.tif" in first
    assert "more.bmp" in second


def test_who_only_measures_needs_no_training_images(make_data: MakeData) -> None:
    folder = make_data(val=2)
    shutil.rmtree(folder / "train")
    dataset = scan_dataset(folder, needs_train=False)
    assert (dataset.train, len(dataset.val)) == ((), 2)
    with pytest.raises(DataError, match="train/images: no such folder"):
        scan_dataset(folder)


# ---------------------------------------------------------------- dataset.yaml


def test_only_classes_must_be_given(tmp_path: Path) -> None:
    info = load_dataset_info(write_info(tmp_path))
    assert info.classes == ("sky", "road")
    assert info.ignore_index == 255
    assert info.palette == default_palette(2)


def test_numbers_as_class_names_are_read_as_text(tmp_path: Path) -> None:
    assert load_dataset_info(write_info(tmp_path, classes=[0, 1, 2])).classes == ("0", "1", "2")


def test_names_in_any_script_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text("classes: [Straße, 空]\n", encoding="utf-8")
    assert load_dataset_info(path).classes == ("Straße", "空")


def test_an_absent_dataset_yaml_comes_with_an_example(tmp_path: Path) -> None:
    (tmp_path / "train" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=r"dataset\.yaml: not there") as caught:
        scan_dataset(tmp_path)
    assert "classes: [sky, road]" in caught.value.mend


@pytest.mark.parametrize(
    "content",
    [
        b"classes: [sky, road",
        b"\xff\xfe\x00classes",
        b"classes: [a, b]\n\tignore_index: 3\n",
        b"? [a]\n: b\n",
        b"classes: !!python/object:os.system [a, b]\n",
        b"classes: [a, b]\nignore_index: 2020-13-45\n",
    ],
    ids=["syntax", "encoding", "tab", "key", "tag", "date"],
)
def test_an_unreadable_dataset_yaml_is_a_data_error_naming_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_dataset_info(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", ["", "- sky\n- road\n", "sky", "7"])
def test_a_dataset_yaml_without_keys_is_refused_with_an_example(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match="must hold keys") as caught:
        load_dataset_info(path)
    assert "classes: [sky, road]" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [("class", "classes"), ("ignore_label", "ignore_index"), ("pallete", "palette")],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path: Path, key: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"unknown key {key} \\(did you mean {meant}\\?\\)"):
        load_dataset_info(write_info(tmp_path, **{key: 1}))


@pytest.mark.parametrize("key", ["zzz", 7])
def test_a_key_like_no_other_lists_the_valid_ones(tmp_path: Path, key: Any) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text(yaml.safe_dump({"classes": ["a", "b"], key: 1}))
    with pytest.raises(DataError, match=r"\(valid: classes, ignore_index, palette\)"):
        load_dataset_info(path)


@pytest.mark.parametrize(
    "classes",
    [None, [], ["sky"], "sky, road", {"sky": 0, "road": 1}, [f"c{i}" for i in range(256)]],
    ids=["none", "empty", "one", "text", "mapping", "256"],
)
def test_classes_must_be_a_list_of_2_to_255(tmp_path: Path, classes: Any) -> None:
    with pytest.raises(DataError, match="classes must be a list of 2 to 255 names"):
        load_dataset_info(write_info(tmp_path, classes=classes))


def test_255_classes_leave_255_for_ignore(tmp_path: Path) -> None:
    info = load_dataset_info(write_info(tmp_path, classes=[f"c{i}" for i in range(MAX_CLASSES)]))
    assert info.num_classes == 255
    assert info.ignore_index == 255


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two classes have the same name"):
        load_dataset_info(write_info(tmp_path, classes=["sky", "road", "sky"]))


@pytest.mark.parametrize("text", ["[on, off]", "[sky, ~]", "[{sky: 1}, road]", "[[sky], road]"])
def test_class_names_that_yaml_reads_as_something_else_are_refused(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text(f"classes: {text}\n")
    with pytest.raises(DataError, match=r"dataset\.yaml"):
        load_dataset_info(path)


@pytest.mark.parametrize("value", [-1, 256, 1000, 1.5, "255", None, [255]])
def test_ignore_index_must_be_a_number_of_8_bits(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match=r"ignore_index must be 0\.\.255, got "):
        load_dataset_info(write_info(tmp_path, ignore_index=value))


@pytest.mark.parametrize(("value", "name"), [(0, "sky"), (1, "road")])
def test_ignore_index_must_not_be_a_class(tmp_path: Path, value: int, name: str) -> None:
    with pytest.raises(DataError, match=f"ignore_index {value} is also the class {name}") as caught:
        load_dataset_info(write_info(tmp_path, ignore_index=value))
    assert caught.value.mend == "use a value from 2 to 255 in the masks and here"


@settings(deadline=None)
@given(num_classes=st.integers(2, MAX_CLASSES), ignore_index=st.integers(0, 255))
def test_ignore_index_is_accepted_exactly_above_the_classes(
    tmp_path_factory: pytest.TempPathFactory, num_classes: int, ignore_index: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "ignore_index.yaml"
    names = [f"c{i}" for i in range(num_classes)]
    path.write_text(f"classes: [{', '.join(names)}]\nignore_index: {ignore_index}\n")
    if ignore_index >= num_classes:
        assert load_dataset_info(path).ignore_index == ignore_index
    else:
        with pytest.raises(DataError, match=f"is also the class c{ignore_index}"):
            load_dataset_info(path)


# ---------------------------------------------------------------- palette


def test_a_palette_is_kept(tmp_path: Path) -> None:
    info = load_dataset_info(write_info(tmp_path, palette=[[1, 2, 3], [255, 0, 9]]))
    assert info.palette == ((1, 2, 3), (255, 0, 9))


def test_a_longer_palette_is_cut_to_the_classes(tmp_path: Path) -> None:
    info = load_dataset_info(write_info(tmp_path, palette=[[i, i, i] for i in range(256)]))
    assert info.palette == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    "palette",
    [
        7,
        "red",
        [1, 2, 3],
        [[1, 2], [3, 4]],
        [[1, 2, 3, 4], [5, 6, 7, 8]],
        [["a", "b", "c"], [0, 0, 0]],
        {"sky": [0, 0, 0], "road": [1, 1, 1]},
        [None, None],
        [[float("inf"), 0, 0], [0, 0, 0]],
    ],
    ids=["number", "text", "flat", "pairs", "rgba", "letters", "mapping", "nothing", "infinite"],
)
def test_a_palette_of_another_form_is_refused(tmp_path: Path, palette: Any) -> None:
    with pytest.raises(DataError, match=r"palette must be a list of \[red, green, blue\]"):
        load_dataset_info(write_info(tmp_path, palette=palette))


@pytest.mark.parametrize(
    "palette",
    [[], [[0, 0, 0]], [[0, 0, 0], [0, 0, 256]], [[0, 0, 0], [-1, 0, 0]]],
    ids=["empty", "short", "bright", "negative"],
)
def test_a_palette_too_short_or_out_of_range_is_refused(tmp_path: Path, palette: Any) -> None:
    with pytest.raises(DataError, match=r"palette needs 2 colours of 0\.\.255"):
        load_dataset_info(write_info(tmp_path, palette=palette))


def test_a_palette_of_fractions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="palette"):
        load_dataset_info(write_info(tmp_path, palette=[[0.5, 0.2, 0.9], [0.1, 0.9, 0.3]]))


@pytest.mark.parametrize("num_classes", [2, 21, 150, MAX_CLASSES])
def test_default_colours_differ_and_are_8_bit(num_classes: int) -> None:
    palette = default_palette(num_classes)
    assert len(set(palette)) == num_classes
    assert all(0 <= channel <= 255 for colour in palette for channel in colour)
    assert (255, 255, 255) not in palette  # white means "no class" in pictures


def test_a_mask_that_is_no_png_is_refused_not_dropped(root: Path) -> None:
    write_image(root / "train" / "images" / "a.png")
    write_image(root / "train" / "masks" / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: masks must be PNG"):
        scan_dataset(root)
