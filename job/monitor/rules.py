"""The monitoring guide's warning signs as data: what is watched, when, and what to do about it.

A rule has a condition on one series of numbers. `health` runs the rules over a run; nothing here
knows where the numbers come from.

Source: S4GAN Training Monitoring Guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from job.config import Config
from job.monitor.conditions import (
    GAP_SLACK,
    RUINED,
    BothLow,
    Condition,
    DropsToZero,
    FallsFromBest,
    Happened,
    Level,
    Median,
    NeverActive,
    Parts,
    Rises,
    Seldom,
    Spike,
    Stagnant,
    Stays,
    Stuck,
    Within,
)
from job.monitor.guide import LOW_FROM, LOW_MIOU, MAX_GAP, MAX_LEAD, NORMAL_GAP, OVERFIT_GAP
from job.monitor.setting import Setting

Severity = Literal["note", "warning", "problem"]


@dataclass(frozen=True)
class Rule:
    """One warning sign."""

    id: str
    guide: str
    """The guide's row that it covers."""
    metric: str
    condition: Condition
    severity: Severity
    says: str
    """A sentence; `{value}` and `{since}` are what was seen."""
    remedies: Sequence[Remedy]
    begins: int = 0
    """First of the guide's iterations that counts."""
    needs: Literal["", "adversarial", "self-training"] = ""
    unless: Sequence[str] = ()
    """Rules that say the same already while they hold."""
    only_self_training: bool = False
    """Only iterations after self-training has begun count."""
    each_line: bool = False
    """Every line of losses counts, also where they are logged more often than the guide's."""
    calm: int = 3
    """Points in a row without the sign that end it."""

    def first_iteration(self, setting: Setting) -> int:
        """Of a run, the first one that counts."""
        first = setting.scale.at(self.begins)
        if self.only_self_training:
            first = max(first, setting.config.loss.warm_up + 1)
        return first

    def applies(self, setting: Setting) -> bool:
        """Whether the run has what it watches."""
        if self.needs == "self-training":
            return setting.self_trains
        return self.needs == "" or setting.is_adversarial

    def advice(self, setting: Setting, iteration: int) -> list[str]:
        """The remedies that are left for a run at an iteration, with its own numbers."""
        words = setting.words()
        return [
            one.text.format(**words)
            for one in self.remedies
            if one.is_left(setting.config)
            and (one.until is None or iteration < setting.scale.at(one.until))
        ]


@dataclass(frozen=True)
class Remedy:
    """Something to try."""

    text: str
    """With the names of `Setting.words` in braces."""
    is_left: Callable[[Config], bool] = lambda config: True
    """False if the run does it already."""
    until: int | None = None
    """The guide's iteration from which on it is of no use."""


RISE_CALM = 10
"""Lines in a row without it that end a rise: medians of neighbours share most of their lines."""
GAP_CALM = 5
"""Evaluations in a row without the sign of a gap that end it: the medians of neighbours share two
of three."""

# ---------------------------------------------------------------- remedies

_LABELS = Remedy("check that the labels are right: s4gan data check, predictions.png")
_LOW_RATE = 2.5e-6
"""A hundredth of the guide's."""
_HALF_LR = Remedy(
    "--learning-rate {half_lr}", lambda config: config.train.learning_rate > _LOW_RATE
)
_MORE_LR = Remedy(
    "--learning-rate 2.5e-4 (it is {lr})", lambda config: config.train.learning_rate <= _LOW_RATE
)
_HALF_LR_D = Remedy(
    "--learning-rate-D {half_lr_D}", lambda config: config.train.learning_rate_D > 0
)
_HALF_BOTH = (_HALF_LR, _HALF_LR_D)
_MORE_LR_D = Remedy("--learning-rate-D {more_lr_D} (it is {lr_D})")
_MIRROR = Remedy("--random-mirror", lambda config: not config.data.random_mirror)
_SCALE = Remedy("--random-scale", lambda config: not config.data.random_scale)
_LOWER_THRESHOLD = Remedy(
    "--threshold-st {less_threshold} (it is {threshold})",
    lambda config: config.loss.threshold_st > 0,
)
_SHARE = Remedy(
    "--set loss.gate_share=0.5, which lets the better half of them pass in any case",
    lambda config: config.loss.gate_share == 0,
)
_HIGHER_THRESHOLD = Remedy(
    "--threshold-st {more_threshold} (it is {threshold})",
    lambda config: config.loss.threshold_st < 0.9,
)
_MORE_DECAY = Remedy("--set train.weight_decay={more_weight_decay}")
_LEARNING_AT_ALL = Remedy("check that the validation mIoU rises at all")
_USE_BEST = Remedy("use best_model.pth, not final_model.pth, and stop earlier")
_BROKEN = Remedy("look for broken images and empty masks: s4gan data check")

_ROLLBACK = Remedy(
    "--set monitor.on_divergence=rollback, which goes back and halves both by itself",
    lambda config: config.monitor.on_divergence != "rollback",
)

# ---------------------------------------------------------------- the rules

RULES: Sequence[Rule] = (
    # -- cross-entropy
    Rule(
        "ce_not_learning",
        "Loss_CE stays > 4.0 after 5000 iterations",
        "loss_ce",
        Median(above=4.0, slack=0.2, lasts=2, no_more_than_chance=True, from_the_first=True),
        "problem",
        "Loss_CE stays at {value:.3f}: the model is not learning",
        (_LABELS, _HALF_LR, _MORE_LR),
        begins=5_000,
        unless=("ce_exploded", "ce_spike", "ce_rising"),
    ),
    Rule(
        "ce_exploded",
        "Problem 2: unstable training, from the beginning",
        "loss_ce",
        Median(above=RUINED, points=3),
        "problem",
        "Loss_CE is {value:.4g}, far above what guessing costs: training diverges",
        (*_HALF_BOTH, _BROKEN),
    ),
    Rule(
        "ce_spike",
        "Sudden spike (1.0 -> 10.0)",
        "loss_ce",
        Spike(),
        "problem",
        "Loss_CE has jumped, and is {value:.3f} now: training is unstable",
        (*_HALF_BOTH, _ROLLBACK, _BROKEN, Remedy("start again from a checkpoint before it")),
        unless=("ce_exploded",),
        each_line=True,
    ),
    Rule(
        "ce_rising",
        "Cross Entropy: should decrease steadily",
        "loss_ce",
        Rises(above=0.5, fine=0.4),  # the guide's target for the end of training is 0.5
        "warning",
        "Loss_CE has risen, and is {value:.3f} now: the model is degrading",
        (*_HALF_BOTH, _BROKEN),
        unless=("ce_spike", "ce_exploded"),
        calm=RISE_CALM,
    ),
    Rule(
        "non_finite",
        "NaN or inf",
        "non_finite",
        Happened(),
        "problem",
        "a loss or a weight is NaN or infinite: training has crashed",
        (*_HALF_BOTH, _ROLLBACK, _BROKEN),
        calm=50,  # a log may go on, and have one in every few lines
    ),
    # -- feature matching
    Rule(
        "fm_zero",
        "Loss_FM stays at 0.000",
        "loss_fm",
        Stays(0.0, 0.0005),
        "warning",
        "Loss_FM stays at 0.000: the discriminator does not work",
        (_MORE_LR_D, Remedy("see whether Loss_D moves")),
        begins=1_000,
        needs="adversarial",
    ),
    Rule(
        "fm_rising",
        "Loss_FM increases continuously",
        "loss_fm",
        # Twice the highest of the guide's own targets, which rise too, and that one itself.
        Rises(above=0.1, fine=0.05),
        "warning",
        "Loss_FM has risen, and is {value:.3f} now: the GAN is unstable",
        _HALF_BOTH,
        needs="adversarial",
        calm=RISE_CALM,
    ),
    # -- self-training
    Rule(
        "st_count_zero",
        "ST_Count always 0",
        "st_count",
        NeverActive(),
        "warning",
        "ST_Count is always 0: no unlabeled image passes the threshold",
        (
            _LOWER_THRESHOLD,
            Remedy("or wait: it may begin by iteration {wait_until}", until=5_000),
            _SHARE,
            _LEARNING_AT_ALL,
        ),
        needs="self-training",
        only_self_training=True,
        calm=1,
    ),
    Rule(
        "st_never_active",
        "Loss_ST always 0.000 after iteration 1000",
        "loss_st",
        NeverActive(),
        "problem",
        "Loss_ST is always 0.000: self-training has never begun, the threshold is too high",
        (_LOWER_THRESHOLD, _SHARE, _LEARNING_AT_ALL),
        begins=5_000,  # up to there the guide advises to wait
        needs="self-training",
        only_self_training=True,
        calm=1,
    ),
    Rule(
        "st_count_dropped",
        "ST_Count suddenly drops to 0",
        "st_count",
        DropsToZero(),
        "problem",
        "ST_Count has dropped to 0: the model is degrading",
        (*_HALF_BOTH, Remedy("go back to a checkpoint before it")),
        needs="self-training",
    ),
    Rule(
        "st_seldom",
        "ST_Count after 5000 iterations: 2-8 of 16",
        "st_count",
        Seldom(),
        "warning",
        "only {value:.1%} of the unlabeled images pass the threshold: they hardly teach anything",
        (_LOWER_THRESHOLD, _SHARE, _LEARNING_AT_ALL),
        begins=5_000,
        needs="self-training",
        only_self_training=True,
        unless=("st_count_zero", "st_never_active", "st_count_dropped"),
    ),
    Rule(
        "st_high",
        "Loss_ST > 5.0",
        "loss_st",
        Median(above=5.0, slack=0.2, lasts=2),
        "warning",
        "Loss_ST is {value:.3f}: the pseudo-labels are poor",
        (_HIGHER_THRESHOLD, _HALF_LR),
        needs="self-training",
        only_self_training=True,
    ),
    # -- discriminator
    Rule(
        "d_stuck",
        "Loss_D stays at 0.693",
        "loss_d",
        Stays(0.693, 0.01),
        "problem",
        "Loss_D stays at {value:.3f}, which is guessing: the discriminator is not training",
        (_MORE_LR_D,),
        begins=1_000,
        needs="adversarial",
    ),
    Rule(
        "d_collapsed",
        "Loss_D drops to 0.0",
        "loss_d",
        Median(below=0.02, slack=1.5),
        "problem",
        "Loss_D has dropped to {value:.3f}: the discriminator is too strong",
        (_HALF_LR_D,),
        needs="adversarial",
    ),
    Rule(
        "d_unstable",
        "Loss_D above 1.0",
        "loss_d",
        Median(above=1.0, slack=0.1, lasts=4),
        "problem",
        "Loss_D is {value:.3f}: training is unstable",
        (_HALF_LR_D, _HALF_LR),
        needs="adversarial",
    ),
    # -- scores
    Rule(
        "score_non_finite",
        "Problem 2: NaN or inf values, of a score",
        "score_non_finite",
        Happened(),
        "problem",
        "training or validation mIoU is NaN or infinite: it is the best of nothing",
        (*_HALF_BOTH, _BROKEN),
    ),
    Rule(
        "train_not_learning",
        "Training mIoU < 0.20 after 5000 iterations",
        "train_miou",
        Median(below=0.20, slack=0.25, points=3, not_rising_by=0.02, from_the_first=True),
        "problem",
        "training mIoU is {value:.4f}: the model is not learning",
        (_LABELS, _HALF_LR, _MORE_LR),
        begins=5_000,
    ),
    Rule(
        "train_degrading",
        "Training mIoU decreases over time",
        "train_miou",
        FallsFromBest(),
        "problem",
        "training mIoU has fallen to {value:.4f}: the model is degrading",
        (*_HALF_BOTH, Remedy("go back to a checkpoint before it")),
    ),
    Rule(
        "val_not_learning",
        "Validation mIoU < 0.20 where 0.40 is expected (iteration 5000)",
        "val_miou",
        Median(below=0.20, slack=0.25, points=3, not_rising_by=0.02, from_the_first=True),
        "problem",
        "validation mIoU is {value:.4f}: nothing that is learned holds for new images",
        (_LABELS, _MIRROR, _SCALE, _HALF_LR, _MORE_LR, Remedy("check the balance of the classes")),
        begins=5_000,
        unless=("train_not_learning",),
    ),
    Rule(
        "val_stuck",
        "Problem 1: validation mIoU stuck at 0.20-0.30 after 10000 iterations",
        "val_miou",
        Stuck(below=0.30, span=5_000),
        "problem",
        "validation mIoU is stuck at {value:.4f}",
        (_LABELS, _MIRROR, _SCALE, _HALF_LR, Remedy("check the balance of the classes")),
        begins=10_000,
        unless=("train_not_learning", "val_not_learning"),
    ),
    Rule(
        "val_stagnant",
        "Problem 1: training mIoU increasing but validation stagnant",
        "val_miou",
        Stagnant(span=15_000),
        "warning",
        "validation mIoU stays at {value:.4f} while training mIoU rises",
        (_LABELS, _MIRROR, _SCALE, _HALF_LR, Remedy("check the balance of the classes")),
        begins=5_000,
        unless=("val_stuck", "val_not_learning", "val_degrading", "val_parting", "overfitting"),
    ),
    Rule(
        "val_degrading",
        "Validation mIoU decreases (overfitting)",
        "val_miou",
        FallsFromBest(),
        "problem",
        "validation mIoU has fallen to {value:.4f}",
        (_USE_BEST, _HALF_LR, _MIRROR, _SCALE),
    ),
    Rule(
        "val_parting",
        "Problem 4: validation mIoU decreasing while training increasing",
        "val_miou",
        Parts(),
        "warning",
        "validation mIoU falls ({value:.4f}) while training mIoU rises: overfitting begins",
        (_USE_BEST, _MORE_DECAY, _MIRROR, _SCALE, _HALF_LR, Remedy("more labeled images")),
        unless=("overfitting", "val_degrading"),
        calm=1,
    ),
    Rule(
        "overfitting",
        "Problem 4: train/val gap > 0.20",
        "gap",
        Median(above=OVERFIT_GAP, points=3, slack=GAP_SLACK / OVERFIT_GAP),
        "problem",
        "training mIoU is {value:.2f} above validation mIoU: overfitting",
        (
            _USE_BEST,
            _MORE_DECAY,
            _MIRROR,
            _SCALE,
            _HALF_LR,
            Remedy("more labeled images"),
            Remedy(
                "--val-split {more_val_split}, if there is no val/ folder",
                lambda config: config.data.val_split < 0.5,
            ),
        ),
        calm=GAP_CALM,
    ),
    Rule(
        "slight_overfit",
        "Table: slight overfit, gap 0.12",
        "gap",
        Within(above=NORMAL_GAP, upto=MAX_GAP),
        "note",
        "training mIoU is {value:.2f} above validation mIoU: a slight overfit, acceptable",
        (_MIRROR, _SCALE, Remedy("more labeled images")),
        unless=("overfitting", "large_gap"),
        calm=GAP_CALM,
    ),
    Rule(
        "large_gap",
        "Gap between Train/Val should stay < 0.15",
        "gap",
        Within(above=MAX_GAP, upto=OVERFIT_GAP),
        "warning",
        "training mIoU is {value:.2f} above validation mIoU, which should stay below 0.15",
        (_MIRROR, _SCALE, _MORE_DECAY, Remedy("more labeled images"), _USE_BEST),
        unless=("overfitting",),
        calm=GAP_CALM,
    ),
    Rule(
        "val_above_train",
        "Validation mIoU should be slightly lower than training mIoU",
        "lead",
        Median(above=MAX_LEAD, points=3, slack=GAP_SLACK / MAX_LEAD),
        "note",
        "validation mIoU is {value:.2f} above training mIoU: the two do not measure the same",
        (
            Remedy("look for validation images among those for training: s4gan data check"),
            Remedy("see whether they are easier, or hold fewer classes"),
            Remedy("the training score is of labeled images only: few of them tell little"),
        ),
        calm=GAP_CALM,
    ),
    Rule(
        "classes_ignored",
        "Problem 1: class imbalance, some classes might be ignored",
        "dead_classes",
        Median(above=0.5, points=3),
        "note",
        "classes with a validation IoU of 0: {value:.0f}; report.html names them",
        (
            Remedy("see how many labeled images hold them: s4gan data check"),
            Remedy("more labeled images that do"),
        ),
        begins=10_000,
        unless=("train_not_learning", "val_not_learning", "val_degrading"),
    ),
    Rule(
        "underfitting",
        "Table: underfitting, both low",
        "val_miou",
        BothLow(below=LOW_MIOU, gap=NORMAL_GAP),
        "warning",
        "training and validation mIoU are both low ({value:.4f}): underfitting",
        (
            Remedy("--set train.iterations={more_iterations}"),
            _LABELS,
            Remedy("a larger model.backbone, or pretrained weights"),
        ),
        begins=LOW_FROM,
        unless=(
            "train_not_learning",
            "val_not_learning",
            "val_stuck",
            "train_degrading",
            "val_degrading",
        ),
    ),
    # -- learning rates
    Rule(
        "lr_not_decaying",
        "Both learning rates decrease smoothly",
        "lr_g",
        Level(),
        "warning",
        "the generator's learning rate does not fall: {value:.2e}",
        (Remedy("--set train.power=0.9"),),
    ),
    Rule(
        "lr_D_not_decaying",
        "Both learning rates decrease smoothly",
        "lr_d",
        Level(),
        "warning",
        "the discriminator's learning rate does not fall: {value:.2e}",
        (Remedy("--set train.power=0.9"),),
        needs="adversarial",
    ),
    # -- memory
    Rule(
        "out_of_memory",
        "Problem 5: CUDA out of memory",
        "out_of_memory",
        Happened(),
        "problem",
        "the GPU's memory is not enough",
        (
            Remedy(
                "--batch-size {half_batch} --set train.accumulate={more_accumulate}",
                lambda config: config.train.batch_size > 1,
            ),
            Remedy("a smaller data.crop_size", lambda config: config.train.batch_size == 1),
            Remedy("close what else uses the GPU"),
        ),
    ),
)
"""In the guide's order."""


def rules_by_id() -> Mapping[str, Rule]:
    """Every rule by its id."""
    return {rule.id: rule for rule in RULES}
