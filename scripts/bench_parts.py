"""What an iteration does beside the networks, each part alone: done plainly against ours, by turns.

    THP_MEM_ALLOC_ENABLE=1 python -m scripts.bench_parts

On the CPU, 16 images of 321 x 321, 21 classes, one checkpoint of DeepLabv2-ResNet-101. `s4gan`
itself sets that variable. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from job.data.dataset import IGNORE, DatasetInfo, default_palette
from job.data.images import cut_image, cut_mask, random_crop
from job.events import TrainEvent
from job.models.discriminator import discriminator_input, discriminator_input_of_labels
from job.models.normalization import NORMALIZATIONS, Normalize
from job.monitor import Trackers
from job.monitor.console import ConsoleTracker
from job.monitor.ledger import Ledger
from job.storage.local import LocalStore
from job.training import losses
from job.training.state import TrainState
from scripts.bench import CLASSES, Case, machine, random_batch, seconds_of, spread, state_of
from scripts.bench_save import publishing
from scripts.plain_step import (
    class_maps_on_cpu,
    picked_cross_entropy,
    picked_self_training,
    scaled_then_cut,
)

CPU = torch.device("cpu")
IMAGES, CROP = 16, 321
PHOTO = (500, 375)
"""Width and height; of most of VOC 2012."""

Work = Callable[[], Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(machine(CPU))
    print("\n| part | plain, ms | ours, ms | ours / plain, median (least to most) |")
    print("|---|---|---|---|")
    sums = {"plain": [0.0] * rounds, "ours": [0.0] * rounds}

    def row(name: str, plain: Work, ours: Work, between: Work = lambda: None) -> None:
        times = by_turns(plain, ours, rounds, between)
        print_row(name, times)
        for step, values in times.items():
            sums[step] = [a + b for a, b in zip(sums[step], values, strict=True)]

    with logging_of_100_iterations() as logging:
        for part in (*loss_parts(), augmentation(), logging):
            row(*part)
    print_row("**together**", sums)
    with checkpoint_of(resnet101_state()) as checkpoint:
        row("checkpoint: the training stands still", *checkpoint)
    print_row("**all of it**", sums)


def by_turns(plain: Work, ours: Work, rounds: int, between: Work) -> dict[str, list[float]]:
    """Milliseconds of each, round by round, after one that does not count.

    Args:
        plain: measured.
        ours: measured.
        rounds: of both.
        between: done after each of the two, not measured.
    """
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(rounds + 1):
        for step, work in (("plain", plain), ("ours", ours)):
            ms = 1e3 * seconds_of(work, CPU)
            between()
            if number:
                times[step].append(ms)
    return times


def print_row(name: str, times: dict[str, list[float]]) -> None:
    """One part of the table."""
    ratios = [ours / plain for ours, plain in zip(times["ours"], times["plain"], strict=True)]
    plain, ours = (statistics.median(times[step]) for step in ("plain", "ours"))
    print(f"| {name} | {plain:.1f} | {ours:.1f} | {spread(ratios, 3)} |")


def loss_parts() -> list[tuple[str, Work, Work]]:
    """The discriminator's input, cross-entropy, and the gate with its loss."""
    batch = random_batch(Case("tiny", CROP, IMAGES), CPU)
    assert batch.real_images is not None
    assert batch.real_masks is not None
    assert batch.unlabeled_valid is not None
    masks, valid = batch.real_masks, batch.unlabeled_valid
    images, labeled = batch.real_images, masks != IGNORE
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, CLASSES, CROP, CROP, generator=generator)
    scores = torch.randn(IMAGES, generator=generator)

    def learned(loss: Callable[[Tensor], Tensor]) -> Work:
        def work() -> None:
            given = logits.detach().requires_grad_()
            loss(given).backward()

        return work

    def gated(given: Tensor) -> Tensor:
        accepted = losses.gate(scores, 0.5)[:, None, None] & valid
        probability, labels = losses.most_probable(given.detach(), accepted)
        return losses.self_training(given, labels, accepted, probability > -torch.inf)

    return [
        (
            "labels as the discriminator sees them",
            lambda: discriminator_input(class_maps_on_cpu(masks, CLASSES), images.float(), labeled),
            lambda: discriminator_input_of_labels(masks, CLASSES, images, labeled),
        ),
        (
            "cross-entropy, forward and back",
            learned(lambda given: picked_cross_entropy(given, masks)),
            learned(lambda given: losses.cross_entropy(given, masks)),
        ),
        (
            "gate and self-training, forward and back",
            learned(lambda given: picked_self_training(given, scores.sigmoid(), valid, 0.5)[0]),
            learned(gated),
        ),
    ]


def augmentation() -> tuple[str, Work, Work]:
    """Scaled, cut, mirrored and normalized; images and masks are decoded already."""
    normalize = Normalize(NORMALIZATIONS["reference-voc"])
    rng = np.random.default_rng(0)
    names = tuple(f"class {index}" for index in range(CLASSES))
    info = DatasetInfo(names, IGNORE, default_palette(CLASSES))
    pairs = []
    for _ in range(IMAGES):
        pixels = rng.integers(0, 256, (*PHOTO[::-1], 3), np.uint8)
        labels = rng.integers(0, CLASSES, PHOTO[::-1], np.uint8)
        crop = random_crop(
            rng, (CROP, CROP), image_scale=1.0, scale_range=(0.5, 1.5), random_mirror=True
        )
        pairs.append((Image.fromarray(pixels), Image.fromarray(labels), crop))

    def plain() -> tuple[Tensor, Tensor]:
        images, masks = zip(*(scaled_then_cut(*pair) for pair in pairs), strict=True)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)).long()

    def ours() -> tuple[Tensor, Tensor]:
        images = np.stack([cut_image(image, crop) for image, _, crop in pairs])
        masks = np.stack([cut_mask(mask, crop, info) for _, mask, crop in pairs])
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return normalize(batch), torch.from_numpy(masks)

    name = f"scaling, cutting, mirroring and normalizing {PHOTO[0]} x {PHOTO[1]}"
    return name, plain, ours


@contextmanager
def logging_of_100_iterations() -> Iterator[tuple[str, Work, Work]]:
    """Read back, printed and written at each iteration; or at the last, as `train.log_every`."""
    values = [torch.tensor(value) for value in (0.5, 0.1, 0.2, 0.3)]
    finite = torch.tensor(True)
    text = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="s4gan-") as folder:
        ledger = Ledger(Path(folder, "metrics.jsonl"), attempt=1)
        tracker = Trackers([ConsoleTracker(Console(file=text), 1_000_000, 0), ledger])

        def plain() -> None:
            for iteration in range(1, 101):
                ce, fm, st, d = (value.item() for value in values)
                with Path(folder, "losses.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{iteration} {ce} {fm} {st} {d}\n")
                print(f"iter = {iteration}, ce = {ce:.3f}, fm = {fm:.3f}, st = {st:.3f}", file=text)

        def ours() -> None:
            for iteration in range(1, 101):
                finite.logical_and_(torch.isfinite(values[0] + values[3]))
                tracker.step_done(iteration)
            ce, fm, st, d = (value.item() for value in values)
            tracker.train(
                TrainEvent(
                    iteration=iteration,
                    loss_ce=ce,
                    loss_fm=fm,
                    loss_st=st,
                    loss_d=d,
                    loss_g=ce + fm + st,
                    st_count=4,
                    lr_g=1e-4,
                    lr_d=1e-4,
                    images_per_s=10.0,
                )
            )

        try:
            yield "logging of 100 iterations", plain, ours
        finally:
            ledger.close()


def resnet101_state() -> TrainState:
    """Of both networks, with that of their optimizers."""
    state = state_of("ours", Case("resnet101", CROP, 1).config(), CPU)
    for network, optimizer in (
        (state.generator, state.optimizer_G),
        (state.discriminator, state.optimizer_D),
    ):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # gives it its state
    return state


@contextmanager
def checkpoint_of(state: TrainState) -> Iterator[tuple[Work, Work, Work]]:
    """Both networks with their optimizers: written at once, or copied and written meanwhile.

    Gives both, and what waits until the second is written.
    """
    with tempfile.TemporaryDirectory(prefix="s4gan-") as folder:
        store = LocalStore(Path(folder) / "run")
        with publishing(store, Path(folder) / "scratch") as publisher:

            def plain() -> None:
                torch.save(state.state_dict(), Path(folder) / "plain.pth")

            def ours() -> None:
                state.iteration += 1
                publisher.save(state.state_dict(), best=None, numbered=False)

            yield plain, ours, publisher.finish


if __name__ == "__main__":
    main()
