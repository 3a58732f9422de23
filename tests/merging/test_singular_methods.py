"""TSV-Merge and WUDI against their definitions; mergekit has neither."""

from __future__ import annotations

import pytest
import torch

from search.errors import MergeError
from search.merging.methods.tsv import merge_tsv, tsv_directions
from search.merging.methods.wudi import merge_wudi, wudi_direction
from tests.mergekit_oracle import registry_names, same_bits


def family(
    count: int, shape: tuple[int, ...] = (12, 20), spread: float = 0.1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(count)
    base = torch.randn(shape, generator=draw)
    return base, [base + spread * torch.randn(shape, generator=draw) for _ in range(count)]


def plain_tsv(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The definition, with the polar factors from singular value decompositions."""
    rank = min(vectors[0].shape) // len(vectors)
    parts = [torch.linalg.svd(vector.double(), full_matrices=False) for vector in vectors]
    polars = []
    for sides in ([u[:, :rank] for u, _, _ in parts], [vh[:rank].T for _, _, vh in parts]):
        left, _, right = torch.linalg.svd(torch.cat(sides, dim=1), full_matrices=False)
        polars.append((left @ right).split(rank, dim=1))
    return [(a * s[:rank] @ b.T).float() for a, b, (_, s, _) in zip(*polars, parts, strict=True)]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)])
def test_tsv_is_its_definition(count: int, shape: tuple[int, int]) -> None:
    base, experts = family(count, shape)
    directions = tsv_directions(base, experts)
    for found, wanted in zip(directions, plain_tsv([e - base for e in experts]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    rank = min(shape) // count
    parts = [torch.linalg.svd(d.double(), full_matrices=False) for d in directions]
    for columns in (
        torch.cat([u[:, :rank] for u, _, _ in parts], dim=1),
        torch.cat([vh[:rank].T for _, _, vh in parts], dim=1),
    ):
        torch.testing.assert_close(
            columns.T @ columns, torch.eye(rank * count, dtype=torch.float64), rtol=0, atol=1e-5
        )
    for direction, expert in zip(directions, experts, strict=True):
        kept = torch.linalg.svdvals(expert - base)[:rank]
        torch.testing.assert_close(torch.linalg.svdvals(direction)[:rank], kept, rtol=1e-4, atol=1e-6)


def test_one_expert_comes_back_from_tsv() -> None:
    for shape in ((12, 20), (20, 12), (7,), (2, 3, 4)):
        base, experts = family(1, shape)
        torch.testing.assert_close(merge_tsv(base, experts, [1.0]), experts[0], rtol=0, atol=1e-6)


def test_tsv_is_linear_in_the_weights() -> None:
    base, experts = family(3)
    directions = tsv_directions(base, experts)
    weights = [0.7, -0.4, 0.0]
    merged = merge_tsv(base, experts, weights)
    assert same_bits(merged, merge_tsv(base, experts, weights, directions=directions))
    by_hand = base + sum(w * d for w, d in zip(weights, directions, strict=True))
    torch.testing.assert_close(merged, by_hand)
    assert same_bits(merge_tsv(base, experts, [0.0] * 3), base)


def test_tsv_at_its_edges() -> None:
    base, (first, second) = family(2)
    assert all(not d.any() for d in tsv_directions(base, [base, base]))
    # A zero task vector takes no rank away.
    alone = tsv_directions(base, [first, base])
    torch.testing.assert_close(base + alone[0], first)
    assert not alone[1].any()
    # Equal experts: each gives half of their common task vector, truncated to half the rank.
    u, s, vh = torch.linalg.svd(first - base, full_matrices=False)
    half = tsv_directions(base, [first, first.clone()])
    torch.testing.assert_close(half[0] + half[1], u[:, :6] * s[:6] @ vh[:6], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(half[0], half[1])
    # Opposite experts lie in the same planes, too.
    opposite = tsv_directions(base, [first, 2 * base - first])
    torch.testing.assert_close(opposite[0], -opposite[1], rtol=1e-4, atol=1e-5)
    # Vectors are averaged; more experts than dimensions keep one triplet each.
    row = tsv_directions(base[0], [first[0], second[0]])
    torch.testing.assert_close(row[0], (first[0] - base[0]) / 2)
    many_base, many = family(5, (3, 4))
    assert [int(torch.linalg.matrix_rank(d, tol=1e-4)) for d in tsv_directions(many_base, many)] == [1] * 5
    low = torch.outer(torch.arange(12.0), torch.arange(20.0)) / 100
    rank_one = tsv_directions(base, [base + low, second])
    assert int(torch.linalg.matrix_rank(rank_one[0], tol=1e-4)) == 1
    with pytest.raises(MergeError, match="not finite"):
        tsv_directions(base, [first, first / 0.0])


def plain_wudi(vectors: list[torch.Tensor], steps: int, rate: float) -> torch.Tensor:
    """The definition: the loss as it is written, its gradient by torch."""
    merged = torch.stack(vectors).sum(0).requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [((merged - v) @ v.T).square().sum() / v.square().sum() for v in vectors]
        torch.stack(losses).sum().backward()
        optimizer.step()
    return merged.detach()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("spread", [0.1, 1e-3])
def test_wudi_is_its_definition(count: int, shape: tuple[int, int], spread: float) -> None:
    base, experts = family(count, shape, spread)
    vectors = [expert - base for expert in experts]
    direction = wudi_direction(base, experts, [1.0] * count)
    wanted = plain_wudi(vectors, 300, 1e-5)
    moved = float((wanted - sum(vectors)).abs().max())
    assert 1e-3 < moved < 4e-3
    assert float((direction - wanted).abs().max()) < 1e-3 * moved


def test_wudi_lowers_its_loss() -> None:
    base, experts = family(3)
    vectors = [expert - base for expert in experts]

    def loss(merged: torch.Tensor) -> float:
        return sum(float(((merged - v) @ v.T).square().sum() / v.square().sum()) for v in vectors)

    direction = wudi_direction(base, experts, [1.0] * 3)
    further = wudi_direction(base, experts, [1.0] * 3, steps=1000, rate=1e-3)
    assert loss(further) < 0.5 * loss(direction) < 0.5 * loss(sum(vectors[1:], vectors[0]))


def test_wudi_at_its_edges() -> None:
    base, (first, second) = family(2)
    assert same_bits(wudi_direction(base, [first], [1.0]), first - base)
    assert same_bits(wudi_direction(base, [first, base], [1.0, 1.0]), first - base)
    assert same_bits(wudi_direction(base, [first, second], [0.0, 1.0]), second - base)
    assert not wudi_direction(base, [base, base], [1.0, 1.0]).any()
    assert same_bits(merge_wudi(base, [base, base], [1.0, 1.0]), base)
    assert same_bits(merge_wudi(base[0], [first[0], second[0]], [1.0, 1.0]), base[0])
    assert not wudi_direction(base[:0], [first[:0]], [1.0]).numel()
    summed = wudi_direction(base, [first, second], [0.5, -1.0], steps=0)
    torch.testing.assert_close(summed, 0.5 * (first - base) - (second - base))
    tiny = wudi_direction(base, [first, second], [1e-34, 1e-34])
    assert float(tiny.abs().max()) < 1e-5  # Adam alone; no division by a norm that underflows
    direction = wudi_direction(base, [first, second], [1.0, 1.0])
    half = merge_wudi(base, [first, second], [1.0, 1.0], scaling=0.5, direction=direction)
    torch.testing.assert_close(half, base + 0.5 * direction)
    scaled = [(base + 0.5 * (e - base)) for e in (first, second)]
    torch.testing.assert_close(
        wudi_direction(base, [first, second], [0.5, 0.5]),
        wudi_direction(base, scaled, [1, 1]),
        rtol=0,
        atol=1e-5,
    )


def test_refusals() -> None:
    base, experts = family(2)
    for call in (
        lambda: merge_tsv(base, [], []),
        lambda: merge_tsv(base, experts, [1.0]),
        lambda: merge_tsv(base, experts, [1.0, float("nan")]),
        lambda: merge_tsv(base, [experts[0], experts[1].T], [1.0, 1.0]),
        lambda: merge_tsv(base, experts, [1.0, 1.0], directions=[base[0], base[0]]),
        lambda: merge_tsv(base, experts, [1.0, 1.0], directions=[base]),
        lambda: tsv_directions(base, [experts[0].half()]),
        lambda: merge_wudi(base, [], []),
        lambda: merge_wudi(base, experts, [1.0]),
        lambda: merge_wudi(base, experts, [1.0, float("inf")]),
        lambda: merge_wudi(base, experts, [1.0, 1.0], scaling=float("nan")),
        lambda: merge_wudi(base, experts, [1.0, 1.0], steps=-1),
        lambda: merge_wudi(base, experts, [1.0, 1.0], rate=0.0),
        lambda: merge_wudi(base, experts, [1.0, 1.0], direction=base.T),
    ):
        with pytest.raises(MergeError):
            call()


def test_mergekit_has_neither() -> None:
    """Once it has, they are compared with it like all others, and may be exported."""
    assert not {name for name in registry_names() if "tsv" in name or "wudi" in name}
