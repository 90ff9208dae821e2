"""Pictures of predictions: exact numbers and colours, and a sheet of the promised size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.data.dataset import default_palette
from job.data.images import IGNORE
from job.monitor.pictures import (
    OVERLAY_OPACITY,
    Example,
    colour_map,
    index_png,
    overlay,
    prediction_sheet,
)
from tests.conftest import CLASSES, PALETTE

LABELS = np.array([[0, 1, 2], [2, 1, IGNORE]], np.uint8)
CELL_PX, GAP_PX, TEXT_PX = 288, 6, 22


def example(width: int = 96, height: int = 48) -> Example:
    """Grey left of a red half; truth and prediction are each of one class."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[:, width // 2 :] = (250, 0, 0)
    truth = np.full((height, width), 1, np.uint8)
    prediction = np.full((height, width), 2, np.uint8)
    return Example("a", image, truth, prediction)


# ---------------------------------------------------------------- index PNG


def test_an_index_png_keeps_the_numbers_and_shows_the_palette(tmp_path: Path) -> None:
    prediction = np.arange(9, dtype=np.uint8).reshape(3, 3) % 3
    path = tmp_path / "a.png"
    index_png(prediction, PALETTE).save(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), prediction)
        shown = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, np.array(PALETTE)[prediction])


def test_an_index_png_of_255_classes_keeps_all_numbers() -> None:
    prediction = np.arange(255, dtype=np.uint8).reshape(15, 17)
    buffer = io.BytesIO()
    index_png(prediction, default_palette(255)).save(buffer, "PNG")
    with Image.open(buffer) as image:
        np.testing.assert_array_equal(np.asarray(image), prediction)


def test_an_index_png_can_be_read_back_as_a_mask(tmp_path: Path) -> None:
    from job.data.images import read_index_mask

    prediction = np.array([[0, 2], [1, 2]], np.uint8)
    index_png(prediction, PALETTE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_index_mask(tmp_path / "a.png")), prediction)


def test_making_an_index_png_leaves_the_prediction_alone() -> None:
    prediction = LABELS.copy()
    index_png(prediction, PALETTE)
    np.testing.assert_array_equal(prediction, LABELS)


# ---------------------------------------------------------------- colours


def test_every_class_has_its_colour_and_what_is_none_is_white() -> None:
    np.testing.assert_array_equal(
        colour_map(LABELS, PALETTE),
        [[PALETTE[0], PALETTE[1], PALETTE[2]], [PALETTE[2], PALETTE[1], (255, 255, 255)]],
    )


def test_colours_are_8_bit_rgb() -> None:
    colours = colour_map(LABELS, PALETTE)
    assert colours.shape == (2, 3, 3)
    assert colours.dtype == np.uint8


def test_an_overlay_mixes_image_and_colour_by_the_opacity() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    mixed = overlay(image, LABELS, PALETTE)
    assert mixed.mode == "RGB"
    assert mixed.size == (3, 2)
    expected = 100 * (1 - OVERLAY_OPACITY) + np.array(PALETTE[1]) * OVERLAY_OPACITY
    assert np.abs(np.asarray(mixed)[0, 1] - expected).max() <= 0.5


@pytest.mark.parametrize("value", [0, 255])
def test_an_overlay_stays_within_8_bits(value: int) -> None:
    image = np.full((1, 1, 3), value, np.uint8)
    mixed = overlay(image, np.zeros((1, 1), np.uint8), [(value, value, value)])
    assert mixed.getpixel((0, 0)) == (value, value, value)


# ---------------------------------------------------------------- the sheet


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_sheet_has_three_columns_and_a_row_each_example(count: int) -> None:
    sheet = prediction_sheet([example(96, 48)] * count, PALETTE, CLASSES)
    row = 48 * CELL_PX // 96
    assert sheet.mode == "RGB"
    assert sheet.width == 3 * CELL_PX + 4 * GAP_PX
    assert sheet.height == TEXT_PX + count * (row + GAP_PX) + TEXT_PX + GAP_PX  # titles, legend


def test_rows_may_have_images_of_different_shapes() -> None:
    sheet = prediction_sheet([example(96, 48), example(30, 90), example(2, 1)], PALETTE, CLASSES)
    rows = 144 + 864 + 144
    assert sheet.height == TEXT_PX + rows + 3 * GAP_PX + TEXT_PX + GAP_PX


def test_an_image_of_extreme_shape_has_a_row_all_the_same() -> None:
    sheet = prediction_sheet([example(2000, 2)], PALETTE, CLASSES)
    assert sheet.height > 2 * TEXT_PX


def test_a_row_shows_image_truth_and_prediction_in_this_order() -> None:
    sheet = np.asarray(prediction_sheet([example()], PALETTE, CLASSES))
    middle = TEXT_PX + 72
    columns = [GAP_PX + column * (CELL_PX + GAP_PX) for column in range(3)]
    assert tuple(sheet[middle, columns[0] + 10]) == (128, 128, 128)
    assert tuple(sheet[middle, columns[0] + CELL_PX - 10]) == (250, 0, 0)
    assert tuple(sheet[middle, columns[1] + 144]) == PALETTE[1]
    assert tuple(sheet[middle, columns[2] + 144]) == PALETTE[2]
    assert tuple(sheet[middle, columns[1] - 3]) == (255, 255, 255)


def test_labels_are_enlarged_without_new_colours() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (7, 11)).astype(np.uint8)
    one = Example("a", np.zeros((7, 11, 3), np.uint8), labels, labels)
    sheet = np.asarray(prediction_sheet([one], PALETTE, CLASSES))
    left = 2 * GAP_PX + CELL_PX
    truth = sheet[TEXT_PX : TEXT_PX + round(7 * CELL_PX / 11), left : left + CELL_PX]
    assert {tuple(colour) for colour in truth.reshape(-1, 3)} == set(PALETTE)


def test_the_legend_shows_every_class_in_its_colour() -> None:
    sheet = np.asarray(prediction_sheet([], PALETTE, CLASSES))
    legend = sheet[TEXT_PX : 2 * TEXT_PX].reshape(-1, 3)
    for colour in PALETTE:
        assert (legend == colour).all(axis=1).sum() >= 100  # a box of 11 x 11


def test_the_legend_of_many_classes_takes_more_lines_and_stays_within_the_sheet() -> None:
    names = [f"a rather long class name {index}" for index in range(40)]
    palette = default_palette(40)
    few, many = prediction_sheet([], PALETTE, CLASSES), prediction_sheet([], palette, names)
    assert many.width == few.width
    assert (many.height - few.height) % TEXT_PX == 0
    pixels = np.asarray(many).reshape(-1, 3)
    for colour in palette:
        assert (pixels == colour).all(axis=1).sum() >= 100


@pytest.mark.parametrize("name", ["Stra\u00dfe", "\u7a7a", "x" * 300, ""])
def test_a_class_of_any_name_can_be_drawn(name: str) -> None:
    sheet = prediction_sheet([example()], PALETTE, [name, "b", "c"])
    assert sheet.height >= 144


def test_the_sheet_survives_png() -> None:
    buffer = io.BytesIO()
    sheet = prediction_sheet([example()], PALETTE, CLASSES)
    sheet.save(buffer, format="PNG")
    with Image.open(buffer) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(sheet))
