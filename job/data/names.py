"""What commands call the settings that choose images, so that advice names what they take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Of one command."""

    layout: str
    """What stands before the name of a layout."""
    val_list: str
    splits: bool
    """Whether labeled and unlabeled images can be chosen, too: `data.labeled_list` and its kin,
    `--val-split`."""


TRAINING = Names("--set data.layout=", "data.val_list", splits=True)
"""`train`, and what else takes all keys."""
SCORING = Names("--layout ", "--val-list", splits=False)
"""`evaluate`."""
TESTING = Names("--test-layout ", "--test-list", splits=False)
"""The test set of `bench-recipe`."""
