"""Learning rates."""

from __future__ import annotations


def polynomial(base: float, iteration: int, iterations: int, power: float) -> float:
    """Learning rate of an iteration (from 1): `base` at the first, almost 0 at the last.

    Source: Chen et al. 2017, arXiv:1606.00915, section 4.1 ("poly").
    """
    return float(base * (1 - (iteration - 1) / iterations) ** power)
