"""All merge methods by name, with their hyper-parameters: what a study file may ask for.

Two kinds. A *weighted sum* only decides how much of every parent goes into a tensor, so whatever its name it is
exported as a mergekit `linear` merge, with the very weights. A *kernel* works on the elements of the task vectors and
is exported under mergekit's name for it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from search.errors import MergeError


@dataclass(frozen=True)
class Option:
    """A hyper-parameter of merge methods.

    Attributes:
        name: in a study file. mergekit: in a mergekit config.
        default: where nothing is given, and on the uniform line if it is searched and holds this value.
        low, high: what it may be; `above` leaves out `low` itself.
        each: whether mergekit takes it for each expert, not for the merge.
    """

    name: str
    mergekit: str
    default: float
    low: float
    high: float
    above: bool = False
    each: bool = False

    def fault(self, value: float) -> str | None:
        """What is wrong with a value; None if nothing is."""
        if (self.low < value if self.above else self.low <= value) and value <= self.high:
            return None
        return f"found {value:g}, wanted {'above' if self.above else 'at least'} {self.low:g}, at most {self.high:g}"


OPTIONS = {
    option.name: option
    for option in (
        Option("density", "density", 1.0, 0.0, 1.0, above=True, each=True),
        Option("scaling", "lambda", 1.0, -10.0, 10.0),
        Option("epsilon", "epsilon", 0.15, 0.0, 0.5, each=True),
        Option("gamma", "gamma", 0.01, 0.0, 0.99, each=True),
    )
}


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: ours; that of a kernel is mergekit's, too.
        kernel: whether it is one; else it is a weighted sum.
        options: names of its hyper-parameters.
        normalize, rescale: the kernel's defaults, as mergekit's.
        relative: whether only the ratios of the weights matter, so that none leads back to pre.
        seeded: whether it draws masks.
        least, most: how many experts it merges.
    """

    name: str
    kernel: bool = False
    options: tuple[str, ...] = ()
    normalize: bool = False
    rescale: bool = False
    relative: bool = False
    seeded: bool = False
    least: int = 1
    most: int = 1000

    def fault(self, experts: int) -> str | None:
        """What is wrong with so many experts; None if nothing is."""
        if self.least <= experts <= self.most:
            return None
        wanted = "a single expert" if self.most == 1 else f"at least {self.least} experts"
        return f"{self.name} merges {wanted}, found {experts}"


METHODS = {
    method.name: method
    for method in (
        Method("linear"),
        Method("slerp", most=1),
        Method("karcher", relative=True, least=2),
        Method("multislerp", relative=True, least=2),
        Method("model_stock", relative=True, least=2),
        Method("task_arithmetic", True, ("scaling",)),
        Method("ties", True, ("density", "scaling"), normalize=True),
        Method("dare_linear", True, ("density", "scaling"), rescale=True, seeded=True),
        Method("dare_ties", True, ("density", "scaling"), rescale=True, seeded=True),
        Method("della", True, ("density", "epsilon", "scaling"), normalize=True, rescale=True, seeded=True),
        Method("della_linear", True, ("density", "epsilon", "scaling"), rescale=True, seeded=True),
        Method("breadcrumbs", True, ("density", "gamma", "scaling")),
        Method("breadcrumbs_ties", True, ("density", "gamma", "scaling")),
    )
}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        MergeError: there is none; the nearest name is suggested.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise MergeError(f"merge.method: '{name}' is not known. {hint}Use one of {', '.join(METHODS)}.")
    return METHODS[name]
