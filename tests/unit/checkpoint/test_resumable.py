"""What a run can be begun or gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from job import run
from job.checkpoint.resumable import refuse_nested
from job.errors import ConfigError
from job.run import RunIdentity
from job.storage import ObjectStore, open_store


def begun(place: str) -> ObjectStore:
    store = open_store(place)
    store.write(run.IDENTITY, RunIdentity.create("2026-11-27T00:00:00+00:00").to_json())
    return store


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_run_within_another_or_around_one(
    tmp_path: Path, s3_env: None, bucket: str, where: str
) -> None:
    place = str(tmp_path / "runs") if where == "folder" else f"s3://{bucket}/runs"
    refuse_nested(begun(f"{place}/a"))  # itself is none
    refuse_nested(open_store(f"{place}/b"))
    with pytest.raises(ConfigError, match=f"lies in the run {place}/a"):
        refuse_nested(open_store(f"{place}/a/deep/er"))
    with pytest.raises(ConfigError, match=f"{place}: is the place of other runs, as a"):
        refuse_nested(open_store(place))


def test_one_that_was_there_before_goes_on(tmp_path: Path) -> None:
    inner = begun(str(tmp_path / "a/b"))
    outer = begun(str(tmp_path / "a"))
    refuse_nested(inner)
    refuse_nested(outer)


def test_another_programs_file_of_that_name_is_no_run(tmp_path: Path) -> None:
    (tmp_path / run.IDENTITY).write_text('{"jobs": 3}')
    refuse_nested(open_store(str(tmp_path / "runs/a")))
