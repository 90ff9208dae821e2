"""Ledger lines of runs that never were: healthy ones with noise, and ones with a fault."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from job.config import Config
from job.events import EvalEvent, TrainEvent
from job.monitor.console import evaluation_head, evaluation_lines, train_line
from job.monitor.guide import ITERATIONS, miou_band
from job.monitor.health import Finding, Watch
from job.monitor.setting import Setting

Curve = Callable[[int], float | None]
"""A metric at an iteration of the guide's; None: as in a healthy run."""
CLASSES = 21


def healthy(metric: str, at: float, noise: random.Random) -> float:
    """What the guide hopes for at one of its iterations, as noisy as losses of one batch are."""
    if metric == "loss_ce":
        return (0.35 + 3.4 * math.exp(-at / 4_000)) * noise.lognormvariate(0, 0.2)
    if metric == "loss_fm":
        return (0.004 + 0.02 * at / ITERATIONS) * noise.lognormvariate(0, 0.5)
    if metric == "st_count":
        accepted = min(0.85, 0.05 + 0.8 * at / 20_000)
        return sum(noise.random() < accepted for _ in range(16))
    if metric == "loss_st":
        return (0.3 + 2.0 * math.exp(-at / 8_000)) * noise.lognormvariate(0, 0.3)
    if metric == "loss_d":
        return max(0.1, (0.3 + 0.35 * math.exp(-at / 3_000)) * noise.lognormvariate(0, 0.15))
    low, high = miou_band(metric, at)
    return (low + high) / 2 + noise.gauss(0, 0.01)


def lines(
    config: Config | None = None, *, seed: int = 0, until: int | None = None, **curves: Curve
) -> Iterator[dict[str, Any]]:
    """The lines of a run.

    Args:
        config: of the run.
        seed: of the noise.
        until: the run's last iteration; None: all.
        curves: of metrics that are not healthy, by the guide's iterations.
    """
    config = config or Config()
    noise = random.Random(seed)
    scale = Setting(config, CLASSES).scale
    train = config.train
    for iteration in range(1, (until or train.iterations) + 1):
        logged, evaluated = iteration % train.log_every == 0, iteration % train.eval_every == 0
        if not (logged or evaluated or iteration == train.iterations):
            continue
        at = scale.of_guide(iteration)

        def value(metric: str, at: float = at) -> float:
            said = curves[metric](round(at)) if metric in curves else None
            return healthy(metric, at, noise) if said is None else said

        head = {"iteration": iteration, "attempt": 1, "time": float(iteration)}
        if logged:
            count = value("st_count") * scale.max_st_count / 16
            rest = (1 - iteration / train.iterations) ** train.power
            yield {
                "event": "train",
                **head,
                "loss_ce": value("loss_ce"),
                "loss_fm": value("loss_fm"),
                "loss_st": value("loss_st") if iteration > scale.st_start and count else 0.0,
                "loss_d": value("loss_d"),
                "st_count": round(count),
                "lr_g": value("lr_g") if "lr_g" in curves else train.learning_rate * rest,
                "lr_d": value("lr_d") if "lr_d" in curves else train.learning_rate_D * rest,
                "images_per_s": 100.0,
            }
        if evaluated or iteration == train.iterations:
            dead = (curves["dead_classes"](round(at)) or 0) if "dead_classes" in curves else 0
            yield {
                "event": "eval",
                **head,
                "train_miou": value("train_miou"),
                "val_miou": value("val_miou"),
                "class_iou": [0.0 if number < dead else 0.5 for number in range(CLASSES)],
            }


def findings(config: Config | None = None, **options: Any) -> list[Finding]:
    """What the rules find in such a run."""
    watch = Watch(Setting(config or Config(), CLASSES))
    for line in lines(config, **options):
        watch.observe(line)
    return watch.findings


def console(events: Iterable[Any], iterations: int, prefix: str = "") -> str:
    """What training prints, by the printing code itself."""
    printed = ["data: 80 labeled, 560 unlabeled", "device: cpu (no GPU found)"]
    for event in events:
        if event["event"] == "train":
            facts = {key: event[key] for key in event.keys() - {"event", "attempt", "time"}}
            printed.append(train_line(TrainEvent(loss_g=0.0, **facts), iterations))
        else:
            scores = EvalEvent(
                event["iteration"],
                event["train_miou"],
                event["val_miou"],
                (),
                pixel_accuracy=0.9,
                best_miou=event["val_miou"],
                previous_best=None,
            )
            printed += [evaluation_head(event["iteration"]), evaluation_lines(scores)]
    text = "\n".join(printed)
    return "\n".join(prefix + line for line in text.split("\n")) + "\n"
