"""`report.html`: one page that loads nothing, holds everything, and is the same each time."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from job.monitor.report import report_html

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if "style" not in self.open:
            self.text.append(data)

    def says(self, text: str) -> bool:
        return text in " ".join("".join(self.text).split())


def train_line(iteration: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "train",
        "iteration": iteration,
        "attempt": 1,
        "time": 1.0,
        "loss_ce": 2.0 / iteration,
        "loss_fm": 0.01,
        "loss_st": 0.5,
        "loss_d": 0.3,
        "loss_g": 2.0,
        "st_count": 3,
        "lr_g": 2.5e-4,
        "lr_d": 1e-4,
        "images_per_s": 10.0,
    } | changes


def eval_line(iteration: int) -> dict[str, Any]:
    return {
        "event": "eval",
        "iteration": iteration,
        "attempt": 1,
        "time": 1.0,
        "train_miou": 0.6,
        "val_miou": 0.5,
        "class_iou": [0.75, 0.25, None],
        "pixel_accuracy": 0.9,
        "best_miou": 0.5,
        "previous_best": None,
    }


EVENTS = [
    {"event": "training_started", "attempt": 1, "time": 0.0, "resumed_at": 0},
    *[train_line(iteration) for iteration in range(1, 6)],
    {
        "event": "attempt_ended",
        "attempt": 1,
        "time": 2.0,
        "reason": "SIGTERM",
        "exit_code": 75,
        "saved_at": 5,
    },
    {"event": "training_started", "attempt": 2, "time": 3.0, "resumed_at": 5},
    *[train_line(iteration, attempt=2) for iteration in range(6, 11)],
    eval_line(10),
]


def content(*, evaluated: bool = True, **changes: Any) -> dict[str, Any]:
    best = {
        "iteration": 10,
        "val_miou": 0.5,
        "train_miou": 0.6,
        "pixel_accuracy": 0.9,
        "class_iou": {"sky": 0.75, "road": 0.25, "car": None},
    }
    return {
        "run": {"uri": "runs/a", "run_id": "0123", "created_at": "2024", "attempts": 2},
        "best": best if evaluated else None,
        "final": {"iteration": 10, "val_miou": 0.5, "train_miou": 0.6} if evaluated else None,
        "files": {},
        "checklist": [
            {"name": "Best validation mIoU recorded", "passed": True, "detail": "0.5000"},
            {"name": "Final train/val gap < 0.15", "passed": False, "detail": "0.2000"},
        ],
        "data": {"uri": "data/b", "images": {"labeled": 12, "unlabeled": 34, "validation": 5}},
        "provenance": {"s4gan": "0.1", "git": None, "torch": "2", "device": "cpu"},
        "config": {},
    } | changes


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def text() -> str:
    return report_html(content(), EVENTS, config_yaml="train:\n  seed: 3\n", predictions_png=png())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


# ---------------------------------------------------------------- self-contained


def test_the_page_is_whole_html(text: str, page: Page) -> None:
    assert text.startswith("<!doctype html>\n")
    assert text.rstrip().endswith("</html>")
    assert page.tags[:2] == ["html", "head"]
    assert ("meta", "charset", "utf-8") in page.attributes
    assert page.tags.count("body") == 1


def test_the_page_loads_nothing_from_elsewhere(text: str, page: Page) -> None:
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("data:", "#")), (tag, name, value)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in text
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))


def test_every_address_within_the_page_has_its_target(page: Page) -> None:
    ids = {value for _, name, value in page.attributes if name == "id"}
    links = {value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href")}
    assert {link for link in links if link} <= ids


def test_the_same_run_makes_the_same_page(text: str) -> None:
    again = report_html(content(), EVENTS, config_yaml="train:\n  seed: 3\n", predictions_png=png())
    assert again == text


# ---------------------------------------------------------------- what it says


def test_the_page_has_all_its_parts(page: Page) -> None:
    assert page.headings == [
        "runs/a",
        "Checklist",
        "Training",
        "Classes (validation, best model)",
        "Validation images (best model)",
        "Attempts",
        "Provenance",
        "Configuration",
    ]


def test_the_verdict_comes_first(page: Page) -> None:
    assert page.says("Best validation mIoU 0.5000 at iteration 10.")


def test_the_checklist_shows_what_passed_and_what_did_not(text: str, page: Page) -> None:
    assert page.says("\u2713Best validation mIoU recorded0.5000")
    assert page.says("\u2717Final train/val gap < 0.150.2000")
    assert text.count('class="yes"') == 1
    assert text.count('class="no"') == 1


def test_each_class_has_its_iou_or_does_not_occur(page: Page) -> None:
    assert page.says("sky0.7500road0.2500cardoes not occur")


def test_each_attempt_has_its_beginning_and_end(page: Page) -> None:
    assert page.says("attempt 1began after iteration 0")
    assert page.says("attempt 1SIGTERM (saved at 5)")
    assert page.says("attempt 2began after iteration 5")


def test_an_attempt_that_failed_is_shown_too() -> None:
    ended = {"event": "attempt_ended", "attempt": 2, "reason": "disk full", "exit_code": 74}
    text = report_html(content(), [*EVENTS, ended], config_yaml="", predictions_png=b"")
    assert Page(text).says("attempt 2disk full")


def test_the_charts_are_named_and_drawn_as_text(page: Page) -> None:
    assert page.tags.count("svg") == 1
    for title in ("Losses", "mIoU", "Accepted unlabeled images", "Learning rates"):
        assert page.says(title)


def test_data_provenance_and_configuration_are_there(page: Page) -> None:
    assert page.says("labeled images12")
    assert page.says("unlabeled images34")
    assert page.says("devicecpu")
    assert page.says("train: seed: 3")


def test_the_pictures_are_inside_the_page(page: Page) -> None:
    (source,) = (value for tag, name, value in page.attributes if (tag, name) == ("img", "src"))
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.partition(",")[2]) == png()


def test_without_pictures_there_is_no_empty_frame() -> None:
    text = report_html(content(), EVENTS, config_yaml="", predictions_png=b"")
    assert "img" not in Page(text).tags


def test_text_from_outside_cannot_become_html() -> None:
    evil = "<script>alert('x')</script>&\""
    summary = content(
        run={"uri": evil, "run_id": "", "created_at": "", "attempts": 1},
        provenance={"device": evil},
        checklist=[{"name": evil, "passed": True, "detail": evil}],
        best={**content()["best"], "class_iou": {evil: 0.5}},
    )
    events = [
        {"event": "training_started", "attempt": 1, "resumed_at": 0},
        {"event": "attempt_ended", "attempt": 1, "reason": evil, "saved_at": 0},
    ]
    page = Page(report_html(summary, events, config_yaml=evil, predictions_png=b""))
    assert "script" not in page.tags
    assert "".join(page.text).count(evil) == 7


# ---------------------------------------------------------------- little to show


def test_a_page_without_any_evaluation() -> None:
    events = [event for event in EVENTS if event["event"] != "eval"]
    page = Page(report_html(content(evaluated=False), events, config_yaml="", predictions_png=b""))
    assert page.says("No evaluation yet.")
    assert "Classes (validation, best model)" not in page.headings


def test_a_page_of_an_empty_ledger() -> None:
    page = Page(report_html(content(evaluated=False), [], config_yaml="", predictions_png=b""))
    assert page.says("No evaluation yet.")


def test_a_page_of_training_on_the_labels_alone() -> None:
    """Losses, counts and the discriminator's rate are 0 throughout."""
    zero = {"loss_fm": 0.0, "loss_st": 0.0, "loss_d": 0.0, "st_count": 0, "lr_d": 0.0}
    events = [train_line(iteration, **zero) for iteration in range(1, 5)] + [eval_line(4)]
    assert "svg" in Page(report_html(content(), events, config_yaml="", predictions_png=b"")).tags


def test_a_page_of_a_long_run_stays_small() -> None:
    events = [train_line(iteration) for iteration in range(1, 2001)]
    text = report_html(content(), events, config_yaml="", predictions_png=b"")
    assert len(text) < 2_000_000
