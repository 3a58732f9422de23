"""A rollout job in a process of its own, to be killed: `python -m tests.rollout_process FOLDER SECONDS_A_PIECE`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from objectives.generation.sampler import Decoding, encode_prompts
from objectives.generation.stopping import stopping
from objectives.questions.matching import get_rule
from search.config.switching import Turns
from search.storage.pieces import PieceStore
from search.switching.relay import Relay
from search.switching.rollouts import Asked, RolloutOptions, Rollouts, roll
from tests.pico import pico_model, pico_tokenizer

QUESTIONS = 48


def rolled(folder: Path, wait: float = 0.0, turns: Turns | None = None) -> Rollouts:
    """The job; waits after every piece that it computed."""
    tokenizer = pico_tokenizer()
    models = {name: pico_model("llama", seed) for seed, name in enumerate(("pre", "sft", "dpo"))}
    relay = Relay(
        models,
        tokenizer,
        turns or Turns(2),
        stopping(tokenizer, chat_template=False),
        Decoding(1, 1.0, 1.0, 6, 0),
    )
    texts = [f"Question {number}?" for number in range(QUESTIONS)]
    rule = get_rule("f1")
    asked = [
        Asked(text, prompt, ("a b c", "x", "1 2"), rule)
        for text, prompt in zip(texts, encode_prompts(texts, tokenizer), strict=True)
    ]

    def watch(done: int, of: int, stored: bool) -> None:
        print(done, "stored" if stored else "computed", flush=True)
        time.sleep(0.0 if stored else wait)

    return roll(relay, asked, RolloutOptions(completions=3), PieceStore(folder), {"models": "pico"}, watch)


if __name__ == "__main__":
    rolled(Path(sys.argv[1]), float(sys.argv[2]))
