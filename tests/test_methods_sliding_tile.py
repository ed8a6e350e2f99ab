"""Sliding tile attention against windows counted out tile by tile."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import SlidingTileAttnProcessor, make_method, token_mask

HUNYUAN, STEP, WAN = (30, 48, 80), (36, 48, 48), (18, 48, 80)


def tiles_seen(tiles: int, width: int, tile: int) -> set[int]:
    """The published rule on one axis: |key tile - centre| <= half, the centre kept half a window from the border."""
    half = width // 2
    centre = min(max(tile, half), tiles - 1 - half)
    return {key for key in range(tiles) if abs(key - centre) <= half}


def counted(grid: Triple, tile: Triple, window: Triple) -> Tensor:
    """Pair by pair: bool [tokens, tokens]."""
    points = list(itertools.product(*map(range, grid)))
    counts = [-(-size // side) for size, side in zip(grid, tile, strict=True)]
    seen = [[tiles_seen(n, k, p) for p in range(n)] for n, k in zip(counts, window, strict=True)]

    def kept(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        return all(k // side in axis[q // side] for q, k, side, axis in zip(query, key, tile, seen, strict=True))

    return torch.tensor([[kept(query, key) for key in points] for query in points])


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 3, 3), (1, 2, 5), (4, 1, 2), (9, 9, 9), (2, 4, 3)], ids=str)
@pytest.mark.parametrize(
    ("grid", "tile"),
    [((4, 6, 8), (2, 2, 2)), ((5, 7, 9), (2, 3, 2)), ((1, 7, 11), (1, 2, 3)), ((3, 5, 7), (4, 8, 1))],
    ids=str,
)
def test_windows_are_those_of_the_published_rule(grid: Triple, tile: Triple, window: Triple) -> None:
    method = SlidingTileAttnProcessor(window=window, tile=tile)
    want = counted(grid, tile, window)
    assert torch.equal(token_mask(method, grid)[0], want)
    assert method.ideal_density(TokenLayout(grid)) == pytest.approx(float(want.double().mean()), abs=1e-12)


@pytest.mark.parametrize("tiles", range(1, 9))
@pytest.mark.parametrize("width", range(1, 10))
def test_an_odd_window_keeps_its_tiles_and_an_even_one_one_more(tiles: int, width: int) -> None:
    plan = SlidingTileAttnProcessor(window=(1, 1, width), tile=(1, 1, 128)).plan(TokenLayout((1, 1, 128 * tiles)))
    assert plan.counts.unique().tolist() == [min(tiles, width + (width % 2 == 0))]


@pytest.mark.parametrize(
    ("grid", "window", "density"),
    [
        pytest.param(HUNYUAN, (3, 3, 3), 27 / 300, id="HunyuanVideo 18x24x24: 91 % sparse"),
        pytest.param(HUNYUAN, (5, 5, 5), 125 / 300, id="HunyuanVideo 30x40x40: 58 % sparse"),
        pytest.param(HUNYUAN, (5, 3, 3), 0.15, id="HunyuanVideo searched 5,3,3"),
        pytest.param(HUNYUAN, (1, 6, 10), 0.2, id="HunyuanVideo searched 1,6,10"),
        pytest.param(STEP, (3, 3, 3), 1 / 8, id="Step-Video"),
        pytest.param(WAN, (3, 6, 1), 0.1, id="Wan searched 3,6,1"),
        pytest.param(WAN, (1, 3, 10), 1 / 6, id="Wan searched 1,3,10"),
    ],
)
def test_published_windows_have_their_density_and_no_masked_tile(grid: Triple, window: Triple, density: float) -> None:
    method = SlidingTileAttnProcessor(window=window)
    plan = method.plan(TokenLayout(grid))
    assert plan.visual_density == pytest.approx(density, abs=1e-12)
    assert method.ideal_density(TokenLayout(grid)) == pytest.approx(density, abs=1e-12)
    assert plan.tiles.tile == (2, 8, 8)
    assert not plan.partial.any()


def test_the_searched_table_of_hunyuan_video_has_its_published_density() -> None:
    """Heads that took each window in the sparse steps: .166 on average."""
    table = {(5, 3, 3): 20380, (1, 6, 10): 15916, (3, 3, 5): 7396, (5, 1, 10): 5244, (5, 6, 1): 1464}
    layout = TokenLayout(HUNYUAN)
    shares = {window: SlidingTileAttnProcessor(window=window).ideal_density(layout) for window in table}
    mean = sum(shares[window] * heads for window, heads in table.items()) / sum(table.values())
    assert mean == pytest.approx(0.166, abs=5e-4)


@pytest.mark.parametrize("grid", [(7, 24, 32), (21, 45, 80), (1, 83, 83)], ids=str)
def test_only_what_sticks_out_of_the_grid_is_masked(grid: Triple) -> None:
    plan = SlidingTileAttnProcessor().plan(TokenLayout(grid))
    assert plan.window is None
    ragged = plan.tiles.tile_tokens() < plan.tiles.tile_size
    assert torch.equal(plan.partial_mask(), plan.tile_mask() & ragged)


@pytest.mark.parametrize(
    ("tile", "box"),
    [
        ((6, 8, 8), (2, 8, 8)),
        ((1, 16, 16), (1, 8, 16)),
        ((4, 8, 8), (2, 8, 8)),
        ((3, 5, 7), (3, 5, 7)),
        ((6, 6, 10), (2, 6, 10)),
        ((2, 4, 16), (2, 4, 16)),
    ],
    ids=str,
)
def test_boxes_divide_the_tile_and_fill_the_operator_s(tile: Triple, box: Triple) -> None:
    assert SlidingTileAttnProcessor(tile=tile).plan(TokenLayout(tile)).tiles.tile == box


def test_each_head_has_its_own_window() -> None:
    windows: tuple[Triple, ...] = ((1, 1, 1), (3, -1, 3), (1, 3, 5))
    method, layout = SlidingTileAttnProcessor(window=windows, tile=(1, 2, 3)), TokenLayout((3, 7, 11), 4, "suffix")
    plan = method.plan(layout)
    alone = [SlidingTileAttnProcessor(window=window, tile=(1, 2, 3)) for window in windows]
    masks = torch.cat([token_mask(one, layout.grid, 4, "suffix") for one in alone])
    assert torch.equal(token_mask(method, layout.grid, 4, "suffix"), masks)
    want = sum(one.ideal_density(layout) for one in alone) / 3
    assert method.ideal_density(layout) == pytest.approx(want, abs=1e-12)
    assert plan.visual_density == pytest.approx(want, abs=1e-12)

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, layout.num_tokens, 3, 8, generator=generator, dtype=torch.float64).unbind()
    got = block_sparse_attention(q, k, v, plan, backend="torch")
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=masks)
    torch.testing.assert_close(got, dense.transpose(1, 2), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="lists are for batch 1 and 3 heads, got batch 1 and 2 heads"):
        block_sparse_attention(q[:, :, :2], k[:, :, :2], v[:, :, :2], plan)


def test_windows_per_head_may_come_as_lists() -> None:
    assert make_method("sliding_tile", window=[[1, 3, 3], [3, 3, 1]]) == SlidingTileAttnProcessor(
        window=((1, 3, 3), (3, 3, 1))
    )


def test_minus_one_is_the_whole_axis() -> None:
    whole = SlidingTileAttnProcessor(window=(-1, 1, -1), tile=(2, 3, 2))
    assert torch.equal(token_mask(whole, (5, 7, 9)), counted((5, 7, 9), (2, 3, 2), (3, 1, 5))[None])


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.45, 0.7])
def test_density_takes_the_largest_window_of_its_list_that_fits(density: float) -> None:
    layout = TokenLayout(HUNYUAN)
    got = SlidingTileAttnProcessor(density=density).ideal_density(layout)
    family = [(1, 1, 1), (1, 1, 3), (1, 3, 3), (3, 3, 3), (3, 3, 5), (3, 5, 5), (3, 5, 7), (5, 5, 7), (5, 5, 9)]
    shares = [SlidingTileAttnProcessor(window=window).ideal_density(layout) for window in family]
    assert got == pytest.approx(max(share for share in shares if share <= density), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0, 3, 3)}, "window must be three integers of at least 1 or -1"),
        ({"window": ()}, "window must be three integers"),
        ({"window": ((3, 3, 3), (3, 3))}, r"window must be three integers .* got \(3, 3\)"),
        ({"tile": (6, 8)}, "tile must be three integers"),
    ],
    ids=["window", "empty", "head", "tile"],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("sliding_tile", **options)
