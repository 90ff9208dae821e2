"""Predictions as other programs take them: COCO's run lengths, and polygons."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
from contourpy import FillType, contour_generator
from numpy.typing import NDArray

Array = NDArray[np.uint8]


class Outlines(Protocol):
    """Collects predictions for one file."""

    def add(self, name: str, classes: Array) -> None:
        """Take an image in: its file's name, and class numbers (H, W)."""

    def to_json(self) -> bytes:
        """The file."""


class CocoOutlines:
    """COCO's format, one annotation for each class of an image, uncompressed run lengths.

    Such annotations have `iscrowd` 1, as pycocotools takes lists of counts only then. Categories
    count from 1, as COCO's do: the class number and 1.
    Source: cocodataset.org, "Data format".

    Args:
        classes: names in index order.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, name: str, classes: Array) -> None:
        """See `Outlines`."""
        height, width = classes.shape
        image = len(self._images) + 1
        self._images.append({"id": image, "file_name": name, "height": height, "width": width})
        for index in np.unique(classes):
            mask = classes == index
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image,
                    "category_id": int(index) + 1,
                    "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                    "area": int(mask.sum()),
                    "bbox": [
                        int(columns[0]),
                        int(rows[0]),
                        int(columns[-1] - columns[0] + 1),
                        int(rows[-1] - rows[0] + 1),
                    ],
                    "iscrowd": 1,
                }
            )

    def to_json(self) -> bytes:
        """See `Outlines`."""
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self._classes)]
        content = {
            "images": self._images,
            "categories": categories,
            "annotations": self._annotations,
        }
        return json.dumps(content).encode()


class PolygonOutlines:
    """Polygons with holes, for each class of an image.

    Points are [x, y] in pixels, where the middle of the first pixel is [0, 0]; lines run half-way
    between pixels.

    Args:
        classes: names in index order.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._images: list[dict[str, Any]] = []

    def add(self, name: str, classes: Array) -> None:
        """See `Outlines`."""
        height, width = classes.shape
        shapes = [
            {"class": self._classes[int(index)], "exterior": exterior, "holes": holes}
            for index in np.unique(classes)
            for exterior, holes in polygons(classes == index)
        ]
        self._images.append({"file_name": name, "height": height, "width": width, "shapes": shapes})

    def to_json(self) -> bytes:
        """See `Outlines`."""
        return json.dumps({"classes": list(self._classes), "images": self._images}).encode()


Points = list[list[float]]


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """How many pixels are out, in, out, ... of a mask (H, W), column by column."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *counts] if flat[0] else list(counts)


def _corners(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the points in the middle of straight lines; a closed ring stays closed."""
    open_ring = ring[:-1]
    before = open_ring - np.roll(open_ring, 1, axis=0)
    after = np.roll(open_ring, -1, axis=0) - open_ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    kept = open_ring[turns]
    return np.concatenate([kept, kept[:1]])


def polygons(mask: NDArray[np.bool_]) -> list[tuple[Points, list[Points]]]:
    """Exterior and holes of each connected part of a mask (H, W); closed, first point is last."""
    framed = np.pad(mask.astype(np.float32), 1)
    generator = contour_generator(z=framed, fill_type=FillType.OuterOffset)
    # Of this type of fill there are two lists, and neither holds a None.
    points, offsets = cast(tuple[list[Any], list[Any]], generator.filled(0.5, np.inf))
    found = []
    for some, cuts in zip(points, offsets, strict=True):
        rings = [_corners(some[start:end] - 1).tolist() for start, end in itertools.pairwise(cuts)]
        found.append((rings[0], rings[1:]))
    return found
