"""TSV-Merge and WUDI over a whole model: which of its tensors they are for, and what becomes of the others.

Both are about the matrices of linear layers. Of embeddings, output head, norms and biases TSV-Merge takes the plain
mean of the experts, and WUDI leaves them as in `pre`, as the published code of both does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.checkpoints.layout import empty_model
from search.checkpoints.parents import Parents
from search.merging.methods.tsv import merge_tsv
from search.merging.methods.wudi import merge_wudi


def linear_layers(parents: Parents) -> frozenset[str]:
    """Stored names of the matrices of linear layers, the output head not among them; the model class is asked."""
    model = empty_model(parents.config, parents.post.folder)
    head = model.get_output_embeddings()
    keys = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return frozenset(stored for stored, key in parents.parameter.items() if key in keys)


class Singular:
    """The tensors of a TSV-Merge (`wudi` None) or a WUDI merge, one at a time.

    Args:
        coefficients: of each expert; 1 as published.
        wudi: `scaling`, `steps` and `rate` of `merge_wudi`.
    """

    def __init__(
        self,
        parents: Parents,
        coefficients: Sequence[float],
        dtype: torch.dtype,
        device: str = "cpu",
        wudi: dict[str, float] | None = None,
    ) -> None:
        self._parents, self._coefficients = parents, tuple(coefficients)
        self._dtype, self._device, self._wudi = dtype, device, wudi
        self._linear = linear_layers(parents)

    def tensor(self, name: str) -> torch.Tensor:
        """A merged tensor on the CPU, computed in float32 and rounded once."""
        base, *experts = (one.tensor(name).to(self._device) for one in self._parents.everybody)
        shape = base.shape
        if name not in self._linear:  # a vector has no singular directions and meets no inputs
            base, experts = base.reshape(-1), [expert.reshape(-1) for expert in experts]
        if self._wudi is None:
            merged = merge_tsv(base, experts, self._coefficients)
        else:
            steps = int(self._wudi["steps"])
            merged = merge_wudi(
                base,
                experts,
                self._coefficients,
                scaling=self._wudi["scaling"],
                steps=steps,
                rate=self._wudi["rate"],
            )
        return merged.reshape(shape).to(self._dtype).cpu().contiguous()
