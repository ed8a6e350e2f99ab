"""The block-sparse operator against brute force and against each other's backends."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import AxisWindows, BlockPlan, TileGrid, block_sparse_attention, can_run
from dit_accel.kernels.block_sparse import triton_forward
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.reference import token_mask
from dit_accel.kernels.block_sparse.triton_launch import Launch
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask, plan_from_windows

GRIDS = {"5x9x11": ((5, 9, 11), (4, 4, 8)), "1x7x5": ((1, 7, 5), (1, 4, 4)), "2x3x7 odd tile": ((2, 3, 7), (1, 3, 5))}
TEXTS = {"no text": ("none", 0), "1 before": ("prefix", 1), "21 after": ("suffix", 21)}
KINDS = ("lists", "window", "union", "dilated")
BACKENDS = ("torch", "triton")


def layout_of(grid: str, text: str) -> tuple[TokenLayout, TileGrid]:
    size, tile = GRIDS[grid]
    position, tokens = TEXTS[text]
    layout = TokenLayout(size, tokens, position)  # type: ignore[arg-type]
    return layout, layout.boxes(tile)


def reach_windows(grid: tuple[int, int, int], union: bool, dilation: tuple[int, int, int]) -> AxisWindows:
    """At most 1 frame, 2 rows and 3 columns away, cut at the borders."""
    bounds = [
        (max(x - reach, 0), min(x + reach, size - 1))
        for size, reach in zip(grid, (1, 2, 3), strict=True)
        for x in range(size)
    ]
    return AxisWindows(torch.tensor(bounds, dtype=torch.int32), dilation, union)


def build(kind: str, layout: TokenLayout, tiles: TileGrid, batch: int = 2, heads: int = 2) -> BlockPlan:
    if kind == "lists":
        generator = torch.Generator().manual_seed(0)
        keep = torch.rand(batch, heads, tiles.num_tiles, tiles.num_tiles, generator=generator) < 0.4
        keep[0, 0, 0] = False
        return plan_from_tile_mask(layout, tiles, keep)
    dilation = (2, 1, 3) if kind == "dilated" else (1, 1, 1)
    return plan_from_windows(layout, tiles, reach_windows(layout.grid, kind == "union", dilation))


def brute_mask(kind: str, layout: TokenLayout, plan: BlockPlan) -> Tensor:
    """Pair by pair, from the definition and without the code under test."""
    tile = plan.tiles.tile
    points = list(itertools.product(*map(range, layout.grid)))
    steps = {"dilated": (2, 1, 3)}.get(kind, (1, 1, 1))
    tiles_h, tiles_w = (-(-layout.grid[axis] // tile[axis]) for axis in (1, 2))

    def tile_of(point: tuple[int, ...]) -> int:
        return (point[0] // tile[0] * tiles_h + point[1] // tile[1]) * tiles_w + point[2] // tile[2]

    batch, heads, _ = plan.counts.shape
    mask = torch.ones(batch, heads, layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for (a, p), (b, q) in itertools.product(enumerate(points), enumerate(points)):
        i, j = a + layout.prefix, b + layout.prefix
        if kind == "lists":
            for item, head in itertools.product(range(batch), range(heads)):
                row = plan.indices[item, head, tile_of(p), : plan.counts[item, head, tile_of(p)]]
                mask[item, head, i, j] = tile_of(q) in row.tolist()
        else:
            near = [
                abs(x - y) <= reach and (x - y) % step == 0
                for x, y, reach, step in zip(p, q, (1, 2, 3), steps, strict=True)
            ]
            mask[..., i, j] = any(near) if kind == "union" else all(near)
    return mask


def inputs(layout: TokenLayout, dim: int = 24, batch: int = 2, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views of a fused projection surrounded by NaN."""
    generator = torch.Generator().manual_seed(1)
    fused = torch.full((batch, layout.num_tokens + 8, 3, heads, dim), torch.nan)
    fused[:, 4:-4] = torch.randn(batch, layout.num_tokens, 3, heads, dim, generator=generator)
    q, k, v = fused[:, 4:-4].unbind(2)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """float64 attention and LSE by torch's own dense call; zeros and -inf where a row has no keys."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = torch.where(mask.any(-1)[..., None], out, 0.0)
    return out.transpose(1, 2), scores.logsumexp(-1)


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """float32 against float64: a few hundred roundings of the largest value."""
    bound = 256 * torch.finfo(torch.float32).eps
    assert (got[0].double() - want[0]).abs().max() <= bound * max(1.0, float(want[0].abs().max()))
    assert torch.equal(got[1] == -torch.inf, want[1] == -torch.inf)
    finite = want[1] > -torch.inf
    assert (got[1].double() - want[1])[finite].abs().max() <= bound * max(1.0, float(want[1][finite].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("grid", ["1x7x5", "2x3x7 odd tile"])
def test_plan_keeps_exactly_the_pairs_of_the_rule(grid: str, text: str, kind: str) -> None:
    layout, tiles = layout_of(grid, text)
    plan = build(kind, layout, tiles)
    assert torch.equal(token_mask(plan), brute_mask(kind, layout, plan))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_match_float64_on_ragged_grids(backend: str, text: str, kind: str, poisoned_memory: None) -> None:
    layout, tiles = layout_of("2x3x7 odd tile" if kind == "union" else "1x7x5", text)
    plan = build(kind, layout, tiles)
    q, k, v = inputs(layout)
    got = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)  # type: ignore[call-overload]
    assert_close(got, exact(q, k, v, token_mask(plan)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["lists", "window"])
def test_backends_match_float64_across_frames(backend: str, kind: str, poisoned_memory: None) -> None:
    layout, tiles = layout_of("5x9x11", "21 after")
    plan = build(kind, layout, tiles, batch=1, heads=2)
    q, k, v = inputs(layout, dim=64, batch=1)
    got = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)  # type: ignore[call-overload]
    assert_close(got, exact(q, k, v, token_mask(plan)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("text", ["1 before", "21 after"])
def test_each_batch_item_hides_its_own_padding(backend: str, text: str, poisoned_memory: None) -> None:
    layout, tiles = layout_of("1x7x5", text)
    plan = build("window", layout, tiles)
    q, k, v = inputs(layout)
    lengths = torch.tensor([layout.text_tokens, layout.text_tokens // 3], dtype=torch.int32)
    got = block_sparse_attention(q, k, v, plan, text_lengths=lengths, backend=backend, return_lse=True)  # type: ignore[call-overload]
    mask = token_mask(plan).expand(2, 1, -1, -1).clone()
    start = 0 if layout.prefix else layout.visual_tokens
    mask[1, :, :, start + layout.text_tokens // 3 : start + layout.text_tokens] = False
    assert_close(got, exact(q, k, v, mask))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_query_without_keys_gives_zero_and_minus_infinity(backend: str, poisoned_memory: None) -> None:
    layout = TokenLayout((1, 3, 5))
    tiles = layout.boxes((1, 2, 4))
    plan = plan_from_tile_mask(layout, tiles, torch.zeros(tiles.num_tiles, tiles.num_tiles, dtype=torch.bool))
    q, k, v = inputs(layout)
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)  # type: ignore[call-overload]
    assert torch.equal(out, torch.zeros_like(out))
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 0.37, 0.0, -0.5])
def test_scale_is_honoured(backend: str, scale: float) -> None:
    layout, tiles = layout_of("1x7x5", "1 before")
    plan = build("window", layout, tiles)
    q, k, v = inputs(layout)
    got = block_sparse_attention(q, k, v, plan, scale=scale, backend=backend, return_lse=True)  # type: ignore[call-overload]
    assert_close(got, exact(q, k, v, token_mask(plan), scale))


SPLITS = [(16, 16), (32, 16), (16, 32)]


@pytest.mark.parametrize("kind", ["lists", "window"])
@pytest.mark.parametrize("tile", [(1, 4, 8), (2, 3, 5)], ids=["powers of two", "odd tile"])
@pytest.mark.parametrize(("rows", "columns"), SPLITS, ids=[f"{rows} x {columns}" for rows, columns in SPLITS])
def test_parts_of_a_tile_make_the_whole(
    rows: int, columns: int, tile: tuple[int, int, int], kind: str, poisoned_memory: None
) -> None:
    layout = TokenLayout((2, 6, 11), 19, "suffix")
    plan = build(kind, layout, layout.boxes(tile), batch=1)
    q, k, v = inputs(layout, batch=1)
    got = triton_forward.forward(Inputs(q, k, v, plan, 0.3), Launch(rows, columns, 4, 1))
    assert_close(got, exact(q, k, v, token_mask(plan), 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_batch(backend: str) -> None:
    layout, tiles = layout_of("1x7x5", "21 after")
    plan = build("window", layout, tiles)
    q, k, v = inputs(layout)
    both = block_sparse_attention(q, k, v, plan, backend=backend)  # type: ignore[call-overload]
    again = block_sparse_attention(q, k, v, plan, backend=backend)  # type: ignore[call-overload]
    alone = block_sparse_attention(q[1:], k[1:], v[1:], plan, backend=backend)  # type: ignore[call-overload]
    assert torch.equal(both, again)
    assert (both[1:] - alone).abs().max() <= 4 * torch.finfo(torch.float32).eps * both.abs().max()


@pytest.mark.parametrize("return_lse", [False, True])
def test_torch_backend_has_the_gradients_of_dense_attention(return_lse: bool) -> None:
    layout, tiles = layout_of("2x3x7 odd tile", "1 before")
    plan = build("window", layout, tiles)
    leaves = [x.double().clone().requires_grad_() for x in inputs(layout)]
    got = block_sparse_attention(*leaves, plan, backend="torch", return_lse=return_lse)  # type: ignore[call-overload]
    weight = torch.randn(leaves[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ((got[0] if return_lse else got) * weight).sum().backward()
    twins = [x.detach().clone().requires_grad_() for x in leaves]
    (exact(*twins, token_mask(plan))[0] * weight).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-9, atol=1e-9)


def test_density_counts_pairs_in_listed_tiles() -> None:
    layout = TokenLayout((1, 3, 5), 4, "suffix")
    tiles = layout.boxes((1, 2, 4))  # tiles of 8, 2, 4 and 1 tokens
    plan = plan_from_tile_mask(layout, tiles, torch.eye(4, dtype=torch.bool))
    kept = 8**2 + 2**2 + 4**2 + 1**2
    assert plan.visual_density == pytest.approx(kept / 15**2)
    assert plan.density == pytest.approx((kept + 2 * 15 * 4 + 16) / 19**2)


def test_whole_tiles_come_last_and_ascending() -> None:
    layout = TokenLayout((1, 3, 5))
    tiles = layout.boxes((1, 2, 4))
    plan = plan_from_tile_mask(layout, tiles, torch.ones(4, 4, dtype=torch.bool))
    assert plan.indices[0, 0].tolist() == [[1, 2, 3, 0]] * 4
    assert plan.partial[0, 0].tolist() == [3] * 4


def test_bad_inputs_are_refused_in_one_sentence() -> None:
    layout, tiles = layout_of("1x7x5", "no text")
    plan = build("window", layout, tiles)
    q, k, v = inputs(layout)
    with pytest.raises(ValueError, match="made for 35 tokens, got 34"):
        block_sparse_attention(q[:, 1:], k[:, 1:], v[:, 1:], plan)
    with pytest.raises(ValueError, match="share dtype and device"):
        block_sparse_attention(q, k.half(), v, plan)
    with pytest.raises(ValueError, match="share one shape"):
        block_sparse_attention(q, k[:1], v, plan)
    with pytest.raises(ValueError, match="backend must be one of"):
        block_sparse_attention(q, k, v, plan, backend="cuda")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="lists are for batch 1 and 3 heads"):
        block_sparse_attention(q, k, v, build("lists", layout, tiles, batch=1, heads=3))
    with pytest.raises(ValueError, match=r"head dim of at most 128, got 160.*backend='auto'"):
        can_run("triton", torch.empty(1, 35, 2, 160), plan, raise_error=True)
