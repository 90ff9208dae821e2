"""`s4gan diagnose`: of a run, a ledger, a console log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer

from job import cli, run
from job.config import Config, load_config
from job.errors import ConfigError, StorageError
from job.monitor.console_log import _append
from job.monitor.diagnose import diagnose
from job.monitor.divergence import Remedies
from job.monitor.report import report_of
from job.storage import open_store
from tests.series import console, lines

GUESSING: Any = {"loss_d": lambda at: 0.693}


def ledger(path: Path, events: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_a_healthy_run(tmp_path: Path) -> None:
    ledger(tmp_path / run.LEDGER, lines())
    (tmp_path / run.CONFIG).write_text(Config().to_yaml())
    found = diagnose(str(tmp_path))
    assert found.is_healthy
    assert (found.iteration, found.iterations) == (50_000, 50_000)
    assert found.verdict.fit == "excellent"
    assert "healthy: nothing needs to be done" in found.text()


def test_a_run_with_a_fault(tmp_path: Path) -> None:
    ledger(tmp_path / run.LEDGER, lines(**GUESSING))
    found = diagnose(str(tmp_path))
    assert not found.is_healthy
    assert [one.rule for one in found.verdict.findings] == ["d_stuck"]
    assert "problem: Loss_D stays at 0.693" in found.text()
    assert json.loads(json.dumps(found.to_dict()))["findings"][0]["rule"] == "d_stuck"


def test_the_run_says_what_it_was_trained_with(tmp_path: Path) -> None:
    config = load_config("demo")
    ledger(tmp_path / run.LEDGER, lines(config))
    (tmp_path / run.CONFIG).write_text(config.to_yaml())
    found = diagnose(str(tmp_path))
    assert found.iterations == 1_200
    assert found.verdict.standing is not None
    assert found.verdict.standing.number == 4


@pytest.mark.parametrize("prefix", ["", "2026-11-27T01:02:03.123456789Z "])
@pytest.mark.parametrize("name", ["log.txt", "output"])
def test_a_console_log_is_as_good_as_a_ledger(tmp_path: Path, name: str, prefix: str) -> None:
    path = tmp_path / name
    path.write_text(console(lines(**GUESSING), 50_000, prefix))
    found = diagnose(str(path))
    of_ledger = diagnose(str(ledger(tmp_path / "x.jsonl", lines(**GUESSING))))
    told, expected = (
        [(finding.rule, finding.iteration) for finding in one.verdict.findings]
        for one in (found, of_ledger)
    )
    assert told == expected != []
    assert found.train_miou == pytest.approx(of_ledger.train_miou, abs=1e-4)


def test_the_guides_own_example_is_read(tmp_path: Path) -> None:
    """Character for character, as the guide prints it."""
    path = tmp_path / "log"
    rule = "=" * 60
    path.write_text(
        "Iter 10000/50000 | Loss_CE: 0.823 | Loss_FM: 0.015 | Loss_ST: 0.645 | Loss_D: 0.312 | "
        f"ST_Count: 8\n\n{rule}\nEvaluating at iteration 10000...\n{rule}\n"
        "Training mIoU: 0.6234\nValidation mIoU: 0.5876\n"
        f"\u2713 New best validation mIoU: 0.5876 (previous: 0.5654)\n{rule}\n"
    )
    found = diagnose(str(path))
    assert found.is_healthy
    assert (found.iteration, found.train_miou, found.val_miou) == (10_000, 0.6234, 0.5876)
    assert found.verdict.fit == "excellent"
    assert found.verdict.standing is not None
    assert found.verdict.standing.line() == "Phase 3 of 4, main training: on track"


def test_of_what_was_trained_twice_the_second_time_counts(tmp_path: Path) -> None:
    """An attempt was killed at 30000, the next one went on from 10000 and learned."""
    path = tmp_path / "log"
    first = console(lines(until=30_000, loss_d=lambda at: 1.5 if at > 10_000 else None), 50_000)
    second = console((line for line in lines() if line["iteration"] > 10_000), 50_000)
    path.write_text(first + "attempt 2: resuming after iteration 10000 of 50000\n" + second)
    found = diagnose(str(path))
    assert found.iteration == 50_000
    assert found.verdict.findings == ()


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("error: CUDA out of memory with batches of 4\n", "out_of_memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", "out_of_memory"),
        ("error: training diverged: a loss or weight became NaN\n", "non_finite"),
        (
            "Iter 600/50000 | Loss_CE: nan | Loss_FM: 0.015 | Loss_ST: 0.000 | Loss_D: 0.312 | "
            "ST_Count: 8\n",
            "non_finite",
        ),
    ],
)
def test_how_a_log_ends_is_a_finding(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "log"
    path.write_text(console(lines(until=500), 50_000) + line)
    assert [one.rule for one in diagnose(str(path)).verdict.findings] == [rule]


@pytest.mark.parametrize(("code", "failed"), [(0, False), (75, False), (78, True), (93, True)])
def test_a_run_that_ended_with_an_error_is_not_healthy(
    tmp_path: Path, code: int, failed: bool
) -> None:
    ended = {"event": "attempt_ended", "exit_code": code, "reason": "no images", "time": 1.0}
    ledger(tmp_path / run.LEDGER, [*lines(until=1_000), ended | {"attempt": 1}])
    found = diagnose(str(tmp_path))
    assert found.is_healthy != failed
    assert ("ended with an error: no images" in found.text()) == failed
    again = {"event": "attempt_started", "attempt": 2, "time": 2.0}
    ledger(tmp_path / run.LEDGER, [*lines(until=1_000), ended | {"attempt": 1}, again])
    assert diagnose(str(tmp_path)).is_healthy


def test_a_run_that_failed_before_it_had_a_configuration_says_so(tmp_path: Path) -> None:
    ended = {"event": "attempt_ended", "exit_code": 78, "reason": "no images"}
    ledger(tmp_path / run.LEDGER, [ended | {"time": 1.0, "attempt": 1}])
    found = diagnose(str(tmp_path))
    assert "there is no config.yaml, as of a run that failed before" in found.text()
    assert found.to_dict()["assumed_preset"] == "guide"
    with pytest.raises(ConfigError, match="ended with an error: no images") as caught:
        report_of(open_store(str(tmp_path)))
    assert caught.value.mend.startswith("mend that")


def test_a_configuration_that_cannot_be_read_is_not_one_that_is_not_there(tmp_path: Path) -> None:
    ledger(tmp_path / run.LEDGER, lines(until=500))
    (tmp_path / run.CONFIG).mkdir()
    with pytest.raises(StorageError, match=r"config\.yaml"):
        diagnose(str(tmp_path))
    assert diagnose(str(tmp_path / run.LEDGER)).assumed  # of a file it need not be


def test_two_evaluations_far_apart_are_not_called_healthy(tmp_path: Path) -> None:
    two = lines(train_miou=lambda at: 0.85, val_miou=lambda at: 0.45)
    path = ledger(tmp_path / "l.jsonl", [one for one in two if one["iteration"] <= 1_000])
    found = diagnose(str(path))
    assert not found.is_healthy
    assert "too early for a finding, but the last evaluations say overfitting" in found.text()


def test_a_damaged_configuration_is_not_replaced_in_silence(tmp_path: Path) -> None:
    ledger(tmp_path / run.LEDGER, lines(until=500))
    (tmp_path / run.CONFIG).write_text("train: [")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        diagnose(str(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_ledger_that_an_editor_has_saved(tmp_path: Path, encoding: str) -> None:
    path = ledger(tmp_path / "l.jsonl", lines(until=500))
    path.write_text(path.read_text() + "\n\n", encoding=encoding)
    assert diagnose(str(path)).iteration == 500


def test_what_a_log_says_of_remedies(tmp_path: Path) -> None:
    path = tmp_path / "log"
    events = list(lines(until=1_000))
    first = console((one for one in events if one["iteration"] <= 600), 50_000)
    path.write_text(
        first
        + "warning: training diverged: Loss_CE is 76.000, and was 1.0 before iteration 500\n"
        + "Rolled back (1 of 3) to iteration 400; going on with --learning-rate 0.000125 "
        + "--learning-rate-D 5e-05\n"
        + "warning: CUDA out of memory with batches of 2; going on with batches of 1, 16 of them\n"
        + console((one for one in events if one["iteration"] > 400), 50_000)
    )
    found = diagnose(str(path))
    assert found.verdict.remedies == Remedies(rollbacks=1, halvings=1)
    assert [(one.rule, one.since, one.ended) for one in found.verdict.findings] == [
        ("out_of_memory", 600, 700)
    ]
    assert "rolled back by itself, 1 of 3 times" in found.text()
    assert "halved its batches, 1 times" in found.text()
    assert found.to_dict()["rolled_back"] == 1


def test_what_a_finished_log_ran_into_is_over(tmp_path: Path) -> None:
    """Also behind its last line of losses."""
    path = tmp_path / "log"
    text = console(lines(until=50_000), 50_000) + "warning: CUDA out of memory with batches of 2\n"
    path.write_text(text)
    assert not diagnose(str(path)).is_healthy
    path.write_text(text + "Finished after 50000 iterations; best validation mIoU 0.7\n")
    assert diagnose(str(path)).is_healthy


# ---------------------------------------------------------------- bad input


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no metrics\.jsonl"):
        diagnose(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\xff\xfe\x00"])
def test_a_file_without_losses_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="has no lines of losses"):
        diagnose(str(path))


def test_a_damaged_ledger_is_named_with_its_line(tmp_path: Path) -> None:
    path = ledger(tmp_path / run.LEDGER, lines(until=200))
    path.write_text(path.read_text().replace("\n", "\nnonsense\n", 1))
    with pytest.raises(StorageError, match=r"metrics\.jsonl: line 2 is no event"):
        diagnose(str(path))


def test_the_command_ends_with_1_if_something_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ledger(tmp_path / "good.jsonl", lines(until=2_000))
    bad = ledger(tmp_path / "bad.jsonl", lines(until=4_000, **GUESSING))
    for path, code in ((good, 0), (bad, 1)):
        with pytest.raises(typer.Exit) as ended:
            cli.diagnose(str(path), as_json=True)
        assert ended.value.exit_code == code
        assert json.loads(capsys.readouterr().out)["healthy"] == (code == 0)


def test_a_log_of_no_iterations_is_told_of_and_one_in_utf_16_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    losses = (line for line in lines() if line["event"] == "train")
    path.write_text(console(losses, 50_000).replace("/50000", "/0"))
    with pytest.raises(ConfigError, match="no lines of losses"):
        diagnose(str(path))
    path.write_text(console(lines(**GUESSING), 50_000), encoding="utf-16")
    assert [one.rule for one in diagnose(str(path)).verdict.findings] == ["d_stuck"]


def test_a_log_says_itself_how_long_the_run_is(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(console(lines(), 50_000))
    found = diagnose(str(path), load_config("demo"))
    assert found.iterations == 50_000
    assert not found.assumed
    assert "--config" not in found.text()
    said = "there is no config.yaml beside it: judged as a run of the preset guide"
    assert said in diagnose(str(path)).text()


def test_a_long_log_takes_no_longer_a_line_than_a_short_one(tmp_path: Path) -> None:
    """Each line once looked at all before it; counted, not timed."""
    events: list[dict[str, Any]] = []

    class Counted(dict[str, Any]):
        looks = 0

        def get(self, *arguments: Any) -> Any:
            Counted.looks += 1
            return super().get(*arguments)

    for at in range(1, 1_001):
        _append(events, Counted(event="train", iteration=at))
        _append(events, Counted(event="eval", iteration=at))
    assert len(events) == 2_000
    assert Counted.looks < 10 * len(events)


def test_more_iterations_raise_the_rates_and_that_is_no_fault(tmp_path: Path) -> None:
    first = [line for line in lines() if line["iteration"] <= 10_000]
    second = [
        line | ({"lr_g": line["lr_g"] * 1.5, "lr_d": line["lr_d"] * 1.5} if "lr_g" in line else {})
        for line in lines()
        if line["iteration"] > 10_000
    ]
    asked = {"event": "configuration_changed", "changes": ["train.iterations: 10000, 50000"]}
    stamp = {"attempt": 2, "time": 0.0}
    ledger(tmp_path / run.LEDGER, [*first, asked | stamp, *second])
    assert diagnose(str(tmp_path)).verdict.findings == ()
    ledger(tmp_path / run.LEDGER, [*first, *second])
    assert {one.rule for one in diagnose(str(tmp_path)).verdict.findings} == {
        "lr_not_decaying",
        "lr_D_not_decaying",
    }


def test_a_jump_of_the_loss_is_not_told_as_a_nan(tmp_path: Path) -> None:
    ended = {
        "event": "attempt_ended",
        "exit_code": 70,
        "reason": "training diverged: Loss_CE is 76.0, and was 1.0 before iteration 8",
        "attempt": 1,
        "time": 0.0,
    }
    ledger(tmp_path / run.LEDGER, [*(x for x in lines() if x["iteration"] <= 5_000), ended])
    assert "non_finite" not in {one.rule for one in diagnose(str(tmp_path)).verdict.findings}


def test_scores_of_nan_are_a_finding_and_json(tmp_path: Path) -> None:
    path = ledger(tmp_path / "l.jsonl", lines(until=2_000, val_miou=lambda at: math.nan))
    found = diagnose(str(path))
    assert [one.rule for one in found.verdict.findings] == ["score_non_finite"]
    assert found.verdict.fit is found.val_miou is None
    json.dumps(found.to_dict(), allow_nan=False)
    assert "mIoU is NaN or infinite" in found.text()


def test_beyond_the_end_of_the_run_no_phase_is_made_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(console(lines(until=400), 50_000).replace("Iter 400/", "Iter 60000/"))
    ledger(tmp_path / "l.jsonl", lines(until=2_000))
    short = load_config("demo")
    for found in (diagnose(str(log)), diagnose(str(tmp_path / "l.jsonl"), short)):
        assert found.verdict.standing is None
        assert found.to_dict()["beyond_end"]
        assert "that is beyond its end: no phase can be told" in found.text()
    assert not diagnose(str(tmp_path / "l.jsonl")).is_beyond_end


def test_healthy_means_no_more_than_what_is_known(tmp_path: Path) -> None:
    config = load_config("guide")
    healthy = list(lines(config))
    log = tmp_path / "metrics.jsonl"

    def said(events: list[dict[str, Any]]) -> str:
        log.write_text("".join(json.dumps(event) + "\n" for event in events))
        found = diagnose(str(log), config)
        assert found.is_healthy
        return found.text().splitlines()[-1]

    assert said(healthy) == "healthy: nothing needs to be done"
    assert "too early to tell (lines of losses: 2)" in said(healthy[:2])
    low = [event | {"loss_d": 0.6} if event["event"] == "train" else event for event in healthy]
    assert said(low).endswith("nothing is wrong by the rules, but it is off the guide's timeline")


def test_losses_without_a_discriminator_are_those_of_supervised_training(tmp_path: Path) -> None:
    none = dict.fromkeys(("loss_fm", "loss_st", "loss_d", "st_count"), lambda at: 0.0)
    log = tmp_path / "train.log"
    log.write_text(console(lines(**none), 50_000))
    for config in (None, load_config("guide")):
        found = diagnose(str(log), config)
        assert found.verdict.findings == ()
        assert "judged as trained with train.supervised_only" in found.text()
    # The run's own configuration knows better.
    (tmp_path / run.CONFIG).write_text(load_config("guide").to_yaml())
    assert "d_collapsed" in {one.rule for one in diagnose(str(log)).verdict.findings}


def test_a_last_score_far_below_the_best_is_said(tmp_path: Path) -> None:
    healthy = list(lines(until=20_000))
    last = {**next(e for e in reversed(healthy) if e["event"] == "eval")}
    events = [*healthy, {**last, "iteration": 20_500, "val_miou": 0.40, "train_miou": 0.45}]
    found = diagnose(str(ledger(tmp_path / "metrics.jsonl", events)))
    assert found.best is not None
    assert (
        f"the best validation mIoU was {found.best[1]:.4f} at iteration {found.best[0]}: use"
        in (found.text())
    )
    assert found.to_dict()["best_iteration"] == found.best[0]
    assert not diagnose(str(ledger(tmp_path / "metrics.jsonl", healthy))).is_past_its_best


def test_what_the_checklist_refuses_is_not_healthy(tmp_path: Path) -> None:
    scores = [e | {"train_miou": 0.69, "val_miou": 0.50} for e in lines(until=1_000)]
    path = ledger(tmp_path / "metrics.jsonl", scores)
    found = diagnose(str(path))
    assert not found.is_healthy
    assert found.text().endswith(
        "the last evaluations say a gap of 0.190, which should stay below 0.15"
    )


def test_scores_alone_are_judged_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(console((e for e in lines() if e["event"] == "eval"), 50_000))
    said = diagnose(str(log)).text()
    assert said.endswith(
        "healthy: nothing is wrong with the scores; of the losses there is no line"
    )


def test_more_blanks_between_the_parts_of_a_line_are_no_matter(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(console(lines(**GUESSING), 50_000).replace(" | ", "  |   "))
    assert [one.rule for one in diagnose(str(log)).verdict.findings] == ["d_stuck"]


def test_one_unlucky_evaluation_is_no_reason_to_worry(tmp_path: Path) -> None:
    events = list(lines())
    last = events[-1]
    assert last["event"] == "eval"
    last["val_miou"] = last["train_miou"] - 0.24
    found = diagnose(str(ledger(tmp_path / "metrics.jsonl", events)))
    assert found.verdict.fit == "overfitting"
    assert found.is_healthy


def test_a_line_of_the_checklist_is_no_crash(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    events = list(lines(until=2_000))
    log.write_text(
        console(events, 50_000)
        + "Finished after 2000 iterations; best validation mIoU 0.4 at iteration 2000.\n"
        "  [ ] Training completed without errors: 2 attempts ended with an error: training "
        "diverged: Loss_CE is nan\n"
        "  [ ] Training completed without errors: an attempt ended with an error: CUDA out of "
        "memory with batches of 8\n"
    )
    found = diagnose(str(log))
    assert found.verdict.findings == ()
    assert found.ended == "training is over: finished"


def test_a_log_says_itself_how_often_it_was_written(tmp_path: Path) -> None:
    train = Config().train.model_copy(update={"iterations": 400, "log_every": 10})
    config = Config().model_copy(update={"train": train})
    early = lines(config, until=100, loss_d=lambda at: 0.693 if at < 8_000 else None)
    log = tmp_path / "train.log"
    log.write_text(console(early, 400))
    assert [one.rule for one in diagnose(str(log)).verdict.findings] == []
