"""What a recipe does to every tensor, and doing it: the one way from coefficients to merged weights.

    blend = make_blend(parents, coefficients, "ties", {"density": 0.3})
    for name, fill in merging(parents, blend):
        fill(target[name])

Live models, exported checkpoints and mergekit configs are made from the same `Blend`, so that what is scored is what
is shipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from objectives.printable import shown
from search.checkpoints.parents import Parents
from search.config.methods import OPTIONS, Method, get_method
from search.errors import MergeError
from search.merging.mask_order import mask_order
from search.merging.methods.breadcrumbs import merge_breadcrumbs, merge_breadcrumbs_ties
from search.merging.methods.dare import merge_dare_linear, merge_dare_ties
from search.merging.methods.della import merge_della, merge_della_linear
from search.merging.methods.karcher import karcher_weights
from search.merging.methods.linear import check_fits, linear_weights, weighted_sum
from search.merging.methods.model_stock import stock_ratio, stock_weights
from search.merging.methods.multislerp import multislerp_weights
from search.merging.methods.slerp import angle, slerp_weights
from search.merging.methods.sparsify import magnitude_ranks
from search.merging.methods.sphere import Array, gram
from search.merging.methods.task_arithmetic import merge_task_arithmetic
from search.merging.methods.ties import merge_ties

# Of a weighted sum: of pre and of every expert, the numbers of a mergekit `linear` config with `normalize: false`.
# Of a kernel: of every expert.
Weights = tuple[float, ...]
Fill = Callable[[torch.Tensor], None]

_TINY = 1e-3  # weights whose sum the methods would take for 0 lie far below
RANKS_BYTES = 4 * 2**30  # of memory for ranks: four bytes for each parameter of each expert
# The order of magnitudes that a method selects by.
_RANKS = {
    "ties": "descending",
    "breadcrumbs": "ascending",
    "breadcrumbs_ties": "ascending",
    "della": "rows",
    "della_linear": "rows",
}
KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "task_arithmetic": merge_task_arithmetic,
    "ties": merge_ties,
    "dare_linear": merge_dare_linear,
    "dare_ties": merge_dare_ties,
    "della": merge_della,
    "della_linear": merge_della_linear,
    "breadcrumbs": merge_breadcrumbs,
    "breadcrumbs_ties": merge_breadcrumbs_ties,
}


@dataclass(frozen=True)
class Blend:
    """The merge of a study's parents that a recipe stands for.

    Attributes:
        method: what makes the tensors; its name is `linear` for every weighted sum.
        weights: of every stored tensor.
        options: hyper-parameters of a kernel.
        seed: of the random masks, mergekit's `--random-seed`.
    """

    method: Method
    weights: Mapping[str, Weights]
    options: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def in_order(self, names: Sequence[str]) -> Blend:
        """The same, its tensors in this order."""
        return Blend(self.method, {name: self.weights[name] for name in names}, self.options, self.seed)


def make_blend(
    parents: Parents,
    coefficients: Mapping[str, Sequence[float]],
    method: str = "linear",
    options: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Blend:
    """What a method makes of coefficients.

    Args:
        coefficients: stored tensor name -> one coefficient for each expert; exactly the names of `parents.names`. To a
            kernel they are its weights.
        method: a name of `METHODS`.
        options: values of its hyper-parameters; those not given have their defaults.
        seed: of random masks.

    Raises:
        MergeError: an unknown method or option, another number of experts than it merges, a name or a coefficient too
            many or too few, or a number that is not finite or out of range.
    """
    found = get_method(method)
    count = len(parents.experts)
    if (fault := found.fault(count)) is not None:
        raise MergeError(f"merge.method: {fault}.")
    if coefficients.keys() != parents.parameter.keys():
        name = min(coefficients.keys() ^ parents.parameter.keys())
        fault = "has no coefficient" if name in parents.parameter else "is not a tensor of the parents"
        raise MergeError(f"recipe: {shown(name)} {fault}. Give one for each of {len(parents.names)} tensors.")
    values = _checked_options(found, options or {})
    weights = {}
    for name in parents.names:
        each = [float(coefficient) for coefficient in coefficients[name]]
        if len(each) != count:
            raise MergeError(
                f"recipe: {shown(name)} has {len(each)} coefficients (wanted {count}, one an expert)."
            )
        if not all(map(math.isfinite, each)):
            raise MergeError(f"recipe: coefficient of {shown(name)} is {each} (wanted finite numbers).")
        weights[name] = tuple(each) if found.kernel else _sum_weights(parents, name, each, method)
    return Blend(found if found.kernel else get_method("linear"), weights, values, seed)


def ranks_bytes(parents: Parents, methods: Iterable[str]) -> int:
    """Memory that these methods may take for the order of magnitudes."""
    if not any(method in _RANKS for method in methods):
        return 0
    return min(4 * parents.parameters * len(parents.experts), RANKS_BYTES)


def check_masks(parents: Parents) -> None:
    """Raises MergeError if the parents are stored so that mergekit's order of random masks is not known."""
    _mask_order(parents)


def merge_order(parents: Parents, blend: Blend) -> list[str]:
    """The order in which `merging` gives the tensors: the blend's, or mergekit's where masks are random."""
    if not blend.method.seeded:
        return list(blend.weights)
    return [name for name in _mask_order(parents) if name in blend.weights]


def merging(parents: Parents, blend: Blend) -> Iterator[tuple[str, Fill]]:
    """Every tensor, with what fills it in: called once, before the next tensor is asked for.

    Tensors come in `merge_order`: a random mask begins where the one before ended.

    Raises (a fill): MergeError: shapes differ, or a value does not fit into a float16 tensor.
    """
    if not blend.method.seeded:
        for name in blend.weights:
            yield name, _filler(parents, blend, name, None)
        return
    generator = torch.Generator().manual_seed(blend.seed)
    for name in _mask_order(parents):
        if name in blend.weights:
            yield name, _filler(parents, blend, name, generator)
        elif blend.options["density"] < 1.0:
            # mergekit merges what is stored, aliases too: their masks are drawn and thrown away.
            for expert in parents.experts.values():
                torch.rand(expert.shape(name), generator=generator)


def _mask_order(parents: Parents) -> tuple[str, ...]:
    left_out = () if parents.config.model_type == "gpt_neox" else parents.ignored
    return mask_order([set(one.names).difference(left_out) for one in parents.everybody], parents.tied)


def _filler(parents: Parents, blend: Blend, name: str, generator: torch.Generator | None) -> Fill:
    weights, kernel = blend.weights[name], KERNELS.get(blend.method.name)

    def fill(out: torch.Tensor) -> None:
        tensors = [one.tensor(name) for one in parents.everybody]
        if kernel is None:
            weighted_sum(tensors, weights, out, name=name)
            return
        pre, *experts = tensors
        drawn = {} if generator is None else {"generator": generator}
        with _one_thread():
            known = _ranked(parents, blend, name)
            merged = kernel(pre, experts, weights, **blend.options, **drawn, **known)
        if out.shape != merged.shape:
            raise MergeError(
                f"{name}: shape {tuple(out.shape)} of the model but {tuple(merged.shape)} of the parents."
            )
        out.copy_(merged)
        check_fits(out, name)

    return fill


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over a whole tensor have other last bits with every number of threads; mergekit's are told as of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked_options(method: Method, given: Mapping[str, float]) -> dict[str, float]:
    for name, value in given.items():
        if name not in method.options:
            raise MergeError(f"merge.{name}: {method.name} has no such option. Remove it.")
        if (fault := OPTIONS[name].fault(float(value))) is not None:
            raise MergeError(f"merge.{name}: {fault}.")
    return {name: float(given.get(name, OPTIONS[name].default)) for name in method.options}


def _sum_weights(parents: Parents, name: str, coefficients: Sequence[float], method: str) -> Weights:
    known = _known.setdefault(parents, _Geometry(parents))
    match method:
        case "linear":
            return linear_weights(coefficients)
        case "slerp":
            return slerp_weights(coefficients[0], known.angle(name))
        case "karcher":
            return 0.0, *karcher_weights(known.products(name), _shares(coefficients))
        case "multislerp":
            return linear_weights(
                multislerp_weights(known.products(name, vectors=True), _shares(coefficients))
            )
        case "model_stock":
            return stock_weights(known.ratio(name), _shares(coefficients))
    raise AssertionError(method)


def _shares(coefficients: Sequence[float]) -> Sequence[float]:
    """Methods that take a mean know relative weights only: all zeros are as good as all ones, tiny ones as large."""
    largest = max(map(abs, coefficients))
    if largest == 0.0:
        return [1.0] * len(coefficients)
    return coefficients if largest > _TINY else [coefficient / largest for coefficient in coefficients]


def _ranked(parents: Parents, blend: Blend, name: str) -> dict[str, list[torch.Tensor]]:
    """Ranks of magnitudes for the kernels that go by them, in torch's own order.

    Which of several equal magnitudes comes first is torch's affair, and another one on another kind of processor.
    mergekit sorts with torch, so this is what makes 16-bit parents, where many are equal, come out the same.
    """
    if blend.options.get("density", 1.0) == 1.0 or (order := _RANKS.get(blend.method.name)) is None:
        return {}
    known = _known.setdefault(parents, _Geometry(parents))
    return {"ranks": [known.ranks(name, place, order) for place in range(len(parents.experts))]}


class _Geometry:
    """Angles and lengths of the parents' tensors: what the coefficients do not change is measured once."""

    def __init__(self, parents: Parents) -> None:
        self._pre, self._experts = parents.pre, tuple(parents.experts.values())
        self._angles: dict[str, float | None] = {}
        self._products: dict[tuple[str, bool], Array] = {}
        self._ratios: dict[str, float] = {}
        self._ranks: dict[tuple[str, int, str], torch.Tensor] = {}
        self._room = RANKS_BYTES

    def ranks(self, name: str, expert: int, order: str) -> torch.Tensor:
        """Ranks of the magnitudes of an expert's task vector; kept while there is room."""
        key = name, expert, order
        if key in self._ranks:
            return self._ranks[key]
        vector = self._experts[expert].tensor(name).float() - self._pre.tensor(name).float()
        found = magnitude_ranks(vector, descending=order == "descending", rows=order == "rows", stable=False)
        if found.nbytes <= self._room:
            self._ranks[key] = found
            self._room -= found.nbytes
        return found

    def angle(self, name: str) -> float | None:
        """Between pre and the only expert; see `methods.slerp.angle`."""
        if name not in self._angles:
            self._angles[name] = angle(self._pre.tensor(name), self._experts[0].tensor(name))
        return self._angles[name]

    def products(self, name: str, *, vectors: bool = False) -> Array:
        """Inner products `(K, K)` of the experts' tensors, or of their task vectors."""
        key = name, vectors
        if key not in self._products:
            origin = self._pre.tensor(name) if vectors else None
            self._products[key] = gram([one.tensor(name) for one in self._experts], origin)
        return self._products[key]

    def ratio(self, name: str) -> float:
        """Model Stock's t of one tensor."""
        if name not in self._ratios:
            tensors = [one.tensor(name) for one in self._experts]
            with _one_thread():
                self._ratios[name] = float(stock_ratio(self._pre.tensor(name), tensors))
        return self._ratios[name]


_known: WeakKeyDictionary[Parents, _Geometry] = WeakKeyDictionary()
