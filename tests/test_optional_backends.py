"""Backends that need another library: what they are told about a plan, and what they refuse."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import AxisWindows, BlockPlan, TileGrid, block_sparse_attention
from dit_accel.kernels.block_sparse import flex, xformers
from dit_accel.kernels.block_sparse.blocks import Blocks, Lists, blocks_of, keeps_everything
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.reference import token_mask, visible
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask, plan_from_windows

LAYOUTS = {
    "ragged boxes": (TokenLayout((3, 5, 7)), (2, 2, 4)),
    "ragged boxes, text before": (TokenLayout((3, 5, 7), 21, "prefix"), (2, 2, 4)),
    "ragged boxes, text after": (TokenLayout((3, 5, 7), 16, "suffix"), (2, 2, 4)),
    "even boxes": (TokenLayout((2, 4, 8)), (2, 2, 4)),
    "raster, ragged end": (TokenLayout((1, 1, 100)), (1, 1, 16)),
    "raster, ragged text": (TokenLayout((1, 1, 96), 5, "suffix"), (1, 1, 16)),
    "raster, ragged end, text": (TokenLayout((1, 1, 100), 5, "suffix"), (1, 1, 16)),
}
KINDS = ("lists", "window", "union", "dilated")


def windows(grid: tuple[int, int, int], kind: str) -> AxisWindows:
    """At most 1 frame, 2 rows and 3 columns away, cut at the borders."""
    bounds = [
        (max(x - reach, 0), min(x + reach, size - 1))
        for size, reach in zip(grid, (1, 2, 3), strict=True)
        for x in range(size)
    ]
    dilation = (2, 1, 3) if kind == "dilated" else (1, 1, 1)
    return AxisWindows(torch.tensor(bounds, dtype=torch.int32), dilation, union=kind == "union")


def build(name: str, kind: str, batch: int = 2, heads: int = 3) -> BlockPlan:
    layout, tile = LAYOUTS[name]
    tiles = layout.boxes(tile)
    if kind != "lists":
        return plan_from_windows(layout, tiles, windows(layout.grid, kind))
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(batch, heads, tiles.num_tiles, tiles.num_tiles, generator=generator) < 0.4
    keep[0, 0, 0] = False  # a tile whose queries see nothing but the text
    return plan_from_tile_mask(layout, tiles, keep)


def inputs(plan: BlockPlan, batch: int = 2, heads: int = 3, text_lengths: Tensor | None = None) -> Inputs:
    """Strided views of a fused projection."""
    fused = torch.randn(batch, plan.num_tokens, 3, heads, 8, generator=torch.Generator().manual_seed(1))
    q, k, v = fused.unbind(2)
    return Inputs(q, k, v, plan, 0.3, text_lengths)


def listed(lists: Lists, plan: BlockPlan) -> Tensor:
    """Pair by pair, which packed tokens lie in listed blocks: bool [B, H, P, P]."""
    count = lists.counts.shape[-1]
    table = torch.zeros(*lists.counts.shape, count, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, lists.counts.shape)):
        where = tuple(index.tolist())
        table[where][lists.indices[where][: lists.counts[where]].long()] = True
    block = torch.arange(len(blocks_of(plan).valid)) // plan.tiles.tile_size
    return table[..., block, :][..., block]


def packed_rule(given: Inputs, blocks: Blocks) -> Tensor:
    """The rule of masked blocks over all packed pairs: bool [B, 1, P, P]."""
    window, text = given.plan.window, blocks.text
    keys = blocks.keys(given)[:, None, None, :]
    if window is None or blocks.bounds is None:
        return keys
    bounds, at = blocks.bounds, blocks.coordinates
    axes = [
        (bounds[2 * axis, :, None] <= at[axis])
        & (at[axis] <= bounds[2 * axis + 1, :, None])
        & ((at[axis] - at[axis, :, None]) % window.dilation[axis] == 0)
        for axis in range(3)
    ]
    return keys & (window.joined(axes) | text | text[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_and_their_rule_keep_exactly_the_plan_s_pairs(name: str, kind: str) -> None:
    plan = build(name, kind)
    text = plan.prefix + plan.suffix
    given = inputs(plan, text_lengths=torch.tensor([text, text // 2], dtype=torch.int32) if text else None)
    blocks = blocks_of(plan)
    packed = listed(blocks.whole, plan) | (listed(blocks.masked, plan) & packed_rule(given, blocks))
    got = blocks.unpack(blocks.unpack(packed, 2), 3)
    assert torch.equal(got, visible(given, None).expand_as(got))


@pytest.mark.parametrize("name", LAYOUTS)
def test_lists_of_blocks_are_ascending_and_disjoint(name: str) -> None:
    plan = build(name, "window")
    blocks = blocks_of(plan)
    for lists in (blocks.masked, blocks.whole):
        steps = lists.indices.diff(dim=-1)
        used = torch.arange(1, lists.indices.shape[-1]) < lists.counts[..., None]
        assert bool((steps[used] > 0).all())
    assert not bool((listed(blocks.masked, plan) & listed(blocks.whole, plan)).any())


@pytest.mark.parametrize("name", LAYOUTS)
def test_packing_is_undone_and_moves_nothing_where_tiles_are_runs(name: str) -> None:
    plan = build(name, "lists")
    blocks = blocks_of(plan)
    x = torch.randn(2, plan.num_tokens, 3, 8)
    assert torch.equal(blocks.unpack(blocks.pack(x), 1), x)
    assert (blocks.order is None) == (name in ("raster, ragged end", "raster, ragged text"))
    assert blocks_of(plan) is blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_agrees_with_the_reference(name: str, kind: str) -> None:
    plan = build(name, kind)
    given = inputs(plan)
    out, lse = block_sparse_attention(given.q, given.k, given.v, plan, backend="flex", return_lse=True)
    want, want_lse = block_sparse_attention(given.q, given.k, given.v, plan, backend="reference", return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


def test_flex_hides_each_item_s_padding() -> None:
    plan = build("ragged boxes, text before", "window")
    given = inputs(plan, text_lengths=torch.tensor([0, 13], dtype=torch.int32))
    out, want = (
        block_sparse_attention(given.q, given.k, given.v, plan, text_lengths=given.text_lengths, backend=backend)
        for backend in ("flex", "reference")
    )
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_a_plan_s_block_mask_is_made_once_and_goes_with_the_plan() -> None:
    plan = build("even boxes", "window")
    given = inputs(plan)
    for _ in range(2):
        flex.forward(given)
    assert len(flex._MASKS[plan]) == 1
    before = len(flex._MASKS)
    del plan, given
    gc.collect()
    assert len(flex._MASKS) == before - 1


def test_flex_has_no_gradients_on_the_cpu_and_says_so() -> None:
    given = inputs(build("even boxes", "lists"))
    with pytest.raises(ValueError, match=r"^backend='flex' needs a GPU for gradients, got tensors on cpu; .*\.$"):
        block_sparse_attention(given.q.requires_grad_(), given.k, given.v, given.plan, backend="flex")


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_s_block_mask_lists_the_plan_s_tiles_both_ways(name: str) -> None:
    plan = build(name, "lists")
    mask = flex.block_mask(inputs(plan), blocks_of(plan), differentiable=True)
    count = plan.tiles.num_tiles
    dense = mask.to_dense().bool()
    assert torch.equal(dense[..., :count, :count], plan.tile_mask())
    assert bool(dense[..., count:, :].all()) and bool(dense[..., :, count:].all())
    for rows, columns in ((mask.kv_num_blocks, mask.q_num_blocks), (mask.full_kv_num_blocks, mask.full_q_num_blocks)):
        assert rows is not None and columns is not None
        assert torch.equal(rows.sum(-1), columns.sum(-1))


@pytest.mark.parametrize("whole", [True, False])
def test_a_plan_keeps_everything_only_if_no_tile_and_no_window_is_missing(whole: bool) -> None:
    layout = TokenLayout((1, 1, 50))
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[2, 1] = whole
    assert keeps_everything(plan_from_tile_mask(layout, layout.raster(16), keep)) is whole
    assert not keeps_everything(build("raster, ragged end", "window"))


def local_plan(size: int, before: int, after: int, tile: int = 16, axis: int = 2, dilation: int = 1) -> BlockPlan:
    grid, tiles, steps = [1, 1, 1], [1, 1, 1], [1, 1, 1]
    grid[axis], tiles[axis], steps[axis] = size, tile, dilation
    layout = TokenLayout((grid[0], grid[1], grid[2]))
    bounds = [(max(x - before, 0), min(x + after, n - 1)) for n in grid for x in range(n)]
    rule = AxisWindows(torch.tensor(bounds, dtype=torch.int32), (steps[0], steps[1], steps[2]))
    return plan_from_windows(layout, TileGrid(layout.grid, (tiles[0], tiles[1], tiles[2])), rule)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 5), (0, 9), (40, 3), (16, 16)])
@pytest.mark.parametrize("size", [7, 64, 101])
def test_xformers_reach_of_a_window_along_one_axis_is_its_exact_mask(
    size: int, before: int, after: int, axis: int
) -> None:
    plan = local_plan(size, before, after, axis=axis)
    reach = xformers.local_reach(plan)
    if plan.window is None:  # the window is wider than the sequence
        assert reach is None and keeps_everything(plan)
        return
    assert reach is not None
    offset = torch.arange(size) - torch.arange(size)[:, None]
    assert torch.equal((offset >= -reach.before) & (offset <= reach.after), token_mask(plan)[0, 0])


def missing_a_tile() -> BlockPlan:
    plan = local_plan(100, 20, 20)
    plan.counts[0, 0, 3] -= 1
    return plan


@pytest.mark.parametrize(
    "plan",
    [
        build("even boxes", "window"),
        build("raster, ragged text", "window"),
        build("raster, ragged end", "lists"),
        local_plan(100, 20, 20, dilation=2),
        missing_a_tile(),
    ],
    ids=["three axes", "text", "lists", "dilated", "a tile missing"],
)
def test_xformers_refuses_what_its_bias_cannot_say_exactly(plan: BlockPlan) -> None:
    clause = xformers.plan_needs(inputs(plan))
    assert clause is not None and clause.startswith("a plan that keeps every pair")


@pytest.mark.parametrize("backend", ["fa4", "xformers"])
def test_libraries_for_gpus_refuse_cpu_tensors_in_one_sentence(backend: str) -> None:
    given = inputs(build("even boxes", "lists"))
    with pytest.raises(ValueError, match=rf"^backend='{backend}' needs [^.]*(GPU|not installed)[^.]*\.$"):
        block_sparse_attention(given.q, given.k, given.v, given.plan, backend=backend)  # type: ignore[call-overload]
