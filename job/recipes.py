"""`s4gan bench-recipe`: recipes against each other, over several seeds, as one table.

Every run is an ordinary `s4gan train` in a folder of its own, so the whole is resumed by the same
command: finished runs stay, interrupted ones go on, and only what has no score yet is scored.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from job import run
from job.checkpoint.lease import POLL_S, look
from job.config import Config, DataConfig, config_from_yaml, load_config, parse_assignment
from job.data.names import TESTING
from job.errors import ConfigError, DataError, ExitCode, JobError, Preempted
from job.monitor.ledger import read_ledger
from job.storage import is_same_place, open_store

DEFAULT_RECIPES = (
    "supervised=guide,train.supervised_only=true",
    "guide=guide",
    "modern=modern",
)
TABLE = "table.md"
SCORES = "scores.json"
LOG = "train.log"
GIVEN = "recipe.yaml"
_LAST_LINES = 5


@dataclass(frozen=True)
class Recipe:
    """A preset, and what is different from it."""

    name: str
    preset: str
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """NAME=PRESET_OR_FILE[,section.key=value ...]; a value with commas goes into a file.

        Raises:
            ConfigError: not of that form.
        """
        name, equals, rest = text.partition("=")
        preset, *changes = rest.split(",")
        if not equals or not preset or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(
                f"--recipe {text}: not of the form NAME=PRESET[,section.key=value]",
                mend=f"for example: --recipe {DEFAULT_RECIPES[0]}",
            )
        return cls(name, preset, dict(parse_assignment(change) for change in changes))

    def config(self, seed: int, common: dict[str, Any]) -> Config:
        """Of one run.

        Raises:
            ConfigError: an unknown preset or key, or a value out of range.
        """
        return load_config(self.preset, self.changes | common | {"train.seed": seed})


@dataclass(frozen=True)
class Score:
    """Of one finished run."""

    recipe: str
    seed: int
    miou: float
    class_iou: dict[str, float | None]
    val_miou: float
    """The best one of training, by which `best_model.pth` was chosen."""
    scored: str
    """Which model, on which images."""
    hours: float
    """Of all attempts."""


def bench_recipes(
    recipes: Sequence[Recipe],
    *,
    data: str,
    out: Path,
    seeds: int,
    common: dict[str, Any],
    test: str | None,
    test_data: DataConfig | None = None,
    parallel: int,
    tell: Callable[[str], None],
) -> str:
    """Train every recipe with every seed, score each model, and write one table.

    Args:
        recipes: the first is what the others are compared with.
        data: folder or s3:// prefix to train on; validation chooses the best model.
        out: folder for runs, scores and the table.
        seeds: how many, from 0; each also draws its own labeled subset.
        common: "section.key" to value, over every recipe: the same iterations, network, crop.
        test: data whose `val` scores the best models, as it chose nothing; None: the models after
            the last iteration are scored on the validation images, which did not choose them.
        test_data: layout and images of `test`, if they are not to be looked for.
        parallel: runs at a time.
        tell: of progress.

    Returns:
        The table, as Markdown.

    Raises:
        ConfigError: a recipe or the data cannot be used.
        Preempted: a run was stopped; the same command goes on.
        JobError: a run failed in another way.
    """
    if len({recipe.name for recipe in recipes}) < len(recipes):
        raise ConfigError("two recipes have the same name", mend="rename one: NAME=PRESET")
    todo = [
        _Run(recipe, seed, recipe.config(seed, common), out / recipe.name / f"seed-{seed}")
        for seed in range(seeds)
        for recipe in recipes
    ]
    if "train.seed" in common:
        raise ConfigError("--set train.seed: --seeds says which", mend="leave it out")
    for one in todo:
        _refuse_other_settings(one)
        _refuse_other_data(one, data)
    test_set = None if test is None else _TestSet(test, test_data or DataConfig())
    if test_set is not None:
        tell(f"looking at {test}")
        _refuse_bad_test(test_set, todo[0].config.data, data)
    started = time.monotonic()
    done: list[Score] = []
    with _stopping() as children, ThreadPoolExecutor(parallel) as pool:
        futures = [
            pool.submit(_train_and_score, one, data, test_set, children, parallel, tell)
            for one in todo
        ]
        try:
            for one, future in zip(todo, futures, strict=True):
                done.append(future.result())
                tell(
                    f"{one.recipe.name}, seed {one.seed}: mIoU {done[-1].miou:.4f} "
                    f"({len(done)} of {len(todo)}, {(time.monotonic() - started) / 60:.0f} min)"
                )
        except BaseException:
            for future in futures:
                future.cancel()
            children.stop()
            raise
    table = markdown([recipe.name for recipe in recipes], done)
    (out / TABLE).write_text(table, encoding="utf-8")
    return table


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    seed: int
    config: Config
    folder: Path

    @property
    def called(self) -> str:
        return f"{self.recipe.name}, seed {self.seed}"


@dataclass(frozen=True)
class _TestSet:
    uri: str
    data: DataConfig

    @property
    def called(self) -> str:
        return f"{self.uri}, images of {self.data.val_list}" if self.data.val_list else self.uri


class _Children:
    """Training processes, which are asked to save when this one is asked to stop, or is killed."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> int:
        """Run one to its end; its exit code.

        Raises:
            Preempted: all were stopped already.
        """
        with log.open("ab") as output:
            with self._lock:
                if self.stopped:
                    raise Preempted("stopped; the same command goes on")
                # A session of its own: a Ctrl-C reaches it through us, once. A pipe: if we are
                # killed, it notices, saves and ends.
                process = subprocess.Popen(
                    [*command, "--stop-with-stdin"],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
                self._processes.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._processes.discard(process)
                assert process.stdin is not None
                process.stdin.close()

    def stop(self) -> None:
        """Ask all of them to save and end."""
        with self._lock:
            self.stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _stopping() -> Iterator[_Children]:
    children = _Children()
    before = {
        number: signal.signal(number, lambda *_: children.stop())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_other_settings(one: _Run) -> None:
    """A run that is there already, but not of this recipe: neither its score nor its rest fits."""
    given = one.folder / GIVEN
    if not given.exists():
        return
    before = config_from_yaml(given.read_text(encoding="utf-8"), source=str(given)).to_dict()
    changed = [
        f"{section}.{key}: {before[section][key]!r} in the run, {value!r} now"
        for section, values in one.config.to_dict().items()
        for key, value in values.items()
        if before[section][key] != value
    ]
    if changed:
        raise ConfigError(
            f"{one.folder}: was trained with other settings: {'; '.join(changed)}",
            mend="choose another --out, or remove that folder",
        )


def _refuse_other_data(one: _Run, data: str) -> None:
    """A run that is there already, but was trained on something else."""
    events = read_ledger(one.folder / run.LEDGER)
    origins = [event["data_uri"] for event in events if event["event"] == "origin"]
    if origins and not is_same_place(open_store(origins[-1]), open_store(data)):
        raise ConfigError(
            f"{one.folder}: was trained on {origins[-1]}, and --data is {data}",
            mend="choose another --out, or remove that folder",
        )


def _refuse_bad_test(test: _TestSet, data: DataConfig, data_uri: str) -> None:
    """Before hours of training: it must have images to score on, and the classes of the data."""
    from job.data.scan import scan_dataset
    from job.inference import labeled_items, refuse_other_classes
    from job.storage.sync import data_folder

    with data_folder(test.uri) as folder:
        try:
            dataset = scan_dataset(folder, test.data, needs_train=False, names=TESTING)
            labeled_items(dataset, "val", mend="check --test, or name its images: --test-list")
        except DataError as error:
            raise DataError(f"--test {test.uri}: {error.message}", mend=error.mend) from None
        with data_folder(data_uri) as train:
            classes = scan_dataset(train, data).info.classes
        mend = "give a test set of the same classes, in the same order"
        refuse_other_classes(dataset, classes, f"those of --data {data_uri}", mend)


def _train_and_score(
    one: _Run,
    data: str,
    test: _TestSet | None,
    children: _Children,
    parallel: int,
    tell: Callable[[str], None],
) -> Score:
    scores = one.folder / SCORES
    if (one.folder / run.SUMMARY).exists() and scores.exists():
        found = Score(**json.loads(scores.read_text(encoding="utf-8")))
        if found.scored == _scored(data, test):
            return found
    if children.stopped:  # before it has begun
        raise _stopped(one)
    _await_predecessor(one, children, tell)
    one.folder.mkdir(parents=True, exist_ok=True)
    given = one.folder / GIVEN
    given.write_text(one.config.to_yaml(), encoding="utf-8")
    log = one.folder / LOG
    tell(f"{one.called}: training; follow: tail -f {shlex.quote(str(log))}")
    environment = dict(os.environ)
    if parallel > 1:  # or each would take every core
        cores = max(1, len(os.sched_getaffinity(0)) // parallel)
        environment.setdefault("OMP_NUM_THREADS", str(cores))
    command = ["train", "--config", str(given), "--data", data, "--run", str(one.folder)]
    code = children.run([sys.executable, "-m", "job", *command], log, environment)
    if code != ExitCode.OK:
        raise _failed(one, code, log)
    score = _score(one, data, test)
    scores.write_text(json.dumps(asdict(score), indent=1), encoding="utf-8")
    return score


def _await_predecessor(one: _Run, children: _Children, tell: Callable[[str], None]) -> None:
    """Until nobody trains this run: that of a command that was killed saves before it ends."""
    told = False
    while (holding := look(open_store(str(one.folder)))) is not None and holding.is_live:
        if not told:
            tell(f"{one.called}: waiting for process {holding.holder.pid}, which trains it")
            told = True
        if children.stopped:
            raise _stopped(one)
        time.sleep(POLL_S)


def _stopped(one: _Run) -> Preempted:
    return Preempted(f"{one.called}: stopped and saved; the same command goes on")


def _failed(one: _Run, code: int, log: Path) -> JobError:
    if code == ExitCode.PREEMPTED:
        return _stopped(one)
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    error = JobError(
        f"{one.called}: ended with exit code {code}\n" + "\n".join(last),
        mend=f"see {log}; what is done is kept, and the same command goes on",
    )
    with contextlib.suppress(ValueError):  # a signal's
        error.exit_code = ExitCode(code)
    return error


def _scored(data: str, test: _TestSet | None) -> str:
    return f"best model on {test.called}" if test else f"final model on validation of {data}"


def _score(one: _Run, data: str, test: _TestSet | None) -> Score:
    from job.inference import choose_device, evaluate_weights

    model = one.folder / (run.BEST_MODEL if test else run.FINAL_MODEL)
    events = read_ledger(one.folder / run.LEDGER)
    if test:
        scores = evaluate_weights(
            str(model), test.uri, "val", choose_device(), test.data, names=TESTING
        )
        miou, class_iou = scores.miou, scores.class_iou
    else:
        last = [event for event in events if event["event"] == "eval"][-1]
        miou = last["val_miou"]
        summary = json.loads((one.folder / run.SUMMARY).read_text(encoding="utf-8"))
        class_iou = dict(zip(summary["best"]["class_iou"], last["class_iou"], strict=True))
    return Score(
        recipe=one.recipe.name,
        seed=one.seed,
        miou=miou,
        class_iou=class_iou,
        val_miou=max(event["val_miou"] for event in events if event["event"] == "eval"),
        scored=_scored(data, test),
        hours=_hours(events),
    )


def _hours(events: Sequence[dict[str, Any]]) -> float:
    """From the first to the last line of each attempt."""
    spans: dict[int, list[float]] = {}
    for event in events:
        spans.setdefault(event["attempt"], []).append(event["time"])
    return sum(max(times) - min(times) for times in spans.values()) / 3600


# ---------------------------------------------------------------- the table


def markdown(names: Sequence[str], scores: Sequence[Score]) -> str:
    """Mean and spread of every recipe, and of its difference to the first, seed by seed."""
    by_recipe = {
        name: {score.seed: score for score in scores if score.recipe == name} for name in names
    }
    first = by_recipe[names[0]]
    seeds = sorted(first)
    lines = [
        f"mIoU, {scores[0].scored}; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean and "
        "standard deviation.",
        "",
        f"| recipe | mIoU | less {names[0]}, seed by seed | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | best validation mIoU | hours |",
        "|---" * (5 + len(seeds)) + "|",
    ]
    for name in names:
        found = by_recipe[name]
        gains = [found[seed].miou - first[seed].miou for seed in seeds]
        cells = [
            name,
            f"**{_spread([found[seed].miou for seed in seeds])}**",
            "" if name == names[0] else _spread(gains, signed=True),
            *(f"{found[seed].miou:.4f}" for seed in seeds),
            _spread([found[seed].val_miou for seed in seeds]),
            f"{statistics.mean(found[seed].hours for seed in seeds):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    classes = list(first[seeds[0]].class_iou)
    lines += [
        "",
        "| IoU, mean | " + " | ".join(classes) + " |",
        "|---" * (1 + len(classes)) + "|",
        *(
            f"| {name} | " + " | ".join(_mean_iou(by_recipe[name], one) for one in classes) + " |"
            for name in names
        ),
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if len(values) < 2:
        return f"{values[0]:{sign}.4f}"
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


def _mean_iou(found: dict[int, Score], name: str) -> str:
    values = [one.class_iou[name] for one in found.values()]
    known = [value for value in values if value is not None and not math.isnan(value)]
    return f"{statistics.mean(known):.3f}" if known else "-"
