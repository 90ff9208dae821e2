"""The optimised step against one written down plainly: the same curve."""

from __future__ import annotations

import copy

import pytest
import torch

from job.config import Config
from job.data.dataset import IGNORE
from job.models.discriminator import discriminator_input
from job.training.step import train_step
from scripts.plain_step import plain_step, with_plain_optimizers
from tests.unit.training.tiny import new_state, random_batch, tiny_config


def middle_score(config: Config) -> float:
    """What half of a first batch's images exceed."""
    state, batch = new_state(config), random_batch(config)
    assert batch.unlabeled_images is not None
    assert batch.unlabeled_valid is not None
    assert batch.real_masks is not None
    valid = batch.unlabeled_valid & (batch.real_masks != IGNORE)
    with torch.no_grad():
        maps = state.generator(batch.unlabeled_images).softmax(dim=1)
        fake = discriminator_input(maps, batch.unlabeled_images.float(), valid)
        scores, _ = state.discriminator.eval()(fake)
    return float(scores.sigmoid().median())


def test_both_steps_give_the_same_curve() -> None:
    # Small rates: rounding should not grow from step to step. Some images pass the gate.
    changes = {
        "train__iterations": 12,
        "train__learning_rate": 0.001,
        "train__batch_size": 4,
        "loss__st_start": 4,
        "loss__lambda_fm": 1.0,
    }
    config = tiny_config(**changes)
    config = tiny_config(**changes, loss__threshold_st=middle_score(config))
    ours = new_state(config)
    ours.discriminator.dropout.p = 0.0  # what it draws differs, as the passes do
    plain = with_plain_optimizers(copy.deepcopy(ours), config)
    accepted = []
    for iteration in range(1, 13):
        batch = random_batch(config, seed=iteration)
        for state in (ours, plain):
            state.set_learning_rates(iteration, config)
        found = train_step(ours, batch, config, iteration)
        wanted = plain_step(plain, batch, config, iteration)
        for name in ("ce", "fm", "st", "d", "st_count"):
            value = getattr(found, name).item()
            assert value == pytest.approx(getattr(wanted, name), rel=2e-4, abs=1e-6), name
        accepted.append(wanted.st_count)
    assert 0 < sum(accepted) < 4 * 12
    for name, value in plain.generator.state_dict().items():
        torch.testing.assert_close(
            ours.generator.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name
        )
