"""The loop: what is reported when, what is saved when, and how it stops and goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from job import run
from job.checkpoint.interval import SaveSchedule
from job.checkpoint.lease import acquire
from job.checkpoint.manager import BestModel, CheckpointManager
from job.checkpoint.publisher import Publisher
from job.config import Config
from job.data.dataset import DatasetInfo, Item
from job.data.scan import scan_dataset
from job.data.splits import SplitItems, items_of, make_splits
from job.data.streams import Batch
from job.errors import DataError, Diverged, Fenced, OutOfMemory
from job.events import EvalEvent, Notice, TrainEvent
from job.models.files import ModelCard, load_generator, model_file
from job.models.generator import Architecture
from job.preemption import StopRequest
from job.storage import LocalStore
from job.training.confusion import ConfusionMatrix
from job.training.evaluation import Evaluation
from job.training.loop import Surroundings, train
from job.training.precision import LEAST_SCALE
from job.training.ranks import Ranks
from job.training.saving import Saving
from job.training.state import TrainState
from job.training.step import StepLosses, train_step
from tests.conftest import MakeData
from tests.unit.training.tiny import CPU, new_state, tiny_config

Hook = Callable[[str, Any], None]


@dataclass
class Recorder:
    """A tracker that remembers all it is told, in order, and may do something about it."""

    told: list[tuple[str, Any]] = field(default_factory=list)
    hook: Hook | None = None

    def _hear(self, kind: str, what: Any) -> None:
        self.told.append((kind, what))
        if self.hook is not None:
            self.hook(kind, what)

    def train(self, event: TrainEvent) -> None:
        self._hear("train", event)

    def evaluation_started(self, iteration: int) -> None:
        self._hear("evaluation_started", iteration)

    def evaluation(self, event: EvalEvent) -> None:
        self._hear("evaluation", event)

    def step_done(self, iteration: int) -> None:
        self._hear("step_done", iteration)

    def notice(self, notice: Notice) -> None:
        self._hear("notice", notice)

    def of(self, kind: str) -> list[Any]:
        return [what for told, what in self.told if told == kind]

    def iterations(self, kind: str) -> list[int]:
        return [what if isinstance(what, int) else what.iteration for what in self.of(kind)]


def losses_of(recorder: Recorder) -> list[dict[str, float]]:
    """All of the training events but the speed."""
    events = [dataclasses.asdict(event) for event in recorder.of("train")]
    return [{k: v for k, v in event.items() if k != "images_per_s"} for event in events]


class PromptPublisher(Publisher):
    """Waits for each save, so that no later one is put off: tests know what is saved when."""

    def save(self, state: Any, **options: Any) -> float:
        pause_s = super().save(state, **options)
        self.wait_until_free(60)
        return pause_s


@dataclass
class Attempt:
    """What one attempt left in memory."""

    complete: bool
    state: TrainState
    heard: Recorder
    stop: StopRequest


@dataclass
class Run:
    """A run in a folder; each call is an attempt that takes it over as the real program does."""

    root: Path
    items: SplitItems
    info: DatasetInfo
    config: Config
    bests: list[tuple[int, float]] = field(default_factory=list)
    """Iteration and score of each best model written."""

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.root)

    def __call__(
        self,
        *,
        config: Config | None = None,
        stop_at: tuple[str, int] | None = None,
        prepare: Callable[[TrainState], None] = lambda _state: None,
        hook: Hook | None = None,
        stop: StopRequest | None = None,
    ) -> Attempt:
        """Train from the newest checkpoint.

        Args:
            config: instead of the run's own.
            stop_at: ask for a stop when this ("step_done", "evaluation_started", "evaluation") of
                this iteration is reported.
            prepare: changes the state before training.
            hook: is told everything the tracker is told.
            stop: instead of one of its own.
        """
        config = config or self.config
        stop, heard = stop or StopRequest(), Recorder()

        def hear(kind: str, what: Any) -> None:
            if hook is not None:
                hook(kind, what)
            if stop_at is not None and kind == stop_at[0]:
                iteration = what if isinstance(what, int) else what.iteration
                if iteration == stop_at[1]:
                    stop.request("the test")

        heard.hook = hear
        with self.checkpoints() as manager, publishing(manager, stop) as checkpoints:
            state = new_state(config)
            saved = manager.restore()
            if saved is not None:
                state.load_state_dict(saved)
            prepare(state)
            complete = train(
                state,
                Surroundings(
                    config=config,
                    items=self.items,
                    info=self.info,
                    device=CPU,
                    tracker=heard,
                    saving=Saving(
                        config,
                        checkpoints,
                        SaveSchedule(config.checkpoint.every),
                        stop,
                        heard,
                        state.iteration,
                    ),
                    save_best=self.best_writer(checkpoints),
                    stop=stop,
                ),
            )
        return Attempt(complete, state, heard, stop)

    @contextmanager
    def checkpoints(self) -> Iterator[CheckpointManager]:
        self.root.mkdir(exist_ok=True)
        lease = acquire(self.store, on_lost=lambda: None)
        try:
            yield CheckpointManager(self.store, lease, self.root / ".work")
        finally:
            lease.release()

    def best_writer(self, checkpoints: Publisher) -> Callable[[TrainState, float], BestModel]:
        card = ModelCard(
            architecture=Architecture("tiny", self.info.num_classes),
            classes=self.info.classes,
            ignore_index=self.info.ignore_index,
            palette=self.info.palette,
            image_scale=1.0,
        )

        def write(state: TrainState, val_miou: float) -> BestModel:
            self.bests.append((state.iteration, val_miou))
            content = model_file(state.generator, card, kind="generator", iteration=state.iteration)
            return checkpoints.save_best(
                {run.BEST_MODEL: content}, iteration=state.iteration, val_miou=val_miou
            )

        return write

    def saved(self) -> dict[str, Any] | None:
        """The newest checkpoint."""
        with self.checkpoints() as checkpoints:
            return checkpoints.restore()

    def saved_iterations(self) -> list[int]:
        """Of all checkpoints that are still there, newest first."""
        text, _ = self.store.read_versioned(run.LATEST_POINTER)
        ids = json.loads(text)["checkpoints"] if text else []
        return [int(id_.partition("-")[0]) for id_ in ids]

    def has(self, key: str) -> bool:
        return self.store.stat(key) is not None


@contextmanager
def publishing(manager: CheckpointManager, stop: StopRequest) -> Iterator[Publisher]:
    publisher = PromptPublisher(
        manager,
        tell=lambda _notice: None,
        before_pointer=lambda: None,
        on_fenced=lambda: stop.request("a newer attempt"),
    )
    try:
        yield publisher
    finally:
        publisher.close()


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(make_data: MakeData, tmp_path: Path) -> MakeRun:
    """A run on 8 labeled, 8 unlabeled and 2 validation images; changes are of the configuration."""

    def make(name: str = "run", **changes: Any) -> Run:
        config = tiny_config(**changes)
        root = tmp_path / "data"
        dataset = scan_dataset(root if root.is_dir() else make_data(val=2))
        items = items_of(dataset, make_splits(dataset, config))
        # Two images are enough for the training mIoU, and faster.
        items = dataclasses.replace(items, train_sample=items.train_sample[:2])
        return Run(tmp_path / name, items, dataset.info, config)

    return make


# ---------------------------------------------------------------------------- what is reported


def test_events_come_at_their_iterations_and_the_last_is_evaluated(make_run: MakeRun) -> None:
    attempt = make_run(train__log_every=2, train__eval_every=3)()
    assert attempt.complete
    assert attempt.heard.iterations("step_done") == [1, 2, 3, 4, 5]
    assert attempt.heard.iterations("train") == [2, 4]
    assert attempt.heard.iterations("evaluation_started") == [3, 5]
    assert attempt.heard.iterations("evaluation") == [3, 5]
    assert attempt.heard.of("notice") == []


def test_an_evaluation_that_is_due_at_the_end_anyway_comes_once(make_run: MakeRun) -> None:
    attempt = make_run(train__iterations=4, train__eval_every=2)()
    assert attempt.heard.iterations("evaluation") == [2, 4]


def test_within_an_iteration_losses_come_before_the_evaluation(make_run: MakeRun) -> None:
    attempt = make_run(train__iterations=1)()
    kinds = [kind for kind, _ in attempt.heard.told]
    assert kinds == ["step_done", "train", "evaluation_started", "evaluation"]


def test_a_training_event_says_what_the_iteration_was(make_run: MakeRun) -> None:
    the_run = make_run(
        train__iterations=4,
        train__power=1.0,
        train__accumulate=2,
        loss__st_start=2,
        loss__lambda_fm=0.5,
        loss__lambda_st=0.25,
    )
    events: list[TrainEvent] = the_run().heard.of("train")
    for event in events:
        left = 1 - (event.iteration - 1) / 4
        assert event.lr_g == pytest.approx(0.01 * left)
        assert event.lr_d == pytest.approx(1e-4 * left)
        total = event.loss_ce + 0.5 * event.loss_fm + 0.25 * event.loss_st
        assert event.loss_g == pytest.approx(total, rel=1e-5)
        assert event.st_count == 4
        assert event.images_per_s > 0
        assert event.loss_d == pytest.approx(math.log(2), rel=0.2)
    assert [event.loss_st > 0 for event in events] == [False, False, True, True]


def test_speed_counts_labeled_and_unlabeled_images_since_the_last_event(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 100, 10))
    # In the loop's own module only: the saving threads have clocks of their own.
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("job.training.loop.time", clock)
    attempt = make_run(train__log_every=2, train__accumulate=3)()
    # 2 iterations of 3 batches of 2 + 2 images in 10 s.
    assert [event.images_per_s for event in attempt.heard.of("train")] == [2.4, 2.4]
    alone = make_run("alone", train__log_every=2, train__supervised_only=True)()
    assert [event.images_per_s for event in alone.heard.of("train")] == [0.4, 0.4]


def test_training_on_labels_alone_reports_the_other_losses_as_0(make_run: MakeRun) -> None:
    attempt = make_run(train__supervised_only=True, train__iterations=2)()
    assert attempt.complete
    for event in attempt.heard.of("train"):
        assert event.loss_g == event.loss_ce > 0
        assert (event.loss_fm, event.loss_st, event.loss_d, event.st_count) == (0, 0, 0, 0)


def test_an_evaluation_event_scores_training_sample_and_validation(make_run: MakeRun) -> None:
    attempt = make_run(train__iterations=2)()
    (event,) = attempt.heard.of("evaluation")
    occurring = [iou for iou in event.class_iou if iou is not None]
    assert len(event.class_iou) == 3
    assert event.val_miou == pytest.approx(sum(occurring) / len(occurring))
    assert 0 < event.pixel_accuracy <= 1
    assert 0 < event.train_miou <= 1


def test_training_is_the_same_whoever_draws_from_pythons_and_numpys_generators(
    make_run: MakeRun,
) -> None:
    """They are not saved: boto3 draws from them when a network fails."""
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    one = make_run(train__log_every=1, data__random_mirror=True, data__random_scale=True)()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
    random.seed(2)
    np.random.seed(2)
    other = make_run("other", train__log_every=1, data__random_mirror=True, data__random_scale=True)
    assert losses_of(other().heard) == losses_of(one.heard)


def test_the_loss_falls(make_run: MakeRun) -> None:
    attempt = make_run(train__iterations=25, train__learning_rate=0.02)()
    ce = [event.loss_ce for event in attempt.heard.of("train")]
    assert sum(ce[-5:]) < 0.8 * sum(ce[:5])


# ---------------------------------------------------------------------------- the best model


@pytest.fixture
def scripted_scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Evaluations that find these validation mIoUs, one after the other."""

    def matrix_of(miou: float) -> ConfusionMatrix:
        # Both classes occur equally often and are confused equally often: IoU h / (h + 2 m).
        hits, misses = round(1e6 * 2 * miou), round(1e6 * (1 - miou))
        matrix = ConfusionMatrix(3, CPU)
        matrix.counts[:2, :2] = torch.tensor([[hits, misses], [misses, hits]])
        assert matrix.miou() == pytest.approx(miou)
        return matrix

    def script(scores: list[float]) -> None:
        # Each evaluation asks twice: for the training sample, then for validation.
        answers = iter([answer for score in scores for answer in (0.9, score)])

        def evaluate(_generator: Any, _items: Sequence[Item], *_: Any, **__: Any) -> Any:
            return Evaluation(matrix_of(next(answers)), {}, [])

        monkeypatch.setattr("job.training.loop.evaluate", evaluate)

    return script


def test_only_a_better_score_is_a_new_best(
    make_run: MakeRun, scripted_scores: Callable[[list[float]], None]
) -> None:
    scores = [0.5, 0.25, 0.5, 0.75, 0.7]
    scripted_scores(scores)
    the_run = make_run(train__eval_every=1)
    attempt = the_run()
    events: list[EvalEvent] = attempt.heard.of("evaluation")
    assert [e.val_miou for e in events] == pytest.approx(scores)
    assert [e.train_miou for e in events] == pytest.approx([0.9] * 5)
    assert [e.previous_best for e in events] == pytest.approx([None, 0.5, 0.5, 0.5, 0.75])
    assert [e.best_miou for e in events] == pytest.approx([0.5, 0.5, 0.5, 0.75, 0.75])
    assert [e.is_best for e in events] == [True, False, False, True, False]
    assert [iteration for iteration, _ in the_run.bests] == [1, 4]
    assert attempt.state.best is not None
    assert attempt.state.best.iteration == 4
    assert attempt.state.best.val_miou == pytest.approx(0.75)


def test_the_best_model_is_that_of_its_iteration(
    make_run: MakeRun, scripted_scores: Callable[[list[float]], None]
) -> None:
    scripted_scores([0.5, 0.25])
    the_run = make_run(train__iterations=2, train__eval_every=1, checkpoint__keep_every=1)
    attempt = the_run()
    _, _, facts = load_generator(the_run.root / run.BEST_MODEL, CPU)
    assert facts["iteration"] == 1
    state = torch.load(the_run.root / run.numbered_checkpoint(1), weights_only=True)
    best = torch.load(the_run.root / run.BEST_MODEL, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state["generator"][name]) for name, value in best.items())
    last = attempt.state.generator.state_dict()
    assert any(not torch.equal(value, last[name]) for name, value in best.items())


def test_the_best_score_goes_on_over_a_stop(
    make_run: MakeRun, scripted_scores: Callable[[list[float]], None]
) -> None:
    scripted_scores([0.5, 0.25, 0.6])
    the_run = make_run(train__iterations=3, train__eval_every=1)
    assert not the_run(stop_at=("step_done", 2)).complete
    # The stop at iteration 2 leaves its evaluation to the next attempt.
    events: list[EvalEvent] = the_run().heard.of("evaluation")
    assert [e.iteration for e in events] == [2, 3]
    assert [e.previous_best for e in events] == pytest.approx([0.5, 0.5])
    assert [iteration for iteration, _ in the_run.bests] == [1, 3]


def test_a_score_of_0_is_a_best_if_it_is_the_first(
    make_run: MakeRun, scripted_scores: Callable[[list[float]], None]
) -> None:
    scripted_scores([0.0, 0.0])
    the_run = make_run(train__iterations=2, train__eval_every=1)
    assert the_run().state.best is not None
    assert [iteration for iteration, _ in the_run.bests] == [1]


# ---------------------------------------------------------------------------- what is saved


def test_recovery_checkpoints_come_every_so_often_and_at_the_end(make_run: MakeRun) -> None:
    the_run = make_run(checkpoint__every=2)
    assert the_run().complete
    assert the_run.saved_iterations() == [5, 4, 2]


def test_numbered_checkpoints_stay_at_keep_every_and_at_the_end(make_run: MakeRun) -> None:
    the_run = make_run(checkpoint__every=1, checkpoint__keep_every=2)
    the_run()
    kept = [i for i in range(1, 6) if the_run.has(run.numbered_checkpoint(i))]
    assert kept == [2, 4, 5]
    for iteration in kept:
        path = the_run.root / run.numbered_checkpoint(iteration)
        assert torch.load(path, weights_only=True)["iteration"] == iteration
    latest = torch.load(the_run.root / run.LATEST_CHECKPOINT, weights_only=True)
    assert latest["iteration"] == 5


def test_a_checkpoint_holds_the_evaluation_of_its_iteration(make_run: MakeRun) -> None:
    the_run = make_run(train__eval_every=2, checkpoint__keep_every=2)
    the_run()
    state = torch.load(the_run.root / run.numbered_checkpoint(2), weights_only=True)
    assert state["evaluated_iteration"] == 2
    assert state["best"]["iteration"] == 2


def test_a_finished_run_is_saved_as_finished(make_run: MakeRun) -> None:
    the_run = make_run()
    attempt = the_run()
    saved = the_run.saved()
    assert attempt.complete
    assert saved is not None
    assert saved["iteration"] == saved["evaluated_iteration"] == 5


def test_a_finished_run_has_nothing_left_to_do(make_run: MakeRun) -> None:
    the_run = make_run()
    the_run()
    again = the_run()
    assert again.complete
    assert again.heard.told == []


def test_an_attempt_that_lost_the_run_publishes_nothing(make_run: MakeRun) -> None:
    the_run = make_run(checkpoint__every=1)
    text = b""

    def take_over(kind: str, what: Any) -> None:
        nonlocal text
        if (kind, what) == ("step_done", 3):
            text, _ = the_run.store.read_versioned(run.LATEST_POINTER)
            lease = json.loads(the_run.store.read(run.LEASE))
            taken = {**lease, "attempt": lease["attempt"] + 1}  # as another attempt's acquire would
            the_run.store.write(run.LEASE, json.dumps(taken).encode())

    with pytest.raises(Fenced):
        the_run(hook=take_over)
    assert the_run.store.read(run.LATEST_POINTER) == text
    assert the_run.saved_iterations() == [2, 1]


# ---------------------------------------------------------------------------- stopping, going on


@pytest.mark.parametrize("iteration", [1, 3])
def test_a_stop_saves_at_once_and_is_not_complete(make_run: MakeRun, iteration: int) -> None:
    the_run = make_run()
    attempt = the_run(stop_at=("step_done", iteration))
    assert not attempt.complete
    assert attempt.state.iteration == iteration
    assert attempt.heard.iterations("step_done")[-1] == iteration
    assert the_run.saved_iterations() == [iteration]
    assert not the_run.has(run.numbered_checkpoint(iteration))


def test_an_attempt_goes_on_after_the_last_saved_iteration(make_run: MakeRun) -> None:
    the_run = make_run()
    the_run(stop_at=("step_done", 3))
    attempt = the_run()
    assert attempt.complete
    assert attempt.heard.iterations("step_done") == [4, 5]


MODERN = {
    "data__photometric_distortion": True,
    "data__strong_augment": True,
    "data__cutmix": 0.5,
    "train__ema_decay": 0.9,
    "loss__gate_warmup": 3,
    "model__head": "deeplabv3plus",
}


@pytest.mark.parametrize(
    ("stops", "more"),
    [((1,), {}), ((2,), {}), ((3, 4), {}), ((1, 2, 3, 4, 5), {}), ((1, 2, 4), MODERN)],
)
def test_stops_change_nothing(
    make_run: MakeRun, stops: tuple[int, ...], more: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {
        "train__eval_every": 2,
        "data__random_scale": True,
        "data__random_mirror": True,
        "loss__threshold_st": 0.49,
        "loss__st_start": 2,
        **more,
    }
    straight = make_run("straight", **changes)()
    the_run = make_run("stopped", **changes)
    heard = Recorder()
    for iteration in stops:
        attempt = the_run(stop_at=("step_done", iteration))
        assert not attempt.complete
        heard.told += attempt.heard.told
    attempt = the_run()
    assert attempt.complete
    heard.told += attempt.heard.told

    assert losses_of(heard) == losses_of(straight.heard)
    assert heard.of("evaluation") == straight.heard.of("evaluation")
    for name in ("generator", "discriminator", "predictor"):
        wanted = getattr(straight.state, name).state_dict()
        for key, value in getattr(attempt.state, name).state_dict().items():
            assert torch.equal(value, wanted[key]), key


def test_a_stop_during_an_evaluation_leaves_it_to_the_next_attempt(make_run: MakeRun) -> None:
    the_run = make_run(train__eval_every=2)
    attempt = the_run(stop_at=("evaluation_started", 2))
    assert not attempt.complete
    assert attempt.heard.of("evaluation") == []
    saved = the_run.saved()
    assert saved is not None
    assert (saved["iteration"], saved["evaluated_iteration"]) == (2, 0)

    following = the_run()
    assert following.complete
    kinds = [(kind, what) for kind, what in following.heard.told if isinstance(what, int)]
    assert kinds[0] == ("evaluation_started", 2)
    assert following.heard.iterations("evaluation") == [2, 4, 5]


def test_a_stop_during_the_owed_evaluation_still_leaves_it_to_the_next(make_run: MakeRun) -> None:
    the_run = make_run(train__eval_every=2)
    the_run(stop_at=("evaluation_started", 2))
    again = the_run(stop_at=("evaluation_started", 2))
    assert not again.complete
    assert the_run().heard.iterations("evaluation") == [2, 4, 5]


def test_a_stop_once_an_evaluation_is_finished_keeps_it(make_run: MakeRun) -> None:
    the_run = make_run(train__eval_every=2)
    attempt = the_run(stop_at=("evaluation", 2))
    assert not attempt.complete
    assert the_run().heard.iterations("evaluation") == [4, 5]


def test_a_stop_before_the_last_evaluation_is_not_complete(make_run: MakeRun) -> None:
    the_run = make_run()
    assert not the_run(stop_at=("step_done", 5)).complete
    assert the_run.has(run.numbered_checkpoint(5))
    following = the_run()
    assert following.complete
    assert following.heard.iterations("step_done") == []
    assert following.heard.iterations("evaluation") == [5]


def test_a_stop_once_all_is_done_is_complete(make_run: MakeRun) -> None:
    the_run = make_run()
    assert the_run(stop_at=("evaluation", 5)).complete
    saved = the_run.saved()
    assert saved is not None
    assert saved["evaluated_iteration"] == 5


def test_an_evaluation_made_up_after_the_last_iteration_is_saved(make_run: MakeRun) -> None:
    the_run = make_run()
    the_run(stop_at=("step_done", 5))
    assert the_run().complete
    saved = the_run.saved()
    assert saved is not None
    assert saved["evaluated_iteration"] == 5
    assert saved["best"]["iteration"] == 5


class StopAtRead(StopRequest):
    """Asked for just before the flag is read for the `number`th time."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    @property
    def requested(self) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.request("the test")
        return super().requested


@pytest.mark.parametrize("number", range(1, 15))
def test_whenever_a_stop_comes_what_returns_is_saved(make_run: MakeRun, number: int) -> None:
    the_run = make_run(train__iterations=2, train__eval_every=1)
    attempt = the_run(stop=StopAtRead(number))
    saved = the_run.saved()
    if attempt.state.iteration == 0:
        return  # nothing was done, so there is nothing to save
    assert saved is not None
    assert saved["iteration"] == attempt.state.iteration
    assert saved["evaluated_iteration"] == attempt.state.evaluated_iteration


def test_two_runs_of_one_seed_are_identical(make_run: MakeRun) -> None:
    changes: dict[str, Any] = {"data__random_scale": True, "train__eval_every": 2}
    first = make_run("first", **changes)()
    second = make_run("second", **changes)()
    other = make_run("other", train__seed=1, **changes)()
    assert losses_of(first.heard) == losses_of(second.heard)
    assert first.heard.of("evaluation") == second.heard.of("evaluation")
    weights = second.state.generator.state_dict()
    for name, value in first.state.generator.state_dict().items():
        assert torch.equal(value, weights[name])
    assert losses_of(first.heard) != losses_of(other.heard)


def test_evaluating_and_saving_more_often_changes_no_loss(make_run: MakeRun) -> None:
    rarely = make_run("rarely")()
    often = make_run("often", train__eval_every=1, checkpoint__every=1)()
    assert losses_of(rarely.heard) == losses_of(often.heard)


# ---------------------------------------------------------------------------- divergence


def poison(state: TrainState) -> None:
    with torch.no_grad():
        state.generator.head.branches[0].bias.fill_(math.nan)


def test_a_nan_loss_ends_the_run_and_is_not_saved(make_run: MakeRun) -> None:
    the_run = make_run(checkpoint__every=1)
    with pytest.raises(Diverged, match="iteration 1;") as caught:
        the_run(prepare=poison)
    assert "--learning-rate 0.005" in caught.value.mend
    assert "--learning-rate-D 5e-05" in caught.value.mend
    assert the_run.saved_iterations() == []


def test_a_run_that_diverges_keeps_the_checkpoint_from_before(make_run: MakeRun) -> None:
    the_run = make_run(checkpoint__every=1)
    the_run(stop_at=("step_done", 2))
    with pytest.raises(Diverged):
        the_run(prepare=poison)
    assert the_run.saved_iterations() == [2, 1]


def test_a_huge_learning_rate_diverges(make_run: MakeRun) -> None:
    the_run = make_run(train__learning_rate=1e30, train__iterations=20)
    with pytest.raises(Diverged):
        the_run()
    assert the_run.saved_iterations() == []


def test_divergence_between_two_log_lines_is_found_before_saving(make_run: MakeRun) -> None:
    the_run = make_run(train__log_every=100, checkpoint__every=2)
    with pytest.raises(Diverged, match="at or before iteration 2;"):
        the_run(prepare=poison)
    assert the_run.saved_iterations() == []


def test_divergence_is_found_before_a_stop_saves(make_run: MakeRun) -> None:
    the_run = make_run(train__log_every=100)
    with pytest.raises(Diverged):
        the_run(prepare=poison, stop_at=("step_done", 3))
    assert the_run.saved_iterations() == []


def test_an_evaluation_that_does_not_fit_into_the_memory_is_called_so(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr("job.training.loop.evaluate", too_large)
    with pytest.raises(OutOfMemory, match="not enough to evaluate whole images") as caught:
        make_run(train__eval_every=2)()
    assert "batch" not in caught.value.mend


def test_gradients_too_large_for_float16_are_a_divergence(make_run: MakeRun) -> None:
    def at_its_least(state: TrainState) -> None:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=LEAST_SCALE)

    the_run = make_run(train__precision="fp16", loss__lambda_fm=1e12, checkpoint__every=1)
    with pytest.raises(Diverged, match="too large for float16 at or before iteration 1;") as caught:
        the_run(prepare=at_its_least)
    assert "train.precision=fp32" in caught.value.mend
    assert the_run.saved_iterations() == []


def test_divergence_of_the_discriminator_counts_too(make_run: MakeRun) -> None:
    def poison_d(state: TrainState) -> None:
        with torch.no_grad():
            state.discriminator.classifier.bias.fill_(math.nan)

    with pytest.raises(Diverged):
        make_run()(prepare=poison_d)


@pytest.mark.parametrize("loss", ["g", "d"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_loss_that_is_not_finite_is_remembered_until_it_is_looked_at(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, loss: str, value: float
) -> None:
    def step(
        state: TrainState, batch: Batch, config: Config, iteration: int, ranks: Ranks
    ) -> StepLosses:
        losses = train_step(state, batch, config, iteration, ranks)
        return dataclasses.replace(losses, **{loss: torch.tensor(value)} if iteration == 2 else {})

    monkeypatch.setattr("job.training.loop.train_step", step)
    the_run = make_run(train__log_every=4, train__eval_every=1000)
    with pytest.raises(Diverged, match="at or before iteration 4;"):
        the_run()


def test_divergence_is_found_before_an_evaluation_publishes_a_best_model(
    make_run: MakeRun,
) -> None:
    the_run = make_run(train__log_every=100, train__eval_every=1)
    heard: list[str] = []
    with pytest.raises(Diverged):
        the_run(prepare=poison, hook=lambda kind, _what: heard.append(kind))
    assert the_run.bests == []
    assert not the_run.has(run.BEST_MODEL)
    assert "evaluation" not in heard


# ---------------------------------------------------------------------------- unreadable images


def break_files(items: Sequence[Item]) -> set[str]:
    for item in items:
        item.image.write_bytes(b"no image")
    return {str(item.image) for item in items}


@pytest.mark.parametrize("stream", ["labeled", "unlabeled"])
def test_one_unreadable_image_is_reported_once_and_skipped(make_run: MakeRun, stream: str) -> None:
    the_run = make_run(train__iterations=8)
    (path,) = break_files(getattr(the_run.items, stream)[5:6])
    the_run = dataclasses.replace(
        the_run, items=dataclasses.replace(the_run.items, train_sample=the_run.items.val)
    )
    attempt = the_run()
    assert attempt.complete
    assert attempt.state.unreadable == {path}
    (notice,) = attempt.heard.of("notice")
    assert notice.kind == "unreadable_image"
    assert path in notice.message
    assert notice.fields["path"] == path
    told = [kind for kind, _ in attempt.heard.told]
    steps_before = told[: told.index("notice")].count("step_done")
    assert notice.fields["iteration"] == steps_before + 1


def test_an_unreadable_image_is_not_reported_again_by_the_next_attempt(make_run: MakeRun) -> None:
    the_run = make_run(train__iterations=12)
    (path,) = break_files(the_run.items.unlabeled[:1])
    first = the_run(stop_at=("step_done", 4))  # 8 images of 8 have been drawn
    assert len(first.heard.of("notice")) == 1
    second = the_run()
    assert second.complete
    assert second.heard.of("notice") == []
    assert second.state.unreadable == {path}


def test_more_than_one_unreadable_of_a_few_images_ends_the_run(make_run: MakeRun) -> None:
    the_run = make_run(train__iterations=8)
    paths = break_files(the_run.items.unlabeled[2:4])
    heard: list[str] = []
    with pytest.raises(DataError, match="2 of 16 training images") as caught:
        the_run(hook=lambda kind, _what: heard.append(kind))
    assert all(path in caught.value.message for path in paths)
    assert heard.count("notice") == 2
    assert the_run.saved_iterations() == []


@pytest.mark.parametrize(("count", "bearable"), [(3, True), (4, False)])
def test_of_300_images_three_may_be_unreadable(
    make_run: MakeRun, count: int, bearable: bool
) -> None:
    the_run = make_run(train__iterations=1)
    unlabeled = (the_run.items.unlabeled * 37)[:292]  # and 8 labeled ones
    many = dataclasses.replace(
        the_run, items=dataclasses.replace(the_run.items, unlabeled=unlabeled)
    )

    def seen_before(state: TrainState) -> None:
        state.unreadable.update(["a.png", "b.png", "c.png", "d.png"][:count])

    if bearable:
        assert many(prepare=seen_before).complete
    else:
        with pytest.raises(DataError, match="4 of 300"):
            many(prepare=seen_before)
