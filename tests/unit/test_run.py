"""Names in a run."""

from __future__ import annotations

from job import run


def test_ids_sort_by_iteration_and_are_never_reused():
    ids = [run.unique_id(500, 1) for _ in range(50)]
    assert len(set(ids)) == 50
    assert run.unique_id(999, 9) < run.unique_id(50_000, 1)
    assert run.unique_id(500, 1) < run.unique_id(500, 2)


def test_identity_round_trip():
    identity = run.RunIdentity.create("2026-01-01T00:00:00+00:00")
    assert run.RunIdentity.from_json(identity.to_json()) == identity
    assert identity.run_id in identity.wandb_id
    assert run.RunIdentity.create("x").run_id != identity.run_id


def test_plain_names_are_the_guides():
    assert run.numbered_checkpoint(5000) == "checkpoint_5000.pth"
    assert (run.BEST_MODEL, run.BEST_MODEL_D) == ("best_model.pth", "best_model_D.pth")
    assert run.LATEST_CHECKPOINT == "latest_checkpoint.pth"
    assert run.FINAL_MODEL == "final_model.pth"
