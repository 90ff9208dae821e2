"""Whole images at the full resolution of their masks, without side effects."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

from job.data.dataset import Dataset, Item
from job.data.images import Array, read_rgb, scaled_image
from job.data.scan import scan_dataset
from job.errors import DataError
from job.models.generator import Architecture, Generator
from job.training import evaluation
from job.training.evaluation import (
    PIXELS_AT_ONCE,
    alike,
    evaluate,
    load_ahead,
    pixels_at_once,
    predict,
)
from job.training.protocols import PLAIN, Protocol
from tests.conftest import MakeData
from tests.unit.training.tiny import CPU


@pytest.fixture
def generator() -> Generator:
    """With a batch norm that has seen something, and a head that has an opinion."""
    network = Generator(Architecture("tiny", 3))
    with torch.no_grad():
        for branch in network.head.branches:
            branch.weight.mul_(20)
        for _ in range(3):
            network((torch.randn(4, 3, 32, 32) * 0.5 + 0.45) * 255)
    return network


@pytest.fixture
def dataset(make_data: MakeData) -> Dataset:
    return scan_dataset(make_data(labeled=2, unlabeled=1, val=4, height=37, width=51))


def slow_counts(
    generator: Generator, items: tuple[Item, ...], image_scale: float
) -> list[list[int]]:
    """Counted pixel by pixel, from PIL's own decoding."""
    generator.eval()
    counts = [[0] * 3 for _ in range(3)]
    for item in items:
        assert item.mask is not None
        picture, mask = Image.open(item.image), np.asarray(Image.open(item.mask))
        size = (round(picture.width * image_scale), round(picture.height * image_scale))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        tensor = TF.pil_to_tensor(picture).float()
        with torch.no_grad():
            logits = generator(tensor[None])
            full = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=True)
        prediction = full[0].argmax(dim=0).tolist()
        for true_row, predicted_row in zip(mask.tolist(), prediction, strict=True):
            for true, predicted in zip(true_row, predicted_row, strict=True):
                if true != 200:  # dataset.yaml's ignore_index
                    counts[true][predicted] += 1
    return counts


@pytest.mark.parametrize("image_scale", [1.0, 0.5, 1.3])
def test_evaluation_equals_a_slow_count_at_full_resolution(
    generator: Generator, dataset: Dataset, image_scale: float
) -> None:
    wanted = slow_counts(generator, dataset.val, image_scale)
    found = evaluate(generator, dataset.val, dataset.info, image_scale=image_scale, device=CPU)
    assert found is not None
    assert found.matrix.counts.tolist() == wanted
    assert sum(map(sum, wanted)) == 4 * 36 * 51  # the top row of each mask is ignored
    assert sum(1 for column in zip(*wanted, strict=True) if any(column)) > 1


def test_images_of_different_sizes_are_evaluated_whole(
    generator: Generator, dataset: Dataset, make_data: MakeData
) -> None:
    larger = scan_dataset(make_data(name="larger", labeled=2, unlabeled=1, val=1, height=60))
    items = (*dataset.val[:1], *larger.val)
    found = evaluate(generator, items, dataset.info, image_scale=1.0, device=CPU)
    assert found is not None
    assert found.matrix.counts.tolist() == slow_counts(generator, items, 1.0)


def test_images_that_pass_together_count_like_images_alone(
    generator: Generator,
    dataset: Dataset,
    make_data: MakeData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    larger = scan_dataset(make_data(name="larger", labeled=2, unlabeled=1, val=2, height=60))
    others = [replace(item, id=f"larger_{item.id}") for item in larger.val]
    items = (*dataset.val[:3], *others, *dataset.val[3:])
    alone = evaluate(generator, items, dataset.info, image_scale=1.0, device=CPU, keep=2)
    sizes: list[int] = []
    monkeypatch.setattr(evaluation, "pixels_at_once", lambda *_: PIXELS_AT_ONCE)
    generator.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    seen: list[tuple[str, float]] = []
    together = evaluate(
        generator,
        items,
        dataset.info,
        image_scale=1.0,
        device=CPU,
        keep=2,
        look=lambda item, _, truth: seen.append((item.id, float(truth.sum()))),
    )
    assert sizes == [2, 4]  # neighbours or not
    assert alone is not None
    assert together is not None
    assert torch.equal(alone.matrix.counts, together.matrix.counts)
    assert alone.scores == together.scores
    assert [one.item for one in alone.extremes] == [one.item for one in together.extremes]
    assert sorted(item for item, _ in seen) == sorted(item.id for item in items)


@pytest.mark.parametrize("image_scale", [1.0, 0.5])
def test_large_images_are_evaluated_in_tiles(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, image_scale: float
) -> None:
    class OfColour(torch.nn.Module):
        """Knows a pixel by itself, so that tiles change nothing."""

        seen = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.seen = max(self.seen, images.shape[-1] * images.shape[-2])
            return images.float()

    def counts(network: OfColour) -> list[list[int]]:
        found = evaluate(network, dataset.val, dataset.info, image_scale=image_scale, device=CPU)  # type: ignore[arg-type]
        assert found is not None
        counts: list[list[int]] = found.matrix.counts.tolist()
        return counts

    whole, small = OfColour(), OfColour()
    wanted = counts(whole)
    monkeypatch.setattr("job.training.tiling.TILED_ABOVE", 100)
    monkeypatch.setattr("job.training.tiling.TILE", 8)
    monkeypatch.setattr("job.training.tiling.MARGIN", 2)
    found = counts(small)
    assert whole.seen == round(37 * image_scale) * round(51 * image_scale)
    assert small.seen == 12 * 12
    if image_scale == 1.0:
        assert found == wanted
    else:  # tiles of an odd image are not scaled by quite the same
        close = np.abs(np.array(found) - np.array(wanted)).sum() / np.array(wanted).sum()
        assert 0 <= close < 0.2


def test_a_group_has_one_size_and_a_bounded_number_of_pixels(dataset: Dataset) -> None:
    item = dataset.val[0]

    def pair(side: int, mask_side: int = 8) -> tuple[Item, tuple[Array, Array]]:
        return item, (np.zeros((side, side, 3), np.uint8), np.zeros((mask_side,) * 2, np.uint8))

    given = [pair(4), pair(4), pair(4), pair(4, 16), pair(2), pair(9), pair(9)]
    groups = list(alike(given, at_once=128))
    assert [len(group) for group in groups] == [2, 1, 1, 1, 1, 1]
    assert [one for group in groups for one in group] == given
    assert list(alike([], at_once=32)) == []


def test_convolutions_are_not_timed_for_each_size(
    generator: Generator, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as in training
    seen: list[bool] = []
    generator.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    evaluate(generator, dataset.val, dataset.info, image_scale=1.0, device=CPU)
    assert seen == [False] * 4
    assert torch.backends.cudnn.benchmark


def test_only_a_gpu_and_a_single_look_take_several_images() -> None:
    gpu = torch.device("cuda")
    assert pixels_at_once(CPU, PLAIN) == 1
    assert pixels_at_once(gpu, PLAIN) == PIXELS_AT_ONCE
    assert pixels_at_once(gpu, Protocol("flipped", flip=True)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_generator_is_left_as_it_was(
    generator: Generator, dataset: Dataset, training: bool
) -> None:
    generator.train(training)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    evaluate(generator, dataset.val, dataset.info, image_scale=1.0, device=CPU)
    assert all(module.training is training for module in generator.modules())
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in generator.parameters())


def test_no_random_number_is_drawn(generator: Generator, dataset: Dataset) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    evaluate(generator, dataset.val, dataset.info, image_scale=0.5, device=CPU)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_evaluating_twice_gives_the_same(generator: Generator, dataset: Dataset) -> None:
    first, second = (
        evaluate(generator.train(), dataset.val, dataset.info, image_scale=1.0, device=CPU)
        for _ in range(2)
    )
    assert first is not None
    assert second is not None
    assert torch.equal(first.matrix.counts, second.matrix.counts)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_worst_and_the_best_images_are_kept(
    generator: Generator, dataset: Dataset, keep: int
) -> None:
    found = evaluate(generator, dataset.val, dataset.info, image_scale=1.0, device=CPU, keep=keep)
    plain = evaluate(generator, dataset.val, dataset.info, image_scale=1.0, device=CPU)
    assert found is not None
    assert plain is not None
    assert torch.equal(found.matrix.counts, plain.matrix.counts)
    assert set(found.scores) == {item.id for item in dataset.val}
    order = sorted(dataset.val, key=lambda item: (found.scores[item.id], item.id))
    wanted = order[:keep] + order[max(keep, len(order) - keep) :]
    assert [one.item for one in found.extremes] == wanted
    for one in found.extremes:
        alone = slow_counts(generator, [one.item], 1.0)
        counts = np.array(alone)
        assert one.miou == found.scores[one.item.id]
        hits, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
        assert one.miou == pytest.approx(np.mean(hits[union > 0] / union[union > 0]))
        image = scaled_image(read_rgb(one.item.image), 1.0)
        generator.eval()
        again = predict(generator, image[None], one.prediction.shape, CPU)[0]
        assert np.array_equal(again.numpy(), one.prediction)


def test_no_items_give_an_empty_matrix(generator: Generator, dataset: Dataset) -> None:
    found = evaluate(generator, (), dataset.info, image_scale=1.0, device=CPU)
    assert found is not None
    assert not found.matrix.counts.any()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stop_gives_up_and_leaves_the_mode(
    generator: Generator, dataset: Dataset, after: int
) -> None:
    asked = itertools.count()
    generator.train()
    found = evaluate(
        generator,
        dataset.val,
        dataset.info,
        image_scale=1.0,
        device=CPU,
        stopped=lambda: next(asked) >= after,
    )
    assert found is None
    assert generator.training
    assert next(asked) == after + 1


def test_a_file_gone_bad_is_named_and_leaves_the_mode(
    generator: Generator, dataset: Dataset
) -> None:
    dataset.val[2].image.write_bytes(b"no image")
    generator.train()
    with pytest.raises(DataError, match="val_0002"):
        evaluate(generator, dataset.val, dataset.info, image_scale=1.0, device=CPU)
    assert generator.training


# ---------------------------------------------------------------------------- predict


def test_predict_interpolates_logits_not_classes(generator: Generator) -> None:
    generator.eval()
    image = np.random.default_rng(0).integers(0, 256, (33, 41, 3)).astype(np.uint8)
    prediction = predict(generator, image[None], (66, 90), CPU)[0]
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        full = F.interpolate(generator(tensor), (66, 90), mode="bilinear", align_corners=True)
    assert prediction.shape == (66, 90)
    assert prediction.dtype == torch.int64
    assert torch.equal(prediction, full.argmax(dim=1)[0])


def test_predict_needs_no_gradients(generator: Generator) -> None:
    image = np.zeros((1, 32, 32, 3), np.uint8)
    assert not predict(generator.eval(), image, (32, 32), CPU).requires_grad


# ---------------------------------------------------------------------------- load_ahead


def test_load_ahead_keeps_the_order_whatever_takes_how_long() -> None:
    def load(number: int) -> int:
        time.sleep(0.005 * (number % 3 == 0))
        return 10 * number

    assert list(load_ahead(load, range(20))) == [10 * number for number in range(20)]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_load_ahead_of_a_few_gives_them_all(count: int) -> None:
    assert list(load_ahead(str, range(count))) == [str(number) for number in range(count)]


def test_load_ahead_holds_only_a_few_results() -> None:
    taken = 0
    most_ahead = 0

    def sources() -> Iterator[int]:
        nonlocal most_ahead
        for number in itertools.count():  # endless: only what is needed may be asked for
            most_ahead = max(most_ahead, number - taken)
            yield number

    for result in load_ahead(lambda number: number, sources()):
        assert result == taken
        taken += 1
        if taken == 50:
            break
    assert 1 <= most_ahead <= 5


def test_load_ahead_does_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=10)
    assert len(list(load_ahead(lambda _: together.wait(), range(3)))) == 3


def test_load_ahead_passes_an_exception_on_in_its_place() -> None:
    def load(number: int) -> int:
        if number == 3:
            raise ValueError("number 3")
        return number

    results = load_ahead(load, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="number 3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_load_ahead_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    results = load_ahead(str, itertools.count())
    assert next(results) == "0"
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
