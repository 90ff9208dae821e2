"""Lists and permutations that choose images: every form in use, and every way to get one wrong."""

from __future__ import annotations

import base64
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.config import Config, config_from_dict
from job.data.dataset import Dataset
from job.data.lists import read_permutation
from job.data.scan import scan_dataset
from job.data.splits import Splits, check_same, items_of, make_splits
from job.errors import ConfigError, DataError
from tests.conftest import MakeData
from tests.layouts import city_ids, voc_ids, write_cityscapes, write_lines, write_voc


def configured(**data: object) -> Config:
    return config_from_dict({"data": data, "train": {"batch_size": 1}}, source="test")


def scanned(root: Path, **data: object) -> Dataset:
    return scan_dataset(root, configured(**data).data)


def split(root: Path, **data: object) -> Splits:
    return make_splits(scanned(root, **data), configured(**data))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """VOC 2012 with augmented masks: 6 images of 2007, 4 of 2008, validation 2009, others 2010."""
    return write_voc(tmp_path / "voc", augmented=4)


TRAIN, AUGMENTED, VAL, OTHERS = voc_ids(6), voc_ids(4, 2008), voc_ids(4, 2009), voc_ids(2, 2010)


# ---------------------------------------------------------------- forms of lines


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "JPEGImages/{}.jpg",
        "/JPEGImages/{}.jpg",
        "./JPEGImages/{}.jpg",
        "{}.jpg",
        "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png",
        "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",
        "JPEGImages/{0}.jpg\tSegmentationClassAug/{0}.png",
        "JPEGImages/{}",
        "voc/JPEGImages/{0}.jpg voc/SegmentationClassAug/{0}.png",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_form_names_the_same_images(voc: Path, form: str, end: str) -> None:
    chosen = [TRAIN[4], AUGMENTED[0], TRAIN[1]]
    text = end.join(form.format(name) for name in chosen) + end + end
    (voc / "labeled.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as an editor may save it
    splits = split(voc, labeled_list="labeled.txt")
    assert splits.labeled == tuple(sorted(chosen))
    assert set(splits.unlabeled) == {*TRAIN, *AUGMENTED} - set(chosen)
    assert splits.val == tuple(VAL)
    items = items_of(scanned(voc, labeled_list="labeled.txt"), splits)
    assert {item.mask.parent.name for item in items.labeled if item.mask} == {
        "SegmentationClassAug"
    }


def test_paths_may_begin_at_the_data_folder_or_at_the_layouts(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit/VOC2012")
    for form in ("VOCdevkit/VOC2012/JPEGImages/{}.jpg", "JPEGImages/{}.jpg"):
        write_lines(tmp_path / "l.txt", [form.format(TRAIN[0])])
        assert split(tmp_path, labeled_list="l.txt").labeled == (TRAIN[0],)


def test_a_pair_says_which_mask(voc: Path) -> None:
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png"
    write_lines(voc / "l.txt", [line.format(name) for name in TRAIN[:2]])
    dataset = scanned(voc, labeled_list="l.txt")
    assert dataset.warnings == ()
    items = items_of(dataset, make_splits(dataset, configured()))
    assert {item.mask for item in items.labeled} == {
        voc / "SegmentationClass" / f"{name}.png" for name in TRAIN[:2]
    }
    assert all(item.mask is None for item in items.unlabeled)


def test_lists_for_merged_mask_folders_drop_in(voc: Path) -> None:
    """Published lists name SegmentationClass for all 10,582 images: there it has been merged."""
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png"
    write_lines(voc / "l.txt", [line.format(name) for name in (TRAIN[0], *AUGMENTED[:2])])
    dataset = scanned(voc, labeled_list="l.txt")
    masks = {item.id: item.mask for item in dataset.train}
    assert masks[TRAIN[0]] == voc / "SegmentationClass" / f"{TRAIN[0]}.png"
    assert masks[AUGMENTED[0]] == voc / "SegmentationClassAug" / f"{AUGMENTED[0]}.png"
    assert dataset.warnings == (
        f"{voc / 'l.txt'}: 2 masks are not where it says, but in SegmentationClassAug, from where "
        "they are read",
    )


def test_the_lists_alone_will_do_without_those_of_voc(tmp_path: Path) -> None:
    """A folder of JPEGImages and SegmentationClass, and lists from elsewhere."""
    base = write_voc(tmp_path / "voc")
    for path in (base / "ImageSets" / "Segmentation").iterdir():
        path.unlink()
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png"
    lists = {
        "labeled_list": str(write_lines(tmp_path / "l.txt", [line.format(n) for n in TRAIN[:2]])),
        "unlabeled_list": str(write_lines(tmp_path / "u.txt", [line.format(n) for n in TRAIN[2:]])),
        "val_list": str(write_lines(tmp_path / "v.txt", VAL)),
    }
    splits = split(base, **lists)
    assert (splits.labeled, splits.unlabeled, splits.val) == (
        tuple(TRAIN[:2]),
        tuple(TRAIN[2:]),
        tuple(VAL),
    )
    del lists["unlabeled_list"]
    with pytest.raises(DataError, match=r"train\.txt: no such file"):
        split(base, **lists)


@pytest.mark.parametrize(
    "form",
    [
        "leftImg8bit/train/{city}/{id}_leftImg8bit.png "
        "gtFine/train/{city}/{id}_gtFine_labelIds.png",
        "/leftImg8bit/train/{city}/{id}_leftImg8bit.png "
        "/gtFine/train/{city}/{id}_gtFine_labelTrainIds.png",
        "leftImg8bit/train/{city}/{id}_leftImg8bit.png",
        "train/{city}/{id}_leftImg8bit.png",
        "{city}/{id}_leftImg8bit.png",
        "{city}/{id}_leftImg8bit",
        "train/{city}/{id}",
        "{city}/{id}",
        "{id}_leftImg8bit.png",
        "{id}_leftImg8bit.png {id}_gtFine_labelIds.png",
        "{id}_leftImg8bit",
        "{id}",
    ],
)
def test_forms_of_cityscapes(tmp_path: Path, form: str) -> None:
    write_cityscapes(tmp_path)
    chosen = [("aachen", city_ids("aachen", 2)[1]), ("bochum", city_ids("bochum", 1)[0])]
    write_lines(tmp_path / "l.txt", [form.format(city=city, id=id_) for city, id_ in chosen])
    dataset = scanned(tmp_path, labeled_list="l.txt")
    assert dataset.labeled == tuple(id_ for _, id_ in chosen)
    masks = {item.id: item.mask for item in dataset.train}
    for city, id_ in chosen:
        assert masks[id_] == tmp_path / f"gtFine/train/{city}/{id_}_gtFine_labelIds.png"


@pytest.mark.parametrize(
    "line",
    [
        "bochum/aachen_000001_000019",
        "bochum/aachen_000001_000019_leftImg8bit.png",
        "val/aachen/aachen_000001_000019",
        "aachen_000001_000019.png",
        "aachen_000001_000019_leftImg8bit.jpg",
        "aachen_000001_000019_leftImg8bit_leftImg8bit",
        "aachen_000001_000019_gtFine_labelIds.png",
    ],
)
def test_what_is_no_image_of_cityscapes(tmp_path: Path, line: str) -> None:
    write_cityscapes(tmp_path)
    write_lines(tmp_path / "l.txt", [line])
    assert f"(line 1: {line}), which are not in the data" in str(
        refused(tmp_path, labeled_list="l.txt")
    )


def test_forms_of_the_folder_layout(make_data: MakeData) -> None:
    folder = make_data(labeled=4, unlabeled=2, val=2)
    for form in ("{}", "{}.png", "train/images/{0}.png train/masks/{0}.png", "images/{}.png"):
        names = ["train_0003", "train_0001"]
        write_lines(folder / "l.txt", [form.format(name) for name in names])
        splits = split(folder, labeled_list="l.txt")
        assert splits.labeled == ("train_0001", "train_0003")
        assert splits.unlabeled == ("train_0000", "train_0002", "train_0004", "train_0005")
        assert splits.val == ("val_0000", "val_0001")


def test_names_with_spaces(make_data: MakeData) -> None:
    folder = make_data(labeled=2, unlabeled=1, val=1)
    for kind in ("images", "masks"):
        (folder / f"train/{kind}/train_0000.png").rename(folder / f"train/{kind}/my cat 1.png")
    for line in (
        "my cat 1",
        "my cat 1.png",
        "train/images/my cat 1.png",
        "train/images/my cat 1.png\ttrain/masks/my cat 1.png",
    ):
        write_lines(folder / "l.txt", [line])
        assert split(folder, labeled_list="l.txt").labeled == ("my cat 1",)


# ---------------------------------------------------------------- what lists choose


def test_an_unlabeled_list_and_its_masks_are_not_looked_at(voc: Path) -> None:
    write_lines(voc / "l.txt", TRAIN[:2])
    lines = [f"JPEGImages/{name}.jpg nowhere/{name}.png" for name in (*OTHERS, TRAIN[3])]
    write_lines(voc / "u.txt", lines)
    dataset = scanned(voc, labeled_list="l.txt", unlabeled_list="u.txt")
    splits = make_splits(dataset, configured())
    assert splits.unlabeled == (TRAIN[3], *OTHERS)
    assert all(item.mask is None for item in items_of(dataset, splits).unlabeled)


def test_images_of_cityscapes_without_labels_are_used_if_a_list_names_them(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    (tmp_path / "leftImg8bit/train/ulm").rename(tmp_path / "leftImg8bit/test")
    assert split_names(tmp_path) == []
    write_lines(tmp_path / "u.txt", [f"leftImg8bit/test/{i}_leftImg8bit.png" for i in ULM])
    assert split_names(tmp_path, unlabeled_list="u.txt") == ULM


ULM = city_ids("ulm", 2)


def split_names(root: Path, **data: object) -> list[str]:
    """Unlabeled ids, without asking whether there are any."""
    config = config_from_dict({"data": data, "train": {"supervised_only": True}}, source="test")
    return list(make_splits(scan_dataset(root, config.data), config).unlabeled)


def test_an_unlabeled_list_alone_leaves_the_rest_labeled(voc: Path) -> None:
    write_lines(voc / "u.txt", [*TRAIN[1:], *OTHERS])
    splits = split(voc, unlabeled_list="u.txt")
    assert splits.labeled == (TRAIN[0], *AUGMENTED)
    assert splits.unlabeled == (*TRAIN[1:], *OTHERS)
    assert len(split(voc, unlabeled_list="u.txt", labeled_ratio=0.5).labeled) == 3


def test_a_val_list_takes_from_training(voc: Path) -> None:
    write_lines(voc / "v.txt", TRAIN[:2])
    splits = split(voc, val_list="v.txt", labeled_ratio=0.5)
    assert splits.val == tuple(TRAIN[:2])
    assert {*splits.labeled, *splits.unlabeled} == {*TRAIN[2:], *AUGMENTED}


def test_a_val_list_of_the_folder_layout(make_data: MakeData) -> None:
    folder = make_data(labeled=6, unlabeled=2, val=2)
    write_lines(folder / "v.txt", ["val_0001", "train_0002"])
    splits = split(folder, val_list="v.txt")
    assert splits.val == ("train_0002", "val_0001")
    assert "train_0002" not in {*splits.labeled, *splits.unlabeled}
    items = items_of(scanned(folder, val_list="v.txt"), splits)
    assert [item.mask is not None for item in items.val] == [True, True]


def test_without_validation_images_some_of_the_list_are_held_out(make_data: MakeData) -> None:
    folder = make_data(labeled=20, unlabeled=2, val=0)
    names = [f"train_{index:04d}" for index in range(10)]
    write_lines(folder / "l.txt", names)
    dataset = scanned(folder, labeled_list="l.txt")
    assert "some of data.labeled_list are held out" in dataset.warnings[0]
    splits = make_splits(dataset, configured())
    assert {*splits.labeled, *splits.val} == set(names)
    assert splits.val
    assert not {*splits.val} & {*splits.labeled, *splits.unlabeled}


def test_a_list_from_another_place(voc: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "else where" / "l.txt", TRAIN[:1])
    assert split(voc, labeled_list=str(path)).labeled == (TRAIN[0],)
    assert split(voc, labeled_list=path.as_uri().replace("%20", " ")).labeled == (TRAIN[0],)


def test_an_image_that_comes_twice_counts_once(voc: Path) -> None:
    write_lines(voc / "l.txt", [TRAIN[0], TRAIN[1], TRAIN[0]])
    dataset = scanned(voc, labeled_list="l.txt")
    assert dataset.labeled == tuple(TRAIN[:2])
    assert dataset.warnings == (
        f"{voc / 'l.txt'}: names 1 of 3 images (line 3: {TRAIN[0]}) a second time",
    )


def test_a_run_goes_on_with_the_same_list_only(voc: Path) -> None:
    write_lines(voc / "l.txt", TRAIN[:3])
    before = split(voc, labeled_list="l.txt")
    check_same(Splits.from_json(before.to_json()), split(voc, labeled_list="l.txt"))
    write_lines(voc / "l.txt", TRAIN[1:4])
    with pytest.raises(ConfigError, match=r"labeled \+1 -1 \(\+2007_000036, -2007_000027"):
        check_same(before, split(voc, labeled_list="l.txt"))


# ---------------------------------------------------------------- what is refused


def refused(root: Path, **data: object) -> DataError:
    with pytest.raises(DataError) as caught:
        split(root, **data)
    return caught.value


def test_names_that_are_not_there_are_counted(voc: Path) -> None:
    path = write_lines(voc / "l.txt", [TRAIN[0], "2007_000028", "", "x", "y", "z"])
    error = refused(voc, labeled_list="l.txt")
    assert error.message == (
        f"{path}: names 4 of 5 images (line 2: 2007_000028, line 4: x, line 5: y, ...), which are "
        "not in the data"
    )
    assert "did you mean 2007_0000" in error.mend


@pytest.mark.parametrize("end", ["", " /home/me/VOC2012/SegmentationClass/{0}.png"])
def test_paths_of_another_machine(voc: Path, end: str) -> None:
    line = "/home/me/VOC2012/JPEGImages/{0}.jpg" + end
    write_lines(voc / "l.txt", [line.format(name) for name in TRAIN])
    error = refused(voc, labeled_list="l.txt")
    assert "names 6 of 6 images (line 1: /home/me/VOC2012/JPEGImages/" in error.message
    assert error.mend == (
        f"JPEGImages/{TRAIN[0]}.jpg is there: take /home/me/VOC2012/ out of the lines"
    )


def test_a_mask_that_is_not_there(voc: Path) -> None:
    masks = [voc / "SegmentationClass" / f"{name}.png" for name in TRAIN[:2]]
    for mask in masks:
        mask.unlink()
        (voc / "SegmentationClassAug" / mask.name).unlink()
    pairs = [f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in TRAIN[:3]]
    write_lines(voc / "l.txt", pairs)
    error = refused(voc, labeled_list="l.txt")
    first = f"line 1: SegmentationClass/{TRAIN[0]}.png, line 2: "
    assert f"the masks that it names for 2 of 3 images ({first}" in error.message
    assert f" are missing; looked for {masks[0]}, " in error.message
    assert "did you mean" not in error.mend
    assert "add the masks" in error.mend


def test_a_mask_of_another_place_is_named(voc: Path) -> None:
    write_lines(voc / "l.txt", [f"JPEGImages/{TRAIN[0]}.jpg Masks/nope.png"])
    error = refused(voc, labeled_list="l.txt")
    assert "for 1 of 1 images (line 1: Masks/nope.png) are missing; looked for " in error.message
    assert f"there is {voc / 'SegmentationClassAug' / TRAIN[0]}.png: name it" in error.mend


def test_masks_are_not_looked_for_in_the_folder_one_stands_in(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "Mine").mkdir(parents=True)
    (tmp_path / "elsewhere" / "Mine" / "nope.png").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_lines(voc / "l.txt", [f"JPEGImages/{TRAIN[0]}.jpg Mine/nope.png"])
    assert " are missing; " in refused(voc, labeled_list="l.txt").message


def test_a_mask_of_another_image_of_cityscapes(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    one, other = city_ids("aachen", 2)
    line = f"{one}_leftImg8bit.png gtFine/train/aachen/{other}_gtFine_labelIds.png"
    write_lines(tmp_path / "l.txt", [f"aachen/{line}"])
    error = refused(tmp_path, labeled_list="l.txt")
    assert "names masks of other images for 1 of 1 images" in error.message
    assert one in error.mend


def test_a_mask_of_cityscapes_that_is_not_there(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    name = city_ids("ulm", 1)[0]
    mask = f"gtFine/train/ulm/{name}_gtFine_labelIds.png"
    write_lines(tmp_path / "l.txt", [f"leftImg8bit/train/ulm/{name}_leftImg8bit.png {mask}"])
    error = refused(tmp_path, labeled_list="l.txt")
    assert f"names for 1 of 1 images (line 1: {mask}) are missing; looked for " in error.message
    assert str(tmp_path / mask) in error.message


def test_an_image_without_a_mask_cannot_be_labeled(voc: Path) -> None:
    write_lines(voc / "l.txt", [TRAIN[0], OTHERS[1]])
    error = refused(voc, labeled_list="l.txt")
    assert f"of 1 of 2 images (line 2: {OTHERS[1]}) there is no mask" in error.message


def test_masks_of_other_images_are_told_of(voc: Path) -> None:
    first, second, third = TRAIN[:3]
    pairs = [
        f"JPEGImages/{first}.jpg SegmentationClass/{second}.png",
        f"JPEGImages/{third}.jpg SegmentationClass/{third}.png",
    ]
    path = write_lines(voc / "wrong.txt", pairs)
    (warning,) = scanned(voc, labeled_list=str(path)).warnings
    assert "pairs 1 of 2 images with a mask of another name" in warning


def test_a_permutation_that_leaves_nothing_says_so(voc: Path) -> None:
    numbers = write_lines(voc / "order.txt", [str(number) for number in range(10)])
    with pytest.raises(DataError, match=r"labeled_ratio 0\.05: of the 10 images") as caught:
        scanned(voc, permutation=str(numbers), labeled_ratio=0.05)
    assert "--set data.labeled_ratio=0.1" in caught.value.mend


def test_a_mask_before_its_image_is_named(voc: Path, make_data: MakeData) -> None:
    line = "SegmentationClassAug/{0}.png JPEGImages/{0}.jpg"
    write_lines(voc / "swapped.txt", [line.format(name) for name in TRAIN])
    with pytest.raises(DataError, match="names 6 of 6 images") as caught:
        scanned(voc, labeled_list="swapped.txt")
    assert caught.value.mend.endswith("swap the two")
    data = make_data(labeled=2)
    write_lines(data / "swapped.txt", ["masks/train_0000.png images/train_0000.png"])
    with pytest.raises(DataError) as caught:
        scanned(data, labeled_list="swapped.txt")
    assert caught.value.mend.endswith("swap the two")


@pytest.mark.parametrize(
    "line", ["JPEGImages\\{0}.jpg", "JPEGImages\\{0}.jpg SegmentationClassAug\\{0}.png", "x\\{0}"]
)
def test_paths_of_windows_are_named(voc: Path, line: str) -> None:
    write_lines(voc / "paths.txt", [line.format(name) for name in TRAIN])
    with pytest.raises(DataError, match="names 6 of 6 images") as caught:
        scanned(voc, labeled_list="paths.txt")
    assert caught.value.mend == "write paths with / between folders, not \\"


@pytest.mark.parametrize("between", [",", ", "])
def test_commas_are_named(voc: Path, between: str) -> None:
    pairs = [f"JPEGImages/{id_}.jpg{between}SegmentationClass/{id_}.png" for id_ in voc_ids(2)]
    with pytest.raises(DataError) as caught:
        scanned(voc, labeled_list=str(write_lines(voc / "few.csv", pairs)))
    assert "no commas" in caught.value.mend


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_lists_of_windows(voc: Path, encoding: str) -> None:
    path = voc / "few.txt"
    path.write_bytes("\r\n".join(voc_ids(2)).encode(encoding))
    assert scanned(voc, labeled_list=str(path)).labeled == tuple(voc_ids(2))


def test_lines_of_two_forms(voc: Path) -> None:
    path = write_lines(voc / "l.txt", [TRAIN[0], "", f"{TRAIN[1]}.jpg"])
    error = refused(voc, labeled_list="l.txt")
    assert error.message == f"{path}, line 3: '{TRAIN[1]}.jpg' is an image, line 1 is an id"


@pytest.mark.parametrize("line", [f"{TRAIN[0]} -1", "a b c", f"JPEGImages/{TRAIN[0]}.jpg 7"])
def test_a_line_of_no_known_form(voc: Path, line: str) -> None:
    path = write_lines(voc / "l.txt", [line])
    error = refused(voc, labeled_list="l.txt")
    assert error.message.startswith(f"{path}, line 1: {line!r} is neither an id, nor an image, nor")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "names no image"),
        (b"\n \n", "names no image"),
        (pickle.dumps([1, 2]), "cannot be read as text"),
        (b"3\n1\n2\n", "holds numbers and no names"),
    ],
)
def test_files_that_are_no_list(voc: Path, content: bytes, said: str) -> None:
    (voc / "l.txt").write_bytes(content)
    error = refused(voc, labeled_list="l.txt")
    assert f"{voc / 'l.txt'}: {said}" in error.message
    assert error.mend


lines_of_text = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from([*TRAIN, f"{TRAIN[0]}.jpg", f"{TRAIN[0]}.jpg {'x' * 5000}.png"]),
)


@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(lines=st.lists(lines_of_text, max_size=5))
def test_any_text_is_read_or_refused_in_words(voc: Path, lines: list[str]) -> None:
    (voc / "l.txt").write_text("\n".join(lines), encoding="utf-8")
    try:
        dataset = scanned(voc, labeled_list="l.txt")
    except DataError:
        return
    assert dataset.labeled
    assert set(dataset.labeled) <= set(TRAIN)


@pytest.mark.parametrize("key", ["labeled_list", "unlabeled_list", "val_list", "permutation"])
def test_a_list_that_is_not_there(voc: Path, key: str) -> None:
    error = refused(voc, **{key: "lists/nope.txt"})
    assert error.message == f"{voc}/lists/nope.txt: no such file, which data.{key} names"
    for path in ("/nowhere/nope.txt", "file:///nowhere/nope.txt"):
        with pytest.raises(ConfigError, match=f"data.{key} {path}: no such file") as caught:
            split(voc, **{key: path})
        assert "relative to the data folder" in caught.value.mend
    with pytest.raises(ConfigError, match=r"\.\./nope\.txt: leads out of the data folder"):
        split(voc, **{key: "../nope.txt"})


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "val", "said"),
    [
        ([TRAIN[0], VAL[1]], None, None, "data.labeled_list: 1 of its images are validation"),
        ([TRAIN[0]], None, [TRAIN[0]], "data.labeled_list: 1 of its images are validation"),
        ([TRAIN[0]], [VAL[0], VAL[1]], None, "data.unlabeled_list: 2 of its images are validation"),
        ([TRAIN[0]], [TRAIN[0]], None, "data.labeled_list: 1 of its images are unlabeled"),
    ],
)
def test_an_image_is_in_one_part_only(
    voc: Path,
    labeled: list[str],
    unlabeled: list[str] | None,
    val: list[str] | None,
    said: str,
) -> None:
    data: dict[str, object] = {}
    for key, names in (("labeled", labeled), ("unlabeled", unlabeled), ("val", val)):
        if names is not None:
            write_lines(voc / f"{key}.txt", names)
            data[f"{key}_list"] = f"{key}.txt"
    error = refused(voc, **data)
    assert said in error.message
    assert "images at the same time (first: " in error.message


def test_a_validation_image_of_the_folder_layout_is_no_training_image(make_data: MakeData) -> None:
    folder = make_data(labeled=4, unlabeled=2, val=2)
    write_lines(folder / "l.txt", ["train_0000", "val_0000"])
    assert "names 1 of 2 images (line 2: val_0000)" in str(refused(folder, labeled_list="l.txt"))


def test_fewer_than_a_batch_in_a_list(voc: Path) -> None:
    write_lines(voc / "l.txt", TRAIN[:2])
    config = config_from_dict({"data": {"labeled_list": "l.txt"}}, source="test")
    with pytest.raises(DataError, match="only 2 labeled training images") as caught:
        make_splits(scan_dataset(voc, config.data), config)
    assert "name more images in data.labeled_list" in caught.value.mend


def test_a_ratio_beside_a_list_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError) as caught:
        configured(labeled_list="l.txt", labeled_ratio=0.125)
    assert caught.value.message == (
        "test: data.labeled_ratio: is 0.125, but data.labeled_list says already which images are "
        "labeled, all of them; leave the ratio out, or give the data.permutation that chooses "
        "among the list"
    )
    configured(labeled_list="l.txt", labeled_ratio=0.125, permutation="p.pkl")
    with pytest.raises(ConfigError, match=r"data\.labeled_list: string should have at least 1"):
        configured(labeled_list="")


# ---------------------------------------------------------------- permutations


def saved_as(folder: Path, form: str, numbers: list[int]) -> str:
    """A permutation in one of the forms in use; returns the file's name."""
    array = np.array(numbers)
    path = folder / f"split.{form.partition(' ')[0]}"
    if form == "txt":
        path.write_text("\n".join(map(str, numbers)))
    elif form == "txt row":
        path.write_text(" ".join(map(str, numbers)) + " \n")
    elif form.startswith("npy"):
        np.save(path, array.astype(np.int32))
    elif form.startswith("pkl list"):
        path.write_bytes(pickle.dumps(numbers, protocol=int(form[-1])))
    elif form.startswith("pkl scalars"):
        path.write_bytes(pickle.dumps(list(array), protocol=int(form[-1])))
    else:
        kind = {"i": np.int64, "u": np.uint16, "b": ">i4"}[form[-2]]
        path.write_bytes(pickle.dumps(array.astype(kind), protocol=int(form[-1])))
    return path.name


FORMS = [
    *("txt", "txt row", "npy"),
    *(f"pkl list {protocol}" for protocol in range(6)),
    *(f"pkl scalars {protocol}" for protocol in range(6)),
    *(f"pkl array {kind}{protocol}" for kind in "iub" for protocol in range(6)),
]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_permutation(voc: Path, form: str) -> None:
    """The list of VOC is counted in its own order, which is not that of the names."""
    order = [*TRAIN[::-1], *AUGMENTED]
    numbers = [7, 0, 9, 3, 1, 2, 8, 4, 6, 5]
    name = saved_as(voc, form, numbers)
    splits = split(voc, permutation=name, labeled_ratio=0.39)  # 3.9, rounded down
    assert splits.labeled == tuple(sorted(order[number] for number in numbers[:3]))
    assert splits.unlabeled == tuple(sorted(order[number] for number in numbers[3:]))
    assert splits.val == tuple(VAL)


PICKLE_OF_NUMPY_1 = (
    "gAJjbnVtcHkuY29yZS5tdWx0aWFycmF5Cl9yZWNvbnN0cnVjdApxAGNudW1weQpuZGFycmF5CnEBSwCFcQJVAWKHcQNS"
    "cQQoSwFLA4VxBWNudW1weQpkdHlwZQpxBlUCaThLAEsBh3EHUnEIKEsDVQE8Tk5OSv////9K/////0sAdHEJYolVGAIA"
    "AAAAAAAAAAAAAAAAAAABAAAAAAAAAHEKdHELYi4="
)
"""array([2, 0, 1]) as Python 2 wrote it: bytes as text, and numpy.core."""


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(base64.b64decode(PICKLE_OF_NUMPY_1))
    assert read_permutation(path, called="a", count=3) == [2, 0, 1]


def test_the_counts_of_the_reference() -> None:
    """1/8 of VOC's 10,582 and of Cityscapes' 2,975: rounded down, as its split files were cut."""
    assert (int(0.125 * 10_582), int(0.125 * 2_975)) == (1322, 371)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(40)), st.sampled_from(["pkl", "npy", "txt"]))
def test_any_permutation_is_read_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], ending: str
) -> None:
    path = tmp_path_factory.mktemp("p") / f"p.{ending}"
    if ending == "txt":
        path.write_text(" ".join(map(str, numbers)))
    elif ending == "npy":
        np.save(path, np.array(numbers))
    else:
        path.write_bytes(pickle.dumps(np.array(numbers)))
    assert read_permutation(path, called="p", count=40) == list(numbers)


class Evil:
    """Unpickled the usual way, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("wrapped", ["alone", "in a list", "in an array"])
def test_a_pickle_is_never_obeyed(tmp_path: Path, wrapped: str) -> None:
    mark = tmp_path / "mark"
    evil = Evil(mark)
    thing: object = {"alone": evil, "in a list": [1, evil]}.get(wrapped)
    if thing is None:
        thing = np.array([evil, 1], dtype=object)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(thing))
    with pytest.raises(DataError, match=r"a: cannot be read as a permutation .*it names .*system"):
        read_permutation(path, called="a", count=2)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # it would have


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({"a": 1}), "it holds neither a list of whole numbers"),
        (pickle.dumps([0, 1.5, 2]), "it holds neither a list of whole numbers"),
        (pickle.dumps([True, False]), "it holds neither a list of whole numbers"),
        (pickle.dumps(np.arange(3.0)), "an array of type 'f8'"),
        (pickle.dumps(np.array(["a", "b"])), "an array of type 'U1'"),
        (pickle.dumps(np.array([1, None, "x"], dtype=object)), "an array of type 'O8'"),
        (pickle.dumps(random.Random), "it names random.Random"),
        (pickle.dumps(np.arange(3))[:-20], "cannot be read"),
        (b"", "cannot be read"),
        (b"\x80\x04\x95garbage", "cannot be read"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "it names __builtin__.eval"),
    ],
)
def test_a_pickle_of_anything_else(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_permutation(path, called="a", count=3)
    assert caught.value.mend


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 200), st.sampled_from(["pkl", "npy", "txt"]))
def test_a_damaged_file_is_an_error_that_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int, ending: str
) -> None:
    path = tmp_path_factory.mktemp("p") / f"p.{ending}"
    if ending == "npy":
        np.save(path, np.arange(12)[::-1])
        good = path.read_bytes()
    else:
        good = (
            pickle.dumps(np.arange(12)[::-1]) if ending == "pkl" else b"11 10 9 8 7 6 5 4 3 2 1 0"
        )
    path.write_bytes(good[:place] + noise + good[place + len(noise) :])
    try:
        found = read_permutation(path, called="p", count=12)
    except DataError:
        return
    assert sorted(found) == list(range(12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 1 2 2", "is no permutation of 0..3: numbers are missing or come twice"),
        ("1 2 3 4", "is no permutation of 0..3"),
        ("-1 0 1 2", "is no permutation of 0..3"),
        ("0 1 2", "holds 3 numbers, the training list 4 images"),
        ("0 1 x 2", "cannot be read as a permutation"),
        ("0 1 2.0 3", "cannot be read as a permutation"),
        ("", "holds 0 numbers, the training list 4 images"),
        (f"0 1 2 {10**40}", "type object"),
    ],
)
def test_numbers_that_are_no_permutation(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_permutation(path, called="a", count=4)


def test_an_npy_of_objects_or_of_two_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([1, None], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as a permutation"):
        read_permutation(path, called="a", count=2)
    np.save(path, np.arange(4).reshape(2, 2))
    with pytest.raises(DataError, match="an array of 2 dimensions"):
        read_permutation(path, called="a", count=4)


def test_nothing_says_what_the_numbers_of_cityscapes_count(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    saved_as(tmp_path, "txt", [3, 1, 0, 2])
    error = refused(tmp_path, permutation="split.txt", labeled_ratio=0.5)
    assert "that of somebody's file system" in error.message
    assert "data.labeled_list" in error.mend
    order = [*city_ids("bochum", 2), *city_ids("aachen", 2)]
    write_lines(tmp_path / "order.txt", order)
    data = {"permutation": "split.txt", "labeled_list": "order.txt", "labeled_ratio": 0.5}
    splits = split(tmp_path, **data)
    assert splits.labeled == tuple(sorted([order[3], order[1]]))
    assert set(splits.unlabeled) == {
        *city_ids("aachen", 3),
        *city_ids("bochum", 3),
        *city_ids("ulm", 2),
    } - set(splits.labeled)


def test_nor_those_of_a_folder_or_of_masks_without_a_list(
    make_data: MakeData, tmp_path: Path
) -> None:
    folder = make_data(labeled=4)
    saved_as(folder, "txt", [3, 1, 0, 2])
    assert "no order but the alphabet's" in str(refused(folder, permutation="split.txt"))
    voc = write_voc(tmp_path / "voc", augmented=4, train_aug=False)
    saved_as(voc, "txt", list(range(10)))
    assert "there is no train_aug.txt" in str(refused(voc, permutation="split.txt"))


def test_a_permutation_of_images_without_masks(voc: Path) -> None:
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        (voc / folder / f"{TRAIN[5]}.png").unlink()  # the first of train_aug.txt
    saved_as(voc, "txt", list(range(10)))
    error = refused(voc, permutation="split.txt", labeled_ratio=0.5)
    assert "of 1 of 5 labeled images there is no mask" in error.message


def test_a_ratio_of_one_leaves_nothing_unlabeled(voc: Path) -> None:
    saved_as(voc, "txt", list(range(10)))
    assert "every training image is labeled" in str(refused(voc, permutation="split.txt"))
