"""The shares of an iteration, and two processes, are measured and printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import bench_shares
from scripts.bench import Case
from tests.unit.training.tiny import CPU


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench_shares, "PHOTO", (120, 90))
    monkeypatch.setattr(bench_shares, "PHOTOS", 40)
    bench_shares.write_photos(tmp_path / "data")
    return tmp_path / "data"


def test_each_part_has_a_line_and_a_share(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_shares.print_shares(Case("tiny", 65, 2), CPU, 2, data)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}
    shares = [float(share[:-1]) for _, share in cells.values() if share.endswith("%")]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.5)  # of two rounds the median is the mean
    assert sum(share > 0 for share in shares) >= 3
    assert [name for name, (_, share) in cells.items() if not share.endswith("%")] == [
        "**an iteration**",
        "logging, with a line each 100 iterations",
        "a checkpoint: the training stands still",
        "input, of one loader process",
    ]


def test_processes_train_and_are_timed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_shares, "PROCESSES", (1, 3))
    bench_shares.print_processes(data, tmp_path, CPU)
    one, three = capsys.readouterr().out.strip().splitlines()[-2:]
    assert float(one.split("|")[2].split()[0]) > 0
    assert "ended with 78: error: --gpus 3: train.accumulate is 2" in three
