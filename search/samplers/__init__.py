"""How the next recipe is proposed. An engine is rebuilt from the study's trials alone: any worker can go on."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from search.sampler_config import SamplerConfig
from search.samplers.engine import Engine, Proposal, WeightedGradient
from search.samplers.subspace import Knots, MakeGradient, Moving, SubspaceEngine

__all__ = ["Engine", "Proposal", "WeightedGradient", "make_engine"]


def make_engine(
    config: SamplerConfig,
    groups: tuple[str, ...],
    bounds: tuple[float, float],
    maximize: tuple[bool, ...],
    gradient: MakeGradient | None = None,
    idle: Collection[str] = (),
) -> Engine:
    """The engine of a study file's `sampler` section.

    Args:
        config: engine, name, seed and options.
        groups: names of the coefficients, the order of a vector.
        bounds: (low, high) of every coefficient.
        maximize: one flag an objective.
        gradient: for an engine that follows gradients: called at its first proposal, since it needs the live model.
        idle: groups whose coefficients change nothing; they are left alone, unless all are.

    Raises:
        ConfigError: the sampler cannot work in this space.
    """

    def plain(names: tuple[str, ...], gradient: MakeGradient | None) -> Engine:
        return _plain(config, names, bounds, maximize, gradient)

    def within(names: tuple[str, ...], gradient: MakeGradient | None) -> Engine:
        if config.knots is not None:
            return SubspaceEngine(Knots(names, config.knots), plain, gradient)
        if (coarse := config.coarse) is not None:
            from search.samplers.coarse import CoarseToFine

            return CoarseToFine(names, bounds, maximize, coarse.start, coarse.every, plain, gradient)
        return plain(names, gradient)

    follows = None if gradient is None or config.engine != "gradient" else cache(gradient)
    if idle and len(idle) < len(groups):
        return SubspaceEngine(Moving(groups, idle), within, follows)
    return within(groups, follows)


def _plain(
    config: SamplerConfig,
    names: tuple[str, ...],
    bounds: tuple[float, float],
    maximize: tuple[bool, ...],
    gradient: MakeGradient | None,
) -> Engine:
    """The engine that moves every coordinate it is given."""
    if config.engine == "pymoo":
        from search.samplers.pymoo_engine import PymooEngine

        return PymooEngine(config, names, bounds, maximize)
    if config.engine == "gradient":
        from search.samplers.gradient_engine import GradientEngine

        assert gradient is not None, "a study gives one"
        return GradientEngine(config, names, bounds, maximize, gradient)
    from search.samplers.optuna_engine import OptunaEngine

    return OptunaEngine(config, names, bounds, maximize)
