"""What is timed alone is the same work, done in two ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts import bench_parts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_parts, "IMAGES", 2)
    monkeypatch.setattr(bench_parts, "CROP", 33)
    monkeypatch.setattr(bench_parts, "PHOTO", (64, 48))


@pytest.mark.usefixtures("small")
def test_the_discriminator_sees_the_same() -> None:
    name, plain, ours = bench_parts.loss_parts()[0]
    assert name == "labels as the discriminator sees them"
    assert torch.equal(plain(), ours())


@pytest.mark.usefixtures("small")
def test_crops_are_the_same_but_for_how_they_are_interpolated() -> None:
    _, plain, ours = bench_parts.augmentation()
    (plain_images, plain_masks), (images, masks) = plain(), ours()
    assert plain_masks.shape == masks.shape
    inside = masks != bench_parts.IGNORE
    assert (plain_masks == masks)[inside].float().mean() > 0.5  # noise: a pixel beside is another
    difference = (plain_images.flip(1) - images).abs().mean(dim=1)[inside]
    assert difference.mean() < 20  # of noise that differs by 85 on the average


def test_both_ways_of_logging_leave_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_parts.tempfile, "tempdir", str(tmp_path))
    with bench_parts.logging_of_100_iterations() as (_, plain, ours):
        plain()
        ours()
        (folder,) = tmp_path.iterdir()
        assert len((folder / "losses.txt").read_text().splitlines()) == 100
        assert '"iteration": 100' in (folder / "metrics.jsonl").read_text()


def test_a_row_has_medians_and_the_spread_of_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    bench_parts.print_row("x", {"plain": [10.0, 20.0, 30.0], "ours": [5.0, 5.0, 6.0]})
    assert capsys.readouterr().out == "| x | 20.0 | 5.0 | 0.250 (0.200 to 0.500) |\n"


def test_what_is_between_is_not_measured() -> None:
    order: list[str] = []
    times = bench_parts.by_turns(
        lambda: order.append("plain"), lambda: order.append("ours"), 2, lambda: order.append("-")
    )
    assert order == ["plain", "-", "ours", "-"] * 3
    assert [len(values) for values in times.values()] == [2, 2]
    assert min(min(values) for values in times.values()) >= 0
