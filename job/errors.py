"""What can go wrong, and who must act: the exception tree and the exit codes.

    JobError
    |- ConfigError        78  the user's configuration or command line
    |- DataError          78  the user's images, masks or dataset.yaml
    |- StorageError       74  the run's folder or bucket refused something
    |  |- AccessDenied        the identity of this process may not do it
    |  |- Corrupted           what arrives is not what the storage says it keeps
    |  |- ObjectNotFound      no object under that key
    |  `- PreconditionFailed  a conditional write lost against another writer
    |- RunDeleted         74  the run was deleted while it was trained
    |- Fenced             76  another attempt owns the run
    |- TrainingFailure        may be acted upon (`monitor.on_divergence`, `monitor.on_oom`)
    |  |- Diverged        70  a loss is NaN or infinite
    |  `- OutOfMemory     78  of the GPU
    |- NoProgress         93  attempt after attempt fails alike at the same place
    |- RankLost           75  a process of another GPU is gone
    |- Stalled            75  nothing was done for too long
    `- Preempted          75  asked to stop before anything was left to save

Knows nothing of the rest of the program.
"""

from __future__ import annotations

import enum
import errno


class ExitCode(enum.IntEnum):
    """The process's exit status says who must act; a scheduler retries PREEMPTED and nothing else.

    Source: the names and numbers of BSD's sysexits(3) where one fits; 93 for "do not requeue" is
    NVIDIA Resiliency Extension's.
    """

    OK = 0
    """Finished: all files of the run are in place."""
    SOFTWARE = 1
    """A fault of this program, or of the machine; Python's own status for a traceback."""
    DIVERGED = 70
    """A loss became NaN, infinite or far too high; the newest good checkpoint is kept."""
    IO_ERROR = 74
    """The storage behind the run failed (full, read-only, denied)."""
    PREEMPTED = 75
    """Asked to stop; the state is saved. Run the same command again to go on."""
    FENCED = 76
    """Another attempt owns this run; this one published nothing more."""
    BAD_CONFIG = 78
    """The configuration or the data is wrong. Running again cannot help; the message says why."""
    NO_PROGRESS = 93
    """Several attempts failed alike without a new checkpoint: running again cannot help."""
    KILLED_BY_USER = 130
    """A second Ctrl-C: left at once, without saving."""


class JobError(Exception):
    """An error the user can read: what is wrong, and the mend.

    Args:
        message: one sentence that names the thing (file, key, flag).
        mend: what to do about it, in the imperative; empty if the message says it.
    """

    exit_code: ExitCode = ExitCode.BAD_CONFIG

    def __init__(self, message: str, *, mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message}\n  mend: {self.mend}" if self.mend else self.message


class ConfigError(JobError):
    """A wrong configuration key, value or flag, or a run folder of another configuration."""


class DataError(JobError):
    """Images, masks or `dataset.yaml` that cannot be trained on."""


class StorageError(JobError):
    """The storage refused or failed; never used for "not there"."""

    exit_code = ExitCode.IO_ERROR

    @classmethod
    def from_os(cls, verb: str, path: object, error: OSError) -> StorageError:
        """What the system said when we tried to `verb` ("read", "write") a file, with a mend."""
        mends = {
            errno.ENOSPC: "free some disk space; the same command then goes on",
            errno.EDQUOT: "free some of your disk quota; the same command then goes on",
            errno.EACCES: f"give this user the right to {verb} there, or choose another folder",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.ENOTDIR: "a file is in the place of a folder: choose another folder",
            errno.EEXIST: "a file is in the place of a folder: choose another folder",
        }
        mend = mends.get(error.errno or 0, "")
        return cls(f"cannot {verb} {path}: {error.strerror}", mend=mend)


class AccessDenied(StorageError):
    """The identity of this process lacks a permission; the mend names it."""


class RunDeleted(JobError):
    """Somebody has deleted the run, or a part of it, under the attempt that works on it."""

    exit_code = ExitCode.IO_ERROR


class Corrupted(StorageError):
    """An object whose content arrives changed, however often it is read."""


class ObjectNotFound(StorageError):
    """No object under the key."""


class PreconditionFailed(StorageError):
    """A conditional write found another version than the one it expected."""


STORAGE_FAILURES = (StorageError, ConfigError)
"""What a store raises; the second where the configuration is to blame: keys that have become
invalid, a bucket that is gone. Work in the background catches both, as either may pass."""


class Fenced(JobError):
    """Another attempt has taken the run over; this one must stop publishing."""

    exit_code = ExitCode.FENCED


class TrainingFailure(JobError):
    """What may not happen again with other learning rates, or smaller batches."""

    goes_on: bool = False
    """Something was done about it, so that the next attempt need not fail alike."""


class Diverged(TrainingFailure):
    """A loss is NaN or infinite, or far too high: further iterations cannot recover."""

    exit_code = ExitCode.DIVERGED

    @classmethod
    def with_rates(cls, message: str, rate: float, rate_D: float, *, rolls_back: bool) -> Diverged:
        """With the guide's remedy.

        Args:
            message: what is wrong.
            rate: learning rate it was trained with.
            rate_D: the discriminator's.
            rolls_back: whether the run rolls back by itself already.
        """
        by_itself = "--set monitor.on_divergence=rollback does that by itself; "
        return cls(
            message,
            mend=f"start a new run with half the learning rates: --learning-rate {rate / 2:g} "
            f"--learning-rate-D {rate_D / 2:g}; {'' if rolls_back else by_itself}"
            "and look for broken images or masks",
        )


class OutOfMemory(TrainingFailure):
    """The GPU's memory is not enough for the batches."""


class NoProgress(JobError):
    """Attempts keep failing in the same way without a new checkpoint in between."""

    exit_code = ExitCode.NO_PROGRESS


class RankLost(JobError):
    """One of the processes that train together is gone; a new attempt goes on from the last save.

    Counts as a failure where `Preempted` does not: what kills a process may do so again.
    """

    exit_code = ExitCode.PREEMPTED


class Stalled(JobError):
    """Nothing was done for so long that it hangs; another machine may not.

    Counts as a failure, as `RankLost` does.
    """

    exit_code = ExitCode.PREEMPTED


class Preempted(JobError):
    """A stop was asked for at a point where everything worth saving is already saved."""

    exit_code = ExitCode.PREEMPTED


NO_PLAIN_FILE = "it holds more than tensors and plain values, or is no file of torch"
CUT_OFF = "the file is cut off or damaged"
"""What `reason` makes of torch's own words for a file."""


def reason(error: BaseException) -> str:
    """The first line of any exception, or its name if it has no text; for use in our messages."""
    text = str(error)
    # torch's advice for a file that its safe reader refuses is to read it unsafely: not ours.
    if "weights_only" in text or "Weights only load failed" in text:
        return NO_PLAIN_FILE
    if "PytorchStreamReader" in text:
        return CUT_OFF
    return (text or type(error).__name__).splitlines()[0]
