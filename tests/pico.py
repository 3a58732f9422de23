"""Tiny random models with a real tokenizer, saved as real checkpoints: two layers, width 32, milliseconds each.

For example `save_pico(tmp_path / "pre", "qwen3", seed=0, dtype="bfloat16", shards=3)`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

VOCAB = 96  # rows of the embedding; the tokenizer names fewer, as real models do
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-()\n"
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "olmo2": ("Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
}
ARCHS = tuple(ARCHITECTURES)


def pico_config(arch: str = "llama", *, tied: bool | None = None, **overrides: Any) -> Any:
    """The real config class of an architecture at pico size; `tied=None` keeps the architecture's own default."""
    import transformers

    class_name, own = ARCHITECTURES[arch]
    values = {**_COMMON, **own, **overrides}
    if arch == "gpt_neox":
        values.pop("num_key_value_heads", None)
    if tied is not None:
        values["tie_word_embeddings"] = tied
    return getattr(transformers, class_name)(**values)


def pico_tokenizer(*, order: str = _LETTERS, chat_template: str | None = None) -> Any:
    """A fast character tokenizer: <unk> 0, <s> 1, </s> 2, space 3 and then the characters of `order`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", " ", *order])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def pico_model(arch: str = "llama", seed: int = 0, *, tied: bool | None = None, **overrides: Any) -> Any:
    """A model with random weights, norms included, so that no two tensors of one shape are equal."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(pico_config(arch, tied=tied, **overrides))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if re.search(r"norm.*weight$", name) else 0.0
            parameter.copy_(mean + 0.05 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def save_pico(
    folder: Path,
    arch: str = "llama",
    seed: int = 0,
    *,
    dtype: str = "float32",
    shards: int = 1,
    tied: bool | None = None,
    tokenizer: Any = None,
    chat_template: str | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint with its tokenizer as `save_pretrained` does, and return the folder.

    Args:
        arch: a key of `ARCHITECTURES`.
        seed: of the weights; two seeds make two parents.
        dtype: of the stored tensors.
        shards: about how many files; 1 gives model.safetensors, more give an index.
        tied: tie_word_embeddings, or None for the architecture's default.
        tokenizer: another tokenizer than `pico_tokenizer()`, or False for none.
        overrides: config values.
    """
    model = pico_model(arch, seed, tied=tied, **overrides).to(getattr(torch, dtype))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    if tokenizer is not False:
        (tokenizer or pico_tokenizer(chat_template=chat_template)).save_pretrained(folder)
    return folder


def block_network(monkeypatch: Any) -> None:
    """Any attempt of this test to resolve a name or to connect fails loudly."""
    import socket

    def blocked(*arguments: object, **named: object) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)


def save_pair(tmp: Path, arch: str = "llama", **options: Any) -> tuple[Path, Path]:
    """`pre` (seed 0) and `post` (seed 1) below `tmp`."""
    return save_pico(tmp / "pre", arch, 0, **options), save_pico(tmp / "post", arch, 1, **options)


def save_experts(tmp: Path, names: Sequence[str], arch: str = "llama", **options: Any) -> dict[str, Path]:
    """`pre` below `tmp`, and experts that lie a little way from it in different directions, as fine-tuned ones do."""
    from transformers import AutoModelForCausalLM

    pre = save_pico(tmp / "pre", arch, 0, **options)
    for seed, name in enumerate(names, start=1):
        model = AutoModelForCausalLM.from_pretrained(pre, dtype=torch.float32)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
        model.to(getattr(torch, options.get("dtype", "float32"))).save_pretrained(tmp / name)
        pico_tokenizer().save_pretrained(tmp / name)
    return {"pre": pre, **{name: tmp / name for name in names}}
