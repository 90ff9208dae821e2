"""The polynomial decay."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config import Config
from job.training.schedule import polynomial


def test_the_first_iteration_has_the_base_rate() -> None:
    assert polynomial(2.5e-4, 1, 50_000, 0.9) == 2.5e-4


def test_half_way_is_the_papers_formula() -> None:
    # (1 - 50 / 100) ** 0.9
    assert polynomial(1.0, 51, 100, 0.9) == pytest.approx(0.535886731)


@given(
    iterations=st.integers(2, 1000),
    base=st.floats(1e-6, 1.0),
    power=st.floats(0.1, 3),
)
def test_it_falls_all_the_way_and_stays_positive(
    iterations: int, base: float, power: float
) -> None:
    rates = [polynomial(base, i, iterations, power) for i in range(1, iterations + 1)]
    assert rates[0] == base
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(base * (1 / iterations) ** power)
    assert rates[-1] > 0


def test_power_0_is_constant() -> None:
    assert {polynomial(0.1, i, 10, 0) for i in range(1, 11)} == {0.1}


def test_a_run_of_one_iteration_has_the_base_rate() -> None:
    assert polynomial(0.1, 1, 1, 0.9) == 0.1


def test_base_0_stays_0() -> None:
    assert polynomial(0.0, 3, 10, 0.9) == 0


def test_the_head_learns_ten_times_faster() -> None:
    assert Config().train.head_factor == 10
