"""Submitting a run: all that can be known to be wrong is found before it costs anything."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job import run
from job.checkpoint.lease import look
from job.checkpoint.resumable import config_of_run, refuse_other_config, refuse_same_place
from job.cloud.aws import client, code_of, explained
from job.cloud.jobs import Submission, active_job, submissions
from job.cloud.machines import Needs, cost_guess, gpu_bytes_at_least
from job.cloud.payload import MEMORY_MIB, VCPUS, Job, container_overrides, submit_request
from job.cloud.revision import revision
from job.cloud.stack import outputs, parameter
from job.cloud.sweep import Point, points_file
from job.cloud.waiting import container_of, environments, needs_of, never, too_small
from job.config import Config, check_gpus, config_from_yaml
from job.errors import ConfigError, DataError, PreconditionFailed, StorageError
from job.run import RunIdentity
from job.storage import ABSENT, ObjectStore, open_store
from job.storage.archives import is_archive
from job.storage.packindex import INDEX

DATASET = "dataset.yaml"
MAX_HOURS = 24 * 365


@dataclass(frozen=True)
class Wish:
    """What somebody wants to be trained."""

    points: Sequence[Point]
    """A run, or several."""
    run_uri: str
    """Of the run, or the place of all of them."""
    data_uri: str
    stack: str
    on_demand: bool = False
    nodes: int = 1
    """Machines that train a run together."""
    gpus: int = 1
    """Of each."""
    max_hours: float | None = None
    resume_anyway: bool = False


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
    _check_wish(wish)
    names = (_queue(wish), _definition_name(wish))
    parts = {key: f"<{key} of the stack {wish.stack}>" for key in names}
    request = submit_request(_job(wish, wish.points, parts, "<time>", {}))
    configs = [point.config for point in wish.points]
    return request, cost_guess(configs, _needs(wish, {}))


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
    _check_wish(wish)
    parts = outputs(wish.stack)
    if _definition_name(wish) not in parts:
        raise ConfigError(
            f"the stack {wish.stack} is of an older version", mend="s4gan infra deploy"
        )
    data = open_store(wish.data_uri)
    _check_place(wish, parts)
    definition = _definition(parts[_definition_name(wish)])
    _check_queue(parts[_queue(wish)], _needs(wish, definition), say)
    _check_image(parts, definition)
    _check_data(data)
    _check_nesting(wish)
    points = [point for point in wish.points if _is_free(point, data, wish, say)]
    if not points:
        raise ConfigError(f"{wish.run_uri}: every run of the sweep is finished, or has a job")

    code = revision()
    if code is not None and code.diff_sha256:
        say(
            "warning: this checkout has changes that are not committed; the job's image has its "
            f"own code, and the record says {code}"
        )
    if wish.nodes > 1 and not parameter(wish.stack, "VpcId"):
        say(
            "note: machines of a job on several have no way to the internet in the stack's own "
            "network: W&B stays offline, and model.weights must be none or a file in S3; "
            "infra/README.md, Several machines, says how to change that"
        )
    modes = {point.config.wandb.mode for point in points}
    if modes & {"auto", "online"} and not parameter(wish.stack, "WandbSecretArn"):
        say(
            "note: the stack has no W&B key, so the run is kept offline in W&B's own files; "
            "s4gan infra deploy --parameter WandbSecretArn=... (infra/README.md)"
        )
    now = datetime.datetime.now(datetime.UTC)
    name = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    identities = [_identity(open_store(point.run_uri)) for point in points]
    for point in points:
        open_store(point.run_uri).write(run.job_config(name), point.config.to_yaml().encode())
    if len(points) > 1:
        open_store(wish.run_uri).write(
            run.job_points(name),
            points_file(
                [(point.run_uri, f"{point.run_uri}/{run.job_config(name)}") for point in points]
            ),
        )
    request = submit_request(_job(wish, points, parts, name, definition))
    with explained("submit the job"):
        job_id = client("batch").submit_job(**request)["jobId"]
    submitted = []
    for number, (point, identity) in enumerate(zip(points, identities, strict=True)):
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
        try:
            open_store(point.run_uri).write(run.job_record(name), record.to_json())
        except StorageError as error:
            say(
                f"warning: the job {record.job_id} is submitted, but could not be written down "
                f"({error.message}); s4gan status, logs and cancel will not find it"
            )
        url = _wandb_url(point.config, identity)
        submitted.append(SubmittedRun(point.run_uri, record.job_id, url))
    return submitted


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
    overrides = container_overrides(last.request)
    command = overrides["command"]
    needs = overrides.get("resourceRequirements", ())
    gpus = next((int(need["value"]) for need in needs if need["type"] == "GPU"), 1)
    timeout = last.request.get("timeout")
    text = store.read(run.job_config(last.name)).decode(errors="replace")
    config = config_from_yaml(text, source=f"{store.uri}/{run.job_config(last.name)}")
    wish = Wish(
        points=[Point(store.uri, config)],
        run_uri=store.uri,
        data_uri=command[command.index("--data") + 1],
        stack=last.stack,
        on_demand=last.on_demand if on_demand is None else on_demand,
        nodes=last.request.get("nodeOverrides", {}).get("numNodes", 1),
        gpus=gpus,
        max_hours=timeout["attemptDurationSeconds"] / 3600 if timeout else None,
        resume_anyway="--resume-anyway" in command,
    )
    return submit(wish, say)


def _queue(wish: Wish) -> str:
    return "OnDemandJobQueue" if wish.on_demand else "JobQueue"


def _definition_name(wish: Wish) -> str:
    return "JobDefinition" if wish.nodes == 1 else "NodesJobDefinition"


def _job(
    wish: Wish,
    points: Sequence[Point],
    parts: Mapping[str, str],
    name: str,
    definition: Mapping[str, Any],
) -> Job:
    """As `payload` wants it.

    Args:
        wish: what is to be trained.
        points: those of its runs that need it.
        parts: the stack's.
        name: of the submission.
        definition: the job definition's container; empty if it is not known.
    """
    one = len(points) == 1
    place = points[0].run_uri if one else wish.run_uri.rstrip("/")
    needs = _needs(wish, definition)
    return Job(
        run_uri=place,
        data_uri=wish.data_uri.rstrip("/"),
        config_uri=f"{place}/{run.job_config(name) if one else run.job_points(name)}",
        queue=parts[_queue(wish)],
        definition=parts[_definition_name(wish)],
        stack=wish.stack,
        runs=len(points),
        nodes=wish.nodes,
        gpus=wish.gpus,
        vcpus=needs.vcpus,
        memory_mib=needs.memory_mib,
        max_hours=wish.max_hours,
        resume_anyway=wish.resume_anyway,
        revision=str(revision() or ""),
    )


def _needs(wish: Wish, definition: Mapping[str, Any]) -> Needs:
    """Of each machine; what the job definition says is for one GPU."""
    said = needs_of(definition)
    return Needs(
        gpus=wish.gpus,
        vcpus=(said.vcpus or VCPUS) * wish.gpus,
        memory_mib=(said.memory_mib or MEMORY_MIB) * wish.gpus,
        nodes=wish.nodes,
        gpu_bytes=max(gpu_bytes_at_least(point.config) for point in wish.points),
    )


# ---------------------------------------------------------------- what may be wrong


def _check_wish(wish: Wish) -> None:
    """What is seen without asking anybody."""
    for flag, uri in (("--data", wish.data_uri), ("--run", wish.run_uri)):
        if not uri.startswith("s3://"):
            raise ConfigError(
                f"{flag} {uri}: a job in the cloud reads and writes S3",
                mend="give s3://BUCKET/..., or train here: s4gan train",
            )
    if wish.nodes > 1 and not wish.on_demand:
        raise ConfigError(
            f"--nodes {wish.nodes}: AWS Batch starts several machines for a job on demand only",
            mend="say --on-demand too, or --gpus for several GPUs of one machine",
        )
    if wish.nodes > 1 and len(wish.points) > 1:
        raise ConfigError(
            f"--nodes {wish.nodes}: each run of a sweep is on one machine",
            mend="submit the runs one by one, or leave out --nodes",
        )
    for point in wish.points:
        check_gpus(point.config, wish.gpus, wish.nodes)
        weights = point.config.model.weights
        if weights not in ("imagenet", "none") and not weights.startswith("s3://"):
            raise ConfigError(
                f"model.weights {weights}: is a file of this machine, and the job runs on another",
                mend="put it into the bucket, below data/, and give its s3:// address",
            )
    if wish.max_hours is not None and not 1 / 60 <= wish.max_hours <= MAX_HOURS:
        raise ConfigError(f"--max-hours {wish.max_hours}: must be a minute (0.02) to {MAX_HOURS}")


def _check_place(wish: Wish, parts: Mapping[str, str]) -> None:
    """The job's role may write below runs/ of the stack's bucket, and nowhere else."""
    bucket = parts["Bucket"]
    if not wish.run_uri.rstrip("/").startswith(f"s3://{bucket}/runs/"):
        raise ConfigError(
            f"--run {wish.run_uri}: jobs of the stack {wish.stack} may not write there",
            mend=f"choose a place below s3://{bucket}/runs/, for example s3://{bucket}/runs/first",
        )
    data_bucket, _, path = wish.data_uri.removeprefix("s3://").partition("/")
    if data_bucket == bucket:
        if not path.startswith("data/"):
            raise ConfigError(
                f"--data {wish.data_uri}: jobs of the stack {wish.stack} may not read there",
                mend=f"put the data below s3://{bucket}/data/",
            )
        return
    others = parameter(wish.stack, "DataBucketArns")
    if not any(arn.strip().endswith(f":::{data_bucket}") for arn in others.split(",")):
        arns = ",".join(filter(None, (others, f"arn:aws:s3:::{data_bucket}")))
        raise ConfigError(
            f"--data {wish.data_uri}: jobs of the stack {wish.stack} may not read that bucket",
            mend=f"s4gan infra deploy --parameter DataBucketArns={arns}",
        )


def _check_queue(queue: str, needs: Needs, say: Callable[[str], None]) -> None:
    with explained("look at the queue"):
        found = client("batch").describe_job_queues(jobQueues=[queue])["jobQueues"]
    if not found:
        raise ConfigError(f"the queue {queue} is gone", mend="s4gan infra deploy")
    state, status = found[0]["state"], found[0]["status"]
    if state != "ENABLED" or status != "VALID":
        why = found[0].get("statusReason", "")
        raise ConfigError(
            f"the queue {found[0]['jobQueueName']} takes no jobs: it is {state}, {status}"
            + (f" ({why})" if why else ""),
            mend="enable it in the console, or deploy the stack again: s4gan infra deploy",
        )
    machines = environments(queue)
    obstacle = never(machines, needs)
    if obstacle:
        raise ConfigError(
            f"the job could not run: {obstacle}",
            mend="change the stack (s4gan infra deploy --parameter KEY=VALUE), or ask for less: of "
            "a GPU's memory a smaller train.batch_size with more train.accumulate takes less",
        )
    small = too_small(machines, needs)
    if small:
        names = ", ".join(machine.name for machine in small)
        say(
            f"warning: the configuration takes {needs.gpu_bytes / 2**30:.0f} GiB of a GPU's memory "
            f"or more, and the stack may give it a machine with less ({names}); a smaller "
            "train.batch_size with more train.accumulate takes less"
        )


def _definition(arn: str) -> Mapping[str, Any]:
    """What the job definition says of the container."""
    with explained("look at the job definition"):
        found = client("batch").describe_job_definitions(jobDefinitions=[arn])["jobDefinitions"]
    if not found:
        raise ConfigError("the stack's job definition is gone", mend="s4gan infra deploy")
    return container_of(found[0])


def _check_image(parts: Mapping[str, str], definition: Mapping[str, Any]) -> None:
    from botocore.exceptions import ClientError

    image = definition["image"]
    tag = image.rpartition(":")[2]
    with explained("look for the image"):
        try:
            client("ecr").describe_images(
                repositoryName=parts["RepositoryUri"].partition("/")[2],
                imageIds=[{"imageTag": tag}],
            )
        except ClientError as error:
            if code_of(error) not in ("ImageNotFoundException", "RepositoryNotFoundException"):
                raise
            raise ConfigError(
                f"the image {image} was not pushed yet",
                mend=f"make image, then s4gan infra push --tag {tag}",
            ) from None


def _check_data(data: ObjectStore) -> None:
    """That there is one of the forms a data set has; the job itself looks at every file."""
    if data.stat(DATASET) is not None or data.stat(INDEX) is not None:
        return
    keys = [info.key for info in data.list("")]
    if not any(is_archive(key) for key in keys) and not is_archive(data.uri):
        what = f"there are {len(keys)} objects, but no {DATASET}" if keys else "there is nothing"
        raise DataError(
            f"{data.uri}: {what}",
            mend="README.md, Your own images, says what belongs there; "
            "upload: aws s3 sync DATA URI, or s4gan data pack DATA URI",
        )


def _check_nesting(wish: Wish) -> None:
    """A run and the place of a sweep may not be the same: every command would see only the run."""
    place = open_store(wish.run_uri)
    if len(wish.points) > 1:
        if place.stat(run.IDENTITY) is not None:
            raise ConfigError(
                f"{place.uri}: is a run, and can be no place for several",
                mend=f"choose another --run, for example {place.uri}-sweep",
            )
    elif any(info.key.endswith(run.POINTS) for info in place.list(run.JOBS)):
        raise ConfigError(
            f"{place.uri}: is the place of several runs, and can be no run",
            mend="choose another --run, or say --seeds and --sweep as before",
        )


def _is_free(point: Point, data: ObjectStore, wish: Wish, say: Callable[[str], None]) -> bool:
    """Whether a run is to be submitted; of several, those that are not are only told of.

    Raises:
        ConfigError: it has begun with another configuration; or it is the only one, and is
            finished or has a job.
    """
    store = open_store(point.run_uri)
    refuse_same_place(data, store)
    refuse_other_config(config_of_run(store), point.config, store, wish.resume_anyway)
    try:
        if store.stat(run.SUMMARY) is not None and not wish.resume_anyway:
            raise ConfigError(
                f"{store.uri}: this run is finished",
                mend=f"s4gan pull {store.uri} DIR; or choose another --run; or give it more "
                "iterations and --resume-anyway",
            )
        record = active_job(store)
        if record is not None:
            raise ConfigError(
                f"{store.uri}: the job {record.job_id} is training this run",
                mend=f"follow it (s4gan logs {store.uri} --follow), or end it first "
                f"(s4gan cancel {store.uri})",
            )
    except ConfigError as error:
        if len(wish.points) == 1:
            raise
        say(f"left out: {error.message}")
        return False
    holding = look(store)
    if holding is not None and holding.is_live:
        # Maybe it was killed a moment ago; the job begins in minutes, and will see.
        say(
            f"warning: {store.uri}: process {holding.holder.pid} on "
            f"{holding.holder.machine.partition('/')[0]} was training this run less than a minute "
            "ago; if it goes on, the job ends with exit code 76"
        )
    return True


def _identity(store: ObjectStore) -> RunIdentity:
    """Made now, so that W&B's address is known; if somebody was quicker, theirs."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    identity = RunIdentity.create(now)
    try:
        store.write(run.IDENTITY, identity.to_json(), expected=ABSENT)
    except PreconditionFailed:
        try:
            return RunIdentity.from_json(store.read(run.IDENTITY))
        except (ValueError, TypeError):
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
