"""Predicting images: from a folder, a prefix, a pattern or a file, to pictures and outlines."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from job.data.find import images_at, place_of
from job.data.images import Array, read_rgb
from job.errors import ConfigError, DataError
from job.models.files import ModelCard, load_generator
from job.models.generator import Generator
from job.monitor.pictures import index_png, overlay
from job.outlines import Outlines
from job.storage import ObjectStore, is_same_place, open_store
from job.storage.progress import Silent, TransferProgress
from job.tiles import classes_of
from job.training.evaluation import in_groups, load_ahead
from job.training.protocols import PLAIN, Protocol

_OVERLAY = "_overlay"
_WRITERS = 4


@dataclass(frozen=True)
class Wish:
    """How images are predicted, and what is written of them."""

    protocol: Protocol = PLAIN
    tile: int | None = None
    """Side of a tile in pixels as the network sees them; None: as `classes_of`."""
    batch: int = 1
    """Images of one size that pass through the network together."""
    with_overlay: bool = True
    existing: Literal["refuse", "replace", "skip"] = "refuse"
    """What to do about files that are there already under the names of predictions. `skip` is for
    going on after an interruption: all that is written of an image is there, or it is predicted."""


@dataclass
class Outcome:
    """What became of the images."""

    written: int = 0
    skipped: int = 0
    """Were there already."""
    unreadable: list[str] = field(default_factory=list)
    """What is wrong with each that could not be decoded."""
    outlines: list[Outlines] = field(default_factory=list)


def predict_images(
    weights: str,
    images_uri: str,
    out_uri: str,
    device: torch.device,
    wish: Wish | None = None,
    *,
    outlines: Sequence[Callable[[Sequence[str]], Outlines]] = (),
    progress: TransferProgress | None = None,
) -> Outcome:
    """Write NAME.png (class numbers, with palette) and NAME_overlay.png for each image.

    An image that cannot be decoded is left out; the others go on.

    Args:
        weights: path or URI of a model file.
        images_uri: a folder, an s3:// prefix, a file, or a pattern such as photos/*.jpg.
        out_uri: folder or s3:// prefix.
        device: where to compute.
        wish: how, and what is written.
        outlines: each makes one of the names of the classes, which is told of each prediction.
        progress: told how far it is.

    Raises:
        ConfigError: the weights cannot be used, the output folder is the input folder, or holds
            files already that predictions would replace.
        DataError: no image, or two of one name.
        StorageError: something cannot be fetched or written.
    """
    wish, progress = wish or Wish(), progress or Silent()
    outcome = Outcome()
    generator, card, _ = load_generator(weights, device)
    with images_at(images_uri, progress) as (root, paths):
        out = open_store(out_uri)
        own = out.local_path("")
        if own is not None and own.is_file():
            raise ConfigError(
                f"--out {out_uri}: is a file", mend="give a folder; it is made if it is not there"
            )
        place = open_store(place_of(images_uri))
        if is_same_place(out, place):
            raise ConfigError(
                f"--out {out_uri}: is the folder of the images", mend="choose another"
            )
        paths = _without_predictions(root, paths, _within(out, place))
        keys = _keys(root, paths, with_overlay=wish.with_overlay)
        names = _names(keys.values(), with_overlay=wish.with_overlay)
        there = _existing(out, names) if wish.existing != "replace" else set()
        if there and wish.existing == "refuse":
            raise _refusal(out, sorted(there), len(names))
        done = {
            path
            for path, key in keys.items()
            if there.issuperset(_names([key], with_overlay=wish.with_overlay))
        }
        outcome.outlines = [make(card.classes) for make in outlines]
        outcome.skipped = len(done)
        if not outlines:  # else they are wanted of all images
            paths = [path for path in paths if path not in done]

        def read(path: Path) -> _Read | _Done | _Unreadable:
            return _done(path, out, keys[path], card) if path in done else _read(path)

        with ThreadPoolExecutor(_WRITERS) as pool:
            pending = []
            progress.begin("predicting", len(paths), 0)
            for one in _predicted(generator, card, load_ahead(read, paths), device, wish):
                progress.advance(1, 0)
                if isinstance(one, _Unreadable):
                    outcome.unreadable.append(one.problem)
                    continue
                for outline in outcome.outlines:
                    outline.add(one.path.relative_to(root).as_posix(), one.classes)
                if isinstance(one, _Done):
                    continue
                for name, content in _pictures(one, keys[one.path], card, wish):
                    pending.append(pool.submit(out.write, name, content))
                outcome.written += 1
                while len(pending) > 4 * _WRITERS:
                    pending.pop(0).result()
            for future in pending:
                future.result()
            progress.end()
    return outcome


# ---------------------------------------------------------------- what they are called


def _within(out: ObjectStore, images: ObjectStore) -> str | None:
    """Where the one place lies in the other; None if it does not."""
    own, others = out.local_path(""), images.local_path("")
    if own is None or others is None:
        outer = f"{images.uri}/"
        return out.uri.removeprefix(outer) if out.uri.startswith(outer) else None
    own, others = own.resolve(), others.resolve()
    return own.relative_to(others).as_posix() if own.is_relative_to(others) else None


def _without_predictions(root: Path, paths: Sequence[Path], within: str | None) -> list[Path]:
    """The images but for what was predicted of the others before: that is nothing to predict.

    Args:
        root: of the images.
        paths: of them.
        within: where predictions go below it; None: elsewhere.
    """
    if within is None:
        return list(paths)
    there = [path for path in paths if path.relative_to(root).is_relative_to(within)]
    others = set(paths) - set(there)
    keys = [path.relative_to(root).with_suffix("").as_posix() for path in others]
    made = {root / within / name for name in _names(keys, with_overlay=True)}
    return [path for path in paths if path not in made]


def _names(keys: Iterable[str], *, with_overlay: bool) -> list[str]:
    """Of all files that are written."""
    endings = (".png", f"{_OVERLAY}.png") if with_overlay else (".png",)
    return [f"{key}{ending}" for key in keys for ending in endings]


def _existing(out: ObjectStore, names: Sequence[str]) -> set[str]:
    """Those of the names that are there."""
    if out.local_path("") is None:
        return {one.key for one in out.list("")}.intersection(names)
    return {name for name in names if (path := out.local_path(name)) and path.exists()}


def _refusal(out: ObjectStore, there: Sequence[str], count: int) -> ConfigError:
    """Somebody's pictures may lie there, under the names of what is to be written."""
    others = f" and {len(there) - 1} others" if len(there) > 1 else ""
    return ConfigError(
        f"--out {out.uri}: {there[0]}{others} would be replaced, of {count} files",
        mend="choose another folder; or, if they are predictions of before, --skip-existing to go "
        "on where they end, or --overwrite",
    )


def _keys(root: Path, paths: Sequence[Path], *, with_overlay: bool) -> dict[Path, str]:
    """Where each prediction goes, without its ending."""
    keys: dict[str, Path] = {}
    for path in paths:
        key = path.relative_to(root).with_suffix("").as_posix()
        if key in keys:
            raise DataError(
                f"{path}: has the same name as {keys[key].name} but for its ending",
                mend="rename one of the two",
            )
        keys[key] = path
    for key, path in keys.items():
        if with_overlay and f"{key}{_OVERLAY}" in keys:
            raise DataError(
                f"{path}: its overlay would have the name of what is predicted of "
                f"{keys[f'{key}{_OVERLAY}'].name}",
                mend="rename one of the two, or leave the overlays out: --no-overlay",
            )
    return {path: key for key, path in keys.items()}


# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class _Read:
    path: Path
    image: Image.Image


@dataclass(frozen=True)
class _Done:
    """Predicted before."""

    path: Path
    classes: Array
    """Class numbers, uint8 (H, W)."""


@dataclass(frozen=True)
class _Unreadable:
    path: Path
    problem: str


@dataclass(frozen=True)
class _Predicted:
    path: Path
    image: Image.Image
    classes: Array
    """Class numbers, uint8 (H, W)."""


def _predicted(
    generator: Generator,
    card: ModelCard,
    read: Iterable[_Read | _Done | _Unreadable],
    device: torch.device,
    wish: Wish,
) -> Iterator[_Predicted | _Done | _Unreadable]:
    """Each image with its prediction, in order; several of one size at once, if asked."""
    Some = _Read | _Done | _Unreadable

    def belongs(group: Sequence[Some], one: Some) -> bool:
        first = group[0]
        if not isinstance(first, _Read) or not isinstance(one, _Read):
            return False
        return one.image.size == first.image.size and len(group) < wish.batch

    for group in in_groups(read, belongs):
        readable = [one for one in group if isinstance(one, _Read)]
        yield from (one for one in group if not isinstance(one, _Read))  # alone in its group
        if readable:
            found = classes_of(
                generator,
                card,
                [one.image for one in readable],
                device,
                wish.protocol,
                tile=wish.tile,
            )
            for one, classes in zip(readable, found, strict=True):
                yield _Predicted(one.path, one.image, classes)


def _read(path: Path) -> _Read | _Unreadable:
    try:
        return _Read(path, read_rgb(path))
    except DataError as error:
        return _Unreadable(path, error.message)


def _done(path: Path, out: ObjectStore, key: str, card: ModelCard) -> _Done:
    """What was predicted of an image before, for its outlines.

    Raises:
        ConfigError: it is no prediction with the model's classes.
    """
    name = f"{key}.png"
    try:
        with Image.open(io.BytesIO(out.read(name))) as picture:
            classes = np.array(picture) if picture.mode == "P" else None
    except (OSError, SyntaxError):  # Pillow has both for damaged PNG
        classes = None
    if classes is None or classes.max() >= len(card.classes):
        raise ConfigError(
            f"--out {out.uri}: {name} is no prediction of this model",
            mend="choose another folder, or remove the file",
        )
    return _Done(path, classes)


def _pictures(
    done: _Predicted, key: str, card: ModelCard, wish: Wish
) -> Iterator[tuple[str, bytes]]:
    yield f"{key}.png", _png(index_png(done.classes, card.palette))
    if wish.with_overlay:
        picture = overlay(np.asarray(done.image), done.classes, card.palette)
        yield f"{key}{_OVERLAY}.png", _png(picture)


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
