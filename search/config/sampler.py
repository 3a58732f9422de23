"""The section `sampler` of a study file, typed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from objectives.questions.config import Section

OPTUNA_SAMPLERS = ("tpe", "nsga2", "nsga3", "gp", "random", "qmc", "grid")
PYMOO_ALGORITHMS = ("nsga2", "nsga3", "unsga3", "sms-emoa", "spea2", "ctaea", "ga")
SINGLE_OBJECTIVE = ("ga",)
_SAMPLERS = {
    "optuna": OPTUNA_SAMPLERS,
    "pymoo": PYMOO_ALGORITHMS,
    "gradient": ("adam",),
    "composite": ("gp",),
    "line": ("uniform",),
}


class CoarseConfig(Section):
    """From coarse to fine: `start` blocks of groups, one of which is split after `every` complete search trials."""

    start: int = Field(default=2, ge=1, le=100_000)
    every: int = Field(default=12, ge=1, le=100_000)


class SamplerConfig(Section):
    """What proposes the next recipe.

    `population` is for genetic algorithms, `startup` (space-filling trials before the model takes over) for tpe, gp and
    composite, `points` (per group) for grid. The gradient engine makes `weights` descents, one for each of a spread of
    weights between the objectives, and proposes where one stands after `steps` more steps of about `rate` in each
    coefficient; each step reads about `batch` questions. With `warm` it makes the first so many proposals for another
    engine.

    `knots` or `coarse` let any engine move fewer numbers than there are coefficients (`search.samplers.subspace`):
    so many knots for each component, interpolated over the layers, or blocks that are split in the course of the study.
    """

    engine: Literal["optuna", "pymoo", "gradient", "composite", "line"] = "optuna"
    name: str = "tpe"
    seed: int = Field(default=0, ge=0, lt=2**32)
    population: int | None = Field(default=None, ge=4, le=10_000)
    startup: int | None = Field(default=None, ge=0, le=10_000)
    points: int | None = Field(default=None, ge=2, le=1001)
    steps: int | None = Field(default=None, ge=1, le=10_000)
    rate: float | None = Field(default=None, gt=0.0, le=10.0)
    weights: int | None = Field(default=None, ge=1, le=1000)
    batch: int | None = Field(default=None, ge=1)
    warm: int | None = Field(default=None, ge=1, le=10)
    knots: int | None = Field(default=None, ge=1, le=1000)
    coarse: CoarseConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_name(cls, value: Any) -> Any:
        names = _SAMPLERS.get(str(value.get("engine")), ()) if isinstance(value, dict) else ()
        return {"name": names[0], **value} if len(names) == 1 else value

    @model_validator(mode="after")
    def _known_sampler(self) -> SamplerConfig:
        known = _SAMPLERS[self.engine]
        if self.name not in known:
            raise ValueError(
                f"name: {self.engine} has no '{self.name}' here. Choose one of: {', '.join(known)}"
            )
        genetic = self.engine == "pymoo" or self.name in ("nsga2", "nsga3")
        for key, fits in (
            ("population", genetic),
            ("startup", self.name in ("tpe", "gp")),  # gp: Optuna's, and the composite engine's
            ("points", self.name == "grid"),
            ("steps", self.follows_gradients),
            ("rate", self.follows_gradients),
            ("weights", self.follows_gradients),
            ("batch", self.follows_gradients),
            ("warm", self.engine not in ("gradient", "line") and self.name != "grid"),
        ):
            if getattr(self, key) is not None and not fits:
                raise ValueError(f"{key}: does not go with {self.engine} {self.name}; remove it")
        if self.coarse is not None and self.name in ("grid", "qmc"):
            raise ValueError(
                f"coarse: {self.engine} {self.name} covers one fixed space evenly; remove it, or choose another name"
            )
        if self.coarse is not None and self.knots is not None:
            raise ValueError("knots, coarse: found both; remove one of the two")
        return self

    @property
    def follows_gradients(self) -> bool:
        """Whether some of the proposals are made by gradients."""
        return self.engine == "gradient" or self.warm is not None

    @property
    def title(self) -> str:
        """In a few words, for people."""
        text = self.engine if len(_SAMPLERS[self.engine]) == 1 else f"{self.engine} {self.name}"
        if self.warm is not None:
            text += f", {self.warm} by gradients first"
        if self.knots is not None:
            return f"{text}, {self.knots} knots"
        if self.coarse is not None:
            return f"{text}, coarse {self.coarse.start} every {self.coarse.every}"
        return text
