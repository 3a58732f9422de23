"""What it changes to average LoRA's A and B by themselves, as the published code does, instead of their products.

    PYTHONPATH=studies/quickstart python studies/personalized-soups/lora.py      # needs peft, and seed 1 of soups.py

Six LoRA experts of seed 1's base, on the same pairs as the full ones, once from one start of A, once from six. Prints
Markdown; writes below build/lora.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from experts import BUILD, Settings, build_all, preferences
from measure import Tasting, study_of
from peft import LoraConfig, get_peft_model
from soups import cell, win_rates
from styles import COMBINATIONS, POLES, prompt_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune import TRAINED, Answers, Tuning, prefer

from search.materials import Materials
from search.merging.adapters import average_adapters, merged_adapter
from search.merging.checkpoint import Checkpoint

FOLDER = BUILD / "lora"
SEED = 1
# Ranks as in the paper; the rate is the full experts' ten times over, as adapters want.
LORA = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
TUNING = Tuning(prefer_rate=1e-3)


def train(base_folder: Path, out: Path, *, shared: bool) -> None:
    """Writes an adapter a pole below `out`; `shared` starts all of them from one A."""
    world = Settings(SEED).world
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    drawn = Answers(base, tokenizer, prompt_texts(world, TRAINED), preferences(), TUNING, SEED)
    for number, pole in enumerate(POLES, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if shared else number)
            start = get_peft_model(copy.deepcopy(base), LORA)
        rng = np.random.default_rng([SEED, number])
        expert = prefer(start, drawn.pairs(drawn.scores[pole]), TUNING.prefer_steps, TUNING, rng)
        expert.save_pretrained(out / pole)


def averages(base: Checkpoint, adapters: list[Path], work: Path) -> tuple[dict[str, torch.Tensor], ...]:
    """Weights of the mean of the adapters' products, and of the product of the adapters' means."""
    merged = [Checkpoint.open(merged_adapter(folder, base)) for folder in adapters]
    exact = {
        name: torch.stack([one.tensor(name).float() for one in merged]).mean(dim=0) for name in base.names
    }
    shutil.rmtree(work, ignore_errors=True)
    average_adapters(adapters, [1 / len(adapters)] * len(adapters), work)
    apart = Checkpoint.open(merged_adapter(work, base))
    return exact, {name: apart.tensor(name).float() for name in base.names}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], base: Checkpoint) -> float:
    """Norm of the difference, as a share of what the second one moved from the base."""
    gap = sum(float((one[name] - other[name]).square().sum()) for name in base.names)
    moved = sum(float((other[name] - base.tensor(name).float()).square().sum()) for name in base.names)
    return float(np.sqrt(gap / moved))


def main() -> None:
    """Trains what is missing, measures on the report prompts, prints a table."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ["MERGEFRONT_CACHE"] = str(FOLDER / "cache")
    build_all(SEED)
    base_folder = BUILD / f"seed-{SEED}" / "base"
    tasting = Tasting(Materials.open(study_of(SEED), "cpu"))
    base = Checkpoint.open(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    reference = tasting.scores(model)
    print("| start of A | experts alone | mean of products | product of means | difference | distance |")
    print("|---|---|---|---|---|---|")
    for shared in (True, False):
        out = FOLDER / ("shared" if shared else "own")
        if not (out / POLES[-1]).is_dir():
            train(base_folder, out, shared=shared)

        def won(weights: dict[str, torch.Tensor], wishes: tuple[str, ...]) -> np.ndarray:
            model.load_state_dict(weights, strict=False)
            axes = [POLES.index(wish) for wish in wishes]
            return win_rates(tasting.scores(model)[..., axes], reference[..., axes]).mean(axis=1)

        alone, exact, apart, distances = [], [], [], []
        experts = {
            pole: {name: one.tensor(name).float() for name in base.names}
            for pole in POLES
            for one in [Checkpoint.open(merged_adapter(out / pole, base))]
        }
        for wishes in COMBINATIONS:
            products, means = averages(base, [out / wish for wish in wishes], FOLDER / "mean")
            exact.append(won(products, wishes))
            apart.append(won(means, wishes))
            alone.append(np.mean([won(experts[wish], wishes) for wish in wishes], axis=0))
            distances.append(distance(means, products, base))
        means_of = [np.mean(rows, axis=0) for rows in (alone, exact, apart)]
        cells = " | ".join(map(cell, means_of))
        gap = cell(means_of[2] - means_of[1], "+")
        print(
            f"| {'one for all' if shared else 'one each'} | {cells} | {gap} | {np.mean(distances):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
