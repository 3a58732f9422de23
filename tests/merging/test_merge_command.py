"""`mergefront merge`: every method against its kernel or mergekit, what is refused, and a merge that is killed."""

from __future__ import annotations

import io
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import search.storage.pieces
from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.parents import Parents
from search.cli.bars import MergeBar
from search.config.methods import METHODS
from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.merging.anchors.build import Progress, build
from search.merging.anchors.options import AdaptOptions, AnchorOptions
from search.merging.anchors.starts import FromExperts, FromMerge
from search.merging.methods.tsv import merge_tsv
from search.merging.methods.wudi import merge_wudi
from search.merging.oneoff.request import KNOWN, SEPARATE, read_request
from search.merging.oneoff.singular import linear_layers
from search.storage.manifest import read_manifest
from tests.conftest import Cli
from tests.merging.test_mergekit_config import differing, loaded
from tests.pico import CHAT_TEMPLATE, pico_tokenizer, save_experts, save_pico
from tests.pico_study import write_study

NAMES = ("math", "code")
SMALL = ("anchors.n=4", "anchors.tokens=3", "anchors.steps=3", "adapt.epochs=2", "adapt.batch=4")
OPTIONS = AnchorOptions(n=4, tokens=3, steps=3)
ADAPT = AdaptOptions(epochs=2, batch=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`pre` and two experts with a chat template; read them, do not change them."""
    return save_models(tmp_path_factory.mktemp("models"))


def save_models(folder: Path, **options: Any) -> dict[str, Path]:
    places = save_experts(folder, NAMES, **options)
    for place in places.values():
        pico_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(place)
    return places


def arguments(models: dict[str, Path], method: str, out: object, *more: str) -> list[str]:
    """The command line for a method, with all experts that it takes."""
    names = NAMES[: 1 if method == "slerp" else None]
    experts = [part for name in names for part in ("--expert", f"{name}={models[name]}")]
    return ["merge", method, "--pre", str(models["pre"]), *experts, "--out", str(out), *more]


def settings(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def opened(models: dict[str, Path]) -> Parents:
    return Parents.open(str(models["pre"]), {name: str(models[name]) for name in NAMES})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- every method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in KNOWN if name != SEPARATE])
def test_every_method_ships_a_checkpoint_with_all_that_belongs_to_it(
    method: str, cli: Cli, models: dict[str, Path], tmp_path: Path
) -> None:
    more = settings(*SMALL) if method == "fda" else ["--weight", "math=0.4"]
    code, out, err = cli(*arguments(models, method, "made", *more))
    assert (code, out) == (0, "made\n"), err
    assert "\r" not in err
    assert "\x1b" not in err
    assert f"made: {method} of math" in err
    assert " s\n" in err
    folder = tmp_path / "made"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
    assert (folder / "generation_config.json").read_bytes() == (
        models["math"] / "generation_config.json"
    ).read_bytes()
    manifest = read_manifest(folder)
    assert (manifest["kind"], manifest["method"], manifest["dtype"]) == ("merge", method, "float32")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest["files"].keys()
    for label, facts in manifest["parents"].items():
        assert facts["sha256"] == Checkpoint.open(models[label]).sha256()
        assert facts["where"] == str(models[label])
    code, out, err = cli("verify", folder)
    assert code == 0, err
    assert "all finite; loads with no missing" in out
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    code, out, err = cli("verify", folder)
    assert (code, "model.safetensors: was changed" in err) == (1, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_mergekit_rebuilds_the_methods_that_it_knows(
    method: str, dtype: str, cli: Cli, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", dtype=dtype)
    given = {"density": "0.4", "scaling": "0.7", "epsilon": "0.1", "gamma": "0.05", "seed": "5"}
    kind = METHODS[method]
    chosen = settings(*(f"{k}={v}" for k, v in given.items() if k in (*kind.options, "seed" * kind.seeded)))
    more = ["--weight", "math=0.7", *(["--weight", "code=0.2"] if method != "slerp" else [])]
    code, _, err = cli(*arguments(models, method, "made", *more, *chosen))
    assert code == 0, err
    config = (tmp_path / "made" / "mergekit_config.yml").read_text()
    assert ("--random-seed 5" in config) == kind.seeded
    torch.set_num_threads(1)
    options = MergeOptions(quiet=True, random_seed=5)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config)), str(tmp_path / "rebuilt"), options)
    ours = loaded(tmp_path / "made")
    assert differing(ours, loaded(tmp_path / "rebuilt")) == 0
    assert differing(ours, loaded(models["math"])) > 0
    assert {str(tensor.dtype) for tensor in ours.values()} == {f"torch.{dtype}"}


def test_weights_are_a_mean_unless_they_are_given(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    for out, more in (("plain", []), ("half", ["--weight", "code=0.5", "--weight", "math=0.5"])):
        assert cli(*arguments(models, "linear", out, *more))[0] == 0
    assert differing(loaded(tmp_path / "plain"), loaded(tmp_path / "half")) == 0
    assert read_manifest(tmp_path / "plain")["coefficients"] == {"math": 0.5, "code": 0.5}


@pytest.mark.parametrize("tied", [True, False])
def test_tsv_and_wudi_are_their_kernels_on_linear_layers(tied: bool, cli: Cli, tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", tied=tied)
    parents = opened(models)
    linear = linear_layers(parents)
    assert len(linear) == 2 * 7
    assert not any("lm_head" in name or "norm" in name or "embed" in name for name in linear)
    assert cli(*arguments(models, "tsv", "tsv", "--weight", "code=0.5"))[0] == 0
    chosen = settings("scaling=0.8", "steps=20", "rate=1e-3")
    assert cli(*arguments(models, "wudi", "wudi", *chosen))[0] == 0
    tsv, wudi = Checkpoint.open(tmp_path / "tsv"), Checkpoint.open(tmp_path / "wudi")
    for name in parents.names:
        pre, *experts = (one.tensor(name) for one in parents.everybody)
        if name in linear:
            assert torch.equal(tsv.tensor(name), merge_tsv(pre, experts, [1.0, 0.5]))
            wanted = merge_wudi(pre, experts, [1.0, 1.0], scaling=0.8, steps=20, rate=1e-3)
            assert torch.equal(wudi.tensor(name), wanted)
        else:
            mean = pre + 0.5 * (experts[0] - pre) + 0.25 * (experts[1] - pre)
            torch.testing.assert_close(tsv.tensor(name), mean, rtol=0, atol=1e-6)
            assert torch.equal(wudi.tensor(name), pre)


@pytest.mark.parametrize("start", ["pre", "0.5", "other"])
def test_fda_is_the_build_from_every_start(
    start: str, cli: Cli, models: dict[str, Path], tmp_path: Path
) -> None:
    parents = opened(models)
    begun: Any = {"pre": None, "0.5": FromExperts((0.5, 0.5))}.get(start)
    if start == "other":
        assert cli(*arguments(models, "tsv", "other"))[0] == 0
        begun = FromMerge(Checkpoint.open(tmp_path / "other"))
    code, _, err = cli(*arguments(models, "fda", "made", *settings(*SMALL, f"start={start}")))
    assert code == 0, err
    assert "block 1: distance to the experts" in err
    assert "6 pieces computed, 0 were there" in err
    wanted = build(parents, tmp_path / "wanted", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT, start=begun)
    made = content(tmp_path / "made")
    manifest = made.pop("manifest.json")
    assert made == content(wanted.folder)
    (work,) = (tmp_path / "runs" / "anchors").iterdir()
    assert content(work) == content(tmp_path / "work"), "anchors and blocks lie there"
    # The next start finds its anchors, the same merge everything; what was computed says the same.
    code, _, err = cli(*arguments(models, "fda", "again", *settings(*SMALL, "start=0.25")))
    assert "2 pieces computed, 4 were there" in err
    code, _, err = cli(*arguments(models, "fda", "made", *settings(*SMALL, f"start={start}"), "--overwrite"))
    assert "0 pieces computed, 6 were there" in err
    assert (tmp_path / "made" / "manifest.json").read_bytes() == manifest


def test_a_weight_is_an_experts_own_start(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    more = settings(*SMALL, "start=0.5", "adapt.epochs=0")
    assert cli(*arguments(models, "fda", "made", *more, "--weight", "code=0.2"))[0] == 2, "epochs twice"
    more = settings(*SMALL[:3], "start=0.5", "adapt.epochs=0")
    assert cli(*arguments(models, "fda", "made", *more, "--weight", "code=0.2"))[0] == 0
    plain = ["--weight", "math=0.5", "--weight", "code=0.2"]
    assert cli(*arguments(models, "linear", "linear", *plain))[0] == 0
    assert differing(loaded(tmp_path / "made"), loaded(tmp_path / "linear")) == 0


def test_quiet_says_nothing(cli: Cli, models: dict[str, Path]) -> None:
    assert cli("-q", *arguments(models, "fda", "made", *settings(*SMALL))) == (0, "made\n", "")


def test_the_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*, terminal: bool, quiet: bool = False) -> str:
        stream = io.StringIO()
        with MergeBar(Console(file=stream, force_terminal=terminal), quiet=quiet) as bar:
            bar.watch(Progress("construct", 3, "math", 25, 100, 2, 10, 0.5))
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "construct block 3 math 0.5" in drawn(terminal=True)
    assert "22 %" in drawn(terminal=True)
    assert drawn(terminal=True, quiet=True) == drawn(terminal=False) == ""
    monkeypatch.setenv("NO_COLOR", "1")
    assert drawn(terminal=True) == ""


# -- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_a_killed_fda_goes_on_to_the_same_bytes(
    stop: int, cli: Cli, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(*SMALL, "start=0.5")
    assert cli(*arguments(models, "fda", tmp_path / "out", *asked, "--work", "whole"))[0] == 0
    whole = content(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    child = os.fork()
    if not child:
        with suppress(BaseException):
            _die_at(stop, monkeypatch)
            cli(*arguments(models, "fda", tmp_path / "out", *asked, "--work", "work"))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == stop
    code, _, err = cli(*arguments(models, "fda", tmp_path / "out", *asked, "--work", "work"))
    assert code == 0, err
    assert f"{6 - stop} pieces computed, {stop} were there" in err
    assert content(tmp_path / "out") == whole
    assert content(tmp_path / "work") == content(tmp_path / "whole")


def _die_at(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many pieces: within the next one, or within the checkpoint."""
    write, written = search.storage.pieces.write_whole, []

    def strike(path: Path, data: bytes) -> None:
        if len(written) == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)
        written.append(path)

    monkeypatch.setattr(search.storage.pieces, "write_whole", strike)
    if stop == 6:
        monkeypatch.setattr(
            "search.merging.oneoff.make.write_manifest", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )


# -- refusals ------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_nothing_is_written(
    cli: Cli, models: dict[str, Path], tmp_path: Path
) -> None:
    wide = save_pico(tmp_path / "wide", seed=3, intermediate_size=72)
    before = sorted(tmp_path.rglob("*"))
    base = ["--pre", str(models["pre"]), "--out", "made"]
    both = [f"--expert={name}={models[name]}" for name in NAMES]

    def refused(code: int, message: str, *given: str) -> None:
        found, out, err = cli("merge", *given)
        assert (found, out) == (code, ""), err
        assert message in err
        assert err.strip().startswith("error: ")
        assert len(err.strip().splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before

    refused(2, "'tiess' is no merge method. Did you mean 'ties'?", "tiess", *base, *both)
    refused(2, "--expert: found 0, wanted 1 to 16", "ties", *base)
    refused(2, "--expert math: given twice", "ties", *base, both[0], both[0])
    refused(2, "--expert pre: wanted a name", "ties", *base, f"--expert=pre={models['math']}")
    refused(2, "wanted math=...", "wudi", *base, f"--expert={models['math']}")
    refused(2, "slerp merges a single expert, found 2", "slerp", *base, *both)
    refused(2, "karcher merges at least 2 experts, found 1", "karcher", *base, both[0])
    refused(2, "linear of one expert needs one", "linear", *base, both[0])
    refused(
        3,
        "math: every tensor is as in pre, so its task vector is zero",
        "ties",
        *base,
        f"--expert=math={models['pre']}",
    )
    refused(
        3,
        "b: every tensor is as in math, so its task vector is counted twice",
        "ties",
        *base,
        both[0],
        f"--expert=b={models['math']}",
    )
    refused(3, "intermediate_size: 64 in pre but 72 in wide", "tsv", *base, f"--expert=wide={wide}")
    refused(3, "no such folder", "tsv", *base, "--expert=math=./nowhere")
    refused(
        2,
        "--weight cod: there is no such expert. Did you mean 'code'?",
        "ties",
        *base,
        *both,
        "--weight=cod=1",
    )
    refused(2, "--weight code: given twice", "ties", *base, *both, "--weight=code=1", "--weight=code=1")
    refused(2, "--weight code: found 'x', wanted a number", "ties", *base, *both, "--weight=code=x")
    refused(2, "--set density: found 0, wanted above 0, at most 1", "ties", *base, *both, "--set=density=0")
    refused(2, "--set density: found 1.5", "ties", *base, *both, "--set=density=1.5")
    refused(2, "--set density: found 'nan', wanted a number", "ties", *base, *both, "--set=density=nan")
    refused(2, "ties has no such option. Did you mean 'density'?", "ties", *base, *both, "--set=densty=0.5")
    refused(2, "tsv has no such option. It has none.", "tsv", *base, *both, "--set=density=0.5")
    refused(2, "--set seed: found 4294967296", "dare_ties", *base, *both, "--set=seed=4294967296")
    refused(2, "wudi: -1 steps", "wudi", *base, *both, "--set=steps=-1")
    refused(2, "--set steps: found '1.5', wanted a whole number", "wudi", *base, *both, "--set=steps=1.5")
    refused(2, "anchors.n: found 0", "fda", *base, *both, "--set=anchors.n=0")
    refused(2, "--set anchors.n: found 'true'", "fda", *base, *both, "--set=anchors.n=true")
    refused(2, "Did you mean 'anchors.n'?", "fda", *base, *both, "--set=anchor.n=4")
    refused(2, "init: data takes token ids", "fda", *base, *both, "--set=anchors.init=data")
    refused(2, "--weight: start=pre has none", "fda", *base, *both, "--weight=math=1")
    refused(3, "no such folder", "fda", *base, *both, "--set=start=./nowhere")
    refused(
        3,
        "so its task vector is zero. Give another merge",
        "fda",
        *base,
        *both,
        f"--set=start={models['pre']}",
    )
    refused(3, "Give a merge of the same models", "fda", *base, *both, f"--set=start={wide}")
    refused(2, "wanted auto, cpu", "fda", *base, *both, "--device=tpu")
    refused(1, "wide: exists. Give another --out", "ties", *base[:2], "--out=wide", *both)
    refused(1, "is not a merge of mergefront", "ties", *base[:2], "--out=wide", *both, "--overwrite")


def test_a_merge_does_not_replace_what_it_is_made_from(
    cli: Cli, models: dict[str, Path], tmp_path: Path
) -> None:
    assert cli(*arguments(models, "tsv", "start"))[0] == 0
    made = content(tmp_path / "start")
    more = settings(*SMALL, "start=start")
    code, _, err = cli(*arguments(models, "fda", "start", *more, "--overwrite"))
    assert (code, "which is merged. Give another --out" in err) == (2, True)
    assert content(tmp_path / "start") == made


@pytest.mark.parametrize("method", KNOWN)
def test_a_request_knows_every_option_of_its_method(method: str) -> None:
    experts = ["a=x"] if method == "slerp" else ["a=x", "b=y"]
    asked = read_request(method, "pre", experts, ["a=0.5"] if method != "fda" else [], [])
    again = [f"{key}={value}" for key, value in asked.options.items() if value is not None and value != ()]
    weights = [f"{name}={value}" for name, value in zip(asked.experts, asked.coefficients, strict=False)]
    assert read_request(method, "pre", experts, weights, again) == asked


def test_sigmas_are_a_list() -> None:
    asked = read_request("fda", "p", ["a=x"], [], ["anchors.init=gauss", "anchors.sigmas=[0.1, 1]"])
    assert asked.anchors.sigmas == (0.1, 1.0)
    with pytest.raises(ConfigError, match="wanted numbers"):
        read_request("fda", "p", ["a=x"], [], ["anchors.sigmas=[a]"])


# -- in a study ----------------------------------------------------------------------------------------------------


def test_a_merge_stands_on_a_studys_board_as_an_expert(cli: Cli, tmp_path: Path) -> None:
    import json

    study = write_study(tmp_path / "study", experts=NAMES, trials=2)
    models = {name: tmp_path / "study" / name for name in ("pre", *NAMES)}
    code, _, err = cli(*arguments(models, "fda", tmp_path / "study" / "fda", *settings(*SMALL)))
    assert code == 0, err
    study.write_text(study.read_text().replace("    code: ./code\n", "    code: ./code\n    fda: ./fda\n"))
    assert list(load_study_file(study).parents.post_trained) == [*NAMES, "fda"]
    code, _, err = cli("launch", study)
    assert code == 0, err
    code, out, _ = cli("front", "pico", "--format", "json")
    rows = {row["label"]: row for row in json.loads(out)["trials"]}
    assert rows["fda"]["kind"] == rows["math"]["kind"]
    for split in ("search", "report"):
        assert 0.0 <= rows["fda"][split]["accuracy"]["value"] <= 1.0
    coefficients = rows["fda"]["recipe"]["coefficients"]
    assert {coefficients[name] for name in coefficients if name.startswith("fda/")} == {1.0}
    assert {coefficients[name] for name in coefficients if not name.startswith("fda/")} == {0.0}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("wudi", ["--set=steps=5", "--set=rate=1", "--set=scaling=3e38"]),
        ("linear", ["--weight=math=3e38", "--weight=code=-3e38"]),
    ],
)
def test_what_is_not_finite_is_not_written(
    method: str, more: list[str], models: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    code, out, err = cli(*arguments(models, method, tmp_path / "out", *more))
    assert code != 0
    assert out == ""
    assert "a merged value is not finite in float32. Use smaller weights" in err
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range_are_one_line(models: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for method, more, wanted in (
        ("wudi", "--set=rate=1e300", "wanted 0 to 1,000,000 steps, a rate above 0, at most 1"),
        ("fda", "--set=adapt.seed=99999999999999999999999", "adapt.seed: found 9999"),
        ("fda", "--set=anchors.tokens=100000", "wanted a whole number, 1 to 8,192"),
    ):
        code, _, err = cli(*arguments(models, method, out, more))
        assert code == 2
        assert wanted in err
    zero = ["--weight=math=0", "--weight=code=0"]
    for method in ("karcher", "multislerp", "model_stock"):
        code, _, err = cli(*arguments(models, method, out, *zero))
        assert code == 2
        assert f"{method} takes a mean, so not all may be 0" in err
    code, _, err = cli(*arguments(models, "linear", tmp_path / ("x" * 300)))
    assert code == 4
    assert "File name too long" in err
    code, _, err = cli(*arguments({**models, "pre": tmp_path / ("x" * 300)}, "linear", out))
    assert code == 3
    assert "File name too long" in err
