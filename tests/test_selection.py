"""Selection: pooled means, choices over scores and lists, each against its definition written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_accel.kernels.block_sparse.plan import TileGrid, Triple
from dit_accel.kernels.selection import pool, triton_choose
from dit_accel.kernels.selection.choose import head_percentile, row_top_k, row_top_p
from dit_accel.kernels.selection.lists import lists_from_mask
from dit_accel.kernels.selection.pool import pool_means, tile_means
from dit_accel.kernels.selection.triton_choose import triton_keep_highest, triton_keep_mass
from dit_accel.kernels.selection.triton_lists import triton_lists
from dit_accel.kernels.selection.triton_pool import triton_tile_means

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton is not interpreted, it compiles
IMPLEMENTATIONS = ("torch", "triton")
CUTS = {  # grid, box, text tokens before
    "ragged on every axis": ((5, 9, 11), (4, 4, 8), 0),
    "flat boxes after text": ((3, 5, 7), (1, 2, 4), 6),
    "axes of one": ((1, 1, 37), (1, 1, 16), 1),
    "whole rows": ((2, 6, 5), (1, 6, 5), 0),
    "one box of 1025": ((1, 41, 25), (2, 64, 32), 3),
    "one token a box": ((2, 3, 2), (1, 1, 1), 2),
}


def means(implementation: str, x: Tensor, tiles: TileGrid, prefix: int) -> Tensor:
    pooled = tile_means if implementation == "torch" else triton_tile_means
    return pooled(x.to(DEVICE if implementation == "triton" else "cpu"), tiles, prefix).cpu()


def highest(implementation: str, scores: Tensor, kept: int) -> Tensor:
    if implementation == "torch":
        return row_top_k(scores, kept)
    return triton_keep_highest(scores.to(DEVICE), min(kept, scores.shape[-1])).cpu()


def mass(implementation: str, scores: Tensor, p: float) -> Tensor:
    return row_top_p(scores, p) if implementation == "torch" else triton_keep_mass(scores.to(DEVICE), p).cpu()


def listed(implementation: str, keep: Tensor, partial: Tensor, width: int, pooled: int) -> list[Tensor]:
    if implementation == "torch":
        return list(lists_from_mask(keep, partial, width, pooled))
    keep, partial = keep.to(DEVICE), partial.to(DEVICE).expand_as(keep)
    return [part.cpu() for part in triton_lists(keep, partial, width, pooled)]


def box_means(x: Tensor, tiles: TileGrid, prefix: int) -> Tensor:
    """Token by token in float64: [B, H, num_tiles, D]."""
    held: dict[Triple, list[int]] = {}
    for token, point in enumerate(itertools.product(*map(range, tiles.grid))):
        t, h, w = (place // step for place, step in zip(point, tiles.tile, strict=True))
        held.setdefault((t, h, w), []).append(prefix + token)
    return torch.stack([x[:, held[box]].double().mean(1) for box in sorted(held)], 2)


def best_first(row: list[float]) -> list[int]:
    """Indices by falling score, then rising index; NaN is -inf."""
    return sorted(range(len(row)), key=lambda i: (math.inf if math.isnan(row[i]) else -row[i], i))


def scores_with_ties(batch: int = 2, heads: int = 2, queries: int = 7, keys: int = 19) -> Tensor:
    """Few distinct values, and rows of each awkward kind."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (batch, heads, queries, keys), generator=generator).float()
    scores[0, 0, 0, ::3] = torch.nan
    scores[0, 0, 1] = torch.nan
    scores[0, 0, 2] = -torch.inf
    scores[0, 0, 2, 4:6] = torch.nan
    scores[0, 0, 3, 4:6] = torch.inf
    scores[0, 0, 4] = 1.5
    scores[0, 0, 5] = torch.tensor([0.0, -0.0] * keys)[:keys]
    return scores


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("grid", "box", "prefix"), CUTS.values(), ids=CUTS)
def test_means_are_those_of_each_box(implementation: str, grid: Triple, box: Triple, prefix: int) -> None:
    """Of views surrounded by NaN, with text on both sides: nothing else is read."""
    tiles = TileGrid(grid, box)
    generator = torch.Generator().manual_seed(1)
    fused = torch.full((2, prefix + tiles.num_tokens + 4, 3, 2, 24), torch.nan)
    fused[:, prefix : prefix + tiles.num_tokens] = torch.randn(2, tiles.num_tokens, 3, 2, 24, generator=generator)
    x = fused[:, :, 1]
    got, want = means(implementation, x, tiles, prefix), box_means(x, tiles, prefix)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 16 * torch.finfo(torch.float32).eps * x.nan_to_num().abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_means_take_any_strides(implementation: str) -> None:
    tiles = TileGrid((2, 5, 3), (1, 4, 2))
    x = torch.randn(24, 3, 2, tiles.num_tokens, generator=torch.Generator().manual_seed(2)).permute(2, 3, 1, 0)
    assert torch.allclose(means(implementation, x, tiles, 0).double(), box_means(x, tiles, 0), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_means_are_summed_in_float32(implementation: str) -> None:
    tiles = TileGrid((1, 32, 33), (1, 32, 32))
    x = torch.full((1, tiles.num_tokens, 1, 8), 256.0, dtype=torch.float16)  # 1024 of them overflow float16
    x[:, ::2] = 257.0  # halves of odd numbers are lost in float16 sums
    want = box_means(x, tiles, 0).float()
    assert torch.equal(means(implementation, x, tiles, 0), want)


def test_a_pyramid_holds_the_means_of_its_tokens() -> None:
    tiles = TileGrid((5, 9, 11), (2, 2, 4))
    x = torch.randn(1, tiles.num_tokens, 2, 8, generator=torch.Generator().manual_seed(3))
    pooled, coarser = pool_means(tile_means(x, tiles), tiles, (2, 3, 2))
    assert coarser == TileGrid((5, 9, 11), (4, 6, 8))
    assert torch.allclose(pooled.double(), box_means(x, coarser, 0), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_token_gets_its_share_of_the_gradient(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "runs_triton", lambda x: implementation == "triton")
    tiles = TileGrid((2, 3, 5), (1, 2, 4))
    x = torch.randn(2, 35, 2, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 2, tiles.num_tiles, 8, device=DEVICE)
    (tile_means(x, tiles, 3) * weight).sum().backward()
    want = torch.zeros(2, 35, 2, 8)
    for token, tile in enumerate(tiles.token_tile()):
        want[:, 3 + token] = weight[:, :, tile].cpu() / tiles.tile_tokens()[tile]
    assert x.grad is not None and torch.equal(x.grad.cpu(), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kept", [1, 4, 18, 19, 40])
def test_rows_keep_the_best_and_of_ties_the_first(implementation: str, kept: int) -> None:
    scores = scores_with_ties()
    got = highest(implementation, scores, kept)
    for row, mask in zip(scores.flatten(0, 2).tolist(), got.flatten(0, 2), strict=True):
        assert mask.nonzero().flatten().tolist() == sorted(best_first(row)[:kept])


@pytest.mark.parametrize("kept", [1, 9, 200, 265, 266])
def test_long_rows_are_chosen_as_short_ones(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digit by digit in chunks that do not divide the row, ties running over chunks."""
    monkeypatch.setattr(triton_choose, "ROW_LIMIT", 100)
    monkeypatch.setattr(triton_choose, "CHUNK", 64)
    scores = torch.stack([scores_with_ties().flatten(), torch.zeros(532)]).reshape(4, 266)
    assert torch.equal(highest("triton", scores, kept), highest("torch", scores, kept))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's inf - inf
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_key_is_kept(implementation: str) -> None:
    scores = torch.tensor([[0.0], [torch.nan], [-torch.inf]])
    assert highest(implementation, scores, 1).all()
    assert mass(implementation, scores, 0.1).all()


@pytest.mark.parametrize("density", [1e-9, 0.07, 0.3, 0.5, 1.0])
def test_heads_keep_their_share_of_the_whole_map(density: float) -> None:
    scores = scores_with_ties(queries=10, keys=10)
    got = head_percentile(scores, density)
    kept = max(1, math.ceil(Fraction(str(density)) * 100 - Fraction("1e-6")))
    for map_scores, mask in zip(scores.flatten(0, 1), got.flatten(0, 1), strict=True):
        best = best_first(map_scores.flatten().tolist())
        assert mask.flatten().nonzero().flatten().tolist() == sorted(best[:kept])


def test_a_flat_row_can_lose_all_its_keys() -> None:
    peaked_and_flat = torch.tensor([[[[9.0, 8.0, 0.0], [1.0, 1.0, 1.0]]]])
    assert head_percentile(peaked_and_flat, 1 / 3).sum(-1).tolist() == [[[2, 0]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_of_known_shares(implementation: str) -> None:
    shares = torch.tensor([1.0, 8.0, 2.0, 1.0, 4.0]).log()  # sixteenths
    for p, want in (
        (0.01, [1]),
        (0.49, [1]),
        (0.7, [1, 4]),
        (0.8, [1, 2, 4]),
        (0.9, [0, 1, 2, 4]),
        (0.99, [0, 1, 2, 3, 4]),
    ):
        assert mass(implementation, shares[None], p)[0].nonzero().flatten().tolist() == want


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mass_is_reached_by_the_fewest_best_keys(implementation: str, p: float) -> None:
    scores = 3 * torch.randn(2, 2, 7, 37, generator=torch.Generator().manual_seed(4))
    got = mass(implementation, scores, p)
    shares = scores.double().softmax(-1)
    kept = torch.where(got, shares, 0.0).sum(-1)
    least = torch.where(got, shares, 2.0).amin(-1)
    assert (kept >= p - 1e-5).all() and (kept - least < p + 1e-5).all()
    assert (torch.where(got, 0.0, shares).amax(-1) <= least).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's inf - inf
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_of_rows_without_a_finite_order(implementation: str) -> None:
    inf, nan = torch.inf, torch.nan
    rows = {  # (row, kept at one half)
        "all alike": ([2.5] * 6, [0, 1, 2]),
        "nothing finite": ([-inf] * 4, [0, 1]),
        "all NaN": ([nan] * 4, [0, 1]),
        "infinite": ([0.0, inf, 1e30, inf], [1]),
        "NaN beside numbers": ([nan, 0.0, nan, -40.0], [1]),
        "zeros of both signs": ([-0.0, 0.0, -0.0, 0.0], [0, 1]),
    }
    for name, (row, want) in rows.items():
        assert mass(implementation, torch.tensor([row]), 0.5)[0].nonzero().flatten().tolist() == want, name


def test_heads_and_batch_items_do_not_see_each_other() -> None:
    scores = scores_with_ties()
    for choose in (lambda x: row_top_k(x, 5), lambda x: row_top_p(x, 0.6), lambda x: head_percentile(x, 0.2)):
        assert torch.equal(choose(scores)[1:, 1:], choose(scores[1:, 1:]))


@pytest.mark.parametrize("choose", [row_top_k, row_top_p, head_percentile], ids=lambda choose: choose.__name__)
def test_scores_may_be_any_view(choose: Callable[[Tensor, float], Tensor]) -> None:
    scores = scores_with_ties()
    assert torch.equal(choose(scores.mT.contiguous().mT, 1), choose(scores, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pooled", [0, 4])
@pytest.mark.parametrize("width", [17, 6])
@pytest.mark.parametrize("shape", [(1, 1, 1, 17), (2, 3, 5, 17), (3, 1, 5, 17)], ids=str)
def test_lists_hold_pooled_then_partial_then_whole_tiles(
    implementation: str, shape: tuple[int, ...], width: int, pooled: int
) -> None:
    """Cut to their width, zero beyond their counts; the first row keeps nothing, the last everything."""
    batch, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(batch, heads, queries, keys, generator=generator) < 0.5
    keep[0, 0, 0], keep[-1, -1, -1] = False, True
    partial = torch.rand(batch, 1, queries, keys, generator=generator) < 0.3
    counts, cuts, indices = listed(implementation, keep, partial, width, pooled)
    assert counts.dtype == cuts.dtype == indices.dtype == torch.int32
    for place in itertools.product(range(batch), range(heads), range(queries)):
        kept = keep[place].nonzero().flatten().tolist()
        coarse = [tile for tile in kept if tile >= keys - pooled]
        needs_mask = [tile for tile in kept if tile < keys - pooled and partial[place[0], 0, place[2], tile]]
        whole = [tile for tile in kept if tile not in coarse + needs_mask]
        want = (coarse + needs_mask + whole)[:width]
        assert indices[place].tolist() == want + [0] * (width - len(want))
        assert (counts[place], cuts[place]) == (len(want), min(width, len(coarse + needs_mask)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lists_of_more_tiles_than_a_program_reads_at_once(implementation: str) -> None:
    keep = torch.rand(1, 1, 2, 1500, generator=torch.Generator().manual_seed(6)) < 0.7
    ragged = torch.arange(1500) % 11 == 10
    counts, cuts, indices = listed(implementation, keep, ragged, 1500, 0)
    assert (counts[0, 0].tolist(), cuts[0, 0].tolist()) == (
        keep.sum(-1)[0, 0].tolist(),
        (keep & ragged).sum(-1)[0, 0].tolist(),
    )
    for row in range(2):
        kept = keep[0, 0, row].nonzero().flatten()
        want = torch.cat([kept[ragged[kept]], kept[~ragged[kept]]])
        assert torch.equal(indices[0, 0, row, : len(kept)].long(), want)


def test_selection_never_waits_for_the_device() -> None:
    """A value that decided a shape or a branch would raise here."""
    tiles = TileGrid((3, 5, 7), (1, 2, 4))
    with FakeTensorMode():
        x = torch.empty(2, 105, 2, 8)
        means, _ = pool_means(tile_means(x, tiles), tiles, (1, 2, 2))
        scores = (means @ means.mT).float()
        keep = head_percentile(scores, 0.3) | row_top_k(scores, 2) | row_top_p(scores, 0.9)
        counts, _, indices = lists_from_mask(keep, torch.ones(scores.shape[-1], dtype=torch.bool))
    assert counts.shape == scores.shape[:3] and indices.shape == scores.shape


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    scores = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="k must be at least 1, got 0."):
        row_top_k(scores, 0)
    with pytest.raises(ValueError, match="p must lie in"):
        row_top_p(scores, 1.5)
    with pytest.raises(ValueError, match="density must lie in"):
        head_percentile(scores, 0.0)
    with pytest.raises(ValueError, match="2 tokens before the grid and 8 on it, got 9 in all"):
        tile_means(torch.zeros(1, 9, 1, 4), TileGrid((1, 2, 4), (1, 1, 4)), 2)
