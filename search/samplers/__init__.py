"""How the next recipe is proposed. An engine is rebuilt from the study's trials alone: any worker can go on."""

from __future__ import annotations

from objectives.metrics import Metric
from search.config import SamplerConfig
from search.samplers.engine import Engine, Proposal, Sources, WeightedGradient

__all__ = ["Engine", "Proposal", "Sources", "WeightedGradient", "make_engine"]


def make_engine(
    config: SamplerConfig, groups: tuple[str, ...], bounds: tuple[float, float], sources: Sources
) -> Engine:
    """The engine of a study file's `sampler` section.

    Args:
        config: engine, name, seed and options.
        groups: names of the coefficients, the order of a vector.
        bounds: (low, high) of every coefficient.
        sources: what the engine may look at beside the trials.

    Raises:
        ConfigError: the sampler cannot work in this space.
    """
    maximize = tuple(metric.maximize for metric in sources.metrics)
    match config.engine:
        case "pymoo":
            from search.samplers.pymoo_engine import PymooEngine

            return PymooEngine(config, groups, bounds, maximize)
        case "gradient":
            from search.samplers.gradient_engine import GradientEngine

            return GradientEngine(config, groups, bounds, maximize, sources.gradient)
        case "composite":
            from search.samplers.composite_engine import CompositeEngine

            metrics = [metric for metric in sources.metrics if isinstance(metric, Metric)]
            return CompositeEngine(config, groups, bounds, metrics, sources.answers)
        case "line":
            from search.samplers.line_engine import LineEngine

            return LineEngine(config, groups, bounds)
        case "optuna":
            from search.samplers.optuna_engine import OptunaEngine

            return OptunaEngine(config, groups, bounds, maximize)
