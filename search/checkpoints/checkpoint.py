"""One checkpoint folder, read without trusting it: safetensors only, memory-mapped, every path inside it.

Opening runs no code from the folder: a pickle, remote code (`auto_map`) or a path that leads out is refused
by name before anything is loaded. What cannot be seen without a reference is a flipped bit in the weights;
the digests (`Checkpoint.digests`) are what later runs and exports compare against.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from objectives.printable import shown
from search.checkpoints.header import Entry, read_header
from search.errors import CheckpointError
from search.storage.files import file_sha256, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
# What this project or transformers may read from a model folder; a link with such a name must not lead out.
_READ = (".json", ".safetensors", ".model", ".jinja", ".txt")
_MAX_NAME = 255  # bytes of a file's name, on all usual file systems
_CHUNK = 2**22  # elements scanned at once: bounds the scratch of a scan, not its result


@dataclass(eq=False)
class Checkpoint:
    """A validated folder. Tensors are views of the mapped files: reading one copies nothing.

    Attributes:
        folder: absolute path, links resolved.
        config: the parsed config.json.
        files: the weight files, sorted by name.
        names: the stored tensors, sorted.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    _entries: dict[str, Entry] = field(repr=False)
    _shard: dict[str, int] = field(repr=False)  # tensor name -> position in `files`
    _open: dict[int, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Check every header of the folder and map its files.

        Raises:
            CheckpointError: anything in the folder is missing, broken or unsafe; names the file or tensor.
        """
        folder = checked_folder(Path(folder))
        if is_adapter(folder):
            raise CheckpointError(
                f"{folder}: a PEFT adapter, not a checkpoint. Merge it into its base model first "
                "(`merge_and_unload()`, then `save_pretrained`)."
            )
        config = read_config(folder)
        files, listed = _weight_files(folder)
        entries: dict[str, Entry] = {}
        shard: dict[str, int] = {}
        for position, file in enumerate(files):
            for name, entry in read_header(file).items():
                if name in shard:
                    raise CheckpointError(
                        f"{folder}: tensor {shown(name)} is in two shards, {files[shard[name]].name} and "
                        f"{file.name}. Save the checkpoint again."
                    )
                entries[name], shard[name] = entry, position
        if listed is not None:
            _check_index(folder, listed, {name: files[position].name for name, position in shard.items()})
        if not entries:
            raise CheckpointError(f"{folder}: the weight files hold no tensor. Save the checkpoint again.")
        return cls(folder, config, files, entries, shard)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    @property
    def bytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return sum(entry.end - entry.start for entry in self._entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor as a view of the mapped file. Do not write to it."""
        self._entry(name)
        position = self._shard[name]
        try:
            if position not in self._open:
                self._open[position] = safe_open(self.files[position], framework="pt")
            tensor: torch.Tensor = self._open[position].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.files[position]}: tensor {shown(name)} cannot be read ({shown(str(error))}). "
                "Download or save the file again."
            ) from error
        return tensor

    def digests(self) -> dict[str, str]:
        """SHA-256 of config.json and of each weight file, by file name; computed once."""
        return dict(self._digests)

    def sha256(self) -> str:
        """One SHA-256 over `digests()`: equal for equal weight files and config, wherever they lie."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def check_finite(self, names: Iterable[str] | None = None) -> list[str]:
        """Read every value once; the names of the tensors that are zero throughout are returned.

        A NaN is refused even where a recipe would multiply it by zero, since 0 * NaN is NaN.

        Raises:
            CheckpointError: a tensor holds NaN or an infinity, or is not float32, bfloat16 or float16.
        """
        zero = []
        for name in self.names if names is None else names:
            self.check_float(name)
            tensor, empty = self.tensor(name), True
            for start in range(0, tensor.numel(), _CHUNK):
                part = tensor.view(-1)[start : start + _CHUNK]
                low, high = (float(extreme) for extreme in torch.aminmax(part))
                if not (abs(low) < float("inf") and abs(high) < float("inf")):  # NaN compares false too
                    bad = int((~torch.isfinite(tensor)).sum())
                    raise CheckpointError(
                        f"{self.folder}: tensor {shown(name)}: {bad} of {tensor.numel()} values are NaN or "
                        "infinite. This checkpoint is damaged; use another one."
                    )
                empty = empty and low == high == 0.0
            if empty:
                zero.append(name)
        return zero

    def check_float(self, name: str) -> None:
        """Raises CheckpointError unless the tensor is float32, bfloat16 or float16."""
        if self.dtype(name) not in FLOATS:
            raise CheckpointError(
                f"{self.folder}: tensor {shown(name)}: type {dtype_name(self.dtype(name))} "
                "(wanted float32, bfloat16 or float16). Use an unquantised checkpoint."
            )

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: no tensor {shown(name)} in this checkpoint.") from None

    @cached_property
    def _digests(self) -> dict[str, str]:
        files = [self.folder / "config.json", *self.files]
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter's lock
            hashed = list(pool.map(file_sha256, files))
        return {file.name: digest for file, digest in zip(files, hashed, strict=True)}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, refused when it asks for code of its own or describes quantised weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no config.json. Give a folder holding config.json and *.safetensors."
        )
    config = read_json(path)
    refuse_remote_code(path, config)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: no model_type. Save the model again with a current transformers.")
    for section, values in _sections(config, ""):
        if values.get("quantization_config") is not None:
            raise CheckpointError(
                f"{path}: {section}quantization_config: the weights are quantised. "
                "Use the unquantised checkpoint."
            )
    return config


def refuse_remote_code(path: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError when a JSON file of a model names Python code to be loaded with it."""
    for section, values in _sections(config, ""):
        for key in ("auto_map", "custom_pipelines"):
            if values.get(key):
                raise CheckpointError(
                    f"{path}: {section}{key}: the model brings code of its own, which is never run. "
                    "Use a model that transformers knows; if it does, remove the key."
                )


def _sections(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object and all objects in it, with their place; without recursion, which a deep file would exhaust."""
    left = [(prefix, values)]
    while left:
        prefix, values = left.pop()
        yield prefix, values
        inside = [(key, value) for key, value in values.items() if isinstance(value, dict)]
        left += [(shown(f"{prefix}{key}") + ".", value) for key, value in reversed(inside)]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter: its config and its weights, or its config and no weights of a model.

    Training scripts leave an adapter_config.json beside merged weights; that is a checkpoint.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    own = (folder / ADAPTER_WEIGHTS).exists() or (folder / "adapter_model.bin").exists()
    return own or not ((folder / SINGLE).exists() or (folder / INDEX).exists())


def checked_folder(folder: Path) -> Path:
    """The absolute path of a model's or an adapter's folder, links resolved.

    Raises:
        CheckpointError: no such folder, or a link in it leads out.
    """
    folder = _existing(folder)
    _refuse_escaping_links(folder)
    return folder


def _existing(folder: Path) -> Path:
    try:
        if not folder.exists():
            raise CheckpointError(
                f"{shown(str(folder))}: no such folder. Give a folder holding config.json and *.safetensors."
            )
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder. Give the folder that holds config.json and *.safetensors."
            )
        return folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL byte, a loop of links
        raise CheckpointError(f"{shown(str(folder))}: cannot be opened ({shown(str(error))}).") from error


def _refuse_escaping_links(folder: Path) -> None:
    """A link may stay in the folder, or lead from a hub snapshot to the blobs of the same repository."""
    allowed = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        allowed.append((folder.parent.parent / "blobs").resolve())
    try:
        for path in sorted(folder.iterdir()):
            if not path.is_symlink() or not path.name.endswith(_READ):
                continue
            target = path.resolve()
            if not any(target.is_relative_to(base) for base in allowed):
                raise CheckpointError(
                    f"{path}: a link that leads out of the folder (to {shown(str(target))}). "
                    "Put the file itself there."
                )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be listed ({shown(str(error))}). Check the folder."
        ) from error


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The shards, sorted, and the index's map when there is one."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder}: both {SINGLE} and {INDEX}: which is meant? Remove one of them.")
    for path in (single, index):
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: not a regular file. Download or save it again.")
    if single.exists():
        return (single,), None
    if index.exists():
        listed = _read_index(index)
        files = tuple(folder / name for name in sorted(set(listed.values())))
        for file in files:
            if not file.is_file():
                raise CheckpointError(
                    f"{file}: this shard is missing; {INDEX} names {len(files)} shards. Download it again."
                )
        return files, listed
    present = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in present if name.endswith(PICKLED)]
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: pickled weights are never opened, since a pickle can run code. "
            "Give a safetensors checkpoint."
        )
    other = [name for name in present if name.endswith(".safetensors")]
    hint = f" (found {shown(other[0])})" if other else ""
    raise CheckpointError(
        f"{folder}: no {SINGLE} and no {INDEX}{hint}. Give a folder that holds one of them."
    )


def _read_index(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: no weight_map. Save the checkpoint again.")
    for name, file in listed.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{path}: weight_map of {shown(name)} is {shown(repr(file))} (wanted a file name). "
                "Save the checkpoint again."
            )
        # A plain name only: this refuses every way out of the folder before a path is built from it.
        odd = not file or file.startswith(".") or not file.isprintable() or len(file.encode()) > _MAX_NAME
        if odd or any(ch in file for ch in "/\\:"):
            raise CheckpointError(
                f"{path}: weight_map of {shown(name)} is '{shown(file)}', which is not a file name in the "
                "same folder. Do not use this checkpoint."
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map of {shown(name)} is '{shown(file)}' (wanted *.safetensors). "
                "Give a safetensors checkpoint."
            )
    return listed


def _check_index(folder: Path, listed: dict[str, str], stored: dict[str, str]) -> None:
    for name, file in listed.items():
        if stored.get(name) != file:
            found = f"it is in {stored[name]}" if name in stored else "no shard holds it"
            raise CheckpointError(
                f"{folder / INDEX}: tensor {shown(name)} should be in {file} but {found}. Download it again."
            )
    for name, file in stored.items():
        if name not in listed:
            raise CheckpointError(
                f"{folder / file}: tensor {shown(name)} is not listed in {INDEX}. Save the checkpoint again."
            )
