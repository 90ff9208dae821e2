"""Pictures of predictions: colour maps, overlays, and the sheet `predictions.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.uint8]
Palette = Sequence[tuple[int, int, int]]

OVERLAY_OPACITY = 0.55
_CELL_WIDTH_PX = 288
_GAP_PX = 6
_TEXT_PX = 22


@dataclass(frozen=True)
class Example:
    """One validation image with truth and prediction, all of one size (H, W)."""

    name: str
    image: Array
    """RGB, (H, W, 3)."""
    truth: Array
    """Classes or IGNORE, (H, W)."""
    prediction: Array
    caption: str = ""


def index_png(prediction: Array, palette: Palette) -> Image.Image:
    """Class numbers as a PNG of mode P: the numbers are kept, viewers show the palette."""
    image = Image.fromarray(prediction)
    image.putpalette([channel for colour in palette for channel in colour])
    return image


def colour_map(classes: Array, palette: Palette) -> Array:
    """RGB of each pixel's class; white where it is none, (H, W) -> (H, W, 3)."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table[classes]


def overlay(image: Array, prediction: Array, palette: Palette) -> Image.Image:
    """The image with its prediction laid over it."""
    mixed = (1 - OVERLAY_OPACITY) * image + OVERLAY_OPACITY * colour_map(prediction, palette)
    return Image.fromarray(mixed.round().astype(np.uint8))


def prediction_sheet(
    examples: Sequence[Example], palette: Palette, classes: Sequence[str]
) -> Image.Image:
    """Rows of image, truth and prediction side by side, with a legend of the classes below.

    A caption stands above its row.
    """
    font = ImageFont.load_default(14)
    rows = []
    for example in examples:
        cells = (
            example.image,
            colour_map(example.truth, palette),
            colour_map(example.prediction, palette),
        )
        rows.append([_cell(cell, smooth=index == 0) for index, cell in enumerate(cells)])
    width = 3 * _CELL_WIDTH_PX + 4 * _GAP_PX
    legend = _legend_lines(classes, width, font)
    captions = sum(_TEXT_PX for example in examples if example.caption)
    height = (
        _TEXT_PX
        + captions
        + sum(row[0].height + _GAP_PX for row in rows)
        + len(legend) * _TEXT_PX
        + _GAP_PX
    )
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "truth", "prediction")):
        draw.text((_GAP_PX + column * (_CELL_WIDTH_PX + _GAP_PX), 2), title, "black", font)
    top = _TEXT_PX
    for example, row in zip(examples, rows, strict=True):
        if example.caption:
            draw.text((_GAP_PX, top + 2), example.caption, "black", font)
            top += _TEXT_PX
        for column, cell in enumerate(row):
            sheet.paste(cell, (_GAP_PX + column * (_CELL_WIDTH_PX + _GAP_PX), top))
        top += row[0].height + _GAP_PX
    for line in legend:
        left = _GAP_PX
        for index in line:
            box = (left, top + 4, left + 12, top + 16)
            draw.rectangle(box, fill=tuple(palette[index]), outline="black")
            draw.text((left + 17, top + 1), classes[index], "black", font)
            left += _legend_width(classes[index], font)
        top += _TEXT_PX
    return sheet


def _cell(pixels: Array, *, smooth: bool) -> Image.Image:
    image = Image.fromarray(pixels)
    height = max(1, round(image.height * _CELL_WIDTH_PX / image.width))
    # Labels must not be mixed into colours that mean nothing.
    resampling = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return image.resize((_CELL_WIDTH_PX, height), resampling)


def _legend_width(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return 17 + int(font.getlength(name)) + 14


def _legend_lines(
    classes: Sequence[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[list[int]]:
    """Indices of the classes, as many on a line as fit."""
    lines: list[list[int]] = [[]]
    left = _GAP_PX
    for index, name in enumerate(classes):
        needed = _legend_width(name, font)
        if lines[-1] and left + needed > width:
            lines.append([])
            left = _GAP_PX
        lines[-1].append(index)
        left += needed
    return lines
