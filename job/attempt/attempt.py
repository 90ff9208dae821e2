"""What the stages of one attempt share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from job.attempt.record import Record
from job.checkpoint.lease import Lease
from job.config import Config
from job.data.dataset import DatasetInfo
from job.data.splits import SplitItems, Splits
from job.models.files import ModelCard, model_file
from job.models.generator import Architecture
from job.monitor.summary import provenance
from job.run import RunIdentity
from job.storage import ObjectStore
from job.training.state import TrainState


@dataclass(frozen=True)
class Data:
    """A data set that has been looked at."""

    uri: str
    info: DatasetInfo
    splits: Splits
    items: SplitItems


@dataclass(frozen=True)
class Attempt:
    """What the stages of one attempt share."""

    config: Config
    store: ObjectStore
    scratch: Path
    lease: Lease
    identity: RunIdentity
    data: Data
    device: torch.device
    gpus: int
    console: Console
    record: Record

    @property
    def live_folder(self) -> Path:
        """Where files grow while training: the run itself if it is a folder."""
        return self.store.local_path("") or self.scratch

    @property
    def num_images(self) -> dict[str, int]:
        """By what they are for."""
        splits = self.data.splits
        return {
            "labeled": len(splits.labeled),
            "unlabeled": len(splits.unlabeled),
            "validation": len(splits.val),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """Of its data and where its code comes from, for the report."""
        images = {f"{name} images": count for name, count in self.num_images.items()}
        return {"data": self.data.uri, **images, **provenance()}

    @property
    def card(self) -> ModelCard:
        """Travels with every model file."""
        info = self.data.info
        return ModelCard(
            architecture=Architecture.of(self.config.model, info.num_classes),
            classes=info.classes,
            ignore_index=info.ignore_index,
            palette=info.palette,
            image_scale=self.config.data.image_scale,
        )

    def model_file(self, state: TrainState, kind: str, **facts: Any) -> dict[str, Any]:
        """A network as a file of its own.

        Args:
            state: which holds it.
            kind: generator (what predicts, so the teacher if there is one) or discriminator.
            **facts: kept with it.
        """
        return model_file(
            state.predictor if kind == "generator" else state.discriminator,
            self.card,
            kind=kind,
            iteration=state.iteration,
            run_id=self.identity.run_id,
            **facts,
        )
