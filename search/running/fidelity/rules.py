"""Which rule stops a study's candidates early: `racing`, `fidelity`, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from objectives.metrics.names import Metric
from search.config.sections import PREDICTED
from search.running.fidelity.estimating import Estimating
from search.running.fidelity.predicting import Predicting
from search.running.fidelity.racing import Racing
from search.running.fidelity.stages import Answers, Rule, Stages
from search.storage.evidence import EvidenceFolder

if TYPE_CHECKING:
    from search.running.problem import Problem


def stages_of(problem: Problem, evidence: EvidenceFolder) -> Stages | None:
    """The stages of a study's candidates; None if they are scored in one go."""
    rule = make_rule(problem, evidence)
    return None if rule is None else Stages(problem.evaluator("search"), rule)


def make_rule(problem: Problem, evidence: EvidenceFolder) -> Rule | None:
    """The rule of a study; None if its study file has neither `racing` nor `fidelity`."""
    config = problem.config
    if config.racing is None and config.fidelity is None:
        return None

    metrics = [metric for metric in problem.metrics if isinstance(metric, Metric)]
    task = np.array([question.task for question in problem.questions.search], dtype=np.int64)
    if config.racing is not None:
        return Racing(config.racing, metrics, task, Answers(evidence))
    assert config.fidelity is not None, "one of the two is there"
    if config.fidelity.estimator == PREDICTED:
        space = problem.space
        return Predicting(
            config.fidelity, metrics, task, Answers(evidence), lambda r: space.unit(r.coefficients)
        )
    return Estimating(config.fidelity, metrics, task, Answers(evidence))
