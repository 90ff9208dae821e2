"""Reads back what wandb writes offline: a LevelDB log of protobuf records behind a short header."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER = 7
_RECORD_HEADER = 7
_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(folder: Path) -> Iterator[Any]:
    """All records of an offline run, as far as they are whole."""
    (path,) = folder.glob("*.wandb")
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = _FILE_HEADER, b""
    while position + _RECORD_HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER:
            position += left
            continue
        size = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        position += _RECORD_HEADER
        part = content[position : position + size]
        position += size
        if len(part) < size or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run, in order, without wandb's own values."""
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            rows.append(_nested(record.history.item))
    return rows


def exit_code(folder: Path) -> int | None:
    """With which the run ended; None if it did not."""
    codes = [r.exit.exit_code for r in records(folder) if r.WhichOneof("record_type") == "exit"]
    return codes[-1] if codes else None


def _nested(items: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in items:
        *above, last = [item.key] if item.key else item.nested_key
        if (above or [last])[0].startswith("_"):
            continue
        place = row
        for key in above:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return row
