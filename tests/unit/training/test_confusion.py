"""Scores against torchmetrics, and what counts for nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from job.data.images import IGNORE
from job.training.confusion import ConfusionMatrix, counts_of_each

CPU = torch.device("cpu")


def matrix_of(prediction: torch.Tensor, truth: torch.Tensor, classes: int = 3) -> ConfusionMatrix:
    images = (1, 1, -1)
    counts = counts_of_each(prediction.reshape(images), truth.reshape(images), classes)
    return ConfusionMatrix.of(counts[0])


def row(*values: int) -> torch.Tensor:
    return torch.tensor([values])


@st.composite
def scored(draw: st.DrawFn) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number of classes, prediction and truth; some classes are often absent."""
    classes = draw(st.integers(2, 7))
    used = draw(st.integers(1, classes))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    prediction = rng.integers(0, used, shape)
    truth = rng.integers(0, used, shape).astype(np.uint8)
    truth[rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = IGNORE
    return classes, torch.from_numpy(prediction), torch.from_numpy(truth)


@given(scored())
@settings(max_examples=60, deadline=None)
def test_scores_equal_torchmetrics(case: tuple[int, torch.Tensor, torch.Tensor]) -> None:
    classes, prediction, truth = case
    matrix = matrix_of(prediction, truth, classes)
    if (truth == IGNORE).all():
        return  # torchmetrics gives NaN; what we give is tested below
    given_truth = truth.long()
    options = {"num_classes": classes, "ignore_index": IGNORE}
    assert torch.equal(
        matrix.counts, multiclass_confusion_matrix(prediction, given_truth, **options)
    )
    per_class = multiclass_jaccard_index(prediction, given_truth, average="none", **options)
    for ours, theirs in zip(matrix.class_iou(), per_class.tolist(), strict=True):
        assert (0 if ours is None else ours) == pytest.approx(theirs, abs=1e-6)
    macro = multiclass_jaccard_index(prediction, given_truth, average="macro", **options)
    assert matrix.miou() == pytest.approx(macro.item(), abs=1e-6)
    micro = multiclass_accuracy(prediction, given_truth, average="micro", **options)
    assert matrix.pixel_accuracy() == pytest.approx(micro.item(), abs=1e-6)


@given(scored())
@settings(max_examples=40, deadline=None)
def test_scores_stay_between_0_and_1_and_a_perfect_prediction_gets_1(
    case: tuple[int, torch.Tensor, torch.Tensor],
) -> None:
    classes, prediction, truth = case
    matrix = matrix_of(prediction, truth, classes)
    assert all(iou is None or 0 <= iou <= 1 for iou in matrix.class_iou())
    assert 0 <= matrix.miou() <= 1
    assert 0 <= matrix.pixel_accuracy() <= 1
    if (truth != IGNORE).any():
        perfect = matrix_of(torch.where(truth == IGNORE, prediction, truth), truth, classes)
        assert perfect.miou() == 1
        assert perfect.pixel_accuracy() == 1
        assert set(perfect.class_iou()) <= {1.0, None}


@given(scored())
@settings(max_examples=40, deadline=None)
def test_ignored_pixels_do_not_count(case: tuple[int, torch.Tensor, torch.Tensor]) -> None:
    classes, prediction, truth = case
    changed = torch.where(truth == IGNORE, (prediction + 1) % classes, prediction)
    first, second = matrix_of(prediction, truth, classes), matrix_of(changed, truth, classes)
    assert torch.equal(first.counts, second.counts)
    assert int(first.counts.sum()) == int((truth != IGNORE).sum())


@given(scored())
@settings(max_examples=40, deadline=None)
def test_images_one_by_one_count_like_all_at_once(
    case: tuple[int, torch.Tensor, torch.Tensor],
) -> None:
    classes, prediction, truth = case
    each = counts_of_each(prediction, truth, classes)
    for number, counts in enumerate(each):
        assert torch.equal(counts, matrix_of(prediction[number], truth[number], classes).counts)
    assert torch.equal(each.sum(dim=0), matrix_of(prediction, truth, classes).counts)


def test_rows_are_truth_and_columns_prediction() -> None:
    counts = matrix_of(prediction=row(2, 2, 1), truth=row(0, 0, 1)).counts
    assert counts.tolist() == [[0, 0, 2], [0, 1, 0], [0, 0, 0]]
    assert counts.dtype == torch.int64


def test_iou_by_hand() -> None:
    # Class 0: 1 hit, 1 missed, 1 too much; class 1: 1 hit, 1 missed, 1 too much.
    matrix = matrix_of(prediction=row(0, 1, 0, 1), truth=row(0, 0, 1, 1))
    assert matrix.class_iou() == [pytest.approx(1 / 3), pytest.approx(1 / 3), None]
    assert matrix.miou() == pytest.approx(1 / 3)
    assert matrix.pixel_accuracy() == pytest.approx(1 / 2)


def test_an_absent_class_is_none_and_not_averaged() -> None:
    matrix = matrix_of(prediction=row(0, 0), truth=row(0, 0))
    assert matrix.class_iou() == [1, None, None]
    assert matrix.miou() == 1


def test_a_class_only_predicted_or_only_true_is_0_and_averaged() -> None:
    assert matrix_of(row(0, 1), row(0, 0)).class_iou() == [0.5, 0, None]
    assert matrix_of(row(0, 0), row(0, 1)).class_iou() == [0.5, 0, None]
    assert matrix_of(row(0, 0), row(0, 1)).miou() == 0.25


def test_a_class_predicted_only_where_ignored_is_absent() -> None:
    assert matrix_of(row(0, 1), row(0, IGNORE)).class_iou() == [1, None, None]


def test_nothing_counted_scores_0() -> None:
    empty = ConfusionMatrix(3, CPU)
    all_ignored = matrix_of(row(0, 1), row(IGNORE, IGNORE))
    for matrix in (empty, all_ignored):
        assert matrix.class_iou() == [None, None, None]
        assert matrix.miou() == 0
        assert matrix.pixel_accuracy() == 0


def test_255_classes_fit_in_8_bits() -> None:
    values = torch.arange(255, dtype=torch.uint8).unsqueeze(0)
    matrix = matrix_of(values, values, 255)
    assert torch.equal(matrix.counts, torch.eye(255, dtype=torch.int64))


# ------------------------------------------------------------------ what else is counted


@settings(max_examples=40, deadline=None)
@given(case=scored())
def test_class_accuracy_is_torchmetrics(case: tuple[int, torch.Tensor, torch.Tensor]) -> None:
    classes, prediction, truth = case
    matrix = matrix_of(prediction, truth, classes)
    if not matrix.counts.any():
        assert matrix.mean_class_accuracy() == 0
        return
    wanted = multiclass_accuracy(
        prediction, truth.long(), classes, average="none", ignore_index=IGNORE
    )
    for index, value in enumerate(matrix.class_accuracy()):
        if value is not None:
            assert value == pytest.approx(wanted[index].item(), abs=1e-6)
    present = [value for value in matrix.class_accuracy() if value is not None]
    assert matrix.mean_class_accuracy() == pytest.approx(sum(present) / len(present))


def test_frequency_weighted_iou_by_hand() -> None:
    # Truth 0 0 0 1, predicted 0 0 1 1: IoU 2/3 and 1/2, shares 3/4 and 1/4.
    matrix = matrix_of(row(0, 0, 1, 1), row(0, 0, 0, 1))
    assert matrix.frequency_weighted_iou() == pytest.approx(0.75 * 2 / 3 + 0.25 / 2)


def test_a_class_that_never_occurs_counts_as_0_in_the_references_mean() -> None:
    matrix = matrix_of(row(0, 0, 1, 1), row(0, 0, 0, 1))
    assert matrix.miou() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert matrix.miou_all() == pytest.approx((2 / 3 + 1 / 2) / 3)


def test_without_a_labeled_pixel_all_scores_are_0() -> None:
    matrix = matrix_of(row(0, 1), row(IGNORE, IGNORE))
    assert matrix.miou_all() == matrix.frequency_weighted_iou() == 0
    assert matrix.mean_class_accuracy() == 0
