"""Text files that name images, as published splits have them, and permutations of numbers.

One image a line, in one form all through the file:

    2007_000032                                                         id
    JPEGImages/2007_000032.jpg                                          image
    JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png        image and mask

Paths are relative to the data folder, or to a folder of its layout; a slash before them means the
same. Knows nothing of layouts: what a list can name is told by a `Catalogue`.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from job.data.dataset import IMAGE_ENDINGS, Item
from job.errors import ConfigError, DataError
from job.storage.files import local_copy, text_of

NAMES_SHOWN = 3
"""Lines named in one message."""
_MEND_PLACE = (
    "a path is relative to the data folder, so that it travels with the data; "
    "or give an absolute one, or s3://BUCKET/..."
)

Masks = Literal["needed", "welcome", "ignored"]


@dataclass(frozen=True)
class Catalogue:
    """The images that a list can name."""

    items: Mapping[str, Item]
    """By id, with the masks they have."""
    places: Sequence[Path]
    """Folders that paths in a list may begin in; the first that has the file counts."""
    suffix: str = ""
    """End of the image names that is not part of the id."""
    mask_suffix: str = ""
    """What follows the id in the names of masks of which there are several kinds, all of them of
    one image: whichever a list names, the item's own is read."""
    more_masks: Path | None = None
    """Folder of masks that other copies of the data set have merged into the first one."""

    @cached_property
    def _by_path(self) -> dict[Path, Item]:
        """With their ending and, as some lists name them, without."""
        items = self.items.values()
        without = {item.image.with_suffix(""): item for item in items}
        return without | {item.image: item for item in items}

    @cached_property
    def _by_file_name(self) -> dict[str, Item]:
        """With the suffix; with their ending and without."""
        items = self.items.values()
        return {item.image.stem: item for item in items} | {i.image.name: i for i in items}

    def _in_places(self, inside: str) -> Iterator[Path]:
        """Where a path may lead: within a place, or beside it, beginning with its name."""
        head, _, rest = inside.partition("/")
        for place in self.places:
            yield place / inside
            if rest and head == place.name:
                yield place / rest

    def find(self, name: str) -> Item | None:
        """The image of an id, a path or a file name; None if there is none."""
        name = name.removeprefix("./")
        found = self.items.get(name) or self._by_path.get(Path(name))
        if found is not None:
            return found
        inside = name.lstrip("/")
        for path in self._in_places(inside):
            # Some lists leave the suffix out: aachen/aachen_000000_000019.
            found = self._by_path.get(path) or self._by_path.get(Path(f"{path}{self.suffix}"))
            if found is not None:
                return found
        return self.items.get(inside) or (self._by_file_name.get(inside) if self.suffix else None)

    def mask(self, name: str, item: Item) -> Path | None:
        """The mask that a list names for an image; None if it is not there."""
        inside = name.removeprefix("./").lstrip("/")
        if self.mask_suffix:
            own = PurePosixPath(inside).name.startswith(f"{item.id}{self.mask_suffix}")
            return item.mask if own else None
        # Path.is_file raises for a name that is too long.
        return next((path for path in self.mask_places(name) if os.path.isfile(path)), None)

    def mask_places(self, name: str) -> list[Path]:
        """Where a mask that a list names may lie, in the order of looking."""
        inside = name.removeprefix("./").lstrip("/")
        places = [Path(name)] if Path(name).is_absolute() else []
        places += self._in_places(inside)
        if self.more_masks is not None:
            places.append(self.more_masks / PurePosixPath(inside).name)
        return list(dict.fromkeys(places))


@dataclass
class Listed:
    """What a list names, in its order."""

    items: list[Item] = field(default_factory=list)
    """Each once; with the masks that the list names, else their own, or without if they were to be
    ignored."""
    warnings: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def list_file(value: str, *, key: str, root: Path, base: Path) -> Iterator[Path]:
    """The local file that a configuration key names, as long as the block lasts.

    Args:
        value: relative to the data folder, or to the layout's folder in it; absolute; or a URI.
        key: for the errors.
        root: the data folder.
        base: the layout's folder.

    Raises:
        ConfigError: not to be found, or it leads out of the data folder.
        DataError: it is not in the data folder.
        StorageError: the storage failed.
    """
    if "://" in value:
        with local_copy(value, name=key, mend=_MEND_PLACE) as path:
            yield path
        return
    refuse_outside(value, key)
    if Path(value).is_absolute():
        path = Path(value)
        if not os.path.isfile(path):
            raise ConfigError(f"{key} {value}: no such file", mend=_MEND_PLACE)
    else:
        path = next((p for p in (root / value, base / value) if os.path.isfile(p)), root / value)
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file, which {key} names", mend=_MEND_PLACE)
    yield path


def refuse_outside(value: str, key: str) -> None:
    """A relative path must lie in the data folder.

    Raises:
        ConfigError: it does not.
    """
    if not Path(value).is_absolute() and ".." in PurePosixPath(value).parts:
        raise ConfigError(f"{key} {value}: leads out of the data folder", mend=_MEND_PLACE)


def read_list(
    path: Path, catalogue: Catalogue, *, called: str, masks: Masks, splits: bool = False
) -> Listed:
    """Read a list and look its images up.

    Args:
        path: of the file.
        catalogue: what it can name.
        called: the file's name for messages.
        masks: "needed": an image without one is an error; "ignored": none is looked at.
        splits: it says which images are labeled, or are not, so that numbers in it are perhaps a
            permutation.

    Raises:
        DataError: unreadable, empty, of mixed forms, or it names what is not there.
    """
    found = Listed()
    first_kind: tuple[str, int] | None = None
    seen: dict[str, int] = {}
    missing: list[str] = []
    unmasked: list[str] = []
    no_such_mask: list[tuple[str, str, Item]] = []
    twice: list[str] = []
    merged = others = swapped = 0
    numbers = "; a permutation of numbers belongs in data.permutation" if splits else ""
    lines = _lines(path, called, numbers)
    for number, line in lines:
        where = f"line {number}"
        kind, name, mask_name = _parse(line, catalogue, called, where)
        first_kind = first_kind or (kind, number)
        if kind != first_kind[0]:
            raise DataError(
                f"{called}, {where}: {line!r} is {_KINDS[kind]}, line {first_kind[1]} is "
                f"{_KINDS[first_kind[0]]}",
                mend="write all lines of a list in the same form",
            )
        item = catalogue.find(name)
        if item is None:
            missing.append(f"{where}: {name}")
            swapped += mask_name != "" and catalogue.find(mask_name) is not None
            continue
        if masks == "ignored":
            item = replace(item, mask=None)
        elif mask_name:
            mask = catalogue.mask(mask_name, item)
            if mask is None:
                no_such_mask.append((where, mask_name, item))
                continue
            others += item.mask is not None and Path(item.id).name not in mask.stem
            is_merged = catalogue.more_masks is not None and mask.parent == catalogue.more_masks
            merged += is_merged and catalogue.more_masks.name not in mask_name  # type: ignore[union-attr]
            item = replace(item, mask=mask)
        if masks == "needed" and item.mask is None:
            unmasked.append(f"{where}: {name}")
        if item.id in seen:
            twice.append(f"{where}: {name}")
            continue
        seen[item.id] = number
        found.items.append(item)
    if missing:
        raise _missing(
            called, missing, lines, catalogue, numbers, are_swapped=swapped == len(missing)
        )
    if no_such_mask:
        raise _no_such_mask(called, no_such_mask, lines, catalogue)
    if unmasked:
        raise DataError(
            f"{called}: of {_counted(unmasked, len(lines))} there is no mask",
            mend="add the masks, or take the lines out",
        )
    if twice:
        found.warnings.append(f"{called}: names {_counted(twice, len(lines))} a second time")
    if others:
        found.warnings.append(
            f"{called}: pairs {others} of {len(lines)} images with a mask of another name, though "
            "there is one of their own"
        )
    if merged and catalogue.more_masks is not None:
        found.warnings.append(
            f"{called}: {merged} masks are not where it says, but in "
            f"{catalogue.more_masks.name}, from where they are read"
        )
    return found


_KINDS = {"id": "an id", "image": "an image", "pair": "an image and a mask"}


def _lines(path: Path, called: str, numbers: str) -> list[tuple[int, str]]:
    """Lines that hold something, with their numbers."""
    try:
        text = text_of(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{called}: cannot be read as text ({error})",
            mend=f"a list has an image a line{numbers}",
        ) from None
    # Not splitlines, which also cuts at characters that file names may hold.
    stripped = [line.strip() for line in text.split("\n")]
    lines = [(number, line) for number, line in enumerate(stripped, 1) if line]
    if not lines:
        raise DataError(f"{called}: names no image", mend="write an image a line")
    return lines


_NO_COMMA = (
    "a list has no commas between names: an image a line, and behind it, after a tab or a space, "
    "its mask; or nothing else"
)


def _parse(line: str, catalogue: Catalogue, called: str, where: str) -> tuple[str, str, str]:
    """The form of a line, the image it names, and the mask or nothing."""
    if line in catalogue.items:
        return "id", line, ""
    words = line.split()
    if len(words) == 1 or catalogue.find(line) is not None:
        is_image = line.lower().endswith(tuple(IMAGE_ENDINGS))
        return ("image" if is_image else "id"), line, ""
    pairs = [(words[0], words[1])] if len(words) == 2 else []
    if "\t" in line:
        left, _, right = line.partition("\t")
        pairs = [(left.strip(), right.strip())]
    for left, right in pairs:
        if right.lower().endswith(tuple(IMAGE_ENDINGS)):
            return "pair", left, right
    raise DataError(
        f"{called}, {where}: {line!r} is neither an id, nor an image, nor an image and a mask",
        mend=_NO_COMMA
        if "," in line
        else "for example: 2007_000032, or images/a.jpg, or images/a.jpg masks/a.png (a tab "
        "between them where names hold spaces)",
    )


def _missing(
    called: str,
    missing: Sequence[str],
    lines: Sequence[tuple[int, str]],
    catalogue: Catalogue,
    numbers: str,
    *,
    are_swapped: bool,
) -> DataError:
    are_all = len(missing) == len(lines)
    if are_all and all(line.isdecimal() for _, line in lines):
        return DataError(
            f"{called}: holds numbers and no names",
            mend=f"a list has an image a line{numbers}",
        )
    first = missing[0].partition(": ")[2]
    near = difflib.get_close_matches(Path(first).stem, catalogue.items, n=1, cutoff=0.8)
    if are_swapped:
        mend = "the image comes first on a line, and behind it its mask: swap the two"
    elif are_all and all("," in line for _, line in lines):
        mend = _NO_COMMA
    elif (inside := _end_that_is_there(first, catalogue)) is not None:
        mend = f"{inside} is there: take {first.removesuffix(inside)} out of the lines"
    elif "\\" in first:
        mend = "write paths with / between folders, not \\"
    else:
        mend = (f"did you mean {near[0]}? " if near else "") + (
            "paths in a list are relative to the data folder; take lines out, or add the files"
        )
    return DataError(
        f"{called}: names {_counted(missing, len(lines))}, which are not in the data", mend=mend
    )


def _end_that_is_there(name: str, catalogue: Catalogue) -> str | None:
    """What is left of an absolute path, of another machine perhaps, when its first folders go."""
    parts = PurePosixPath(name).parts
    if parts[:1] != ("/",):
        return None
    ends = ("/".join(parts[first:]) for first in range(2, len(parts)))
    return next((end for end in ends if catalogue.find(end) is not None), None)


def _no_such_mask(
    called: str,
    missing: Sequence[tuple[str, str, Item]],
    lines: Sequence[tuple[int, str]],
    catalogue: Catalogue,
) -> DataError:
    """Of images that are there."""
    counted = _counted([f"{where}: {name}" for where, name, _ in missing], len(lines))
    _, first, item = missing[0]
    if catalogue.mask_suffix and not PurePosixPath(first).name.startswith(f"{item.id}_"):
        return DataError(
            f"{called}: names masks of other images for {counted}",
            mend=f"the masks of {item.id} begin with its name; or name the images alone",
        )
    places = ", ".join(str(path) for path in catalogue.mask_places(first))
    own = f"there is {item.mask}: name it, or the images alone; or " if item.mask else ""
    return DataError(
        f"{called}: the masks that it names for {counted} are missing; looked for {places}",
        mend=f"{own}add the masks (paths in a list are relative to the data folder), or take the "
        "lines out",
    )


def _counted(names: Sequence[str], total: int) -> str:
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return f"{len(names)} of {total} images ({shown})"


# ---------------------------------------------------------------- permutations


def read_permutation(path: Path, *, called: str, count: int) -> list[int]:
    """Read a permutation of 0..count-1.

    Args:
        path: text (numbers between white space), or .npy, or .pkl; of the latter only lists of
            integers and numpy arrays of them are understood, and nothing in it is ever called.
        called: the file's name for messages.
        count: how many numbers there must be.

    Raises:
        DataError: unreadable, something else than integers, or no permutation of that many.
    """
    ending = path.suffix.lower()
    try:
        if ending == ".npy":
            values = np.load(path, allow_pickle=False)
        elif ending in (".pkl", ".pickle"):
            values = _unpickled(path.read_bytes())
        else:
            values = np.array([int(word) for word in path.read_text(encoding="utf-8").split()])
    except DataError:
        raise
    except Exception as error:  # a damaged file makes all kinds of them
        raise DataError(
            f"{called}: cannot be read as a permutation ({type(error).__name__}: {error})",
            mend="give whole numbers as text between white space, or a .npy or .pkl of them",
        ) from None
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise DataError(
            f"{called}: holds an array of {values.ndim} dimensions and type {values.dtype}",
            mend="a permutation is one row of whole numbers",
        )
    if len(values) != count:
        raise DataError(
            f"{called}: holds {len(values)} numbers, the training list {count} images",
            mend="a permutation belongs to the list it was made for: give that list, too "
            "(data.labeled_list)",
        )
    if not np.array_equal(np.sort(values), np.arange(count)):
        raise DataError(
            f"{called}: is no permutation of 0..{count - 1}: numbers are missing or come twice",
            mend="each number must come once",
        )
    return [int(value) for value in values]


class _Dtype:
    """Stands for a numpy.dtype in a pickle: remembers what it was made of."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = _text(code)
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])

    @property
    def numpy(self) -> np.dtype[Any]:
        """The type, if it is one of integers."""
        if self.code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise pickle.UnpicklingError(f"an array of type {self.code!r}")
        return np.dtype({"|": "", "=": "="}.get(self.order, self.order) + self.code)


class _Array:
    """Stands for a numpy array in a pickle, likewise."""

    def __init__(self, data: Any = b"", dtype: Any = None, shape: Any = (0,), *_: Any) -> None:
        self.data, self.dtype, self.shape = data, dtype, shape

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, _, self.data = state

    @property
    def numpy(self) -> NDArray[Any]:
        """The array, if it is one of integers."""
        if not isinstance(self.dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type")
        dtype = self.dtype.numpy  # first: other types have other data
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        if not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array without data")
        return np.frombuffer(data, dtype).reshape(tuple(self.shape))


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _made_empty(*_: Any) -> _Array:
    return _Array()


def _made_scalar(dtype: Any, data: Any = b"") -> _Array:
    return _Array(data, dtype, ())


def _latin1(text: str, *_: Any) -> bytes:
    """How older protocols write bytes."""
    return text.encode("latin1")


_UNDERSTOOD: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _latin1,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _made_empty),
            ("multiarray", "scalar", _made_scalar),
            ("numeric", "_frombuffer", _Array),
        )
    },
}
"""What a pickle of numbers may name, and what stands for it here: nothing of numpy's own, which
trusts what it is given."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what stands for arrays."""
        if (module, name) not in _UNDERSTOOD:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _UNDERSTOOD[module, name]


def _unpickled(data: bytes) -> NDArray[Any]:
    """A pickled list of integers, or array of them."""
    # Those of Python 2 hold bytes as text.
    found = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    if isinstance(found, _Array):
        return found.numpy
    if isinstance(found, (list, tuple)):
        numbers = [one.numpy.item() if isinstance(one, _Array) else one for one in found]
        if all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
            return np.array(numbers, np.int64)
    raise pickle.UnpicklingError("it holds neither a list of whole numbers nor an array of them")
