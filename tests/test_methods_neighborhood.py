"""Neighborhood attention against windows counted out token by token."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import NeighborhoodAttnProcessor, token_mask


def keys_of(query: int, size: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The keys of one query on one axis, from the definition."""
    family = [token for token in range(size) if token % dilation == query % dilation]
    place = family.index(query)
    group = place // stride * stride
    if causal:
        leader = min(group + stride - 1, len(family) - 1)
        return [key for at, key in enumerate(family) if at <= place and leader - at < window]
    leader = min(group + stride // 2, len(family) - 1)
    start = leader - window // 2
    while start + window > len(family):
        start -= 1
    while start < 0:
        start += 1
    return family[start : start + window]


def axis_rule(size: int, window: int, stride: int, dilation: int, causal: bool) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        mask[query, keys_of(query, size, window, stride, dilation, causal)] = True
    return mask


def grid_rule(grid: Triple, method: NeighborhoodAttnProcessor) -> torch.Tensor:
    assert method.window is not None
    t, h, w = (
        axis_rule(*axis)
        for axis in zip(grid, method.window, method.stride, method.dilation, method.causal, strict=True)
    )
    return torch.kron(torch.kron(t.int(), h.int()), w.int()).bool()


@pytest.mark.parametrize("causal", [False, True], ids=["centred", "causal"])
@pytest.mark.parametrize("size", range(1, 13))
def test_every_window_stride_and_dilation_of_one_axis(size: int, causal: bool) -> None:
    for dilation in range(1, size + 1):
        for window in range(1, size // dilation + 1):
            for stride in range(1, window + 1):
                method = NeighborhoodAttnProcessor(
                    window=(1, 1, window),
                    stride=(1, 1, stride),
                    dilation=(1, 1, dilation),
                    causal=(False, False, causal),
                    tile=(1, 1, 4),
                )
                got = token_mask(method, (1, 1, size))[0]
                assert torch.equal(got, axis_rule(size, window, stride, dilation, causal)), method


def random_cases(count: int) -> list[tuple[Triple, NeighborhoodAttnProcessor]]:
    draw = random.Random(0)
    cases = []
    for _ in range(count):
        grid = (draw.choice([1, 4, 5]), draw.randint(3, 9), draw.randint(3, 11))
        dilation = tuple(draw.randint(1, min(3, size)) for size in grid)
        window = tuple(draw.randint(1, size // step) for size, step in zip(grid, dilation, strict=True))
        stride = tuple(draw.randint(1, width) for width in window)
        causal = tuple(draw.random() < 0.3 for _ in grid)
        tile = draw.choice([None, (2, 2, 4), (1, 4, 4)])
        cases.append(
            (grid, NeighborhoodAttnProcessor(window=window, stride=stride, dilation=dilation, causal=causal, tile=tile))
        )
    return cases


@pytest.mark.parametrize(("grid", "method"), random_cases(40))
def test_axes_combine_by_and(grid: Triple, method: NeighborhoodAttnProcessor) -> None:
    rule = grid_rule(grid, method)
    assert torch.equal(token_mask(method, grid)[0], rule)
    assert rule.any(1).all()
    assert method.ideal_density(TokenLayout(grid)) == pytest.approx(rule.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("grid", "window", "stride"),
    [
        pytest.param((5, 9, 11), (3, 4, 5), (1, 1, 1), id="sliding"),
        pytest.param((5, 9, 11), (4, 4, 6), (3, 2, 6), id="strided"),
        pytest.param((1, 13, 17), (1, 7, 2), (1, 7, 1), id="image"),
        pytest.param((7, 4, 6), (-1, 2, 3), (1, 1, 1), id="whole-frame-axis"),
        pytest.param((4, 6, 6), (1, 1, 1), (1, 1, 1), id="itself-only"),
    ],
)
def test_every_query_keeps_exactly_its_window_and_itself(grid: Triple, window: Triple, stride: Triple) -> None:
    method = NeighborhoodAttnProcessor(window=window, stride=stride)
    mask = token_mask(method, grid)[0]
    whole = tuple(size if width == -1 else width for size, width in zip(grid, window, strict=True))
    assert (mask.sum(1) == math.prod(whole)).all()
    if stride == (1, 1, 1):
        assert mask.diagonal().all()
    assert method.ideal_density(TokenLayout(grid)) == pytest.approx(math.prod(whole) / math.prod(grid))


def test_causal_axis_hides_later_frames_and_keeps_fewer_keys_at_the_start() -> None:
    method = NeighborhoodAttnProcessor(window=(3, -1, -1), causal=(True, False, False))
    mask = token_mask(method, (5, 2, 3))[0]
    assert (mask.sum(1).reshape(5, 6) == torch.tensor([6, 12, 18, 18, 18])[:, None]).all()
    assert not mask[:6, 6:].any()


@pytest.mark.parametrize(
    ("grid", "window", "stride", "density"),
    [
        pytest.param((30, 48, 80), (18, 24, 24), (16, 8, 8), 0.09, id="hunyuan-91-percent"),
        pytest.param((1, 256, 256), (1, 80, 80), (1, 16, 16), 80**2 / 256**2, id="flux-4k"),
        pytest.param((16, 44, 80), (16, 32, 48), (1, 8, 16), 0.43636, id="cosmos-7b"),
    ],
)
def test_published_strided_windows_lose_nothing_to_tiles(
    grid: Triple, window: Triple, stride: Triple, density: float
) -> None:
    layout = TokenLayout(grid)
    method = NeighborhoodAttnProcessor(window=window, stride=stride)
    assert method.ideal_density(layout) == pytest.approx(density, abs=1e-5)
    assert method.plan(layout).visual_density == pytest.approx(density, abs=1e-5)


def test_the_box_chosen_touches_the_fewest_pairs() -> None:
    layout = TokenLayout((21, 30, 52))
    options = {"window": (7, 12, 20)}
    chosen = NeighborhoodAttnProcessor(**options).plan(layout)  # type: ignore[arg-type]
    others = [
        NeighborhoodAttnProcessor(tile=tile, **options).plan(layout)  # type: ignore[arg-type]
        for tile in itertools.permutations((2, 8, 8), 3)
    ]
    assert chosen.tiles.tile_size == 128
    assert chosen.counts.sum() <= min(plan.counts.sum() for plan in others)


def test_default_window_is_half_of_each_axis() -> None:
    assert (token_mask(NeighborhoodAttnProcessor(), (5, 6, 7))[0].sum(1) == 3 * 3 * 4).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"window": (3, 3)}, "window must be three integers", id="two-axes"),
        pytest.param({"window": (3, 0, 3)}, "window must be three integers of at least 1 or -1", id="window-0"),
        pytest.param({"stride": (0, 1, 1)}, "stride must be three integers", id="stride-0"),
        pytest.param({"dilation": (1, 1, 0)}, "dilation must be three integers", id="dilation-0"),
        pytest.param({"causal": (True, False)}, "causal must be three booleans", id="causal"),
        pytest.param({"tile": (1, 8, 0)}, "tile must be three integers", id="tile"),
        pytest.param({"density": 0.5, "dilation": (1, 2, 2)}, "density needs dilation 1", id="density-dilated"),
        pytest.param({"density": 0.5, "causal": (True, False, False)}, "no causal axis", id="density-causal"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttnProcessor(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"window": (6, 3, 3)}, "window 6 with dilation 1 does not fit the frame axis of 5", id="frame"),
        pytest.param(
            {"window": (1, 5, 3), "dilation": (1, 2, 1)}, "window 5 with dilation 2 .* row axis of 9", id="dilated-row"
        ),
        pytest.param({"window": (1, 3, -1), "dilation": (1, 1, 12)}, "dilation 12 .* column axis of 11", id="column"),
        pytest.param({"window": (1, 3, 3), "stride": (1, 4, 1)}, "stride 4 and window 3 on the row axis", id="stride"),
    ],
)
def test_windows_that_do_not_fit_the_grid_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttnProcessor(**options).plan(TokenLayout((5, 9, 11)))  # type: ignore[arg-type]
