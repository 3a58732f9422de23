"""Output diversity: known values, laws, sacrebleu itself, equivalence by models, and the registry."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import sentence_bleu
from scipy.stats import entropy

from objectives.generation.sampler import AnswerSampler, Decoding, Generations
from objectives.metrics.bootstrap import resample_weights
from objectives.metrics.diversity import (
    DIVERSITY_NAMES,
    Diversity,
    distinct_n,
    get_diversity_metric,
    measure_diversity,
    self_bleu,
    semantic_clusters,
    semantic_entropy,
)
from search.checkpoints.equivalence import EmbeddingEquivalence, EntailmentEquivalence
from search.errors import CheckpointError, ConfigError, EvaluationError, MergefrontError
from tests.pico import block_network, pico_config, pico_model, pico_tokenizer, save_pico

LAW = settings(deadline=None, max_examples=60)
WORDS = st.sampled_from(["the", "fox", "runs", "Fox", "so", "far", "it", "is", ",", "\n", "&lt;", "né"])
ANSWER = st.lists(WORDS, max_size=8).map(" ".join)
ANSWERS = st.integers(2, 5).flatmap(
    lambda s: st.lists(st.lists(ANSWER, min_size=s, max_size=s), min_size=1, max_size=3)
)


class SameLength:
    """Answers with as many characters are equivalent; what it was asked is kept."""

    title = "same length"

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, prompt: str, answers: Sequence[str]) -> np.typing.NDArray[np.bool_]:
        self.asked.append((prompt, tuple(answers)))
        length = np.array([len(answer) for answer in answers])
        return np.asarray(length[:, None] == length)


def semantic(texts: Any) -> Any:
    return semantic_entropy(semantic_clusters([""] * len(texts), texts, SameLength()))


MEASURES: dict[str, Any] = {
    "distinct-1": lambda texts: distinct_n(texts, 1),
    "distinct-2": lambda texts: distinct_n(texts, 2),
    "self-bleu": self_bleu,
    "semantic-entropy": semantic,
}


@pytest.mark.parametrize("name", MEASURES)
@LAW
@given(texts=ANSWERS, data=st.data())
def test_order_range_and_prompts_apart(name: str, texts: list[list[str]], data: st.DataObject) -> None:
    measure, metric = MEASURES[name], get_diversity_metric(name)
    values = measure(texts)
    assert values.shape == (len(texts),)
    assert values.dtype == np.float64
    best = min(metric.best, math.log(len(texts[0])) if metric.maximize else 0.0) if name[0] == "s" else 1.0
    assert (values >= min(metric.worst, best) - 1e-12).all()
    assert (values <= max(metric.worst, best) + 1e-12).all()
    order = data.draw(st.permutations(range(len(texts[0]))))
    np.testing.assert_allclose(measure([[row[i] for i in order] for row in texts]), values, atol=1e-12)
    np.testing.assert_array_equal([measure([row])[0] for row in texts], values)


@LAW
@given(answer=ANSWER, s=st.integers(2, 5))
def test_equal_answers_have_no_diversity(answer: str, s: int) -> None:
    same = [[answer] * s]
    assert self_bleu(same)[0] == pytest.approx(1.0, abs=1e-12)
    assert semantic(same)[0] == 0.0
    assert 0.0 < distinct_n(same, 1)[0] <= 1 / s + 1e-12
    assert 0.0 < distinct_n(same, 2)[0] <= 1 / s + 1e-12


@LAW
@given(texts=ANSWERS)
def test_a_repeated_answer_lowers_diversity(texts: list[list[str]]) -> None:
    more = [[*answers, *answers] for answers in texts]
    for n in (1, 2, 3):
        np.testing.assert_allclose(distinct_n(more, n), distinct_n(texts, n) / 2)
    np.testing.assert_allclose(self_bleu(more), 1.0)  # each answer has its twin
    np.testing.assert_allclose(semantic(more), semantic(texts), atol=1e-12)


def test_answers_without_a_common_word_have_all_diversity() -> None:
    texts = [["one two three", "four five six", "seven eight nine"]]
    assert self_bleu(texts).tolist() == [0.0]
    assert distinct_n(texts, 1).tolist() == distinct_n(texts, 2).tolist() == [1.0]
    assert semantic_entropy([[0, 1, 2]])[0] == pytest.approx(math.log(3))


@LAW
@given(answers=st.lists(ANSWER.filter(lambda text: text.split() != []), min_size=2, max_size=5))
def test_self_bleu_is_sacrebleus_sentence_bleu(answers: list[str]) -> None:
    direct = [
        sentence_bleu(answer, answers[:i] + answers[i + 1 :]).score / 100.0
        for i, answer in enumerate(answers)
    ]
    assert self_bleu([answers])[0] == pytest.approx(np.mean(direct), abs=1e-12)


def test_distinct_n_by_hand() -> None:
    # the fox . the hen . | the fox : 5 + 2 words, 4 + 1 bigrams... of which "the fox" twice
    texts = [["the fox. the hen", "the fox"], ["yes", "No"], ["yes", "yes"], ["", "yes"], ["", ""]]
    assert distinct_n(texts, 1).tolist() == [4 / 7, 1.0, 0.5, 1.0, 0.5]
    # Without a word pair the whole answer counts.
    assert distinct_n(texts, 2).tolist() == [4 / 5, 1.0, 0.5, 1.0, 0.5]
    assert distinct_n([["a b c", "a b d"]], 2).tolist() == [3 / 4]


def test_answers_without_words() -> None:
    texts = [["", " \n", "", "\t"], ["", "yes", "so", "no"], ["", "", "yes", "yes"]]
    assert self_bleu(texts).tolist() == [1.0, 0.0, 1.0]
    assert distinct_n(texts, 1).tolist() == [0.25, 1.0, 0.5]
    found = semantic(texts).tolist()
    assert found == pytest.approx([0.0, entropy([1, 1, 2]), math.log(2)])  # "so" and "no" are as long


@LAW
@given(clusters=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4))
def test_semantic_entropy_is_the_entropy_of_frequencies(clusters: list[list[int]]) -> None:
    wanted = [entropy(np.bincount(row)) for row in clusters]
    np.testing.assert_allclose(semantic_entropy(clusters), wanted, atol=1e-12)
    coarser = [[label // 2 for label in row] for row in clusters]
    assert (semantic_entropy(coarser) <= semantic_entropy(clusters) + 1e-12).all()


def test_clusters_are_found_as_in_the_paper_and_equal_texts_are_not_asked_for() -> None:
    same = SameLength()
    texts = [["aa", " bb", "c", "aa\n", ""], ["x", "x", "x ", "", ""], ["", "", "", "", ""]]
    found = semantic_clusters(["one", "two", "three"], texts, same)
    assert found.tolist() == [[0, 0, 1, 0, 2], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert same.asked == [("one", ("aa", "bb", "c"))]

    class Chain(SameLength):  # not transitive: each is equivalent to its neighbours only
        def __call__(self, prompt: str, answers: Sequence[str]) -> Any:
            return np.abs(np.subtract.outer(np.arange(len(answers)), np.arange(len(answers)))) <= 1

    assert semantic_clusters(["p"], [["a", "b", "c", "d"]], Chain()).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("texts", [[["only one"]], [[]], [["a", "b"], ["c"]], [["a", "b"], ["c", "d", "e"]]])
def test_one_answer_is_no_diversity(name: str, texts: list[list[str]]) -> None:
    with pytest.raises(ConfigError, match=r"prompt \d has \d answers \(wanted at least 2") as caught:
        MEASURES[name](texts)
    assert "\n" not in str(caught.value)


def test_prompts_and_answers_must_be_as_many() -> None:
    with pytest.raises(ConfigError, match="1 prompts, but answers to 2"):
        semantic_clusters(["p"], [["a", "b"], ["a", "b"]], SameLength())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "nli")


def save_classifier(folder: Path, labels: Sequence[str] = ("contradiction", "neutral", "Entailment")) -> Path:
    from transformers import AutoModelForSequenceClassification

    config = pico_config(
        "llama", id2label=dict(enumerate(labels)), label2id={k: i for i, k in enumerate(labels)}
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def test_embeddings_are_means_of_hidden_states(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    block_network(monkeypatch)
    answers = ["the fox", "a hen runs away from it", "the fox.", "x"]
    model, tokenizer = AutoModel.from_pretrained(encoder), pico_tokenizer()
    vectors = []
    with torch.inference_mode():
        for answer in answers:
            ids = torch.tensor([tokenizer(answer)["input_ids"]])
            vectors.append(model(ids).last_hidden_state[0].double().mean(dim=0))
    unit = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
    cosine = (unit @ unit.T).numpy()
    between = np.sort(cosine[np.triu_indices(4, 1)])
    for threshold in (between[:-1] + between[1:]) / 2:
        if threshold > 0:
            same = EmbeddingEquivalence(encoder, threshold=float(threshold))("ignored", answers)
            assert np.array_equal(same, cosine >= threshold)
    assert np.array_equal(EmbeddingEquivalence(encoder, threshold=1.0)("", ["a", "b"]), np.eye(2))


def test_entailment_must_hold_both_ways(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForSequenceClassification

    block_network(monkeypatch)
    predicate = EntailmentEquivalence(classifier)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(classifier), pico_tokenizer()
    answers = [f"answer {word}" for word in ("a", "bc", "def", "x y", "0", "12?", "zz", "ever", "no")]
    found = predicate("Which?", answers)
    assert np.array_equal(found, found.T)
    assert found.diagonal().all()
    assert 9 < found.sum() < 81  # 72 ordered pairs: two batches
    with torch.inference_mode():
        for i, one in enumerate(answers):
            for j, other in enumerate(answers[:i]):
                both = [
                    model(**tokenizer(f"Which? {a}", f"Which? {b}", return_tensors="pt")).logits.argmax()
                    for a, b in ((one, other), (other, one))
                ]
                assert found[i, j] == (both[0] == both[1] == 2)


def test_long_texts_are_cut_where_the_answer_is_not(classifier: Path, encoder: Path) -> None:
    long = "word " * 300  # the models read 512 characters
    predicate = EntailmentEquivalence(classifier)
    found = predicate(long, ["a", "bc", "def"])
    assert found.shape == (3, 3)
    assert EmbeddingEquivalence(encoder, threshold=0.5)("", [long, long + "x"]).all()


@pytest.mark.parametrize(
    "kind", [EntailmentEquivalence, lambda folder: EmbeddingEquivalence(folder, threshold=0.9)]
)
def test_folders_that_are_no_safe_model_are_refused(kind: Any, encoder: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(encoder, tmp_path / name))

    def refused(folder: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            kind(folder)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "no such folder")
    pickled = copied("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, "pickled weights are never opened")
    remote = copied("remote")
    config = (remote / "config.json").read_text()
    (remote / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModel": "evil.Model"},', 1))
    refused(remote, "brings code of its own")
    bare = copied("bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(bare, "no tokenizer")
    partial = copied("partial")
    from safetensors.torch import load_file, save_file

    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    refused(partial, r"missing\. It is not a checkpoint for AutoModel")


def test_models_of_the_wrong_kind(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"score\.weight: missing"):
        EntailmentEquivalence(encoder)
    with pytest.raises(CheckpointError, match=r"no class called entailment \(its classes: good, bad\)"):
        EntailmentEquivalence(save_classifier(tmp_path / "other", ("good", "bad")))
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="threshold is"):
            EmbeddingEquivalence(encoder, threshold=threshold)


def test_titles_tell_models_and_rules_apart(encoder: Path, classifier: Path, tmp_path: Path) -> None:
    other = save_pico(tmp_path / "other", seed=1)
    titles = {
        EmbeddingEquivalence(encoder, threshold=0.9).title,
        EmbeddingEquivalence(encoder, threshold=0.8).title,
        EmbeddingEquivalence(other, threshold=0.9).title,
        EntailmentEquivalence(classifier).title,
    }
    assert len(titles) == 4
    moved = shutil.copytree(encoder, tmp_path / "moved")
    assert EmbeddingEquivalence(moved, threshold=0.9).title in titles


PROMPTS = ["What?", "Why is it so?", "Tell me"]


@pytest.fixture(scope="module")
def generations() -> Generations:
    decoding = Decoding(samples=4, max_new_tokens=24)
    return AnswerSampler(pico_model(), pico_tokenizer(), PROMPTS, decoding).generate()


def test_all_diversities_of_some_generations(generations: Generations, tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    texts = generations.texts(tokenizer)
    found = measure_diversity(generations, tokenizer, PROMPTS, SameLength())
    assert tuple(found.values) == DIVERSITY_NAMES == tuple(MEASURES)
    assert len(found) == 3
    for name, measure in MEASURES.items():
        np.testing.assert_array_equal(found.values[name], measure(texts))
        metric = get_diversity_metric(name)
        assert metric.value(found) == pytest.approx(float(np.mean(found.values[name])))
    assert found.digest == generations.digest
    digest = found.save(tmp_path / "d")
    again = Diversity.load(tmp_path / "d", sha256=digest, digest=generations.digest)
    assert again.save(tmp_path / "e") == digest
    assert (again.digest, again.equivalence) == (found.digest, "same length")
    for name in DIVERSITY_NAMES:
        np.testing.assert_array_equal(again.values[name], found.values[name])
    with pytest.raises(EvaluationError, match="about other questions"):
        Diversity.load(tmp_path / "d", digest="0" * 64)
    with pytest.raises(EvaluationError, match="format is 'mergefront-diversity-1'"):
        Generations.load(tmp_path / "d")


def test_without_a_model_there_is_no_semantic_entropy(generations: Generations) -> None:
    found = measure_diversity(generations, pico_tokenizer(), PROMPTS)
    assert tuple(found.values) == ("distinct-1", "distinct-2", "self-bleu")
    assert found.equivalence == ""
    with pytest.raises(
        ConfigError, match="semantic-entropy: was not measured; it needs an equivalence model"
    ):
        get_diversity_metric("semantic-entropy")(found)
    assert [name for name in DIVERSITY_NAMES if get_diversity_metric(name).needs_model] == [
        "semantic-entropy"
    ]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"distinct-1": np.zeros((2, 2))},
        {"distinct-1": np.zeros(2), "self-bleu": np.zeros(3)},
        {"distinct-1": np.array([0.5, np.nan])},
    ],
)
def test_values_that_are_no_diversity(values: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(EvaluationError, match=r"^diversity: "):
        Diversity(values, "")
    save_file(values, tmp_path / "d", {"format": "mergefront-diversity-1"})
    with pytest.raises(EvaluationError, match="/d: "):
        Diversity.load(tmp_path / "d")


def diversity_of(values: Sequence[float]) -> Diversity:
    return Diversity({name: np.array(values, dtype=np.float64) for name in DIVERSITY_NAMES}, "")


@pytest.mark.parametrize("name", DIVERSITY_NAMES)
@LAW
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=8), data=st.data())
def test_integer_weights_are_repeated_prompts(name: str, values: list[float], data: st.DataObject) -> None:
    counts = st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)).filter(any)
    weights = np.array(data.draw(st.lists(counts, min_size=1, max_size=3)), dtype=np.float64)
    metric = get_diversity_metric(name)
    found = metric(diversity_of(values), weights)
    wanted = [metric.value(diversity_of(np.repeat(values, row.astype(int)).tolist())) for row in weights]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("name", DIVERSITY_NAMES)
def test_intervals_stay_in_the_range(name: str) -> None:
    metric = get_diversity_metric(name)
    one = diversity_of([0.0, 0.1, 0.9, 1.0, 1.0])
    samples = metric(one, resample_weights(5, 200))
    low, high = metric.interval(metric.value(one), samples)
    assert 0.0 <= low < metric.value(one) < high
    assert high <= 1.0 or name == "semantic-entropy"
    with pytest.raises(EvaluationError, match=r"^weights: "):
        metric(one, np.ones((1, 4)))
    with pytest.raises(EvaluationError, match="there are no questions"):
        metric(diversity_of([]))


def test_directions_and_reference_points() -> None:
    found = {
        name: (get_diversity_metric(name).maximize, get_diversity_metric(name).worst)
        for name in DIVERSITY_NAMES
    }
    assert found == {
        "distinct-1": (True, 0.0),
        "distinct-2": (True, 0.0),
        "self-bleu": (False, 1.0),
        "semantic-entropy": (True, 0.0),
    }


@pytest.mark.parametrize("name", ["distinct-3", "Self-BLEU", "", "accuracy", "selfbleu", "self-bleu@arc"])
def test_unknown_names_are_refused_with_a_hint(name: str) -> None:
    with pytest.raises(ConfigError, match="no diversity called") as caught:
        get_diversity_metric(name)
    assert ("Did you mean" in str(caught.value)) == (name not in ("", "accuracy"))
    assert isinstance(caught.value, MergefrontError)
    assert "\n" not in str(caught.value)
