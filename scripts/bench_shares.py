"""Where the time of an iteration goes, and what a second process is worth.

    THP_MEM_ALLOC_ENABLE=1 python -m scripts.bench_shares

The networks and the optimizers, each alone on what an iteration gives them, by turns with the whole
iteration; all else in it is the rest. What is done beside the training, or now and then, has no
share: it is told how long that takes. Then `s4gan train` with one process and with two. Prints two
Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch.autograd import backward, grad

from job.config import Config
from job.data.streams import Batch, IterationDataset
from job.training.precision import computed_in, number_format
from job.training.state import TrainState
from scripts.bench import (
    CLASSES,
    WARM_UP,
    Case,
    input_of,
    machine,
    one_thread,
    random_batch,
    seconds_of,
    spread,
    stepped,
)
from scripts.bench import state_of as new_state
from scripts.bench_parts import PHOTO, checkpoint_of, logging_of_100_iterations

PHOTOS = 48
PROCESSES = (1, 2)

Work = Callable[[], Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case("resnet101", 321, 8) if device.type == "cuda" else Case("resnet18", 129, 2)
    print(machine(device))
    with tempfile.TemporaryDirectory(prefix="s4gan-") as folder:
        data = Path(folder) / "data"
        write_photos(data)
        print_shares(case, device, rounds, data)
        print_processes(data, Path(folder), device)


def print_shares(case: Case, device: torch.device, rounds: int, data: Path) -> None:
    """A line for each part of an iteration, then what comes on top."""
    config, batch = case.config(), random_batch(case, device)
    state = new_state("ours", config, device)
    parts = {
        "generator, forward and back": generator_alone(state, batch, config),
        "discriminator, forward and back": discriminator_alone(state, batch, config),
        "optimizers": lambda: (state.optimizer_G.step(), state.optimizer_D.step()),
    }

    def whole() -> None:
        stepped("ours", state, batch, config)

    times: dict[str, list[float]] = {name: [] for name in parts}
    iterations: list[float] = []
    for number in range(WARM_UP + rounds):
        # The whole first: the optimizers need gradients.
        found = [seconds_of(work, device) for work in (whole, *parts.values())]
        if number >= WARM_UP:
            iterations.append(found[0])
            for values, seconds in zip(times.values(), found[1:], strict=True):
                values.append(seconds)
    rest = [one - sum(of_parts) for one, *of_parts in zip(iterations, *times.values(), strict=True)]
    times["the rest: losses, gate, what the discriminator sees"] = rest
    print(f"\n| {case.name} | ms, median (least to most) | share |\n|---|---|---|")
    for name, values in times.items():
        share = statistics.median(v / w for v, w in zip(values, iterations, strict=True))
        print(f"| {name} | {spread([1e3 * v for v in values], 1)} | {share:.1%} |")
    print(f"| **an iteration** | {spread([1e3 * v for v in iterations], 1)} | |")
    with logging_of_100_iterations() as (_, _, ours):
        log = [10 * seconds_of(ours, device) for _ in range(rounds)]
    print(f"| logging, with a line each 100 iterations | {spread(log, 3)} | on top |")
    pauses = []
    with checkpoint_of(state) as (_, save, wait):
        for _ in range(rounds):
            pauses.append(1e3 * seconds_of(save, device))
            wait()
    print(f"| a checkpoint: the training stands still | {spread(pauses, 1)} | when it is due |")
    images = [1e3 * one for one in input_alone(case, data, rounds)]
    print(f"| input, of one loader process | {spread(images, 1)} | beside |")


def generator_alone(state: TrainState, batch: Batch, config: Config) -> Work:
    """Labeled and unlabeled images, one after the other."""
    device = batch.labeled_images.device
    precision = number_format(config.train, device)

    def work() -> None:
        state.optimizer_G.zero_grad(set_to_none=True)
        for images in (batch.labeled_images, batch.unlabeled_images):
            with computed_in(precision, device):
                logits = state.generator(images)
            backward(logits, torch.full_like(logits, 1e-6))

    return work


def discriminator_alone(state: TrainState, batch: Batch, config: Config) -> Work:
    """Labels, then predictions, for both networks; and the gate's own look."""
    device = batch.labeled_images.device
    precision = number_format(config.train, device)
    count, _, height, width = batch.labeled_images.shape
    real = torch.rand(count, CLASSES + 3, height, width, device=device)
    fake = torch.rand_like(real).requires_grad_()
    discriminator = state.discriminator
    weights = list(discriminator.parameters())

    def work() -> None:
        state.optimizer_D.zero_grad(set_to_none=True)
        with computed_in(precision, device):
            scores, _ = discriminator(real)
        backward(scores.mean(), inputs=weights)
        with computed_in(precision, device):
            scores, features = discriminator(fake)
        grad(features.mean(), fake, retain_graph=True)
        backward(scores.mean(), inputs=weights)
        discriminator.eval()
        with torch.no_grad(), computed_in(precision, device):
            discriminator(fake)
        discriminator.train()

    return work


def input_alone(case: Case, data: Path, rounds: int) -> list[float]:
    """Seconds of one thread for the batches of an iteration, images kept decoded."""
    given = input_of(data, case.batch, crop_size=case.crop, random_scale=True, random_mirror=True)
    batches = IterationDataset(*given, decoded=data.parent / "decoded")
    for iteration in range(1, rounds + 1):
        batches[iteration]  # the first time it is decoded as well
    cpu = torch.device("cpu")
    with one_thread():
        return [seconds_of(lambda i=i: batches[i], cpu) for i in range(1, rounds + 1)]


def print_processes(data: Path, folder: Path, device: torch.device) -> None:
    """Images a second of `s4gan train` with so many processes, each with its GPU or cores."""
    counts = PROCESSES if device.type == "cpu" else range(1, torch.cuda.device_count() + 1)
    print("\n| processes | images/s, median (least to most) of ten lines |\n|---|---|")
    for count in counts:
        command = [sys.executable, "-m", "job", "train", "--config", "demo", "--data", str(data)]
        command += ["--run", str(folder / f"run-{count}"), "--gpus", str(count)]
        for change in (
            "train.iterations=60",
            "train.accumulate=2",
            "train.log_every=5",
            "train.eval_every=1000",
            "loss.st_start=0",
            "wandb.mode=disabled",
        ):
            command += ["--set", change]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = done.stderr.strip().partition("\n")[0]
            print(f"| {count} | ended with {done.returncode}: {problem} |")
            continue
        lines = (folder / f"run-{count}" / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        rates = [event["images_per_s"] for event in events if event["event"] == "train"]
        print(f"| {count} | {spread(rates[2:], 1)} |")  # the first ones warm up


def write_photos(folder: Path) -> None:
    """Smooth pictures of PHOTO's size as JPEG; half of those for training have a mask."""
    rng = np.random.default_rng(0)
    names = [f"class {index}" for index in range(CLASSES)]
    (folder / "train").mkdir(parents=True)
    (folder / "dataset.yaml").write_text(yaml.safe_dump({"classes": names, "ignore_index": 255}))
    for split, number in [*(("train", i) for i in range(PHOTOS)), *(("val", i) for i in range(4))]:
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC)
        image.save(folder / split / "images" / f"{number:03}.jpg", quality=90)
        if split == "val" or number % 2:
            labels = Image.fromarray(rng.integers(0, CLASSES, (24, 32)).astype(np.uint8))
            labels = labels.resize(PHOTO, Image.Resampling.NEAREST)
            labels.save(folder / split / "masks" / f"{number:03}.png")


if __name__ == "__main__":
    main()
