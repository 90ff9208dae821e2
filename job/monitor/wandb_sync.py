"""A run's ledger as one clean Weights & Biases run, made after the fact.

For runs that were offline, in part or as a whole: each of their attempts has left files of its own,
and W&B would lay them over each other. The ledger has each iteration once.
"""

from __future__ import annotations

import contextlib
import glob
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from job import run
from job.config import Config, config_from_yaml
from job.errors import ConfigError, ExitCode, ObjectNotFound, StorageError, reason
from job.monitor import wandb_run
from job.monitor.ledger import best_of, open_run, parse_ledger
from job.monitor.setting import Setting
from job.monitor.verdict import why_nothing
from job.monitor.wandb_rows import (
    NOTHING,
    PREDICTIONS,
    Kind,
    Row,
    findings_of,
    rows_of,
    target_charts,
)
from job.monitor.wandb_run import ModelFile, RunFacts
from job.run import RunIdentity
from job.storage import ObjectStore

FINISH_TIMEOUT_S = 600
"""For all that is sent."""


@dataclass(frozen=True)
class Replayed:
    """What `replay` has made."""

    run_id: str
    where: str
    """The W&B run's address; offline the folder to give to `wandb sync`."""
    rows: int
    last_iteration: int


@dataclass(frozen=True)
class _Past:
    """A run as its files tell of it."""

    store: ObjectStore
    config: Config
    identity: RunIdentity
    events: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    """Empty if the run is not finished."""

    @property
    def facts(self) -> RunFacts:
        """As the run itself sent them."""
        told: Mapping[str, Any] = next(
            (one for one in reversed(self.events) if one["event"] == "origin"), {}
        )
        best = self.summary.get("best") or {}
        return RunFacts(
            uri=self.store.uri,
            data_uri=str(told.get("data_uri") or self.summary.get("data", {}).get("uri", "")),
            classes=tuple(told.get("classes") or best.get("class_iou", ())),
            provenance=told.get("provenance") or self.summary.get("provenance", {}),
        )

    @property
    def was_online(self) -> bool:
        """Whether W&B may have a run of its id; ledgers of earlier versions do not say."""
        states = [one.get("state") for one in self.events if one["event"] == "wandb"]
        return "online" in states or not states

    @property
    def exit_code(self) -> int:
        """How the run ended, or its last attempt; of one that was killed nobody knows."""
        if self.summary:
            return int(ExitCode.OK)
        ends = [one for one in self.events if one["event"] == "attempt_ended"]
        starts = [one for one in self.events if one["event"] == "attempt_started"]
        if not ends or (starts and starts[-1]["attempt"] > ends[-1]["attempt"]):
            return int(ExitCode.SOFTWARE)
        return int(ends[-1]["exit_code"]) or int(ExitCode.SOFTWARE)


def replay(
    run_uri: str,
    *,
    entity: str | None,
    project: str | None,
    run_id: str | None,
    offline: Path | None,
    say: Callable[[str], None],
) -> Replayed:
    """Make a W&B run of a run's ledger; one that is there already is never added to.

    Args:
        run_uri: folder or s3:// prefix of the run, or its ledger.
        entity: whose the W&B run is to be; None: as configured.
        project: likewise.
        run_id: of the W&B run; None: the run's own.
        offline: write files for `wandb sync` into this folder instead of sending anything.
        say: told what could not be sent, and the curves do not depend on.

    Raises:
        ConfigError: no such run, no key, or W&B has a run of that id.
        StorageError: the run cannot be read, or W&B not be reached.
    """
    past = _read(run_uri)
    wanted = {"entity": entity, "project": project}
    given = {key: value for key, value in wanted.items() if value is not None}
    config = past.config.model_copy(update={"wandb": past.config.wandb.model_copy(update=given)})
    if offline is None and not wandb_run.has_key():
        raise ConfigError(
            "W&B: no key to send with",
            mend="set WANDB_API_KEY, or run `wandb login`; or write files with --offline DIR",
        )
    own = past.identity.wandb_id
    # Without the server nobody can tell whether it has that run; `wandb sync` would add to it.
    chosen = run_id or (f"{own}-replay" if offline is not None and past.was_online else own)
    with contextlib.ExitStack() as stack:
        if offline is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s4gan-wandb-")))
        else:
            folder = offline
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError.from_os("write", folder, error) from error
            _refuse_a_second(chosen, folder, own)
        sender = _Sender(past, config, say, is_online=offline is None)
        wandb = sender.start(chosen, folder)
        stack.callback(wandb.teardown)
        last = sender.send()
        return Replayed(chosen, sender.where, sender.rows, last)


def _refuse_a_second(run_id: str, folder: Path, own: str) -> None:
    """Two sets of files of one id: `wandb sync` adds the second to what the first has made.

    Raises:
        ConfigError: the folder has files of that run.
    """
    there = next((folder / "wandb").glob(f"offline-run-*-{glob.escape(run_id)}"), None)
    if there is not None:
        raise ConfigError(
            f"{there}: has been made of W&B run {run_id} already, and `wandb sync` would lay both "
            "over each other",
            mend=f"delete it, or choose another id: --id {_another(run_id, own)}",
        )


def _another(run_id: str, own: str) -> str:
    """An id beside that of a run and one that was asked for."""
    other = f"{own}-replay"
    return other if other != run_id else f"{other}-2"


class _Sender:
    """Sends a past run."""

    def __init__(
        self, past: _Past, config: Config, say: Callable[[str], None], *, is_online: bool
    ) -> None:
        self._past = past
        self._config = config
        self._say = say
        self._is_online = is_online
        self._setting = Setting(config, len(past.facts.classes) or None)
        self._run: Any = None
        self.rows = 0
        self.where = ""

    def start(self, run_id: str, folder: Path) -> Any:
        """Start the W&B run; returns the wandb module, which is to be torn down."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        try:
            self._run = wandb_run.start_run(
                self._config,
                self._past.facts,
                run_id=run_id,
                mode="online" if self._is_online else "offline",
                resume="never",
                is_training=False,
                directory=folder,
                finish_timeout_s=FINISH_TIMEOUT_S,
            )
        except (wandb.Error, ValueError) as error:
            wandb.teardown()
            raise self._explained(error, run_id) from None
        self.where = self._run.url if self._is_online else str(Path(self._run.dir).parent)
        return wandb

    def send(self) -> int:
        """All there is, in order; returns the last iteration.

        Raises:
            StorageError: W&B did not take it.
        """
        past, wandb_run_ = self._past, self._run
        sent: dict[Kind, int] = {}
        try:
            for row in rows_of(past.events, self._setting, past.facts.classes):
                if row.iteration > sent.get(row.kind, NOTHING):
                    wandb_run_.log(row.to_dict())
                    sent[row.kind] = row.iteration
                    self.rows += 1
            last = max(sent.values(), default=0)
            self._show(last)
            if past.exit_code == ExitCode.PREEMPTED:
                wandb_run_.mark_preempting()
            wandb_run_.finish(exit_code=past.exit_code)
        except Exception as error:
            raise StorageError(
                f"W&B: not everything was sent ({reason(error)})",
                mend=f"try again with another --id, as {wandb_run_.id} has been begun",
            ) from None
        return last

    def _show(self, last: int) -> None:
        """What the curves do not depend on."""
        past, target, facts = self._past, self._run, self._past.facts
        best = best_of(past.events)
        if best is not None:
            with self._noncritical("table of classes"):
                wandb_run.note_best(target, best)
                wandb_run.log_class_table(target, best, facts.classes, last)
        with self._noncritical("targets"):
            wandb_run.log_targets(target, target_charts(past.events, self._setting), last)
        findings = findings_of(past.events, self._setting)
        if findings:
            with self._noncritical("table of findings"):
                wandb_run.log_findings(target, findings, last)
        with self._noncritical("pictures"):
            self._send_pictures(last)
        how = self._config.wandb.model_artifact
        if past.summary and best is not None and how != "none":
            with self._noncritical(f"{how} of the model"):
                self._send_model(how)
        if past.summary:
            target.log(Row("end", last, {}).to_dict())

    def _send_pictures(self, last: int) -> None:
        """`predictions.png`: what the model saw is not kept in another form."""
        import wandb

        with tempfile.TemporaryDirectory(prefix="s4gan-") as scratch:
            try:
                path = self._past.store.fetch(run.PREDICTIONS, Path(scratch))
            except ObjectNotFound:
                return
            with Image.open(path) as sheet:
                pictures = [wandb.Image(sheet, caption="image, truth, prediction")]
            self._run.log({"iteration": last, PREDICTIONS: pictures})

    def _send_model(self, how: str) -> None:
        past, best = self._past, self._past.summary["best"]
        store = past.store
        key = _best_key(store, best["iteration"])
        with tempfile.TemporaryDirectory(prefix="s4gan-") as scratch:
            path = store.fetch(key, Path(scratch)) if how == "upload" else None
            model = ModelFile(
                uri=str(store.local_path(key) or f"{store.uri}/{key}"),
                path=path,
                sha256=past.summary["files"][run.BEST_MODEL]["sha256"],
                iteration=best["iteration"],
                val_miou=best["val_miou"],
            )
            artifact = wandb_run.log_model(self._run, model, how, past.facts.data_uri)
            if how == "upload" and self._is_online:
                artifact.wait(timeout=FINISH_TIMEOUT_S)

    @contextlib.contextmanager
    def _noncritical(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._say(f"warning: the {what} could not be sent ({reason(error)})")

    def _explained(self, error: Exception, run_id: str) -> Exception:
        import wandb

        text = str(error)
        mend = f"choose another id: --id {_another(run_id, self._past.identity.wandb_id)}"
        if isinstance(error, wandb.errors.UsageError) and "already exists" in text:
            return ConfigError(
                f"W&B has a run {run_id} already, and its curves would be mixed with these",
                mend=mend,
            )
        if "deleted" in text:
            return ConfigError(
                f"W&B had a run {run_id} that was deleted, and takes no id twice", mend=mend
            )
        if isinstance(error, wandb.errors.AuthenticationError):
            return ConfigError(
                f"W&B does not accept the key ({reason(error)})",
                mend="set WANDB_API_KEY to a valid one, or run `wandb login`",
            )
        if isinstance(error, ValueError | wandb.errors.UsageError):
            return ConfigError(
                f"W&B refuses the run {run_id} ({reason(error)})",
                mend="look at --id, --project and --entity",
            )
        return StorageError(
            f"W&B: not reachable ({reason(error)})",
            mend="try again later, or write files with --offline DIR",
        )


def _read(run_uri: str) -> _Past:
    """The files of a run.

    Raises:
        ConfigError: it is none, or nothing was trained yet.
        StorageError: they cannot be read.
    """
    store = open_run(run_uri)
    events = parse_ledger(_content(store, run.LEDGER), f"{store.uri}/{run.LEDGER}")
    if not any(event["event"] in ("train", "eval") for event in events):
        said, mend = why_nothing(events)
        raise ConfigError(f"{run_uri}: {said}, so there is nothing to show", mend=mend)
    try:
        identity = RunIdentity.from_json(_content(store, run.IDENTITY))
    except (ValueError, TypeError):
        raise StorageError(f"{store.uri}/{run.IDENTITY}: cannot be read") from None
    config = config_from_yaml(
        _content(store, run.CONFIG).decode(errors="replace"), source=f"{store.uri}/{run.CONFIG}"
    )
    return _Past(store, config, identity, events, _summary_of(store))


def _content(store: ObjectStore, key: str) -> bytes:
    """Of a file that every run has.

    Raises:
        ConfigError: it is not there.
    """
    try:
        return store.read(key)
    except ObjectNotFound:
        raise ConfigError(
            f"{store.uri}: there is no {key}", mend="give the folder or s3:// prefix of a run"
        ) from None


def _summary_of(store: ObjectStore) -> Mapping[str, Any]:
    try:
        found = json.loads(store.read(run.SUMMARY))
    except ObjectNotFound:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StorageError(
            f"{store.uri}/{run.SUMMARY}: cannot be read",
            mend="train again with the same command, which writes it anew",
        )
    return found


def _best_key(store: ObjectStore, iteration: int) -> str:
    """Key of a best model's own file, which is never written again as the plain name is.

    Raises:
        ObjectNotFound: there is none of that iteration.
    """
    name = f"/{run.BEST_MODEL}"
    keys = [info.key for info in store.list(run.BEST) if info.key.endswith(name)]
    # A `run.unique_id` begins with the iteration.
    of_it = [key for key in keys if key.removeprefix(run.BEST).startswith(f"{iteration:09d}-")]
    if not of_it:
        raise ObjectNotFound(f"{store.uri}/{run.BEST}: there is no model of iteration {iteration}")
    return of_it[-1]
