"""What a run can be gone on with: asked before training, and before submitting costs money."""

from __future__ import annotations

from job import run
from job.config import Config, config_from_yaml, differences
from job.errors import ConfigError, ObjectNotFound
from job.storage import ObjectStore


def refuse_same_place(data: ObjectStore, store: ObjectStore) -> None:
    """Refuse a run among its own data.

    Raises:
        ConfigError: it would become data too.
    """
    data_folder, run_folder = data.local_path(""), store.local_path("")
    if data_folder is not None and run_folder is not None:
        if data_folder.resolve() == run_folder.resolve():
            raise _run_in_data(store.uri, data.uri)
    else:
        refuse_run_in_data(store.uri, data.uri)


def refuse_run_in_data(run_uri: str, data_uri: str) -> None:
    """As `refuse_same_place`, by the names alone: everything below an s3:// prefix is data.

    Raises:
        ConfigError: the run would become data too.
    """
    if f"{run_uri}/".startswith(f"{data_uri}/"):
        raise _run_in_data(run_uri, data_uri)


def _run_in_data(run_uri: str, data_uri: str) -> ConfigError:
    return ConfigError(
        f"--run {run_uri} lies in --data {data_uri}", mend="choose another place for --run"
    )


def config_of_run(store: ObjectStore) -> Config | None:
    """The configuration a run has begun with; None if it has no checkpoint, so nothing to lose."""
    if not has_checkpoints(store):
        return None
    try:
        text = store.read(run.CONFIG).decode(errors="replace")
    except ObjectNotFound:
        return None
    return config_from_yaml(text, source=f"{store.uri}/{run.CONFIG}")


def has_checkpoints(store: ObjectStore) -> bool:
    """Whether a run has anything to lose."""
    return any(not info.key.startswith(run.QUARANTINE) for info in store.list(run.CHECKPOINTS))


def refuse_other_config(
    before: Config | None,
    now: Config,
    store: ObjectStore,
    resume_anyway: bool,
    *,
    of_checkpoint: bool = False,
) -> list[str]:
    """The fields that differ from what the run began with, a line each, if that is wanted.

    Args:
        before: what it began with, by `config.yaml` or by its newest checkpoint.
        now: what is to come.
        store: of the run.
        resume_anyway: whether it is wanted.
        of_checkpoint: where `before` is from; `config.yaml` is known to agree with `now` then.

    Raises:
        ConfigError: some do, and it is not wanted.
    """
    changed = differences(before, now) if before is not None else {}
    lines = [f"{key}: {old!r} in the run, {new!r} now" for key, (old, new) in changed.items()]
    if lines and not resume_anyway:
        if of_checkpoint:
            raise ConfigError(
                f"{store.uri}: the newest checkpoint is of another configuration than "
                f"{run.CONFIG}\n  " + "\n  ".join(lines),
                mend="accept the change (again, if an attempt that had accepted it could not save "
                "any more) with --resume-anyway, or choose another --run",
            )
        raise ConfigError(
            f"{store.uri}: this run began with another configuration\n  " + "\n  ".join(lines),
            mend=f"choose another --run, go on with --config {store.uri}/{run.CONFIG}, or accept "
            "the change with --resume-anyway",
        )
    return lines
