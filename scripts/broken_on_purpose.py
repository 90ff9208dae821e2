"""Break the demo's training in five ways, and print what the program says of it.

    python -m scripts.broken_on_purpose --folder demo/broken

Six ordinary runs of about two minutes of two cores each; the same command goes on after a stop.
Prints the Markdown table for README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLIGHT = "slight_overfit"
"""Not worth a word in a table; the healthy demo is near it."""


@dataclass(frozen=True)
class Broken:
    """A way to break it."""

    name: str
    shown: str
    """In the table."""
    flags: tuple[str, ...] = ()
    other_masks: bool = False


WAYS = (
    Broken("nothing", "nothing"),
    Broken("rate", "`--learning-rate 2.0` (100 times)", ("--learning-rate", "2.0")),
    Broken("threshold", "`--threshold-st 0.99`", ("--threshold-st", "0.99")),
    Broken("rate-d", "`--learning-rate-D 0`", ("--learning-rate-D", "0")),
    Broken("masks", "masks of other images", other_masks=True),
    Broken(
        "five",
        "5 labeled images (`--batch-size 5`)",
        ("--set", "data.labeled_ratio=0.0625", "--batch-size", "5"),
    ),
)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=1200)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    data, shuffled = folder / "data", folder / "shuffled"
    if not data.exists():
        subprocess.run([sys.executable, "scripts/make_demo_data.py", str(data)], check=True)
    if not shuffled.exists():
        with_masks_of_others(data, shuffled)

    def train(way: Broken) -> None:
        given = shuffled if way.other_masks else data
        flags = [*way.flags, "--set", f"train.iterations={arguments.iterations}"]
        job(["train", "--config", "demo", "--data", given, "--run", folder / way.name, *flags])

    with ThreadPoolExecutor(arguments.parallel) as pool:
        list(pool.map(train, WAYS))
    print("| broken | what was found, at iteration | validation mIoU |\n|---|---|---|")
    for way in WAYS:
        answer = job(["diagnose", folder / way.name, "--json"])
        print(row(way, json.loads(answer)))


def with_masks_of_others(data: Path, folder: Path) -> None:
    """A copy in which each labeled image has the mask of the next one."""
    shutil.copytree(data, folder)
    masks = sorted((folder / "train" / "masks").iterdir())
    contents = [path.read_bytes() for path in masks]
    for path, content in zip(masks, [*contents[1:], contents[0]], strict=True):
        path.write_bytes(content)


def job(arguments: list[Any]) -> str:
    """What `s4gan` prints; a training that ends with an error is a result, too."""
    command = [sys.executable, "-m", "job", *map(str, arguments)]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def row(way: Broken, diagnosis: dict[str, Any]) -> str:
    """Of the table."""
    found = [
        f"{one['rule']} ({one['iteration']}"
        + ("" if one["ended"] is None else f", over at {one['ended']}")
        + ")"
        for one in diagnosis["findings"]
        if one["rule"] != SLIGHT
    ]
    score = diagnosis["val_miou"]
    shown = "-" if score is None else f"{score:.4f}"
    return f"| {way.shown} | {'; '.join(found) or 'nothing'} | {shown} |"


if __name__ == "__main__":
    main()
