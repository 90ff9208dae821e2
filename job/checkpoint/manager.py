"""Checkpoints that exist whole or not at all, and are looked at before they are believed.

A save writes, in this order, each step atomic and each under a name never used before but the last:

1. `checkpoints/ID/state.pth`, the data;
2. `checkpoints/ID/manifest.json`, its size and sha256;
3. `checkpoints/latest.json`, the pointer: the ids in the order in which to try them. It is written
   only if nobody else wrote it since we did, and by nobody who has lost the lease.

A process killed between any two of them leaves the previous checkpoint in force. The guide's plain
names (`latest_checkpoint.pth`, `checkpoint_5000.pth`, `best_model.pth`) are made after that as
second names of the same data, and made again at the next restore if a kill came in between.

Knows nothing of networks: a state is a dictionary of tensors and plain values.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from job import run
from job.checkpoint.lease import Lease
from job.errors import ObjectNotFound, PreconditionFailed, StorageError, reason
from job.storage import ABSENT, ObjectStore

log = logging.getLogger(__name__)

FORMAT = 1
KEEP_RECOVERY = 3
"""Recovery checkpoints that stay: enough to fall back twice."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like to be believed."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class BestModel:
    """Where the best model so far lies."""

    id: str
    iteration: int
    val_miou: float
    files: Mapping[str, FileRecord]
    """By plain name: `best_model.pth`, `best_model_D.pth`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "files": {n: asdict(r) for n, r in self.files.items()}}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BestModel:
        """Inverse of `to_dict`."""
        files = {name: FileRecord(**record) for name, record in raw["files"].items()}
        return cls(**{**raw, "files": files})


@dataclass(frozen=True)
class _Manifest:
    """The file that makes a checkpoint exist."""

    id: str
    iteration: int
    attempt: int
    state: FileRecord
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
        return cls(**{**raw, "state": FileRecord(**raw["state"]), "keys": tuple(raw["keys"])})


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

    def save(self, state: Mapping[str, Any], *, best: BestModel | None, numbered: bool) -> None:
        """Publish a state (with its "iteration"); on return it is durable.

        Args:
            state: tensors and plain values.
            best: the best model at this point.
            numbered: also keep it for good, as `checkpoint_ITERATION.pth`.

        Raises:
            Fenced: another attempt has published; this one's state was not.
            StorageError: the storage failed; the previous checkpoint is still in force.
        """
        self._lease.check()
        iteration = int(state["iteration"])
        id_ = run.unique_id(iteration, self._lease.attempt)
        key, plain = run.checkpoint_state(id_), run.numbered_checkpoint(iteration)
        record = self._upload(state, key)
        manifest = _Manifest(
            id=id_,
            iteration=iteration,
            attempt=self._lease.attempt,
            state=record,
            keys=(key, plain) if numbered else (key,),
            best_id=best.id if best else None,
        )
        self._store.write(run.checkpoint_manifest(id_), manifest.to_json(), expected=ABSENT)
        if numbered:
            self._store.copy(key, plain)
        self._publish_pointer([id_, *self._ids])
        self._store.copy(key, run.LATEST_CHECKPOINT)
        self._prune(best)

    def restore(self) -> dict[str, Any] | None:
        """The newest state that verifies; None if the run has no checkpoint yet.

        One that does not verify is marked with the reason and never tried again.

        Raises:
            StorageError: the storage failed (which says nothing about the checkpoints), or there
                are checkpoints and not one is good.
        """
        bad = {Path(info.key).stem for info in self._store.list(run.QUARANTINE)}
        for id_ in [id_ for id_ in self._ids if id_ not in bad]:
            try:
                manifest = self._manifest(id_)
                state = self._verified_state(manifest)
            except _Damaged as damage:
                self._quarantine(id_, str(damage))
                continue
            # What came after it was bad, or belongs to a future that will be trained again.
            self._ids = self._ids[self._ids.index(id_) :]
            self._store.copy(self._readable_key(manifest), run.LATEST_CHECKPOINT)
            return state
        if self._ids:
            raise StorageError(
                f"{self._store.uri}: none of its {len(self._ids)} checkpoints can be read; "
                f"{run.QUARANTINE} says why for each",
                mend="start a new run with another --run; best_model.pth may still be good",
            )
        return None

    def save_best(
        self, files: Mapping[str, Mapping[str, Any]], *, iteration: int, val_miou: float
    ) -> BestModel:
        """Publish the files of a new best model under a new name and under their plain names.

        Args:
            files: plain name to content.
            iteration: of the weights.
            val_miou: their score, 0..1.

        Raises:
            Fenced: another attempt has taken over.
        """
        self._lease.check()
        id_ = run.unique_id(iteration, self._lease.attempt)
        records = {
            name: self._upload(content, run.best_file(id_, name)) for name, content in files.items()
        }
        best = BestModel(id=id_, iteration=iteration, val_miou=val_miou, files=records)
        self.point_best(best)
        return best

    def point_best(self, best: BestModel) -> None:
        """Make the plain names those of this best model (again, after a rollback)."""
        for name in best.files:
            self._store.copy(run.best_file(best.id, name), name)

    def verify_best(self, best: BestModel) -> Path:
        """Read the plain best model files back and compare them; returns the generator's file.

        Raises:
            StorageError: they are not what was written.
        """
        for name, record in best.files.items():
            path = self._store.fetch(name, self._scratch)
            if _record_of(path) != record:
                raise StorageError(
                    f"{self._store.uri}/{name}: is not the file that was written",
                    mend=f"copy {run.best_file(best.id, name)} over it",
                )
        return self._store.fetch(run.BEST_MODEL, self._scratch)

    def save_file(self, content: Mapping[str, Any], key: str) -> FileRecord:
        """Publish any other dictionary of tensors and plain values under a plain name.

        Raises:
            Fenced: another attempt has taken over.
        """
        self._lease.check()
        return self._upload(content, key)

    def _upload(self, content: Mapping[str, Any], key: str) -> FileRecord:
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = self._scratch / f"outgoing-{Path(key).name}"
        try:
            torch.save(dict(content), path)
            record = _record_of(path)
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
        return record

    def _read_pointer(self) -> tuple[list[str], str]:
        text, version = self._store.read_versioned(run.LATEST_POINTER)
        return (list(json.loads(text)["checkpoints"]) if text else []), version

    def _publish_pointer(self, ids: list[str]) -> None:
        text = json.dumps({"checkpoints": ids, "attempt": self._lease.attempt}).encode()
        while True:
            try:
                self._pointer_version = self._store.write(
                    run.LATEST_POINTER, text, expected=self._pointer_version
                )
                break
            except PreconditionFailed:
                # Either we are the stale attempt (then this raises), or a stale one had passed its
                # own check just before we took the lease: the lease decides, so we write again.
                self._lease.check()
                _, self._pointer_version = self._read_pointer()
        self._ids = ids

    def _manifest(self, id_: str) -> _Manifest:
        try:
            manifest = _Manifest.from_json(self._store.read(run.checkpoint_manifest(id_)))
        except ObjectNotFound:
            raise _Damaged("its manifest is missing") from None
        except (ValueError, TypeError, KeyError) as error:
            raise _Damaged(f"its manifest cannot be read ({error})") from None
        if manifest.format != FORMAT:
            raise StorageError(
                f"checkpoint {id_} has format {manifest.format}, this version reads {FORMAT}",
                mend="go on with the version of s4gan that wrote it",
            )
        return manifest

    def _verified_state(self, manifest: _Manifest) -> dict[str, Any]:
        path = self._store.fetch(self._readable_key(manifest), self._scratch)
        found = _record_of(path)
        if found != manifest.state:
            raise _Damaged(
                f"{found.size} bytes with sha256 {found.sha256[:12]}..., written were "
                f"{manifest.state.size} with {manifest.state.sha256[:12]}..."
            )
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its unpickler stumbles over
            raise _Damaged(f"torch cannot load it ({reason(error)})") from None
        return state

    def _readable_key(self, manifest: _Manifest) -> str:
        for key in manifest.keys:
            if self._store.stat(key):
                return key
        raise _Damaged("its data is missing")

    def _quarantine(self, id_: str, why: str) -> None:
        log.warning("checkpoint %s is bad and will not be tried again: %s", id_, why)
        self._store.write(run.quarantine_mark(id_), json.dumps({"id": id_, "reason": why}).encode())

    def _prune(self, best: BestModel | None) -> None:
        """Delete what the pointer no longer needs; only ever called after a successful publish."""
        keep, manifests = [], []
        for rank, id_ in enumerate(self._ids):
            try:
                manifest = self._manifest(id_)
            except _Damaged:
                continue
            numbered = len(manifest.keys) > 1
            if rank < KEEP_RECOVERY or numbered:
                keep.append(id_)
                manifests.append(manifest)
            if numbered and rank >= KEEP_RECOVERY:
                self._store.delete(manifest.keys[0])  # the plain name holds the same data
        if keep != self._ids:
            self._publish_pointer(keep)
        ours = set(keep)
        for info in list(self._store.list(run.CHECKPOINTS)):
            id_, slash, _ = info.key.removeprefix(run.CHECKPOINTS).partition("/")
            if slash and id_ not in ours and not info.key.startswith(run.QUARANTINE):
                self._store.delete(info.key)
        wanted = {manifest.best_id for manifest in manifests} | {best.id if best else None}
        for info in list(self._store.list(run.BEST)):
            if info.key.removeprefix(run.BEST).partition("/")[0] not in wanted:
                self._store.delete(info.key)


class _Damaged(Exception):
    """A checkpoint that must not be used, and why."""


def _record_of(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())
