"""`data-check.html`: what is on it, that it needs nothing else, and that names cannot break it."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import stat
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from job.config import config_from_dict
from job.data.checks import inspect
from job.data.report import CheckReport
from job.data.scan import scan_dataset
from job.errors import StorageError
from job.monitor.data_page import write_data_page
from tests.conftest import IGNORE_INDEX, PALETTE, MakeData
from tests.unit.data.test_checks import image_path, mask_path, write_mask


def report_of(folder: Path, ratio: float = 1.0) -> CheckReport:
    raw = {"data": {"labeled_ratio": ratio}, "train": {"batch_size": 1}}
    config = config_from_dict(raw, source="test")
    return inspect(scan_dataset(folder), config, uri=str(folder))


class Page(HTMLParser):
    """What a browser finds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.titles: list[str] = []
        self.words = ""
        self.pictures: list[tuple[str, Image.Image]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "h3":
            self.titles.append("")
        if tag == "img":
            values = dict(attrs)
            source = values["src"] or ""
            assert source.startswith("data:image/")
            picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
            self.pictures.append((values["alt"] or "", picture))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] == "h3":
            self.titles[-1] += data


def page_of(folder: Path, tmp_path: Path, **options: float) -> Page:
    path = tmp_path / "page.html"
    count = write_data_page(report_of(folder, **options), path)
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.titles) == count
    return page


def test_the_page_needs_nothing_else(make_data: MakeData, tmp_path: Path) -> None:
    page = page_of(make_data(), tmp_path)
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    assert not re.search(r"https?://|@import|url\(", page.text)
    assert 'name="viewport" content="width=device-width' in page.text
    assert page.text.startswith("<!doctype html>")


def test_a_sample_is_image_mask_and_overlay_in_the_classes_colours(
    make_data: MakeData, tmp_path: Path
) -> None:
    folder = make_data(labeled=1, unlabeled=1, val=1)
    image = np.full((40, 48, 3), 100, np.uint8)
    mask = np.full((40, 48), IGNORE_INDEX, np.uint8)
    mask[:20, :24] = 1
    Image.fromarray(image).save(image_path(folder, "train_0000"))
    Image.fromarray(mask).save(mask_path(folder, "train_0000"))
    page = page_of(folder, tmp_path)
    kinds = [kind for kind, _ in page.pictures[:3]]
    assert kinds == ["image", "mask", "overlay"]
    index = page.titles.index("most of square")
    shown, labels, over = (
        np.asarray(picture.convert("RGB")).astype(int)
        for _, picture in page.pictures[3 * index : 3 * index + 3]
    )
    assert np.abs(shown - 100).max() < 8
    assert (labels[5, 5] == PALETTE[1]).all()
    assert (labels[30, 30] == 255).all()
    assert np.abs(over[30, 40] - 100).max() < 12, "what is ignored stays as it is"
    assert over[5, 5, 0] > 130
    assert over[5, 5, 2] < 80
    assert "square 25.0%" in page.words
    assert "ignored 75.0%" in page.words


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_every_class_that_occurs_is_shown(
    make_data: MakeData, tmp_path: Path, ratio: float
) -> None:
    """Also one that only a mask holds that is set aside."""
    folder = make_data(labeled=16, unlabeled=1)
    report = report_of(folder, ratio)
    aside = next(iter(report.balances["set_aside"].largest), None)
    for path in (folder / "train/masks").iterdir():
        mask = np.array(Image.open(path))
        mask[mask == 2] = 0
        Image.fromarray(mask).save(path)
    for path in (folder / "val/masks").iterdir():
        mask = np.array(Image.open(path))
        mask[mask == 2] = 0
        Image.fromarray(mask).save(path)
    name = aside[1].id if aside else "train_0003"
    mask = np.array(Image.open(mask_path(folder, name)))
    mask[5:9, 5:9] = 2
    Image.fromarray(mask).save(mask_path(folder, name))
    page = page_of(folder, tmp_path, ratio=ratio)
    of_classes = " ".join(title for title in page.titles if title.startswith("most of"))
    for class_name in ("background", "square", "disc"):
        assert class_name in of_classes


def test_findings_come_first_problems_before_all(make_data: MakeData, tmp_path: Path) -> None:
    folder = make_data()
    write_mask(folder, "train_0001", IGNORE_INDEX)
    write_mask(folder, "train_0005", 77)
    shutil.copy(image_path(folder, "train_0002"), image_path(folder, "val_0001"))
    exif = Image.Exif()
    exif[0x0112] = 3
    path = image_path(folder, "val_0003")
    Image.open(path).save(path, exif=exif)
    titles = page_of(folder, tmp_path).titles
    expected = (
        "holds the label 77",
        "the mask is empty",
        "EXIF orientation 3",
        "the same picture twice, pixel for pixel (training and validation)",
        "most of",
        "one of 8",
    )
    places = [next(i for i, title in enumerate(titles) if text in title) for text in expected]
    assert places == sorted(places)


def test_a_pair_stands_together(make_data: MakeData, tmp_path: Path) -> None:
    folder = make_data()
    shutil.copy(image_path(folder, "train_0002"), image_path(folder, "val_0001"))
    text = page_of(folder, tmp_path).text
    (section,) = re.findall(r'<section class="sample pair">.*?</section>', text, re.S)
    assert section.count("<img") == 6
    assert str(image_path(folder, "train_0002")) in section
    assert str(image_path(folder, "val_0001")) in section


def test_a_mask_of_another_size_has_no_overlay(make_data: MakeData, tmp_path: Path) -> None:
    folder = make_data()
    write_mask(folder, "train_0001", 0, size=(24, 20))
    page = page_of(folder, tmp_path)
    assert "is 24x20" in page.titles[0]
    assert [kind for kind, _ in page.pictures[:3]] == ["image", "mask", "image"]
    assert "mask, 24 x 20" in page.words


def test_an_unexpected_label_has_a_colour_of_its_own(make_data: MakeData, tmp_path: Path) -> None:
    folder = make_data()
    write_mask(folder, "train_0001", 77)
    page = page_of(folder, tmp_path)
    mask = np.asarray(page.pictures[1][1].convert("RGB"))
    assert (mask == (255, 0, 255)).all()
    assert "unexpected label 77 100.0%" in page.words


def test_an_image_that_cannot_be_decoded_is_told_without_a_picture(
    make_data: MakeData, tmp_path: Path
) -> None:
    folder = make_data()
    image_path(folder, "train_0001").write_text("no image")
    page = page_of(folder, tmp_path)
    assert page.titles[0].startswith(f"{image_path(folder, 'train_0001')}: cannot be read")


def test_names_cannot_break_the_page(make_data: MakeData, tmp_path: Path) -> None:
    folder = make_data(name='a <script>alert("1")</script> & folder')
    info = yaml.safe_load((folder / "dataset.yaml").read_text())
    info["classes"][1] = "<img src=x onerror=alert(1)>"
    (folder / "dataset.yaml").write_text(yaml.safe_dump(info))
    for sub in ("images", "masks"):
        path = folder / "train" / sub / "train_0001.png"
        path.rename(path.with_name("<b>bold&'\".png"))
    page = page_of(folder, tmp_path)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<img src=x onerror=alert(1)>" in page.words
    assert "<b>bold&'\".png" in page.words


def test_a_name_that_is_no_utf8_is_shown_all_the_same(make_data: MakeData, tmp_path: Path) -> None:
    folder = make_data()
    odd = b"odd\xff.png".decode(errors="surrogateescape")
    for sub in ("images", "masks"):
        (folder / "train" / sub / "train_0001.png").rename(folder / "train" / sub / odd)
    write_page = page_of(folder, tmp_path)
    assert "odd\\udcff.png" in write_page.words


def test_large_pictures_are_made_small(make_data: MakeData, tmp_path: Path) -> None:
    folder = make_data()
    Image.new("RGB", (3000, 2000)).save(image_path(folder, "train_0001"))
    write_mask(folder, "train_0001", IGNORE_INDEX, size=(3000, 2000))
    page = page_of(folder, tmp_path)
    assert {picture.size for _, picture in page.pictures[:3]} == {(560, 373)}
    assert "3000 x 2000" in page.words


def test_a_page_is_replaced_as_a_whole_and_leaves_nothing_beside_it(
    make_data: MakeData, tmp_path: Path
) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    path = folder / "page.html"
    path.write_text("old")
    write_data_page(report_of(make_data()), path)
    assert os.listdir(folder) == ["page.html"]
    assert "old" not in path.read_text()[:3]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_page_that_cannot_be_written_is_an_error_naming_it(
    make_data: MakeData, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*gone/page\.html"):
        write_data_page(report_of(make_data()), tmp_path / "gone" / "page.html")


def test_a_failure_on_the_way_leaves_the_old_page(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "page.html").write_text("old")
    report = report_of(make_data())

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("job.monitor.data_page._sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_data_page(report, folder / "page.html")
    assert os.listdir(folder) == ["page.html"]
    assert (folder / "page.html").read_text() == "old"
