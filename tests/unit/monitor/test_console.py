"""The guide's console lines to the letter, on every kind of output."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from job.events import EvalEvent, Notice, TrainEvent
from job.monitor.console import (
    RULE,
    ConsoleTracker,
    SafeConsole,
    evaluation_head,
    evaluation_lines,
    make_console,
    train_line,
)

ROOT = Path(__file__).resolve().parents[3]

# The monitoring guide's own examples.
GUIDE_LINE = (
    "Iter 500/50000 | Loss_CE: 2.470 | Loss_FM: 0.037 | "
    "Loss_ST: 0.000 | Loss_D: 0.184 | ST_Count: 2"
)
GUIDE_FIRST_EVALUATION = """
============================================================
Evaluating at iteration 500...
============================================================
Training mIoU: 0.3523
Validation mIoU: 0.3201
\u2713 New best validation mIoU: 0.3201
============================================================
"""
GUIDE_AT_10000 = """\
Iter 10000/50000 | Loss_CE: 0.823 | Loss_FM: 0.015 | Loss_ST: 0.645 | Loss_D: 0.312 | ST_Count: 8

============================================================
Evaluating at iteration 10000...
============================================================
Training mIoU: 0.6234
Validation mIoU: 0.5876
\u2713 New best validation mIoU: 0.5876 (previous: 0.5654)
============================================================
"""


def losses(
    iteration: int = 500,
    *,
    ce: float = 2.47,
    fm: float = 0.037,
    st: float = 0.0,
    d: float = 0.184,
    count: int = 2,
) -> TrainEvent:
    return TrainEvent(
        iteration=iteration,
        loss_ce=ce,
        loss_fm=fm,
        loss_st=st,
        loss_d=d,
        loss_g=ce + 0.1 * fm + st,
        st_count=count,
        lr_g=2.5e-4,
        lr_d=1e-4,
        images_per_s=12.34,
    )


def result(
    iteration: int = 500,
    *,
    train: float = 0.3523,
    val: float = 0.3201,
    previous: float | None = None,
) -> EvalEvent:
    return EvalEvent(
        iteration=iteration,
        train_miou=train,
        val_miou=val,
        class_iou=(val, None),
        pixel_accuracy=0.9,
        best_miou=max(val, previous or 0.0),
        previous_best=previous,
    )


def tracked(console: Console, *, iterations: int = 50_000, start: int = 0) -> ConsoleTracker:
    return ConsoleTracker(console, iterations, start)


def plain() -> tuple[SafeConsole, io.StringIO]:
    """The real console, on something that is no terminal."""
    out = io.StringIO()
    console = make_console()
    console.file = out
    return console, out


# ---------------------------------------------------------------- the lines


def test_the_line_of_losses_is_the_guides() -> None:
    assert train_line(losses(), 50_000) == GUIDE_LINE


def test_losses_are_rounded_to_three_places_whatever_their_size() -> None:
    line = train_line(losses(7, ce=1234.5678, fm=0.00049, st=0.0005001, d=10, count=16), 9)
    assert line == (
        "Iter 7/9 | Loss_CE: 1234.568 | Loss_FM: 0.000 | Loss_ST: 0.001 | Loss_D: 10.000 | "
        "ST_Count: 16"
    )


def test_losses_that_are_no_numbers_are_shown_as_such() -> None:
    line = train_line(losses(ce=float("nan"), d=float("inf")), 50_000)
    assert "Loss_CE: nan |" in line
    assert "Loss_D: inf |" in line


def test_the_first_evaluation_is_the_guides_block() -> None:
    block = f"{evaluation_head(500)}\n{evaluation_lines(result())}\n"
    assert block == GUIDE_FIRST_EVALUATION


def test_a_later_best_names_the_previous_one() -> None:
    lines = evaluation_lines(result(10_000, train=0.6234, val=0.5876, previous=0.5654))
    assert lines == GUIDE_AT_10000.split("...\n" + RULE + "\n")[1].rstrip("\n")


@pytest.mark.parametrize("previous", [0.5, 0.3201])
def test_without_a_new_best_there_is_no_check_mark(previous: float) -> None:
    """An equal result is none."""
    assert evaluation_lines(result(previous=previous)) == (
        f"Training mIoU: 0.3523\nValidation mIoU: 0.3201\n{RULE}"
    )


def test_a_first_result_of_zero_is_a_best() -> None:
    assert "New best validation mIoU: 0.0000" in evaluation_lines(result(val=0.0))


def test_a_previous_best_of_zero_is_shown() -> None:
    assert "(previous: 0.0000)" in evaluation_lines(result(previous=0.0))


def test_rules_are_60_equal_signs() -> None:
    assert RULE == "=" * 60
    assert RULE in GUIDE_FIRST_EVALUATION


# ---------------------------------------------------------------- not a terminal


def test_a_log_holds_exactly_the_guides_lines_and_no_bar() -> None:
    console, out = plain()
    with tracked(console, start=9_999) as tracker:
        tracker.step_done(10_000)
        tracker.train(losses(10_000, ce=0.823, fm=0.015, st=0.645, d=0.312, count=8))
        tracker.evaluation_started(10_000)
        tracker.evaluation(result(10_000, train=0.6234, val=0.5876, previous=0.5654))
        tracker.step_done(10_001)
    assert out.getvalue() == GUIDE_AT_10000


def test_lines_are_never_wrapped_however_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    console, out = plain()
    with tracked(console) as tracker:
        tracker.train(losses())
        tracker.notice(Notice("note", "word " * 60 + "end"))
    assert out.getvalue() == f"{GUIDE_LINE}\n{'word ' * 60}end\n"


def test_notices_are_printed_as_they_are() -> None:
    console, out = plain()
    message = "warning: /data/[bold]a[/bold]/[1].png cannot be decoded; skipped (1 so far)"
    with tracked(console) as tracker:
        tracker.notice(Notice("unreadable_image", message, {"path": "x"}))
    assert out.getvalue() == f"{message}\n"


def test_a_notice_without_a_sentence_prints_nothing() -> None:
    console, out = plain()
    with tracked(console) as tracker:
        tracker.notice(Notice("attempt_started", "", {"resumed_at": 0}))
    assert out.getvalue() == ""


def test_an_error_within_leaves_the_block() -> None:
    console, _ = plain()
    with pytest.raises(KeyError), tracked(console):
        raise KeyError


# ---------------------------------------------------------------- a terminal


@pytest.mark.parametrize("width", [20, 80, 200])
def test_on_a_terminal_the_lines_stand_above_a_bar(width: int) -> None:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=width, highlight=False, markup=False, soft_wrap=True
    )
    with tracked(console, start=499) as tracker:
        tracker.step_done(500)
        tracker.train(losses())
        tracker.evaluation_started(500)
        tracker.evaluation(result())
        tracker.notice(Notice("note", "a note"))
    text = out.getvalue()
    assert GUIDE_LINE in text
    for line in GUIDE_FIRST_EVALUATION.splitlines():
        assert line in text
    assert "a note" in text
    if width >= 80:
        assert "500/50000" in text
        assert "12.3 images/s" in text


def test_the_bar_is_gone_at_the_end() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with tracked(console, iterations=10, start=9) as tracker:
        tracker.step_done(10)
    assert out.getvalue().rstrip().endswith("\x1b[2K")  # the bar's line is erased
    assert "\x1b[?25h" in out.getvalue()  # and the cursor shown again


# ---------------------------------------------------------------- real processes

_SCRIPT = """
import sys
from job.events import Notice
from job.monitor.console import ConsoleTracker, make_console
from tests.unit.monitor.test_console import losses, result

with ConsoleTracker(make_console(), 50_000, 0) as tracker:
    for iteration in range(1, int(sys.argv[1]) + 1):
        tracker.train(losses(iteration))
        tracker.evaluation_started(iteration)
        tracker.evaluation(result(iteration))
    tracker.notice(Notice("note", sys.argv[2]))
print("reached the end", file=sys.stderr)
"""


def run_script(
    *, out: int, blocks: int = 1, note: str = "", **env: str
) -> subprocess.CompletedProcess[bytes]:
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(blocks), note],
        stdout=out,
        stderr=subprocess.PIPE,
        env={**clean, "PYTHONPATH": str(ROOT), **env},
        timeout=60,
        check=False,
    )


def test_a_stdout_with_utf8_gets_the_check_mark() -> None:
    finished = run_script(out=subprocess.PIPE, PYTHONIOENCODING="utf-8")
    assert finished.returncode == 0, finished.stderr
    assert "\u2713 New best validation mIoU: 0.3201\n" in finished.stdout.decode()


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_a_stdout_without_a_check_mark_gets_a_stand_in(env: dict[str, str]) -> None:
    finished = run_script(out=subprocess.PIPE, note="caf\u00e9 \u7a7a", **env)
    assert finished.returncode == 0, finished.stderr
    assert b"\n? New best validation mIoU: 0.3201\n" in finished.stdout
    assert finished.stdout.endswith(b" ?\n")


def test_a_reader_that_goes_away_does_not_end_the_process() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        finished = run_script(out=write, blocks=50)
    finally:
        os.close(write)
    assert finished.returncode == 0
    assert finished.stderr == b"reached the end\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stdout_that_takes_no_more_does_not_end_the_process() -> None:
    with open("/dev/full", "wb") as full:
        finished = run_script(out=full.fileno())
    assert finished.stderr == b"reached the end\n"


def test_make_console_prints_to_stdout_as_it_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("[bold]not markup[/bold] 12")
    assert capsys.readouterr().out == "[bold]not markup[/bold] 12\n"


def test_make_console_leaves_colons_alone(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("warning: data/a:100:b.png :car: skipped")
    assert capsys.readouterr().out == "warning: data/a:100:b.png :car: skipped\n"
