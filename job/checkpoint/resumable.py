"""What a run can be gone on with: asked before training, and before submitting costs money."""

from __future__ import annotations

from collections.abc import Iterator

from job import run
from job.config import Config, config_from_yaml, differences
from job.errors import AccessDenied, ConfigError, ObjectNotFound
from job.storage import ObjectStore, is_same_place, open_store

_IMAGES = ("train", "val", "JPEGImages", "leftImg8bit")
"""Folders of a data set where everything that is an image counts. A run beside them is no harm."""


def refuse_same_place(data: ObjectStore, store: ObjectStore) -> None:
    """Refuse a run among its own data.

    Raises:
        ConfigError: it would become data too.
    """
    if is_same_place(data, store):
        raise _run_in_data(store.uri, data.uri)
    folder, place = data.local_path(""), store.local_path("")
    if folder is None or place is None:
        refuse_run_in_data(store.uri, data.uri)
        return
    images = [folder.resolve() / part for part in _IMAGES]
    if any(place.resolve().is_relative_to(one) for one in images):
        raise _run_in_data(store.uri, data.uri)  # its pictures would be images next time


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


def refuse_nested(store: ObjectStore) -> None:
    """Refuse a new run within another, or around one: every command would see only the outer one.

    Raises:
        ConfigError: it is.
    """
    refuse_around_others(store)
    refuse_within_another(store)


def refuse_around_others(store: ObjectStore) -> None:
    """As `refuse_nested`, for what is below a place.

    Raises:
        ConfigError: there are other runs.
    """
    if store.stat(run.IDENTITY) is not None:
        return  # it was there before
    tail = f"/{run.IDENTITY}"
    inner = next((info.key for info in store.list("") if info.key.endswith(tail)), None)
    if inner is not None:
        raise ConfigError(
            f"{store.uri}: is the place of other runs, as {inner.removesuffix(tail)}",
            mend="give the run a place of its own: choose another --run",
        )


def refuse_within_another(store: ObjectStore) -> None:
    """As `refuse_nested`, for what a place is below of.

    Raises:
        ConfigError: it lies in another run.
    """
    if store.stat(run.IDENTITY) is not None:
        return  # it was there before
    for outer in around(store):
        if _is_run(outer):
            raise ConfigError(
                f"{store.uri}: lies in the run {outer.uri}",
                mend="choose another --run, beside that one",
            )


def around(store: ObjectStore) -> Iterator[ObjectStore]:
    """The places that a place lies in, innermost first."""
    folder = store.local_path("")
    if folder is not None:
        for parent in folder.resolve().parents:
            yield open_store(str(parent))
        return
    bucket, _, path = store.uri.removeprefix("s3://").partition("/")
    while "/" in path:
        path = path.rpartition("/")[0]
        yield open_store(f"s3://{bucket}/{path}")


def _is_run(store: ObjectStore) -> bool:
    try:
        run.RunIdentity.from_json(store.read(run.IDENTITY))
    except (ObjectNotFound, AccessDenied, ValueError):  # another program may have a file so named
        return False
    return True


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
