"""The benchmark runs, and measures both steps in one run."""

from __future__ import annotations

import numpy as np
import pytest

from scripts import bench
from tests.unit.training.tiny import CPU

SMALL = bench.Case("tiny", 65, 2)


def test_both_steps_are_timed_by_turns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "peak", lambda step, case, device: 3e6 if step == "ours" else 4e6)
    bench.print_cases([SMALL], CPU, rounds=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert [line.split("|")[2].strip() for line in lines] == ["plain", "ours", "**ours / plain**"]
    assert "**0.750**" in lines[2]


def test_peak_memory_is_what_an_iteration_adds() -> None:
    held = np.ones(2**28, np.uint8)  # what this process has held is nothing to do with it
    few, many = (bench.peak("ours", bench.Case("tiny", crop, 2), CPU) for crop in (65, 513))
    # Images, class maps and logits alone are 60 numbers a pixel.
    assert many - few > 2 * 4 * 60 * (513**2 - 65**2)
    assert many < 2**30 + int(held[0])


def test_flop_are_those_of_both_networks() -> None:
    small, double = bench.flop(SMALL), bench.flop(bench.Case("tiny", 65, 4))
    assert double == pytest.approx(2 * small)
    # 0.051 MFLOP a pixel and image, four images; the discriminator comes on top.
    assert small > 4 * 65 * 65 * 0.05e6
