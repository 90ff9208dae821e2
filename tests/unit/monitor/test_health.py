"""Episodes, resumes, the timeline: the rules over a run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from job.config import Config, load_config
from job.monitor.guide import PHASES, Scale, fit_of, miou_band, phase_at
from job.monitor.health import Finding, Watch, _Lines
from job.monitor.setting import Setting
from tests.series import CLASSES, findings, lines


def watch(config: Config | None = None) -> Watch:
    return Watch(Setting(config or Config(), CLASSES))


# ---------------------------------------------------------------- episodes


def test_an_episode_is_told_of_at_its_beginning_and_at_its_end() -> None:
    high = watch()
    told: list[tuple[int, Finding]] = []
    for line in lines(loss_d=lambda at: 1.5 if 9_000 <= at < 12_000 else None):
        told += [(line["iteration"], finding) for finding in high.observe(line)]
    (began, first), (over, last) = told
    assert (first.rule, last.rule) == ("d_unstable", "d_unstable")
    assert 9_000 < began <= 9_500
    assert 12_000 < over <= 13_500
    assert (first.ended, last.ended) == (None, over)
    assert high.findings == [last]
    assert high.open == []
    assert last.line().startswith(f"over: Loss_D is {last.value:.3f}")


def test_what_swings_around_the_limit_is_one_episode() -> None:
    swinging = findings(loss_d=lambda at: 1.04 if (at // 1_000) % 2 else 0.97)
    assert [(one.rule, one.ended) for one in swinging] == [("d_unstable", None)]


def test_a_second_episode_is_told_of_again() -> None:
    twice = findings(loss_ce=lambda at: 12.0 if at in (10_000, 30_000) else None)
    assert [(one.rule, one.iteration) for one in twice] == [
        ("ce_spike", 10_000),
        ("ce_spike", 30_000),
    ]


def test_one_cause_is_told_of_once() -> None:
    """Underfitting and a low validation score are what a model that learns nothing looks like."""
    nothing = findings(train_miou=lambda at: 0.15, val_miou=lambda at: 0.14)
    assert [one.rule for one in nothing] == ["train_not_learning"]


def test_what_ended_an_attempt_is_over_when_the_training_goes_on() -> None:
    one = watch()
    train = next(lines())
    one.observe(train)
    (found,) = one.observe({"event": "attempt_ended", "exit_code": 70, "reason": "diverged"})
    assert found.rule == "non_finite"
    assert found.counts
    (over,) = one.observe({**train, "iteration": 200})
    assert (over.rule, over.ended) == ("non_finite", 200)


def test_what_ended_an_attempt_is_over_where_it_happened_and_not_before() -> None:
    """The lines from the checkpoint on are gone from the ledger; how the attempt ended is not."""
    one = watch()
    ended = {"event": "attempt_ended", "exit_code": 78, "reason": "CUDA out of memory with"}
    (found,) = one.observe({**ended, "reached": 300})
    assert (found.iteration, found.since) == (300, 300)
    train = next(lines())
    assert one.observe({**train, "iteration": 200}) == []
    assert one.observe({**train, "iteration": 300}) == []  # the last line before it
    (over,) = one.observe({**train, "iteration": 400})
    assert (over.rule, over.ended) == ("out_of_memory", 400)


@pytest.mark.parametrize(
    ("code", "reason", "rule"),
    [(70, "training diverged", "non_finite"), (78, "CUDA out of memory with", "out_of_memory")],
)
def test_attempts_that_end_at_the_same_place_are_one_episode(
    code: int, reason: str, rule: str
) -> None:
    """Rolled back, they train the last lines before it once more, and were over with those."""
    first, *again = lines(until=300)
    ended = {"event": "attempt_ended", "exit_code": code, "reason": reason, "reached": 300}
    one = watch()
    for event in (first, ended, *again, ended):  # what the ledger of the second attempt holds
        one.observe(event)
    assert [(each.rule, each.since, each.ended) for each in one.findings] == [(rule, 300, None)]


def test_what_ended_an_attempt_is_over_when_the_run_has_finished() -> None:
    """Maybe without another line: it happened behind the last one."""
    one = watch()
    ended = {"event": "attempt_ended", "reason": "CUDA out of memory with", "reached": 50_000}
    one.observe(ended | {"exit_code": 78})
    (over,) = one.observe(ended | {"exit_code": 0, "reason": "finished"})
    assert over.rule == "out_of_memory"
    assert not over.counts


@pytest.mark.parametrize("every", [2, 7, 20, 40])
def test_a_loss_that_is_nan_now_and_then_is_one_episode(every: int) -> None:
    found = findings(loss_ce=lambda at: math.nan if at // 100 % every == 0 else None, until=9_900)
    assert [(one.rule, one.ended) for one in found] == [("non_finite", None)]


def test_a_loss_that_was_nan_once_is_over_at_last() -> None:
    (found,) = findings(loss_ce=lambda at: math.nan if at == 5_000 else None)
    assert (found.rule, found.since, found.ended) == ("non_finite", 5_000, 10_000)


@pytest.mark.parametrize("metric", ["train_miou", "val_miou"])
def test_a_score_that_is_nan_now_and_then_is_one_episode(metric: str) -> None:
    bad: Any = {metric: lambda at: math.nan if at // 500 % 3 == 0 and at < 40_000 else None}
    (found,) = findings(**bad)
    assert (found.rule, found.iteration, found.ended) == ("score_non_finite", 1_500, 40_500)


def test_out_of_memory_names_the_batch_to_try() -> None:
    reason = "CUDA out of memory with batches of 4"
    (found,) = watch().observe({"event": "attempt_ended", "exit_code": 78, "reason": reason})
    assert "--batch-size 2 --set train.accumulate=8" in found.remedies


def test_an_attempt_that_ended_otherwise_is_no_finding() -> None:
    one = watch()
    for code in (0, 74, 75, 76, 130):
        assert one.observe({"event": "attempt_ended", "exit_code": code, "reason": "x"}) == []


def test_the_same_lines_give_the_same_findings() -> None:
    """Which is why a resumed run needs no other state than its ledger."""
    fault: Any = {"loss_d": lambda at: 1.5 if at > 20_000 else None}
    whole, resumed = watch(), watch()
    told = []
    for line in lines(**fault):
        whole.observe(line)
    for line in lines(until=20_200, **fault):
        resumed.observe(json.loads(json.dumps(line)))
    for line in list(lines(**fault)):
        if line["iteration"] > 20_200:
            told += resumed.observe(line)
    assert resumed.findings == whole.findings
    assert [one.rule for one in told] == ["d_unstable"]


def test_a_finding_is_json() -> None:
    (found,) = findings(loss_d=lambda at: 1.5 if at > 20_000 else None)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["rule"] == "d_unstable"


# ---------------------------------------------------------------- the timeline


@pytest.mark.parametrize(
    ("iteration", "name"),
    [
        (1, "warm-up"),
        (1_000, "warm-up"),
        (1_001, "early learning"),
        (5_000, "early learning"),
        (20_000, "main training"),
        (20_001, "convergence"),
        (50_000, "convergence"),
        (60_000, "convergence"),
    ],
)
def test_the_guides_own_phases(iteration: int, name: str) -> None:
    assert phase_at(iteration, Scale()).name == name


def test_in_another_run_warm_up_ends_where_self_training_begins() -> None:
    scale = Scale(iterations=1_200, st_start=400, max_st_count=8)
    assert [scale.at(phase.end) for phase in PHASES] == [400, 465, 710, 1_200]
    assert scale.count(16) == 8
    # Without self-training there is nothing that could say so.
    assert Scale(iterations=5_000, st_start=5_000).at(1_000) == 100


@pytest.mark.parametrize("until", [900, 4_500, 15_000, 50_000])
def test_a_run_as_the_guide_wants_it_is_on_track(until: int) -> None:
    one = watch()
    phase = phase_at(until, Scale())
    for line in lines(until=until):
        middle = {
            metric: (low + high) / 2
            for metric, (low, high, _) in phase.bands.items()
            if metric in line
        }
        one.observe({**line, **middle})
    standing = one.standing()
    assert standing is not None
    assert standing.on_track, standing.line()
    number = PHASES.index(phase) + 1
    assert standing.line() == f"Phase {number} of 4, {phase.name}: on track"


def test_what_is_off_the_timeline_is_named_with_its_band() -> None:
    one = watch()
    for line in lines(until=15_000, loss_ce=lambda at: 2.5, st_count=lambda at: 3):
        one.observe(line)
    standing = one.standing()
    assert standing is not None
    assert standing.off[0] == "Loss_CE 2.500 (0.8 to 1.5)"
    assert "ST_Count 3.000 (5 to 12)" in standing.off


def test_better_than_the_timeline_is_not_off_it() -> None:
    one = watch()
    better = {"loss_ce": 0.1, "loss_st": 0.1, "loss_d": 0.3, "st_count": 16, "val_miou": 0.9}
    for line in lines(until=15_000):
        one.observe({**line, **{key: value for key, value in better.items() if key in line}})
    standing = one.standing()
    assert standing is not None
    assert standing.on_track, standing.line()


def test_before_anything_is_known_nothing_is_said() -> None:
    assert watch().standing() is None
    assert watch().fit() is None


# ---------------------------------------------------------------- the table of fits


@pytest.mark.parametrize(
    ("train", "val", "fit"),
    [
        (0.75, 0.72, "excellent"),
        (0.68, 0.62, "good"),
        (0.80, 0.68, "slight overfit"),
        (0.85, 0.60, "overfitting"),
        (0.35, 0.33, "underfitting"),
        (0.85, 0.55, "overfitting"),
        (0.60, 0.65, "excellent"),  # validation better: no overfit
        (0.45, 0.10, "overfitting"),
        (0.22, 0.70, "unclear"),  # the guide does not have it
        (0.55, 0.65, "excellent"),
    ],
)
def test_the_guides_table(train: float, val: float, fit: str) -> None:
    assert fit_of(train, val) == fit


@pytest.mark.parametrize(
    "scale", [Scale(), Scale(2_000, 200, 8), Scale(100_000, 30_000, 4), Scale(2_000, 0, 8)]
)
def test_the_guides_iteration_is_the_way_back(scale: Scale) -> None:
    for iteration in range(1, scale.iterations + 1, scale.iterations // 50):
        assert scale.at(scale.of_guide(iteration)) == iteration


def test_low_scores_are_a_status_once_others_are_high() -> None:
    one = watch()
    early = {"event": "eval", "iteration": 5_000, "train_miou": 0.35, "val_miou": 0.33}
    one.observe(early)
    assert one.fit() == "too early to tell"
    one.observe({**early, "iteration": 25_000})
    assert one.fit() == "underfitting"


def test_a_run_in_the_guides_table_of_scores_is_on_its_timeline() -> None:
    one = watch()
    for at in (7_000, 20_500, 25_000):
        low, high = miou_band("val_miou", at)
        one.observe({"event": "eval", "iteration": at, "train_miou": high, "val_miou": low + 0.01})
        standing = one.standing()
        assert standing is not None
        assert standing.on_track, standing.line()


def test_a_loss_that_is_no_number_is_not_on_track() -> None:
    one = watch()
    for line in lines(until=1_000, loss_ce=lambda at: math.nan if at > 800 else None):
        one.observe(line)
    standing = one.standing()
    assert standing is not None
    assert "a loss is NaN or infinite" in standing.off


def test_what_a_finding_says_is_what_it_is_now() -> None:
    one = watch()
    for line in lines(
        until=20_000, train_miou=lambda at: 0.5 + at / 40_000, val_miou=lambda at: 0.4
    ):
        one.observe(line)
    found = next(each for each in one.open if each.rule == "overfitting")
    assert f"{found.value:.2f}" == "0.59"
    assert "0.59" in found.message


def test_scores_between_the_guides_iterations_are_on_a_line() -> None:
    assert miou_band("val_miou", 10_000) == (0.50, 0.65)
    assert miou_band("val_miou", 7_500) == pytest.approx((0.45, 0.60))
    assert miou_band("train_miou", 0) == (0.25, 0.40)
    assert miou_band("train_miou", 90_000) == (0.70, 0.85)


def test_a_score_that_is_no_number_is_told_of_and_has_no_fit() -> None:
    one = watch(load_config("demo"))
    good = {"event": "eval", "iteration": 100, "train_miou": 0.5, "val_miou": 0.5}
    one.observe(good)
    (found,) = one.observe(good | {"iteration": 200, "val_miou": math.nan})
    assert (found.rule, found.severity) == ("score_non_finite", "problem")
    assert one.fit() is None
    one.observe(good | {"iteration": 300})
    assert one.fit() == "excellent"


def test_targets_that_the_timeline_does_not_speak_of_count_as_well() -> None:
    watch = Watch(Setting(Config(), CLASSES))
    for line in lines(until=30_000, loss_fm=lambda at: 0.2, train_miou=lambda at: 0.60):
        watch.observe(line)
    standing = watch.standing()
    assert standing is not None
    assert [said.partition(" (")[0] for said in standing.off] == [
        "training mIoU 0.6000",
        "Loss_FM 0.200",
    ]


def test_a_new_attempt_is_not_off_for_the_nan_of_the_one_before() -> None:
    watch = Watch(Setting(Config(), CLASSES))
    healthy = list(lines(until=20_000))
    crash = {"event": "attempt_ended", "exit_code": 70, "reason": "training diverged: NaN"}
    for line in [*healthy, crash]:
        watch.observe(line)
    standing = watch.standing()
    assert standing is not None
    assert standing.off == ("a loss is NaN or infinite",)
    watch.observe({"event": "attempt_started", "attempt": 2})
    standing = watch.standing()
    assert standing is not None
    assert standing.on_track


def test_lines_that_go_back_are_what_was_trained_again() -> None:
    broken = list(
        lines(
            until=30_000,
            loss_ce=lambda at: 10.0 if at > 20_000 else 0.5,
            loss_fm=lambda at: 0.01 * 30 ** min(1, max(0, (at - 10_000) / 5_000)),
        )
    )
    watch = Watch(Setting(Config(), CLASSES))
    for line in [*broken, *broken[:100], *reversed(broken), *lines(until=30_000)]:
        watch.observe(line)
    assert watch.open == []
    assert {"ce_spike", "fm_rising"} <= {one.rule for one in watch.findings}


# ---------------------------------------------------------------- how often is logged


def logged(log_every: int, iterations: int = 50_000, st_start: int = 1_000) -> Config:
    config = Config()
    train = config.train.model_copy(
        update={"log_every": log_every, "eval_every": iterations // 10, "iterations": iterations}
    )
    loss = config.loss.model_copy(update={"st_start": st_start})
    return config.model_copy(update={"train": train, "loss": loss})


def told(config: Config, **curves: Any) -> list[tuple[str, int]]:
    return [(one.rule, one.iteration) for one in findings(config, **curves)]


@pytest.mark.parametrize("log_every", [100, 50, 30, 10, 1])
def test_what_begins_late_is_no_fault_however_often_is_logged(log_every: int) -> None:
    late: dict[str, Any] = {
        "loss_d": lambda at: 0.69 if at < 1_300 else None,
        "loss_fm": lambda at: 0.0004 if at < 1_300 else None,
        "st_count": lambda at: 0 if at < 1_600 else None,
    }
    assert told(logged(log_every), until=4_000, **late) == []


@pytest.mark.parametrize("log_every", [50, 20, 10, 1])
def test_what_is_wrong_is_told_at_the_same_time_however_often_is_logged(log_every: int) -> None:
    wrong: dict[str, Any] = {
        "loss_d": lambda at: 0.693,
        "loss_fm": lambda at: 0.0,
        "st_count": lambda at: 0,
    }
    expected = told(logged(100), until=9_000, **wrong)
    assert [rule for rule, _ in expected] == [
        "fm_zero",
        "d_stuck",
        "st_count_zero",
        "st_never_active",
    ]
    assert told(logged(log_every), until=9_000, **wrong) == expected


@pytest.mark.parametrize(
    ("iterations", "log_every", "st_start"), [(1_000, 100, 200), (5_000, 500, 1_000), (300, 25, 50)]
)
def test_a_run_of_few_lines_is_judged_by_few(
    iterations: int, log_every: int, st_start: int
) -> None:
    config = logged(log_every, iterations, st_start)
    wrong: dict[str, Any] = {
        "loss_d": lambda at: 0.693,
        "loss_fm": lambda at: 0.0,
        "st_count": lambda at: 0,
    }
    found = {rule for rule, _ in told(config, **wrong)}
    assert found == {"fm_zero", "d_stuck", "st_count_zero", "st_never_active"}
    assert told(config) == []


def test_lines_that_are_trained_again_make_the_same_findings() -> None:
    config = logged(10)
    events = list(lines(config, until=6_000, loss_d=lambda at: 0.693))
    at = next(i for i, event in enumerate(events) if event["iteration"] == 2_330)
    back = next(i for i, event in enumerate(events) if event["iteration"] == 1_970)
    once, again = watch(config), watch(config)
    for event in events:
        once.observe(event)
    for event in events[:at] + events[back:]:
        again.observe(event)
    assert again.findings == once.findings != []


def test_a_line_stands_for_those_before_it() -> None:
    dense = _Lines(every=100)
    order = [*range(30, 301, 30), *range(210, 301, 30)]  # the last hundred again
    shown = {(at, len(dense.add(at, {"loss_ce": float(at)}))) for at in order}
    assert {at for at, count in shown if count} == {90, 180, 300}
    dense = _Lines(every=100)
    values = [dense.add(at, {"loss_ce": at, "st_count": at / 50, "lr_g": at}) for at in (50, 100)]
    assert values == [{}, {"loss_ce": 75, "st_count": 1.5, "lr_g": 100}]


# ---------------------------------------------------------------- what is so by now


def test_a_sign_that_is_not_seen_any_more_says_so_before_it_is_over() -> None:
    one = watch()
    said: set[str] = set()
    for event in lines(until=14_000, loss_d=lambda at: 1.5 if 9_000 <= at < 12_000 else None):
        one.observe(event)
        said |= {finding.when() for finding in one.open}
    (finding,) = one.findings
    unseen = int(next(when for when in said if "not seen" in when).split()[-2])
    assert said == {
        f"since iteration {finding.since}",
        f"since iteration {finding.since}, not seen from {unseen} on",
    }
    assert finding.ended is not None
    assert 12_000 < unseen < finding.ended
    assert finding.unseen_since is None


def test_scores_that_have_fallen_are_no_underfitting() -> None:
    fallen: dict[str, Any] = {
        "val_miou": lambda at: 0.36 if at < 20_000 else 0.15,
        "train_miou": lambda at: 0.38 if at < 20_000 else 0.16,
    }
    rules = {one.rule for one in findings(**fallen) if one.ended is None}
    assert {"train_degrading", "val_degrading"} <= rules
    assert "underfitting" not in rules


@pytest.mark.parametrize("st_start", [24, 400])
def test_a_stretch_of_time_is_as_long_wherever_the_warm_up_ends(st_start: int) -> None:
    scale = Scale(1_200, st_start)
    assert scale.length(15_000) == pytest.approx(scale.at(25_000) - scale.at(10_000), abs=1)
