"""Submitting runs to AWS Batch: checked, written down, sent."""

from __future__ import annotations

import contextlib
import datetime
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from job import run
from job.cloud.aws import client, explained
from job.cloud.claim import claimed
from job.cloud.jobs import Submission, submissions, unreadable_record
from job.cloud.machines import cost_guess
from job.cloud.payload import Job, Submitted, submit_request
from job.cloud.preflight import TOGETHER, Checked, Wish, check, check_wish, free_runs
from job.cloud.sweep import Point, points_file
from job.config import Config, config_from_yaml
from job.errors import STORAGE_FAILURES, ConfigError, PreconditionFailed, StorageError
from job.revision import Revision, revision
from job.run import RunIdentity
from job.storage import ABSENT, ObjectStore, open_store


@dataclass(frozen=True)
class SubmittedRun:
    """A run that has a job now."""

    run_uri: str
    job_id: str
    wandb_url: str
    """Empty if it cannot be known: the run is offline, or no entity is configured."""


def dry_run(wish: Wish) -> tuple[dict[str, Any], list[str]]:
    """The request as it would be sent, and lines that say what it may cost.

    Without an account, so the stack's own names are left open.

    Raises:
        ConfigError: the wish contradicts itself.
    """
    check_wish(wish)
    names = (wish.queue, wish.definition)
    parts = {key: f"<{key} of the stack {wish.stack}>" for key in names}
    request = submit_request(_job(wish, wish.points, parts, "<time>", {}, revision()))
    configs = [point.config for point in wish.points]
    return request, cost_guess(configs, wish.needs({}))


def submit(wish: Wish, say: Callable[[str], None]) -> list[SubmittedRun]:
    """Check, write down and submit.

    Of several runs those that are finished, or have a job, are left out.

    Args:
        wish: what is to be trained.
        say: is told of what is odd, but no obstacle.

    Raises:
        ConfigError: something is wrong that the user can mend; nothing was submitted.
        DataError: there is no data set where `data_uri` points.
        StorageError: AWS refused, or cannot be reached.
    """
    checked = check(wish, say)
    code = revision()
    if code is not None and code.diff_sha256:
        say(
            "warning: this checkout has changes that are not committed; the job's image has its "
            f"own code, and the record says {code}"
        )
    if code is not None and checked.built_from and code.commit not in checked.built_from:
        say(
            f"warning: the image that the job runs was built from {checked.built_from[0]}, and "
            f"this checkout is at {code.commit}; make image && s4gan infra push brings it there"
        )
    with claimed(checked.place, len(wish.points)):
        points = free_runs(wish, checked, say)
        return _submit(wish, points, checked, code, say)


def _submit(
    wish: Wish,
    points: Sequence[Point],
    checked: Checked,
    code: Revision | None,
    say: Callable[[str], None],
) -> list[SubmittedRun]:
    """Write down, submit, and write down as which job."""
    stores, parts = checked.stores, checked.stack.outputs
    now = datetime.datetime.now(datetime.UTC)
    name = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"

    def prepare(point: Point) -> RunIdentity:
        store = stores[point.run_uri]
        identity = _identity(store)
        store.write(run.job_config(name), point.config.to_yaml().encode())
        return identity

    with ThreadPoolExecutor(TOGETHER) as pool:
        identities = list(pool.map(prepare, points))
    if len(points) > 1:
        checked.place.write(
            run.job_points(name),
            points_file(
                [(point.run_uri, f"{point.run_uri}/{run.job_config(name)}") for point in points]
            ),
        )
    request = submit_request(_job(wish, points, parts, name, checked.container, code))

    def write_down(number: int, point: Point) -> str:
        record = Submission(
            name=name,
            job_id=f"{job_id}:{number}" if len(points) > 1 else job_id,
            submitted_at=now.isoformat(timespec="seconds"),
            stack=wish.stack,
            log_group=parts["LogGroup"],
            revision=str(code or ""),
            on_demand=wish.on_demand,
            request=request,
        )
        stores[point.run_uri].write(run.job_record(name), record.to_json())
        return record.job_id

    # A job that no run knows of could neither be watched nor cancelled.
    with _held_back(say), ThreadPoolExecutor(TOGETHER) as pool:
        with explained("submit the job"):
            job_id = client("batch").submit_job(**request)["jobId"]
        try:
            job_ids = list(pool.map(write_down, range(len(points)), points))
        except STORAGE_FAILURES as error:
            what = f"the job {job_id} is submitted, but could not be written down ({error.message})"
            with explained(f"end it again: {what}"):
                client("batch").terminate_job(jobId=job_id, reason="could not be written down")
            raise StorageError(f"{what}; it was ended again", mend=error.mend) from None
    return [
        SubmittedRun(point.run_uri, one, _wandb_url(point.config, identity))
        for point, one, identity in zip(points, job_ids, identities, strict=True)
    ]


@contextlib.contextmanager
def _held_back(say: Callable[[str], None]) -> Iterator[None]:
    """A signal to stop that comes within the block does not: what it would stop is done by then."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        name = signal.Signals(came[0]).name
        say(f"{name} came when it was submitted already; s4gan cancel ends it")


def resubmit(
    run_uri: str, *, on_demand: bool | None, say: Callable[[str], None]
) -> list[SubmittedRun]:
    """Submit a run as its last job was, with the configuration it has by now.

    Args:
        run_uri: of the run.
        on_demand: whether without spot machines; None: as the last job.
        say: is told of what is odd, but no obstacle.

    Raises:
        ConfigError: it was never submitted, or cannot be submitted now.
    """
    store = open_store(run_uri)
    records = submissions(store)
    if not records:
        raise ConfigError(
            f"{run_uri}: was never submitted",
            mend="s4gan submit; of a sweep, the same submit again takes what is not finished",
        )
    last = records[-1]
    try:
        said = Submitted.from_request(last.request)
    except (LookupError, ValueError, TypeError, AttributeError):
        raise unreadable_record(store, last.name) from None
    text = store.read(run.job_config(last.name)).decode(errors="replace")
    config = config_from_yaml(text, source=f"{store.uri}/{run.job_config(last.name)}")
    wish = Wish(
        points=[Point(store.uri, config)],
        run_uri=store.uri,
        data_uri=said.data_uri,
        stack=last.stack,
        on_demand=last.on_demand if on_demand is None else on_demand,
        nodes=said.nodes,
        gpus=said.gpus,
        max_hours=said.max_hours,
        resume_anyway=said.resume_anyway,
    )
    return submit(wish, say)


def _job(
    wish: Wish,
    points: Sequence[Point],
    parts: Mapping[str, str],
    name: str,
    container: Mapping[str, Any],
    code: Revision | None,
) -> Job:
    """As `payload` wants it.

    Args:
        wish: what is to be trained.
        points: those of its runs that need it.
        parts: the stack's.
        name: of the submission.
        container: what the job definition says of it; empty if it is not known.
        code: that submits.
    """
    one = len(points) == 1
    place = points[0].run_uri if one else wish.run_uri.rstrip("/")
    needs = wish.needs(container)
    return Job(
        run_uri=place,
        data_uri=wish.data_uri.rstrip("/"),
        config_uri=f"{place}/{run.job_config(name) if one else run.job_points(name)}",
        queue=parts[wish.queue],
        definition=parts[wish.definition],
        stack=wish.stack,
        runs=len(points),
        nodes=wish.nodes,
        gpus=wish.gpus,
        vcpus=needs.vcpus,
        memory_mib=needs.memory_mib,
        max_hours=wish.max_hours,
        resume_anyway=wish.resume_anyway,
        revision=str(code or ""),
    )


def _identity(store: ObjectStore) -> RunIdentity:
    """Made now, so that W&B's address is known; if somebody was quicker, theirs."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    identity = RunIdentity.create(now)
    try:
        store.write(run.IDENTITY, identity.to_json(), expected=ABSENT)
    except PreconditionFailed:
        try:
            return RunIdentity.from_json(store.read(run.IDENTITY))
        except ValueError:
            raise StorageError(
                f"{store.uri}/{run.IDENTITY}: cannot be read",
                mend="delete it: the run goes on, as a new run in W&B",
            ) from None
    return identity


def _wandb_url(config: Config, identity: RunIdentity) -> str:
    wandb = config.wandb
    if wandb.entity is None or wandb.mode in ("offline", "disabled"):
        return ""
    return f"https://wandb.ai/{wandb.entity}/{wandb.project}/runs/{identity.wandb_id}"
