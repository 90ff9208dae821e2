"""`data-check.html`: samples with their masks over them, for people to see whether labels fit.

One page that needs nothing else. Written picture by picture, so that it never lies in memory.
"""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from job.data.balance import Balance
from job.data.dataset import IGNORE, UNKNOWN, DatasetInfo
from job.data.images import read_index_mask, read_rgb
from job.data.report import (
    LABELED,
    PROBLEMS_SHOWN,
    SET_ASIDE,
    UNLABELED,
    VAL,
    CheckReport,
    Finding,
    Place,
)
from job.errors import DataError, StorageError
from job.monitor.pictures import OVERLAY_OPACITY

Array = NDArray[np.uint8]

PAIRS_SHOWN = 8
"""Of each kind of duplicate."""
_WIDTH_PX = 560
"""Of a picture on the page."""
_UNEXPECTED_RGB = (255, 0, 255)
_IGNORED_RGB = (255, 255, 255)

_PART_NAMES = {
    LABELED: "labeled",
    SET_ASIDE: "mask set aside",
    UNLABELED: "unlabeled",
    VAL: "validation",
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem;
  color: #1c1c1c; background: #fff }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2rem }
p, li, h3 { overflow-wrap: anywhere; white-space: pre-line }
.no { color: #a61b1b } .yes { color: #14713a } .muted { color: #595959 }
.wide { overflow-x: auto }
table { border-collapse: collapse }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; white-space: nowrap }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
td.low { color: #a61b1b; font-weight: 600 }
.legend { position: sticky; top: 0; background: #fff; padding: .4rem 0; z-index: 1;
  border-bottom: 1px solid #ccc; font-size: .85rem; max-height: 30vh; overflow-y: auto }
.class { display: inline-block; margin-right: .8rem }
.chip { display: inline-block; width: .8em; height: .8em; margin-right: .3em;
  border: 1px solid #444; vertical-align: -.05em }
.sample { margin: 1.2rem 0 1.8rem }
.sample h3 { font-size: 1rem; margin: 0 }
.sample p { margin: .1rem 0 .4rem; font-size: .9rem }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem }
.pictures figure { margin: 0 } .pictures img { width: 100%; height: auto; display: block;
  border: 1px solid #ddd; box-sizing: border-box }
.pictures figcaption { font-size: .8rem; color: #595959 }
.pair { border-left: 4px solid #a61b1b; padding-left: .8rem }
@media (max-width: 40rem) {
  table { font-size: .85rem } td, th { padding-right: .45rem } ul { padding-left: 1.1rem }
  .legend { max-height: 4.5rem }
  .pictures { grid-template-columns: repeat(2, 1fr) }
  .pictures figure.overlay { grid-column: 1 / 3; order: -1 }
}
"""


def write_data_page(report: CheckReport, path: Path) -> int:
    """Write the page; all of it, or nothing.

    Args:
        report: what was found; its files are still there.
        path: where to.

    Returns:
        Samples on it.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as page:
            try:
                samples = _write(report, page)
                page.flush()
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(page.name, 0o666 & ~umask)  # tempfile's is for nobody else to read
                os.replace(page.name, path)
            except BaseException:
                os.unlink(page.name)
                raise
    except OSError as error:
        raise StorageError.from_os("write", path, error) from error
    return samples


def _write(report: CheckReport, page: IO[str]) -> int:
    page.write(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Labels of {_text(report, report.uri)}</title><style>{_STYLE}</style></head>\n"
        f'<body>\n<h1>{_text(report, report.uri)}</h1>\n<p class="'
        f'{"yes" if report.is_good else "no"}">{_text(report, report.headline)}</p>\n'
    )
    for title, lines in (
        ("Problems", [finding.text for finding in report.problems]),
        ("Warnings", list(report.warnings)),
    ):
        if lines:
            page.write(f"<h2>{title}</h2>\n<ul>")
            page.writelines(f"<li>{_text(report, line)}</li>\n" for line in lines[:PROBLEMS_SHOWN])
            more = len(lines) - PROBLEMS_SHOWN
            page.write(f"<li>... and {more} more</li></ul>\n" if more > 0 else "</ul>\n")
    page.write(f"<h2>Classes</h2>\n{_class_table(report)}\n<h2>Samples</h2>\n")
    page.write(
        '<p class="muted">Pixels lie as the files hold them, which is how the network sees them. '
        "Check that each colour lies on what its class names.</p>\n"
    )
    page.write(f'<div class="legend">{_legend(report)}</div>\n')
    count = 0
    for finding in _samples(report):
        page.write(_sample(report, finding))
        count += 1
    page.write("</body></html>\n")
    return count


def _samples(report: CheckReport) -> Iterator[Finding]:
    """What is odd first, then duplicates, then every class where most of it is, then others."""
    yield from report.notable
    for name, leaks in (("training and validation", True), ("labeled", False)):
        shown = 0
        for group in report.exact:
            places = _pair_of(group, leak=leaks)
            if places and shown < PAIRS_SHOWN:
                shown += 1
                yield Finding(f"the same picture twice, pixel for pixel ({name})", places)
        pairs = [pair for pair in report.near if pair.is_leak == leaks]
        for pair in pairs[:PAIRS_SHOWN]:
            yield Finding(f"pictures that look the same ({name})", (pair.first, pair.second))
    shown_images = set()
    for finding in _class_samples(report):
        shown_images.add(finding.places[0].item.image)
        yield finding
    for place in report.ordinary:
        if place.item.image not in shown_images:
            yield Finding(f"one of {report.counts[place.part]}", (place,))


def _pair_of(group: tuple[Place, ...], *, leak: bool) -> tuple[Place, ...]:
    """Two images of a group of copies: across training and validation, or both labeled."""
    val = [place for place in group if place.part == VAL]
    train = [place for place in group if place.part != VAL]
    labeled = [place for place in train if place.part == LABELED]
    if leak:
        return ((labeled or train)[0], val[0]) if train and val else ()
    return tuple(labeled[:2]) if len(labeled) > 1 else ()


def _class_samples(report: CheckReport) -> Iterator[Finding]:
    """For each class the masks that hold most of it, of the labeled and of the validation images.

    One mask for several classes is shown once.
    """
    classes: dict[Path, list[str]] = {}
    places: dict[Path, Place] = {}
    for index, name in enumerate(report.info.classes):
        found = {part: balance.largest[index] for part, balance in report.balances.items()}
        parts = [part for part in (LABELED, VAL) if found.get(part)]
        for part in parts or [part for part in (SET_ASIDE,) if found.get(part)]:
            best = found[part]
            assert best is not None
            places[best[1].image] = Place(best[1], part)
            classes.setdefault(best[1].image, []).append(name)
    for image, names in classes.items():
        yield Finding(f"most of {', '.join(names)}", (places[image],))


# ---------------------------------------------------------------- pieces of the page


def _sample(report: CheckReport, finding: Finding) -> str:
    rows = "".join(_pictures(report, place, finding.text) for place in finding.places)
    pair = " pair" if len(finding.places) > 1 else ""
    return (
        f'<section class="sample{pair}"><h3>{_text(report, finding.text)}</h3>\n{rows}</section>\n'
    )


def _pictures(report: CheckReport, place: Place, said: str) -> str:
    item = place.item
    name = _text(report, item.image)
    lines = [f'<p class="muted">{name}, {_PART_NAMES[place.part]}</p>\n']
    figures = []
    try:
        image = read_rgb(item.image)
        figures.append(_figure(_small(image), "image", f"{image.width} x {image.height}"))
        if item.mask is not None:
            mask = read_index_mask(item.mask)
            numbers = np.asarray(_small(mask, labels=True))
            table = _colours(report)
            coloured = Image.fromarray(table[numbers])
            size = "" if mask.size == image.size else f", {mask.width} x {mask.height}"
            figures.append(_figure(coloured, "mask", f"mask{size}", lossless=True))
            if mask.size == image.size:
                over = _overlay(np.asarray(_small(image)), numbers, table, report.info)
                figures.append(_figure(over, "overlay", _held(report, mask), escape=False))
    except DataError as error:
        if error.message not in said:
            lines.append(f'<p class="no">{_text(report, error.message)}</p>\n')
    return "".join(lines) + f'<div class="pictures">{"".join(figures)}</div>\n'


def _overlay(image: Array, numbers: Array, table: Array, info: DatasetInfo) -> Image.Image:
    """The image with its classes over it; what is ignored stays as it is.

    Shape: image (H, W, 3), numbers (H, W) as the mask's file has them, table (256, 3), all uint8.
    """
    ignored = (info.meanings == IGNORE)[numbers]
    opacity = np.where(ignored, 0.0, OVERLAY_OPACITY)[..., None]
    mixed = (1 - opacity) * image + opacity * table[numbers]
    return Image.fromarray(mixed.round().astype(np.uint8))


def _colours(report: CheckReport) -> Array:
    """RGB of each value that a mask's file may hold, (256, 3)."""
    table = np.full((256, 3), _UNEXPECTED_RGB, np.uint8)
    for value, meaning in enumerate(report.info.meanings):
        if meaning != UNKNOWN:
            table[value] = _IGNORED_RGB if meaning == IGNORE else report.info.palette[meaning]
    return table


def _small(image: Image.Image, *, labels: bool = False) -> Image.Image:
    if image.width <= _WIDTH_PX:
        return image
    size = (_WIDTH_PX, max(1, round(image.height * _WIDTH_PX / image.width)))
    # Labels must not be mixed into colours that mean nothing.
    return image.resize(size, Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC)


def _figure(
    image: Image.Image, kind: str, caption: str, *, lossless: bool = False, escape: bool = True
) -> str:
    data = io.BytesIO()
    if lossless:
        image.quantize(256, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    else:
        image.save(data, "JPEG", quality=85)
    encoded = base64.b64encode(data.getvalue()).decode()
    form = "png" if lossless else "jpeg"
    return (
        f'<figure class="{kind}"><img alt="{kind}" loading="lazy" width="{image.width}" '
        f'height="{image.height}" src="data:image/{form};base64,{encoded}">'
        f"<figcaption>{html.escape(caption) if escape else caption}</figcaption></figure>"
    )


def _held(report: CheckReport, mask: Image.Image) -> str:
    """The classes of a mask, most of it first, as HTML."""
    counts = np.bincount(np.asarray(mask).ravel(), minlength=256)
    total = max(1, int(counts.sum()))
    table = _colours(report)
    pixels: dict[str, int] = {}
    chips: dict[str, str] = {}
    for value in np.flatnonzero(counts):
        name = _value_name(report, int(value))  # several values may be ignored
        pixels[name] = pixels.get(name, 0) + int(counts[value])
        chips[name] = _chip(tuple(table[value]))
    return "".join(
        f'<span class="class">{chips[name]}{_text(report, name)} {count / total:.1%}</span>'
        for name, count in sorted(pixels.items(), key=lambda one: -one[1])
    )


def _value_name(report: CheckReport, value: int) -> str:
    meaning = int(report.info.meanings[value])
    if meaning == UNKNOWN:
        return f"unexpected label {value}"
    return "ignored" if meaning == IGNORE else report.info.classes[meaning]


def _legend(report: CheckReport) -> str:
    entries = [*zip(report.info.classes, report.info.palette, strict=True)]
    entries += [("ignored", _IGNORED_RGB), ("unexpected label", _UNEXPECTED_RGB)]
    return "".join(
        f'<span class="class">{_chip(colour)}{_text(report, name)}</span>'
        for name, colour in entries
    )


def _chip(colour: tuple[int, ...]) -> str:
    return f'<span class="chip" style="background: rgb{tuple(map(int, colour))}"></span>'


def _class_table(report: CheckReport) -> str:
    columns = [report.balances[LABELED], report.all_masks, report.balances[VAL]]
    titles = ("labeled", "all masks", "validation")
    head = "".join(f'<th class="number" colspan="2">{title}</th>' for title in titles)
    rows = []
    for index, (name, colour) in enumerate(
        zip(report.info.classes, report.info.palette, strict=True)
    ):
        cells = "".join(_cells(balance, index) for balance in columns)
        rows.append(f"<tr><td>{_chip(colour)}{_text(report, name)}</td>{cells}</tr>\n")
    last = "".join(
        f'<td class="number">{balance.ignored_share:.2%}</td>'
        f'<td class="number">{balance.masks}</td>'
        for balance in columns
    )
    return (
        f'<div class="wide"><table><tr><th></th>{head}</tr>\n<tr><th>class</th>'
        + '<th class="number">pixels</th><th class="number">images</th>' * len(columns)
        + f"</tr>\n{''.join(rows)}"
        + f'<tr class="muted"><td>ignored; masks</td>{last}</tr></table></div>'
    )


def _cells(balance: Balance, index: int) -> str:
    low = " low" if balance.masks and not balance.images[index] else ""
    return (
        f'<td class="number{low}">{balance.shares[index]:.2%}</td>'
        f'<td class="number{low}">{balance.images[index]}</td>'
    )


def _text(report: CheckReport, value: object) -> str:
    return html.escape(report.shown(value))
