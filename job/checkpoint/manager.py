"""Checkpoints that exist whole or not at all, and are looked at before they are believed.

A save writes, in this order, each step atomic and each under a name never used before but the last:

1. `checkpoints/ID/state.pth`, the data;
2. `checkpoints/ID/manifest.json`, its size and sha256;
3. `checkpoints/latest.json`, the pointer: the ids in the order in which to try them. It is written
   only if nobody else wrote it since we did, and by nobody who has lost the lease.

A process killed between any two of them leaves the previous checkpoint in force. The guide's plain
names (`latest_checkpoint.pth`, `checkpoint_5000.pth`, `best_model.pth`) are made after that as
second names of the same data, and made again at the next restore if a kill came in between.

Knows nothing of networks: a state is a dictionary of tensors and plain values. Saves are done by
one thread at a time; `job.checkpoint.publisher` keeps them off the training thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from job import run
from job.checkpoint.lease import Lease
from job.errors import (
    STORAGE_FAILURES,
    Corrupted,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    reason,
)
from job.storage import ABSENT, ObjectStore

log = logging.getLogger(__name__)

FORMAT = 3
KEEP_RECOVERY = 3
"""Recovery checkpoints that stay: enough to fall back twice."""
STATE = "state.pth"
"""Name of a checkpoint's one file in its manifest."""
POINT_ATTEMPTS = 20
READS = 2
"""Times a damaged file is read before it is believed to be damaged where it lies."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like to be believed."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class SaveCost:
    """What publishing one state took."""

    size: int
    """Bytes."""
    serialise_s: float
    publish_s: float
    """Upload, manifest and pointer."""

    @property
    def seconds(self) -> float:
        """From a finished copy in memory to durable."""
        return self.serialise_s + self.publish_s


@dataclass(frozen=True)
class BestModel:
    """The best model so far."""

    id: str
    iteration: int
    val_miou: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BestModel:
        """Inverse of `to_dict`."""
        return cls(**raw)


@dataclass(frozen=True)
class _Manifest:
    """The file that makes a checkpoint exist."""

    id: str
    iteration: int
    attempt: int
    files: Mapping[str, FileRecord]
    """One, `STATE`; every manifest of a run has this field."""
    keys: tuple[str, ...]
    """Where the state can be read: its own data, then the plain name of a numbered one."""
    best_id: str | None
    """The best model this checkpoint refers to, so that it is not deleted under it."""
    format: int = FORMAT

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> _Manifest:
        raw = json.loads(text)
        return cls(**{**raw, "files": records_from(raw["files"]), "keys": tuple(raw["keys"])})


def records_from(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, FileRecord]:
    """The "files" of a manifest."""
    return {name: FileRecord(**record) for name, record in raw.items()}


class CheckpointManager:
    """Saves, restores and prunes the checkpoints of one run, for the attempt that holds the lease.

    Args:
        store: the run's.
        lease: of this attempt; asked before anything is published.
        scratch: local folder for files on their way.
    """

    def __init__(self, store: ObjectStore, lease: Lease, scratch: Path) -> None:
        self._store = store
        self._lease = lease
        self._scratch = scratch
        self._ids, self._pointer_version = self._read_pointer()
        self._quarantined: set[str] = set()
        self._manifests: dict[str, _Manifest] = {}
        self._data_deleted: set[str] = set()
        self._best_ids: set[str] = set()
        self._swept = False
        self._prune_failed = False

    def save(
        self,
        state: Mapping[str, Any],
        *,
        best: BestModel | None,
        numbered: bool,
        before_pointer: Callable[[], None] = lambda: None,
    ) -> SaveCost:
        """Publish a state (with its "iteration"); on return it is durable.

        Args:
            state: tensors and plain values.
            best: the best model at this point.
            numbered: also keep it for good, as `checkpoint_ITERATION.pth`.
            before_pointer: makes durable what must not be older than the checkpoint (the ledger).

        Raises:
            Fenced: another attempt has published; this one's state was not.
            StorageError: the storage failed; the previous checkpoint is still in force.
        """
        self._lease.check()
        swept, self._swept = self._swept, False  # what a failed save leaves goes with the next one
        iteration = int(state["iteration"])
        id_ = run.unique_id(iteration, self._lease.attempt)
        key, plain = run.checkpoint_state(id_), run.numbered_checkpoint(iteration)
        record, serialise_s, upload_s = self._upload(state, key)
        began_s = time.monotonic()
        manifest = _Manifest(
            id=id_,
            iteration=iteration,
            attempt=self._lease.attempt,
            files={STATE: record},
            keys=(key, plain) if numbered else (key,),
            best_id=best.id if best else None,
        )
        before_pointer()
        self._store.write(run.checkpoint_manifest(id_), manifest.to_json(), expected=ABSENT)
        self._manifests[id_] = manifest
        if numbered:
            self._point(key, plain)
        self._lease.check()  # the upload may have taken long enough to be taken for dead
        self._publish_pointer([id_, *self._ids])
        self._swept = swept
        cost = SaveCost(record.size, serialise_s, upload_s + time.monotonic() - began_s)
        self._point(key, run.LATEST_CHECKPOINT)
        try:
            self._prune(best)
        except STORAGE_FAILURES as error:
            if not self._prune_failed:  # once is enough; they only cost money
                log.warning("old checkpoints could not be deleted: %s", error)
            self._prune_failed = True
            self._swept = False
        return cost

    def restore(self) -> dict[str, Any] | None:
        """The newest state that verifies; None if the run has no checkpoint yet.

        One that does not verify is marked with the reason and never tried again.

        Raises:
            StorageError: the storage failed (which says nothing about the checkpoints), or there
                are checkpoints and not one is good.
        """
        self._quarantined = {Path(info.key).stem for info in self._store.list(run.QUARANTINE)}
        for id_ in [id_ for id_ in self._ids if id_ not in self._quarantined]:
            try:
                manifest = self._manifest(id_)
                state, key = self._verified_state(manifest)
            except _Damaged as damage:
                self._quarantine(id_, str(damage))
                continue
            # What came after it was bad, or belongs to a future that will be trained again. Written
            # anew in any case: a predecessor that sleeps before its own write finds it changed.
            self._publish_pointer(self._ids[self._ids.index(id_) :])
            self._point(key, run.LATEST_CHECKPOINT)
            return state
        if self._ids:
            raise StorageError(
                f"{self._store.uri}: none of its {len(self._ids)} checkpoints can be read; "
                f"{run.QUARANTINE} says why for each",
                mend="start a new run with another --run; best_model.pth may still be good",
            )
        return None

    def set_aside(self, since: int, why: str) -> int | None:
        """Never try the checkpoints of an iteration and of later ones again; the oldest stays.

        Args:
            since: first iteration of which there is none to go back to.
            why: for whoever looks.

        Returns:
            The iteration that the run will go on from; None if it has no checkpoint.

        Raises:
            StorageError: the storage failed.
        """
        good = [id_ for id_ in self._ids if id_ not in self._quarantined]
        while len(good) > 1 and run.iteration_in(good[0]) >= since:
            self._quarantine(good.pop(0), why)
        return run.iteration_in(good[0]) if good else None

    def new_best(self, iteration: int, val_miou: float) -> BestModel:
        """Name a new best model, whose files `save_best` is to publish."""
        return BestModel(run.unique_id(iteration, self._lease.attempt), iteration, val_miou)

    def save_best(self, best: BestModel, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Publish the files of a new best model under its own and under their plain names.

        Args:
            best: from `new_best`.
            files: plain name to content.

        Raises:
            Fenced: another attempt has taken over.
            StorageError: the storage failed; it can be done again.
        """
        self._lease.check()
        self._best_ids.add(best.id)
        records = {
            name: asdict(self._upload(content, run.best_file(best.id, name))[0])
            for name, content in files.items()
        }
        manifest = {"format": FORMAT, **best.to_dict(), "files": records}
        self._store.write(run.best_manifest(best.id), json.dumps(manifest, indent=1).encode())
        self.point_best(best)

    def point_best(self, best: BestModel) -> None:
        """Make the plain names those of this best model (again, after a rollback)."""
        for name in self.best_files(best):
            self._point(run.best_file(best.id, name), name)

    def best_files(self, best: BestModel) -> dict[str, FileRecord]:
        """Sizes and hashes of a best model's files, by plain name.

        Raises:
            ObjectNotFound: the model is gone.
        """
        return records_from(json.loads(self._store.read(run.best_manifest(best.id)))["files"])

    def verify_best(self, best: BestModel) -> Path:
        """Read the plain best model files back and compare them; returns the generator's file.

        A plain name that holds something else (a stale attempt may have got in a last word) is
        made anew first.

        Raises:
            StorageError: they are not what was written.
        """
        records = self.best_files(best)
        for name, record in records.items():
            for plain_is_wrong in (False, True):
                if plain_is_wrong:
                    self._point(run.best_file(best.id, name), name)
                try:
                    found = _record_of(self._store.fetch(name, self._scratch))
                except ObjectNotFound:
                    continue
                if found == record:
                    break
            else:
                raise StorageError(
                    f"{self._store.uri}/{name}: is not the file that was written",
                    mend="the storage has damaged it: use the newest checkpoint_*.pth, or train "
                    "again with another --run",
                )
        return self._store.fetch(run.BEST_MODEL, self._scratch)

    def save_file(self, content: Mapping[str, Any], key: str) -> FileRecord:
        """Publish any other dictionary of tensors and plain values under a plain name.

        Raises:
            Fenced: another attempt has taken over.
        """
        self._lease.check()
        return self._upload(content, key)[0]

    def _upload(self, content: Mapping[str, Any], key: str) -> tuple[FileRecord, float, float]:
        """Serialise and upload; what the file is, and the seconds each took."""
        path = self._scratch / f"outgoing-{Path(key).name}"
        began_s = time.monotonic()
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            torch.save(dict(content), path)
            record = _record_of(path)
            serialised_s = time.monotonic()
            self._store.upload(path, key)
        except OSError as error:
            raise StorageError.from_os("write", path, error) from error
        except RuntimeError as error:  # torch's own writer reports a full disk so
            raise StorageError(
                f"cannot write {path}: {reason(error)}",
                mend="free some disk space; the same command then goes on",
            ) from error
        finally:
            path.unlink(missing_ok=True)
        stored = self._store.stat(key)
        if stored is None or stored.size != record.size:
            found = "nothing" if stored is None else f"{stored.size} bytes"
            raise StorageError(f"{self._store.uri}/{key}: holds {found} of {record.size} written")
        return record, serialised_s - began_s, time.monotonic() - serialised_s

    def _point(self, source: str, plain: str) -> None:
        """Make a plain name a copy of `source`, unless a newer attempt is at work.

        The lease is checked after the version of the name was taken: a process that sleeps between
        the check and the copy finds the name changed by its successor, and copies nothing.
        """
        for _ in range(POINT_ATTEMPTS):
            before = self._store.stat(plain)
            self._lease.check()
            try:
                self._store.copy(source, plain, expected=before.version if before else ABSENT)
                return
            except PreconditionFailed:
                continue
            except ObjectNotFound:
                self._lease.check()  # a successor deletes what its predecessor has left
                raise
        raise StorageError(f"{self._store.uri}/{plain}: is changed by somebody all the time")

    def _read_pointer(self) -> tuple[list[str], str]:
        """The ids to try, and the pointer's version; by the manifests where the pointer is lost."""
        text, version = self._store.read_versioned(run.LATEST_POINTER)
        try:
            return [str(id_) for id_ in json.loads(text)["checkpoints"]], version
        except (ValueError, KeyError, TypeError):
            pass
        found = []
        for info in self._store.list(run.CHECKPOINTS):
            id_, _, name = info.key.removeprefix(run.CHECKPOINTS).partition("/")
            if name and info.key == run.checkpoint_manifest(id_):
                found.append(id_)
        if found or version != ABSENT:
            log.warning(
                "%s/%s is missing or cannot be read; going by the %d manifests that are there",
                self._store.uri,
                run.LATEST_POINTER,
                len(found),
            )
        # A later attempt has published later, even if it had fallen back to an earlier iteration.
        return sorted(found, key=lambda id_: (run.attempt_in(id_), id_), reverse=True), version

    def _publish_pointer(self, ids: list[str]) -> None:
        text = json.dumps({"checkpoints": ids, "attempt": self._lease.attempt}).encode()
        self._pointer_version = self._lease.publish(run.LATEST_POINTER, text, self._pointer_version)
        self._ids = ids

    def _manifest(self, id_: str) -> _Manifest:
        if id_ in self._manifests:
            return self._manifests[id_]
        try:
            text = self._store.read(run.checkpoint_manifest(id_))
        except ObjectNotFound:
            raise _Damaged("its manifest is missing") from None
        except Corrupted as error:
            raise _Damaged(error.message) from None
        try:
            format_ = json.loads(text)["format"]
            if format_ != FORMAT:
                raise StorageError(
                    f"checkpoint {id_} has format {format_}, this version reads {FORMAT}",
                    mend="go on with the version of s4gan that wrote it",
                )
            manifest = _Manifest.from_json(text)
        except (ValueError, TypeError, KeyError) as error:
            raise _Damaged(f"its manifest cannot be read ({error})") from None
        self._manifests[id_] = manifest
        return manifest

    def _verified_state(self, manifest: _Manifest) -> tuple[dict[str, Any], str]:
        """The state and the key it was read from: the first one where it is whole."""
        damage = _Damaged("its data is missing")
        bad: list[str] = []
        for key in manifest.keys:
            try:
                state = self._load_verified(key, manifest.files[STATE])
            except ObjectNotFound:
                continue
            except Corrupted as error:
                damage = _Damaged(error.message)
            except _Damaged as found:
                damage = found
            else:
                for other in bad:
                    log.warning("%s was damaged (%s); made anew from %s", other, damage, key)
                    self._point(key, other)
                return state, key
            bad.append(key)
        raise damage

    def _load_verified(self, key: str, written: FileRecord) -> dict[str, Any]:
        for read in range(1, READS + 1):
            path = self._store.fetch(key, self._scratch)
            found = _record_of(path)
            if found == written:
                break
            if read == READS:  # once could be the network's doing
                raise _Damaged(
                    f"{found.size} bytes with sha256 {found.sha256[:12]}..., written were "
                    f"{written.size} with {written.sha256[:12]}..."
                )
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # it holds more than tensors and plain values
            raise _Damaged(f"torch cannot load it ({reason(error)})") from None
        except Exception as error:  # torch raises whatever it stumbles over
            # The bytes are those that were written, so this says nothing against the checkpoint.
            raise StorageError(
                f"{self._store.uri}/{key}: is whole, but torch cannot load it ({reason(error)})",
                mend="if memory is short, use a machine with more; otherwise the version of torch "
                "that wrote it",
            ) from error
        finally:
            if path.is_relative_to(self._scratch):
                path.unlink()
        return state

    def _quarantine(self, id_: str, why: str) -> None:
        log.warning("checkpoint %s is bad and will not be tried again: %s", id_, why)
        self._store.write(run.quarantine_mark(id_), json.dumps({"id": id_, "reason": why}).encode())
        self._quarantined.add(id_)

    def _prune(self, best: BestModel | None) -> None:
        """Delete what the pointer no longer needs; only ever called after a successful publish.

        Only what this attempt has itself dropped is deleted, and what attempts before it have left
        behind: one that has been replaced without knowing it can never hit its successor's.
        """
        kept: dict[str, _Manifest] = {}
        for rank, id_ in enumerate(self._ids):
            try:
                manifest = self._manifest(id_)
            except _Damaged:
                continue
            numbered = len(manifest.keys) > 1
            if rank < KEEP_RECOVERY or numbered:
                kept[id_] = manifest
            if numbered and rank >= KEEP_RECOVERY and id_ not in self._data_deleted:
                plain = self._store.stat(manifest.keys[1])
                if plain is not None and plain.size == manifest.files[STATE].size:
                    self._store.delete(manifest.keys[0])  # the plain name holds the same data
                    self._data_deleted.add(id_)
        dropped = set(self._ids) - set(kept)
        if dropped:
            self._publish_pointer(list(kept))
        wanted = {manifest.best_id for manifest in kept.values()} | {best.id if best else None}
        self._best_ids |= {id_ for id_ in wanted if id_ is not None}
        for id_ in dropped:
            self._store.delete(run.checkpoint_state(id_))
            self._store.delete(run.checkpoint_manifest(id_))
        for id_ in self._best_ids - wanted:
            for name in (run.BEST_MODEL, run.BEST_MODEL_D):
                self._store.delete(run.best_file(id_, name))
            self._store.delete(run.best_manifest(id_))
            self._best_ids = self._best_ids - {id_}
        if not self._swept:
            self._sweep(run.CHECKPOINTS, set(kept))
            self._sweep(run.BEST, {id_ for id_ in wanted if id_ is not None})
            self._swept = True

    def _sweep(self, prefix: str, keep: set[str]) -> None:
        """Delete what killed attempts have left below `prefix`; once an attempt, as it lists."""
        for info in list(self._store.list(prefix)):
            id_, slash, _ = info.key.removeprefix(prefix).partition("/")
            if not slash or id_ in keep or info.key.startswith(run.QUARANTINE):
                continue
            if id_ in self._quarantined:
                continue  # put aside, for whoever wants to look
            try:
                ours_or_older = run.attempt_in(id_) <= self._lease.attempt
            except (ValueError, IndexError):
                continue  # nothing of this program's
            if ours_or_older:
                self._store.delete(info.key)


class _Damaged(Exception):
    """A checkpoint that must not be used, and why."""


def _record_of(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())
