"""The training loop, top to bottom. Saving, evaluating and stopping are decided here, nowhere else.

Knows the protocols of those it reports to, not W&B, not S3.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from job.checkpoint.manager import BestModel
from job.config import Config
from job.data.dataset import DatasetInfo
from job.data.splits import SplitItems
from job.data.streams import iteration_loader
from job.errors import DataError, Diverged, OutOfMemory
from job.events import (
    EvalEvent,
    LossGuard,
    NeverStop,
    NoGuard,
    Notice,
    StopRule,
    Tracker,
    TrainEvent,
)
from job.heartbeat import beat
from job.preemption import StopRequest
from job.training.evaluation import Evaluation, evaluate
from job.training.precision import LEAST_SCALE
from job.training.ranks import Ranks
from job.training.saving import NoSaving, Saving
from job.training.state import TrainState
from job.training.step import StepLosses, train_step

EXAMPLES = 3
"""Validation images that are worst, and as many that are best, to be shown."""
MAX_UNREADABLE_SHARE = 0.01
"""More unreadable training images than this (and more than one) end the run."""


class BestModelWriter(Protocol):
    """Writes the model files of a new best; made by the composition root, which knows the card."""

    def __call__(self, state: TrainState, val_miou: float) -> BestModel:
        """Hand both networks of `state` over for saving, and return where they will be."""


class Show(Protocol):
    """Shows an evaluation to people."""

    def __call__(self, event: EvalEvent, evaluation: Evaluation) -> None:
        """Called after an evaluation of the validation images. Must not take long."""


def show_nobody(event: EvalEvent, evaluation: Evaluation) -> None:
    """Nothing."""


@dataclass(frozen=True)
class Surroundings:
    """What the loop works with, besides the state it changes."""

    config: Config
    items: SplitItems
    info: DatasetInfo
    device: torch.device
    tracker: Tracker
    saving: Saving | NoSaving
    save_best: BestModelWriter
    stop: StopRequest
    ranks: Ranks = field(default_factory=Ranks)
    stop_rule: StopRule = field(default_factory=NeverStop)
    guard: LossGuard = field(default_factory=NoGuard)
    show: Show = show_nobody
    decoded: Path | None = None
    """Where decoded images may be kept."""


def train(state: TrainState, around: Surroundings) -> bool:
    """Train from where `state` stands to the last iteration, or until a stop is asked for.

    The stop rule may make any evaluated iteration the last one.

    On return the state is saved, or the ledger says why there was no time for it. Returns whether
    the run is complete. Several ranks go through it together, and decide together.

    Raises:
        Diverged: a loss is NaN or infinite, and nothing of it was saved; or the guard says so.
        DataError: too many training images cannot be read.
        Fenced: another attempt has taken over.
        StorageError: the state could not be saved at the end.
        RankLost: another rank is gone.
        OutOfMemory: an evaluation does not fit into the GPU's memory.
    """
    config, stop, tracker, ranks = around.config, around.stop, around.tracker, around.ranks
    finite = torch.ones((), dtype=torch.bool, device=around.device)
    speed = _Speed(config, state.iteration)
    saving = around.saving
    evaluated = False
    if state.iteration > 0 and not ranks.any(stop.requested):
        evaluated = _evaluate_if_due(state, around)
    if evaluated:
        saving.save(state)  # the last attempt was stopped before it could evaluate
    if ranks.any(stop.requested):
        durable = not evaluated or saving.before_leaving(state)
        return durable and _is_complete(state, around)
    if _ends_here(state, around):
        saving.save(state, last=True)  # maybe the last attempt was stopped before it could
        return saving.before_leaving(state)

    loader = iteration_loader(
        around.items,
        around.info,
        config,
        first=state.iteration + 1,
        device=around.device,
        rank=ranks.rank,
        world=ranks.world,
        decoded=around.decoded,
    )
    with closing(iter(loader)) as batches:
        for iteration, batch in enumerate(batches, start=state.iteration + 1):
            _count_unreadable(ranks.gather(batch.unreadable), state, around)
            lr_g, lr_d = state.set_learning_rates(iteration, config)
            losses = train_step(state, batch.to(around.device), config, iteration, ranks)
            state.iteration = iteration
            finite &= torch.isfinite(losses.g + losses.d)
            tracker.step_done(iteration)
            beat()

            if iteration % config.train.log_every == 0:
                _raise_if_diverged(finite, state, config)
                rate = speed.since_last(iteration)
                event = _train_event(losses, iteration, lr_g, lr_d, rate)
                if config.model.mlmt_threshold is not None:
                    event = replace(event, loss_mlmt=losses.mlmt.item())
                tracker.train(event)
                around.guard.train(event)
            stopping = ranks.any(stop.requested)
            if _evaluation_due(iteration, config) and not stopping:
                _raise_if_diverged(finite, state, config)
                _evaluate_if_due(state, around)
                if _ends_here(state, around):
                    saving.save(state, last=True)
                    break
                stopping = ranks.any(stop.requested)
            if stopping:
                _raise_if_diverged(finite, state, config)
                break
            if saving.due(iteration, hold=around.guard.suspects):
                _raise_if_diverged(finite, state, config)
                saving.save(state)
        durable = saving.before_leaving(state)
    return durable and _is_complete(state, around)


def _is_complete(state: TrainState, around: Surroundings) -> bool:
    evaluated = state.iteration == state.evaluated_iteration
    is_last = state.iteration == around.config.train.iterations
    return evaluated and (is_last or around.stop_rule.reason != "")


def _ends_here(state: TrainState, around: Surroundings) -> bool:
    """Whether the stop rule makes an evaluated iteration the last; the leader's decides."""
    evaluated = state.iteration == state.evaluated_iteration > 0
    is_last = state.iteration == around.config.train.iterations
    return around.ranks.any(evaluated and not is_last and around.stop_rule.reason != "")


def _evaluation_due(iteration: int, config: Config) -> bool:
    return iteration % config.train.eval_every == 0 or iteration == config.train.iterations


def _evaluate_if_due(state: TrainState, around: Surroundings) -> bool:
    """Evaluate every `train.eval_every` iterations and after the last, unless already done.

    Gives up when a stop is asked for: the evaluation is then owed, and the next attempt begins
    with it. Returns whether it evaluated.
    """
    config, tracker, iteration = around.config, around.tracker, state.iteration
    ranks = around.ranks
    if state.evaluated_iteration == iteration or not _evaluation_due(iteration, config):
        return False
    tracker.evaluation_started(iteration)
    found = []
    for items, keep in ((around.items.train_sample, 0), (around.items.val, EXAMPLES)):
        try:
            one = evaluate(
                state.predictor,
                ranks.mine(items),
                around.info,
                image_scale=config.data.image_scale,
                device=around.device,
                stopped=lambda: ranks.stop_is_near(around.stop.requested),
                keep=keep,
            )
        except torch.OutOfMemoryError:  # smaller batches would not help
            raise OutOfMemory(
                "the GPU's memory is not enough to evaluate whole images",
                mend="take smaller validation images, or start a new run with a smaller network or "
                "--set data.image_scale=0.5",
            ) from None
        if ranks.any(one is None):
            return False
        assert one is not None
        ranks.add_up([one.matrix.counts])
        found.append(one)
    train_matrix, val_matrix = (one.matrix for one in found)
    shown = _of_all_ranks(found[1], around)
    previous = state.best.val_miou if state.best else None
    val_miou = val_matrix.miou()
    event = EvalEvent(
        iteration=iteration,
        train_miou=train_matrix.miou(),
        val_miou=val_miou,
        class_iou=tuple(val_matrix.class_iou()),
        pixel_accuracy=val_matrix.pixel_accuracy(),
        best_miou=val_miou if previous is None else max(previous, val_miou),
        previous_best=previous,
    )
    if event.is_best:
        state.best = around.save_best(state, val_miou)
    state.evaluated_iteration = iteration
    tracker.evaluation(event)
    around.stop_rule.evaluation(event)
    around.show(event, shown)
    return True


def _of_all_ranks(own: Evaluation, around: Surroundings) -> Evaluation:
    """With the images of the others; the matrix has been added up already."""
    if around.ranks.alone:
        return own
    whole = Evaluation(own.matrix, {}, [])
    items = {item.id: item for item in around.items.val}
    for one in around.ranks.gather(own.extremes):
        # By our own path: the data of another machine may lie elsewhere.
        whole.keep(replace(one, item=items[one.item.id]), EXAMPLES)
    whole.scores.update(around.ranks.gather(list(own.scores.items())))
    return whole


def _train_event(
    losses: StepLosses, iteration: int, lr_g: float, lr_d: float, images_per_s: float
) -> TrainEvent:
    """Read the losses back from the device: the one place where the loop waits for it."""
    return TrainEvent(
        iteration=iteration,
        loss_ce=losses.ce.item(),
        loss_fm=losses.fm.item(),
        loss_st=losses.st.item(),
        loss_d=losses.d.item(),
        loss_g=losses.g.item(),
        st_count=int(losses.st_count.item()),
        lr_g=lr_g,
        lr_d=lr_d,
        images_per_s=images_per_s,
    )


def _raise_if_diverged(finite: torch.Tensor, state: TrainState, config: Config) -> None:
    """Called before anything is reported or saved.

    Raises:
        Diverged: a loss so far, or a weight now, is NaN or infinite, or float16 holds no gradient.
    """
    if state.scaler.is_enabled() and state.scaler.get_scale() < LEAST_SCALE:
        raise Diverged(
            f"training diverged: gradients have become too large for float16 at or before "
            f"iteration {state.iteration}; nothing of it was saved",
            mend="start a new run with --set train.precision=fp32; if that diverges too, with half "
            "the learning rates",
        )
    weights = [*state.generator.parameters(), *state.discriminator.parameters()]
    if bool(finite & torch.stack([weight.isfinite().all() for weight in weights]).all()):
        return
    raise Diverged.with_rates(
        f"training diverged: a loss or weight became NaN or infinite at or before iteration "
        f"{state.iteration}; nothing of it was saved",
        config.train.learning_rate,
        config.train.learning_rate_D,
        rolls_back=config.monitor.on_divergence == "rollback",
    )


def _count_unreadable(paths: list[str], state: TrainState, around: Surroundings) -> None:
    """Report each unreadable image once; end the run when they are too many.

    Raises:
        DataError: more than MAX_UNREADABLE_SHARE of the images, and more than one.
    """
    for path in sorted(set(paths) - state.unreadable):
        state.unreadable.add(path)
        around.tracker.notice(
            Notice(
                "unreadable_image",
                f"warning: {path} cannot be decoded; skipped ({len(state.unreadable)} so far)",
                {"iteration": state.iteration + 1, "path": path},
            )
        )
    num_images = len(around.items.labeled) + len(around.items.unlabeled)
    if len(state.unreadable) > max(1, MAX_UNREADABLE_SHARE * num_images):
        raise DataError(
            f"{len(state.unreadable)} of {num_images} training images cannot be decoded, "
            f"among them {', '.join(sorted(state.unreadable)[:3])}",
            mend="replace or remove them, then start again",
        )


class _Speed:
    """Images a second between two log lines, evaluations and saves included."""

    def __init__(self, config: Config, iteration: int) -> None:
        streams = 1 if config.train.supervised_only else 2
        self._images = streams * config.train.batch_size * config.train.accumulate
        self._since_s = time.monotonic()
        self._iteration = iteration

    def since_last(self, iteration: int) -> float:
        """Call once a log line."""
        now_s = time.monotonic()
        images = (iteration - self._iteration) * self._images
        rate = images / max(now_s - self._since_s, 1e-9)
        self._since_s, self._iteration = now_s, iteration
        return rate
