"""Which images are labeled, unlabeled and held out: stable, nested, seeded, and checked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config import Config, config_from_dict
from job.data.dataset import Dataset, DatasetInfo, Item
from job.data.scan import scan_dataset
from job.data.splits import (
    TRAIN_SAMPLE_IMAGES,
    Splits,
    check_same,
    items_of,
    make_splits,
    split_warnings,
)
from job.errors import ConfigError, DataError, ExitCode
from tests.conftest import MakeData

INFO = DatasetInfo(("sky", "road"), 255, ((0, 0, 0), (1, 1, 1)))

names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8),
    min_size=1,
    max_size=60,
    unique=True,
)


def make_dataset(
    labeled: Iterable[str], unlabeled: Iterable[str] = (), val: Iterable[str] = ()
) -> Dataset:
    """A listing as `scan_dataset` makes it, without files: splitting opens none."""

    def item(id_: str, folder: str, *, with_mask: bool) -> Item:
        mask = Path(folder, "masks", f"{id_}.png") if with_mask else None
        return Item(id_, Path(folder, "images", f"{id_}.jpg"), mask)

    train = [item(id_, "train", with_mask=True) for id_ in labeled]
    train += [item(id_, "train", with_mask=False) for id_ in unlabeled]
    return Dataset(
        root=Path("data"),
        info=INFO,
        train=tuple(sorted(train, key=lambda item: item.id)),
        val=tuple(item(id_, "val", with_mask=True) for id_ in sorted(val)),
        warnings=(),
    )


def numbered(count: int, prefix: str = "l") -> list[str]:
    return [f"{prefix}{index:05d}" for index in range(count)]


def configured(
    *, ratio: float = 1.0, val_split: float = 0.2, seed: int = 0, batch_size: int = 1, **train: Any
) -> Config:
    raw = {
        "data": {"labeled_ratio": ratio, "val_split": val_split},
        "train": {"seed": seed, "batch_size": batch_size, **train},
    }
    return config_from_dict(raw, source="test")


# ---------------------------------------------------------------- held out


def test_with_a_val_folder_nothing_of_train_is_held_out() -> None:
    splits = make_splits(make_dataset(numbered(10), ["u"], ["v1", "v2"]), configured())
    assert splits.val == ("v1", "v2")
    assert splits.labeled == tuple(numbered(10))
    assert splits.unlabeled == ("u",)


def test_without_one_about_val_split_of_the_labeled_images_is_held_out() -> None:
    splits = make_splits(make_dataset(numbered(2000), ["u"]), configured(val_split=0.2))
    assert 340 < len(splits.val) < 460
    assert set(splits.val) | set(splits.labeled) == set(numbered(2000))
    assert not set(splits.val) & set(splits.labeled)


def test_held_out_images_are_in_no_other_part() -> None:
    dataset = make_dataset(numbered(100), numbered(50, "u"))
    splits = make_splits(dataset, configured(ratio=0.5, val_split=0.3))
    parts = [splits.labeled, splits.unlabeled, splits.val]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(dataset.train)


@settings(deadline=None)
@given(old=names, new=names, val_split=st.floats(0.05, 0.9))
def test_adding_images_moves_no_old_one_in_or_out_of_validation(
    old: list[str], new: list[str], val_split: float
) -> None:
    """As long as anything is held out by its own hash; else one image must be, whatever it is."""
    anchor = numbered(300, "anchor")  # of 300, some are held out at any ratio
    config = configured(val_split=val_split, supervised_only=True)
    before = make_splits(make_dataset({*anchor, *old}), config)
    after = make_splits(make_dataset({*anchor, *old, *new}), config)
    assert set(before.val) == set(after.val) & {*anchor, *old}


@settings(deadline=None)
@given(count=st.integers(2, 12), val_split=st.floats(0.001, 0.9))
def test_at_least_one_image_is_held_out(count: int, val_split: float) -> None:
    config = configured(val_split=val_split, supervised_only=True)
    try:
        splits = make_splits(make_dataset(numbered(count)), config)
    except DataError:  # everything was held out
        return
    assert len(splits.val) >= 1
    assert len(splits.labeled) == count - len(splits.val)


def test_the_seed_does_not_change_what_is_held_out() -> None:
    dataset = make_dataset(numbered(100), ["u"])
    assert (
        make_splits(dataset, configured(seed=0)).val == make_splits(dataset, configured(seed=9)).val
    )


def test_a_larger_val_split_holds_out_the_same_and_more() -> None:
    dataset = make_dataset(numbered(200), ["u"])
    small = make_splits(dataset, configured(val_split=0.1)).val
    large = make_splits(dataset, configured(val_split=0.4)).val
    assert set(small) < set(large)


def test_splits_do_not_depend_on_the_order_of_the_listing() -> None:
    dataset = make_dataset(numbered(60), numbered(20, "u"))
    turned = dataclasses.replace(dataset, train=dataset.train[::-1])
    config = configured(ratio=0.3)
    ours, theirs = make_splits(dataset, config), make_splits(turned, config)
    assert (ours.labeled, ours.val, ours.train_sample) == (
        theirs.labeled,
        theirs.val,
        theirs.train_sample,
    )
    assert set(ours.unlabeled) == set(theirs.unlabeled)


def test_the_same_ids_are_chosen_on_every_machine_and_by_every_version() -> None:
    """Written down once: if this changes, old runs resume with other data."""
    dataset = make_dataset(numbered(12), ["u"])
    splits = make_splits(dataset, configured(ratio=0.5, val_split=0.2))
    assert splits.val == tuple(f"l{index:05d}" for index in (0, 1, 2, 4, 6, 9, 10))
    assert splits.labeled == ("l00003", "l00005", "l00007")


# ---------------------------------------------------------------- labeled_ratio


@pytest.mark.parametrize(
    ("count", "ratio", "kept"),
    [
        (2975, 1 / 8, 372),  # Cityscapes
        (10582, 1 / 8, 1323),  # PASCAL VOC, augmented
        (10582, 1 / 4, 2646),
        (10582, 1 / 2, 5291),
        (10, 0.01, 1),
        (10, 1.0, 10),
        (300, 1 / 3, 100),
        (30, 0.1, 3),
        (100, 0.07, 7),
        (100, 0.55, 55),
    ],
)
def test_the_labeled_share_is_rounded_up(count: int, ratio: float, kept: int) -> None:
    splits = make_splits(make_dataset(numbered(count), ["u"], ["v"]), configured(ratio=ratio))
    assert len(splits.labeled) == kept
    assert len(splits.unlabeled) == count - kept + 1


@settings(deadline=None)
@given(ids=names, seed=st.integers(0, 2**63 - 1), low=st.floats(0.001, 1), high=st.floats(0.001, 1))
def test_a_smaller_labeled_subset_lies_inside_a_larger_one(
    ids: list[str], seed: int, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    dataset = make_dataset(ids, val=["v"])

    def labeled(ratio: float) -> set[str]:
        config = configured(ratio=ratio, seed=seed, supervised_only=True)
        return set(make_splits(dataset, config).labeled)

    assert labeled(low) <= labeled(high)


def test_an_eighth_lies_inside_a_quarter_inside_a_half() -> None:
    dataset = make_dataset(numbered(400), ["u"], ["v"])
    eighth, quarter, half = (
        set(make_splits(dataset, configured(ratio=ratio, seed=3)).labeled)
        for ratio in (1 / 8, 1 / 4, 1 / 2)
    )
    assert eighth < quarter < half
    assert [len(part) for part in (eighth, quarter, half)] == [50, 100, 200]


def test_another_seed_labels_other_images() -> None:
    dataset = make_dataset(numbered(400), ["u"], ["v"])
    first, second = (
        set(make_splits(dataset, configured(ratio=1 / 4, seed=seed)).labeled) for seed in (0, 1)
    )
    assert 5 < len(first & second) < 60  # 25 by chance


def test_the_labeled_subset_does_not_favour_early_names() -> None:
    ids = numbered(1000)
    labeled = make_splits(make_dataset(ids, ["u"], ["v"]), configured(ratio=0.5)).labeled
    assert 200 < len(set(labeled) & set(ids[:500])) < 300


def test_adding_unlabeled_images_changes_only_the_unlabeled_part() -> None:
    config = configured(ratio=0.25)
    before = make_splits(make_dataset(numbered(80), numbered(10, "u")), config)
    after = make_splits(make_dataset(numbered(80), numbered(20, "u")), config)
    assert dataclasses.replace(after, unlabeled=before.unlabeled) == before
    assert set(before.unlabeled) < set(after.unlabeled)


def test_every_id_of_a_part_is_sorted() -> None:
    dataset = make_dataset(numbered(50), numbered(30, "a"))
    splits = make_splits(dataset, configured(ratio=0.4))
    for part in (splits.labeled, splits.unlabeled, splits.val, splits.train_sample):
        assert list(part) == sorted(part)


# ---------------------------------------------------------------- train_sample


def test_the_training_miou_is_measured_on_at_most_100_labeled_images() -> None:
    splits = make_splits(make_dataset(numbered(400), ["u"], ["v"]), configured())
    assert len(splits.train_sample) == TRAIN_SAMPLE_IMAGES == 100
    assert set(splits.train_sample) < set(splits.labeled)


def test_with_fewer_labeled_images_it_is_measured_on_all() -> None:
    splits = make_splits(make_dataset(numbered(7), ["u"], ["v"]), configured())
    assert splits.train_sample == splits.labeled


# ---------------------------------------------------------------- what is refused


def test_data_without_any_mask_is_refused_with_the_way_to_label() -> None:
    with pytest.raises(DataError, match=r"train/masks: no image has a mask") as caught:
        make_splits(make_dataset([], ["u"]), configured())
    assert "train/masks/NAME.png" in caught.value.mend
    assert caught.value.exit_code == ExitCode.BAD_CONFIG


def test_fewer_labeled_images_than_a_batch_are_refused_with_all_ways_out() -> None:
    with pytest.raises(
        DataError, match="only 3 labeled training images, fewer than the batch of 4"
    ) as caught:
        make_splits(make_dataset(numbered(12), ["u"], ["v"]), configured(ratio=0.25, batch_size=4))
    for way in ("labeled_ratio", "--val-split", "--batch-size of at most 3"):
        assert way in caught.value.mend


def test_exactly_a_batch_of_labeled_images_is_enough() -> None:
    dataset = make_dataset(numbered(4), ["u"], ["v"])
    assert len(make_splits(dataset, configured(batch_size=4)).labeled) == 4


def test_accumulated_batches_may_repeat_labeled_images() -> None:
    dataset = make_dataset(numbered(4), ["u"], ["v"])
    assert len(make_splits(dataset, configured(batch_size=4, accumulate=8)).labeled) == 4


def test_the_mend_never_offers_a_batch_of_none() -> None:
    with pytest.raises(DataError, match="only 0 labeled training images") as caught:
        make_splits(make_dataset(["a"], ["u"]), configured())
    assert "at most 0" not in caught.value.mend


def test_nothing_unlabeled_is_refused_with_all_ways_out() -> None:
    with pytest.raises(DataError, match="every training image is labeled") as caught:
        make_splits(make_dataset(numbered(8), val=["v"]), configured())
    for way in ("without masks", "labeled_ratio", "train.supervised_only=true"):
        assert way in caught.value.mend


def test_held_out_images_do_not_count_as_unlabeled() -> None:
    with pytest.raises(DataError, match="every training image is labeled"):
        make_splits(make_dataset(numbered(50)), configured(val_split=0.5))


def test_training_on_the_labels_alone_needs_nothing_unlabeled() -> None:
    dataset = make_dataset(numbered(8), val=["v"])
    assert make_splits(dataset, configured(supervised_only=True)).unlabeled == ()


def test_masks_set_aside_count_as_unlabeled() -> None:
    splits = make_splits(make_dataset(numbered(8), val=["v"]), configured(ratio=0.5))
    assert len(splits.labeled) == len(splits.unlabeled) == 4


def test_file_names_that_are_not_utf8_are_split_like_others(make_data: MakeData) -> None:
    folder = make_data(labeled=4, unlabeled=2, val=1)
    for sub in ("images", "masks"):
        where = os.fsencode(folder / "train" / sub)
        os.rename(where + b"/train_0000.png", where + b"/caf\xe9.png")
    splits = make_splits(scan_dataset(folder), configured(batch_size=2))
    assert "caf\udce9" in splits.labeled
    assert Splits.from_json(splits.to_json()) == splits


# ---------------------------------------------------------------- items


def test_items_follow_the_ids_in_order(make_data: MakeData) -> None:
    dataset = scan_dataset(make_data(labeled=6, unlabeled=3, val=2))
    splits = make_splits(dataset, configured(ratio=0.5, batch_size=2))
    items = items_of(dataset, splits)
    for part in ("labeled", "unlabeled", "val", "train_sample"):
        assert tuple(item.id for item in getattr(items, part)) == getattr(splits, part)
    for item in (*items.labeled, *items.val, *items.train_sample):
        assert item.mask is not None
        assert item.mask.is_file()


def test_a_mask_that_is_set_aside_is_nowhere_among_the_unlabeled(make_data: MakeData) -> None:
    dataset = scan_dataset(make_data(labeled=8, unlabeled=0, val=2))
    items = items_of(dataset, make_splits(dataset, configured(ratio=0.25, batch_size=2)))
    assert len(items.unlabeled) == 6
    assert all(item.mask is None for item in items.unlabeled)
    assert all(item.image.is_file() for item in items.unlabeled)


def test_held_out_items_come_from_train_and_keep_their_masks(make_data: MakeData) -> None:
    dataset = scan_dataset(make_data(labeled=12, unlabeled=2, val=0))
    items = items_of(dataset, make_splits(dataset, configured(batch_size=2)))
    assert items.val
    for item in items.val:
        assert item.mask is not None
        assert item.image.parent.parent.name == "train"


def test_one_name_in_train_and_val_means_two_images() -> None:
    dataset = make_dataset(["a", "b"], ["u"], ["a"])
    items = items_of(dataset, make_splits(dataset, configured()))
    assert items.val[0].image == Path("val/images/a.jpg")
    assert items.labeled[0].image == Path("train/images/a.jpg")


def test_an_unlabeled_image_named_like_one_of_val_stays_unlabeled() -> None:
    dataset = make_dataset(["a"], ["u", "v"], ["u"])
    assert make_splits(dataset, configured()).unlabeled == ("u", "v")


# ---------------------------------------------------------------- splits.json and resuming

ids = st.lists(st.text(max_size=6), max_size=5, unique=True).map(tuple)
any_splits = st.builds(Splits, labeled=ids, unlabeled=ids, val=ids, train_sample=ids)


@settings(deadline=None)
@given(any_splits)
def test_splits_survive_json(splits: Splits) -> None:
    assert Splits.from_json(splits.to_json()) == splits


def test_the_json_names_every_part() -> None:
    splits = Splits(("a",), ("b",), ("c",), ("a",), ("sky", "road"))
    assert json.loads(splits.to_json()) == {
        "labeled": ["a"],
        "unlabeled": ["b"],
        "val": ["c"],
        "train_sample": ["a"],
        "classes": ["sky", "road"],
    }


@settings(deadline=None)
@given(any_splits)
def test_the_same_splits_may_go_on(splits: Splits) -> None:
    check_same(splits, Splits.from_json(splits.to_json()))


def test_the_order_within_a_part_does_not_matter() -> None:
    check_same(Splits(("a", "b"), (), (), ()), Splits(("b", "a"), (), (), ()))


def test_changed_data_is_refused_naming_part_counts_and_ids() -> None:
    before = Splits(("a", "b"), ("u1",), ("v",), ("a",))
    after = Splits(("a", "c", "d"), ("u1",), (), ("a",))
    with pytest.raises(ConfigError) as caught:
        check_same(before, after)
    error = caught.value
    assert error.exit_code == ExitCode.BAD_CONFIG
    assert "labeled +2 -1 (+c, -b, ...)" in error.message
    assert "val +0 -1 (-v, ...)" in error.message
    assert "unlabeled" not in error.message
    assert "train_sample" not in error.message
    assert "another --run" in error.mend


@settings(deadline=None)
@given(before=any_splits, after=any_splits)
def test_data_is_refused_exactly_when_a_part_has_other_ids(before: Splits, after: Splits) -> None:
    same = all(
        set(ours) == set(theirs)
        for ours, theirs in zip(
            dataclasses.astuple(before), dataclasses.astuple(after), strict=True
        )
    )
    if same:
        check_same(before, after)
    else:
        with pytest.raises(ConfigError):
            check_same(before, after)


def test_an_image_that_got_its_mask_meanwhile_is_noticed(make_data: MakeData) -> None:
    folder = make_data(labeled=4, unlabeled=2, val=1)
    config = configured(batch_size=2)
    before = make_splits(scan_dataset(folder), config)
    masks = folder / "train" / "masks"
    (masks / "train_0004.png").write_bytes((masks / "train_0000.png").read_bytes())
    with pytest.raises(ConfigError, match=r"labeled \+1 -0 \(\+train_0004"):
        check_same(before, make_splits(scan_dataset(folder), config))


@pytest.mark.parametrize(("labeled", "val", "advice"), [(4, 0, "--val-split"), (2, 2, "add some")])
def test_a_handful_of_validation_images_is_warned_of(
    make_data: MakeData, labeled: int, val: int, advice: str
) -> None:
    config = config_from_dict({"train": {"batch_size": 1}}, source="x")
    dataset = scan_dataset(make_data(labeled=labeled, unlabeled=3, val=val))
    splits = make_splits(dataset, config)
    (warning,) = split_warnings(dataset, splits)
    assert warning.startswith(f"{len(splits.val)} validation image")
    assert advice in warning
    enough = dataclasses.replace(splits, val=tuple("abcd"))
    assert split_warnings(dataset, enough) == []
