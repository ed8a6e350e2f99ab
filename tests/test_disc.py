"""The disc inside windows: plans and densities against counting pairs, backends against float64 through that mask."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import AxisWindows, BlockPlan, PooledKeys, TileGrid, block_sparse_attention
from dit_accel.kernels.block_sparse import xformers
from dit_accel.kernels.block_sparse.plan import MAX_RADIUS, Triple, in_disc
from dit_accel.kernels.block_sparse.reference import token_mask
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_windows, windows_density

GRIDS: dict[str, tuple[Triple, Triple]] = {
    "image": ((1, 9, 11), (1, 4, 4)),
    "odd tile": ((2, 6, 7), (1, 3, 5)),
    "one row": ((1, 1, 23), (1, 1, 16)),
    "tile beyond the grid": ((3, 5, 3), (2, 2, 8)),
}
RULES: dict[str, dict[str, object]] = {
    "whole axes": {},
    "one-sided rows": {"rows": (-4, -1)},
    "far columns": {"columns": (2, 9)},
    "dilated": {"dilation": (1, 2, 3)},
}
BACKENDS = ("reference", "torch", "triton")
RADIUS = 4


def windows_of(grid: Triple, radius: int = RADIUS, **rule: object) -> AxisWindows:
    """Keys at distances from the first to the last of ``rows`` and ``columns``, the disc inside them."""
    ranges = [(-grid[0], grid[0]), rule.get("rows", (-99, 99)), rule.get("columns", (-99, 99))]
    bounds = [
        (max(x + low, 0), min(x + high, size - 1))
        for size, (low, high) in zip(grid, ranges, strict=True)  # type: ignore[misc]
        for x in range(size)
    ]
    dilation: Triple = rule.get("dilation", (1, 1, 1))  # type: ignore[assignment]
    return AxisWindows(torch.tensor(bounds, dtype=torch.int32), dilation, radius=radius)


def counted(grid: Triple, radius: int = RADIUS, **rule: object) -> Tensor:
    """Pair by pair from the definition: bool [tokens, tokens]."""
    points = list(itertools.product(*map(range, grid)))
    rows, columns = rule.get("rows", (-99, 99)), rule.get("columns", (-99, 99))
    dilation = rule.get("dilation", (1, 1, 1))

    def kept(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        t, y, x = (k - q for q, k in zip(query, key, strict=True))
        steps = all(d % step == 0 for d, step in zip((t, y, x), dilation, strict=True))  # type: ignore[call-overload]
        inside = rows[0] <= y <= rows[1] and columns[0] <= x <= columns[1]  # type: ignore[index]
        return inside and steps and y * y + x * x < radius * radius

    return torch.tensor([[kept(query, key) for key in points] for query in points])


def by_tiles(mask: Tensor, tiles: TileGrid) -> Tensor:
    """Kept pairs of each pair of tiles."""
    member = F.one_hot(tiles.token_tile(), tiles.num_tiles).double()
    return member.T @ mask.double() @ member


def rows_of(layout: TokenLayout, dim: int = 16, batch: int = 1, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(3, batch, layout.num_tokens, heads, dim, generator=generator).unbind())


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE in float64; zeros and -inf where a row has no keys."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    weights = torch.where(mask.any(-1, True), scores.softmax(-1), 0.0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


def with_text(mask: Tensor, layout: TokenLayout) -> Tensor:
    full = mask.new_ones(layout.num_tokens, layout.num_tokens)
    grid = slice(layout.prefix, layout.prefix + layout.visual_tokens)
    full[grid, grid] = mask
    return full


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", GRIDS)
def test_plans_list_what_the_disc_touches_and_mask_what_it_cuts(name: str, rule: str) -> None:
    grid, tile = GRIDS[name]
    tiles, mask = TileGrid(grid, tile), counted(grid, **RULES[rule])
    plan = plan_from_windows(TokenLayout(grid), tiles, windows_of(grid, **RULES[rule]))
    assert torch.equal(token_mask(plan)[0, 0], mask)
    pairs, sizes = by_tiles(mask, tiles), tiles.tile_tokens().double()
    whole = (pairs == sizes[:, None] * sizes) & (sizes == tiles.tile_size)
    assert torch.equal(plan.tile_mask()[0, 0], pairs > 0)
    assert torch.equal(plan.partial_mask()[0, 0], (pairs > 0) & ~whole)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", GRIDS)
def test_densities_count_pairs(name: str, rule: str) -> None:
    grid, tile = GRIDS[name]
    windows, mask = windows_of(grid, **RULES[rule]), counted(grid, **RULES[rule])
    assert windows_density(TileGrid(grid, (1, 1, 1)), windows) == pytest.approx(float(mask.double().mean()), abs=1e-12)
    plan = plan_from_windows(TokenLayout(grid), TileGrid(grid, tile), windows)
    assert windows_density(TileGrid(grid, tile), windows) == pytest.approx(plan.visual_density, abs=1e-12)


@pytest.mark.parametrize("text", [("none", 0), ("prefix", 3), ("suffix", 18)], ids=str)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("backend", [*BACKENDS, "flex"])
def test_backends_match_float64(backend: str, name: str, text: tuple[str, int], poisoned_memory: None) -> None:
    grid, tile = GRIDS[name]
    layout = TokenLayout(grid, text[1], text[0])  # type: ignore[arg-type]
    plan = plan_from_windows(layout, layout.boxes(tile), windows_of(grid, rows=(-3, 2)))
    q, k, v = rows_of(layout)
    got = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)  # type: ignore[call-overload]
    want = exact(q, k, v, with_text(counted(grid, rows=(-3, 2)), layout))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["image", "odd tile"])
def test_gradients_match_float64(backend: str, name: str) -> None:
    grid, tile = GRIDS[name]
    layout = TokenLayout(grid, 5, "prefix")
    rule = {"columns": (-2, 9)}
    plan = plan_from_windows(layout, layout.boxes(tile), windows_of(grid, **rule))
    leaves = [x.requires_grad_() for x in rows_of(layout, heads=1)]
    twins = [x.detach().double().requires_grad_() for x in leaves]
    got = block_sparse_attention(*leaves, plan, backend=backend, return_lse=True)  # type: ignore[call-overload]
    want = exact(*twins, with_text(counted(grid, **rule), layout))  # type: ignore[call-arg]
    weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(4))
    ((got[0] * weight).sum() + got[1].sum()).backward()
    ((want[0] * weight).sum() + want[1].sum()).backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disc_goes_with_padding_and_pooled_keys(backend: str) -> None:
    """All pooled keys hidden but one, which counts like a token beside the disc."""
    grid, tile = GRIDS["image"]
    layout = TokenLayout(grid, 6, "suffix")
    plan = plan_from_windows(layout, layout.boxes(tile), windows_of(grid))
    tiles = plan.tiles.num_tiles
    listed = torch.cat([torch.full((1, 1, tiles, 1), tiles, dtype=torch.int32), plan.indices], -1)
    plan = replace(plan, counts=plan.counts + 1, partial=plan.partial + 1, indices=listed, pooled=3)
    q, k, v = rows_of(layout)
    pooled_k, pooled_v = torch.randn(2, 1, 3, 2, 16, generator=torch.Generator().manual_seed(5)).unbind()
    hidden = torch.tensor([-torch.inf, 0.0, -torch.inf]).expand(1, 1, 1, 3)
    lengths = torch.tensor([4], dtype=torch.int32)
    pooled = PooledKeys(pooled_k, pooled_v, hidden)
    got = block_sparse_attention(q, k, v, plan, text_lengths=lengths, pooled=pooled, backend=backend)  # type: ignore[call-overload]
    mask = with_text(counted(grid), layout)
    mask[:, layout.num_tokens - 2 :] = False
    sees_pooled = torch.arange(layout.num_tokens) < layout.visual_tokens
    mask = torch.cat([mask, sees_pooled[:, None]], 1)
    k, v = torch.cat([k, pooled_k[:, 1:2]], 1), torch.cat([v, pooled_v[:, 1:2]], 1)
    torch.testing.assert_close(got.double(), exact(q, k, v, mask)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_set_of_lists_serves_discs_of_different_radius(backend: str) -> None:
    grid, tile = GRIDS["image"]
    layout = TokenLayout(grid)
    plan = plan_from_windows(layout, layout.boxes(tile), windows_of(grid, 5))
    rows = rows_of(layout, heads=1)
    for radius in (5, 3, 5):
        narrower = replace(plan, window=windows_of(grid, radius))
        got = block_sparse_attention(*rows, narrower, backend=backend)  # type: ignore[call-overload]
        want, _ = exact(*rows, token_mask(narrower))  # type: ignore[call-arg]
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_a_disc_is_part_of_a_compiled_call() -> None:
    grid, tile = GRIDS["image"]
    layout = TokenLayout(grid)
    attend = torch.compile(block_sparse_attention, backend="eager", fullgraph=True)
    q, k, v = rows_of(layout)
    for radius in (3, 5):
        plan: BlockPlan = plan_from_windows(layout, layout.boxes(tile), windows_of(grid, radius))
        got = attend(q, k, v, plan, backend="torch")
        torch.testing.assert_close(got.double(), exact(q, k, v, counted(grid, radius))[0], rtol=1e-4, atol=1e-5)


def test_the_largest_disc_is_exact_and_far_tokens_do_not_wrap_around() -> None:
    columns = torch.tensor([90, 91], dtype=torch.int32)
    assert in_disc(torch.tensor(MAX_RADIUS - 1), columns, MAX_RADIUS).tolist() == [True, False]
    assert not in_disc(torch.tensor(0), torch.tensor(1 << 16, dtype=torch.int32), 3)


def test_xformers_does_not_take_a_disc_for_a_window() -> None:
    layout = TokenLayout((1, 1, 23))
    windows = windows_of(layout.grid, 3, columns=(-2, 2))
    plan = plan_from_windows(layout, layout.boxes((1, 1, 16)), windows)
    assert xformers.local_reach(plan) is None
    assert xformers.local_reach(replace(plan, window=replace(windows, radius=None))) == (2, 2)


@pytest.mark.parametrize("radius", [0, -1, MAX_RADIUS + 1])
def test_radii_out_of_range_are_refused(radius: int) -> None:
    with pytest.raises(ValueError, match=f"radius must be from 1 to {MAX_RADIUS} tokens, got {radius}"):
        windows_of((1, 2, 2), radius)


def test_a_disc_in_a_union_is_refused() -> None:
    with pytest.raises(ValueError, match="a disc narrows windows that every axis admits, got union=True"):
        AxisWindows(torch.zeros(3, 2, dtype=torch.int32), union=True, radius=2)
