"""Whether a study's search split has the questions that its parts need: known before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence

from search.config import StudyConfig
from search.errors import ConfigError


def require_fitting(config: StudyConfig, tasks: Sequence[int]) -> None:
    """Refuses `racing` or `fidelity` that the search split cannot fill; `tasks` has the task of each of its questions.

    Raises:
        ConfigError: more looks than questions, or a subset that is not smaller than the split or misses a task.
    """
    n, least = len(tasks), len(set(tasks))
    if config.racing is not None and config.racing.looks > n:
        raise ConfigError(
            f"racing.looks: {config.racing.looks} looks at the search split's {n} questions (wanted at most {n})."
        )
    if config.fidelity is not None and not least <= config.fidelity.questions < n:
        raise ConfigError(
            f"fidelity.questions: {config.fidelity.questions} of the search split's {n} questions of {least} "
            f"{'task' if least == 1 else 'tasks'} (wanted {least} to {n - 1}). Change it, or the split."
        )
