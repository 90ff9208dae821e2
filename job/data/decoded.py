"""Images and masks decoded once and kept on the local disk, from where crops are cut.

To decode a photograph of Cityscapes takes 20 times as long as to cut a crop out of it, and an
iteration needs dozens. A file holds one image as Pillow has it in memory, so that it is mapped and
not read: only the rows under a crop ever leave the page cache. What comes out is the same to the
bit as without.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from job.config import DataConfig
from job.data.images import read_facts, read_index_mask, read_rgb
from job.data.splits import SplitItems
from job.errors import DataError
from job.storage.held import DECODED

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<8sII")
_MAGIC = b"s4gan-1\n"
_BYTES = {"RGBX": 4, "L": 1}
"""Of a pixel. Pillow holds RGB in four bytes, too; what has three would have to be copied."""
_LEFT_BYTES = 2 << 30
"""Of the disk, which stay free for checkpoints on their way and what other programs write."""
_SAMPLE = 64
"""Images whose size is looked at; all others are taken to be as large."""
_SHARE = 0.5
"""Of the free memory, and of the free disk, that they may take: what the page cache does not hold
would be read from a disk that is slower than decoding."""


class Decoder:
    """Reads images and masks."""

    def image(self, path: Path) -> Image.Image:
        """See `job.data.images.read_rgb`; the mode is RGB or RGBX, of which only RGB counts."""
        return read_rgb(path)

    def mask(self, path: Path) -> Image.Image:
        """See `job.data.images.read_index_mask`."""
        return read_index_mask(path)


class KeepingDecoder(Decoder):
    """Reads each file once; any number of processes may share a folder.

    Args:
        folder: for the decoded images; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_full = False

    def image(self, path: Path) -> Image.Image:
        """See `Decoder`."""
        return self._kept(path, "RGBX", lambda: read_rgb(path).convert("RGBX"))

    def mask(self, path: Path) -> Image.Image:
        """See `Decoder`."""
        return self._kept(path, "L", lambda: read_index_mask(path))

    def _kept(self, path: Path, mode: str, decode: Callable[[], Image.Image]) -> Image.Image:
        try:
            file = self._folder / _key(path, mode)
        except OSError:
            return decode()  # which says what is wrong
        found = _mapped(file, mode)
        if found is not None:
            return found
        image = decode()
        if not self._is_full:
            try:
                if _free_disk(self._folder) < _LEFT_BYTES:
                    raise OSError(
                        errno.ENOSPC, f"less than {_LEFT_BYTES >> 30} GiB would stay free"
                    )
                _write(file, image)
            except OSError as error:
                self._is_full = True
                log.warning("decoded images are not kept any more: %s", error)
        return image


def _key(path: Path, mode: str) -> str:
    """A name that changes with the file.

    Raises:
        OSError: there is none.
    """
    status = path.stat()
    said = f"{path.absolute()}\n{status.st_size} {status.st_mtime_ns} {mode}"
    return hashlib.sha256(os.fsencode(said)).hexdigest()[:32]


def _mapped(file: Path, mode: str) -> Image.Image | None:
    """The image; None if there is none, or not all of it."""
    try:
        with file.open("rb") as opened:
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # not there, or empty
        return None
    if len(memory) < _HEAD.size:
        return None
    magic, width, height = _HEAD.unpack_from(memory)
    if magic != _MAGIC or len(memory) != _HEAD.size + width * height * _BYTES[mode]:
        return None
    pixels: Any = memoryview(memory)[_HEAD.size :]
    return Image.frombuffer(mode, (width, height), pixels, "raw", mode, 0, 1)


def _write(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with open(handle, "wb") as opened:
            opened.write(_HEAD.pack(_MAGIC, image.width, image.height))
            opened.write(image.tobytes())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def decoded_folder(data: Path) -> Path:
    """Where the decoded images of a data folder are kept on this machine."""
    from job.storage.sync import scratch_root  # loader processes need nothing of S3

    name = hashlib.sha256(os.fsencode(data.absolute())).hexdigest()[:12]
    return scratch_root() / DECODED / name


def decoder(items: SplitItems, data: DataConfig, folder: Path | None) -> Decoder:
    """What training images are read with.

    Args:
        items: of the run.
        data: `cache` says whether decoded images are kept; auto: if they fit into memory.
        folder: for them; None: there is no place.
    """
    if folder is None or data.cache == "none":
        return Decoder()
    if data.cache == "auto":
        needed = _expected_bytes(items)
        memory, disk = _free_memory(), _free_disk(folder) - _LEFT_BYTES
        if needed > _SHARE * min(memory, disk):
            log.warning(
                "decoded, the images take %.1f GB, which is more than half of the free %s: each "
                "is decoded whenever it is needed (--set data.cache=disk keeps them all the same)",
                needed / 1e9,
                "memory" if memory < disk else "disk",
            )
            return Decoder()
    return KeepingDecoder(folder)


def _expected_bytes(items: SplitItems) -> int:
    """Of all training images, decoded."""
    images = [item.image for item in (*items.labeled, *items.unlabeled)]
    sample = _spread(images, _SAMPLE)
    pixels = []
    for path in sample:
        with contextlib.suppress(DataError):  # found later, when it is trained on
            width, height = read_facts(path).size
            pixels.append(width * height)
    mean = sum(pixels) / len(pixels) if pixels else 0
    return round(mean * (len(images) * _BYTES["RGBX"] + len(items.labeled) * _BYTES["L"]))


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    return (
        [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else [*paths]
    )


def _free_disk(folder: Path) -> int:
    """Bytes, where a folder is or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free


def _free_memory() -> int:
    """Bytes that neither the machine nor a container's limit would miss."""
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max": there is no limit
        free.append(_free_in_container(Path("/sys/fs/cgroup")))
    return max(0, min(free, default=0))


def _free_in_container(group: Path) -> int:
    """Bytes below the limit of a control group, by version 2.

    What it has read from files counts as free, as in MemAvailable: data that were just brought here
    would leave no room otherwise. Source: the kernel's admin-guide/cgroup-v2.

    Raises:
        OSError: there is no such group.
        ValueError: it has no limit.
    """
    limit = int((group / "memory.max").read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
    return limit - used
