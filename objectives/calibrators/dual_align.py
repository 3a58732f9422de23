"""Dual-Align: one temperature from the models' confidences where they agree and from their layers where they do not.

Luo, Wang, Wei, Li and Du 2026, "Unlocking the Pre-Trained Model as a Dual-Alignment Calibrator for Post-Trained
LLMs", arXiv 2601.04277. **A reconstruction.** The abstract, published reviews and summaries give: layer-wise
distributions at the last prompt token; the divergence layer as the largest jump of the Jensen-Shannon divergence
between the two models; a confidence term KL(pre || post at tau) on the last layer; a process term, the squared
difference of the models' "inferential stability entropy" (ISE) from that layer on; one temperature, applied to the
last layer only. They do not give: how ISE adds up over layers, whether tau divides the intermediate scores too, and
how the two terms are weighted. These are parameters here, with our choice as the default.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from objectives.calibrators.alignment import divergence_from
from objectives.calibrators.daca import agreement
from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.logits import LayerwiseLogits, require_same_questions
from objectives.calibrators.solver import grid_minimum
from objectives.calibrators.tempering import entropy, jensen_shannon, tempered
from objectives.errors import ConfigError
from objectives.outcomes import Floats, Integers


def dual_align(
    post: LayerwiseLogits,
    pre: LayerwiseLogits,
    *,
    gate: Literal["agreement"] | float = "agreement",
    jump: Literal["divergence", "distance"] = "divergence",
    stability: Literal["mean", "sum"] = "mean",
    tempered_layers: Literal["all", "last"] = "all",
) -> FittedTemperature:
    """The temperature of least mean_x a(x) L_conf(x) + (1 - a(x)) L_proc(x); no labels are read.

    With p_m^l the option distribution of model m after layer l of L, and z its scores:

        d_l    = JS(p_pre^l, p_post^l)                          l* = argmax over l = 2..L of |d_l - d_(l-1)|
        ISE_m  = mean over l = l*..L of H(softmax(z_m^l / t))    t = tau for post, 1 for pre
        L_conf = KL(p_pre^L || softmax(z_post^L / tau))          L_proc = (ISE_post - ISE_pre)^2

    The loss is not convex: it is minimised on a grid and refined, to a relative error of about 1e-6.

    Args:
        post, pre: layer-wise scores of the same questions; models of one depth, at least two layers.
        gate: a(x). "agreement": 1 where both models give the same answer, else 0. A number from 0 to 1: that
            weight for every question (1: naive alignment; 0: the process term alone).
        jump: of what the divergence layer is the largest jump, the first on ties: the divergence (nats), or the
            distance, its square root.
        stability: whether ISE is the mean or the sum of the entropies.
        tempered_layers: whether tau divides the scores of post in all layers of ISE, or in layer L only.

    Raises:
        EvaluationError: no questions, or not the same ones.
        ConfigError: different vocabularies, different depths, fewer than two layers, or a gate outside [0, 1].
    """
    require_same_questions(post.final, pre.final, "dual-align")
    _require_same_depth(post, pre)
    if gate != "agreement" and not 0.0 <= float(gate) <= 1.0:
        raise ConfigError(f"dual-align: gate is {gate} (wanted 'agreement' or a number from 0 to 1).")
    n = len(post)
    alike = agreement(post.final, pre.final)
    weight = alike.astype(np.float64) if gate == "agreement" else np.full(n, float(gate))
    layer = divergence_layers(post, pre, jump=jump)

    target, _ = tempered(pre.final.score, 1.0)
    process = _Process(post, pre, layer, np.flatnonzero(weight < 1.0), stability, tempered_layers)

    def loss(temperature: float) -> float:
        value = weight * divergence_from(target, post.final, temperature)
        value[process.rows] += (1.0 - weight[process.rows]) * process.loss(temperature)
        return float(value.mean())

    best = grid_minimum(loss)
    return FittedTemperature(
        "dual-align",
        best.temperature,
        n,
        n,
        int(alike.sum()),
        curve=best.curve,
        divergence_layers=tuple(np.bincount(layer, minlength=post.depth + 1)[1:].tolist()),
        settings={"gate": gate, "jump": jump, "stability": stability, "tempered_layers": tempered_layers},
        reason=best.reason,
        digest=post.final.digest,
    )


def divergence_layers(
    post: LayerwiseLogits, pre: LayerwiseLogits, *, jump: Literal["divergence", "distance"] = "divergence"
) -> Integers:
    """`(n,)` int64: the layer, 2 to L counted from 1, at which the two models' option distributions part most abruptly.

    Early layers of a language model predict little but noise, so the largest jump can lie there: look at the
    histogram before reading anything into it.
    """
    distance = jensen_shannon(tempered(post.scores, 1.0)[0], tempered(pre.scores, 1.0)[0])
    if jump == "distance":
        distance = np.sqrt(distance)
    return np.asarray(np.abs(np.diff(distance, axis=1)).argmax(axis=1) + 2, dtype=np.int64)


class _Process:
    """The process term of the questions `rows`, with everything that does not depend on the temperature done once."""

    def __init__(
        self,
        post: LayerwiseLogits,
        pre: LayerwiseLogits,
        layer: Integers,
        rows: Integers,
        stability: str,
        tempered_layers: str,
    ) -> None:
        self.rows = rows
        after = np.arange(1, post.depth + 1) >= layer[rows, None]  # (rows, L): the layers of ISE
        self._question, self._layer = np.nonzero(after)
        self._count = after.sum(axis=1).astype(np.float64) if stability == "mean" else np.ones(len(rows))
        self._score = post.scores[rows][after]
        # Entropies at temperature 1 stay as they are in the layers that are not divided.
        self._moving = np.full(len(self._score), True)
        if tempered_layers == "last":
            self._moving = self._layer == post.depth - 1
        self._entropy = entropy(self._score, 1.0)
        self._wanted = self._ise(entropy(pre.scores[rows][after], 1.0))

    def loss(self, temperature: float) -> Floats:
        """`(rows,)` squared difference of ISE."""
        own = self._entropy.copy()
        own[self._moving] = entropy(self._score[self._moving], temperature)
        return np.asarray((self._ise(own) - self._wanted) ** 2)

    def _ise(self, entropies: Floats) -> Floats:
        return np.bincount(self._question, entropies, minlength=len(self.rows)) / self._count


def _require_same_depth(post: LayerwiseLogits, pre: LayerwiseLogits) -> None:
    if post.depth != pre.depth:
        raise ConfigError(
            f"dual-align: post has {post.depth} layers but pre has {pre.depth}; it compares them layer by layer. "
            "Use daca, which does not."
        )
    if post.depth < 2:
        raise ConfigError("dual-align: the models have one layer; a divergence layer needs two. Use daca.")
