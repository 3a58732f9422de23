"""The order in which mergekit draws the random masks of a whole model (DARE, DELLA).

mergekit draws from torch's one random stream, so a mask depends on how many numbers were drawn before it. Its
scheduler sorts what it has to do by the name under which a tensor is stored. Nothing else that a user can set
matters: not the shards, not `--lazy-unpickle`, `--async-write`, `--low-cpu-memory` or the number of threads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from objectives.printable import shown
from search.errors import MergeError


def mask_order(stored: Sequence[Collection[str]], tied: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the tensors in the order in which mergekit 0.1.5 merges them: by code points, layer 10 before layer 2.

    With `torch.Generator().manual_seed(S)`, a merge of each of them in this order gives what `mergekit-yaml
    --random-seed S` gives. In each tensor the masks are drawn in the order of the config's models, the base
    left out, and an expert of density 1 draws none. An alias that every parent stores is in the order:
    mergekit draws masks for it, too, so they must be drawn here and thrown away.

    This holds on the CPU (`--cuda` and `--multi-gpu` draw on the accelerator) with `models:` in the config,
    one architecture that mergekit knows or infers, no `tokenizer` option (it may draw for new tokens), and
    parents that store every tensor under the name of the model's definition: a name that mergekit converts
    while it reads (fused experts) has no place here.

    Args:
        stored: of every parent, the base included, the names of its tensors. Leave out buffers that mergekit does not
            merge, as the inverse frequencies of old Llamas. GPT-NeoX's it does, of whatever type they are stored:
            `dtype: float32` makes numbers of them, and each gets its masks.
        tied: alias -> the stored tensor that it shares, as config.json ties them.

    Raises:
        MergeError: no parents, or a tensor that some of them store and others do not. Of an alias mergekit
            then reads a stand-in from the others, and its place in the order depends on Python's hash tables.
    """
    if not stored:
        raise MergeError("merge: no parents (wanted at least one).")
    everywhere = set(stored[0]).intersection(*stored[1:])
    partly = set(stored[0]).union(*stored[1:]) - everywhere
    if partly:
        name = min(partly)
        where = (
            "an alias that some parents store and others do not" if name in tied else "missing in a parent"
        )
        raise MergeError(
            f"tensor {shown(name)}: {where}, so that the order of random masks is not known. "
            "Save all parents with the same tensors."
        )
    return tuple(sorted(everywhere))
