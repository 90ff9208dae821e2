"""The presets' names and places.

Apart from `job.config`, whose pydantic models take a quarter of a second to import: `s4gan --help`
names them.
"""

from __future__ import annotations

from pathlib import Path

PRESETS_DIR = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names accepted by `--config` besides a file."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))
