"""Which images a pattern means."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest
from PIL import Image

from job.data.find import images_at
from job.storage.progress import Silent

NAMES = ("a.png", "night/n.png", "midnight/x.png", "night/deep/d.png", "deep/night/e.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        "*.png",
        "*/*.png",
        "**/*.png",
        "**/night/*.png",
        "night/**/*.png",
        "n*/**/[dn].png",
        "**/e.png",
    ],
)
def test_patterns_mean_what_they_do_in_python(folder: Path, pattern: str) -> None:
    wanted = glob.glob(pattern, root_dir=folder, recursive=True)
    with images_at(f"{folder}/{pattern}", Silent()) as (_, paths):
        found = [path.relative_to(folder).as_posix() for path in paths]
    assert sorted(found) == sorted(wanted)
    assert wanted
