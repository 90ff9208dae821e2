"""`report.html`: one page that loads nothing, holds everything, and is the same each time."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job import cli, run
from job.config import config_from_yaml
from job.errors import ConfigError, StorageError
from job.monitor.divergence import ROLLED_BACK
from job.monitor.report import (
    BestEvaluation,
    Report,
    best_evaluation_json,
    open_checklist,
    report_html,
    report_of,
)
from job.monitor.summary import Check
from job.storage import ObjectStore, open_store

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
        "lr_g": 2.5e-4 / iteration,
        "lr_d": 1e-4 / iteration,
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
    {"event": "attempt_started", "attempt": 1, "time": 0.0},
    {"event": "training_started", "attempt": 1, "time": 0.0, "resumed_at": 0},
    *[train_line(iteration) for iteration in range(1, 6)],
    {"event": "checkpoint", "attempt": 1, "time": 1.5, "saved_at": 5},
    {
        "event": "attempt_ended",
        "attempt": 1,
        "time": 2.0,
        "reason": "SIGTERM",
        "exit_code": 75,
    },
    {"event": "attempt_started", "attempt": 2, "time": 3.0},
    {"event": "training_started", "attempt": 2, "time": 3.0, "resumed_at": 5},
    *[train_line(iteration, attempt=2) for iteration in range(6, 11)],
    eval_line(10),
]


CONFIG = config_from_yaml("", source="x", overrides={"train.iterations": 12, "train.seed": 3})
BEST = BestEvaluation(
    iteration=10,
    classes=("sky", "road", "car"),
    confusion=((75, 25, 0), (10, 30, 0), (0, 0, 0)),
    images={"a": 0.1, "b": 0.9},
)
FACTS = {"data": "data/b", "labeled images": 12, "unlabeled images": 34, "device": "cpu"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def report(**changes: Any) -> Report:
    whole = Report(
        run_uri="runs/a",
        config=CONFIG,
        classes=("sky", "road", "car"),
        events=EVENTS,
        checks=[
            Check("Best validation mIoU recorded", True, "0.5000"),
            Check("Final train/val gap < 0.15", False, "0.2000"),
        ],
        finished=True,
        best=BEST,
        pictures=png(),
        facts=FACTS,
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def text() -> str:
    return report_html(report())


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
    assert report_html(report()) == text


def test_no_two_charts_share_an_id(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


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
    assert page.says("Finished after 10 iterations. Best validation mIoU 0.5000 at iteration 10.")
    assert page.says("Training mIoU 0.6000, validation mIoU 0.5000: good.")
    assert page.says("Healthy: nothing is wrong by the rules, but it is off the guide's timeline.")


def test_a_run_that_goes_on_says_how_far_it_is() -> None:
    page = Page(report_html(report(finished=False)))
    assert page.says("At iteration 10 of 12. Best validation mIoU 0.5000 at iteration 10.")
    assert page.says("Checklist" + "So far.")
    assert page.says("\u2026Final train/val gap < 0.150.2000")  # it may come yet
    assert not page.says("\u2717")


def test_why_it_stopped_early_is_said() -> None:
    page = Page(report_html(report(stopped="validation mIoU <0.5> has reached it")))
    assert page.says("Finished after 10 iterations: validation mIoU <0.5> has reached it.")


def test_the_checklist_shows_what_passed_and_what_did_not(text: str, page: Page) -> None:
    assert page.says("\u2713Best validation mIoU recorded0.5000")
    assert page.says("\u2717Final train/val gap < 0.150.2000")
    assert text.count('<td class="yes">') == 1
    assert text.count('<td class="no">') == 1


def test_each_class_has_its_iou_or_does_not_occur(page: Page) -> None:
    assert page.says("sky0.7500road0.2500cardoes not occur")


def test_what_is_confused_is_told_by_how_much(page: Page) -> None:
    assert page.says("25.0% of road is taken for sky")  # 10 of 40
    assert page.says("25.0% of sky is taken for road")  # 25 of 100
    assert page.says("skyroadcar" + "sky7525" + "road2575" + "car")


def test_a_confusion_matrix_of_another_model_is_not_shown() -> None:
    older = BEST.model_copy(update={"iteration": 5})
    assert not Page(report_html(report(best=older))).says("Confusion matrix")


def test_many_classes_are_no_matrix() -> None:
    names = tuple(f"class {number}" for number in range(40))
    events = [{**EVENTS[-1], "class_iou": [0.5] * 40}]
    counts = tuple(tuple(10 if a == b else 1 for b in range(40)) for a in range(40))
    best = BestEvaluation(iteration=10, classes=names, confusion=counts, images={})
    page = Page(report_html(report(best=best, classes=names, events=events)))
    assert page.says("Confused most")
    assert not page.says("Confusion matrix")


def test_findings_are_told_and_marked(text: str) -> None:
    events = [train_line(iteration, loss_d=0.693) for iteration in range(1, 12)]
    found = report_html(report(events=events, finished=False))
    page = Page(found)
    assert "Findings" in page.headings
    assert page.says("problem: Loss_D stays at 0.693")
    assert page.says("Try: --learning-rate-D 0.0002")
    assert page.says("1 thing needs attention; other settings want another --run")
    assert "#d55e00" in found  # the line in the chart
    assert "#d55e00" not in text


def test_each_attempt_has_its_beginning_and_end(page: Page) -> None:
    assert page.says("11970-01-01 00:0002 s1 s1 sSIGTERM (saved at 5)")
    assert page.says("21970-01-01 00:005")
    assert page.says("GPU hours 0.00: useful 0.00, trained again 0.00; goodput")


def test_an_attempt_that_failed_is_shown_too() -> None:
    ended = {
        "event": "attempt_ended",
        "attempt": 2,
        "reason": "disk full",
        "exit_code": 74,
        "time": 99.0,
    }
    assert Page(report_html(report(events=[*EVENTS, ended]))).says("disk full")


def test_costs_are_sentences() -> None:
    page = Page(report_html(report(costs=["Cost $1.23.", "Note: <spot>."])))
    assert page.says("Cost $1.23. Note: <spot>.")


def test_every_chart_is_there_and_named(page: Page) -> None:
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [
        "Loss_CE",
        "Loss_D",
        "Loss_FM",
        "Loss_ST",
        "ST_Count",
        "mIoU",
        "Train/val gap",
        "Learning rates",
        "Iterations over time",
    ]


def test_without_a_discriminator_its_charts_are_not_there() -> None:
    alone = config_from_yaml("", source="x", overrides={"train.supervised_only": True})
    page = Page(report_html(report(config=alone)))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == ["Loss_CE", "mIoU", "Train/val gap", "Learning rates", "Iterations over time"]


def test_data_provenance_and_configuration_are_there(page: Page) -> None:
    assert page.says("labeled images12")
    assert page.says("unlabeled images34")
    assert page.says("devicecpu")
    assert page.says("seed: 3")


def test_the_pictures_are_inside_the_page(page: Page) -> None:
    (source,) = (value for tag, name, value in page.attributes if (tag, name) == ("img", "src"))
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.partition(",")[2]) == png()


def test_without_pictures_there_is_no_empty_frame() -> None:
    assert "img" not in Page(report_html(report(pictures=b""))).tags


def test_text_from_outside_cannot_become_html() -> None:
    evil = "<script>alert('x')</script>&\""
    ended = {
        "event": "attempt_ended",
        "attempt": 2,
        "reason": evil,
        "exit_code": 1,
        "time": 99.0,
        "saved_at": 5,
    }
    page = Page(
        report_html(
            report(
                run_uri=evil,
                facts={evil: evil},
                checks=[Check(evil, True, evil)],
                classes=(evil, "road", "car"),
                best=BEST.model_copy(update={"classes": (evil, "road", "car")}),
                costs=[evil],
                stopped=evil,
                events=[*EVENTS, ended],
                config=CONFIG.model_copy(
                    update={"wandb": CONFIG.wandb.model_copy(update={"tags": (evil,)})}
                ),
            )
        )
    )
    assert "script" not in page.tags
    assert "".join(page.text).count("<script>") >= 13


# ---------------------------------------------------------------- little to show


def test_a_page_without_any_evaluation() -> None:
    events = [event for event in EVENTS if event["event"] != "eval"]
    page = Page(report_html(report(events=events)))
    assert page.says("No evaluation yet.")
    assert "Classes (validation, best model)" not in page.headings


def test_a_page_of_an_empty_ledger() -> None:
    page = Page(report_html(report(events=[], best=None, pictures=b"")))
    assert page.says("No evaluation yet.")
    assert page.says("Nothing was logged yet.")


def test_losses_that_are_no_numbers_are_left_out() -> None:
    events = [train_line(iteration, loss_ce=float("nan")) for iteration in range(1, 5)]
    page = Page(report_html(report(events=[*events, train_line(5, loss_ce=float("inf"))])))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert "Loss_CE" not in labels
    assert "Loss_D" in labels


def test_a_page_of_training_on_the_labels_alone() -> None:
    """Losses, counts and the discriminator's rate are 0 throughout."""
    zero = {"loss_fm": 0.0, "loss_st": 0.0, "loss_d": 0.0, "st_count": 0, "lr_d": 0.0}
    events = [train_line(iteration, **zero) for iteration in range(1, 5)] + [EVENTS[-1]]
    assert "svg" in Page(report_html(report(events=events))).tags


def test_a_page_of_a_long_run_stays_small() -> None:
    events = [
        train_line(iteration, loss_ce=1.0 + (iteration % 7), time=float(iteration))
        for iteration in range(1, 20_001)
    ]
    assert len(report_html(report(events=events))) < 2_000_000


# ---------------------------------------------------------------- from the files of a run


def lay(store: ObjectStore, **files: bytes) -> None:
    content = {
        run.LEDGER: "".join(f"{json.dumps(event)}\n" for event in EVENTS).encode(),
        run.CONFIG: CONFIG.to_yaml().encode(),
        run.BEST_EVALUATION: best_evaluation_json(BEST),
        run.PREDICTIONS: png(),
    }
    for key, data in {**content, **files}.items():
        store.write(key, data)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    lay(store)
    found = report_of(store, ["Cost $1."])
    assert not found.finished
    assert (found.best, found.classes, found.costs) == (BEST, BEST.classes, ["Cost $1."])
    assert [check.passed for check in found.checks] == [True, False, False, True, False]
    assert Page(report_html(found)).says("At iteration 10 of 12.")


def test_a_finished_run(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    content = {
        "run": {"uri": "x", "stopped_early": "it is good enough"},
        "best": {"class_iou": {"sky": 0.75, "road": 0.25, "car": None}},
        "checklist": [{"name": "n", "passed": True, "detail": "d"}],
        "data": {"uri": "data/b", "images": {"labeled": 12}},
        "provenance": {"torch": "2"},
    }
    lay(store, **{run.SUMMARY: json.dumps(content).encode(), run.BEST_MODEL: b"m"})
    found = report_of(store)
    assert found.finished
    assert found.stopped == "it is good enough"
    assert found.checks == [Check("n", True, "d")]
    assert found.facts == {"data": "data/b", "labeled images": 12, "torch": "2"}


def test_a_best_model_that_was_deleted_since_does_not_verify(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    content = {
        "run": {},
        "best": None,
        "checklist": [{"name": "best_model.pth exists and verifies", "passed": True, "detail": ""}],
        "data": {"uri": "data/b", "images": {}},
        "provenance": {},
    }
    lay(store, **{run.SUMMARY: json.dumps(content).encode(), run.BEST_MODEL: b"m"})
    assert [check.passed for check in report_of(store).checks] == [True]
    store.delete(run.BEST_MODEL)
    (check,) = report_of(store).checks
    assert not check.passed
    assert check.detail == f"{store.uri}/best_model.pth is not there any more"


def test_scores_of_nan_are_not_the_best_of_the_page() -> None:
    nan = eval_line(3) | {"val_miou": float("nan")}
    page = Page(report_html(report(events=[nan, eval_line(5)])))
    assert page.says("Best validation mIoU 0.5000 at iteration 5")
    page = Page(report_html(report(events=[nan])))
    assert page.says("No validation mIoU is a number.")


def test_a_run_that_is_longer_than_its_configuration_says_so() -> None:
    page = Page(report_html(report(events=[train_line(60_000)], finished=False)))
    assert page.says("At iteration 60000 of")
    assert page.says("That is beyond its end")
    assert not page.says("Phase")


def test_a_damaged_evaluation_only_makes_the_page_shorter(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for text in (
        b"{",
        b'{"iteration": 1}',
        best_evaluation_json(BEST).replace(b"[75, 25, 0], ", b""),
    ):
        lay(store, **{run.BEST_EVALUATION: text})
        assert report_of(store).best is None


@pytest.mark.parametrize("text", [b"{}", b"[", b'{"checklist": 3}'])
def test_a_damaged_summary_is_named(tmp_path: Path, text: bytes) -> None:
    store = open_store(str(tmp_path))
    lay(store, **{run.SUMMARY: text})
    with pytest.raises(StorageError, match=r"summary\.json: is no summary"):
        report_of(store)


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run that has begun to train"):
        report_of(open_store(str(tmp_path)))


def test_the_command_writes_it_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_env: None, bucket: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lay(open_store(str(tmp_path / "run")))
    place = f"s3://{bucket}/runs/first"
    lay(open_store(place))
    cli.report("run")
    assert (tmp_path / "run" / "report.html").is_file()
    cli.report(place)
    assert (tmp_path / "report.html").is_file()
    cli.report("run", out="deep/er/page.html")
    assert (tmp_path / "deep/er/page.html").is_file()
    (tmp_path / "run" / "report.html").unlink()
    cli.report("run/metrics.jsonl")
    assert (tmp_path / "run" / "report.html").is_file()
    cli.report("run", out=f"{place}/page.html")
    assert open_store(place).stat("page.html") is not None
    with pytest.raises(ConfigError, match="--out s3://bucket: names no file"):
        cli.report("run", out="s3://bucket")


# ---------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
MEASURE = """
<iframe id="page" style="width: %dpx; height: 6000px; border: 0"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument;
  const size = box => [Math.round(box.width), Math.round(box.height)];
  document.body.insertAdjacentHTML("beforeend", "<output>" + JSON.stringify({
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    charts: [...page.querySelectorAll("figure svg")].map(one => size(one.getBoundingClientRect())),
    pictures: [...page.images].map(one => [one.naturalWidth, one.naturalHeight]),
    requests: frame.contentWindow.performance.getEntriesByType("resource").length,
    first: page.querySelector("h2").getBoundingClientRect().top,
  }) + "</output>");
};
frame.srcdoc = %s;
</script>
"""


def browse(folder: Path, *arguments: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    switches = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile)
    ended = subprocess.run(
        [CHROMIUM, *switches, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return ended.stdout


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_whole_on_a_desk_and_on_a_phone(
    text: str, tmp_path: Path, width: int
) -> None:
    quoted = json.dumps(text).replace("</", "<\\/")
    (tmp_path / "measure.html").write_text(MEASURE % (width, quoted), encoding="utf-8")
    dom = browse(
        tmp_path, "--dump-dom", "--virtual-time-budget=5000", f"file://{tmp_path}/measure.html"
    )
    (found,) = re.findall(r"<output>(.*?)</output>", dom)
    seen = json.loads(html.unescape(found))
    assert seen["overflow"] == 0
    assert len(seen["charts"]) == 9
    for chart_width, chart_height in seen["charts"]:
        assert 250 < chart_width <= width
        assert chart_height > 120
    assert seen["pictures"] == [[3, 2]]
    assert seen["requests"] == 0


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_the_screenshot_has_curves_bands_and_findings(tmp_path: Path) -> None:
    lines = [train_line(iteration, loss_d=0.693) for iteration in range(1, 13)]
    (tmp_path / "page.html").write_text(report_html(report(events=[*lines, EVENTS[-1]])))
    shot = tmp_path / "shot.png"
    size = "--window-size=1200,2600"
    browse(tmp_path, f"--screenshot={shot}", size, f"file://{tmp_path}/page.html")
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3).astype(int)
    for colour, least in (
        ((0, 114, 178), 2_000),  # curves, bars of the classes
        ((207, 232, 221), 5_000),  # the guide's bands
        ((213, 94, 0), 30),  # the finding in the chart of Loss_D
        ((9, 8, 7), 6),  # the picture
    ):
        near = np.abs(pixels - colour).max(axis=1) < 25  # edges are smoothed
        assert near.sum() >= least, colour


def test_what_the_run_has_done_about_itself_is_told_with_the_rates_of_now() -> None:
    events = [*EVENTS, {"event": ROLLED_BACK, "attempt": 1, "time": 1.0}]
    shown = Page(report_html(report(events=events)))
    rate = report().config.train.learning_rate / 2
    assert "rolled back by itself, 1 of 3 times" in " ".join(shown.text)
    assert f"--learning-rate {rate:g} " in " ".join(shown.text)


def test_a_run_that_died_of_an_error_has_not_completed_without_one() -> None:
    ended = {"event": "attempt_ended", "attempt": 2, "time": 9.0, "exit_code": 70, "reason": "NaN"}
    events = [*EVENTS, ended]
    text = report_html(report(events=events, finished=False, checks=open_checklist(events)))
    row = text[text.index("Training completed without errors") - 60 :]
    assert row.index("&#10007;") < row.index("Training completed without errors")
    assert "&#8230;" in text


def test_without_a_discriminator_there_is_no_learning_rate_of_one() -> None:
    config = config_from_yaml("", source="x", overrides={"train.supervised_only": True})
    assert "discriminator" in report_html(report())
    charts = report_html(report(config=config)).partition("<h2>Configuration")[0]
    assert "discriminator" not in charts.partition("<h2>Training")[2]
