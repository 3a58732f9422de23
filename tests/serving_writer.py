"""Writers to serve in tests, and a server in a thread or, run as a module, in a process of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from search.errors import ConfigError
from search.switching.serving.app import make_app
from search.switching.serving.limits import Limits
from search.switching.serving.server import Server, listen, url
from search.switching.writer import Piece

SEGMENT = 4
AUTHORS = ("pre", "post")


@dataclass
class ScriptedWriter:
    """Repeats the prompt, a character a token, for as long as it may; no model.

    Attributes:
        steps: a permit for each segment, or None for no waiting.
        begun, ended: answers begun, and those let go of.
        fail: what the second segment raises.
        seen: the arguments of each call.
    """

    name: str = "scripted"
    context: int = 512
    steps: threading.Semaphore | None = None
    fail: Exception | None = None
    begun: int = 0
    ended: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)

    def encode(self, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        text = prompt if isinstance(prompt, str) else "".join(f"<{m['role']}>{m['content']}" for m in prompt)
        if not text:
            raise ConfigError("prompt: has no token.")
        return tuple(map(ord, text))

    def room(self, prompt: tuple[int, ...]) -> int:
        return self.context - len(prompt)

    def write(self, prompt: tuple[int, ...], **options: Any) -> Iterator[Piece]:
        self.begun += 1
        self.seen.append({"prompt": prompt, **options})
        left, turn = options["max_new_tokens"], 0
        try:
            while left:
                if self.steps is not None:
                    self.steps.acquire(timeout=20)
                if self.fail is not None and turn:
                    raise self.fail
                n = min(left, SEGMENT)
                left -= n
                at = [prompt[(turn * SEGMENT + i) % len(prompt)] for i in range(n)]
                yield Piece("".join(map(chr, at)), AUTHORS[turn % 2], n, None if left else "length")
                turn += 1
        finally:
            self.ended += 1


class PicoWriter:
    """Two pico models take turns of four characters: a small, honest writer over real models."""

    name, context = "pico/switch", 512

    def __init__(self) -> None:
        import torch

        from tests.pico import CHAT_TEMPLATE, pico_model, pico_tokenizer

        self.tokenizer = pico_tokenizer(chat_template=CHAT_TEMPLATE)
        self.models = [pico_model(seed=seed, tied=False) for seed in range(2)]
        with torch.no_grad():
            for model in self.models:
                model.get_output_embeddings().weight.mul_(6.0)

    def encode(self, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        text = (
            prompt
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template([*map(dict, prompt)], tokenize=False)
        )
        return tuple(self.tokenizer(text)["input_ids"]) or (1,)

    def room(self, prompt: tuple[int, ...]) -> int:
        return self.context - len(prompt)

    def write(
        self,
        prompt: tuple[int, ...],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
        chat: bool = False,
    ) -> Iterator[Piece]:
        import numpy as np
        import torch

        from objectives.generation.drawing import draw_tokens

        random = np.random.default_rng(seed)
        drawn: list[int] = []
        sent, turn = 0, 0
        while True:
            before, finish = len(drawn), None
            while finish is None and len(drawn) < before + SEGMENT:
                ids = torch.tensor([[*prompt, *drawn]])
                with torch.inference_mode():
                    logits = self.models[turn % 2](ids).logits[:, -1]
                token = int(draw_tokens(logits, random.random(1), temperature, top_p)[0])
                if token == self.tokenizer.eos_token_id:
                    finish = "stop"
                    break
                drawn.append(token)
                text = self._text(drawn)
                if any(end in text for end in stop):
                    finish = "stop"
                elif len(drawn) == max_new_tokens:
                    finish = "length"
            text = self._text(drawn)
            for end in stop:
                text = text.partition(end)[0]
            kept = len(text)
            if finish is None:  # what may be the beginning of a stop text waits
                while any(
                    end.startswith(text[kept - k : kept]) for end in stop for k in range(1, 9) if k <= kept
                ):
                    kept -= 1
            yield Piece(text[sent:kept], AUTHORS[turn % 2], len(drawn) - before, finish)  # type: ignore[arg-type]
            if finish is not None:
                return
            sent, turn = max(sent, kept), turn + 1

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@contextmanager
def serving(writer: Any, limits: Limits | None = None, **options: Any) -> Iterator[str]:
    """The base URL of a server in a thread, which has ended after the block."""
    limits = limits or Limits(grace_seconds=0.5)
    up = threading.Event()
    with listen("127.0.0.1", 0) as listener:
        server = Server(make_app(writer, limits, **options), listener, limits, lambda at: up.set())
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert up.wait(20)
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def main() -> None:
    """Serves: host, port, grace and the seconds of every segment but the first; its exit code is the product's."""
    import logging
    import time

    from search.interrupt import Interrupted
    from search.switching.serving.server import serve

    class Slow(ScriptedWriter):
        def write(self, prompt: tuple[int, ...], **options: Any) -> Iterator[Piece]:
            for piece in super().write(prompt, **options):
                yield piece
                time.sleep(float(sys.argv[4]) if len(sys.argv) > 4 else 0.1)

    logging.getLogger("mergefront").addHandler(logging.NullHandler())
    try:
        serve(Slow(), sys.argv[1], int(sys.argv[2]), Limits(grace_seconds=float(sys.argv[3])))
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
