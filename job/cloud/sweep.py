"""Several runs at once: the points of a sweep, and how an array job's child finds its own."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from job.config import Config, config_from_yaml
from job.errors import ConfigError
from job.storage.files import local_copy

INDEX_VARIABLE = "AWS_BATCH_JOB_ARRAY_INDEX"
MAX_POINTS = 10_000
"""Batch's limit of an array job."""


@dataclass(frozen=True)
class Point:
    """One run."""

    run_uri: str
    config: Config


def sweep_points(
    config: Config, run_uri: str, *, seeds: int | None = None, sweeps: Sequence[str] = ()
) -> list[Point]:
    """Each combination of the values swept, as a run below `run_uri`; just one without any.

    Args:
        config: what they have in common.
        run_uri: of the run, or the place of all runs.
        seeds: so many, counted up from `train.seed`.
        sweeps: each "section.key=VALUE,VALUE,...".

    Raises:
        ConfigError: not of that form, a value that the configuration does not take, or too many.
    """
    axes = [_axis(text) for text in sweeps]
    if seeds is not None:
        if seeds < 1:
            raise ConfigError(f"--seeds {seeds}: must be at least 1")
        axes.append(("train.seed", [config.train.seed + number for number in range(seeds)]))
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is swept twice", mend="give all its values at once")
    place = run_uri.rstrip("/")
    if not axes:
        return [Point(place, config)]
    if math.prod(len(values) for _, values in axes) > MAX_POINTS:
        raise ConfigError(f"a sweep of more than {MAX_POINTS} runs", mend="make several of it")
    text = config.to_yaml()
    points = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(keys, values, strict=True))
        parts = [f"{key.removeprefix('train.')}={_shown(value)}" for key, value in chosen.items()]
        points.append(
            Point(
                "/".join([place, *parts]), config_from_yaml(text, source="sweep", overrides=chosen)
            )
        )
    _refuse_twice(points)
    return points


def _refuse_twice(points: Sequence[Point]) -> None:
    """Two children of a job in one run would wait for each other; two alike are paid for twice."""
    seen: set[str] = set()
    for point in points:
        for text in (point.run_uri, point.config.model_dump_json()):
            if text in seen:
                raise ConfigError(
                    f"{point.run_uri}: the sweep has this run twice",
                    mend="give each value once, and only values that differ in a name, too",
                )
            seen.add(text)


def points_file(points: Sequence[tuple[str, str]]) -> bytes:
    """What tells the children of an array job their (run URI, URI of the configuration)."""
    return json.dumps([{"run": run, "config": config} for run, config in points], indent=1).encode()


def own_point(points_uri: str) -> tuple[str, str]:
    """The run and the configuration's URI of this child of an array job.

    Raises:
        ConfigError: this is no array job, or the file is not of this one.
    """
    index = os.environ.get(INDEX_VARIABLE, "")
    if not index.isdecimal():
        raise ConfigError(
            f"--array {points_uri}: {INDEX_VARIABLE} is not set, so this is no array job",
            mend="train one run: --config and --run instead of --array",
        )
    with local_copy(points_uri, name="--array", mend="s4gan submit writes it") as path:
        text = path.read_bytes()
    try:
        point = json.loads(text)[int(index)]
        return str(point["run"]), str(point["config"])
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"--array {points_uri}: has no run of number {index}", mend="submit the sweep again"
        ) from None


def _axis(text: str) -> tuple[str, list[Any]]:
    key, separator, values = text.partition("=")
    if not separator or "." not in key or not values.strip():
        raise ConfigError(
            f"--sweep {text}: not of the form section.key=VALUE,VALUE,...",
            mend="for example: --sweep loss.threshold_st=0.1,0.2,0.4",
        )
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--sweep {text}: the values are not valid YAML ({error})") from None
    for value in found:
        if found.count(value) > 1:
            raise ConfigError(f"--sweep {text}: {value} is given twice")
    return key.strip(), found


def _shown(value: Any) -> str:
    """Part of a run's name."""
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("/", "-")
