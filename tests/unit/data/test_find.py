"""Which images a pattern means."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest
from PIL import Image

from job.data.find import images_at
from job.errors import DataError
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


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("pattern", ["", "/*", "/n*/**/*"])
def test_pictures_of_other_formats_are_told_of(folder: Path, pattern: str) -> None:
    for ending in ("TIF", "bmp", "gif", "txt"):
        (folder / "night" / f"scan.{ending}").write_bytes(b"II")
        (folder / f"scan.{ending}").write_bytes(b"II")
    told = Told()
    with images_at(f"{folder}{pattern}", told) as (_, paths):
        assert paths
        assert all(path.suffix == ".png" for path in paths)
    (line,) = told.lines
    count = {"": 6, "/*": 3, "/n*/**/*": 3}[pattern]
    assert line.startswith(
        f"warning: {folder}{pattern}: {count} pictures of other formats are left"
    )
    assert ".jpeg, .jpg, .png, .webp" in line


def test_nothing_is_told_where_nothing_is_left_out(folder: Path) -> None:
    (folder / "notes.txt").touch()
    told = Told()
    with images_at(str(folder), told):
        assert told.lines == []


@pytest.mark.parametrize("pattern", ["", "/*.tif"])
def test_a_folder_of_other_formats_alone_says_so(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.tif").touch()
    with (
        pytest.raises(DataError, match="1 pictures of other formats are left out") as caught,
        images_at(f"{tmp_path}{pattern}", Silent()),
    ):
        pass
    assert ".webp" in caught.value.mend


def test_hidden_files_are_left_out_and_links_followed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As in a data set; macOS leaves ._NAME beside each image on other file systems."""
    (folder / "._a.png").write_bytes(b"no image")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (2, 2)).save(elsewhere / "l.png")
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    with images_at(str(folder), Silent()) as (root, paths):
        names = [path.relative_to(root).as_posix() for path in paths]
    assert set(names) == {*NAMES, "linked/l.png"}
