"""Number formats: what is computed in half precision, and what never is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from job.config import TrainConfig
from job.errors import ConfigError


def number_format(train: TrainConfig, device: torch.device) -> torch.dtype:
    """What convolutions are computed in.

    Args:
        train: `precision` says it; auto takes bfloat16 where the GPU has it, else float16 where
            it has units for that (T4, V100).
        device: where they are computed.

    Raises:
        ConfigError: bfloat16 is asked for, and the GPU does not have it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "bf16" and not has_bf16:
        raise ConfigError(
            f"train.precision bf16: {torch.cuda.get_device_name(device)} does not have it",
            mend="set train.precision to fp16, fp32 or auto",
        )
    if train.precision == "auto":
        if device.type != "cuda":
            return torch.float32
        if has_bf16:
            return torch.bfloat16
        return torch.float16 if _has_float16_units(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[train.precision]


def is_emulated(number: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU computes convolutions in a format only by way of another: slower than float32.

    Source: the flags of Linux's /proc/cpuinfo.
    """
    if device.type != "cpu" or number == torch.float32 or not _CPU_FACTS.is_file():
        return False
    flags = set(_CPU_FACTS.read_text(encoding="utf-8").split())
    return flags.isdisjoint(_FLAGS[number])


_CPU_FACTS = Path("/proc/cpuinfo")
_FLAGS = {
    torch.bfloat16: {"avx512_bf16", "avx_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def _has_float16_units(device: torch.device) -> bool:
    """Whether a GPU is several times as fast in float16: Volta and Turing, without the GTX 16.

    Source: NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities".
    """
    capability = torch.cuda.get_device_capability(device)
    return (7, 0) <= capability < (8, 0) and "GTX" not in torch.cuda.get_device_name(device)


LEAST_SCALE = 1.0
"""Below it gradients do not fit into float16 as they are, which no scale can mend."""


def gradient_scaler(train: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """What multiplies losses, so that small gradients are not 0 in float16; else it does nothing.

    An update whose gradients were infinite for that is left out, and the scale halved; after 2,000
    good ones it is doubled. With fused optimizers all of it happens on the device.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; torch.amp.GradScaler.
    """
    return torch.amp.GradScaler(device.type, enabled=number_format(train, device) == torch.float16)


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


def weights_cast_once(device: torch.device) -> AbstractContextManager[None]:
    """Within the block, blocks of `computed_in` cast each weight once for all of them.

    The weights must stay as they are meanwhile, and the first that uses them must record gradients:
    what a cast without them gave would be taken later as well.
    Source: torch.autocast keeps what it has cast until the outermost block is left.
    """
    return torch.autocast(device.type, enabled=False)
