"""Data sets as their makers hand them out: which layout a folder has, and what it holds.

    folder      train/images/, train/masks/, dataset.yaml      (`job.data.dataset`)
    voc         JPEGImages/, SegmentationClass/, SegmentationClassAug/ (optional),
                ImageSets/Segmentation/train.txt, val.txt, train_aug.txt (optional)
    cityscapes  leftImg8bit/train/CITY/*_leftImg8bit.png, gtFine/train/CITY/*_gtFine_labelIds.png
                or *_gtFine_labelTrainIds.png, val/ likewise, leftImg8bit/train_extra/ (optional)
    context     JPEGImages/, SegmentationClassContext/, ImageSets/SegmentationContext/train.txt,
                val.txt: PASCAL-Context as MMSegmentation converts it

Opens no image. Telling a layout needs no more than to ask what is there, so that it can be told
of a bucket, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from job.data.classes import CITYSCAPES, CITYSCAPES_IDS, CONTEXT, VOC
from job.data.dataset import (
    FOLDER,
    IMAGE_ENDINGS,
    MARK,
    MASK_ENDINGS,
    DatasetInfo,
    Item,
    files_by_id,
    load_dataset_info,
    scan_folder,
)
from job.data.lists import Catalogue, read_list
from job.data.names import TRAINING, Names
from job.errors import DataError
from job.storage.store import ObjectStore

Has = Callable[[str], bool]
"""Whether there is a file of that path below the data, or, with a slash at its end, a folder."""

VOC_LAYOUT, CITYSCAPES_LAYOUT, CONTEXT_LAYOUT = "voc", "cityscapes", "context"
_AUTO = "auto"
_DETAIL_FILE = "trainval_merged.json"
_IMAGES = "leftImg8bit"
_MASKS = "gtFine"
_IMAGE_SUFFIX = f"_{_IMAGES}"
_MASK_SUFFIX = f"_{_MASKS}"
_TRAIN_IDS, _IDS = f"{_MASK_SUFFIX}_labelTrainIds", f"{_MASK_SUFFIX}_labelIds"


@dataclass(frozen=True)
class Found:
    """A layout that data have."""

    layout: str
    base: str
    """Where it begins below the data folder: empty, or with a slash at its end."""


@dataclass(frozen=True)
class _Kind:
    """How a layout is told from the others."""

    layout: str
    bases: tuple[str, ...]
    """Where it may begin."""
    parts: tuple[tuple[str, ...], ...]
    """Folders that must be there; of several in a tuple, one."""
    unless: str = ""
    """A folder that makes it another layout."""
    besides: str = ""
    """What else belongs to it, but others may have, too."""

    @property
    def sought(self) -> str:
        """For people."""
        parts = " and ".join(" or ".join(some) for some in self.parts)
        if self.besides:
            parts = f"{self.besides} and {parts}"
        bases = [base for base in self.bases if base]
        return f"{parts} in the folder itself" + "".join(f" or {base}" for base in bases)

    def find(self, has: Has, *, strictly: bool) -> list[str]:
        """Bases where it begins; `strictly`: only if no other layout claims them."""
        return [
            base
            for base in self.bases
            if all(any(has(base + part) for part in some) for some in self.parts)
            and not (strictly and self.unless and has(base + self.unless))
        ]

    def seen(self, has: Has) -> str:
        """Which of its parts are there, for people."""
        found = [
            base + part
            for base in self.bases
            for some in self.parts
            for part in some
            if has(base + part)
        ]
        return f"found {', '.join(found)} only" if found else "found none"


_CONTEXT_MASKS = "SegmentationClassContext/"
_KINDS = {
    kind.layout: kind
    for kind in (
        _Kind(FOLDER, ("",), (("train/images/",),), besides=MARK),
        _Kind(
            VOC_LAYOUT,
            ("", "VOC2012/", "VOCdevkit/VOC2012/"),
            (("JPEGImages/",), ("SegmentationClass/", "SegmentationClassAug/")),
            # That is VOC 2010 with other masks beside its own.
            unless=_CONTEXT_MASKS,
        ),
        _Kind(CITYSCAPES_LAYOUT, ("", "cityscapes/"), ((f"{_IMAGES}/",), (f"{_MASKS}/",))),
        _Kind(
            CONTEXT_LAYOUT,
            ("", "VOC2010/", "VOCdevkit/VOC2010/"),
            (("JPEGImages/",), (_CONTEXT_MASKS,)),
        ),
    )
}


_DOWNLOADS = (
    "leftImg8bit_trainvaltest.zip",
    "gtFine_trainvaltest.zip",
    "leftImg8bit_trainextra.zip",
    "VOCtrainval_11-May-2012.tar",
    "VOCtrainval_03-May-2010.tar",
    "SegmentationClassAug.zip",
    "trainval.tar.gz",
)
"""What the data sets of these layouts come in."""


def detect(has: Has, wanted: str, *, called: str, names: Names = TRAINING) -> Found:
    """The layout that data have.

    Args:
        has: asked what is there.
        wanted: `data.layout`; with "auto" there must be one and no other.
        called: the data, for messages.
        names: of the settings, for advice.

    Raises:
        DataError: there is none, or not the wanted one, or several; says what was looked for.
    """
    if wanted == FOLDER:
        return Found(FOLDER, "")
    kinds = [kind for kind in _KINDS.values() if wanted in (_AUTO, kind.layout)]
    found = [
        Found(kind.layout, base)
        for kind in kinds
        for base in kind.find(has, strictly=wanted == _AUTO)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        tells = len({one.layout for one in found}) > 1
        raise DataError(
            f"{called}: holds more than one data set: "
            + ", ".join(f"{one.layout} ({one.base or 'the folder itself'})" for one in found),
            mend="give the folder of one of them"
            + (f", or say which: {names.layout}{found[0].layout}" if tells else ""),
        )
    if wanted == _AUTO and has(MARK):
        return Found(FOLDER, "")
    if wanted in (_AUTO, CONTEXT_LAYOUT):
        _refuse_detail(has, called)
    lines = "".join(
        f"\n    {kind.layout}: looked for {kind.sought}; {kind.seen(has)}" for kind in kinds
    )
    what = "of no known layout" if wanted == _AUTO else f"not of the layout {wanted}"
    packed = [name for name in _DOWNLOADS if has(name)]
    if packed:
        raise DataError(
            f"{called}: is {what}, but holds {' and '.join(packed)}, as downloaded",
            mend="unpack it there, all that belong to the data set into the same folder",
        )
    raise DataError(
        f"{called}: is {what}{lines}",
        mend=f"lay your own images out as README.md, Your own images, says: {MARK}, train/images/ "
        "and train/masks/; or give the folder that holds those of a layout above",
    )


def in_store(store: ObjectStore) -> Has:
    """What is in a store; each question is asked once."""

    @functools.cache
    def has(path: str) -> bool:
        if path.endswith("/"):
            return any(True for _ in store.list(path))
        return store.stat(path) is not None

    return has


def _refuse_detail(has: Has, called: str) -> None:
    for base in _KINDS[CONTEXT_LAYOUT].bases:
        if has(base + _DETAIL_FILE):
            raise DataError(
                f"{called}: holds PASCAL-Context as {base}{_DETAIL_FILE}, which only the detail "
                "API reads",
                mend=f"make {base}{_CONTEXT_MASKS}*.png and {base}ImageSets/SegmentationContext/"
                "{train,val}.txt of it once, with MMSegmentation's "
                "tools/dataset_converters/pascal_context.py",
            )


def lists_needed(found: Found, has: Has, *, train: bool, val: bool) -> list[str]:
    """The layout's own list files that must be there, below the data folder.

    Args:
        found: the layout.
        has: asked what is there.
        train: whether its list of training images is needed.
        val: whether its list of validation images is needed.
    """
    if found.layout not in _LIST_FOLDERS:
        return []
    folder = found.base + _LIST_FOLDERS[found.layout]
    # With augmented masks the training images are in train_aug.txt, or those that have a mask.
    by_masks = found.layout == VOC_LAYOUT and (
        has(f"{found.base}{_AUGMENTED}/") or has(f"{_AUGMENTED}/")
    )
    wanted = [f"{folder}/train.txt"] if train and not by_masks else []
    return wanted + ([f"{folder}/val.txt"] if val else [])


def known_info(layout: str) -> DatasetInfo | None:
    """What a layout says of the classes; None if `dataset.yaml` has to."""
    return {VOC_LAYOUT: VOC, CITYSCAPES_LAYOUT: CITYSCAPES, CONTEXT_LAYOUT: CONTEXT}.get(layout)


# ---------------------------------------------------------------- what is in it


@dataclass(frozen=True)
class Tree:
    """What a layout holds, before lists of the user's choose among it."""

    layout: str
    root: Path
    base: Path
    """Where the layout begins."""
    info: DatasetInfo
    train: tuple[Item, ...]
    """In the order of the layout's list, or by id."""
    val: tuple[Item, ...]
    is_ordered: bool
    """Whether a list that everybody has gives the order of `train`."""
    train_catalogue: Catalogue
    """What lists of training images can name."""
    val_catalogue: Catalogue
    warnings: tuple[str, ...] = ()


def scan_tree(
    root: Path,
    wanted: str,
    *,
    needs_train: bool = True,
    needs_val: bool = True,
    names: Names = TRAINING,
) -> Tree:
    """List a data folder of any layout.

    Args:
        root: the data folder.
        wanted: `data.layout`.
        needs_train: False: nobody asks for them, or the user's lists say which they are.
        needs_val: False: the user's list says which the validation images are.
        names: of the settings, for advice.

    Raises:
        DataError: no such folder, no known layout, or one that is incomplete.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder", mend="check its path")

    def has(path: str) -> bool:
        return (root / path).is_dir() if path.endswith("/") else (root / path).is_file()

    found = detect(has, wanted, called=str(root), names=names)
    base = root / found.base
    if found.layout == FOLDER:
        return _folder(root, names, needs_train=needs_train)
    if found.layout == CITYSCAPES_LAYOUT:
        return _cityscapes(root, base, names, needs_train=needs_train, needs_val=needs_val)
    return _pascal(root, base, found.layout, names, needs_train=needs_train, needs_val=needs_val)


def _info(root: Path, known: DatasetInfo) -> DatasetInfo:
    path = root / MARK
    return load_dataset_info(path, known) if path.is_file() else known


def _folder(root: Path, names: Names, *, needs_train: bool) -> Tree:
    dataset = scan_folder(root, names, needs_train=needs_train)
    train = {item.id: item for item in dataset.train}
    val = {item.id: item for item in dataset.val}
    return Tree(
        layout=FOLDER,
        root=root,
        base=root,
        info=dataset.info,
        train=dataset.train,
        val=dataset.val,
        is_ordered=False,
        train_catalogue=Catalogue(train, (root, root / "train" / "images", root / "train")),
        val_catalogue=Catalogue(
            # A name that both have means the one in val/; the other is found by its path.
            {f"train/images/{id_}" if id_ in val else id_: train[id_] for id_ in train} | val,
            (root, root / "val" / "images", root / "val", root / "train" / "images"),
        ),
        warnings=dataset.warnings,
    )


# ---------------------------------------------------------------- VOC and Context

_LIST_FOLDERS = {
    VOC_LAYOUT: "ImageSets/Segmentation",
    CONTEXT_LAYOUT: "ImageSets/SegmentationContext",
}
_MASK_FOLDERS = {VOC_LAYOUT: "SegmentationClass", CONTEXT_LAYOUT: _CONTEXT_MASKS.rstrip("/")}
_AUGMENTED = "SegmentationClassAug"


def _pascal(
    root: Path, base: Path, layout: str, names: Names, *, needs_train: bool, needs_val: bool
) -> Tree:
    known = known_info(layout)
    assert known is not None
    info = _info(root, known)
    images = files_by_id(base / "JPEGImages", IMAGE_ENDINGS)
    masks = files_by_id(base / _MASK_FOLDERS[layout], MASK_ENDINGS)
    # Its archive has no folders around it: unpacked beside VOCdevkit/ it lies in the root.
    more_masks = base / _AUGMENTED if (base / _AUGMENTED).is_dir() else root / _AUGMENTED
    augmented = files_by_id(more_masks, MASK_ENDINGS) if layout == VOC_LAYOUT else {}
    # Of an image that has both, the augmented one is what training with 10,582 images uses.
    train_masks = {**masks, **augmented}
    places = (root, base, base / "JPEGImages")
    train_catalogue = Catalogue(
        _items(images, train_masks), places, more_masks=more_masks if augmented else None
    )
    val_catalogue = Catalogue(_items(images, {**augmented, **masks}), places)
    folder = base / _LIST_FOLDERS[layout]
    warnings: list[str] = []

    def own_list(name: str, catalogue: Catalogue) -> tuple[Item, ...]:
        path = folder / name
        if not path.is_file():
            raise DataError(
                f"{path}: no such file",
                mend="it comes with the data set; or say which images "
                + (
                    f"are which: data.labeled_list, data.unlabeled_list, {names.val_list}"
                    if names.splits
                    else f"to score on: {names.val_list}"
                    + " (with --split val)" * (name != "val.txt")
                ),
            )
        listed = read_list(path, catalogue, called=str(path), masks="welcome")
        warnings.extend(listed.warnings)
        return tuple(listed.items)

    val = own_list("val.txt", val_catalogue) if needs_val else ()
    val = _with_masks(val, str(folder / "val.txt"), names, warnings)
    borrowed = [item for item in val if item.mask is not None and item.id not in masks]
    if borrowed:
        warnings.append(
            f"{len(borrowed)} of {len(val)} validation images have their mask in {_AUGMENTED} only "
            f"(first: {borrowed[0].mask}), whose outlines are coarser and have no void border: "
            "scores are not those of others; add SegmentationClass of the VOC devkit"
        )
    is_ordered = True
    if not needs_train:
        train: tuple[Item, ...] = ()
    elif augmented and not (folder / "train_aug.txt").is_file():
        held_out = {item.id for item in val}
        if not needs_val and (folder / "val.txt").is_file():
            held_out = {item.id for item in own_list("val.txt", val_catalogue)}
        chosen = sorted(augmented.keys() - held_out)
        _refuse_orphans(chosen, train_catalogue, more_masks)
        train = tuple(train_catalogue.items[id_] for id_ in chosen)
        is_ordered = False
    else:
        train = own_list("train_aug.txt" if augmented else "train.txt", train_catalogue)
        if layout == VOC_LAYOUT and not augmented and (folder / "train_aug.txt").is_file():
            warnings.append(
                f"{folder / 'train_aug.txt'} is left out, as there is no {_AUGMENTED}"
                + "; if SegmentationClass holds those masks, too, give it as data.labeled_list"
                * names.splits
            )
    unlabeled = [item for item in train if item.mask is None]
    if unlabeled and len(unlabeled) < len(train):
        warnings.append(
            f"{len(unlabeled)} of {len(train)} training images have no mask and count as "
            f"unlabeled (first: {unlabeled[0].image})"
        )
    return Tree(
        layout,
        root,
        base,
        info,
        train,
        val,
        is_ordered,
        train_catalogue,
        val_catalogue,
        tuple(warnings),
    )


def _items(images: dict[str, Path], masks: dict[str, Path]) -> dict[str, Item]:
    return {id_: Item(id_, path, masks.get(id_)) for id_, path in images.items()}


def _refuse_orphans(ids: Sequence[str], catalogue: Catalogue, folder: Path) -> None:
    orphans = [id_ for id_ in ids if id_ not in catalogue.items]
    if orphans:
        raise DataError(
            f"{folder / orphans[0]}.png: there is no image of that name in JPEGImages; "
            f"{len(orphans)} such masks",
            mend="add the images, or remove the masks",
        )


def _with_masks(
    val: Sequence[Item], called: str, names: Names, warnings: list[str]
) -> tuple[Item, ...]:
    """Validation images that can be measured."""
    kept = tuple(item for item in val if item.mask is not None)
    if val and not kept:
        raise DataError(
            f"{called}: none of its {len(val)} images has a mask",
            mend=f"add the masks, or say which images to validate on: {names.val_list}",
        )
    if len(kept) < len(val):
        first = next(item for item in val if item.mask is None)
        warnings.append(
            f"{len(val) - len(kept)} of {len(val)} validation images have no mask and are left "
            f"out (first: {first.image})"
        )
    return kept


# ---------------------------------------------------------------- Cityscapes


def _cityscapes(
    root: Path, base: Path, names: Names, *, needs_train: bool, needs_val: bool
) -> Tree:
    train_images = _city_images(base / _IMAGES / "train")
    val_images = _city_images(base / _IMAGES / "val")
    extra_images = _city_images(base / _IMAGES / "train_extra")
    if not train_images and needs_train:
        raise DataError(
            f"{base / _IMAGES / 'train'}: holds no image",
            mend=f"images are CITY/NAME{_IMAGE_SUFFIX}.png, as in leftImg8bit_trainvaltest.zip",
        )
    if not val_images and needs_val:
        raise DataError(
            f"{base / _IMAGES / 'val'}: holds no image",
            mend="put Cityscapes' val/ there, into leftImg8bit and gtFine, or say which images to "
            f"validate on: {names.val_list}",
        )
    kinds = {kind: _city_masks(base / _MASKS, kind) for kind in (_TRAIN_IDS, _IDS)}
    masks, info = _chosen_kind(base, kinds)
    warnings: list[str] = []
    # Those of test/ are trained on only if a list of unlabeled images names them.
    images = {
        **train_images,
        **val_images,
        **extra_images,
        **_city_images(base / _IMAGES / "test"),
    }
    orphans = sorted(masks.keys() - images.keys())
    if orphans:
        warnings.append(
            f"{len(orphans)} masks have no image and are left out (first: {masks[orphans[0]]})"
        )
    items = _items(images, masks)
    train = tuple(items[id_] for id_ in sorted({**train_images, **extra_images}))
    val = tuple(items[id_] for id_ in sorted(val_images))
    val = _with_masks(val, str(base / _IMAGES / "val"), names, warnings)
    sides = [base / _IMAGES / part for part in ("train", "val", "train_extra", "test")]
    catalogue = Catalogue(
        items, (root, base, base / _IMAGES, *sides), suffix=_IMAGE_SUFFIX, mask_suffix=_MASK_SUFFIX
    )
    # The reference read them in the order of its own file system.
    return Tree(
        CITYSCAPES_LAYOUT,
        root,
        base,
        _info(root, info),
        train,
        val,
        False,
        catalogue,
        catalogue,
        tuple(warnings),
    )


def _city_images(folder: Path) -> dict[str, Path]:
    """By id: the name of the file without what all of them end in."""
    return {
        path.stem.removesuffix(_IMAGE_SUFFIX): path
        for path in files_by_id(folder, IMAGE_ENDINGS).values()
        if path.stem.endswith(_IMAGE_SUFFIX)
    }


def _city_masks(folder: Path, suffix: str) -> dict[str, Path]:
    return {
        path.stem.removesuffix(suffix): path
        for part in ("train", "val")
        for path in files_by_id(folder / part, MASK_ENDINGS).values()
        if path.stem.endswith(suffix)
    }


def _chosen_kind(
    base: Path, kinds: dict[str, dict[str, Path]]
) -> tuple[dict[str, Path], DatasetInfo]:
    """One kind of masks that all images have that have any."""
    train_ids, ids = kinds[_TRAIN_IDS], kinds[_IDS]
    if not train_ids and not ids:
        raise DataError(
            f"{base / _MASKS}: holds no mask",
            mend=f"masks are train/CITY/NAME{_IDS}.png, as in gtFine_trainvaltest.zip",
        )
    if train_ids.keys() >= ids.keys():
        return train_ids, CITYSCAPES
    if ids.keys() >= train_ids.keys():
        return ids, CITYSCAPES_IDS
    one = min(train_ids.keys() - ids.keys())
    other = min(ids.keys() - train_ids.keys())
    raise DataError(
        f"{base / _MASKS}: {one} has only {_TRAIN_IDS[1:]}, {other} only {_IDS[1:]}",
        mend=f"add {_IDS[1:]} for all, as in gtFine_trainvaltest.zip",
    )
