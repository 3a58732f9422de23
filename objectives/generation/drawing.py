"""One token a row, drawn from logits with given random numbers: temperature, nucleus, inverse of the distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 256  # tokens of the vocabulary that are summed before one is looked for
NUCLEUS = 1024  # tokens that are sorted first: most nuclei are smaller

Floats = npt.NDArray[np.float64]


def draw_tokens(
    logits: Tensor, uniform: Floats, temperature: float = 1.0, top_p: float = 1.0
) -> npt.NDArray[np.int64]:
    """One token a row: the inverse of the cumulative distribution, tokens in the order of their ids.

    In the order of ids, not of probabilities: where two tokens are almost equally probable, rounding may turn
    their order, and with it would turn every draw.

    Args:
        logits: `(r, v)`, any float dtype, computed with in float32. -inf is probability 0; each row has a finite
            one, and neither NaN nor +inf.
        uniform: `(r,)` float64 in [0, 1).
        temperature, top_p: as in `Decoding`; of tokens that tie at the border of the nucleus all stay.

    Returns:
        `(r,)` int64 token ids; a token of probability 0 is never drawn.

    >>> draw_tokens(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), np.array([0.49, 0.5])).tolist()
    [0, 1]
    """
    scaled = logits.float()
    # The largest is 0 before the division: a tiny temperature cannot overflow.
    weight = (scaled - scaled.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    if top_p < 1.0:
        wanted = top_p * weight.sum(dim=-1, keepdim=True, dtype=torch.float64)
        weight = torch.where(weight >= _nucleus_border(weight, wanted), weight, 0.0)
    # First the block, then the token in it: a cumulative sum over the whole vocabulary is several times slower.
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).view(len(weight), -1, BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    at = torch.from_numpy(uniform[:, None]).to(sums.device)
    block, rest = _invert(sums, at * sums.sum(dim=-1, keepdim=True))
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double()
    token, _ = _invert(inside, rest)
    return np.asarray((block * BLOCK + token)[:, 0].cpu().numpy())


def _invert(weight: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """First column where the cumulative sum of `(r, c)` weights exceeds `(r, 1)` `at`, and what is left of `at`.

    Rounding can put `at` beyond the last weight that is not 0; the answer is that weight, then.
    """
    cumulative = weight.cumsum(dim=-1)
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    column = torch.minimum(torch.searchsorted(cumulative, at, right=True), last)
    return column, at - (cumulative.gather(1, column) - weight.gather(1, column))


def _nucleus_border(weight: Tensor, wanted: Tensor, size: int = NUCLEUS) -> Tensor:
    """`(r, 1)` the least of the largest weights of each row of `(r, v)` that together reach `(r, 1)` `wanted`."""
    size = min(size, weight.shape[1])
    top = weight.topk(size, dim=-1).values
    cumulative = top.double().cumsum(dim=-1)
    inside = (cumulative - top < wanted).sum(dim=-1, keepdim=True)
    border = top.gather(1, inside.clamp(min=1) - 1)
    short = cumulative[:, -1] < wanted[:, 0]
    if size < weight.shape[1] and bool(short.any()):
        border[short] = _nucleus_border(weight[short], wanted[short], weight.shape[1])
    return border
