"""How the memory for a data set of many files grows with their number."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from boto3.session import Session

from job.storage import sync
from job.storage.progress import Silent
from scripts import scale_listing
from scripts.scale_listing import BUCKET, PREFIX, environment, listing_server, pretend

FEW, MANY = 3_000, 9_000
BYTES_OF_AN_OBJECT = 1_000
"""Measured: 700. Names, ETags and checksums alone take 300."""


def at(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (environment(endpoint) | {sync.SCRATCH_VARIABLE: str(folder)}).items():
        monkeypatch.setenv(name, value)


def peak_bytes() -> int:
    """Of all that is allocated while the objects are listed, planned and recorded."""
    tracemalloc.start()
    try:
        with sync.data_folder(f"s3://{BUCKET}/{PREFIX}", progress=Silent()):
            return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_made_up_pages_are_read_as_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listing_server(2_001) as endpoint:
        at(endpoint, tmp_path, monkeypatch)
        pages = Session().client("s3").get_paginator("list_objects_v2")
        expected = [
            (item["Key"], item["Size"], item["ETag"])
            for page in pages.paginate(Bucket=BUCKET, Prefix=f"{PREFIX}/")
            for item in page["Contents"]
        ]
        source = sync._source(f"s3://{BUCKET}/{PREFIX}")
        assert isinstance(source, sync.S3Source)
        found = [(item.key, item.size, item.etag) for item in source.listing()]
    assert found == expected
    assert [key for key, _, _ in found] == [scale_listing.key_of(n) for n in range(2_001)]


@pytest.mark.slow
def test_an_object_takes_no_more_than_a_kilobyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "transfer", pretend)
    found = {}
    for count in (10, FEW, MANY):  # the first: what is made once
        with listing_server(count) as endpoint:
            at(endpoint, tmp_path / str(count), monkeypatch)
            found[count] = peak_bytes()
    assert (found[MANY] - found[FEW]) / (MANY - FEW) < BYTES_OF_AN_OBJECT
