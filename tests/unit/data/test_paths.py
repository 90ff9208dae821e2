"""Paths in little memory are the same paths."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from job.data.paths import PathTable


@pytest.mark.parametrize(
    "paths",
    [
        [],
        ["/data/a.png"],
        ["/data/a.png", "/data/a.png"],
        ["/data/a", "/data/a/b c/d.png", "/data/ü\n.png"],
        ["relative.png", "/other/x.png"],
        [os.fsdecode(b"/data/\xff\xfe.png"), "/data/b.png"],
    ],
)
def test_what_goes_in_comes_out(paths: list[str]) -> None:
    wanted = [Path(path) for path in paths]
    for table in (PathTable(wanted), pickle.loads(pickle.dumps(PathTable(wanted)))):
        assert len(table) == len(wanted)
        assert [table[index] for index in range(len(wanted))] == wanted
        for beyond in (-1, len(wanted)):
            with pytest.raises(IndexError):
                table[beyond]


def test_they_take_little_more_than_their_own_names() -> None:
    names = [f"/scratch/s4gan/data/0123/train/images/{index:06d}.jpg" for index in range(1000)]
    assert len(pickle.dumps(PathTable(map(Path, names)))) < 1000 * (10 + 8) + 500
