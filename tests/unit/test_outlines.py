"""COCO's run lengths and polygons, drawn again by other means."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from job.outlines import CocoOutlines, PolygonOutlines, polygons, run_lengths


def decoded(counts: list[int], size: list[int]) -> NDArray[np.bool_]:
    """As COCO's own tools read it: down the columns, out first."""
    flat: list[bool] = []
    for index, count in enumerate(counts):
        flat += [index % 2 == 1] * count
    return np.array(flat).reshape(size, order="F")


def drawn(shapes: list[tuple[list[list[float]], list[list[list[float]]]]], size: int) -> object:
    """Polygons filled at eight times the size, then looked at in the middle of each pixel."""
    zoom = 8
    canvas = Image.new("1", (size * zoom, size * zoom))
    pen = ImageDraw.Draw(canvas)
    for exterior, holes in shapes:
        for ring, value in ((exterior, 1), *((hole, 0) for hole in holes)):
            pen.polygon([((x + 0.5) * zoom, (y + 0.5) * zoom) for x, y in ring], fill=value)
    return np.asarray(canvas)[zoom // 2 :: zoom, zoom // 2 :: zoom]


masks = st.integers(0, 2**32).map(
    lambda seed: np.random.default_rng(seed).random((9, 9)) < 0.6  # with holes and islands
)


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_run_lengths_come_back(mask: NDArray[np.bool_]) -> None:
    counts = run_lengths(mask)
    assert sum(counts) == mask.size
    assert np.array_equal(decoded(counts, list(mask.shape)), mask)


def test_a_mask_that_begins_inside_begins_with_0() -> None:
    assert run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert run_lengths(np.ones((2, 3), bool)) == [0, 6]
    assert run_lengths(np.zeros((2, 3), bool)) == [6]


def test_a_rectangle_is_a_few_corners() -> None:
    mask = np.zeros((8, 10), bool)
    mask[2:6, 3:9] = True
    ((exterior, holes),) = polygons(mask)
    assert holes == []
    assert exterior[0] == exterior[-1]
    assert len(exterior) == 9  # four corners, each cut at half a pixel
    xs, ys = zip(*exterior, strict=True)
    assert (min(xs), max(xs), min(ys), max(ys)) == (2.5, 8.5, 1.5, 5.5)


def test_a_hole_is_a_hole() -> None:
    mask = np.ones((7, 7), bool)
    mask[3, 3] = False
    ((exterior, holes),) = polygons(mask)
    assert len(holes) == 1
    assert np.mean(holes[0][:-1], axis=0).tolist() == [3, 3]
    assert max(x for x, _ in exterior) == 6.5


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_polygons_drawn_again_are_the_mask(seed: int) -> None:
    # Islands one within another come as shapes of their own, the outer one first.
    mask = np.kron(np.random.default_rng(seed).random((6, 6)) < 0.5, np.ones((3, 3))) > 0
    shapes = sorted(polygons(mask), key=lambda shape: -len(shape[0]))
    shapes.sort(key=lambda shape: -np.ptp([x for x, _ in shape[0]]))
    assert np.array_equal(drawn(shapes, 18), mask)


def test_the_coco_file_holds_every_class_of_every_image() -> None:
    coco = CocoOutlines(["sky", "sea", "ship"])
    first = np.zeros((4, 6), np.uint8)
    first[1:3, 2:5] = 2
    coco.add("a.jpg", first)
    coco.add("b/c.jpg", np.ones((3, 3), np.uint8))
    content = json.loads(coco.to_json())
    assert content["images"] == [
        {"id": 1, "file_name": "a.jpg", "height": 4, "width": 6},
        {"id": 2, "file_name": "b/c.jpg", "height": 3, "width": 3},
    ]
    assert [c["name"] for c in content["categories"]] == ["sky", "sea", "ship"]
    assert [c["id"] for c in content["categories"]] == [1, 2, 3]
    sky, ship, sea = content["annotations"]
    assert (ship["image_id"], ship["category_id"], ship["area"]) == (1, 3, 6)
    assert ship["bbox"] == [2, 1, 3, 2]
    assert (sky["area"], sea["area"]) == (18, 9)
    assert len({a["id"] for a in content["annotations"]}) == 3
    for annotation, wanted in ((ship, first == 2), (sky, first == 0)):
        found = decoded(annotation["segmentation"]["counts"], annotation["segmentation"]["size"])
        assert np.array_equal(found, wanted)
        assert annotation["iscrowd"] == 1


def test_the_polygons_file_names_classes() -> None:
    outlines = PolygonOutlines(["sky", "sea"])
    classes = np.zeros((5, 5), np.uint8)
    classes[2:, 2:] = 1
    outlines.add("a.jpg", classes)
    (image,) = json.loads(outlines.to_json())["images"]
    assert (image["file_name"], image["height"], image["width"]) == ("a.jpg", 5, 5)
    assert [shape["class"] for shape in image["shapes"]] == ["sky", "sea"]
    assert image["shapes"][1]["exterior"][0] == pytest.approx(image["shapes"][1]["exterior"][-1])
