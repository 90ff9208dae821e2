"""Learning rates."""

from __future__ import annotations

HEAD_FACTOR = 10.0
"""The generator's head learns so much faster than its backbone. Source: DeepLabv2 and S4GAN."""


def polynomial(base: float, iteration: int, iterations: int, power: float) -> float:
    """Learning rate of an iteration (from 1): `base` at the first, almost 0 at the last.

    Source: Chen et al. 2017, arXiv:1606.00915, section 4.1 ("poly").
    """
    return float(base * (1 - (iteration - 1) / iterations) ** power)
