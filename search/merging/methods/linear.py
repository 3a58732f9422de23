"""Linear merging: `(1 - c) * pre + c * post`, rounded exactly as mergekit's `linear` rounds it.

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


def linear_weights(coefficient: float) -> tuple[float, float]:
    """Weights of `pre` and `post`. 0 gives exactly `pre`, 1 exactly `post`; outside [0, 1] extrapolates.

    >>> linear_weights(0.25)
    (0.75, 0.25)
    """
    return 1.0 - coefficient, coefficient


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
    pre: torch.Tensor,
    post: torch.Tensor,
    w_pre: float,
    w_post: float,
    out: torch.Tensor,
    *,
    name: str = "tensor",
) -> None:
    """Write `w_pre * pre + w_post * post` into `out`, bit for bit what `merge_linear` gives in `out`'s dtype.

    Works in chunks that stay in the cache, so that memory is read once and written once.

    Args:
        pre, post: tensors `(...)` of one shape, float32, bfloat16 or float16, on any device; not changed.
        w_pre, w_post: finite; each is rounded to float32.
        out: contiguous tensor of the same shape, float32, bfloat16 or float16; overwritten.
        name: of the tensor, for messages.

    Raises:
        MergeError: shapes differ, a weight is not finite, or a value does not fit into a float16 `out`.
    """
    check_pair(pre, post)
    if out.shape != pre.shape or not out.is_contiguous():
        raise MergeError(
            f"{name}: shape {tuple(out.shape)} of the model but {tuple(pre.shape)} of the parents."
        )
    fill = _fill_in_cache if out.device.type == "cpu" else _fill_at_once
    target = out.detach().view(-1)
    fill(pre.reshape(-1), post.reshape(-1), rounded(w_pre), rounded(w_post), target)
    if out.dtype == torch.float16 and target.numel():
        low, high = torch.aminmax(target)
        if not max(-float(low), float(high)) <= _HALF:  # written so that NaN fails too
            raise MergeError(
                f"{name}: a merged value does not fit into float16 (largest {_HALF:.0f}). "
                "Use merge.dtype bfloat16 or float32, or narrower bounds."
            )


def coefficient_derivative(gradient: torch.Tensor, pre: torch.Tensor, post: torch.Tensor) -> float:
    """Derivative of a loss by the coefficient c of a linear merge T = (1 - c) pre + c post: `<dLoss/dT, post - pre>`.

    Works in chunks, so that no tensor is held a second time.

    Args:
        gradient: dLoss/dT `(...)`, any floating dtype, on any device.
        pre, post: the parents' tensors of the same shape; differences in float32, their sum in float64.

    Raises:
        MergeError: shapes or the parents' dtypes differ.
    """
    check_pair(pre, post)
    if gradient.shape != pre.shape:
        raise MergeError(f"merge: gradient of shape {tuple(gradient.shape)} for {tuple(pre.shape)}.")
    flat, device = gradient.reshape(-1), gradient.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        a, b = (one.reshape(-1)[part].to(device, non_blocking=True).float() for one in (pre, post))
        total += (flat[part].double() * (b - a)).sum()
    return float(total)


def _fill_in_cache(
    pre: torch.Tensor, post: torch.Tensor, w_pre: float, w_post: float, target: torch.Tensor
) -> None:
    zero = _zeros()
    total, cast = (torch.empty(min(CHUNK, target.numel())) for _ in range(2))
    for start in range(0, target.numel(), CHUNK):
        part = target[start : start + CHUNK]
        size = part.numel()
        work = part if part.dtype == torch.float32 else total[:size]
        a, b = pre[start : start + CHUNK], post[start : start + CHUNK]
        # 0 + w a, not w a: a negative zero of the parent becomes positive, as in the definition.
        torch.add(zero[:size], _float32(a, cast), alpha=w_pre, out=work)
        work.add_(_float32(b, cast), alpha=w_post)
        if work is not part:
            part.copy_(work)


def _fill_at_once(
    pre: torch.Tensor, post: torch.Tensor, w_pre: float, w_post: float, target: torch.Tensor
) -> None:
    """The accelerator's way: one kernel over the whole tensor; the parent travels in its own dtype."""
    total = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    for parent, factor in ((pre, w_pre), (post, w_post)):
        total.add_(parent.to(target.device, non_blocking=True).float(), alpha=factor)
    target.copy_(total)


def _float32(part: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    return part if part.dtype == torch.float32 else scratch[: part.numel()].copy_(part)


@lru_cache(maxsize=1)
def _zeros() -> torch.Tensor:
    return torch.zeros(CHUNK)
