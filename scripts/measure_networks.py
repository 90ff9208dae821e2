"""What the generators compute and keep, for job/cloud/networks.yaml.

    .venv/bin/python scripts/measure_networks.py > job/cloud/networks.yaml

Arithmetic is counted by torch's FlopCounterMode at 321 x 321 without computing anything; memory is
that of the tensors kept for the way back, by torch's saved_tensors_hooks at 161 x 161. 21 classes.
"""

from __future__ import annotations

import itertools

import torch
from torch.utils.flop_counter import FlopCounterMode

from job.config import ModelConfig
from job.models.backbones import BACKBONES
from job.models.generator import Architecture, Generator

CLASSES = 21
HEADER = """\
# By backbone, head and output stride; made by scripts/measure_networks.py.
# parameters: in millions; mflop: of a pixel of one image, forward and back; bytes: of a pixel of
# one image, what is kept on the way forward, in single precision."""


def main() -> None:
    """Print the table."""
    print(HEADER)
    for backbone, head, stride in itertools.product(
        BACKBONES, ("deeplabv2", "deeplabv3plus"), (8, 16)
    ):
        model = ModelConfig(backbone=backbone, head=head, output_stride=stride, weights="none")
        architecture = Architecture.of(model, CLASSES)
        parameters, flop = counted(architecture, 321)
        print(
            f"{backbone} {head} {stride}: {{parameters: {parameters / 1e6:.2f}, "
            f"mflop: {flop / 1e6:.3f}, bytes: {kept(architecture, 161):.0f}}}",
            flush=True,
        )


def counted(architecture: Architecture, side: int) -> tuple[int, float]:
    """Parameters, and floating point operations of a pixel."""
    with torch.device("meta"):
        generator = Generator(architecture).train()
        with FlopCounterMode(display=False) as counter:
            generator(torch.zeros(2, 3, side, side)).sum().backward()
    return sum(p.numel() for p in generator.parameters()), counter.get_total_flops() / (
        2 * side * side
    )


def kept(architecture: Architecture, side: int) -> float:
    """Bytes of a pixel."""
    generator = Generator(architecture).train()
    images = torch.rand(2, 3, side, side)
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        generator(images).softmax(dim=1)
    own = {p.data_ptr() for p in generator.parameters()}
    total = sum(one.nbytes() for start, one in storages.items() if start not in own)
    return total / (2 * side * side)


if __name__ == "__main__":
    main()
