"""All that a data folder holds for a configuration: its layout, and what lists choose among it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from job.config import DataConfig
from job.data.dataset import FOLDER, Dataset, Item
from job.data.layouts import VOC_LAYOUT, Tree, scan_tree
from job.data.lists import Catalogue, Masks, list_file, read_list, read_permutation
from job.data.names import TRAINING, Names
from job.errors import DataError


def scan_dataset(
    root: Path,
    data: DataConfig | None = None,
    *,
    needs_train: bool = True,
    names: Names = TRAINING,
) -> Dataset:
    """List a data folder of any layout, with the lists of a configuration; opens no image.

    Args:
        root: the data folder.
        data: layout and lists; by default the layout is looked for and there are no lists.
        needs_train: False: only the validation images will be used; there may be no others.
        names: of the settings, for advice.

    Raises:
        ConfigError: a list is not to be found.
        DataError: no such folder, no known layout, an incomplete one, a list that names what is not
            there, or lists that contradict each other.
        StorageError: a list in S3 cannot be fetched.
    """
    data = data or DataConfig()
    chosen = bool(data.labeled_list and data.unlabeled_list)
    tree = scan_tree(
        root,
        data.layout,
        needs_train=needs_train and not chosen,
        needs_val=data.val_list is None,
        names=names,
    )
    warnings = list(tree.warnings)

    def read(key: str, value: str | None, catalogue: Catalogue, masks: Masks) -> list[Item] | None:
        if value is None:
            return None
        with list_file(value, key=key, root=root, base=tree.base) as path:
            called = _called(value, path)
            listed = read_list(
                path, catalogue, called=called, masks=masks, splits=key != names.val_list
            )
        warnings.extend(listed.warnings)
        return listed.items

    train, val = tree.train_catalogue, tree.val_catalogue
    labeled = read("data.labeled_list", data.labeled_list, train, "needed")
    unlabeled = read("data.unlabeled_list", data.unlabeled_list, train, "ignored")
    held_out = read(names.val_list, data.val_list, val, "needed")
    if data.permutation is not None:
        labeled = _permuted(tree, data, labeled)
    held_out = list(tree.val) if held_out is None else held_out
    chooser = "data.labeled_list" if data.permutation is None else "data.permutation"
    _refuse_both(labeled, chooser, held_out, "validation")
    _refuse_both(unlabeled, "data.unlabeled_list", held_out, "validation")
    _refuse_both(labeled, chooser, unlabeled, "unlabeled")
    if labeled is None and data.val_list is None:
        _refuse_both(tree.train, f"{tree.base}: the training list", held_out, "validation")
    if labeled is not None and not held_out:
        warnings.append(
            "there are no validation images, so that some of data.labeled_list are held out "
            "(--val-split); data.val_list can name others"
        )
    return Dataset(
        root=root,
        info=tree.info,
        train=_pool(tree, labeled or (), unlabeled or (), held_out),
        val=tuple(sorted(held_out, key=lambda item: item.id)),
        warnings=tuple(warnings),
        layout=tree.layout,
        labeled=_ids(labeled),
        unlabeled=_ids(unlabeled),
    )


def _called(value: str, path: Path) -> str:
    """A list by its name in the configuration, or by its place in the data."""
    return value if "://" in value else str(path)


def _ids(items: Iterable[Item] | None) -> tuple[str, ...] | None:
    return None if items is None else tuple(sorted(item.id for item in items))


def _pool(
    tree: Tree, labeled: Iterable[Item], unlabeled: Iterable[Item], held_out: Iterable[Item]
) -> tuple[Item, ...]:
    """All training images by id, with the masks that lists give them; none that is held out."""
    taken = {item.image for item in held_out}
    pool = {item.id: item for item in tree.train if item.image not in taken}
    pool |= {item.id: item for item in unlabeled if item.id not in pool}
    pool |= {item.id: item for item in labeled}
    return tuple(pool[id_] for id_ in sorted(pool))


def _permuted(tree: Tree, data: DataConfig, listed: list[Item] | None) -> list[Item]:
    """The labeled images that a permutation chooses, of the layout's list or the user's."""
    assert data.permutation is not None
    if listed is None and not tree.is_ordered:
        why = (
            "the names of our own layout have no order but the alphabet's"
            if tree.layout == FOLDER
            else "there is no train_aug.txt"
            if tree.layout == VOC_LAYOUT
            else "the order that such files were made for is that of somebody's file system"
        )
        raise DataError(
            f"data.permutation {data.permutation}: nothing says what its numbers count: {why}",
            mend="give the list that it was made for as data.labeled_list",
        )
    order: Sequence[Item] = tree.train if listed is None else listed
    with list_file(
        data.permutation, key="data.permutation", root=tree.root, base=tree.base
    ) as path:
        called = _called(data.permutation, path)
        numbers = read_permutation(path, called=called, count=len(order))
    # In floating point and rounded down: that is how those splits were cut.
    chosen = [order[number] for number in numbers[: int(data.labeled_ratio * len(order))]]
    if not chosen:
        raise DataError(
            f"data.labeled_ratio {data.labeled_ratio:g}: of the {len(order)} images that "
            f"data.permutation counts, that is none (rounded down)",
            mend=f"--set data.labeled_ratio={math.ceil(1000 / len(order)) / 1000:g}, at least",
        )
    unmasked = [item for item in chosen if item.mask is None]
    if unmasked:
        raise DataError(
            f"{called}: of {len(unmasked)} of {len(chosen)} labeled images there is no mask "
            f"(first: {unmasked[0].image})",
            mend="add the masks",
        )
    return chosen


def _refuse_both(
    ours: Iterable[Item] | None, called: str, theirs: Iterable[Item] | None, other: str
) -> None:
    """An image must not be learned from and measured on, nor be labeled and unlabeled."""
    taken = {item.image for item in theirs or ()}
    both = [item for item in ours or () if item.image in taken]
    if both:
        raise DataError(
            f"{called}: {len(both)} of its images are {other} images at the same time "
            f"(first: {both[0].image})",
            mend="take them out of one of the two",
        )
