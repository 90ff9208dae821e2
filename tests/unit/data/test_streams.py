"""The streams of training images: a pure function of seed and iteration, whatever loads them."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from job.config import Config, config_from_dict
from job.data.dataset import DatasetInfo, Item
from job.data.images import IGNORE
from job.data.scan import scan_dataset
from job.data.splits import SplitItems, items_of, make_splits
from job.data.streams import Batch, IterationDataset, drawn_index, iteration_loader
from job.errors import DataError, ExitCode
from tests.conftest import IGNORE_INDEX, MakeData

CPU = torch.device("cpu")
INFO = DatasetInfo(("background", "thing"), IGNORE_INDEX, ((0, 0, 0), (9, 9, 9)))


def configured(*, data: dict[str, Any] | None = None, **train: Any) -> Config:
    raw = {
        "data": {"crop_size": 32, "workers": 0, **(data or {})},
        "train": {"batch_size": 2, "accumulate": 1, "iterations": 6, **train},
    }
    return config_from_dict(raw, source="test")


VARIED = {"crop_size": (32, 40), "random_scale": True, "random_mirror": True}


@pytest.fixture
def real_items(make_data: MakeData) -> tuple[SplitItems, DatasetInfo]:
    """8 labeled and 8 unlabeled pictures, all different."""
    dataset = scan_dataset(make_data(labeled=8, unlabeled=8, val=1))
    return items_of(dataset, make_splits(dataset, configured())), dataset.info


def plain_items(folder: Path, *, labeled: int = 7, unlabeled: int = 5) -> SplitItems:
    """Images of one colour, whose red is their own index; masks all of class 1."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(kind: str, index: int, *, with_mask: bool) -> Item:
        image, mask = folder / f"{kind}{index}.png", folder / f"{kind}{index}_mask.png"
        Image.new("RGB", (32, 32), (index, 0, 0)).save(image)
        if with_mask:
            Image.new("L", (32, 32), 1).save(mask)
        return Item(f"{kind}{index}", image, mask if with_mask else None)

    with_mask = tuple(write("l", index, with_mask=True) for index in range(labeled))
    without = tuple(write("u", index, with_mask=False) for index in range(unlabeled))
    return SplitItems(labeled=with_mask, unlabeled=without, val=with_mask[:1], train_sample=())


def loaded(
    items: SplitItems, config: Config, *, first: int = 1, info: DatasetInfo = INFO
) -> list[Batch]:
    return list(iteration_loader(items, info, config, first=first, device=CPU))


def shown(images: torch.Tensor | None) -> list[int]:
    """Which of the plain images are in a batch."""
    assert images is not None
    return [int(image[0, 0, 0]) for image in images]


def stream(batches: Sequence[Batch], part: str) -> list[int]:
    return [index for batch in batches for index in shown(getattr(batch, part))]


def assert_same(ours: Batch, theirs: Batch) -> None:
    for name, value in vars(ours).items():
        other = vars(theirs)[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name


def assert_all_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


# ---------------------------------------------------------------- what a batch holds


def test_a_batch_has_the_shapes_and_types_it_promises(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    items, info = real_items
    config = configured(data=VARIED, accumulate=3)
    batch = IterationDataset(items, info, config)[1]
    for images in (batch.labeled_images, batch.unlabeled_images, batch.real_images):
        assert images is not None
        assert images.shape == (6, 3, 32, 40)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
    for masks in (batch.labeled_masks, batch.real_masks):
        assert masks is not None
        assert masks.shape == (6, 32, 40)
        assert masks.dtype == torch.uint8
        assert set(masks.unique().tolist()) <= {0, 1, 2, IGNORE}
    assert batch.unlabeled_valid is not None
    assert batch.unlabeled_valid.shape == (6, 32, 40)
    assert batch.unlabeled_valid.dtype == torch.bool
    assert batch.unreadable == []


def test_channels_are_red_green_blue(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (32, 32), (10, 20, 30)).save(path)
    mask = tmp_path / "m.png"
    Image.new("L", (32, 32), 0).save(mask)
    items = SplitItems((Item("a", path, mask),), (Item("b", path, None),), (), ())
    batch = IterationDataset(items, INFO, configured())[1]
    for images in (batch.labeled_images, batch.unlabeled_images, batch.real_images):
        assert images is not None
        assert images[0, :, 5, 5].tolist() == [10, 20, 30]


def test_images_and_masks_of_a_batch_belong_together(tmp_path: Path) -> None:
    """The images show their masks."""
    rng = np.random.default_rng(0)
    labeled = []
    for index in range(4):
        numbers = rng.integers(0, 2, (50, 60)).astype(np.uint8)
        image, mask = tmp_path / f"{index}.png", tmp_path / f"{index}_mask.png"
        Image.fromarray(np.dstack([numbers] * 3)).save(image)
        Image.fromarray(numbers).save(mask)
        labeled.append(Item(str(index), image, mask))
    items = SplitItems(tuple(labeled), tuple(labeled), (), ())
    for batch in loaded(items, configured(data={"random_mirror": True})):
        assert torch.equal(batch.labeled_images[:, 0], batch.labeled_masks)
        assert batch.real_images is not None
        assert batch.real_masks is not None
        assert torch.equal(batch.real_images[:, 0], batch.real_masks)


def test_padding_is_ignored_in_masks_and_not_valid_in_unlabeled_images(tmp_path: Path) -> None:
    items = plain_items(tmp_path)  # of 32 x 32
    batch = IterationDataset(items, INFO, configured(data={"crop_size": (40, 48)}))[1]
    assert (batch.labeled_masks[:, :32, :32] == 1).all()
    assert (batch.labeled_masks == IGNORE).sum() == 2 * (40 * 48 - 32 * 32)
    assert batch.unlabeled_valid is not None
    assert batch.unlabeled_valid[:, :32, :32].all()
    assert batch.unlabeled_valid.sum() == 2 * 32 * 32


def test_ignore_index_of_the_data_becomes_ignore(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    items, info = real_items
    config = configured(data={"crop_size": (40, 48)})  # the whole of every image
    batch = IterationDataset(items, info, config)[1]
    assert (batch.labeled_masks[:, 0] == IGNORE).all()  # make_data's void row
    assert not (batch.labeled_masks == IGNORE_INDEX).any()


def test_training_on_the_labels_alone_loads_nothing_else(tmp_path: Path) -> None:
    items = plain_items(tmp_path, unlabeled=0)
    batches = loaded(items, configured(supervised_only=True))
    assert len(batches) == 6
    for batch in batches:
        assert batch.labeled_images.shape == (2, 3, 32, 32)
        assert batch.unlabeled_images is None
        assert batch.unlabeled_valid is None
        assert batch.real_images is None
        assert batch.real_masks is None


def test_labels_alone_are_the_same_images_as_with_the_other_streams(tmp_path: Path) -> None:
    items = plain_items(tmp_path)
    assert stream(loaded(items, configured(supervised_only=True)), "labeled_images") == stream(
        loaded(items, configured()), "labeled_images"
    )


@pytest.mark.parametrize("supervised_only", [False, True])
def test_split_cuts_a_batch_into_the_pieces_to_accumulate(
    tmp_path: Path, supervised_only: bool
) -> None:
    config = configured(batch_size=2, accumulate=3, supervised_only=supervised_only)
    batch = IterationDataset(plain_items(tmp_path), INFO, config)[1]
    pieces = batch.split(2)
    assert len(pieces) == 3
    for name, value in vars(batch).items():
        parts = [getattr(piece, name) for piece in pieces]
        if isinstance(value, torch.Tensor):
            assert all(len(part) == 2 for part in parts), name
            assert torch.equal(torch.cat(parts), value), name
        elif name != "unreadable":
            assert parts == [None, None, None], name


def test_moving_a_batch_keeps_all_it_holds(tmp_path: Path) -> None:
    batch = IterationDataset(plain_items(tmp_path), INFO, configured())[1]
    batch.unreadable.append("a.png")
    assert_same(batch.to(CPU), batch)


# ---------------------------------------------------------------- purity


def test_a_batch_depends_on_seed_and_iteration_alone(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    """A loader read from 1 to k, one started at k, and the data set asked for k, agree."""
    items, info = real_items
    config = configured(data=VARIED, accumulate=2)
    all_of_them = loaded(items, config, info=info)
    assert len(all_of_them) == 6
    for first in (1, 3, 6):
        assert_all_same(loaded(items, config, first=first, info=info), all_of_them[first - 1 :])
    data = IterationDataset(items, info, config)
    for iteration in (5, 2, 5):
        assert_same(data[iteration], all_of_them[iteration - 1])


def test_a_resumed_run_that_is_done_loads_nothing(tmp_path: Path) -> None:
    assert loaded(plain_items(tmp_path), configured(), first=7) == []


def test_more_iterations_continue_the_same_stream(tmp_path: Path) -> None:
    items = plain_items(tmp_path)
    short, long = loaded(items, configured()), loaded(items, configured(iterations=9))
    assert_all_same(long[:6], short)
    assert len(long) == 9


def test_how_a_batch_is_accumulated_does_not_change_its_images(tmp_path: Path) -> None:
    items = plain_items(tmp_path)
    config = configured(data=VARIED, batch_size=4, accumulate=1)
    halves = configured(data=VARIED, batch_size=2, accumulate=2)
    assert_all_same(loaded(items, halves), loaded(items, config))


def test_another_iteration_or_seed_has_other_images(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    items, info = real_items
    data = IterationDataset(items, info, configured(data=VARIED))
    other = IterationDataset(items, info, configured(data=VARIED, seed=1))
    for part in ("labeled_images", "unlabeled_images", "real_images"):
        ours = getattr(data[1], part)
        assert not torch.equal(ours, getattr(data[2], part)), part
        assert not torch.equal(ours, getattr(other[1], part)), part


def test_seeds_of_63_bits_work(tmp_path: Path) -> None:
    config = configured(seed=2**63 - 1)
    assert len(loaded(plain_items(tmp_path), config)) == 6


def test_an_image_is_cut_anew_each_time_it_is_drawn(make_data: MakeData) -> None:
    dataset = scan_dataset(make_data(labeled=1, unlabeled=1, val=1))
    config = configured(batch_size=1, data={"crop_size": 32})
    items = items_of(dataset, make_splits(dataset, config))
    batches = loaded(items, config, info=dataset.info)
    different = {batch.labeled_images.numpy().tobytes() for batch in batches}
    assert len(different) >= 4


def test_switching_the_mirror_on_changes_no_other_draw(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    items, info = real_items
    plain = loaded(items, configured(), info=info)
    mirrored = loaded(items, configured(data={"random_mirror": True}), info=info)
    turned = 0
    for ours, theirs in zip(plain, mirrored, strict=True):
        for image, other in zip(ours.labeled_images, theirs.labeled_images, strict=True):
            if not torch.equal(image, other):
                assert torch.equal(image, other.flip(-1))
                turned += 1
    assert 0 < turned < 12


def test_the_global_random_states_stay_as_they_are(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    items, info = real_items
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    iterator = iter(iteration_loader(items, info, configured(data=VARIED), first=1, device=CPU))
    next(iterator)
    next(iterator)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]


def test_the_global_seed_does_not_change_what_is_loaded(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    items, info = real_items
    config = configured(data=VARIED)
    torch.manual_seed(1)
    np.random.seed(1)
    ours = loaded(items, config, info=info)
    torch.manual_seed(2)
    np.random.seed(2)
    assert_all_same(loaded(items, config, info=info), ours)


# ---------------------------------------------------------------- order


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    number=st.integers(1, 3),
    num_items=st.integers(1, 40),
    epoch=st.integers(0, 10**6),
)
def test_each_pass_draws_each_image_exactly_once(
    seed: int, number: int, num_items: int, epoch: int
) -> None:
    start = epoch * num_items
    drawn = [drawn_index(seed, number, num_items, start + i) for i in range(num_items)]
    assert sorted(drawn) == list(range(num_items))


def test_each_pass_has_its_own_order() -> None:
    orders = {
        tuple(drawn_index(0, 1, 12, epoch * 12 + i) for i in range(12)) for epoch in range(20)
    }
    assert len(orders) == 20


def test_a_pass_that_ends_within_a_batch_goes_on_with_the_next_one(tmp_path: Path) -> None:
    items = plain_items(tmp_path, labeled=7, unlabeled=5)
    batches = loaded(items, configured(batch_size=2, iterations=35))
    labeled, real = stream(batches, "labeled_images"), stream(batches, "real_images")
    unlabeled = stream(batches, "unlabeled_images")
    for drawn, size in ((labeled, 7), (real, 7), (unlabeled, 5)):
        for start in range(0, 70, size):
            assert sorted(drawn[start : start + size]) == list(range(size))


def test_the_real_images_are_drawn_independently_of_the_labeled_ones(tmp_path: Path) -> None:
    items = plain_items(tmp_path, labeled=10)
    batches = loaded(items, configured(iterations=100))
    labeled, real = stream(batches, "labeled_images"), stream(batches, "real_images")
    same = sum(ours == theirs for ours, theirs in zip(labeled, real, strict=True))
    assert same < 50  # 20 of 200 by chance


def test_more_unlabeled_images_do_not_change_the_labeled_streams(tmp_path: Path) -> None:
    few = loaded(plain_items(tmp_path / "few", unlabeled=3), configured())
    many = loaded(plain_items(tmp_path / "many", unlabeled=9), configured())
    for part in ("labeled_images", "real_images"):
        assert stream(few, part) == stream(many, part)


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Written down once: if this changes, old runs resume with other data."""
    assert [drawn_index(0, 1, 8, place) for place in range(8)] == [0, 7, 1, 4, 6, 3, 5, 2]
    assert [drawn_index(7, 2, 8, place) for place in range(8, 16)] == [6, 7, 3, 1, 0, 4, 5, 2]


# ---------------------------------------------------------------- unreadable files


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "gone"])
def test_an_unreadable_image_is_replaced_and_reported(
    tmp_path: Path, content: bytes | None
) -> None:
    items = plain_items(tmp_path)
    config = configured(batch_size=7)
    whole = IterationDataset(items, INFO, config)[1]
    broken = items.labeled[3].image
    broken.unlink()
    if content is not None:
        broken.write_bytes(content)
    batch = IterationDataset(items, INFO, config)[1]
    expected = [4 if index == 3 else index for index in shown(whole.labeled_images)]
    assert shown(batch.labeled_images) == expected
    assert batch.labeled_masks.shape == whole.labeled_masks.shape
    assert batch.unreadable == [str(broken)] * 2  # drawn as labeled and as real
    assert shown(batch.unlabeled_images) == shown(whole.unlabeled_images)


def test_the_last_image_is_replaced_by_the_first(tmp_path: Path) -> None:
    items = plain_items(tmp_path, labeled=3)
    items.labeled[2].image.write_text("x")
    batch = IterationDataset(items, INFO, configured(batch_size=3))[1]
    assert sorted(shown(batch.labeled_images)) == [0, 0, 1]


def test_several_unreadable_images_in_a_row_are_all_passed_over(tmp_path: Path) -> None:
    items = plain_items(tmp_path, unlabeled=5)
    for index in (1, 2, 3):
        items.unlabeled[index].image.write_text("x")
    batch = IterationDataset(items, INFO, configured(batch_size=5))[1]
    assert sorted(shown(batch.unlabeled_images)) == [0, 4, 4, 4, 4]
    assert set(batch.unreadable) == {str(items.unlabeled[index].image) for index in (1, 2, 3)}


def test_a_good_image_with_a_broken_mask_is_replaced_together_with_it(tmp_path: Path) -> None:
    items = plain_items(tmp_path, labeled=2)
    assert items.labeled[0].mask is not None
    items.labeled[0].mask.write_text("x")
    batch = IterationDataset(items, INFO, configured())[1]
    assert shown(batch.labeled_images) == [1, 1]
    assert (batch.labeled_masks == 1).all()


def test_a_broken_mask_is_reported_by_its_own_name(tmp_path: Path) -> None:
    items = plain_items(tmp_path, labeled=2)
    mask = items.labeled[0].mask
    assert mask is not None
    mask.write_text("x")
    batch = IterationDataset(items, INFO, configured())[1]
    assert set(batch.unreadable) == {str(mask)}


def test_a_replaced_image_is_cut_as_the_lost_one_would_have_been(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    """The rest of the batch, and every later one, is not touched."""
    items, info = real_items
    config = configured(data=VARIED)
    before = loaded(items, config, info=info)
    items.labeled[0].image.write_text("x")
    after = loaded(items, config, info=info)
    lost = drawn_places(config, number=1, index=0, num_items=8)
    for place, (ours, theirs) in enumerate(zip(pictures(before), pictures(after), strict=True)):
        assert torch.equal(ours, theirs) == (place not in lost)
    assert lost


def drawn_places(config: Config, *, number: int, index: int, num_items: int) -> set[int]:
    total = config.train.iterations * config.train.batch_size
    return {
        place
        for place in range(total)
        if drawn_index(config.train.seed, number, num_items, place) == index
    }


def pictures(batches: Sequence[Batch]) -> list[torch.Tensor]:
    return list(itertools.chain.from_iterable(batch.labeled_images for batch in batches))


@pytest.mark.parametrize("part", ["labeled", "unlabeled"])
def test_no_readable_image_left_is_a_data_error(tmp_path: Path, part: str) -> None:
    items = plain_items(tmp_path)
    for item in getattr(items, part):
        item.image.unlink()
    with pytest.raises(DataError, match=r"none of \d training images can be read") as caught:
        loaded(items, configured())
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    assert str(tmp_path) in caught.value.message
    assert "data folder" in caught.value.mend


# ---------------------------------------------------------------- workers


def test_workers_load_the_same_and_outlive_signals_to_the_process_group(
    real_items: tuple[SplitItems, DatasetInfo],
) -> None:
    items, info = real_items
    state_before = torch.get_rng_state()
    config = configured(data={**VARIED, "workers": 2})
    before = {child.pid for child in multiprocessing.active_children()}
    iterator = iter(iteration_loader(items, info, config, first=1, device=CPU))
    batches = [next(iterator), next(iterator)]  # both workers are up
    workers = [child for child in multiprocessing.active_children() if child.pid not in before]
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    batches += list(iterator)
    assert_all_same(batches, loaded(items, configured(data=VARIED), info=info))
    assert torch.equal(torch.get_rng_state(), state_before)


@pytest.mark.parametrize(
    ("megabytes", "workers"), [(64, 0), (79, 0), (80, 1), (118, 1), (119, 2), (4096, 2)]
)
def test_no_more_workers_than_the_shared_memory_has_room_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    megabytes: int,
    workers: int,
) -> None:
    """The guide's batches are 20 MB, and an engine gives a container 64 MB if not told more."""
    free = os.statvfs_result((4096, 4096, 0, 0, megabytes * 10**6 // 4096, 0, 0, 0, 0, 255))
    monkeypatch.setattr("job.data.streams.os.statvfs", lambda _: free)
    config = configured(data={"crop_size": 321, "workers": 2}, batch_size=4, accumulate=4)
    loader = iteration_loader(plain_items(tmp_path), INFO, config, first=1, device=CPU)
    assert loader.num_workers == workers
    assert ("--shm-size" in caplog.text) == (workers < 2)


_FAILING_WORKER = """
import sys
from pathlib import Path

from job.data.streams import iteration_loader
from job.errors import JobError
from tests.unit.data.test_streams import CPU, INFO, configured, plain_items

if __name__ == "__main__":
    items = plain_items(Path(sys.argv[1]), labeled=2, unlabeled=2)
    for item in items.unlabeled:
        item.image.unlink()
    config = configured(iterations=1, data={"workers": int(sys.argv[2])})
    try:
        list(iteration_loader(items, INFO, config, first=1, device=CPU))
    except JobError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
"""


def run_script(text: str, folder: Path, *arguments: str) -> tuple[str, int | None]:
    """What a script prints, and its exit status; None if it has not ended after 4 minutes."""
    script = folder / "script.py"
    script.write_text(text)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder / "data"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        start_new_session=True,
    )
    try:
        status = process.wait(240)  # starting twice takes a busy machine 20 s
    except subprocess.TimeoutExpired:
        status = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    with process.stdout:
        return process.stdout.read(), status


@pytest.fixture(scope="module")
def failing_worker(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int | None]:
    """Of a process whose one loader process finds no readable image."""
    return run_script(_FAILING_WORKER, tmp_path_factory.mktemp("failing_worker"), "1")


def test_after_an_error_in_a_worker_the_process_ends(
    failing_worker: tuple[str, int | None],
) -> None:
    _, status = failing_worker
    assert status == ExitCode.BAD_CONFIG


def test_an_error_in_a_worker_reaches_the_user_as_the_same_two_lines(
    tmp_path: Path, failing_worker: tuple[str, int | None]
) -> None:
    items = plain_items(tmp_path, labeled=2, unlabeled=2)
    for item in items.unlabeled:
        item.image.unlink()
    with pytest.raises(DataError) as here:
        loaded(items, configured(iterations=1))
    text, _ = failing_worker
    assert text.splitlines()[0].startswith("none of 2 training images can be read")
    assert text.splitlines()[1:] == str(here.value).splitlines()[1:]


_LOST_WORKER = """
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import closing
from pathlib import Path

from job.data.streams import iteration_loader
from tests.unit.data.test_streams import CPU, INFO, configured, plain_items

if __name__ == "__main__":
    items = plain_items(Path(sys.argv[1]))
    config = configured(iterations=10**6, data={"workers": 2})
    with closing(iter(iteration_loader(items, INFO, config, first=1, device=CPU))) as batches:
        next(batches), next(batches)
        first, second = (child.pid for child in multiprocessing.active_children())
        if sys.argv[2] == "killed":
            os.kill(first, signal.SIGKILL)
            for _ in batches:
                pass
        os.kill(first, signal.SIGSTOP)
        os.kill(second, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (second, signal.SIGKILL)).start()
    print("left", flush=True)
"""


def test_a_worker_killed_for_memory_ends_the_process_with_an_error(tmp_path: Path) -> None:
    assert run_script(_LOST_WORKER, tmp_path, "killed") == ("", 1)


def test_a_worker_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    """Not even when the other one dies while they are asked to leave."""
    assert run_script(_LOST_WORKER, tmp_path, "one hangs, one dies") == ("left\n", 0)


_WHOLE_RUN = """
import multiprocessing
import sys
from contextlib import closing
from pathlib import Path

from job.data.streams import iteration_loader
from tests.unit.data.test_streams import CPU, INFO, configured, plain_items

if __name__ == "__main__":
    items = plain_items(Path(sys.argv[1]))
    config = configured(iterations=4, data={"workers": 2})
    loader = iteration_loader(items, INFO, config, first=1, device=CPU)
    with closing(iter(loader)) as batches:
        processes = []
        for _ in batches:
            processes = multiprocessing.active_children() or processes
    print(len(processes), sorted({process.exitcode for process in processes}))
"""


def test_the_workers_of_a_whole_run_end_in_peace(tmp_path: Path) -> None:
    assert run_script(_WHOLE_RUN, tmp_path) == ("2 [0]\n", 0)


def test_on_a_cpu_auto_means_no_workers(tmp_path: Path) -> None:
    config = configured(data={"workers": "auto"})
    assert (
        iteration_loader(plain_items(tmp_path), INFO, config, first=1, device=CPU).num_workers == 0
    )


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (5, 4), (9, 8), (64, 8)])
def test_on_a_gpu_auto_takes_the_spare_cores_up_to_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, workers: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    config = configured(data={"workers": "auto"})
    loader = iteration_loader(
        plain_items(tmp_path), INFO, config, first=1, device=torch.device("cuda")
    )
    assert loader.num_workers == workers
    assert loader.pin_memory


def test_auto_counts_only_the_cores_it_may_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    config = configured(data={"workers": "auto"})
    loader = iteration_loader(
        plain_items(tmp_path), INFO, config, first=1, device=torch.device("cuda")
    )
    assert loader.num_workers == 2


def test_a_system_that_does_not_tell_its_cores_apart_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    config = configured(data={"workers": "auto"})
    loader = iteration_loader(plain_items(tmp_path), INFO, config, first=1, device=CPU)
    assert loader.num_workers == 0
