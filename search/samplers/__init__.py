"""How the next recipe is proposed. An engine is rebuilt from the study's trials alone: any worker can go on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache

from objectives.metrics.names import Metric
from search.config.sampler import SamplerConfig
from search.merging.space import UNIFORM_LINE
from search.samplers.engine import Engine, Proposal, Sources, WeightedGradient
from search.samplers.subspace import Knots, MakeGradient, Moving, SubspaceEngine

__all__ = ["Engine", "Proposal", "Sources", "WeightedGradient", "make_engine"]


def make_engine(
    config: SamplerConfig,
    groups: tuple[str, ...],
    bounds: tuple[float, float],
    sources: Sources,
    idle: Collection[str] = (),
    baselines: int = len(UNIFORM_LINE),
    neutral: Mapping[str, float] | None = None,
) -> Engine:
    """The engine of a study file's `sampler` section.

    Args:
        config: engine, name, seed and options.
        groups: names of the coefficients, the order of a vector.
        bounds: (low, high) of every coefficient.
        sources: what the engine may look at beside the trials.
        idle: groups whose coefficients change nothing; they are left alone, unless all are.
        baselines: how many trials are scored before the first proposal.
        neutral: coordinates that are none of a group, with their values on the uniform line.

    Raises:
        ConfigError: the sampler cannot work in this space.
    """

    def plain(names: tuple[str, ...], gradient: MakeGradient | None) -> Engine:
        return _plain(
            config,
            names,
            bounds,
            sources if gradient is None else replace(sources, gradient=gradient),
            neutral or {},
        )

    def within(names: tuple[str, ...], gradient: MakeGradient | None) -> Engine:
        if config.knots is not None:
            return SubspaceEngine(Knots(names, config.knots), plain, gradient)
        if (coarse := config.coarse) is not None:
            from search.samplers.coarse import CoarseToFine

            maximize = tuple(metric.maximize for metric in sources.metrics)
            return CoarseToFine(names, bounds, maximize, coarse.start, coarse.every, plain, gradient)
        return plain(names, gradient)

    def warm(names: tuple[str, ...], gradient: MakeGradient | None) -> Engine:
        engine = within(names, gradient if config.engine == "gradient" else None)
        if config.warm is None or gradient is None:
            return engine
        from search.samplers.gradient_engine import GradientEngine
        from search.samplers.warm import WarmStarted

        maximize = tuple(metric.maximize for metric in sources.metrics)
        first = GradientEngine(config, names, bounds, maximize, gradient, sources.losses)
        return WarmStarted(first, engine, config.warm, baselines)

    follows = cache(sources.gradient) if config.follows_gradients else None
    if idle and len(idle) < len(groups):
        return SubspaceEngine(Moving(groups, idle), warm, follows)
    return warm(groups, follows)


def _plain(
    config: SamplerConfig,
    names: tuple[str, ...],
    bounds: tuple[float, float],
    sources: Sources,
    neutral: Mapping[str, float],
) -> Engine:
    """The engine that moves every coordinate it is given."""
    maximize = tuple(metric.maximize for metric in sources.metrics)
    match config.engine:
        case "pymoo":
            from search.samplers.pymoo_engine import PymooEngine

            return PymooEngine(config, names, bounds, maximize)
        case "gradient":
            from search.samplers.gradient_engine import GradientEngine

            return GradientEngine(config, names, bounds, maximize, sources.gradient, sources.losses)
        case "composite":
            from search.samplers.composite_engine import CompositeEngine

            metrics = [metric for metric in sources.metrics if isinstance(metric, Metric)]
            return CompositeEngine(config, names, bounds, metrics, sources.answers)
        case "line":
            from search.samplers.line_engine import LineEngine

            return LineEngine(names, bounds, neutral)
        case "optuna":
            from search.samplers.optuna_engine import OptunaEngine

            return OptunaEngine(config, names, bounds, maximize)
