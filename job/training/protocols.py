"""How a whole image is looked at: the field's protocols, sliding windows, flips and scales.

Shape legend: K classes, C channels, H/W pixels of the labels, h/w of what the network is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from job.data.images import PADDING_RGB
from job.errors import ConfigError

MOST_AT_ONCE = 4
"""Windows that pass through the network together."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Protocol:
    """What is done to an image before and after the network; by default nothing."""

    name: str = "plain"
    resize_to: Size | None = None
    """Image and labels are resized to this; scores are then those of the resized labels."""
    short_side: int | None = None
    """Image and labels are resized so that the shorter side has so many pixels."""
    centre_crop: Size | None = None
    """Of image and labels, after resizing, only this much of the middle is scored."""
    pad_to: Size | None = None
    """The image is padded at bottom and right to at least this; what is padded is cut off again."""
    window: Size | None = None
    """The network sees so much at a time; probabilities are averaged where windows overlap."""
    stride: Size | None = None
    """From window to window; by default two thirds of one."""
    flip: bool = False
    """Averaged with the mirrored image's probabilities."""
    scales: tuple[float, ...] = (1.0,)
    """Averaged over the image resized by these."""

    @property
    def resizes(self) -> bool:
        """Whether the network is shown a size that the protocol says, whatever `image_scale` is."""
        return self.resize_to is not None or self.short_side is not None

    @property
    def averages(self) -> bool:
        """Whether there is more than one look at a pixel."""
        return self.window is not None or self.flip or self.scales != (1.0,)

    def fits(self, height: int, width: int) -> bool:
        """Whether the network sees so much at a time, so that no window slides over it."""
        window = self.window
        return window is None or (window[0] >= height and window[1] >= width)

    def sees_whole(self, height: int, width: int) -> bool:
        """Whether an image fits at every scale."""
        most = max(self.scales)
        return self.fits(round(height * most), round(width * most))

    def changed(
        self,
        *,
        window: str | None = None,
        stride: str | None = None,
        flip: bool = False,
        scales: str | None = None,
    ) -> Protocol:
        """With what the command line adds.

        Args:
            window: "HxW", or one number.
            stride: likewise.
            flip: whether to average with the mirrored image.
            scales: numbers with commas between.

        Raises:
            ConfigError: not of that form.
        """
        found = self
        if window is not None:
            found = replace(found, window=_size("--window", window), stride=None)
        if stride is not None:
            if found.window is None:
                raise ConfigError(f"--stride {stride}: there is no window", mend="add --window HxW")
            found = replace(found, stride=_size("--stride", stride))
        if found.window and found.stride:
            for step, side in zip(found.stride, found.window, strict=True):
                if step > side:
                    raise ConfigError(
                        f"--stride {stride}: is larger than the window, which would leave gaps",
                        mend="give at most the window's size",
                    )
        if scales is not None:
            found = replace(found, scales=_scales(scales))
        return replace(found, flip=True) if flip else found

    def fitted(self, image: Image.Image, *, labels: bool = False) -> Image.Image:
        """Resize and crop an image, or labels without mixing them."""
        size = self._fitted_size(image)
        if size != (image.height, image.width):
            how = Image.Resampling.NEAREST if labels else Image.Resampling.BILINEAR
            image = image.resize((size[1], size[0]), how)
        if self.centre_crop is None:
            return image
        height, width = (
            min(a, b) for a, b in zip(self.centre_crop, (image.height, image.width), strict=True)
        )
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))

    def _fitted_size(self, image: Image.Image) -> Size:
        if self.resize_to is not None:
            return self.resize_to
        if self.short_side is None:
            return image.height, image.width
        factor = self.short_side / min(image.height, image.width)
        return round(image.height * factor), round(image.width * factor)


PLAIN = Protocol()
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        PLAIN,
        # The S4GAN reference's evaluate.py: one pass over the padded image; 500x500 is the largest.
        Protocol("voc", pad_to=(505, 505)),
        # The same: half resolution, labels too, so that scores are not those of full resolution.
        Protocol("cityscapes", resize_to=(512, 1024)),
        # Newer work scores the full resolution: UniMatch (arXiv:2208.09910), windows of its crop.
        Protocol("cityscapes-full", window=(801, 801)),
        # The reference's: the middle of the image only.
        Protocol("context", short_side=512, centre_crop=(512, 512)),
    )
}


def protocol_named(name: str) -> Protocol:
    """One of `PROTOCOLS`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ConfigError(
            f"--protocol {name}: there is no such protocol",
            mend=f"choose one of {', '.join(PROTOCOLS)}",
        )
    return PROTOCOLS[name]


def probabilities(
    generator: nn.Module, image_CHW: Tensor, size: Size, protocol: Protocol
) -> Tensor:
    """Of each class at each pixel: the mean over scales, mirrored images and windows.

    Of each look the softmax is averaged, at the size that is asked for. The generator must be in
    evaluation mode.

    Shape: image uint8 (3, h, w) -> float32 (K, H, W), `size` = (H, W).
    """
    total: Tensor | None = None
    looks = 0
    for view, mirrored in _views(image_CHW, protocol):
        found = _of_view(generator, view, size, protocol)
        found = found.flip(-1) if mirrored else found
        total = found if total is None else total + found
        looks += 1
    assert total is not None
    return total / looks


def logits_of(generator: nn.Module, images_NCHW: Tensor, protocol: Protocol) -> Tensor:
    """Of whole images, padded for the network if the protocol says so."""
    height, width = images_NCHW.shape[-2:]
    padded = _padded(images_NCHW, protocol.pad_to)
    logits: Tensor = generator(padded)
    return logits[..., :height, :width]


def _views(image_CHW: Tensor, protocol: Protocol) -> Iterator[tuple[Tensor, bool]]:
    for scale in protocol.scales:
        view = image_CHW
        if scale != 1.0:
            height, width = (max(1, round(side * scale)) for side in image_CHW.shape[-2:])
            view = F.interpolate(
                image_CHW[None].float(), (height, width), mode="bilinear", antialias=True
            )[0]
        yield view, False
        if protocol.flip:
            yield view.flip(-1), True


def _of_view(generator: nn.Module, view: Tensor, size: Size, protocol: Protocol) -> Tensor:
    height, width = view.shape[-2:]
    if protocol.fits(height, width):
        logits = logits_of(generator, view[None], protocol)
        return _resized(logits, size).softmax(dim=1)[0]
    assert protocol.window is not None  # or it would fit
    return _resized(_of_windows(generator, view, protocol.window, protocol)[None], size)[0]


def _of_windows(generator: nn.Module, view: Tensor, window: Size, protocol: Protocol) -> Tensor:
    """Probabilities at the view's own size."""
    height, width = view.shape[-2:]
    least = protocol.pad_to or window
    padded = _padded(view[None], (max(window[0], least[0]), max(window[1], least[1])))[0]
    stride = protocol.stride or (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))
    places = [
        (top, left)
        for top in _starts(padded.shape[-2], window[0], stride[0])
        for left in _starts(padded.shape[-1], window[1], stride[1])
    ]
    total: Tensor | None = None
    counts = torch.zeros(padded.shape[-2:], device=view.device)
    for first in range(0, len(places), MOST_AT_ONCE):
        some = places[first : first + MOST_AT_ONCE]
        cut = torch.stack([padded[:, t : t + window[0], le : le + window[1]] for t, le in some])
        maps = generator(cut).softmax(dim=1)
        if total is None:
            total = torch.zeros((maps.shape[1], *padded.shape[-2:]), device=view.device)
        for one, (top, left) in zip(maps, some, strict=True):
            total[:, top : top + window[0], left : left + window[1]] += one
            counts[top : top + window[0], left : left + window[1]] += 1
    assert total is not None
    return (total / counts)[:, :height, :width]


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every stride, and the last one ends with the image."""
    last = length - window
    return [*range(0, last, stride), last]


def _padded(images_NCHW: Tensor, least: Size | None) -> Tensor:
    """At bottom and right, in the colour that crops are padded with."""
    height, width = images_NCHW.shape[-2:]
    if least is None or (height >= least[0] and width >= least[1]):
        return images_NCHW
    colour = torch.tensor(PADDING_RGB, dtype=images_NCHW.dtype, device=images_NCHW.device)
    padded = colour.view(1, 3, 1, 1).repeat(
        len(images_NCHW), 1, max(height, least[0]), max(width, least[1])
    )
    padded[..., :height, :width] = images_NCHW
    return padded


def _resized(maps_NKHW: Tensor, size: Size) -> Tensor:
    if tuple(maps_NKHW.shape[-2:]) == tuple(size):
        return maps_NKHW
    return F.interpolate(maps_NKHW, size, mode="bilinear", align_corners=True)


# ---------------------------------------------------------------- what the command line says


def _size(flag: str, text: str) -> Size:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None or int(found[1]) < 1 or int(found[2] or 1) < 1:
        raise ConfigError(f"{flag} {text}: must be HEIGHTxWIDTH in pixels", mend=f"{flag} 512x512")
    return int(found[1]), int(found[2] or found[1])


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0.05 <= scale <= 8 for scale in scales):
        raise ConfigError(
            f"--scales {text}: must be numbers of 0.05 to 8", mend="--scales 0.75,1,1.25"
        )
    return scales
