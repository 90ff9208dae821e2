"""The calls to the wandb package: starting a run, and what else than numbers is sent to it.

Those who call it decide what a failure means; nothing here catches one.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from job import revision
from job.config import Config
from job.data.dataset import IGNORE
from job.monitor.health import Finding
from job.monitor.pictures import Example
from job.monitor.wandb_rows import (
    CLASS_TABLE,
    FINDINGS_TABLE,
    KINDS,
    PREDICTIONS,
    TargetChart,
    class_scores,
    sent_key,
)
from job.run import BEST_MODEL

INIT_TIMEOUT_S = 30
"""wandb adds about 10 s of its own."""
FLUSH_INTERVAL_S = 1
"""wandb's own 15 s would lose that much of an offline run at a kill."""
PICTURE_PX = 512
"""Longest side of a picture that is sent: six of them are then some hundred kB."""


@dataclass(frozen=True)
class RunFacts:
    """What a W&B run says of its origin, beside the configuration."""

    uri: str = ""
    """Of the run."""
    data_uri: str = ""
    classes: Sequence[str] = ()
    """Names in index order."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, git revision and device; nothing of the environment's variables."""


@dataclass(frozen=True)
class ModelFile:
    """The best model, for an artifact."""

    uri: str
    """Where the run keeps it; s3:// or a path."""
    path: Path | None
    """A local file of it; only to upload it."""
    sha256: str
    iteration: int
    val_miou: float


def has_key() -> bool:
    """Whether wandb would find a key: in the environment, or in the netrc file of `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        hosts = netrc.netrc(path).hosts
    except (netrc.NetrcParseError, OSError, ValueError, RuntimeError):
        return False  # no such file, not one we can read, or a user without a home
    import wandb

    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    # Logins of wandb before 0.31 are kept under its former server, and still used.
    return bool({urlparse(server).netloc, "api.wandb.ai"} & set(hosts))


def start_run(
    config: Config,
    facts: RunFacts,
    *,
    run_id: str,
    mode: Literal["online", "offline"],
    resume: Literal["allow", "never"],
    directory: Path,
    finish_timeout_s: float,
    is_training: bool = True,
) -> Any:
    """Start or resume a W&B run, with everything drawn over the iteration.

    Args:
        config: the run's; says project, entity and tags.
        facts: of the run.
        run_id: of the W&B run.
        mode: whether to talk to a server, or to write files.
        resume: "allow" goes on with a run that is there; "never" refuses to.
        directory: for wandb's files.
        finish_timeout_s: how long `finish` waits for what is still on its way.
        is_training: whether it is this program that trains, and this machine.

    Raises:
        wandb.Error: the server is not there, or does not want it.
    """
    import wandb

    settings = config.wandb
    origin = {"provenance": dict(facts.provenance)} if facts.provenance else {}
    places = {"run_uri": facts.uri, "data_uri": facts.data_uri}
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        tags=list(settings.tags),
        id=run_id,
        resume=resume,
        mode=mode,
        dir=str(directory),
        config=config.to_dict() | origin | {key: uri for key, uri in places.items() if uri},
        settings=wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=finish_timeout_s,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
            console="off",
            silent=True,
            **_git_settings(facts, is_training),
        ),
    )
    run.define_metric("iteration", hidden=True)
    run.define_metric("*", step_metric="iteration")
    run.define_metric("Metrics/Validation mIoU", step_metric="iteration", summary="max")
    for kind in KINDS:
        run.define_metric(sent_key(kind), hidden=True)
    return run


def _git_settings(facts: RunFacts, is_training: bool) -> dict[str, Any]:
    """What trained; wandb would say of which commit the folder is that it is started in.

    In an image there is no checkout, and the image says what it was built from.
    """
    root = revision.checkout()
    if is_training and root is not None and not os.environ.get("S4GAN_GIT_SHA"):
        return {"git_root": str(root)}
    commit = facts.provenance.get("git")
    return {"git_commit": str(commit)} if commit else {"disable_git": True}


def log_pictures(
    run: Any, examples: Sequence[Example], classes: Sequence[str], iteration: int
) -> None:
    """Validation images with the masks of truth and prediction, which W&B can switch on and off.

    Args:
        run: the W&B run.
        examples: what to show.
        classes: names in index order.
        iteration: at which it was predicted so.
    """
    import wandb

    labels = {**dict(enumerate(classes)), IGNORE: "ignored"}
    pictures = []
    for example in examples:
        small = shrunk(example)
        masks = {
            name: {"mask_data": mask, "class_labels": labels}
            for name, mask in (("prediction", small.prediction), ("truth", small.truth))
        }
        pictures.append(
            wandb.Image(small.image, caption=example.name, masks=masks, file_type="jpg")
        )
    run.log({"iteration": iteration, PREDICTIONS: pictures})


def shrunk(example: Example) -> Example:
    """No side longer than `PICTURE_PX`; the masks keep their class numbers."""
    height, width = example.truth.shape
    factor = min(1.0, PICTURE_PX / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))

    def resized(pixels: Any, resampling: Image.Resampling) -> Any:
        return np.asarray(Image.fromarray(pixels).resize(size, resampling))

    return Example(
        example.name,
        resized(example.image, Image.Resampling.BICUBIC),
        resized(example.truth, Image.Resampling.NEAREST),
        resized(example.prediction, Image.Resampling.NEAREST),
    )


def log_class_table(run: Any, best: Mapping[str, Any], classes: Sequence[str], at: int) -> None:
    """The IoU of each class at the best evaluation, as a table.

    Args:
        run: the W&B run.
        best: the "eval" line.
        classes: names in index order.
        at: iteration at which it is shown.
    """
    import wandb

    data = [[name, iou, best["iteration"]] for name, iou in class_scores(best, classes)]
    table = wandb.Table(columns=["class", "IoU", "iteration"], data=data)
    run.log({"iteration": at, CLASS_TABLE: table})


def log_targets(run: Any, charts: Sequence[TargetChart], at: int) -> None:
    """The guide's targets beside what was measured, a chart for each metric."""
    import wandb

    for chart in charts:
        series = (chart.measured, chart.low, chart.high)
        plot = wandb.plot.line_series(
            xs=[[iteration for iteration, _ in points] for points in series],
            ys=[[value for _, value in points] for points in series],
            keys=["this run", "guide, low", "guide, high"],
            title=chart.name.partition("/")[2],
            xname="iteration",
        )
        run.log({"iteration": at, chart.name: plot})


def log_findings(run: Any, findings: Sequence[Finding], at: int) -> None:
    """What the rules have found, as a table."""
    import wandb

    columns: list[str | int] = ["rule", "severity", "since", "until", "message", "to try"]
    data = [
        [one.rule, one.severity, one.since, one.ended, one.message, " | ".join(one.remedies)]
        for one in findings
    ]
    run.log({"iteration": at, FINDINGS_TABLE: wandb.Table(columns=columns, data=data)})


def log_model(run: Any, model: ModelFile, how: str, data_uri: str) -> Any:
    """The best model as an artifact of the W&B run; returns it, not yet there.

    Args:
        run: the W&B run.
        model: the file.
        how: "reference" sends where it is; "upload" sends the file.
        data_uri: what it was trained on.
    """
    import wandb

    artifact = wandb.Artifact(
        f"{run.id}-best_model",
        type="model",
        metadata={
            "val_miou": model.val_miou,
            "iteration": model.iteration,
            "sha256": model.sha256,
            "uri": model.uri,
            "data_uri": data_uri,
        },
    )
    if how == "upload":
        # It does not change: a copy in wandb's own folder would only take room.
        artifact.add_file(str(model.path), name=BEST_MODEL, policy="immutable", skip_cache=True)
    elif model.uri.startswith("s3://"):
        # To check it wandb would ask S3, which it may not be allowed to; sha256 is above.
        artifact.add_reference(model.uri, name=BEST_MODEL, checksum=False)
    else:
        artifact.add_reference(Path(model.uri).resolve().as_uri(), name=BEST_MODEL)
    return run.log_artifact(artifact, aliases=["best"])


def note_best(run: Any, best: Mapping[str, Any]) -> None:
    """Which evaluation was the best, for the table of runs."""
    run.summary["best/val_miou"] = best["val_miou"]
    run.summary["best/iteration"] = best["iteration"]
