"""Base of all errors, and those of questions, models and disks."""

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


class EvaluationError(MergefrontError):
    """A model could not be scored, or its scores are not numbers."""


class DiskError(MergefrontError):
    """No space, no permission, or a folder that is in the way."""

    exit_code = 4
