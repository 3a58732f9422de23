"""What fuzzers feed with bytes. Each takes any bytes and raises nothing, or something is wrong with the product.

As a program it runs atheris over one of them: `python -m tests.faults.fuzz_targets NAME CORPUS [libFuzzer options]`.
A crash prints the input and where it was written.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

with (
    __import__("atheris").instrument_imports(
        include=[
            "search.config.strict_yaml",
            "search.config.study_file",
            "search.config.explain",
            "search.checkpoints.checkpoint",
        ]
    )
    if __name__ == "__main__"
    else nullcontext()
):
    from objectives.evaluation import Evaluation
    from objectives.metrics.diversity import Diversity
    from objectives.questions.prompts import load_prompts
    from search.checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, SINGLE, Checkpoint
    from search.checkpoints.lora import read_tensors
    from search.checkpoints.lora_config import LoraConfig
    from search.config.study_file import load_study_file, parse_study
    from search.errors import CheckpointError, ConfigError, EvaluationError, ExportError
    from search.storage.manifest import MANIFEST, read_manifest, write_manifest
    from search.storage.pieces import PieceStore
    from search.switching.folder import KIND, SWITCHER, read_switcher

FOLDER = Path(
    tempfile.gettempdir()
)  # where the files of one input lie; the callers give a folder of their own


@contextmanager
def one_line(kind: type[Exception]) -> Iterator[None]:
    """Lets the documented error pass if it is one line of reasonable length."""
    try:
        yield
    except kind as error:
        text = str(error)
        assert text, "an error without a word"
        assert "\n" not in text, f"not one line: {text[:200]!r}"
        assert len(text) < 2000, f"{len(text)} characters: {text[:200]!r}"


def study_file(data: bytes) -> None:
    """Any bytes as a study file: a valid config, which survives a round trip, or a ConfigError."""
    path = FOLDER / "study.yaml"
    path.write_bytes(data)
    with one_line(ConfigError):
        config = load_study_file(path)
        assert parse_study(config.to_json(), "again") == config


def weight_file(data: bytes) -> None:
    """Any bytes as model.safetensors: a checkpoint that reads every tensor within the file, or a CheckpointError."""
    with one_line(CheckpointError):
        _opened({"config.json": b'{"model_type": "llama"}', SINGLE: data})


def header(data: bytes) -> None:
    """Any bytes as the header of a safetensors file with 64 bytes of weights."""
    weight_file(len(data).to_bytes(8, "little") + data + bytes(64))


def index(data: bytes) -> None:
    """Any bytes as the index of two good shards."""
    shards = {f"{name}.safetensors": _shard(name) for name in "ab"}
    with one_line(CheckpointError):
        _opened({"config.json": b'{"model_type": "llama"}', INDEX: data, **shards})


def model_config(data: bytes) -> None:
    """Any bytes as config.json."""
    with one_line(CheckpointError):
        _opened({"config.json": data, SINGLE: _shard("a")})


def manifest(data: bytes) -> None:
    """Any bytes as the manifest of an export."""
    folder = _folder({MANIFEST: data, "recipe.yaml": b"a: 1\n"})
    with one_line(ExportError):
        read_manifest(folder)


def switcher(data: bytes) -> None:
    """Any bytes as a switcher's own file, under a manifest that fits it."""
    folder = _folder({SWITCHER: data})
    write_manifest(folder, {"kind": KIND})
    with one_line(ExportError):
        read_switcher(folder)


def adapter_config(data: bytes) -> None:
    """Any bytes as an adapter's config."""
    folder = _folder({ADAPTER_CONFIG: data})
    with one_line(CheckpointError):
        config = LoraConfig.read(folder)
        assert config.rank_of("model.layers.0.mlp.up_proj") >= 1


def adapter_weights(data: bytes) -> None:
    """Any bytes as an adapter's header with 64 bytes of weights."""
    folder = _folder({ADAPTER_WEIGHTS: len(data).to_bytes(8, "little") + data + bytes(64)})
    with one_line(CheckpointError):
        read_tensors(folder)


def evidence(data: bytes) -> None:
    """Any bytes as what a model answered."""
    path = _folder({"e": len(data).to_bytes(8, "little") + data + bytes(64)}) / "e"
    for kind in (Evaluation, Diversity):
        with one_line(EvaluationError):
            kind.load(path)


def piece(data: bytes) -> None:
    """Any bytes as a cached piece of a long computation: it is computed again, nothing is raised."""
    store = PieceStore(_folder({}))
    path = store.path("kind", {"a": 1})
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))
    assert store.read("kind", {"a": 1}) is None


def prompts(data: bytes) -> None:
    """Any bytes as a file of prompts."""
    path = _folder({"prompts.jsonl": data}) / "prompts.jsonl"
    with one_line(ConfigError):
        load_prompts(str(path), None, 0.5, 0)


def _shard(name: str) -> bytes:
    raw = json.dumps({name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(range(16))


def _folder(files: dict[str, bytes]) -> Path:
    folder = FOLDER / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _opened(files: dict[str, bytes]) -> None:
    one = Checkpoint.open(_folder(files))
    for name in one.names:
        assert one.tensor(name).shape == one.shape(name)
    one.sha256()


_STUDY = b"""schema: 1
name: a
parents: {pre: ./pre, post: ./post}
space: {granularity: layer, components: [attention, mlp], low: 0.0, high: 1.0}
tasks: [{path: ./q.jsonl, format: letter, shots: 5, limit: 200}]
objectives: [accuracy, ece:10]
sampler: {engine: optuna, name: tpe, seed: 0}
trials: 64
"""
_HEADER = (
    b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, '
    b'"b": {"dtype": "BF16", "shape": [24], "data_offsets": [16, 64]}}'
)
_INDEX = b'{"metadata": {"total_size": 32}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
_CONFIG = b'{"model_type": "llama", "hidden_size": 32, "rope_scaling": {"auto_map": {}, "quantization_config": null}}'
_MANIFEST = b'{"format": "mergefront-export-1", "files": {"recipe.yaml": {"sha256": "00", "size": 5}}}'
_ADAPTER = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 3}, "bias": "none"}'
_EVIDENCE = (
    b'{"__metadata__": {"format": "mergefront-evaluation-1"}, '
    b'"mass": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}'
)
_DIVERSITY = (
    b'{"__metadata__": {"format": "mergefront-diversity-1", "preferences": "{\\"kind\\": 1}"}, '
    b'"distinct-1": {"dtype": "F64", "shape": [8], "data_offsets": [0, 64]}}'
)
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {  # name -> target, seeds
    "study_file": (
        study_file,
        [_STUDY, b"", b"{a: &a [1], b: *a}", b"? [x, y]\n: !!int 1\n", b"- 1e400\n- 0o17\n"],
    ),
    "weight_file": (weight_file, [_shard("a"), b"", b"PK\x03\x04", b"<html>", b"version https://git-lfs"]),
    "header": (header, [_HEADER, b'{"__metadata__": {"format": "pt"}}']),
    "index": (index, [_INDEX, b"{}", b'{"weight_map": {"a": "../a.safetensors"}}']),
    "model_config": (model_config, [_CONFIG, b"[]", b'{"model_type": "llama", "auto_map": {"A": "b.C"}}']),
    "manifest": (manifest, [_MANIFEST, b"{}"]),
    "switcher": (switcher, [b'{"format": "mergefront-switcher-1", "candidates": {}, "host": "a"}', b"{}"]),
    "adapter_config": (adapter_config, [_ADAPTER, b"{}"]),
    "adapter_weights": (adapter_weights, [_HEADER]),
    "evidence": (evidence, [_EVIDENCE, _DIVERSITY, _HEADER]),
    "piece": (piece, [_HEADER, b'{"__metadata__": {"mergefront": "{}"}}']),
    "prompts": (prompts, [b'{"prompt": "a"}\n{"question": "b"}\n{"prompt": "c"}\n', b"[]", b"{}"]),
}
WITH_ATHERIS = ("study_file", "weight_file", "header", "index", "model_config")


def quickly(target: Callable[[bytes], None], data: bytes) -> None:
    """Calls the target; more than a second of this process's time is a fault like any other."""
    began = time.process_time()
    target(data)
    took = time.process_time() - began
    assert took < 1.0, f"{took:.1f} s for {len(data)} bytes"


def _main(name: str, corpus: str, *options: str) -> None:
    import atheris

    target, seeds = TARGETS[name]
    for number, seed in enumerate(seeds):
        (Path(corpus) / str(number)).write_bytes(seed)

    def call(data: bytes) -> None:
        try:
            quickly(target, data)
        except BaseException:
            print(f"INPUT {data!r}", file=sys.stderr, flush=True)
            raise

    with tempfile.TemporaryDirectory() as own:
        globals()["FOLDER"] = Path(own)
        atheris.Setup([sys.argv[0], corpus, *options], call)
        atheris.Fuzz()


if __name__ == "__main__":
    _main(*sys.argv[1:])
