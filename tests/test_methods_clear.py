"""CLEAR against discs counted out token by token, and its published sizes and costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import CLEARAttnProcessor, make_method, token_mask


def counted(grid: Triple, radius: int, frames: int | None = None) -> Tensor:
    """Pair by pair: bool [tokens, tokens]."""
    t, y, x = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, 3).T
    near = torch.ones(1, dtype=torch.bool) if frames is None else (t[:, None] - t).abs() <= frames
    return near & ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2)


@pytest.mark.parametrize("frames", [None, 0, 1])
@pytest.mark.parametrize("radius", [1, 2, 5, 9, 100])
@pytest.mark.parametrize("grid", [(1, 17, 13), (3, 7, 11), (5, 1, 19)], ids=str)
def test_each_token_sees_exactly_its_disc(grid: Triple, radius: int, frames: int | None) -> None:
    method, layout = CLEARAttnProcessor(radius=radius, frames=frames), TokenLayout(grid)
    want = counted(grid, radius, frames)
    assert torch.equal(token_mask(method, grid)[0], want)
    assert method.ideal_density(layout) == pytest.approx(float(want.double().mean()), abs=1e-12)
    assert torch.equal(token_mask(make_method(method, tile=(2, 3, 5)), grid)[0], want)


@pytest.mark.parametrize(("radius", "tokens"), [(8, 193), (16, 793), (32, 3205)])
def test_discs_have_their_published_size(radius: int, tokens: int) -> None:
    side = 2 * radius + 1
    mask = token_mask(CLEARAttnProcessor(radius=radius, tile=(1, 8, 16)), (1, side, side))[0]
    assert int(mask[side * radius + radius].sum()) == tokens


DENSITIES = {  # tokens per side -> exact shares at radius 8, 16, 32, and billions of operations of a layer of Flux
    64: ((0.042, 63.5), (0.155, 86.6), (0.482, 154.1)),
    128: ((0.011, 246), (0.043, 353), (0.156, 724)),
    256: ((0.003, 979), (0.011, 1433), (0.044, 3142)),
}


@pytest.mark.parametrize("side", DENSITIES)
@pytest.mark.parametrize(("index", "radius"), [(0, 8), (1, 16), (2, 32)])
def test_densities_and_costs_are_the_published_ones(side: int, index: int, radius: int) -> None:
    layout = TokenLayout((1, side, side), 512, "prefix")
    share, billions = DENSITIES[side][index]
    density = CLEARAttnProcessor(radius=radius).ideal_density(layout)
    assert density == pytest.approx(share, abs=6e-4)
    pairs = layout.joint_density(density) * layout.num_tokens**2
    assert 4 * pairs * 3072 / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("side", [64, 128, 256])
def test_boxes_touch_less_than_runs_of_the_raster(side: int) -> None:
    """Published density of touched raster tiles of 128 tokens: .461, .228 and .117 at radius 16."""
    raster = {64: 0.461, 128: 0.228, 256: 0.117}[side]
    plan = CLEARAttnProcessor(radius=16).plan(TokenLayout((1, side, side)))
    assert plan.tiles.tile == (1, 8, 16)
    assert plan.visual_density < 0.75 * raster


@pytest.mark.parametrize("target", [0.1, 0.35, 0.8])
@pytest.mark.parametrize("grid", [(1, 64, 64), (7, 24, 32)], ids=str)
def test_density_takes_the_largest_disc_that_fits(grid: Triple, target: float) -> None:
    layout = TokenLayout(grid)
    solved = CLEARAttnProcessor(density=target)
    tile = solved.plan(layout).tiles.tile
    radii = range(1, math.isqrt(grid[1] ** 2 + grid[2] ** 2) + 2)
    plans = [CLEARAttnProcessor(radius=radius, tile=tile).plan(layout).visual_density for radius in radii]
    least = max(target, plans[0])
    assert solved.plan(layout).visual_density == max(share for share in plans if share <= least)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius must be from 1 to 4096 tokens, got 0"),
        ({"frames": -1}, "frames must be at least 0 or None, got -1"),
        ({"frames": 2, "density": 0.3}, "density needs frames=None, got frames=2"),
        ({"tile": (8, 16)}, "tile must be three integers"),
    ],
    ids=["radius", "frames", "density", "tile"],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("clear", **options)
