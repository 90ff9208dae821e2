"""The report's charts, as SVG in the page: curves over the guide's bands, and the run over time.

Source of the bands: S4GAN Training Monitoring Guide, "Target values".
"""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.monitor.attempts import Attempt
from job.monitor.guide import (
    ITERATIONS,
    MAX_GAP,
    NORMAL_GAP,
    OVERFIT_GAP,
    PHASES,
    TARGETS,
    Scale,
    miou_band,
)
from job.monitor.health import LABELS, Finding
from job.monitor.rules import rules_by_id
from job.monitor.setting import Setting

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"
"""Okabe and Ito's, which those who see few colours can tell apart."""
_BAND = "#cfe8dd"
_MAX_POINTS = 1_200
_SMOOTHED = 9
"""Points whose median is the strong line; losses of single iterations jump."""
_SIZE_INCHES = (5.6, 2.9)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A picture in the page."""

    title: str
    svg: str


@dataclass(frozen=True)
class _Line:
    label: str
    colour: str
    points: Points
    smooth: bool = False


def training_charts(
    events: Sequence[Mapping[str, Any]], setting: Setting, findings: Sequence[Finding]
) -> list[Chart]:
    """Losses, ST_Count, scores, gap and learning rates over iterations.

    Args:
        events: the ledger.
        setting: of the run; its length scales the bands.
        findings: all of the run's; each is marked in the chart of its metric by its number there.
    """
    scale = setting.scale
    train = [event for event in events if event["event"] == "train"]
    scores = [event for event in events if event["event"] == "eval"]
    resumed = sorted(
        {event["resumed_at"] for event in events if event["event"] == "training_started"} - {0}
    )

    def chart(
        title: str, lines: Sequence[_Line], watched: Sequence[str], **more: Any
    ) -> Chart | None:
        if not any(line.points for line in lines):
            return None
        return _chart(title, lines, _marks(findings, watched), resumed, scale, **more)

    def loss(metric: str, watched: Sequence[str] = ()) -> Chart | None:
        line = _Line(LABELS[metric], BLUE, _points(train, metric), smooth=True)
        return chart(LABELS[metric], [line], (metric, *watched), bands=_target_bands(metric, scale))

    miou = [
        _Line(LABELS[name], colour, _points(scores, name))
        for name, colour in (("train_miou", ORANGE), ("val_miou", BLUE))
    ]
    gap = [
        (event["iteration"], event["train_miou"] - event["val_miou"])
        for event in scores
        if math.isfinite(event["train_miou"] - event["val_miou"])
    ]
    rates = [
        _Line(label, colour, _points(train, name))
        for name, label, colour in (
            ("lr_g", "generator", BLUE),
            ("lr_d", "discriminator", ORANGE),
        )
        if name == "lr_g" or setting.is_adversarial
    ]
    found = [loss("loss_ce", ["non_finite"])]
    if setting.is_adversarial:
        found += [loss("loss_d"), loss("loss_fm"), loss("loss_st"), loss("st_count")]
    found += [
        chart(
            "mIoU",
            miou,
            ("train_miou", "val_miou", "score_non_finite", "dead_classes"),
            curve=_miou_curve(scale),
        ),
        chart(
            "Train/val gap",
            [_Line("gap", BLUE, gap)],
            ("gap", "lead"),
            limits={"normal": NORMAL_GAP, "too large at the end": MAX_GAP, "problem": OVERFIT_GAP},
        ),
        chart("Learning rates", rates, ("lr_g", "lr_d"), log=True),
    ]
    return [one for one in found if one is not None]


def time_chart(attempts: Sequence[Attempt]) -> Chart | None:
    """Iterations over hours, attempt by attempt, with what was start-up and what was lost.

    Args:
        attempts: of the run, in order.
    """
    trained = [one for one in attempts if one.training_since is not None]
    if not trained:
        return None
    begin = attempts[0].started
    whole_s = max(one.last_seen for one in attempts) - begin
    unit, seconds = ("hours", 3600) if whole_s > 2 * 3600 else ("minutes", 60)
    axes = _axes()

    def since_begin(at: float) -> float:
        return (at - begin) / seconds

    lost_said = start_said = False
    for one in attempts:
        since = one.training_since or one.last_seen
        axes.axvspan(
            since_begin(one.started),
            since_begin(since),
            color="#dddddd",
            lw=0,
            label=None if start_said else "starting",
        )
        start_said = True
        kept = one.counts_until if one.counts_until is not None else since
        if one.redone_s > 0 and one.exit_code != 0:
            axes.axvspan(
                since_begin(max(kept, since)),
                since_begin(one.last_seen),
                color="#f6d5c3",
                lw=0,
                label=None if lost_said else "lost",
            )
            lost_said = True
        points = [(since, float(one.resumed_at or 0))] if one.training_since is not None else []
        points += [(at, float(iteration)) for iteration, at in one.marks]
        thin = _thin([(since_begin(at), value) for at, value in points])
        axes.plot(*zip(*thin, strict=True), color=BLUE, lw=1.6) if thin else None
        if one.number > 1:
            axes.axvline(since_begin(one.started), color=GREY, lw=0.8, ls=":")
            axes.annotate(
                str(one.number),
                (since_begin(one.started), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, -9),
                textcoords="offset points",
                fontsize=7,
                color=GREY,
            )
    axes.set_xlabel(f"{unit} since the first attempt began")
    axes.set_ylabel("iteration")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, fontsize=7, loc="lower right", frameon=False)
    return Chart("Iterations over time", _svg(axes.figure, "Iterations over time"))


# ---------------------------------------------------------------- one chart


def _chart(
    title: str,
    lines: Sequence[_Line],
    marks: Sequence[tuple[int, str, bool]],
    resumed: Sequence[int],
    scale: Scale,
    *,
    bands: Sequence[tuple[float, float, float, float]] = (),
    curve: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None,
    limits: Mapping[str, float] | None = None,
    log: bool = False,
) -> Chart:
    axes = _axes()
    for left, right, low, high in bands:
        axes.fill_between([left, right], low, high, color=_BAND, lw=0, zorder=0)
    if curve is not None:
        axes.fill_between(*curve, color=_BAND, lw=0, zorder=0)
    for name, value in (limits or {}).items():
        axes.axhline(value, color=GREY, lw=0.8, ls="--")
        axes.annotate(
            name,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 1),
            textcoords="offset points",
            fontsize=7,
            color=GREY,
            ha="right",
            va="bottom",
        )
    for line in lines:
        _draw(axes, line)
    if log:
        axes.set_yscale("log")
    else:
        tops = [band[3] for band in bands] + list((limits or {}).values())
        tops += [max(curve[2])] if curve is not None else []
        _limit(axes, [value for line in lines for _, value in line.points], tops)
    last = max(point[0] for line in lines for point in line.points)
    axes.set_xlim(0, 1.015 * last)  # the last dot is whole
    for end in (scale.at(phase.end) for phase in PHASES[:-1]):
        if end < last:
            axes.axvline(end, color="#bbbbbb", lw=0.6)
    for at in resumed:
        if at < last:
            axes.axvline(at, color=GREY, lw=0.6, ls=":")
    for number, (at, name, is_open) in enumerate(marks):
        colour = RED if is_open else GREY
        axes.axvline(at, color=colour, lw=1.2)
        axes.annotate(
            name,
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -7 - 12 * (number % 4)),
            textcoords="offset points",
            fontsize=7,
            color="white",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.25", "fc": colour, "ec": "none"},
        )
    axes.set_xlabel("iteration")
    if len(lines) > 1:
        axes.legend(fontsize=7, frameon=False)
    return Chart(title, _svg(axes.figure, title))


def _axes() -> Any:
    # Not above: an attempt should not wait for it before it trains.
    from matplotlib.figure import Figure

    axes = Figure(figsize=_SIZE_INCHES, layout="constrained").subplots()
    axes.grid(alpha=0.25, lw=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _draw(axes: Any, line: _Line) -> None:
    if not line.points:
        return
    raw = _thin(line.points)
    if not line.smooth or len(line.points) < 2 * _SMOOTHED:
        style = {"marker": "o", "ms": 2.5 if len(raw) > 1 else 5} if len(raw) <= 60 else {}
        axes.plot(*zip(*raw, strict=True), color=line.colour, lw=1.6, label=line.label, **style)
        return
    axes.plot(*zip(*raw, strict=True), color=line.colour, lw=0.6, alpha=0.35)
    smooth = _thin(_medians(line.points))
    axes.plot(*zip(*smooth, strict=True), color=line.colour, lw=1.6, label=line.label)


def _limit(axes: Any, values: Sequence[float], tops: Sequence[float]) -> None:
    """Show what is usual; a few values far above are told of in a corner."""
    ordered = sorted(values)
    usual = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    top = max([usual * 1.3, *(1.1 * one for one in tops)])
    low = min(0.0, ordered[0] * 1.1)
    if top <= low:
        top = low + 1.0
    if ordered[-1] <= 2 * top:
        top = max(top, ordered[-1] * 1.05)
    else:
        axes.annotate(
            f"up to {ordered[-1]:.3g}",
            (1, 1),
            xycoords="axes fraction",
            xytext=(-3, -3),
            textcoords="offset points",
            fontsize=7,
            color=RED,
            ha="right",
            va="top",
        )
    axes.set_ylim(low, top)


def _svg(figure: Any, title: str) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    # The same input gives the same page; each chart has ids of its own.
    with rc_context({"svg.hashsalt": f"s4gan {title}", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)  # matplotlib's groups: figure_1, axes_1, ...
    label = html.escape(title, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


# ---------------------------------------------------------------- what is drawn


def _points(events: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    found = ((event["iteration"], event.get(metric)) for event in events)
    return [
        (float(at), float(value))
        for at, value in found
        if value is not None and math.isfinite(value)
    ]


def _medians(points: Points) -> list[tuple[float, float]]:
    half = _SMOOTHED // 2
    values = [value for _, value in points]
    return [
        (at, statistics.median(values[max(0, number - half) : number + half + 1]))
        for number, (at, _) in enumerate(points)
    ]


def _thin(points: Points) -> list[tuple[float, float]]:
    """Few enough to draw; of neighbours the lowest and the highest stay."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MAX_POINTS)
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), size):
        block = points[first : first + size]
        ends = {min(block, key=lambda p: p[1]), max(block, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _target_bands(metric: str, scale: Scale) -> list[tuple[float, float, float, float]]:
    scaled = [band.scaled(metric, scale) for band in TARGETS[metric]]
    return [(band.begin, band.end, band.low, band.high) for band in scaled]


def _miou_curve(scale: Scale) -> tuple[list[float], list[float], list[float]]:
    """Of validation, from where the guide first says what to expect."""
    at = [500 + step * (ITERATIONS - 500) / 60 for step in range(61)]
    bands = [miou_band("val_miou", iteration) for iteration in at]
    return (
        [float(scale.at(iteration)) for iteration in at],
        [low for low, _ in bands],
        [high for _, high in bands],
    )


def _marks(findings: Sequence[Finding], watched: Sequence[str]) -> list[tuple[int, str, bool]]:
    """(iteration, number, whether it is not over) of those findings that belong into a chart."""
    rules = rules_by_id()
    return [
        (finding.since, str(number), finding.ended is None)
        for number, finding in enumerate(findings, start=1)
        if rules[finding.rule].metric in watched
    ]
