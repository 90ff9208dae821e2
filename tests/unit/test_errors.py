"""Exit codes tell who must act."""

from __future__ import annotations

from job import errors


def test_every_error_has_its_code():
    codes = {
        errors.ConfigError: 78,
        errors.DataError: 78,
        errors.StorageError: 74,
        errors.ObjectNotFound: 74,
        errors.PreconditionFailed: 74,
        errors.Fenced: 76,
        errors.Diverged: 70,
        errors.Preempted: 75,
    }
    for kind, code in codes.items():
        assert kind("x").exit_code == code


def test_the_text_ends_with_the_mend():
    assert str(errors.ConfigError("a: wrong", mend="do b")) == "a: wrong\n  mend: do b"
    assert str(errors.ConfigError("a: wrong")) == "a: wrong"


def test_a_message_alone_is_enough():
    """A DataLoader process rebuilds an error from its text."""
    for kind in (errors.ConfigError, errors.DataError, errors.StorageError):
        assert kind("text").message == "text"
