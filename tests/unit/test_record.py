"""What an attempt says of its own end."""

from __future__ import annotations

from typing import Any

import pytest

from job.attempt.record import out_of_memory
from job.config import config_from_dict


@pytest.mark.parametrize(
    ("changes", "advised", "never"),
    [
        ({}, "--batch-size 2 --set train.accumulate=8", "crop_size"),
        ({"batch_size": 3}, "--batch-size 1 --set train.accumulate=8", "crop_size"),
        ({"batch_size": 1}, "a smaller data.crop_size", "--batch-size"),
    ],
)
@pytest.mark.parametrize("on_oom", ["stop", "halve"])
def test_too_little_memory_is_advised_what_helps(
    changes: dict[str, Any], advised: str, never: str, on_oom: str
) -> None:
    config = config_from_dict({"train": changes, "monitor": {"on_oom": on_oom}}, source="x")
    mend = out_of_memory(config).mend
    assert advised in mend
    assert never not in mend
    halves = on_oom == "stop" and changes.get("batch_size") != 1
    assert ("monitor.on_oom=halve" in mend) == halves
