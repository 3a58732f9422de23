"""How long one merge takes, as a multiple of a memory copy of the same bytes, and against a mergekit run.

    python studies/bench/merge.py                              # random weights of the shape of a 135M Llama
    python studies/bench/merge.py --pre ./models/pre --post ./models/post --dtype bfloat16

Merge and copy alternate, so that a slow moment of the machine hits both; the figure is the median of the ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from search.merging.live import LiveModel
from search.merging.methods import tensor_weights
from search.merging.parents import Parents


def save_random(folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """A Llama with the shape of SmolLM2-135M and random weights, with a tokenizer of a few tokens."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_mergekit(parents: Parents, weights: dict[str, tuple[float, float]], dtype: str, out: Path) -> None:
    """The file-based route: mergekit reads both parents, merges, and writes a checkpoint."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config: dict[str, Any] = {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": dtype,
        "models": [
            {
                "model": str(one.folder),
                "parameters": {"weight": [{"filter": n, "value": w[k]} for n, w in weights.items()]},
            }
            for k, one in enumerate((parents.pre, parents.post))
        ],
    }
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)


def measure(parents: Parents, dtype: str, method: str, repeats: int, with_mergekit: bool) -> None:
    live = LiveModel(parents, dtype)
    targets = list(live.model.parameters())
    sources = [target.clone() for target in targets]
    size = sum(target.nbytes for target in targets)
    coefficients = {n: (i * 7 % 19) / 19 for i, n in enumerate(parents.names)}

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def merge() -> None:
        live.apply(coefficients, method)

    first = seconds(merge)  # maps the files' pages, and measures the angles of slerp
    seconds(copy)
    rows = [(seconds(merge), seconds(copy)) for _ in range(repeats)]
    merges, copies = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(row[0] / row[1] for row in rows)
    print(f"parameters      {parents.parameters:,} ({size / 2**20:.0f} MiB as {dtype}), method {method}")
    print(f"first merge     {first:.3f} s")
    print(f"merge           {merges:.4f} s   (median of {repeats})")
    print(f"memory copy     {copies:.4f} s   ({size / copies / 2**30:.1f} GiB/s)")
    print(f"merge / copy    {ratio:.2f}")
    if not with_mergekit or importlib.util.find_spec("mergekit") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = tensor_weights(parents, coefficients, method)
        took = seconds(lambda: run_mergekit(parents, weights, dtype, Path(folder) / "out"))
    print(
        f"mergekit        {took:.2f} s   ({took / merges:.0f} times a merge here; it also writes the files)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pre", help="folder or hub id; without it, random weights")
    parser.add_argument("--post")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--method", default="linear", choices=["linear", "slerp"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-mergekit", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.pre and arguments.post:
            pre, post = arguments.pre, arguments.post
        else:
            dtype = getattr(torch, arguments.dtype)
            pre, post = (str(save_random(Path(folder) / n, s, dtype)) for s, n in enumerate(("pre", "post")))
        parents = Parents.open(pre, post, check_values=False)
        measure(parents, arguments.dtype, arguments.method, arguments.repeats, not arguments.no_mergekit)


if __name__ == "__main__":
    main()
