"""Fixtures shared by all tests: small real data sets, and a quiet, reproducible torch."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: tests run in parallel, one core each, and subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # nobody asks the machine that runs the tests

import numpy as np
import pytest
import torch
import yaml
from hypothesis import settings
from PIL import Image

from tests.services import bucket, fault_proxy, imds, s3_env, s3_server
from tests.wandb_server import WandbServer

__all__ = ["bucket", "fault_proxy", "imds", "s3_env", "s3_server"]

# The same examples each time: what fails then failed before it was landed. To look for others:
# pytest --hypothesis-profile=default
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

MakeData = Callable[..., Path]

CLASSES = ("background", "square", "disc")
PALETTE = ((0, 0, 0), (200, 30, 30), (30, 30, 200))
IGNORE_INDEX = 200


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy grey picture with a red square and a blue disc, and its exact mask.

    Returns uint8 (height, width, 3) and (height, width); a border row is IGNORE_INDEX.
    """
    image = rng.integers(90, 140, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    side = min(height, width) // 3
    top, left = rng.integers(0, height - side), rng.integers(0, width - side)
    image[top : top + side, left : left + side] = (220, 40, 40)
    mask[top : top + side, left : left + side] = 1
    y, x = np.mgrid[:height, :width]
    centre_y, centre_x = rng.integers(0, height), rng.integers(0, width)
    disc = (y - centre_y) ** 2 + (x - centre_x) ** 2 < (side / 2) ** 2
    image[disc] = (40, 40, 220)
    mask[disc] = 2
    mask[0] = IGNORE_INDEX
    return image, mask


def write_data(
    root: Path,
    *,
    labeled: int = 8,
    unlabeled: int = 8,
    val: int = 4,
    height: int = 40,
    width: int = 48,
) -> Path:
    """Write a data set in the folder layout and return its folder.

    Training ids are train_0000, ...; the first `labeled` of them have masks. Validation ids are
    val_0000, ...; val=0 makes no val/ folder.
    """
    rng = np.random.default_rng(1)
    for part, count, with_mask in (("train", labeled + unlabeled, labeled), ("val", val, val)):
        if count == 0:
            continue
        for sub in ("images", "masks"):
            (root / part / sub).mkdir(parents=True)
        for index in range(count):
            image, mask = draw_scene(rng, height, width)
            file_name = f"{part}_{index:04d}.png"
            Image.fromarray(image).save(root / part / "images" / file_name)
            if index < with_mask:
                Image.fromarray(mask).save(root / part / "masks" / file_name)
    info = {
        "classes": list(CLASSES),
        "ignore_index": IGNORE_INDEX,
        "palette": [list(colour) for colour in PALETTE],
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(info))
    return root


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """`write_data` into tmp_path / `name` ("data")."""

    def make(*, name: str = "data", **options: Any) -> Path:
        return write_data(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real images and weights in {folder}, which is not there")
    return folder


@pytest.fixture
def _wandb_leaves_folders() -> Iterator[None]:
    """The temporary folders that wandb leaves to Python to remove, which is a warning, go here."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def wandb_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that the real wandb client reports to, with a key for it."""
    from wandb import teardown

    teardown()  # it reads the environment once a process
    for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "S4GAN_GIT_SHA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    with WandbServer() as ours:
        monkeypatch.setenv("WANDB_BASE_URL", ours.url)
        yield ours
        teardown()
