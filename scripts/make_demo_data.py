"""Make the demo's data set: handwritten digits pasted on photographs, with exact masks.

Digits are scikit-learn's `load_digits` (scans of 0, 1, 4 and 7, written by many hands), photographs
its two sample pictures. Training and validation use different digits and different parts of the
photographs. An eighth of the training scenes get a mask.

    python scripts/make_demo_data.py FOLDER
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

DIGITS = (0, 1, 4, 7)
CLASSES = ("background", *(f"digit {digit}" for digit in DIGITS))
PALETTE = ((40, 40, 40), (230, 60, 60), (60, 180, 75), (67, 99, 216), (245, 190, 40))
SCENE_PX = 96
DIGIT_PX = (30, 44)
DIGITS_A_SCENE = (3, 6)
TRAIN_SCENES = 640
LABELED_SCENES = 80
VAL_SCENES = 100
VAL_SHARE = 0.25
PHOTO_BRIGHTNESS = 0.45
PLACES_TRIED = 30
SEED = 7

Array = NDArray[np.uint8]


def make_scene(
    rng: np.random.Generator, photos: list[Array], digits: dict[int, Array]
) -> tuple[Array, Array]:
    """One scene and its mask: uint8 (96, 96, 3) and (96, 96)."""
    photo = photos[rng.integers(len(photos))]
    top = rng.integers(photo.shape[0] - SCENE_PX)
    left = rng.integers(photo.shape[1] - SCENE_PX)
    scene = PHOTO_BRIGHTNESS * photo[top : top + SCENE_PX, left : left + SCENE_PX]
    mask = np.zeros((SCENE_PX, SCENE_PX), np.uint8)
    for _ in range(rng.integers(DIGITS_A_SCENE[0], DIGITS_A_SCENE[1] + 1)):
        digit = DIGITS[rng.integers(len(DIGITS))]
        pool = digits[digit]
        ink = draw_digit(rng, pool[rng.integers(len(pool))])
        window = find_room(rng, mask, ink.shape[0])
        colour = rng.uniform(150, 255, size=3)
        scene[window] += ink[..., None] * (colour - scene[window])
        mask[window][ink > 0.5] = 1 + DIGITS.index(digit)
    return scene.round().clip(0, 255).astype(np.uint8), mask


def find_room(rng: np.random.Generator, mask: Array, size: int) -> tuple[slice, slice]:
    """The emptiest of a few random places for a square of `size` pixels."""
    corners = rng.integers(SCENE_PX - size + 1, size=(PLACES_TRIED, 2))
    windows = [(slice(y, y + size), slice(x, x + size)) for y, x in corners]
    return min(windows, key=lambda window: np.count_nonzero(mask[window]))


def draw_digit(rng: np.random.Generator, scan: NDArray[np.float64]) -> NDArray[np.float64]:
    """A scan of 8x8 with 16 grey levels, enlarged and turned; opacity 0..1, square."""
    size = int(rng.integers(DIGIT_PX[0], DIGIT_PX[1] + 1))
    grey = Image.fromarray((scan * 255 / 16).astype(np.uint8))
    big = grey.resize((size, size), Image.Resampling.BICUBIC)
    turned = big.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BICUBIC, expand=True)
    return np.clip(np.asarray(turned, np.float64) / 255 * 1.4, 0, 1)


def make_data(folder: Path, seed: int = SEED) -> None:
    """Write the whole data set into an empty folder."""
    scans = load_digits()
    photos = [np.asarray(photo, np.float64) for photo in load_sample_images().images]
    column = round(photos[0].shape[1] * (1 - VAL_SHARE))
    rng = np.random.default_rng(seed)
    for part, num_scenes, num_labeled in (
        ("train", TRAIN_SCENES, LABELED_SCENES),
        ("val", VAL_SCENES, VAL_SCENES),
    ):
        digits = {}
        for digit in DIGITS:
            pool = scans.images[scans.target == digit]
            first_val = round(len(pool) * (1 - VAL_SHARE))
            digits[digit] = pool[:first_val] if part == "train" else pool[first_val:]
        backgrounds = [p[:, :column] if part == "train" else p[:, column:] for p in photos]
        for sub in ("images", "masks"):
            (folder / part / sub).mkdir(parents=True)
        for index in range(num_scenes):
            scene, mask = make_scene(rng, backgrounds, digits)
            name = f"{part}_{index:04d}.png"
            Image.fromarray(scene).save(folder / part / "images" / name)
            if index < num_labeled:
                Image.fromarray(mask).save(folder / part / "masks" / name)
    info = {"classes": list(CLASSES), "ignore_index": 255, "palette": [list(c) for c in PALETTE]}
    (folder / "dataset.yaml").write_text(yaml.safe_dump(info, sort_keys=False))


def main() -> None:
    """Make the data unless they are already there, whole and by the same settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED, help="another one: other scenes")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    constants = {name: value for name, value in globals().items() if name.isupper()}
    settings = repr(constants | {"SEED": arguments.seed})
    marker = folder / ".demo"
    if marker.is_file() and marker.read_text() == settings:
        print(f"demo data: already in {folder}")
        return
    if folder.exists() and not marker.is_file():
        sys.exit(f"error: {folder} exists and was not made by this script; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.write_text("begun")  # a killed run leaves this, and the next one starts over
    make_data(folder, arguments.seed)
    marker.write_text(settings)
    print(
        f"demo data: {TRAIN_SCENES} training scenes ({LABELED_SCENES} labeled) and {VAL_SCENES} "
        f"validation scenes in {folder}"
    )


if __name__ == "__main__":
    main()
