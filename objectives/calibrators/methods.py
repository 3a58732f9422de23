"""The calibrators by name: what `mergefront calibrate --method` may say, and what each one needs."""

from __future__ import annotations

import difflib
from dataclasses import replace

import numpy as np

from objectives.calibrators.daca import daca, naive_alignment
from objectives.calibrators.dual_align import dual_align
from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.logits import LayerwiseLogits, OptionLogits
from objectives.calibrators.temperature import temperature_scaling, vanilla
from objectives.errors import ConfigError
from objectives.outcomes import Booleans

Logits = OptionLogits | LayerwiseLogits

# name -> what the calibration set must hold: the right answers, the pre-trained model's scores, all layers' scores
METHODS: dict[str, frozenset[str]] = {
    "vanilla": frozenset(),
    "temperature": frozenset({"labels"}),
    "naive": frozenset({"reference"}),
    "daca": frozenset({"reference"}),
    "dual-align": frozenset({"reference", "layers"}),
}


def fit(method: str, post: Logits, pre: Logits | None = None) -> FittedTemperature:
    """Fits one temperature to the scores of a calibration set, with the method's default choices.

    Written answers get a temperature of their own by `temperature`; the other methods compare two models option by
    option, which written answers do not share: they are left out and left as they are.

    Args:
        method: a key of `METHODS`.
        post: the scores of the model to calibrate: a parent, a merge.
        pre: the scores of the pre-trained model on the same questions, for the methods that need a reference.
            Layer-wise scores serve every method.

    Raises:
        ConfigError: no such method (the nearest name is suggested), something it needs is missing, or layers of a
            set with written answers.
        EvaluationError: as the method's function.

    >>> import numpy as np
    >>> f = OptionLogits(np.array([[1.0, 0.0]]), np.array([2]), np.array([0]))
    >>> round(fit("daca", f, f).temperature, 9), fit("vanilla", f).temperature
    (1.0, 1.0)
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method.lower(), METHODS, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise ConfigError(
            f"method: no calibrator is called '{method}'. {hint}They are: {', '.join(METHODS)}."
        )
    if method == "vanilla":
        return vanilla(post.final)
    if (rows := post.final.written).any():
        return _fit_both(method, post, pre, rows)
    if method == "temperature":
        return temperature_scaling(post.final)
    if pre is None:
        raise ConfigError(f"{method}: needs the scores of the pre-trained model. Give a reference.")
    if method == "naive":
        return naive_alignment(post.final, pre.final)
    if method == "daca":
        return daca(post.final, pre.final)
    if not isinstance(post, LayerwiseLogits) or not isinstance(pre, LayerwiseLogits):
        raise ConfigError(
            f"{method}: needs the scores after every layer of both models. Read them layer-wise."
        )
    return dual_align(post, pre)


def _fit_both(method: str, post: Logits, pre: Logits | None, written: Booleans) -> FittedTemperature:
    """`fit` where answers to the questions at `written` are."""
    if not isinstance(post, OptionLogits) or (pre is not None and not isinstance(pre, OptionLogits)):
        raise ConfigError(f"{method}: reads all layers at options, but some answers are written. Use daca.")
    digest, options = post.digest, np.flatnonzero(~written)
    own: FittedTemperature | None = None
    if len(options):
        own = fit(method, post.select(options), None if pre is None else pre.select(options))
    if method != "temperature":
        reason = f"none of {len(post)} questions has options, so 1 is kept"
        return replace(own or FittedTemperature(method, 1.0, len(post), 0, reason=reason), digest=digest)
    shares = temperature_scaling(post.smoothed.select(np.flatnonzero(written)))
    counted = replace(own or shares, written=shares.temperature, digest=digest)
    return replace(counted, questions=len(post), used=len(post))
