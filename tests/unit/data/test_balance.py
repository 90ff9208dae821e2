"""Class balance: what is counted, and which classes are warned of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.balance import NAMES_SHOWN, RARE_SHARE, Balance, balance_warnings
from job.data.dataset import Item

CLASSES = ("sky", "road", "sign")


def item(name: str) -> Item:
    return Item(name, Path(f"{name}.png"), Path(f"masks/{name}.png"))


def balance(*masks: tuple[int, ...], ignored: int = 0) -> Balance:
    counted = Balance(len(masks[0]) if masks else len(CLASSES))
    for index, pixels in enumerate(masks):
        counted.add(item(f"m{index}"), np.array(pixels, np.int64), ignored)
    return counted


NOTHING = balance()


def test_pixels_images_and_shares_are_those_of_the_masks() -> None:
    counted = balance((60, 40, 0), (100, 0, 0), ignored=50)
    assert counted.masks == 2
    assert counted.pixels.tolist() == [160, 40, 0]
    assert counted.images.tolist() == [2, 1, 0]
    np.testing.assert_allclose(counted.shares, [0.8, 0.2, 0])
    assert counted.ignored_share == 100 / 300


def test_the_mask_that_holds_most_of_a_class_is_remembered() -> None:
    counted = balance((5, 0, 0), (9, 1, 0), (9, 0, 0))
    assert counted.largest == [(9, item("m1")), (1, item("m1")), None]


def test_of_no_masks_every_share_is_zero() -> None:
    assert NOTHING.shares.tolist() == [0, 0, 0]
    assert NOTHING.ignored_share == 0


masks = st.lists(st.tuples(*[st.integers(0, 10**9)] * 3), max_size=6)


@given(left=masks, right=masks)
def test_the_sum_of_two_parts_is_that_of_all_their_masks(
    left: list[tuple[int, ...]], right: list[tuple[int, ...]]
) -> None:
    both, whole = balance(*left) + balance(*right), balance(*left, *right)
    assert both.masks == whole.masks
    np.testing.assert_array_equal(both.pixels, whole.pixels)
    np.testing.assert_array_equal(both.images, whole.images)
    assert [one and one[0] for one in both.largest] == [one and one[0] for one in whole.largest]
    assert whole.shares.sum() in (0, 1) or abs(whole.shares.sum() - 1) < 1e-9


# ---------------------------------------------------------------- warnings


def test_a_fair_balance_passes_without_a_word() -> None:
    fair = balance((50, 49, 1), (50, 49, 1))
    assert balance_warnings(CLASSES, fair, fair, NOTHING) == []


def test_without_labeled_images_nothing_is_said_of_them() -> None:
    assert balance_warnings(CLASSES, NOTHING, balance((1, 1, 1))) == []


def test_without_validation_nothing_is_said_of_it() -> None:
    assert balance_warnings(CLASSES, balance((9, 9, 9)), NOTHING) == []


def test_a_class_that_no_labeled_image_holds_is_named() -> None:
    warnings = balance_warnings(CLASSES, balance((5, 0, 5), (5, 0, 5)), balance((1, 1, 1)))
    assert warnings == [
        "no labeled image holds road, which is not learned then; label images that do"
    ]


def test_a_class_that_only_set_aside_masks_hold_says_so() -> None:
    warnings = balance_warnings(
        CLASSES, balance((5, 0, 5), (5, 0, 5)), balance((1, 1, 1)), balance((0, 3, 0))
    )
    assert len(warnings) == 1
    assert warnings[0].startswith("no labeled image holds road")
    assert "masks that are set aside do: raise data.labeled_ratio" in warnings[0]


def test_a_class_that_no_mask_holds_is_named_as_one_of_dataset_yaml() -> None:
    warnings = balance_warnings(CLASSES, balance((5, 0, 5), (5, 0, 5)), balance((1, 0, 1)), NOTHING)
    assert warnings == [
        "no mask at all holds road; check the classes (those of dataset.yaml, if there is one) and "
        "how the masks were made",
        "no validation mask holds road, whose IoU cannot be measured then",
    ]


def test_masks_of_0_and_255_get_the_word_that_helps() -> None:
    two = ("background", "road")
    (said,) = balance_warnings(two, balance((60, 0), (50, 0), ignored=40), balance((9, 0)))[:1]
    assert "but no road" in said
    assert "write it as 1" in said
    assert not any(
        "write it as 1" in one for one in balance_warnings(two, balance((60, 0)), balance())
    )
    held = balance_warnings(two, balance((60, 9), (50, 8), ignored=40), balance((9, 2)))
    assert not any("write it as 1" in one for one in held)


def test_a_rare_class_is_named_with_its_share_and_one_at_the_limit_is_not() -> None:
    whole = 2_000_000
    at_limit = round(whole * RARE_SHARE) // 2
    two = [(whole // 2 - at_limit, 0, at_limit)] * 2
    assert balance_warnings(("a", "b", "c"), balance(*two), balance((1, 1, 1)))[1:] == []
    two = [(whole // 2 - at_limit + 1, 0, at_limit - 1)] * 2
    warnings = balance_warnings(("a", "b", "c"), balance(*two), balance((1, 1, 1)))
    assert warnings[1].startswith("less than 0.1% of the labeled pixels are c (0.100%)")


def test_a_class_of_one_labeled_image_is_named_with_the_image() -> None:
    warnings = balance_warnings(CLASSES, balance((5, 5, 5), (5, 5, 0)), balance((1, 1, 1)))
    assert warnings == [
        "only one of 2 labeled images holds sign (first: m0.png); label more that do"
    ]


def test_of_a_single_labeled_image_that_is_not_said() -> None:
    assert balance_warnings(CLASSES, balance((5, 5, 5)), balance((1, 1, 1))) == []


def test_a_class_that_validation_lacks_is_named() -> None:
    fair = balance((5, 5, 5), (5, 5, 5))
    assert balance_warnings(CLASSES, fair, balance((5, 0, 0))) == [
        "no validation mask holds road, sign, whose IoU cannot be measured then"
    ]


def test_of_many_classes_some_are_named_and_the_rest_counted() -> None:
    names = [f"class {index}" for index in range(200)]
    one = [0] * 199 + [7]
    (warning,) = balance_warnings(names, balance(tuple(one), tuple(one)), NOTHING)
    assert warning.count("class ") == NAMES_SHOWN
    assert f"and {199 - NAMES_SHOWN} more classes" in warning


@pytest.mark.parametrize(
    ("name", "told"), [("background", True), ("_background_", True), ("sky", False)]
)
def test_one_mask_of_background_alone_is_told_of_and_one_of_sky_is_not(
    name: str, *, told: bool
) -> None:
    classes = (name, *CLASSES[1:])
    drawn, empty = (60, 30, 10), (100, 0, 0)
    part = balance(*[drawn] * 12, empty)
    found = balance_warnings(classes, part, NOTHING)
    said = f"1 of 13 labeled masks holds nothing but {name} (first: masks/m12.png)"
    assert [line.startswith(said) for line in found] == [True] * told
    assert len(balance_warnings(classes, balance(*[drawn] * 3), part)) == told
    # Another class may fill an image, and where all masks are alike there is no other.
    assert balance_warnings(classes, balance(*[drawn] * 12, (0, 100, 0)), NOTHING) == []
    alike = balance_warnings(classes, balance(empty, empty), NOTHING)
    assert not any("nothing but" in one for one in alike)


def test_masks_that_nobody_has_drawn_are_told_of() -> None:
    drawn, empty = (60, 30, 10), (100, 0, 0)
    found = balance_warnings(CLASSES, balance(*[drawn] * 12, *[empty] * 4), NOTHING)
    assert len(found) == 1
    assert "4 of 16 labeled masks hold nothing but sky" in found[0]
    assert balance_warnings(CLASSES, balance(*[drawn] * 13, *[empty] * 3), NOTHING) == []
