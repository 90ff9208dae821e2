"""`s4gan pull`: the artifacts of a run, from a bucket or a folder, whole and verified.

What the run itself has written down about a file (size and SHA-256, in `summary.json` and in the
manifests) is what the pulled one must be; the others are compared with the server's checksum.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from job import run
from job.errors import ConfigError, ObjectNotFound, StorageError
from job.storage import LocalStore, ObjectStore, open_store
from job.storage.cache import try_lock
from job.storage.digests import file_digest, md5_promise
from job.storage.get import FolderAddress, ObjectChanged, folder_etag
from job.storage.progress import Silent, TransferProgress, megabytes
from job.storage.sync import LISTINGS, Listed, S3Source, check_path
from job.storage.transfer import Origin, transfer
from job.storage.units import Arrived, Whole, begun, explained_write

if TYPE_CHECKING:
    from job.storage.s3 import S3Store

ARTIFACTS = (
    run.CONFIG,
    run.IDENTITY,
    run.SPLITS,
    run.LEDGER,
    run.REPORT,
    run.SUMMARY,
    run.PREDICTIONS,
    run.BEST_EVALUATION,
    run.BEST_MODEL,
    run.BEST_MODEL_D,
    run.FINAL_MODEL,
)
"""What is pulled without --all, and the newest numbered checkpoint."""
_NUMBERED = re.compile(r"checkpoint_([0-9]+)\.pth")
_WORK = ".pull"
"""Folder in the target for files that have not been verified yet."""

Records = Mapping[str, frozenset[tuple[int, str]]]
"""What a file of the run may be: size and SHA-256, by key. More than one while the run goes on."""


@dataclass(frozen=True)
class Pulled:
    """A file that lies in the target folder."""

    name: str
    size: int
    verified: str
    """sha256 (the run's own record), else what the server gave: etag, a checksum's name, size."""


@dataclass(frozen=True)
class PullResult:
    """What `pull` did."""

    files: tuple[Pulled, ...]
    fetched: int
    """Of the files; the others were there already."""
    finished: bool
    """Whether the run has ended; otherwise there will be more."""


def pull(
    run_uri: str,
    folder: Path,
    *,
    everything: bool = False,
    progress: TransferProgress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> PullResult:
    """Bring a run's files into a folder; those that are there and right stay.

    Args:
        run_uri: s3://BUCKET/PREFIX or a folder.
        folder: made if absent.
        everything: all files but the lease.
        progress: told how far it is.
        stopped: asked several times a second.

    Raises:
        ConfigError: there is no run, or the bucket or the credentials are wrong.
        StorageError: a file cannot be fetched, or is not what the run has written down; such a
            file is not left in the folder, the others are.
        Preempted: stopped; the same command goes on.
    """
    progress = progress or Silent()
    store = open_store(run_uri)
    _refuse_other_run(store, folder)
    for attempt in range(1, LISTINGS + 1):
        origin, listing = _listing(store)
        wanted = _wanted(listing, everything)
        if not wanted:
            raise ConfigError(
                f"{run_uri}: there is no run", mend="check the URI; a run holds config.yaml"
            )
        records = _read_records(store, listing)
        try:
            with _alone(folder):
                files, fetched = _bring(origin, wanted, records, folder, progress, stopped)
        except ObjectChanged as changed:
            if attempt == LISTINGS:
                raise StorageError(
                    f"{run_uri}: {changed} and others change all the time", mend="run it again"
                ) from None
            progress.say(f"{changed} has just changed; starting it anew")
            continue
        finished = any(item.path == run.SUMMARY for item in listing)
        return PullResult(files, fetched, finished)
    raise AssertionError("unreachable")


def _refuse_other_run(store: ObjectStore, folder: Path) -> None:
    """Raises ConfigError if the folder holds the files of another run."""
    ids = []
    for place in (store, LocalStore(folder)):
        with contextlib.suppress(ObjectNotFound, ValueError, TypeError):
            ids.append(run.RunIdentity.from_json(place.read(run.IDENTITY)).run_id)
    if len(set(ids)) > 1:
        raise ConfigError(
            f"{folder}: holds the files of another run, {ids[1]}", mend="choose another folder"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises StorageError if another pull is writing into the folder."""
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor, fcntl.LOCK_EX):
            raise StorageError(
                f"{folder}: another pull is writing there", mend="wait until it has ended"
            )
        yield
    finally:
        os.close(descriptor)


def _listing(store: ObjectStore) -> tuple[Origin, list[Listed]]:
    folder = store.local_path("")
    if folder is None:
        source = S3Source(cast("S3Store", store))
        return source.origin, source.listing()
    found = []
    for info in store.list(""):
        with contextlib.suppress(FileNotFoundError):  # deleted in between
            etag = folder_etag((folder / info.key).stat())
            found.append(Listed(info.key, info.key, info.size, etag))
    return Origin(FolderAddress(str(folder)), lambda: None), found


def _wanted(listing: Sequence[Listed], everything: bool) -> list[Listed]:
    by_name = {item.path: item for item in listing}
    if run.CONFIG not in by_name and run.IDENTITY not in by_name:
        return []
    if everything:
        damaged = tuple(
            f"{run.CHECKPOINTS}{PurePosixPath(item.path).stem}/"
            for item in listing
            if item.path.startswith(run.QUARANTINE)
        )
        return [
            item
            for item in listing
            if item.path != run.LEASE
            and not any(p.startswith(".") for p in item.path.split("/"))
            and not item.path.startswith(damaged)
        ]
    numbered = sorted(
        (int(match[1]), name) for name in by_name if (match := _NUMBERED.fullmatch(name))
    )
    names = [*ARTIFACTS, *(name for _, name in numbered[-1:])]
    return [by_name[name] for name in names if name in by_name]


# ---------------------------------------------------------------- what the run has written down


def _read_records(store: ObjectStore, listing: Iterable[Listed]) -> Records:
    texts: dict[str, Any] = {}
    for item in listing:
        manifest = item.path.endswith("/manifest.json") and item.path.startswith(
            (run.BEST, run.CHECKPOINTS)
        )
        if manifest or item.path == run.SUMMARY:
            # One that is just being pruned, or damaged, says nothing.
            with contextlib.suppress(
                ObjectNotFound, ValueError, TypeError, KeyError, AttributeError
            ):
                content = json.loads(store.read(item.path))
                records_of({item.path: content})
                texts[item.path] = content
    return records_of(texts)


def records_of(contents: Mapping[str, Any]) -> Records:
    """Size and SHA-256 of the run's files, from `summary.json` and manifests by their keys.

    A plain name may be any of the manifests' files of that name, for the newest id need not be the
    one in force; unless the summary, which is written last, says which.
    """
    found: dict[str, set[tuple[int, str]]] = {}

    def add(key: str, record: Mapping[str, Any]) -> None:
        found.setdefault(key, set()).add((int(record["size"]), str(record["sha256"])))

    for key, content in contents.items():
        if key == run.SUMMARY:
            continue
        folder = key.rpartition("/")[0]
        for name, record in content.get("files", {}).items():
            add(f"{folder}/{name}", record)
            if key.startswith(run.BEST):
                add(name, record)
                continue
            add(run.LATEST_CHECKPOINT, record)
            for plain in content.get("keys", ()):
                if "/" not in plain:
                    add(plain, record)
    for name, record in contents.get(run.SUMMARY, {}).get("files", {}).items():
        found[name] = set()
        add(name, record)
    return {key: frozenset(records) for key, records in found.items()}


# ---------------------------------------------------------------- bringing


def _bring(
    origin: Origin,
    wanted: Sequence[Listed],
    records: Records,
    folder: Path,
    progress: TransferProgress,
    stopped: Callable[[], bool],
) -> tuple[tuple[Pulled, ...], int]:
    here = {item.path: how for item in wanted if (how := _is_here(folder, item, records))}
    missing = [item for item in wanted if item.path not in here]
    work = folder / _WORK
    size = sum(item.size for item in missing)
    _check_space(folder, size - sum(begun(work / item.path) for item in missing))
    units = []
    for item in missing:
        check_path(item.path, item.path)
        units.append(Whole(item.key, item.size, item.etag, item.path))
    large = {unit.path for unit in units if unit.is_large}
    refused: list[str] = []

    def take(files: Sequence[Arrived]) -> None:
        # One by one and at once, so that an interruption costs only what is under way.
        for file in files:
            how = verified_by(work / file.path, file.path, records) or file.verified
            if how == _REFUSED:
                (work / file.path).unlink()
                refused.append(file.path)
            else:
                _publish(work / file.path, folder / file.path)
                here[file.path] = how
        told = sum(file.size for file in files if file.path not in large)
        progress.advance(len(files), told)

    progress.begin("pull", len(missing), size)
    try:
        transfer(
            origin,
            units,
            work,
            arrived=take,
            came=lambda size: progress.advance(0, size),
            stopped=stopped,
        )
    finally:
        progress.end()
    shutil.rmtree(work, ignore_errors=True)
    if refused:
        raise _refusal(sorted(refused), records)
    return tuple(Pulled(item.path, item.size, here[item.path]) for item in wanted), len(missing)


_REFUSED = "refused"


def verified_by(path: Path, name: str, records: Records) -> str:
    """Compare a file with the run's record: "sha256", "refused", or "" if there is no record."""
    if name not in records:
        return ""
    found = (path.stat().st_size, file_digest(path, "sha256").hex())
    return "sha256" if found in records[name] else _REFUSED


def _is_here(folder: Path, item: Listed, records: Records) -> str:
    """How a file of an earlier pull verifies; "" if it is not there or not right."""
    path = folder / item.path
    try:
        if path.stat().st_size != item.size:
            return ""
        how = verified_by(path, item.path, records)
        if how:
            return "" if how == _REFUSED else how
        promise = md5_promise(item.etag)
        if promise and promise.is_of(path):
            return promise.label
    except OSError:
        return ""
    return ""


def _publish(source: Path, target: Path) -> None:
    with explained_write(target):
        source.chmod(0o644)
        descriptor = os.open(source, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def _refusal(refused: Sequence[str], records: Records) -> StorageError:
    name = refused[0]
    same = sorted(key for key in records if key != name and records[key] & records[name])
    others = f"; so are {', '.join(refused[1:])}" if refused[1:] else ""
    mend = f"{same[0]} in the run should hold the same: copy it over {name}" if same else ""
    return StorageError(
        f"{name} is not the file that the run has written (its SHA-256 differs from the record), "
        f"so it was not kept{others}",
        mend=mend or "somebody has replaced it: look for an older version of that object",
    )


def _check_space(folder: Path, size: int) -> None:
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"the files need {megabytes(size)} in {folder}, {megabytes(free)} are free",
            mend="choose a folder on a larger disk",
        )


def table(result: PullResult) -> str:
    """What came, for the user: file, size, and how it was verified."""
    width = max(len(file.name) for file in result.files)
    lines = [f"{'file':<{width}}  {'size':>8}  verified by"]
    lines += [
        f"{file.name:<{width}}  {megabytes(file.size):>8}  {file.verified}" for file in result.files
    ]
    there = len(result.files) - result.fetched
    lines.append(f"{result.fetched} fetched, {there} were there")
    if not result.finished:
        lines.append("this run has not finished: there will be more, and newer ones of these")
    return "\n".join(lines)
