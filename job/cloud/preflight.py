"""What can be known to be wrong with a submission before it costs anything."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import run
from job.checkpoint.lease import look
from job.checkpoint.resumable import (
    config_of_run,
    refuse_around_others,
    refuse_other_config,
    refuse_run_in_data,
    refuse_same_place,
    refuse_within_another,
)
from job.cloud.aws import client, code_of, explained
from job.cloud.claim import refuse_claimed
from job.cloud.image import COMMIT_TAG
from job.cloud.jobs import active_job
from job.cloud.machines import Needs, gpu_bytes_at_least
from job.cloud.payload import MEMORY_MIB, VCPUS
from job.cloud.stack import Deployed, deployed
from job.cloud.sweep import Point
from job.cloud.waiting import (
    container_of,
    crowded,
    environments,
    needs_of,
    never,
    queue_of,
    too_small,
)
from job.config import DataConfig, check_gpus
from job.data.dataset import FOLDER, MARK, DatasetInfo, load_dataset_info
from job.data.layouts import Found, Has, detect, in_store, known_info, lists_needed
from job.data.lists import refuse_outside
from job.errors import ConfigError, DataError
from job.storage import ObjectStore, open_store
from job.storage.archives import is_archive
from job.storage.packindex import INDEX, PackIndex

MAX_HOURS = 24 * 365
_MEND_DATA = (
    "README.md, Your own images, says what belongs there; "
    "upload: aws s3 sync DATA URI, or s4gan data pack DATA URI"
)
TOGETHER = 16
"""Runs of a sweep that are looked at, or written down, at the same time."""


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

    @property
    def queue(self) -> str:
        """The stack's name for it."""
        return "OnDemandJobQueue" if self.on_demand else "JobQueue"

    @property
    def definition(self) -> str:
        """The stack's name for the job definition."""
        return "JobDefinition" if self.nodes == 1 else "NodesJobDefinition"

    def needs(self, container: Mapping[str, Any]) -> Needs:
        """Of each machine.

        Args:
            container: what the job definition says, for one GPU; empty if it is not known.
        """
        said = needs_of(container)
        return Needs(
            gpus=self.gpus,
            vcpus=(said.vcpus or VCPUS) * self.gpus,
            memory_mib=(said.memory_mib or MEMORY_MIB) * self.gpus,
            nodes=self.nodes,
            gpu_bytes=max(gpu_bytes_at_least(point.config) for point in self.points),
        )


@dataclass(frozen=True)
class Checked:
    """What the checks have found, and submitting needs."""

    place: ObjectStore
    """Of the run, or of all of them."""
    stores: Mapping[str, ObjectStore]
    """Of each run, by its URI."""
    data: ObjectStore
    container: Mapping[str, Any]
    """What the job definition says of it."""
    stack: Deployed
    built_from: Sequence[str]
    """Commits of the image that the job runs; none if `infra push` did not know."""


def check(wish: Wish, say: Callable[[str], None]) -> Checked:
    """Look at everything that a job would stumble over, but for the runs themselves.

    Args:
        wish: what is to be trained.
        say: is told of what is odd, but no obstacle.

    Raises:
        ConfigError: something is wrong that the user can mend.
        DataError: there is no data set where `data_uri` points.
        StorageError: AWS refused, or cannot be reached.
    """
    check_wish(wish)
    stack = deployed(wish.stack)
    parts = stack.outputs
    if wish.definition not in parts:
        raise ConfigError(
            f"the stack {wish.stack} is of an older version", mend="s4gan infra deploy"
        )
    data = open_store(wish.data_uri)
    _check_place(wish, stack)
    container = container_definition(parts[wish.definition])
    _check_queue(parts[wish.queue], wish.needs(container), say)
    built_from = _check_image(parts, container)
    for chosen in {point.config.data: None for point in wish.points}:
        _check_data(data, chosen)
    _check_weights(wish, stack)
    place = open_store(wish.run_uri)
    _check_nesting(wish, place)
    stores = {point.run_uri: _store_of(point, place) for point in wish.points}
    return Checked(place, stores, data, container, stack, built_from)


def free_runs(wish: Wish, checked: Checked, say: Callable[[str], None]) -> list[Point]:
    """Those that can be submitted; of a sweep, that are not finished and have no job.

    Args:
        wish: what is to be trained.
        checked: `check`.
        say: as there.

    Raises:
        ConfigError: there is none; or one has begun with another configuration.
        StorageError: the storage failed, or AWS did not answer.
    """

    def look_at(point: Point) -> tuple[bool, list[str]]:
        said: list[str] = []
        store = checked.stores[point.run_uri]
        return _is_free(point, store, checked.data, wish, said.append), said

    points = []
    with ThreadPoolExecutor(TOGETHER) as pool:
        looked_at = zip(wish.points, pool.map(look_at, wish.points), strict=True)
        for point, (is_free, said) in looked_at:
            for line in said:
                say(line)
            if is_free:
                points.append(point)
    if not points:
        raise ConfigError(f"{wish.run_uri}: every run of the sweep is finished, or has a job")
    _mention_the_network(wish, points, checked.stack, say)
    return points


def _store_of(point: Point, place: ObjectStore) -> ObjectStore:
    """The place itself, or what is below it: runs of a sweep share the connections."""
    path = point.run_uri.removeprefix(place.uri).strip("/")
    return place.below(path) if path else place


def check_wish(wish: Wish) -> None:
    """What is seen without asking anybody.

    Raises:
        ConfigError: the wish contradicts itself, or needs what only this machine has.
    """
    from job.storage.s3 import split_uri  # boto3 takes a while to import

    for flag, uri in (("--data", wish.data_uri), ("--run", wish.run_uri)):
        if not uri.startswith("s3://"):
            raise ConfigError(
                f"{flag} {uri}: a job in the cloud reads and writes S3",
                mend="give s3://BUCKET/..., or train here: s4gan train",
            )
        _, prefix = split_uri(uri)
        if flag == "--run" and not prefix:
            raise ConfigError(
                f"--run {uri}: is a whole bucket",
                mend=f"choose a place below {uri.rstrip('/')}/runs/",
            )
    refuse_run_in_data(wish.run_uri.rstrip("/"), wish.data_uri.rstrip("/"))
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
        for key, value in point.config.data.lists.items():
            if "://" not in value:
                refuse_outside(value, key)
            if not value.startswith("s3://") and ("://" in value or Path(value).is_absolute()):
                raise ConfigError(
                    f"{key} {value}: is a file of this machine, and the job runs on another",
                    mend="put it into the data and give its path there, or give an s3:// address",
                )
    if wish.max_hours is not None and not 1 / 60 <= wish.max_hours <= MAX_HOURS:
        raise ConfigError(f"--max-hours {wish.max_hours}: must be a minute (0.02) to {MAX_HOURS}")


def _check_place(wish: Wish, stack: Deployed) -> None:
    """The job's role may write below runs/ of the stack's bucket, and read what it is given."""
    bucket = stack.outputs["Bucket"]
    if not wish.run_uri.rstrip("/").startswith(f"s3://{bucket}/runs/"):
        raise ConfigError(
            f"--run {wish.run_uri}: jobs of the stack {wish.stack} may not write there",
            mend=f"choose a place below s3://{bucket}/runs/, for example s3://{bucket}/runs/first",
        )
    _check_readable("--data", wish.data_uri, wish, stack)
    for point in wish.points:
        for key, value in point.config.data.lists.items():
            if value.startswith("s3://"):
                _check_readable(key, value, wish, stack)


def _check_readable(name: str, uri: str, wish: Wish, stack: Deployed) -> None:
    """The job's role may read below data/ of the stack's bucket, and other buckets it was told."""
    bucket = stack.outputs["Bucket"]
    data_bucket, _, path = uri.removeprefix("s3://").partition("/")
    if data_bucket == bucket:
        if not path.startswith("data/"):
            raise ConfigError(
                f"{name} {uri}: jobs of the stack {wish.stack} may not read there",
                mend=f"put {'the data' if name == '--data' else 'it'} below s3://{bucket}/data/",
            )
        return
    others = stack.parameters.get("DataBucketArns", "")
    if not any(arn.strip().endswith(f":::{data_bucket}") for arn in others.split(",")):
        arns = ",".join(filter(None, (others, f"arn:aws:s3:::{data_bucket}")))
        raise ConfigError(
            f"{name} {uri}: jobs of the stack {wish.stack} may not read that bucket",
            mend=f"s4gan infra deploy --parameter DataBucketArns={arns}",
        )


def _check_queue(arn: str, needs: Needs, say: Callable[[str], None]) -> None:
    queue = queue_of(arn)
    if queue is None:
        raise ConfigError(f"the queue {arn} is gone", mend="s4gan infra deploy")
    state, status = queue["state"], queue["status"]
    if state != "ENABLED" or status != "VALID":
        why = queue.get("statusReason", "")
        raise ConfigError(
            f"the queue {queue['jobQueueName']} takes no jobs: it is {state}, {status}"
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
    many = crowded(machines, needs)
    if many:
        say(f"warning: the job may wait for ever: {many}")
    small = too_small(machines, needs)
    if small:
        names = ", ".join(machine.name for machine in small)
        say(
            f"warning: the configuration takes {needs.gpu_bytes / 2**30:.0f} GiB of a GPU's memory "
            f"or more, and the stack may give it a machine with less ({names}); a smaller "
            "train.batch_size with more train.accumulate takes less"
        )


def container_definition(arn: str) -> Mapping[str, Any]:
    """What the job definition says of the container.

    Raises:
        ConfigError: it is gone.
    """
    with explained("look at the job definition"):
        found = client("batch").describe_job_definitions(jobDefinitions=[arn])["jobDefinitions"]
    if not found:
        raise ConfigError("the stack's job definition is gone", mend="s4gan infra deploy")
    return container_of(found[0])


def _check_image(parts: Mapping[str, str], definition: Mapping[str, Any]) -> list[str]:
    """That the image is there; the commits that its other tags tell."""
    from botocore.exceptions import ClientError

    image = definition["image"]
    tag = image.rpartition(":")[2]
    with explained("look for the image"):
        try:
            reply = client("ecr").describe_images(
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
    tags = [str(tag) for image in reply["imageDetails"] for tag in image.get("imageTags", ())]
    return [tag.removeprefix(COMMIT_TAG) for tag in tags if tag.startswith(COMMIT_TAG)]


def _check_data(data: ObjectStore, chosen: DataConfig) -> None:
    """What is seen without fetching images; the job itself looks at every file before it trains."""
    if data.stat(INDEX) is not None:
        paths = _paths_of_pack(data)

        def packed(path: str) -> bool:
            return any(one.startswith(path) if path.endswith("/") else one == path for one in paths)

        found = detect(packed, chosen.layout, called=data.uri)
        _check_parts(data.uri, found, packed)
        _check_lists(data.uri, found, chosen, packed)
        return

    has = in_store(data)
    try:
        found = detect(has, chosen.layout, called=data.uri)
    except DataError:
        if not _look_for_archives(data):
            raise
        return
    if found.layout == FOLDER and not has(MARK):
        if not _look_for_archives(data):
            count = sum(1 for _ in data.list(""))
            raise DataError(
                f"{data.uri}: there are {count} objects, but no {MARK}", mend=_MEND_DATA
            )
        return
    if has(MARK):
        _check_info(data, known_info(found.layout))
    _check_parts(data.uri, found, has)
    _check_lists(data.uri, found, chosen, has)


def _look_for_archives(data: ObjectStore) -> bool:
    """Whether there are archives: what is in them only unpacking tells.

    Raises:
        DataError: there is nothing at all.
    """
    keys = [info.key for info in data.list("")]
    if not keys and not is_archive(data.uri):
        raise DataError(f"{data.uri}: there is nothing", mend=_MEND_DATA)
    return is_archive(data.uri) or any(is_archive(key) for key in keys)


def _paths_of_pack(data: ObjectStore) -> list[str]:
    index = PackIndex.from_json(data.read(INDEX), called=f"{data.uri}/{INDEX}")
    sizes = {info.key: info.size for info in data.list("") if info.key != INDEX}
    for shard in index.shards:
        if sizes.get(shard.name) != shard.size:
            raise DataError(
                f"{data.uri}/{shard.name}: is missing, or not of the size that {INDEX} says",
                mend="make the pack again: s4gan data pack",
            )
    return [file.path for file in index.files]


def _check_info(data: ObjectStore, known: DatasetInfo | None) -> None:
    with tempfile.TemporaryDirectory(prefix="s4gan-") as folder:
        path = data.fetch(MARK, Path(folder))
        try:
            load_dataset_info(path, known)
        except DataError as error:
            said = error.message.replace(str(path), f"{data.uri}/{MARK}")
            raise DataError(said, mend=error.mend) from None


def _check_lists(uri: str, found: Found, chosen: DataConfig, has: Has) -> None:
    """That the lists are there which say what is trained on, the layout's and the user's."""
    needed = lists_needed(
        found,
        has,
        train=not (chosen.labeled_list and chosen.unlabeled_list),
        val=chosen.val_list is None,
    )
    for path in needed:
        if not has(path):
            raise DataError(
                f"{uri}/{path}: there is no such object",
                mend="it comes with the data set; or say which images are which: "
                "data.labeled_list, data.unlabeled_list, data.val_list",
            )
    for key, value in chosen.lists.items():
        if value.startswith("s3://"):
            folder, _, name = value.rpartition("/")
            if open_store(folder).stat(name) is None:
                raise ConfigError(f"{key} {value}: there is no such object")
        elif not has(value) and not has(found.base + value):
            raise DataError(
                f"{uri}/{value}: there is no such object, which {key} names",
                mend="a path is relative to the data; upload the file beside them",
            )


def _check_parts(uri: str, found: Found, has: Has) -> None:
    """That there are training images, and masks for some of them."""
    if found.layout != FOLDER:
        return  # that is how the layout was told
    for folder, what in (("train/images/", "no training images"), ("train/masks/", "no masks")):
        if not has(folder):
            raise DataError(
                f"{uri}/{folder}: there are {what}",
                mend="README.md, Your own images, says what belongs where",
            )


def _is_cut_off(wish: Wish, stack: Deployed) -> bool:
    """Machines of a job on several have no public address in the stack's own network."""
    return wish.nodes > 1 and not stack.parameters.get("VpcId")


def _check_weights(wish: Wish, stack: Deployed) -> None:
    """What would have to be downloaded has to be within reach."""
    if not _is_cut_off(wish, stack):
        return
    for point in wish.points:
        if point.config.model.weights != "imagenet":
            continue
        store = open_store(point.run_uri)
        if any(True for _ in store.list(run.WEIGHTS)):
            continue  # which file it must be, the job says before it trains
        raise ConfigError(
            "model.weights imagenet: machines of a job on several have no way to the internet in "
            "the stack's own network",
            mend=f"put torchvision's file below {store.uri}/{run.WEIGHTS}, or the weights below "
            "data/ and say --set model.weights=s3://..., or none; or deploy the stack in a network "
            "of your own (infra/README.md, Several machines)",
        )


def _check_nesting(wish: Wish, place: ObjectStore) -> None:
    """A run and the place of a sweep may not be the same: every command would see only the run."""
    refuse_within_another(place)
    if any(point.run_uri != place.uri for point in wish.points):
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


def _is_free(
    point: Point,
    store: ObjectStore,
    data: ObjectStore,
    wish: Wish,
    say: Callable[[str], None],
) -> bool:
    """Whether a run is to be submitted; of several, those that are not are only told of.

    Raises:
        ConfigError: it has begun with another configuration; or it is the only one, and is
            finished or has a job.
    """
    uri = shlex.quote(store.uri)
    refuse_same_place(data, store)
    refuse_around_others(store)
    before = config_of_run(store)
    changed = refuse_other_config(before, point.config, store, wish.resume_anyway)
    # Without anything that has changed a machine would start, see that all is done, and end.
    stops_otherwise = before is not None and before.stop != point.config.stop
    goes_on = wish.resume_anyway and (changed or before is None or stops_otherwise)
    try:
        if store.uri != wish.run_uri.rstrip("/"):
            refuse_claimed(store)  # the claim that is there otherwise is ours
        if store.stat(run.SUMMARY) is not None and not goes_on:
            raise ConfigError(
                f"{store.uri}: this run is finished",
                mend=f"s4gan pull {uri} DIR; or choose another --run; or give it more "
                "iterations and --resume-anyway",
            )
        record = active_job(store)
        if record is not None:
            raise ConfigError(
                f"{store.uri}: has the job {record.job_id} already",
                mend=f"follow it (s4gan logs {uri} --follow), or end it first (s4gan cancel {uri})",
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


def _mention_the_network(
    wish: Wish, points: Sequence[Point], stack: Deployed, say: Callable[[str], None]
) -> None:
    """What works without, but not as somebody may expect."""
    if _is_cut_off(wish, stack):
        say(
            "note: machines of a job on several have no way to the internet in the stack's own "
            "network, so W&B stays offline; infra/README.md, Several machines, says how to change "
            "that"
        )
    modes = {point.config.wandb.mode for point in points}
    if modes & {"auto", "online"} and not stack.parameters.get("WandbSecretArn"):
        say(
            "note: the stack has no W&B key, so the run is kept offline in W&B's own files; "
            "s4gan infra deploy --parameter WandbSecretArn=... (infra/README.md)"
        )
