"""Every error a user can meet, with the exit code the command line gives it.

A message is one line: *where: what is wrong (found, wanted). What to do.*
"""

from __future__ import annotations

from objectives.errors import CheckpointError, ConfigError, DiskError, EvaluationError, MergefrontError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DiskError",
    "EvaluationError",
    "ExportError",
    "IncompatibleModelsError",
    "LostConnectionError",
    "MergeError",
    "MergefrontError",
    "StorageError",
    "TooManyFailuresError",
]


class IncompatibleModelsError(MergefrontError):
    """The parents cannot be merged with each other."""

    exit_code = 3


class MergeError(MergefrontError):
    """A recipe cannot be turned into weights."""


class StorageError(MergefrontError):
    """The study's storage cannot be opened, read or written."""

    exit_code = 4


class LostConnectionError(StorageError):
    """The storage's server ended a connection in the middle of something: what was under way may be done or not."""


class ExportError(MergefrontError):
    """An export could not be made, or does not hold what it promises."""


class TooManyFailuresError(MergefrontError):
    """So many trials failed in a row that the set-up must be wrong, not the recipes."""

    exit_code = 5
