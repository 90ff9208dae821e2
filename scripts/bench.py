"""How long an iteration takes and what it takes: the plain step against ours, by turns.

    make bench                                   # on a GPU, or small on the CPU
    python -m scripts.bench --input DATA         # making batches of it, images kept decoded or not
    python -m scripts.bench --profile            # where the time of a step goes

On a GPU: DeepLabv2-ResNet-101 at 321 x 321 with 8 labeled and 8 unlabeled images, and some other
sizes. Without one: ResNet-18 at 129 x 129 with 2 + 2. Both steps train the same batch from the same
weights, one after the other in each round, so that what else the machine does hits both. The last
lines are the tables for README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from job.config import Config, config_from_dict
from job.data.dataset import IGNORE, DatasetInfo
from job.data.scan import scan_dataset
from job.data.splits import SplitItems, items_of, make_splits
from job.data.streams import Batch, IterationDataset
from job.models.discriminator import Discriminator
from job.models.generator import Architecture, Generator
from job.revision import git
from job.training.state import TrainState, new_train_state
from job.training.step import train_step
from scripts.plain_step import plain_step, with_plain_optimizers

CLASSES = 21
H200_BF16_TFLOPS = 790.0
"""What large products of matrices reach in bfloat16 on an H200; MFU is against it there."""
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A configuration to measure."""

    backbone: str
    crop: int
    batch: int
    precision: str = "auto"

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.backbone}, {self.crop} px, {self.batch} + {self.batch}"

    def config(self) -> Config:
        """Of a run."""
        return config_from_dict(
            {
                "data": {"crop_size": self.crop},
                "model": {"backbone": self.backbone, "weights": "none"},
                "train": {
                    "batch_size": self.batch,
                    "accumulate": 1,
                    "precision": self.precision,
                    "iterations": 1_000_000,
                },
                # Everything passes the gate: the most work there can be.
                "loss": {"st_start": 0, "threshold_st": 0.0},
            },
            source="bench",
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--input", metavar="DATA", help="making batches of a data folder")
    parser.add_argument("--crop", type=int, default=321, help="of --input")
    parser.add_argument("--profile", action="store_true", help="torch.profiler's table of one step")
    parser.add_argument("--peak", nargs=2, metavar=("STEP", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.peak:
        print(json.dumps(peak_bytes(arguments.peak[0], Case(**json.loads(arguments.peak[1])))))
        return
    print(machine(device))
    if arguments.input:
        print_input(Path(arguments.input), arguments.crop, arguments.rounds)
        return
    if device.type == "cuda":
        cases = [Case("resnet101", 321, 8), Case("resnet101", 321, 16), Case("resnet101", 513, 8)]
    else:
        cases = [Case("resnet18", 129, 2), Case("tiny", 129, 8)]
    if arguments.profile:
        profile(cases[0], device)
        return
    print_cases(cases, device, arguments.rounds)


def machine(device: torch.device) -> str:
    """Where and with what this was measured."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"{what}, {torch.get_num_threads()} CPU threads; torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, Python {platform.python_version()}; commit "
        f"{(git('rev-parse', '--short', 'HEAD') or b'unknown').decode().strip()}{_disturbed()}"
    )


def _disturbed() -> str:
    """Ratios of times that others disturb say little, also by turns."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return f"; DISTURBED: load {load:.1f} on {cores} cores" if load > cores + 0.5 else ""


# ---------------------------------------------------------------- input


def print_input(data: Path, crop: int, rounds: int) -> None:
    """Seconds of one core that the 8 + 8 + 8 images of an iteration take, by turns.

    Args:
        data: folder of images, an eighth of which count as labeled.
        crop: its height and width.
        rounds: iterations.
    """
    given = input_of(data, 8, crop_size=crop, labeled_ratio=0.125, random_scale=True)
    with tempfile.TemporaryDirectory(prefix="s4gan-") as folder, one_thread():
        plain, kept = IterationDataset(*given), IterationDataset(*given, decoded=Path(folder))
        times: dict[str, list[float]] = {"decoded each time": [], "kept decoded": []}
        for iteration in range(1, rounds + 1):
            kept[iteration]  # the first time it is decoded as well
            for name, batches in zip(times, (plain, kept), strict=True):
                start = time.process_time()
                batches[iteration]
                times[name].append(1e3 * (time.process_time() - start))
    print("\n| 24 images and 16 masks | ms of a core, median (least to most) |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {spread(values, 1)} |")
    pairs = zip(times["kept decoded"], times["decoded each time"], strict=True)
    print(f"| **ratio** | {spread([ours / plain for ours, plain in pairs], 3)} |")


def input_of(folder: Path, batch: int, **keys: Any) -> tuple[SplitItems, DatasetInfo, Config]:
    """What an `IterationDataset` of `batch` images a stream is made of.

    Args:
        folder: of the data.
        batch: of each stream, in an iteration.
        keys: of the section `data`; images are kept decoded where there is a place.
    """
    chosen = {"data": {"cache": "disk", **keys}, "train": {"batch_size": batch, "accumulate": 1}}
    config = config_from_dict(chosen, source="bench")
    dataset = scan_dataset(folder, config.data)
    return items_of(dataset, make_splits(dataset, config)), dataset.info, config


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in a loader process: threads that wait would count as busy ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, least and most."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return f"{statistics.median(values):.{digits}f} ({low} to {high})"


# ---------------------------------------------------------------- whole steps


def print_cases(cases: Sequence[Case], device: torch.device, rounds: int) -> None:
    """A line for each case and step."""
    lines = []
    is_h200 = "H200" in machine(device)
    for case in cases:
        times = timed(case, device, rounds)
        peaks = {step: peak(step, case, device) for step in ("plain", "ours")}
        tflop = flop(case) / 1e12
        images = 2 * case.batch
        for step in ("plain", "ours"):
            ms = [1e3 * one for one in times[step]]
            median = statistics.median(ms)
            cells = [
                case.name,
                step,
                spread(ms, 1),
                f"{1e3 * images / median:.1f}",
                f"{peaks[step] / 2**20:.0f}",
                f"{tflop / (median / 1e3):.2f}",
                f"{tflop / (median / 1e3) / H200_BF16_TFLOPS:.0%}" if is_h200 else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        ratios = [o / p for o, p in zip(times["ours"], times["plain"], strict=True)]
        memory = peaks["ours"] / peaks["plain"]
        lines.append(
            f"| {case.name} | **ours / plain** | **{statistics.median(ratios):.3f}** "
            f"({min(ratios):.3f} to {max(ratios):.3f}) | | **{memory:.3f}** | | |"
        )
    print("\n| case | step | ms an iteration | images/s | peak MiB | TFLOP/s | MFU |")
    print("|---" * 7 + "|")
    print("\n".join(lines))


def timed(case: Case, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, round by round, by turns."""
    config, batch = case.config(), random_batch(case, device)
    states = {step: state_of(step, config, device) for step in ("plain", "ours")}
    found: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(WARM_UP + rounds):
        # Whoever comes first in one round comes second in the next.
        for step in ("plain", "ours") if number % 2 else ("ours", "plain"):
            seconds = seconds_of(lambda s=step: stepped(s, states[s], batch, config), device)
            if number >= WARM_UP:
                found[step].append(seconds)
    return found


def state_of(step: str, config: Config, device: torch.device) -> TrainState:
    """Ours has its own layout and optimizers; the plain one has neither."""
    state, _ = new_train_state(config, CLASSES, device)
    if step == "plain":
        for network in (state.generator, state.discriminator):
            network.to(memory_format=torch.contiguous_format)
        state = with_plain_optimizers(state, config)
    state.set_learning_rates(1, config)
    return state


def stepped(step: str, state: TrainState, batch: Batch, config: Config) -> None:
    """One iteration."""
    if step == "plain":
        plain_step(state, batch, config, 1)
    else:
        train_step(state, batch, config, 1)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Until all of it is done, also on a GPU."""
    synchronize(device)
    began_s = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began_s


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(step: str, case: Case, device: torch.device) -> float:
    """Most bytes at a time; on the CPU in a process of its own, as it never gives them back."""
    if device.type == "cuda":
        return peak_bytes(step, case)
    command = [sys.executable, "-m", "scripts.bench", "--peak", step, json.dumps(vars(case))]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(answer.splitlines()[-1])


def peak_bytes(step: str, case: Case) -> float:
    """Of a few iterations, in this process: a GPU's allocations, or what a CPU's add to it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, batch = case.config(), random_batch(case, device)
    state = state_of(step, config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # Source: proc(5). Not getrusage's ru_maxrss, which begins with that of the parent process.
        Path("/proc/self/clear_refs").write_text("5")
        before = _kib_of("VmRSS")
    for _ in range(WARM_UP):
        stepped(step, state, batch, config)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * (_kib_of("VmHWM") - before)


def _kib_of(name: str) -> int:
    """A number of this process that Linux tells of in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def flop(case: Case) -> float:
    """Of the networks in one iteration of ours: forward and back, counted by torch."""
    model = case.config().model
    with torch.device("meta"):
        generator = Generator(Architecture.of(model, CLASSES)).train()
        discriminator = Discriminator(CLASSES, model.discriminator_channels).train()
        with FlopCounterMode(display=False) as counter:
            generator(torch.zeros(case.batch, 3, case.crop, case.crop)).sum().backward()
        of_generator = 2 * counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            pair = torch.zeros(2 * case.batch, CLASSES + 3, case.crop, case.crop)
            discriminator(pair)[0].sum().backward()
    return float(of_generator + counter.get_total_flops())


def random_batch(case: Case, device: torch.device) -> Batch:
    """As the loader gives it, with a little that is ignored."""
    rng = np.random.default_rng(0)
    shape = (case.batch, case.crop, case.crop)

    def images() -> torch.Tensor:
        return torch.from_numpy(
            rng.integers(0, 256, (case.batch, 3, case.crop, case.crop)).astype(np.uint8)
        )

    def masks() -> torch.Tensor:
        found = rng.integers(0, CLASSES, shape).astype(np.uint8)
        found[:, :10] = IGNORE
        return torch.from_numpy(found)

    batch = Batch(images(), masks())
    batch.unlabeled_images, batch.unlabeled_valid = images(), torch.ones(shape, dtype=torch.bool)
    batch.real_images, batch.real_masks = images(), masks()
    return batch.to(device)


def profile(case: Case, device: torch.device) -> None:
    """Where the time of one step goes, for both."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    config, batch = case.config(), random_batch(case, device)
    for step in ("plain", "ours"):
        state = state_of(step, config, device)
        for _ in range(WARM_UP):
            stepped(step, state, batch, config)
        with torch.profiler.profile(activities=kinds) as profiler:
            stepped(step, state, batch, config)
            synchronize(device)
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(f"\n{step}, {case.name}")
        print(profiler.key_averages().table(sort_by=by, row_limit=15))


if __name__ == "__main__":
    main()
