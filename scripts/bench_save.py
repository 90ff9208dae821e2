"""How long the training stands still for a save, and how long until the state is durable.

A state of 500 MB is saved to a local S3 server in two ways, by turns: plainly (torch.save, then
upload, as a training script would) and through the `Publisher`. Prints a Markdown table.

    python scripts/bench_save.py --folder demo/bench
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from job.checkpoint.lease import acquire
from job.checkpoint.manager import CheckpointManager
from job.checkpoint.publisher import Publisher
from job.drill.environment import empty_folder, in_environment
from job.drill.seaweed import SeaweedServer
from job.storage import ObjectStore
from job.storage.s3 import S3Store

TENSOR_BYTES = 5_000_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for everything; emptied")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    empty_folder(folder)
    count = arguments.megabytes * 1_000_000 // TENSOR_BYTES
    weights = {f"w{i}": torch.randn(TENSOR_BYTES // 4) for i in range(count)}
    plain_s: list[float] = []
    pause_s: list[float] = []
    durable_s: list[float] = []
    with (
        SeaweedServer(folder / "s3", buckets=("runs",)) as server,
        in_environment(server.environment()),
    ):
        store = S3Store("s3://runs/bench")
        with publishing(store, folder / "scratch") as publisher:
            for round_ in range(arguments.rounds):
                began_s = time.monotonic()
                torch.save({"iteration": round_, **weights}, folder / "plain.pth")
                store.upload(folder / "plain.pth", "plain.pth")
                plain_s.append(time.monotonic() - began_s)

                state = {"iteration": round_ + 1, **weights}
                pause_s.append(publisher.save(state, best=None, numbered=False))
                publisher.finish()  # its plain name and the deletion of older ones too
                assert publisher.cost is not None
                durable_s.append(pause_s[-1] + publisher.cost.seconds)
    shutil.rmtree(folder)
    print(f"| {arguments.megabytes} MB, {arguments.rounds} rounds | median | least | most |")
    print("|---|---|---|---|")
    for name, seconds in (
        ("plain torch.save and upload: the training stands still", plain_s),
        ("this program: the training stands still", pause_s),
        ("this program: until durable", durable_s),
    ):
        print(
            f"| {name} | {statistics.median(seconds):.2f} s | {min(seconds):.2f} s "
            f"| {max(seconds):.2f} s |"
        )
    ratio = statistics.median(p / q for p, q in zip(pause_s, plain_s, strict=True))
    print(f"\nmedian ratio of the pauses, round by round: {ratio:.3f}")


@contextmanager
def publishing(store: ObjectStore, scratch: Path) -> Iterator[Publisher]:
    """A publisher of checkpoints to an empty place, for as long as the block lasts."""
    lease = acquire(store, on_lost=lambda: None)
    publisher = Publisher(
        CheckpointManager(store, lease, scratch),
        tell=lambda _notice: None,
        before_pointer=lambda: None,
        on_fenced=lambda: None,
    )
    try:
        yield publisher
    finally:
        publisher.close()
        lease.release()


if __name__ == "__main__":
    main()
