"""Every error a user can meet, with the exit code the command line gives it.

A message is one line: *where: what is wrong (found, wanted). What to do.*
"""

from __future__ import annotations


class MergefrontError(Exception):
    """Base of all errors that are shown as one line; anything else is a bug and keeps its traceback."""

    exit_code = 1


class ConfigError(MergefrontError):
    """The study file, an option or a task is wrong."""

    exit_code = 2


class CheckpointError(MergefrontError):
    """A checkpoint is broken or unsafe to read."""

    exit_code = 3


class IncompatibleModelsError(MergefrontError):
    """The parents cannot be merged with each other."""

    exit_code = 3


class MergeError(MergefrontError):
    """A recipe cannot be turned into weights."""


class EvaluationError(MergefrontError):
    """A model could not be scored, or its scores are not numbers."""


class StorageError(MergefrontError):
    """The study's storage cannot be opened, read or written."""

    exit_code = 4


class LostConnectionError(StorageError):
    """The storage's server ended a connection in the middle of something: what was under way may be done or not."""


class DiskError(MergefrontError):
    """No space, no permission, or a folder that is in the way."""

    exit_code = 4


class ExportError(MergefrontError):
    """An export could not be made, or does not hold what it promises."""


class TooManyFailuresError(MergefrontError):
    """So many trials failed in a row that the set-up must be wrong, not the recipes."""

    exit_code = 5
