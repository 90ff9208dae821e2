"""Data as their makers hand them out: what is found in each layout, and what is refused and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from job.config import DataConfig, config_from_dict
from job.data.checks import check_data, inspect
from job.data.classes import CITYSCAPES, CITYSCAPES_IDS, CONTEXT, VOC, voc_palette
from job.data.dataset import IGNORE, UNKNOWN, Dataset, DatasetInfo
from job.data.images import read_labels
from job.data.layouts import detect
from job.data.names import SCORING, TESTING, Names
from job.data.scan import scan_dataset
from job.data.splits import items_of, make_splits
from job.errors import DataError
from tests.conftest import MakeData, draw_scene, write_data
from tests.layouts import (
    CITY_TRAIN_IDS,
    SIZE,
    WRITERS,
    city_ids,
    translated,
    voc_ids,
    write_cityscapes,
    write_context,
    write_lines,
    write_voc,
)


def ids(items: object) -> list[str]:
    return [item.id for item in items]  # type: ignore[attr-defined]


def masked(dataset: Dataset) -> list[str]:
    return [item.id for item in dataset.train if item.mask is not None]


# ---------------------------------------------------------------- classes


CITYSCAPES_TABLE = """
    0 unlabeled 255; 1 ego vehicle 255; 2 rectification border 255; 3 out of roi 255; 4 static 255;
    5 dynamic 255; 6 ground 255; 7 road 0; 8 sidewalk 1; 9 parking 255; 10 rail track 255;
    11 building 2; 12 wall 3; 13 fence 4; 14 guard rail 255; 15 bridge 255; 16 tunnel 255;
    17 pole 5; 18 polegroup 255; 19 traffic light 6; 20 traffic sign 7; 21 vegetation 8;
    22 terrain 9; 23 sky 10; 24 person 11; 25 rider 12; 26 car 13; 27 truck 14; 28 bus 15;
    29 caravan 255; 30 trailer 255; 31 train 16; 32 motorcycle 17; 33 bicycle 18
"""
"""Id, name and trainId of each label. Source: the table in cityscapesScripts, helpers/labels.py."""


def test_ids_of_cityscapes_become_its_train_ids() -> None:
    rows = [row.split() for row in CITYSCAPES_TABLE.replace("\n", " ").split(";")]
    assert len(rows) == 34
    for number, *name, train_id in rows:
        meaning = int(CITYSCAPES_IDS.meanings[int(number)])
        assert meaning == int(train_id), number
        if meaning != IGNORE:
            assert CITYSCAPES_IDS.classes[meaning] == " ".join(name)
    assert CITYSCAPES_IDS.meanings[255] == IGNORE  # the -1 of a license plate in 8 bits
    assert (CITYSCAPES_IDS.meanings[34:255] == UNKNOWN).all()
    assert CITYSCAPES.classes == CITYSCAPES_IDS.classes
    assert CITYSCAPES.palette[13] == (0, 0, 142)


def test_train_ids_are_the_classes() -> None:
    assert CITYSCAPES.meanings[:19].tolist() == list(range(19))
    assert CITYSCAPES.meanings[255] == IGNORE
    assert (CITYSCAPES.meanings[19:255] == UNKNOWN).all()


def test_the_palette_of_voc() -> None:
    """The first ones, and one of which the third round of bits counts, by hand."""
    assert voc_palette(9) == (
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
    )
    assert voc_palette(65)[64] == (32, 0, 0)
    assert VOC.palette[15] == (192, 128, 128)  # person
    assert VOC.palette[20] == (0, 64, 128)  # tvmonitor


def test_class_counts_and_names() -> None:
    assert (len(VOC.classes), VOC.classes[1], VOC.classes[15], VOC.classes[20]) == (
        21,
        "aeroplane",
        "person",
        "tvmonitor",
    )
    assert (len(CONTEXT.classes), CONTEXT.classes[0], CONTEXT.classes[37], CONTEXT.classes[59]) == (
        60,
        "background",
        "person",
        "wood",
    )
    assert list(CONTEXT.classes[1:]) == sorted(CONTEXT.classes[1:])  # by name
    assert len(CITYSCAPES.classes) == 19
    for info in (VOC, CONTEXT, CITYSCAPES):
        assert len(set(info.classes)) == len(info.palette) == len(set(info.palette))


def test_a_folders_values_are_its_classes_and_ignore_index_only() -> None:
    info = DatasetInfo(("a", "b"), 200, ((0, 0, 0), (1, 1, 1)))
    assert info.meanings[[0, 1, 200]].tolist() == [0, 1, IGNORE]
    assert (np.delete(info.meanings, [0, 1, 200]) == UNKNOWN).all()
    assert info.lookup[200] == IGNORE
    assert info.lookup[77] == 77  # an unknown value is not hidden


# ---------------------------------------------------------------- VOC


@pytest.mark.parametrize("base", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_voc_without_augmented_masks(tmp_path: Path, base: str) -> None:
    write_voc(tmp_path / base)
    dataset = scan_dataset(tmp_path)
    assert dataset.layout == "voc"
    assert dataset.info == VOC
    assert ids(dataset.train) == masked(dataset) == voc_ids(6)
    assert ids(dataset.val) == voc_ids(4, 2009)
    first = dataset.train[0]
    assert first.image == tmp_path / base / "JPEGImages" / f"{first.id}.jpg"
    assert first.mask == tmp_path / base / "SegmentationClass" / f"{first.id}.png"
    assert dataset.warnings == ()
    labels = read_labels(first.mask, dataset.info)
    assert set(np.unique(labels)) == {0, 7, 15, IGNORE}


@pytest.mark.parametrize("train_aug", [True, False])
def test_augmented_masks_are_for_training_only(tmp_path: Path, train_aug: bool) -> None:
    base = write_voc(tmp_path, augmented=5, train_aug=train_aug)
    dataset = scan_dataset(tmp_path)
    assert ids(dataset.train) == [*voc_ids(6), *voc_ids(5, 2008)]
    assert {item.mask.parent for item in dataset.train if item.mask} == {
        base / "SegmentationClassAug"
    }
    assert {item.mask.parent for item in dataset.val if item.mask} == {base / "SegmentationClass"}


def test_augmented_masks_beside_the_devkit_are_found(tmp_path: Path) -> None:
    base = write_voc(tmp_path / "VOCdevkit" / "VOC2012", augmented=5)
    within = scan_dataset(tmp_path)
    (base / "SegmentationClassAug").rename(tmp_path / "SegmentationClassAug")
    beside = scan_dataset(tmp_path)
    assert [item.id for item in beside.train] == [item.id for item in within.train]
    assert all(item.mask.parent.name == "SegmentationClassAug" for item in beside.train)


def test_where_only_augmented_masks_are_validation_reads_them(tmp_path: Path) -> None:
    base = write_voc(tmp_path, augmented=5)
    shutil.rmtree(base / "SegmentationClass")
    assert {item.mask.parent for item in scan_dataset(tmp_path).val if item.mask} == {
        base / "SegmentationClassAug"
    }


def test_images_that_no_list_names_are_not_trained_on(tmp_path: Path) -> None:
    write_voc(tmp_path, augmented=5, others=3)
    dataset = scan_dataset(tmp_path)
    config = config_from_dict({"data": {"labeled_ratio": 0.5}}, source="test")
    splits = make_splits(dataset, config)
    assert len(splits.labeled) == 6  # 11 / 2, rounded up
    assert len(splits.unlabeled) == 5
    assert not set(splits.unlabeled) & set(splits.val)
    assert not any(id_.startswith("2010") for id_ in splits.unlabeled)


def test_voc_lists_of_pairs_with_leading_slashes(tmp_path: Path) -> None:
    base = write_voc(tmp_path, augmented=2)
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in voc_ids(2, 2008)]
    write_lines(base / "ImageSets" / "Segmentation" / "train_aug.txt", lines)
    assert ids(scan_dataset(tmp_path).train) == voc_ids(2, 2008)


def test_a_list_of_augmented_images_without_their_masks_is_mentioned(tmp_path: Path) -> None:
    base = write_voc(tmp_path)
    write_lines(base / "ImageSets/Segmentation/train_aug.txt", voc_ids(6))
    (warning,) = scan_dataset(tmp_path).warnings
    assert "train_aug.txt is left out, as there is no SegmentationClassAug" in warning


def test_a_training_image_without_a_mask_is_unlabeled(tmp_path: Path) -> None:
    base = write_voc(tmp_path)
    (base / "SegmentationClass" / f"{voc_ids(6)[2]}.png").unlink()
    dataset = scan_dataset(tmp_path)
    assert len(dataset.train) == 6
    assert len(masked(dataset)) == 5
    assert "1 of 6 training images have no mask and count as unlabeled" in dataset.warnings[0]


def test_validation_images_without_masks(tmp_path: Path) -> None:
    base = write_voc(tmp_path)
    names = voc_ids(4, 2009)
    (base / "SegmentationClass" / f"{names[0]}.png").unlink()
    dataset = scan_dataset(tmp_path)
    assert ids(dataset.val) == names[1:]
    assert "1 of 4 validation images have no mask and are left out" in dataset.warnings[0]
    for name in names[1:]:
        (base / "SegmentationClass" / f"{name}.png").unlink()
    with pytest.raises(DataError, match=r"val\.txt: none of its 4 images has a mask"):
        scan_dataset(tmp_path)


def test_validation_with_augmented_masks_is_not_silent(tmp_path: Path) -> None:
    base = write_voc(tmp_path, augmented=2)
    assert not scan_dataset(tmp_path).warnings
    (base / "SegmentationClass" / f"{voc_ids(4, 2009)[0]}.png").unlink()
    dataset = scan_dataset(tmp_path)
    assert len(dataset.val) == 4
    assert "1 of 4 validation images have their mask in SegmentationClassAug" in " ".join(
        dataset.warnings
    )


@pytest.mark.parametrize("name", ["leftImg8bit_trainvaltest.zip", "VOCtrainval_11-May-2012.tar"])
def test_what_is_still_packed_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"holds {name}, as downloaded") as caught:
        scan_dataset(tmp_path)
    assert "unpack" in caught.value.mend


@pytest.mark.parametrize("name", ["train.txt", "val.txt"])
def test_voc_without_a_list_says_where_it_should_be(tmp_path: Path, name: str) -> None:
    path = write_voc(tmp_path) / "ImageSets" / "Segmentation" / name
    path.unlink()
    with pytest.raises(DataError) as caught:
        scan_dataset(tmp_path)
    assert caught.value.message == f"{path}: no such file"
    assert "data.labeled_list" in caught.value.mend


def test_a_list_that_names_an_absent_image(tmp_path: Path) -> None:
    base = write_voc(tmp_path)
    (base / "JPEGImages" / f"{voc_ids(6)[5]}.jpg").unlink()
    with pytest.raises(DataError) as caught:
        scan_dataset(tmp_path)
    assert "train.txt: names 1 of 6 images (line 1: 2007_000042), which are not in the data" in str(
        caught.value
    )


def test_lists_of_the_layout_that_overlap(tmp_path: Path) -> None:
    base = write_voc(tmp_path)
    lists = base / "ImageSets/Segmentation"
    shutil.copy(lists / "trainval.txt", lists / "train.txt")
    with pytest.raises(DataError, match="the training list: 4 of its images are validation images"):
        scan_dataset(tmp_path)


def test_an_augmented_mask_without_its_image(tmp_path: Path) -> None:
    base = write_voc(tmp_path, augmented=2, train_aug=False)
    (base / "JPEGImages" / f"{voc_ids(2, 2008)[0]}.jpg").unlink()
    with pytest.raises(DataError, match="there is no image of that name in JPEGImages; 1 such"):
        scan_dataset(tmp_path)


def test_no_training_mask_at_all(tmp_path: Path) -> None:
    base = write_voc(tmp_path)
    for name in voc_ids(6):
        (base / "SegmentationClass" / f"{name}.png").unlink()
    with pytest.raises(DataError, match="no training image has a mask"):
        make_splits(scan_dataset(tmp_path), config_from_dict({}, source="test"))


# ---------------------------------------------------------------- Cityscapes


@pytest.mark.parametrize("base", [".", "cityscapes"])
def test_cityscapes_by_ids(tmp_path: Path, base: str) -> None:
    root = write_cityscapes(tmp_path / base)
    dataset = scan_dataset(tmp_path)
    assert dataset.layout == "cityscapes"
    assert dataset.info == CITYSCAPES_IDS
    labeled = [*city_ids("aachen", 3), *city_ids("bochum", 3)]
    assert masked(dataset) == labeled
    assert ids(dataset.train) == [*labeled, *city_ids("ulm", 2)]
    assert ids(dataset.val) == city_ids("munster", 4)
    first = dataset.train[0]
    assert first.image == root / f"leftImg8bit/train/aachen/{first.id}_leftImg8bit.png"
    assert first.mask == root / f"gtFine/train/aachen/{first.id}_gtFine_labelIds.png"
    assert dataset.warnings == ()


def test_ids_and_train_ids_give_the_same_labels(tmp_path: Path) -> None:
    by_id = scan_dataset(write_cityscapes(tmp_path / "ids"))
    by_train_id = scan_dataset(write_cityscapes(tmp_path / "train", train_ids=True))
    assert by_train_id.info == CITYSCAPES
    rng = np.random.default_rng(3)
    for one, other in zip(by_id.train[:3], by_train_id.train[:3], strict=True):
        assert one.mask is not None
        assert other.mask is not None
        assert "labelIds" in one.mask.name
        assert "labelTrainIds" in other.mask.name
        labels = read_labels(one.mask, by_id.info)
        np.testing.assert_array_equal(labels, read_labels(other.mask, by_train_id.info))
        _, drawn = draw_scene(rng, *SIZE)
        np.testing.assert_array_equal(labels, translated(drawn, CITY_TRAIN_IDS))


def test_train_ids_alone_will_do(tmp_path: Path) -> None:
    assert scan_dataset(write_cityscapes(tmp_path, train_ids=True, ids=False)).info == CITYSCAPES


def test_where_some_train_ids_are_missing_ids_are_read(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path, train_ids=True)
    next(root.glob("gtFine/train/aachen/*_labelTrainIds.png")).unlink()
    dataset = scan_dataset(root)
    assert dataset.info == CITYSCAPES_IDS
    assert len(masked(dataset)) == 6


def test_masks_of_two_kinds_that_no_kind_covers(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path, train_ids=True)
    (root / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png").unlink()
    (root / "gtFine/train/bochum/bochum_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError) as caught:
        scan_dataset(root)
    assert caught.value.message == (
        f"{root / 'gtFine'}: bochum_000000_000019 has only gtFine_labelTrainIds, "
        "aachen_000001_000019 only gtFine_labelIds"
    )


def test_coarse_images_are_unlabeled(tmp_path: Path) -> None:
    dataset = scan_dataset(write_cityscapes(tmp_path, extra=3))
    unlabeled = [item.id for item in dataset.train if item.mask is None]
    assert unlabeled == [*city_ids("augsburg", 3), *city_ids("ulm", 2)]


def test_a_mask_of_cityscapes_without_its_image_is_mentioned(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    next(root.glob("leftImg8bit/train/aachen/*.png")).unlink()
    assert "1 masks have no image and are left out" in scan_dataset(root).warnings[0]


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("leftImg8bit/train", "leftImg8bit/train: holds no image"),
        ("leftImg8bit/val", "leftImg8bit/val: holds no image"),
        ("gtFine/val", "leftImg8bit/val: none of its 4 images has a mask"),
    ],
)
def test_half_of_cityscapes(tmp_path: Path, gone: str, said: str) -> None:
    root = write_cityscapes(tmp_path)
    shutil.rmtree(root / gone)
    with pytest.raises(DataError, match=said):
        scan_dataset(root)


def test_who_only_measures_needs_no_training_images(tmp_path: Path) -> None:
    cities = write_cityscapes(tmp_path / "cities")
    shutil.rmtree(cities / "leftImg8bit" / "train")
    voc = tmp_path / "voc"
    write_voc(voc)
    (lists,) = voc.rglob("ImageSets/Segmentation")
    (lists / "train.txt").unlink(missing_ok=True)
    for root in (cities, voc):
        with pytest.raises(DataError, match="train"):
            scan_dataset(root)
        dataset = scan_dataset(root, needs_train=False)
        assert dataset.val
        assert not dataset.train


def test_cityscapes_without_any_mask(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path, ids=False)
    with pytest.raises(DataError, match=r"gtFine: holds no mask") as caught:
        scan_dataset(root)
    assert "gtFine_labelIds.png" in caught.value.mend


# ---------------------------------------------------------------- Context


@pytest.mark.parametrize("base", ["VOCdevkit/VOC2010", "VOC2010", "."])
def test_context(tmp_path: Path, base: str) -> None:
    write_context(tmp_path / base)
    # VOC 2010's own masks and lists lie beside them.
    write_voc(tmp_path / base, train=0, val=1)
    dataset = scan_dataset(tmp_path)
    assert dataset.layout == "context"
    assert dataset.info == CONTEXT
    assert ids(dataset.train) == voc_ids(6, 2008)
    assert ids(dataset.val) == voc_ids(4, 2009)
    mask = dataset.train[0].mask
    assert mask is not None
    assert set(np.unique(read_labels(mask, dataset.info))) == {0, 14, 37, IGNORE}


@pytest.mark.parametrize("layout", ["auto", "context"])
def test_context_as_the_detail_api_has_it(tmp_path: Path, layout: str) -> None:
    (tmp_path / "VOC2010" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "VOC2010" / "trainval_merged.json").write_text("{}")
    with pytest.raises(DataError, match="which only the detail API reads") as caught:
        scan_dataset(tmp_path, DataConfig(layout=layout))
    assert "VOC2010/SegmentationClassContext/*.png" in caught.value.mend


# ---------------------------------------------------------------- telling them apart


def test_nothing_known_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(DataError) as caught:
        scan_dataset(tmp_path)
    assert caught.value.message.splitlines() == [
        f"{tmp_path}: is of no known layout",
        "    folder: looked for dataset.yaml and train/images/ in the folder itself; found none",
        "    voc: looked for JPEGImages/ and SegmentationClass/ or SegmentationClassAug/ in the "
        "folder itself or VOC2012/ or VOCdevkit/VOC2012/; found JPEGImages/ only",
        "    cityscapes: looked for leftImg8bit/ and gtFine/ in the folder itself or cityscapes/; "
        "found none",
        "    context: looked for JPEGImages/ and SegmentationClassContext/ in the folder itself or "
        "VOC2010/ or VOCdevkit/VOC2010/; found JPEGImages/ only",
    ]


@pytest.mark.parametrize("layout", ["voc", "cityscapes", "context"])
def test_another_layout_than_was_asked_for(make_data: MakeData, layout: str) -> None:
    with pytest.raises(DataError, match=f"is not of the layout {layout}\n    {layout}: looked for"):
        scan_dataset(make_data(), DataConfig(layout=layout))


def test_the_folder_layout_asked_for_is_not_looked_for(tmp_path: Path) -> None:
    write_voc(tmp_path)
    with pytest.raises(DataError, match=r"dataset\.yaml: not there"):
        scan_dataset(tmp_path, DataConfig(layout="folder"))


def test_two_data_sets_in_one_folder(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit" / "VOC2012")
    write_context(tmp_path / "VOCdevkit" / "VOC2010")
    with pytest.raises(DataError) as caught:
        scan_dataset(tmp_path)
    assert caught.value.message == (
        f"{tmp_path}: holds more than one data set: voc (VOCdevkit/VOC2012/), "
        "context (VOCdevkit/VOC2010/)"
    )
    assert "say which: --set data.layout=voc" in caught.value.mend
    assert scan_dataset(tmp_path, DataConfig(layout="voc")).info == VOC
    assert scan_dataset(tmp_path, DataConfig(layout="context")).info == CONTEXT
    write_voc(tmp_path / "VOC2012")
    with pytest.raises(DataError) as caught:
        scan_dataset(tmp_path, DataConfig(layout="voc"))
    assert caught.value.mend == "give the folder of one of them"


NUMBERS = {"list": "3\n1\n2\n0\n", "pickle": "\x80\x03"}


def spoil(root: Path, how: str) -> DataConfig:
    """Make data of which a scan complains; what it is asked for."""
    if how == "two":
        write_voc(root / "VOCdevkit" / "VOC2012")
        write_context(root / "VOCdevkit" / "VOC2010")
        return DataConfig()
    if how == "cityscapes without val":
        shutil.rmtree(write_cityscapes(root) / "leftImg8bit" / "val")
        return DataConfig()
    if how == "folder without masks in val":
        shutil.rmtree(write_data(root) / "val" / "masks")
        return DataConfig()
    base = write_voc(root)
    lists = base / "ImageSets" / "Segmentation"
    if how in NUMBERS:
        (base / "list.txt").write_text(NUMBERS[how], encoding="latin1")
    elif how == "voc without masks in val":
        for name in voc_ids(4, 2009):
            (base / "SegmentationClass" / f"{name}.png").unlink()
    elif how != "no list":
        (lists / f"{how}.txt").unlink()
    named = how in NUMBERS or how == "no list"
    return DataConfig(val_list="list.txt" if named else None)


@pytest.mark.parametrize("names", [SCORING, TESTING], ids=["evaluate", "bench-recipe"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("two", "{layout}voc"),
        ("cityscapes without val", "{val_list}"),
        ("folder without masks in val", "add val/images"),
        ("voc without masks in val", "{val_list}"),
        ("train", "{val_list}"),
        ("val", "{val_list}"),
        ("list", "an image a line"),
        ("pickle", "an image a line"),
        ("no list", "{val_list}"),
        ("nothing", "check its path"),
    ],
)
def test_advice_names_what_the_command_takes(
    tmp_path: Path, names: Names, how: str, said: str
) -> None:
    data = DataConfig() if how == "nothing" else spoil(tmp_path / "data", how)
    with pytest.raises(DataError) as caught:
        scan_dataset(tmp_path / "data", data, needs_train=how == "train", names=names)
    text = str(caught.value)
    assert said.format(**vars(names)) in text
    for foreign in ("--set", "data.layout", "_list", "data.permutation", "--val-split"):
        assert foreign not in text


def test_warnings_name_no_key_where_there_are_none(tmp_path: Path) -> None:
    lists = write_voc(tmp_path) / "ImageSets" / "Segmentation"
    shutil.copy(lists / "train.txt", lists / "train_aug.txt")
    assert "data.labeled_list" in scan_dataset(tmp_path).warnings[0]
    (warning,) = scan_dataset(tmp_path, names=SCORING).warnings
    assert "train_aug.txt is left out" in warning
    assert "data.labeled_list" not in warning


def test_a_folder_beside_voc_is_ambiguous_too(make_data: MakeData) -> None:
    folder = make_data()
    write_voc(folder)
    with pytest.raises(DataError, match=r"folder \(the folder itself\), voc \(the folder itself\)"):
        scan_dataset(folder)
    assert len(scan_dataset(folder, DataConfig(layout="folder")).train) == 16


def test_voc_2010_with_other_masks_can_be_read_as_voc(tmp_path: Path) -> None:
    write_context(tmp_path)
    write_voc(tmp_path)
    assert scan_dataset(tmp_path).layout == "context"
    assert scan_dataset(tmp_path, DataConfig(layout="voc")).layout == "voc"


def test_telling_a_layout_asks_little() -> None:
    """In a bucket every question is a request."""
    asked: list[str] = []

    def has(path: str) -> bool:
        asked.append(path)
        return path == "train/images/"

    assert detect(has, "auto", called="s3://b/d").layout == "folder"
    assert len(set(asked)) <= 10


# ---------------------------------------------------------------- dataset.yaml


def test_names_and_colours_of_a_layout_can_be_changed(tmp_path: Path) -> None:
    write_voc(tmp_path)
    names = [f"class {index}" for index in range(21)]
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"classes": names, "ignore_index": 254}))
    info = scan_dataset(tmp_path).info
    assert info == DatasetInfo(tuple(names), 254, VOC.palette)
    palette = [[index, index, index] for index in range(21)]
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"palette": palette}))
    info = scan_dataset(tmp_path).info
    assert (info.classes, info.palette[20]) == (VOC.classes, (20, 20, 20))


def test_ids_of_cityscapes_stay_what_they_are(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    names = [f"class {index}" for index in range(19)]
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"classes": names}))
    info = scan_dataset(tmp_path).info
    assert info.meanings.tolist() == CITYSCAPES_IDS.meanings.tolist()
    assert info.classes[13] == "class 13"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"classes": ["a", "b"]}, "has 2 classes, the masks of this layout have 19"),
        ({"clases": []}, "unknown key clases"),
        ({"ignore_index": 26}, "ignore_index 26 is in these masks the class car"),
        ({"palette": [[0, 0, 0]]}, "palette needs 19 colours"),
    ],
)
def test_a_description_that_does_not_fit(tmp_path: Path, content: object, said: str) -> None:
    write_cityscapes(tmp_path)
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=said):
        scan_dataset(tmp_path)


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_is_checked_as_it_trains(tmp_path: Path, layout: str) -> None:
    WRITERS[layout](tmp_path)
    config = config_from_dict({"data": {"labeled_ratio": 0.7}}, source="test")
    dataset = scan_dataset(tmp_path, config.data)
    items = items_of(dataset, make_splits(dataset, config))
    check_data(items, dataset.info)
    report = inspect(dataset, config, uri=str(tmp_path))
    assert report.is_good
    drawn = {"voc": (0, 15, 7), "cityscapes": (0, 13, 11), "context": (0, 37, 14)}[layout]
    balance = report.all_masks
    assert set(np.flatnonzero(balance.pixels)) == set(drawn)
    assert balance.ignored == balance.masks * SIZE[1]  # the border row
    assert balance.pixels.sum() + balance.ignored == balance.masks * SIZE[0] * SIZE[1]


@pytest.mark.parametrize(
    ("layout", "value", "said"),
    [
        ("voc", 21, "the classes are 0..20 and ignore_index 255"),
        ("cityscapes", 34, "the classes are 0..33 and ignore_index 255"),
        ("context", 60, "the classes are 0..59 and ignore_index 255"),
    ],
)
def test_a_label_of_no_class_is_a_problem(
    tmp_path: Path, layout: str, value: int, said: str
) -> None:
    WRITERS[layout](tmp_path)
    config = config_from_dict({"data": {"labeled_ratio": 0.7}}, source="test")
    dataset = scan_dataset(tmp_path)
    items = items_of(dataset, make_splits(dataset, config))
    mask = items.labeled[0].mask
    assert mask is not None
    Image.new("L", SIZE[::-1], value).save(mask)
    with pytest.raises(DataError, match=f"holds the label {value} .*{said}"):
        check_data(items, dataset.info)


def test_a_report_counts_classes_by_name(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    config = config_from_dict({"data": {"labeled_ratio": 0.7}}, source="test")
    report = inspect(scan_dataset(tmp_path), config, uri=str(tmp_path))
    found = json.loads(json.dumps(report.to_dict()))
    shares = {one["name"]: one["all"]["images"] for one in found["classes"]}
    assert shares["road"] == 10
    assert shares["sidewalk"] == 0
