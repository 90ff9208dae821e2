"""`report.html`: one page that needs nothing else, on what a run has come to.

Made at every evaluation, at the end, and by `s4gan report` from the files of a run.
"""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from job import run
from job.config import Config, config_from_yaml
from job.errors import ConfigError, ObjectNotFound, StorageError
from job.monitor.attempts import Attempt, attempts_of
from job.monitor.charts import Chart, time_chart, training_charts
from job.monitor.health import Finding
from job.monitor.ledger import best_of, parse_ledger
from job.monitor.setting import Setting
from job.monitor.summary import BEST_VERIFIES, COMPLETED, Check, checklist
from job.monitor.verdict import Verdict, verdict, why_nothing
from job.storage import ObjectStore

MAX_CLASSES_SHOWN = 30
"""Of a confusion matrix; of more classes only the pairs that are confused most."""
_CONFUSED_SHOWN = 10
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
  color: #1b1b1b; background: #fff }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1rem; margin: .4rem 0 }
table { border-collapse: collapse }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.yes { color: #14713a } .no { color: #a61b1b } .muted { color: #666 }
.verdict { font-size: 1.15rem; margin: .3rem 0 }
.bar { background: #0072b2; height: .7rem; min-width: 1px }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)) }
figure { margin: 0; break-inside: avoid }
img, svg { max-width: 100%; height: auto }
.wide { overflow-x: auto }
.confusion td, .confusion th { padding: .15rem .35rem; font-size: .8rem; text-align: right }
.confusion th.row { text-align: left }
.confusion thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left }
ol.findings li { margin-bottom: .5rem } ol.findings li.over { color: #666 }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; font-size: .85rem }
@media print { body { max-width: none; font-size: 11pt } pre { white-space: pre-wrap }
  .wide { overflow: visible } h2, h3 { break-after: avoid } img { max-height: 21cm } }
@media (max-width: 30rem) { td, th { padding-right: .5rem } .charts { grid-template-columns: 1fr } }
"""


class BestEvaluation(BaseModel):
    """`best_evaluation.json`: the validation images as the best model sees them."""

    iteration: int
    classes: tuple[str, ...]
    confusion: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...]
    """Pixels by class; rows truth, columns prediction."""
    images: dict[str, float]
    """mIoU of each image alone."""

    @model_validator(mode="after")
    def _is_square(self) -> BestEvaluation:
        if any(len(row) != len(self.classes) for row in (self.confusion, *self.confusion)):
            raise ValueError("the confusion matrix does not fit the classes")
        return self


@dataclass(frozen=True)
class Report:
    """What the page is made from."""

    run_uri: str
    config: Config
    classes: Sequence[str]
    """In class order; empty if they are not known."""
    events: Sequence[Mapping[str, Any]]
    """The ledger."""
    checks: Sequence[Check]
    """The guide's checklist, as far as it can be filled in."""
    finished: bool = False
    stopped: str = ""
    """Why it ended before its last iteration; empty if it did not."""
    best: BestEvaluation | None = None
    pictures: bytes = b""
    """`predictions.png`; empty if there is none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: name to value."""
    costs: Sequence[str] = ()
    """Sentences."""
    health: Verdict | None = None
    """On these events, where it is known already; None: the page runs the rules itself."""


def report_html(report: Report) -> str:
    """The page; the same for the same input.

    Args:
        report: what it is made from.
    """
    num_classes = len(report.classes) or None
    found = report.health or verdict(report.events, report.config, num_classes)
    setting = Setting(found.remedies.applied(report.config), num_classes)
    attempts = attempts_of(event for event in report.events if "time" in event)
    charts = training_charts(report.events, setting, found.findings)
    parts = [
        f"<h1>{_text(report.run_uri)}</h1>",
        *_verdict(report, found),
        "<h2>Checklist</h2>" + ("" if report.finished else "<p class='muted'>So far.</p>"),
        _checklist(report.checks, finished=report.finished, failed=bool(found.failed)),
        *_findings(found.findings),
        "<h2>Training</h2>",
        _legend(found.findings) + _figures(charts) if charts else "<p>Nothing was logged yet.</p>",
        *_classes(report),
        *_pictures(report),
        *_attempts(attempts, report),
        "<h2>Provenance</h2>",
        _table([(name, _text(value)) for name, value in report.facts.items()]),
        "<h2>Configuration</h2>",
        f"<pre>{_text(report.config.to_yaml())}</pre>",
    ]
    body = "\n".join(part for part in parts if part)
    name = report.run_uri.rstrip("/").rpartition("/")[2]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>S4GAN run {_text(name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


# ---------------------------------------------------------------- the parts, from the top


def _verdict(report: Report, found: Verdict) -> list[str]:
    scores = [event for event in report.events if event["event"] == "eval"]
    best = best_of(report.events)
    reached = max((event.get("iteration", 0) for event in report.events), default=0)
    of = report.config.train.iterations
    if report.finished:
        said = f"Finished after {reached} iterations"
        said += f": {_text(report.stopped)}." if report.stopped else "."
    else:
        said = f"At iteration {reached} of {of}."
        if reached > of:
            said += " That is beyond its end: config.yaml is not what it was trained with."
    if best is None:
        said += " No evaluation yet." if not scores else " No validation mIoU is a number."
    else:
        said += (
            f" Best validation mIoU <b>{best['val_miou']:.4f}</b> at iteration {best['iteration']}."
        )
    lines = [said]
    if found.fit is not None:
        last = scores[-1]
        lines.append(
            f"Training mIoU {last['train_miou']:.4f}, validation mIoU {last['val_miou']:.4f}: "
            f"{found.fit}."
        )
    if found.standing is not None:
        lines.append(_text(found.standing.line()) + ".")
    lines += [_text(line[0].upper() + line[1:]) + "." for line in found.done]
    said = found.conclusion()
    colour = "yes" if found.is_healthy else "no"
    lines.append(f"<span class='{colour}'>{_text(said[0].upper() + said[1:])}.</span>")
    return [f'<p class="verdict">{line}</p>' for line in lines]


def _checklist(checks: Sequence[Check], *, finished: bool, failed: bool) -> str:
    rows = []
    for check in checks:
        colour, mark = ("muted", "&#8230;")  # it may come yet
        if check.passed:
            colour, mark = ("yes", "&#10003;")
        elif finished or (failed and check.name == COMPLETED):
            colour, mark = ("no", "&#10007;")
        rows.append(
            f'<tr><td class="{colour}">{mark}</td><td>{_text(check.name)}</td>'
            f"<td class='muted'>{_text(check.detail)}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _findings(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    items = []
    for finding in findings:
        when = finding.when() + (", over" if finding.ended is not None else "")
        tried = " | ".join(finding.remedies)
        items.append(
            f'<li class="{"open" if finding.ended is None else "over"}">'
            f"<b>{_text(finding.severity)}</b>: {_text(finding.message)} "
            f"<span class='muted'>({when}; {_text(finding.rule)})</span>"
            + (f"<br>Try: {_text(tried)}" if tried and finding.ended is None else "")
            + "</li>"
        )
    return ["<h2>Findings</h2>", f'<ol class="findings">{"".join(items)}</ol>']


def _legend(findings: Sequence[Finding]) -> str:
    said = "Green: where the monitoring guide wants it. Grey lines: its phases; dotted: where an "
    said += "attempt went on."
    if findings:
        said += " Numbers: the findings above, grey if they are over."
    return f"<p class='muted'>{said}</p>"


def _figures(charts: Sequence[Chart]) -> str:
    figures = "".join(
        f"<figure><h3>{_text(chart.title)}</h3>{chart.svg}</figure>" for chart in charts
    )
    return f'<div class="charts">{figures}</div>'


def _classes(report: Report) -> list[str]:
    best = best_of(report.events)
    if best is None or len(best.get("class_iou") or ()) != len(report.classes):
        return []
    parts = [
        "<h2>Classes (validation, best model)</h2>",
        _class_table(report.classes, best["class_iou"]),
    ]
    shown = report.best
    if shown is not None and shown.iteration == best["iteration"]:
        parts += [
            "<h3>Confused most</h3>",
            _confused(shown),
            *(_matrix(shown) if len(shown.classes) <= MAX_CLASSES_SHOWN else ()),
        ]
    return parts


def _class_table(classes: Sequence[str], ious: Sequence[float | None]) -> str:
    rows = []
    for name, iou in zip(classes, ious, strict=True):
        bar = "" if iou is None else f'<div class="bar" style="width:{10 * iou:.2f}rem"></div>'
        value = "does not occur" if iou is None else f"{iou:.4f}"
        rows.append(f'<tr><td>{_text(name)}</td><td class="number">{value}</td><td>{bar}</td></tr>')
    head = '<tr><th>class</th><th class="number">IoU</th><th></th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _confused(shown: BestEvaluation) -> str:
    """The largest shares of a class that are taken for another one."""
    pairs = []
    for truth, row in enumerate(shown.confusion):
        total = sum(row)
        for guess, count in enumerate(row):
            if guess != truth and count:
                pairs.append((count / total, truth, guess))
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    if not pairs:
        return "<p>None.</p>"
    items = "".join(
        f"<li>{share:.1%} of {_text(shown.classes[truth])} is taken for "
        f"{_text(shown.classes[guess])}</li>"
        for share, truth, guess in pairs[:_CONFUSED_SHOWN]
    )
    return f"<ul>{items}</ul>"


def _matrix(shown: BestEvaluation) -> list[str]:
    head = "".join(f"<th>{_text(name)}</th>" for name in shown.classes)
    rows = []
    for truth, row in enumerate(shown.confusion):
        total = sum(row)
        cells = []
        for guess, count in enumerate(row):
            share = count / total if total else 0.0
            hue = "0,114,178" if guess == truth else "213,94,0"
            colour = "#fff" if share > 0.6 else "#1b1b1b"
            cells.append(
                f'<td style="background:rgba({hue},{share:.2f});color:{colour}">'
                f"{'' if not count else f'{100 * share:.0f}'}</td>"
            )
        rows.append(f'<tr><th class="row">{_text(shown.classes[truth])}</th>{"".join(cells)}</tr>')
    return [
        "<h3>Confusion matrix</h3>",
        "<p class='muted'>Percent of each class's pixels (rows) that are taken for each class "
        "(columns).</p>",
        f'<div class="wide"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    ]


def _pictures(report: Report) -> list[str]:
    if not report.pictures:
        return []
    encoded = base64.b64encode(report.pictures).decode()
    return [
        "<h2>Validation images (best model)</h2>",
        f'<img alt="image, truth and prediction" src="data:image/png;base64,{encoded}">',
    ]


def _attempts(attempts: Sequence[Attempt], report: Report) -> list[str]:
    if not attempts:
        return []
    chart = time_chart(attempts)
    head = "".join(
        f"<th{' class=number' if number else ''}>{name}</th>"
        for name, number in (
            *(("attempt", False), ("began (UTC)", False), ("from iteration", True)),
            *(("time", True), ("useful", True), ("trained again", True), ("ended", False)),
        )
    )
    rows = []
    for one in attempts:
        began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.started))
        ended = one.reason
        if one.exit_code is None:
            is_last = one is attempts[-1]
            ended = "killed" if not is_last else "finished" if report.finished else "not ended"
        if one.exit_code is not None and one.saved_at is not None:
            ended += f" (saved at {one.saved_at})"
        cells = (
            *(f"<td>{_text(value)}</td>" for value in (one.number, began)),
            f'<td class="number">{"" if one.resumed_at is None else one.resumed_at}</td>',
            *(
                f'<td class="number">{_duration(seconds)}</td>'
                for seconds in (one.busy_s, one.useful_s, one.redone_s)
            ),
            f"<td>{_text(ended)}</td>",
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    hours = {
        name: sum(one.gpus * getattr(one, name) for one in attempts) / 3600
        for name in ("busy_s", "useful_s", "redone_s")
    }
    origin = next((e for e in reversed(report.events) if e["event"] == "origin"), None)
    on_cpu = origin is not None and origin["provenance"].get("device") == "cpu"
    said = [
        f"{'Hours' if on_cpu else 'GPU hours'} {hours['busy_s']:.2f}: "
        f"useful {hours['useful_s']:.2f}, trained again {hours['redone_s']:.2f}; "
        f"goodput {hours['useful_s'] / hours['busy_s']:.0%}."
        if hours["busy_s"] > 0
        else "",
        *report.costs,
    ]
    return [
        "<h2>Attempts</h2>",
        _figures([chart]) if chart else "",
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>',
        *(f"<p>{_text(line)}</p>" for line in said if line),
    ]


# ---------------------------------------------------------------- small things


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"


def report_of(store: ObjectStore, costs: Sequence[str] = ()) -> Report:
    """What the files of a run tell, whether it is finished or not.

    Args:
        store: of the run.
        costs: sentences.

    Raises:
        ConfigError: it is no run, or has not begun.
        StorageError: the storage failed, or a file is none of this program's.
    """
    events: list[dict[str, Any]] = []
    try:
        events = parse_ledger(store.read(run.LEDGER), f"{store.uri}/{run.LEDGER}")
        config = config_from_yaml(
            store.read(run.CONFIG).decode(errors="replace"), source=f"{store.uri}/{run.CONFIG}"
        )
    except ObjectNotFound as error:
        if events:  # it failed before there was a configuration
            said, mend = why_nothing(events)
            raise ConfigError(f"{store.uri}: {said}; there is no {run.CONFIG}", mend=mend) from None
        raise ConfigError(
            f"{store.uri}: is no run that has begun to train ({error.message})",
            mend="give the folder or s3:// address that --run had",
        ) from None
    best, pictures = shown_of(store)
    summary = _summary_of(store)
    if summary is not None:
        checks = [Check(**line) for line in summary["checklist"]]
        if store.stat(run.BEST_MODEL) is None:
            lost = f"{store.uri}/{run.BEST_MODEL} is not there any more"
            checks = [
                replace(one, passed=False, detail=lost) if one.name == BEST_VERIFIES else one
                for one in checks
            ]
        stopped = summary["run"].get("stopped_early") or ""
    else:
        checks = open_checklist(events)
        stopped = ""
    classes: Sequence[str] = best.classes if best is not None else ()
    if summary is not None and summary["best"]:
        classes = list(summary["best"]["class_iou"])
    return Report(
        run_uri=store.uri,
        config=config,
        classes=classes,
        events=events,
        checks=checks,
        finished=summary is not None,
        stopped=stopped,
        best=best,
        pictures=pictures,
        facts=facts_of(summary) if summary is not None else {},
        costs=costs,
    )


def open_checklist(events: Sequence[Mapping[str, Any]]) -> list[Check]:
    """The guide's checklist of a run that is not finished."""
    return checklist(
        events=events,
        best_path="read back when the run has finished",
        best_verified=False,
        finished=False,
        wandb_finished=False,
        wandb_outcome="the run has not finished",
    )


def shown_of(store: ObjectStore) -> tuple[BestEvaluation | None, bytes]:
    """What was written of a run's best evaluation, and its pictures; None and nothing if not."""
    text = _read(store, run.BEST_EVALUATION)
    pictures = _read(store, run.PREDICTIONS) or b""
    try:
        best = BestEvaluation.model_validate_json(text) if text is not None else None
    except ValueError:
        best = None  # without it the page is shorter
    return best, pictures


def _summary_of(store: ObjectStore) -> dict[str, Any] | None:
    text = _read(store, run.SUMMARY)
    if text is None:
        return None
    try:
        found = json.loads(text)
        facts_of(found)
        [Check(**line) for line in found["checklist"]]
        dict(found["run"])
        dict(found["best"]["class_iou"] if found["best"] else {})
    except (ValueError, LookupError, TypeError):
        raise StorageError(
            f"{store.uri}/{run.SUMMARY}: is no summary of this program",
            mend="delete it, and run the same s4gan train again: it writes a new one",
        ) from None
    return dict(found)


def _read(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.read(key)
    except ObjectNotFound:
        return None


def facts_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a finished run.

    Args:
        summary: content of `summary.json`.
    """
    images = {f"{name} images": count for name, count in summary["data"]["images"].items()}
    return {"data": summary["data"]["uri"], **images, **summary["provenance"]}


def best_evaluation_json(found: BestEvaluation) -> bytes:
    """Content of the file."""
    return json.dumps(found.model_dump(mode="json")).encode()
