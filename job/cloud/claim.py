"""The claim: of two people who submit the same run at the same moment, one is told to wait.

A claim is written before anybody looks whether a run has a job, and given back when that is written
down. It holds for its place and for all below: whoever submits one run of a sweep looks for the
sweep's claim too, and a sweep for those of its runs. Both write first and look then, so at least
one of them sees the other.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from job import run
from job.checkpoint.resumable import around
from job.errors import (
    STORAGE_FAILURES,
    AccessDenied,
    ConfigError,
    ObjectNotFound,
    PreconditionFailed,
)
from job.storage import ObjectStore

CLAIM_S = 180.0
"""Longer than it takes to look at a run and to submit it."""
EACH_S = 0.1
"""The same for each run of a sweep; many are looked at and written down at the same time."""
_NO_CLAIM = b"{}"


class _Claim(BaseModel):
    """`jobs/claim.json`."""

    by: str
    """Random."""
    lasts_s: Annotated[float, Field(ge=0, lt=1e6)] = CLAIM_S
    """By then it is given back, or whoever made it was killed."""


@contextlib.contextmanager
def claimed(place: ObjectStore, runs: int) -> Iterator[None]:
    """Submit within this block.

    Args:
        place: of the run, or of all of them.
        runs: how many.

    Raises:
        ConfigError: somebody else is submitting there.
    """
    text, version = place.read_versioned(run.CLAIM)
    _refuse(place, text)
    claim = _Claim(by=secrets.token_hex(8), lasts_s=CLAIM_S + EACH_S * runs)
    try:
        version = place.write(run.CLAIM, claim.model_dump_json().encode(), expected=version)
    except PreconditionFailed:
        raise _claimed_by_another(place, CLAIM_S) from None
    try:
        for outer in around(place):
            with contextlib.suppress(AccessDenied):  # outside of where runs may be
                refuse_claimed(outer)
        yield
    finally:
        # Not deleted: whoever submits may delete nothing. If it took too long, it is another's.
        # If it cannot be given back it ends by itself, and what was submitted is told all the same.
        with contextlib.suppress(*STORAGE_FAILURES):
            place.write(run.CLAIM, _NO_CLAIM, expected=version)


def refuse_claimed(place: ObjectStore) -> None:
    """Look for somebody else's claim.

    Args:
        place: of a run, or of several.

    Raises:
        ConfigError: there is one.
    """
    _refuse(place, place.read_versioned(run.CLAIM)[0])


def _refuse(place: ObjectStore, text: bytes) -> None:
    if text in (b"", _NO_CLAIM):
        return
    try:
        lasts_s = _Claim.model_validate_json(text).lasts_s
    except ValidationError:
        return  # nobody of ours has written it
    with contextlib.suppress(ObjectNotFound):
        if place.age_s(run.CLAIM) < lasts_s:
            raise _claimed_by_another(place, lasts_s)


def _claimed_by_another(place: ObjectStore, lasts_s: float) -> ConfigError:
    return ConfigError(
        f"{place.uri}: is being submitted by another command",
        mend=f"look again in a moment (s4gan status {place.uri}); if that command was killed, "
        f"submitting works again {lasts_s / 60:.0f} minutes after it",
    )
