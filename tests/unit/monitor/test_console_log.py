"""A console log as users have it: piped, coloured, prefixed, wrapped by Docker or by CloudWatch."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from job.config import load_config
from job.errors import ConfigError, StorageError
from job.monitor.console_log import DOCKER_PART, events_of_console, printed_text
from job.monitor.diagnose import Diagnosis, diagnose
from tests.series import console, lines

DEMO = load_config("demo")
LOG = console(lines(DEMO, loss_d=lambda at: 0.693), 1_200)
LINES = LOG.split("\n")[:-1]
LEDGER = "".join(json.dumps(line) + "\n" for line in lines(DEMO, loss_d=lambda at: 0.693))
PLAIN = list(events_of_console(LOG))


def docker(text: str, end: str = "\n") -> str:
    """As the json-file driver keeps it."""
    rest = {"stream": "stdout", "time": "2026-11-27T01:02:03.4Z"}
    return "".join(json.dumps({"log": line + end} | rest) + "\n" for line in text.splitlines())


def cloudwatch(first: int, last: int) -> list[dict[str, object]]:
    """Some of the lines as events; several have the same time."""
    return [
        {"logStreamName": "s/1", "timestamp": at // 3, "message": LINES[at], "ingestionTime": 1}
        for at in range(first, last)
    ]


def answer(events: object) -> str:
    return json.dumps({"events": events, "searchedLogStreams": []}, indent=4) + "\n"


HALF = len(LINES) // 2
WRAPPED: dict[str, str] = {
    "docker": docker(LOG),
    "docker, of a terminal": docker(LOG, "\r\n"),
    "a driver that leaves the end out": docker(LOG, ""),
    "docker, rotated": docker(LOG)[20:],
    "colours": "".join(
        line.replace("Loss_CE", "\x1b[1;32mLoss_CE\x1b[0m").replace("mIoU: ", "mIoU: \x1b[36m")
        + "\x1b[0m\x1b[K\n"
        for line in LINES
    ),
    "docker, colours": docker("".join(f"\x1b[1m{line}\x1b[0m\n" for line in LINES)),
    "a progress bar": "".join(f"\r 5/1200 \u2501\u2501 0:01\r\x1b[2K{line}\r\n" for line in LINES),
    "docker compose": "".join(f"train-1  | {line}\n" for line in LINES),
    "kubectl --prefix": "".join(f"[pod/train-0/s4gan] {line}\n" for line in LINES),
    "aws logs tail": "".join(
        f"2026-11-27T01:02:03.123000+00:00 s4gan/default/0a1b {line}\n" for line in LINES
    ),
    "filter-log-events": answer(cloudwatch(0, len(LINES))),
    "its pages, newest first": answer(cloudwatch(HALF // 3 * 3, len(LINES)))
    + answer(cloudwatch(0, HALF // 3 * 3)),
    "--query events": json.dumps(cloudwatch(0, len(LINES))),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_has_carried_a_log_changes_nothing(kind: str) -> None:
    printed = printed_text(WRAPPED[kind])
    assert printed is not None
    assert list(events_of_console(printed)) == PLAIN


def test_a_long_line_that_docker_has_cut_is_put_together() -> None:
    long = "x" * (DOCKER_PART - 10)
    parts = (long + LINES[2][:10], LINES[2][10:] + "\n")
    text = "".join(json.dumps({"log": part, "stream": "stdout"}) + "\n" for part in parts)
    printed = printed_text(text)
    assert printed is not None
    assert list(events_of_console(printed)) == PLAIN[:1]


@pytest.mark.parametrize("text", ['{"event": "x"}\n', "{broken\n", '{"log": 3}\n', "{}"])
def test_other_objects_are_left_to_the_ledger(text: str) -> None:
    assert printed_text(text) is None


@pytest.mark.parametrize("text", ['{"events": []}', "[]", "[2026-11-27 01:02:03] hello\n", "[1]"])
def test_a_log_without_losses_is_said_to_be_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(ConfigError, match="has no lines of losses"):
        diagnose(str(tmp_path / "log"))


# ---------------------------------------------------------------- percent


def scored(*scores: float | str) -> str:
    """A log with evaluations; training has as much as validation."""
    return "".join(
        f"Evaluating at iteration {at}...\nTraining mIoU: {score}\nValidation mIoU: {score}\n"
        for at, score in enumerate(scores, start=100)
    )


def judged(tmp_path: Path, text: str) -> Diagnosis:
    (tmp_path / "log").write_text(LINES[2] + "\n" + text)
    return diagnose(str(tmp_path / "log"))


def test_scores_in_percent_are_shares_of_one_and_it_is_said(tmp_path: Path) -> None:
    found = judged(tmp_path, scored(0.9, 12.5, 38.1, 43.2))
    assert (found.val_miou, found.verdict.fit) == (pytest.approx(0.432), "excellent")
    assert "the scores are percent" in found.text()
    assert found.to_dict()["scores_in_percent"]


def test_a_per_cent_sign_says_it_itself(tmp_path: Path) -> None:
    found = judged(tmp_path, scored("0.80%", "0.90 %"))
    assert found.val_miou == pytest.approx(0.009)
    assert not found.in_percent


def test_shares_are_left_as_they_are(tmp_path: Path) -> None:
    found = judged(tmp_path, scored(0.1, 1.0))
    assert found.val_miou == 1.0
    assert not found.in_percent


@pytest.mark.parametrize(
    "scores", [(0.3, 0.4, 0.5, 43.2), (43.2, 143.2), (-0.1, 0.2)], ids=["one", "above", "below"]
)
def test_scores_that_are_neither_are_refused(tmp_path: Path, scores: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="is no share of 1, and the scores are not percent"):
        judged(tmp_path, scored(*scores))


def test_a_ledger_with_percent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LEDGER.replace('"val_miou": 0.', '"val_miou": 43.'))
    with pytest.raises(StorageError, match=r"val_miou is 43\.\d+, not from 0 to 1 \(divide perc"):
        diagnose(str(tmp_path))


# ---------------------------------------------------------------- pipes


def through_a_fifo(tmp_path: Path, content: bytes, use: Callable[[str], None]) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    use(str(tmp_path / "pipe"))
    writer.join()


@pytest.mark.parametrize("content", [LOG, LEDGER], ids=["log", "ledger"])
def test_a_pipe_is_read(tmp_path: Path, content: str) -> None:
    """As of `s4gan diagnose <(zcat log.gz)`."""

    def use(path: str) -> None:
        assert [one.rule for one in diagnose(path, DEMO).verdict.findings] == ["d_stuck"]

    through_a_fifo(tmp_path, content.encode(), use)


@pytest.mark.parametrize("content", [LOG, LEDGER], ids=["log", "ledger"])
def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    found = diagnose("-", DEMO)
    assert found.source == "standard input"
    assert [one.rule for one in found.verdict.findings] == ["d_stuck"]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("error: runs/a: no space left on device\n  mend: free some", "no space left on device"),
        ("train-1  | error: runs/a: no space left", "no space left"),
        (
            "Traceback (most recent call last):\nRuntimeError: CUDA error: device-side assert",
            "CUDA error",
        ),
        ("torch.AcceleratorError: CUDA error: an illegal memory access", "illegal memory access"),
    ],
)
def test_a_log_that_ends_with_an_error_is_not_healthy(tmp_path: Path, last: str, said: str) -> None:
    healthy = console(lines(DEMO), 1_200).split("\n")
    log = tmp_path / "train.log"
    log.write_text("\n".join([*healthy[:-20], last, ""]))
    found = diagnose(str(log), DEMO)
    assert said in found.verdict.failed
    assert not found.is_healthy
    log.write_text("\n".join([*healthy[:-20], last, *healthy[-20:]]))  # and went on
    assert diagnose(str(log), DEMO).is_healthy


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("Stopped by SIGTERM; saved after iteration 900 of 1200", "was interrupted: Stopped by"),
        ("Finished after 1200 iterations; best", "training is over: finished"),
        ("", ""),
    ],
)
def test_how_a_training_ended_is_said(tmp_path: Path, last: str, said: str) -> None:
    log = tmp_path / "train.log"
    log.write_text(console(lines(DEMO), 1_200) + last + "\n")
    found = diagnose(str(log), DEMO)
    assert said in found.ended
    assert bool(said) == bool(found.ended)
    assert found.ended in found.text()


def test_the_number_of_classes_is_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    constant = console(lines(DEMO, loss_ce=lambda at: 1.8), 1_200)  # 5 classes: guessing costs 1.6
    log.write_text(constant)
    findings = diagnose(str(log), DEMO).verdict.findings
    assert not any(one.rule == "ce_not_learning" for one in findings)
    first = "data: 80 labeled, 560 unlabeled, 100 validation images, 5 classes; checking them\n"
    log.write_text(first + constant)
    findings = diagnose(str(log), DEMO).verdict.findings
    assert any(one.rule == "ce_not_learning" for one in findings)


def test_a_log_whose_losses_look_otherwise_is_said_to_have_none(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(LOG.replace(" | Loss", ", Loss"))
    found = diagnose(str(log), DEMO)
    assert not found.has_losses
    assert "no line of losses" in found.text()
    log.write_text(LOG)
    assert "no line of losses" not in diagnose(str(log), DEMO).text()


def test_a_packed_log_gets_a_word_of_help(tmp_path: Path) -> None:
    (tmp_path / "log.gz").write_bytes(gzip.compress(LOG.encode()))
    with pytest.raises(ConfigError, match="has no lines of losses") as caught:
        diagnose(str(tmp_path / "log.gz"))
    assert caught.value.mend == f"unpack it: s4gan diagnose <(zcat {tmp_path / 'log.gz'})"


def test_nothing_on_standard_input_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ConfigError, match="standard input: has no lines of losses"):
        diagnose("-")
