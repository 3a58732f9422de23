"""Functional Dual Anchors beside task arithmetic, TSV-Merge and WUDI, and beside anchors that nobody optimised.

    python studies/functional-dual-anchors/run.py            # offline; results, tables and picture in build/

For every seed of training a base and four experts are built, every merge is made in all its variants, the variant is
chosen on the search half of the questions, and everything that is told is measured on the other half.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from experts import GROUPS, SOURCES, Settings, build
from merges import HALVES, Anchors, Bench, Made

from search.merging.anchors.options import AdaptOptions, AnchorOptions

HERE = Path(__file__).resolve().parent
THREADS = 1  # the models are too small to share
COEFFICIENTS = tuple(round(0.1 * k, 1) for k in range(1, 11))
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
OPTIMISED = tuple(Anchors("anchors", "weight", steps) for steps in (25, 100))
ROWS, NOISE = Anchors("unoptimised rows", "weight", 0), Anchors("unoptimised noise", "gauss", 0)
DATA = Anchors("real data", "data", 0, tokens=20)
CONTROLS = {
    "pre": (ROWS, NOISE, DATA),
    "task arithmetic": (ROWS, DATA),
    "TSV-Merge": (ROWS,),
    "WUDI": (ROWS,),
}
CURVE = tuple(Anchors("anchors", "weight", steps) for steps in (0, 10, 25, 100))
ANCHORS = AnchorOptions(n=64, sigma=0.01)
ADAPT = AdaptOptions(epochs=50, batch=128)
RATES_OF_TENSORS, RATES_OF_FACTORS = (5e-4, 2e-3), (1e-2, 1e-1)


def measure(bench: Bench) -> dict[str, Made]:
    """Every row of the study: chosen on the search half, with its answers on both."""
    rows = {"pre": bench.parent("pre")} | {group: bench.parent(group) for group in GROUPS}
    arithmetic = {c: bench.plain("task_arithmetic", c) for c in COEFFICIENTS}
    rows["task arithmetic"] = bench.best(list(arithmetic.values()))
    coefficient = next(c for c, made in arithmetic.items() if made is rows["task arithmetic"])
    rows["TSV-Merge"] = bench.best([bench.plain("tsv", scale) for scale in SCALES])
    rows["WUDI"] = bench.best([bench.plain("wudi", scale) for scale in SCALES])
    for start in (None, "task arithmetic", "TSV-Merge", "WUDI"):
        origin, rates = ("pre", RATES_OF_TENSORS) if start is None else (start, RATES_OF_FACTORS)

        def adapted(kind: Anchors, rate: float, start: str | None = start) -> Made:
            own = coefficient if start == "task arithmetic" else None
            return bench.adapted(kind, None if start is None else rows[start], rate, coefficient=own)

        fda = rows[f"FDA({origin})"] = bench.best([adapted(*one) for one in product(OPTIMISED, rates)])
        for kind in CONTROLS[origin]:
            # Sequences of real data take four times as long to fit: they get the rate that is best for FDA.
            variants = [adapted(kind, rate) for rate in ((fda.rate,) if kind is DATA else rates)]
            rows[f"{kind.name}({origin})"] = bench.best(variants)
        for kind in CURVE if origin in ("pre", "task arithmetic") else ():
            rows[f"{kind.steps} steps({origin})"] = adapted(kind, fda.rate)
        say(f"  from {origin}: FDA {bench.accuracy(rows[f'FDA({origin})'], 'search'):.3f} on the search half")
    return rows


def seed_results(seed: int, folder: Path) -> None:
    """Builds and measures one seed, unless that was done with these very sources."""
    settings = Settings(seed=seed)
    digest = _digest(settings)
    facts, arrays = folder / "measured.json", folder / "measured.npz"
    if facts.is_file() and json.loads(facts.read_text())["digest"] == digest:
        say(f"seed {seed}: measured already")
        return
    seconds = build(folder, settings)
    say(f"seed {seed}: base and {len(GROUPS)} experts in {seconds:.0f} s")
    began = time.perf_counter()
    bench = Bench(folder, settings, ANCHORS, ADAPT)
    rows = measure(bench)
    say(f"seed {seed}: merges made and scored in {time.perf_counter() - began:.0f} s")
    found = {f"task/{half}": bench.task[half] for half in HALVES}
    found |= {f"{name}/{half}": bench.correct(made, half) for name, made in rows.items() for half in HALVES}
    np.savez_compressed(arrays, **found)  # type: ignore[arg-type]
    chosen = {name: {"choice": made.label, "seconds": made.seconds} for name, made in rows.items()}
    facts.write_text(json.dumps({"digest": digest, "rows": chosen}, indent=1) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _digest(settings: Settings) -> str:
    whole = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    for source in (*SOURCES, HERE / "merges.py", HERE / "run.py"):
        whole.update(source.read_bytes())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of training (default: 3)")
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder of everything that is built")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    began = time.perf_counter()
    folders = [options.out / f"seed-{seed}" for seed in range(options.seeds)]
    for seed, folder in enumerate(folders):
        seed_results(seed, folder)
    from tables import write_tables

    print(write_tables(folders, options.out))
    say(f"everything in {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
