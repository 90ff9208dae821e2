"""A bucket behind a proxy that fails on demand, and a fresh cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig

from job.drill.proxy import Exchange, FaultProxy
from tests.services import s3_client


class Remote:
    """Objects are put directly; the program under test goes through the proxy."""

    def __init__(self, client: Any, bucket: str, proxy: FaultProxy) -> None:
        self.client = client
        self.bucket = bucket
        self.proxy = proxy

    def put(self, key: str, data: bytes, **options: Any) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data, **options)

    def put_all(self, objects: Mapping[str, bytes], prefix: str = "data/") -> None:
        for key, data in objects.items():
            self.put(prefix + key, data)

    def put_in_parts(self, key: str, path: Path, part: int = 5 * 2**20) -> None:
        self.client.upload_file(
            str(path),
            self.bucket,
            key,
            Config=TransferConfig(multipart_threshold=part, multipart_chunksize=part),
        )

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def read(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def keys(self, prefix: str) -> list[str]:
        reply = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for item in reply.get("Contents", ())]

    def uri(self, prefix: str = "data") -> str:
        return f"s3://{self.bucket}/{prefix}"

    @property
    def gets(self) -> list[Exchange]:
        """Requests for objects, not for lists."""
        return [
            exchange
            for exchange in self.proxy.requests
            if exchange.method == "GET" and "list-type" not in exchange.query
        ]

    @property
    def keys_read(self) -> list[str]:
        return sorted({exchange.path.removeprefix(f"/{self.bucket}/") for exchange in self.gets})


@pytest.fixture
def remote(
    s3_server: Any,
    s3_env: dict[str, str],
    bucket: str,
    fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Remote]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
    with s3_client(s3_server) as client:
        yield Remote(client, bucket, fault_proxy)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    monkeypatch.setenv("S4GAN_SCRATCH", str(folder))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
