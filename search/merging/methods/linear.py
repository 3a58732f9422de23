"""Linear merging: `(1 - sum_k c_k) pre + sum_k c_k expert_k`, rounded exactly as mergekit's `linear` rounds it.

The sum starts from float32 zeros; each parent is added with one fused multiply-add, `pre` first, its weight
rounded to float32; the result is cast once. Any other order or precision gives other bits, and then what was
scored would not be what is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from search.errors import MergeError
from search.merging.methods.checks import check_pair, rounded

# Elements: 2 MiB of float32, so that one step stays in the cache and starting threads costs little.
CHUNK = 2**19
_HALF = 65504.0  # largest float16
_ROUNDING = 1e-12  # of a sum of coefficients


def linear_weights(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Weights of `pre` and of every expert. All 0 gives exactly `pre`, a single 1 exactly that expert.

    Coefficients outside [0, 1] extrapolate; those that add up to more than 1 take away from `pre`.

    >>> linear_weights([0.25]), linear_weights([0.5, 0.25])
    ((0.75, 0.25), (0.25, 0.5, 0.25))
    """
    first, *others = coefficients
    rest = 1.0 - first
    for coefficient in others:
        rest -= coefficient
    if others and abs(rest) < _ROUNDING:
        rest = 0.0  # coefficients that add up to one leave nothing of pre
    return rest, *coefficients


def merge_linear(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[float], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Weighted sum `sum_k c_k * T_k` (model soups, arXiv 2203.05482), the plain definition.

    Args:
        tensors: K tensors of one shape `(...)` and one dtype.
        coefficients: K finite numbers; they are not normalised.
        dtype: of the result; None is the dtype of `tensors[0]`.

    Returns:
        tensor `(...)`, accumulated in float32 in this order, rounded once.

    Raises:
        MergeError: no tensors, another number of coefficients, shapes or dtypes that differ, or a coefficient
            that is not finite.
    """
    if not tensors or len(tensors) != len(coefficients):
        raise MergeError(
            f"merge: {len(tensors)} tensors but {len(coefficients)} coefficients. Give one for each."
        )
    first = tensors[0]
    total = torch.zeros(first.shape, dtype=torch.float32, device=first.device)
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        check_pair(first, tensor)
        factor = torch.tensor(rounded(coefficient), dtype=torch.float32, device=first.device)
        total.addcmul_(tensor.float(), factor)
    return total.to(dtype or first.dtype)


def weighted_sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor, *, name: str = "tensor"
) -> None:
    """Write `sum_k w_k T_k` into `out`, bit for bit what `merge_linear` gives in `out`'s dtype.

    Works in chunks that stay in the cache, so that memory is read once and written once.

    Args:
        tensors: K tensors `(...)` of one shape, float32, bfloat16 or float16, finite, on any device; not changed.
        weights: K finite numbers; each is rounded to float32.
        out: contiguous tensor of the same shape, float32, bfloat16 or float16; overwritten.
        name: of the tensor, for messages.

    Raises:
        MergeError: shapes differ, a weight is not finite, or a value does not fit into a float16 `out`.
    """
    first, *others = tensors
    for other in others:
        check_pair(first, other)
    if out.shape != first.shape or not out.is_contiguous():
        raise MergeError(
            f"{name}: shape {tuple(out.shape)} of the model but {tuple(first.shape)} of the parents."
        )
    factors = [rounded(weight) for weight in weights]
    # What has no weight is not read: adding 0 to a sum that began with +0 changes no bit.
    kept = [place for place, factor in enumerate(factors) if factor != 0.0] or [0]
    fill = _fill_in_cache if out.device.type == "cpu" else _fill_at_once
    target = out.detach().view(-1)
    fill([tensors[place].reshape(-1) for place in kept], [factors[place] for place in kept], target)
    check_fits(target, name)


def check_fits(merged: torch.Tensor, name: str) -> None:
    """Refuses a float16 tensor in which a value became infinite.

    Raises:
        MergeError: there is one.
    """
    if merged.dtype == torch.float16 and merged.numel():
        low, high = torch.aminmax(merged)
        if not max(-float(low), float(high)) <= _HALF:  # written so that NaN fails too
            raise MergeError(
                f"{name}: a merged value does not fit into float16 (largest {_HALF:.0f}). "
                "Use merge.dtype bfloat16 or float32, or narrower bounds."
            )


def coefficient_derivative(gradient: torch.Tensor, pre: torch.Tensor, expert: torch.Tensor) -> float:
    """Derivative of a loss by an expert's coefficient in a linear merge T: `<dLoss/dT, expert - pre>`.

    Works in chunks, so that no tensor is held a second time.

    Args:
        gradient: dLoss/dT `(...)`, any floating dtype, on any device.
        pre, expert: the parents' tensors of the same shape; differences in float32, their sum in float64.

    Raises:
        MergeError: shapes or the parents' dtypes differ.
    """
    check_pair(pre, expert)
    if gradient.shape != pre.shape:
        raise MergeError(f"merge: gradient of shape {tuple(gradient.shape)} for {tuple(pre.shape)}.")
    flat, device = gradient.reshape(-1), gradient.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        a, b = (one.reshape(-1)[part].to(device, non_blocking=True).float() for one in (pre, expert))
        total += (flat[part].double() * (b - a)).sum()
    return float(total)


def _fill_in_cache(tensors: Sequence[torch.Tensor], weights: Sequence[float], target: torch.Tensor) -> None:
    zero = _zeros()
    total, cast = (torch.empty(min(CHUNK, target.numel())) for _ in range(2))
    for start in range(0, target.numel(), CHUNK):
        part = target[start : start + CHUNK]
        size = part.numel()
        work = part if part.dtype == torch.float32 else total[:size]
        first, *others = (tensor[start : start + CHUNK] for tensor in tensors)
        # 0 + w a, not w a: a negative zero of the parent becomes positive, as in the definition.
        torch.add(zero[:size], _float32(first, cast), alpha=weights[0], out=work)
        for other, weight in zip(others, weights[1:], strict=True):
            work.add_(_float32(other, cast), alpha=weight)
        if work is not part:
            part.copy_(work)


def _fill_at_once(tensors: Sequence[torch.Tensor], weights: Sequence[float], target: torch.Tensor) -> None:
    """The accelerator's way: one kernel over the whole tensor; the parent travels in its own dtype."""
    total = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(target.device, non_blocking=True).float(), alpha=weight)
    target.copy_(total)


def _float32(part: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    return part if part.dtype == torch.float32 else scratch[: part.numel()].copy_(part)


@lru_cache(maxsize=1)
def _zeros() -> torch.Tensor:
    return torch.zeros(CHUNK)
