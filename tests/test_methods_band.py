"""The band against one counted out token by token, and the published widths and shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import BandAttnProcessor, make_method, token_mask

GRIDS = [(1, 17, 13), (3, 7, 11), (1, 1, 1), (5, 1, 2)]


def counted(tokens: int, half_width: int) -> Tensor:
    """Pair by pair: bool [tokens, tokens]."""
    place = torch.arange(tokens)
    return (place[:, None] - place).abs() <= half_width


@pytest.mark.parametrize("half_width", [0, 1, 7, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_token_sees_exactly_its_band(grid: Triple, half_width: int) -> None:
    layout = TokenLayout(grid)
    want = counted(layout.visual_tokens, half_width)
    for tile in (1, 8, 32, 128):
        method = BandAttnProcessor(half_width=half_width, tile=tile)
        assert torch.equal(token_mask(method, grid)[0], want)
        assert method.ideal_density(layout) == pytest.approx(float(want.double().mean()), abs=1e-12)


@pytest.mark.parametrize(("position", "visual"), [("prefix", slice(9, 240)), ("suffix", slice(0, 231))])
def test_text_is_no_part_of_the_band(position: str, visual: slice) -> None:
    mask = token_mask(BandAttnProcessor(half_width=20, tile=32), (3, 7, 11), 9, position)[0]  # type: ignore[arg-type]
    want = torch.ones(240, 240, dtype=torch.bool)
    want[visual, visual] = counted(231, 20)
    assert torch.equal(mask, want)


@pytest.mark.parametrize(
    ("tokens", "half_width"), [(1024, 128), (4096, 512), (16384, 2048), (1023, 127), (7, 0)], ids=str
)
def test_the_default_is_an_eighth_to_each_side(tokens: int, half_width: int) -> None:
    layout = TokenLayout((1, 1, tokens))
    assert BandAttnProcessor().ideal_density(layout) == BandAttnProcessor(half_width=half_width).ideal_density(layout)


def test_half_width_wins_over_share() -> None:
    both = BandAttnProcessor(share=0.5, half_width=3)
    assert torch.equal(token_mask(both, (1, 5, 5))[0], counted(25, 3))


@pytest.mark.parametrize("side", [32, 64, 128])
def test_the_published_band_keeps_the_derived_share(side: int) -> None:
    """0.235 of the pairs, with which DiTFastAttn's table of FLOPs comes out."""
    assert BandAttnProcessor().ideal_density(TokenLayout((1, side, side))) == pytest.approx(0.235, abs=1e-3)


@pytest.mark.parametrize(
    ("grid", "kept", "computed"),
    [((1, 32, 32), 0.2352, 0.3438), ((7, 24, 32), 0.2345, 0.2857), ((21, 45, 80), 0.2344, 0.2364)],
    ids=str,
)
def test_densities_are_those_of_the_documentation(grid: Triple, kept: float, computed: float) -> None:
    layout = TokenLayout(grid)
    assert BandAttnProcessor().ideal_density(layout) == pytest.approx(kept, abs=5e-5)
    assert BandAttnProcessor().plan(layout).visual_density == pytest.approx(computed, abs=5e-5)


@pytest.mark.parametrize("target", [0.001, 0.1, 0.35, 0.8, 1.0])
@pytest.mark.parametrize("grid", [(1, 24, 25), (3, 11, 13), (1, 5, 5)], ids=str)
def test_density_takes_the_widest_band_that_fits(grid: Triple, target: float) -> None:
    layout = TokenLayout(grid)
    tokens = layout.visual_tokens
    plans = [BandAttnProcessor(half_width=width, tile=32).plan(layout).visual_density for width in range(tokens)]
    solved = BandAttnProcessor(density=target, tile=32)
    widest = max(width for width, share in enumerate(plans) if share <= max(target, plans[0]) + 1e-12)
    assert torch.equal(token_mask(solved, grid)[0], counted(tokens, widest))


@pytest.mark.parametrize("position", ["none", "prefix", "suffix"])
def test_a_band_over_everything_is_dense_attention(position: str) -> None:
    text = 0 if position == "none" else 5
    layout = TokenLayout((3, 7, 11), text, position)  # type: ignore[arg-type]
    plan = BandAttnProcessor(half_width=10**9).plan(layout)
    assert plan.density == 1.0 and plan.window is None
    q, k, v = torch.randn(3, 1, layout.num_tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan, backend="torch"), dense)


def test_tiles_inside_the_band_need_no_mask() -> None:
    plan = BandAttnProcessor().plan(TokenLayout((1, 64, 64)))
    middle = plan.counts[0, 0, 16], plan.partial[0, 0, 16]
    assert [int(count) for count in middle] == [9, 2]  # four whole tiles to each side; only the outermost are cut


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"share": 1.5}, r"share must be in \(0, 1\], got 1.5"),
        ({"half_width": -1}, "half_width must be at least 0 tokens or None, got -1"),
        ({"tile": 0}, "tile must be at least 1 token, got 0"),
    ],
    ids=["none", "too-much", "half-width", "tile"],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("band", **options)
