"""Number formats: what is computed in bfloat16, and what never is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from job.config import TrainConfig
from job.errors import ConfigError


def number_format(train: TrainConfig, device: torch.device) -> torch.dtype:
    """What convolutions are computed in.

    Args:
        train: `precision` says it; auto takes bfloat16 where the GPU has it.
        device: where they are computed.

    Raises:
        ConfigError: bfloat16 is asked for, and the GPU does not have it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "bf16" and not has_bf16:
        raise ConfigError(
            f"train.precision bf16: {torch.cuda.get_device_name(device)} does not have it",
            mend="set train.precision to fp32 or auto",
        )
    if train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def prepare(device: torch.device) -> None:
    """Say how a GPU computes in single precision: products in TF32, sums in full.

    That is 10 bits of mantissa, 3 more than bfloat16's. Convolutions are timed once for each size,
    of which training has one.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


@contextlib.contextmanager
def sizes_differ() -> Iterator[None]:
    """Within the block convolutions are not timed: each size of image would be, and each count."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def computed_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within the block convolutions are computed in a format; weights stay in float32.

    What follows them does not: upsampling, softmax, losses, pooled features and the discriminator's
    logits are float32, as the networks and `job.training.losses` see to.
    """
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
