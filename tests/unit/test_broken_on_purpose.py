"""The table of the demo broken on purpose."""

from __future__ import annotations

from pathlib import Path

from scripts.broken_on_purpose import WAYS, row, with_masks_of_others


def finding(rule: str, iteration: int, ended: int | None = None) -> dict[str, object]:
    return {"rule": rule, "iteration": iteration, "ended": ended}


def test_a_row_names_what_was_found_and_leaves_out_a_slight_overfit() -> None:
    found = [
        finding("slight_overfit", 400),
        finding("d_stuck", 850),
        finding("fm_rising", 1000, ended=1200),
    ]
    said = row(WAYS[3], {"findings": found, "val_miou": 0.51239})
    assert said == (
        "| `--learning-rate-D 0` | d_stuck (850); fm_rising (1000, over at 1200) | 0.5124 |"
    )
    assert row(WAYS[0], {"findings": found[:1], "val_miou": None}) == "| nothing | nothing | - |"


def test_every_labeled_image_gets_the_mask_of_another_one(tmp_path: Path) -> None:
    masks = tmp_path / "data" / "train" / "masks"
    masks.mkdir(parents=True)
    for index in range(3):
        (masks / f"{index}.png").write_text(str(index))
    with_masks_of_others(tmp_path / "data", tmp_path / "shuffled")
    other = tmp_path / "shuffled" / "train" / "masks"
    assert [(other / f"{index}.png").read_text() for index in range(3)] == ["1", "2", "0"]
    assert (masks / "0.png").read_text() == "0"
