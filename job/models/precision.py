"""Keeping a part of a network in float32 while the rest is computed in less."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def in_float32(tensor: Tensor) -> AbstractContextManager[None]:
    """Within the block autocast is off on the tensor's device; `tensor` itself is as it was."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):  # on "meta", where only shapes are computed
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
