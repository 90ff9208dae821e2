"""`report.html`: one page that needs nothing else, made from the ledger and the summary."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.yes { color: #14713a } .no { color: #a61b1b } .verdict { font-size: 1.15rem }
img, svg { max-width: 100%; height: auto }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem }
.muted { color: #666 }
"""


def report_html(
    summary: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    *,
    config_yaml: str,
    predictions_png: bytes,
) -> str:
    """The page.

    Args:
        summary: content of `summary.json`.
        events: the ledger.
        config_yaml: content of `config.yaml`.
        predictions_png: content of `predictions.png`; empty if there is none.
    """
    best, provenance = summary["best"], summary["provenance"]
    verdict = (
        f"Best validation mIoU <b>{best['val_miou']:.4f}</b> at iteration {best['iteration']}."
        if best
        else "No evaluation yet."
    )
    parts = [
        f"<h1>{_text(summary['run']['uri'])}</h1>",
        f'<p class="verdict">{verdict}</p>',
        "<h2>Checklist</h2>",
        _checklist(summary["checklist"]),
        "<h2>Training</h2>",
        _charts(events),
    ]
    if best:
        parts += ["<h2>Classes (validation, best model)</h2>", _class_table(best["class_iou"])]
    if predictions_png:
        encoded = base64.b64encode(predictions_png).decode()
        parts += [
            "<h2>Validation images (best model)</h2>",
            f'<img alt="image, truth and prediction" src="data:image/png;base64,{encoded}">',
        ]
    parts += [
        "<h2>Attempts</h2>",
        _attempts(events),
        "<h2>Provenance</h2>",
        _table([(key, _text(value)) for key, value in provenance.items()]),
        _table([(f"{key} images", _text(n)) for key, n in summary["data"]["images"].items()]),
        "<h2>Configuration</h2>",
        f"<pre>{_text(config_yaml)}</pre>",
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>S4GAN run</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _checklist(checks: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td class="{"yes" if check["passed"] else "no"}">'
        f"{'&#10003;' if check['passed'] else '&#10007;'}</td>"
        f"<td>{_text(check['name'])}</td><td class='muted'>{_text(check['detail'])}</td></tr>"
        for check in checks
    )
    return f"<table>{rows}</table>"


def _class_table(class_iou: Mapping[str, float | None]) -> str:
    rows = "".join(
        f"<tr><td>{_text(name)}</td>"
        f'<td class="number">{"does not occur" if iou is None else f"{iou:.4f}"}</td></tr>'
        for name, iou in class_iou.items()
    )
    return f"<table><tr><th>class</th><th>IoU</th></tr>{rows}</table>"


def _attempts(events: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for event in events:
        name = f"attempt {event['attempt']}"
        if event["event"] == "training_started":
            rows.append((name, f"began after iteration {event['resumed_at']}"))
        elif event["event"] == "attempt_ended":
            saved = f" (saved at {event['saved_at']})" if "saved_at" in event else ""
            rows.append((name, _text(event["reason"]) + saved))
    return _table(rows)


def _charts(events: Sequence[Mapping[str, Any]]) -> str:
    """Losses, mIoU, ST_Count and learning rates over iterations, as one SVG."""
    # Not above: an attempt should not wait for it before it trains.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    train = [event for event in events if event["event"] == "train"]
    evaluations = [event for event in events if event["event"] == "eval"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    losses, miou, count, rates = figure.subplots(2, 2).ravel()
    _lines(
        losses, train, {"loss_ce": "CE", "loss_st": "ST", "loss_d": "D", "loss_fm": "FM"}, "Losses"
    )
    _lines(miou, evaluations, {"train_miou": "training", "val_miou": "validation"}, "mIoU")
    _lines(count, train, {"st_count": "ST_Count"}, "Accepted unlabeled images")
    _lines(rates, train, {"lr_g": "generator", "lr_d": "discriminator"}, "Learning rates")
    rates.set_yscale("log")  # the two differ by orders of magnitude
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "s4gan", "svg.fonttype": "none"}):  # same input, same page
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _lines(
    axes: Any, events: Sequence[Mapping[str, Any]], series: Mapping[str, str], title: str
) -> None:
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    for key, label in series.items():
        axes.plot(
            [event["iteration"] for event in events],
            [event[key] for event in events],
            label=label,
            marker="." if len(events) < 50 else None,
        )
    axes.legend()
