"""Two tokenizers compared id by id: rows of the embedding that mean different tokens must not be averaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from objectives.printable import shown
from search.checkpoints.checkpoint import refuse_remote_code
from search.errors import CheckpointError, IncompatibleModelsError
from search.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Names under which models keep ids free for later; giving one a name in post-training changes no meaning.
_PLACEHOLDER = re.compile(r"reserved|unused|extra_id|placeholder|<dummy", re.IGNORECASE)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer. Raises CheckpointError when there is none or it wants code of its own."""
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        refuse_remote_code(settings, read_json(settings))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:  # whatever a broken tokenizer file makes the library raise
        reason = shown((str(error) or type(error).__name__).strip().splitlines()[0])
        raise CheckpointError(
            f"{folder}: no tokenizer can be loaded ({reason}). Put tokenizer.json and"
            " tokenizer_config.json there."
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{folder}: the tokenizer has no fast form (tokenizer.json). Save it with a current transformers."
        )
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def compare_tokenizers(pre: Any, post: Any, vocab_size: int, label: str, *, shipped: str) -> list[str]:
    """Notes on harmless differences between the tokenizers of pre and of the parent called `label`.

    Ids that only one parent names are a note, as is an id that was a placeholder in `pre`. Chat template and
    text splitting are those of the parent called `shipped`, whose tokenizer is used for scoring.

    Raises:
        IncompatibleModelsError: an id means two different tokens, or a token of the other parent has an id at or above
            `vocab_size`, for which the embedding has no row.
    """
    mine, yours = _by_id(pre), _by_id(post)
    renamed = []
    for index in sorted(mine.keys() & yours.keys()):
        if mine[index] == yours[index]:
            continue
        if _PLACEHOLDER.search(mine[index]) and index in pre.added_tokens_decoder:
            renamed.append(index)
            continue
        raise IncompatibleModelsError(
            f"tokenizer: id {index} is '{shown(mine[index])}' in pre but '{shown(yours[index])}' in {label}. "
            "Both parents must use one vocabulary in one order."
        )
    over = max(yours, default=-1)
    if over >= vocab_size:
        raise IncompatibleModelsError(
            f"tokenizer: id {over} ('{shown(yours[over])}') of {label} has no row in the embedding "
            f"(vocab_size {vocab_size}). Use the tokenizer that belongs to the weights."
        )
    notes = []
    if renamed:
        first = renamed[0]
        notes.append(
            f"tokenizer: {len(renamed)} placeholder ids of pre have names in {label} (id {first}: "
            f"'{shown(mine[first])}' -> '{shown(yours[first])}')"
        )
    for owner, extra, names in (
        ("pre", mine.keys() - yours.keys(), mine),
        (label, yours.keys() - mine.keys(), yours),
    ):
        if extra:
            first = min(extra)
            notes.append(
                f"tokenizer: {len(extra)} ids are named in {owner} only (id {first}: '{shown(names[first])}')"
            )
    if _splitting(pre) != _splitting(post):
        parents = "the parents" if label == shipped == "post" else f"pre and {label}"
        notes.append(
            f"tokenizer: {parents} split text differently; {shipped}'s tokenizer is used and shipped"
        )
    if getattr(pre, "chat_template", None) != getattr(post, "chat_template", None):
        whose = "pre has none" if not getattr(pre, "chat_template", None) else "they differ"
        whose = f"{label} has none" if not getattr(post, "chat_template", None) else whose
        notes.append(f"chat template: {whose}; {shipped}'s tokenizer is used and shipped")
    return notes


def same_names(named: dict[int, tuple[str, str]], tokenizer: Any, label: str) -> None:
    """Adds an expert's ids to those of the experts before it: id -> token, expert.

    Raises:
        IncompatibleModelsError: another expert calls an id by another name, as two fine-tunes may do with an id that
            was free in `pre`.
    """
    for index, token in sorted(_by_id(tokenizer).items()):
        known, owner = named.setdefault(index, (token, label))
        if _PLACEHOLDER.search(known):
            named[index] = token, label
        elif known != token and not _PLACEHOLDER.search(token):
            raise IncompatibleModelsError(
                f"tokenizer: id {index} is '{shown(known)}' in {owner} but '{shown(token)}' in {label}. "
                "Experts must give a free id the same token."
            )


def _by_id(tokenizer: Any) -> dict[int, str]:
    """id -> token over the whole vocabulary, added tokens included."""
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _splitting(tokenizer: Any) -> tuple[str, str]:
    backend = tokenizer.backend_tokenizer
    return repr(backend.normalizer), repr(backend.pre_tokenizer)
