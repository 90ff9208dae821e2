"""Finding a picture twice: pixel for pixel by a hash, or nearly, as it looks when it is small."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HAMMING_LIMIT = 4
"""Bits of 64 in which the hashes of near duplicates may differ. Of CamVid's 367 training frames,
taken a second apart, 69 pairs are within it, hence the second limit (none with a validation frame);
of copies saved anew as JPEG of quality 20, 99% are, and all at a third of the size."""
CORRELATION_LIMIT = 0.999
"""Least correlation of their thumbnails. All those copies are above 0.9996, also darker ones; all
pairs of CamVid's training frames are below, the closest at 0.9988 (the car stands). Of copies that
were cropped by 1% or made so bright that colours are cut off, most are below, too."""
_FLAT_STD = 2.0
"""A thumbnail that varies less (grey levels of 0..255) shows nothing that could be compared."""
_THUMBNAIL_PX = 16
_TILE = 2048
"""Images compared with as many others at once."""


@dataclass(frozen=True)
class Fingerprint:
    """What an image is compared by, 264 bytes."""

    dhash: int
    """64 bits: which of two neighbours is brighter, in 8 rows of 9 pixels.
    Source: N. Krawetz, "Kind of Like That" (hackerfactor.com, 2013)."""
    thumbnail: bytes
    """Grey, 16 x 16."""


def pixel_digest(image: Image.Image) -> bytes:
    """sha256 of an image's size and decoded pixels: the file's format and names do not count."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\0".encode())
    digest.update(image.tobytes())
    return digest.digest()


def rows_digest(image: Image.Image) -> bytes:
    """sha256 of an image's size and of every 16th row or so: differs only where pixels do.

    Takes a tenth of the time of `pixel_digest`, which is to confirm what it finds.
    """
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\0".encode())
    rows = (image.width, max(1, image.height // 16))
    digest.update(image.resize(rows, Image.Resampling.NEAREST).tobytes())
    return digest.digest()


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of an RGB image."""
    # reducing_gap would be faster for large ones, and makes the hash depend on the size.
    grey = image.convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits(rows[:, 1:] > rows[:, :-1])
    small = grey.resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
    return Fingerprint(int.from_bytes(bits.tobytes(), "big"), small.tobytes())


class Fingerprints:
    """Many fingerprints as arrays, N of them, with the `pixel_digest` of each image."""

    def __init__(self, fingerprints: Sequence[Fingerprint], digests: Sequence[bytes]) -> None:
        # 8 bytes of a sha256 will do: a collision would only leave out a pair that looks the same.
        self.digests = np.array([int.from_bytes(one[:8], "big") for one in digests], np.uint64)
        self.dhashes = np.array([one.dhash for one in fingerprints], np.uint64)
        thumbnails = np.frombuffer(b"".join(one.thumbnail for one in fingerprints), np.uint8)
        self.thumbnails = thumbnails.reshape(-1, _THUMBNAIL_PX**2)

    def __len__(self) -> int:
        return len(self.dhashes)


def near_pairs(
    left: Fingerprints,
    right: Fingerprints | None,
    *,
    limit: int,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[tuple[int, int]], int]:
    """Pairs that look the same but are not; within `left` (each once) where there is no `right`.

    Compares each with each: 10,000 with 100,000 images take some 5 seconds, in 100 MB.

    Args:
        left: some images.
        right: others.
        limit: pairs returned at most.
        stopped: asked several times a second; True ends the search.

    Returns:
        Indices into `left` and `right`, and how many pairs there are in all.
    """
    other = left if right is None else right
    found: list[tuple[int, int]] = []
    count = 0
    for top in range(0, len(left), _TILE):
        rows = slice(top, top + _TILE)
        for start in range(top if right is None else 0, len(other), _TILE):
            if stopped():
                return found[:limit], count
            columns = slice(start, start + _TILE)
            distance = np.bitwise_count(left.dhashes[rows, None] ^ other.dhashes[None, columns])
            candidates = distance <= HAMMING_LIMIT
            candidates &= left.digests[rows, None] != other.digests[None, columns]
            if right is None and start == top:
                candidates = np.triu(candidates, 1)
            i, j = np.nonzero(candidates)
            if len(i) == 0:
                continue
            a, b = _units(left.thumbnails[rows]), _units(other.thumbnails[columns])
            # Pictures on plain ground have all the same hash: then one product is the quicker way.
            few = len(i) <= 8 * _TILE
            correlation = (a[i] * b[j]).sum(axis=1) if few else (a @ b.T)[i, j]
            alike = correlation >= CORRELATION_LIMIT
            count += int(alike.sum())
            if len(found) < limit:
                found += zip((top + i[alike]).tolist(), (start + j[alike]).tolist(), strict=True)
    return found[:limit], count


def _units(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors whose products are correlations; 0 for what shows nothing. Shape: (N, P)."""
    centred = thumbnails.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    shows = length >= _FLAT_STD * _THUMBNAIL_PX
    units: NDArray[np.float32] = np.divide(centred, length, out=np.zeros_like(centred), where=shows)
    return units
