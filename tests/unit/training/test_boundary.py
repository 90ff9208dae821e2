"""The boundary F-score, on figures whose borders are known."""

from __future__ import annotations

import pytest
import torch

from job.data.images import IGNORE
from job.training.boundary import BoundaryScore


def half(column: int, height: int = 80, width: int = 60) -> torch.Tensor:
    """Class 0 left of a column, class 1 from there on; the diagonal is 100."""
    figure = torch.zeros(height, width, dtype=torch.long)
    figure[:, column:] = 1
    return figure


def score(prediction: torch.Tensor, truth: torch.Tensor, tolerance: float = 0.02) -> BoundaryScore:
    found = BoundaryScore(3, tolerance)
    found.update(prediction, truth)
    return found


def test_the_truth_itself_scores_1_and_absent_classes_do_not_count() -> None:
    found = score(half(30), half(30))
    assert found.class_scores() == [1.0, 1.0, None]
    assert found.mean() == 1


@pytest.mark.parametrize(("shift", "wanted"), [(1, 1.0), (2, 1.0), (3, 0.0), (10, 0.0)])
def test_a_border_within_the_tolerance_is_met(shift: int, wanted: float) -> None:
    # 0.02 of a diagonal of 100 pixels.
    assert score(half(30 + shift), half(30)).mean() == wanted


def test_precision_and_recall_are_weighed_by_hand() -> None:
    prediction = half(30)
    prediction[:, :10] = 1  # a second border, far away, as long as the first
    found = score(prediction, half(30))
    # Class 0: precision 1/2, recall 1; so is class 1.
    assert found.class_scores()[:2] == pytest.approx([2 / 3, 2 / 3])


def test_a_border_that_nobody_asked_for_scores_0() -> None:
    found = score(half(30), torch.zeros(80, 60, dtype=torch.long))
    assert found.class_scores() == [0.0, 0.0, None]


def test_an_image_of_one_class_has_no_border() -> None:
    flat = torch.zeros(80, 60, dtype=torch.long)
    assert score(flat, flat).class_scores() == [None, None, None]
    assert score(flat, flat).mean() == 0


def test_beside_a_wide_ignored_area_nothing_is_asked_for() -> None:
    truth = half(30)
    truth[:, 20:40] = IGNORE
    assert score(half(30), truth).class_scores() == [None, None, None]


@pytest.mark.parametrize(("column", "wanted"), [(30, 1.0), (31, 1.0), (45, 0.0)])
def test_a_band_of_ignored_pixels_along_a_border_is_shared(column: int, wanted: float) -> None:
    """As PASCAL VOC draws it around every object."""
    truth = half(30)
    truth[:, 28:32] = IGNORE
    found = score(half(column), truth).class_scores()
    assert found == [wanted, wanted, None]


def test_images_are_averaged() -> None:
    found = score(half(30), half(30))
    found.update(half(45), half(30))
    assert found.class_scores()[:2] == [0.5, 0.5]
