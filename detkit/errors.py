"""The errors a user can cause, each with the exit code the command line gives it.

Messages read ``<what>: <must hold>, got <value>[; <what to do>]``: lower case, one sentence, no
full stop.
"""


class DetkitError(Exception):
    """Base of every error detkit raises on purpose; anything else is our bug (exit 1)."""

    exit_code = 1


class ConfigError(DetkitError):
    """Wrong usage: an unknown option, key or name, or a value out of range."""

    exit_code = 2


class DataError(DetkitError):
    """Unusable data: the message names file, image id and box where they are known."""

    exit_code = 2


class CheckpointError(DetkitError):
    """Unusable checkpoint: wrong kind, missing or left-over weights, stale statistics."""

    exit_code = 3


class OutOfMemoryError(DetkitError):
    """The memory ran out; the message names what had to fit and the settings that need less."""

    exit_code = 2


class VerificationError(DetkitError):
    """A verification the user asked for failed."""

    exit_code = 4


class StorageError(DetkitError):
    """The disk refused: full, read-only, or gone."""

    exit_code = 5


class NonFiniteError(DetkitError):
    """A loss or gradient is not finite; the message names the step and the batch's files."""

    exit_code = 6


class NonFiniteValueError(NonFiniteError, ValueError):
    """A number given to an operator is not finite."""


class StalledError(DetkitError):
    """No training step finished for ``train.stall_seconds``."""

    exit_code = 7


class TrainingInterrupted(DetkitError):  # noqa: N818 - what happened, and no error
    """A signal asked training to stop; the checkpoint is saved, ``exit_code`` is 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
