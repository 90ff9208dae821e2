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
taken a second apart, 69 pairs are within it (none between train and val); of copies saved anew as
JPEG of quality 20 or at a third of the size, 98% are."""
CORRELATION_LIMIT = 0.999
"""Least correlation of their thumbnails. All those copies are above 0.9996, also darker ones; all
pairs of different CamVid frames below, the closest at 0.9988 (the car stands)."""
_FLAT_STD = 2.0
"""A thumbnail that varies less (grey levels of 0..255) shows nothing that could be compared."""
_THUMBNAIL_PX = 16
_PAIRS_AT_ONCE = 4_000_000
_CANDIDATES_AT_ONCE = 16_384


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
        self.thumbnails = thumbnails.reshape(len(fingerprints), -1)

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
    rows_at_once = max(1, _PAIRS_AT_ONCE // max(1, len(other)))
    for start in range(0, len(left), rows_at_once):
        if stopped():
            break
        hashes = left.dhashes[start : start + rows_at_once]
        distance = np.bitwise_count(hashes[:, None] ^ other.dhashes[None])
        rows, columns = np.nonzero(distance <= HAMMING_LIMIT)
        rows += start
        if right is None:
            rows, columns = rows[rows < columns], columns[rows < columns]
        for begin in range(0, len(rows), _CANDIDATES_AT_ONCE):
            if stopped():
                break
            i, j = (indices[begin : begin + _CANDIDATES_AT_ONCE] for indices in (rows, columns))
            alike = _correlation(left.thumbnails[i], other.thumbnails[j]) >= CORRELATION_LIMIT
            alike &= left.digests[i] != other.digests[j]
            count += int(alike.sum())
            if len(found) < limit:
                found += zip(i[alike].tolist(), j[alike].tolist(), strict=True)
    return found[:limit], count


def _correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Of each row with its counterpart, -1..1; (N, P) -> (N,). 0 where one shows nothing."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    x -= x.mean(axis=1, keepdims=True)
    y -= y.mean(axis=1, keepdims=True)
    x_std, y_std = x.std(axis=1), y.std(axis=1)
    shows = (x_std >= _FLAT_STD) & (y_std >= _FLAT_STD)
    together = (x * y).mean(axis=1)
    correlation: NDArray[np.float32] = np.divide(
        together, x_std * y_std, out=np.zeros_like(together), where=shows
    )
    return correlation
