"""How the next recipe is proposed. An engine is rebuilt from the study's trials alone: any worker can go on."""

from __future__ import annotations

from collections.abc import Callable

from search.sampler_config import SamplerConfig
from search.samplers.engine import Engine, Proposal, WeightedGradient

__all__ = ["Engine", "Proposal", "WeightedGradient", "make_engine"]


def make_engine(
    config: SamplerConfig,
    groups: tuple[str, ...],
    bounds: tuple[float, float],
    maximize: tuple[bool, ...],
    gradient: Callable[[], WeightedGradient] | None = None,
) -> Engine:
    """The engine of a study file's `sampler` section.

    Args:
        config: engine, name, seed and options.
        groups: names of the coefficients, the order of a vector.
        bounds: (low, high) of every coefficient.
        maximize: one flag an objective.
        gradient: for an engine that follows gradients: called at its first proposal, since it needs the live model.

    Raises:
        ConfigError: the sampler cannot work in this space.
    """
    if config.engine == "pymoo":
        from search.samplers.pymoo_engine import PymooEngine

        return PymooEngine(config, groups, bounds, maximize)
    if config.engine == "gradient":
        from search.samplers.gradient_engine import GradientEngine

        assert gradient is not None, "a study gives one"
        return GradientEngine(config, groups, bounds, maximize, gradient)
    from search.samplers.optuna_engine import OptunaEngine

    return OptunaEngine(config, groups, bounds, maximize)
