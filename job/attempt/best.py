"""The best model, verified and shown: its confusion matrix, its worst and best images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from job import run
from job.attempt.attempt import Attempt
from job.checkpoint.manager import BestModel, CheckpointManager
from job.data.images import read_labels, read_rgb
from job.inference import examples
from job.models.files import load_generator
from job.models.generator import Generator
from job.monitor.pictures import Example, prediction_sheet
from job.monitor.report import BestEvaluation, best_evaluation_json, shown_of
from job.monitor.wandb_run import ModelFile
from job.monitor.wandb_tracker import WandbTracker
from job.training.evaluation import Evaluation, Predicted, evaluate
from job.training.loop import EXAMPLES
from job.training.state import TrainState

WANDB_IMAGES = 6
"""Validation images in W&B: the same each time, so that one sees them change."""


def show_best(
    attempt: Attempt, manager: CheckpointManager, state: TrainState, wandb: WandbTracker
) -> BestEvaluation:
    """Verify the best model and leave its pictures, in the run and in W&B, while that is open."""
    store = attempt.store
    assert state.best is not None  # a complete run has evaluated at least once
    path = manager.verify_best(state.best)
    generator, card, _ = load_generator(path, attempt.device)
    found = _of_best_model(attempt, state.best, generator)
    key = run.best_file(state.best.id, run.BEST_MODEL)
    model = ModelFile(
        uri=str(store.local_path(key) or f"{store.uri}/{key}"),
        path=path,
        sha256=manager.best_files(state.best)[run.BEST_MODEL].sha256,
        iteration=state.best.iteration,
        val_miou=state.best.val_miou,
    )
    shown = examples_of(attempt, generator, card.image_scale) if wandb.is_on else []
    wandb.ended(state.iteration, shown, model)
    return found


def _of_best_model(attempt: Attempt, best: BestModel, generator: Generator) -> BestEvaluation:
    """As it was written when the model was found; made again if a kill came before that."""
    before, pictures = shown_of(attempt.store)
    if before is not None and before.iteration == best.iteration and pictures:
        return before
    evaluation = evaluate(
        generator,
        attempt.data.items.val,
        attempt.data.info,
        image_scale=attempt.card.image_scale,
        device=attempt.device,
        keep=EXAMPLES,
    )
    assert evaluation is not None
    found = best_evaluation(attempt, best.iteration, evaluation)
    write_best_evaluation(attempt, found, evaluation.extremes)
    return found


def best_evaluation(attempt: Attempt, iteration: int, evaluation: Evaluation) -> BestEvaluation:
    """An evaluation as the run keeps it of its best model."""
    counts = evaluation.matrix.counts.cpu().tolist()
    return BestEvaluation(
        iteration=iteration,
        classes=attempt.data.info.classes,
        confusion=tuple(tuple(row) for row in counts),
        images=evaluation.scores,
    )


def write_best_evaluation(
    attempt: Attempt, found: BestEvaluation, shown: Sequence[Predicted]
) -> None:
    """Leave it in the run, with pictures of the worst and the best images."""
    attempt.lease.raise_if_lost()
    attempt.store.write(run.PREDICTIONS, _prediction_sheet(attempt, shown))
    attempt.store.write(run.BEST_EVALUATION, best_evaluation_json(found))


def examples_of(attempt: Attempt, generator: Generator, image_scale: float) -> list[Example]:
    """A few validation images as a model sees them: the same each time, spread over the set."""
    val = attempt.data.items.val
    step = max(1, len(val) // WANDB_IMAGES)
    return examples(
        generator,
        val[::step][:WANDB_IMAGES],
        attempt.data.info,
        image_scale=image_scale,
        device=attempt.device,
    )


def _prediction_sheet(attempt: Attempt, shown: Sequence[Predicted]) -> bytes:
    """Validation images as the best model sees them, the worst first."""
    info, card = attempt.data.info, attempt.card
    worst = len(shown) - len(shown) // 2
    examples = []
    for number, one in enumerate(shown):
        assert one.item.mask is not None
        which = "worst" if number < worst else "best"
        examples.append(
            Example(
                one.item.id,
                np.asarray(read_rgb(one.item.image)),
                read_labels(one.item.mask, info),
                one.prediction,
                caption=f"{which}: {one.item.id}, mIoU {one.miou:.4f}",
            )
        )
    sheet = io.BytesIO()
    prediction_sheet(examples, card.palette, card.classes).save(sheet, format="PNG")
    return sheet.getvalue()
