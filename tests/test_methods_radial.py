"""Radial attention against a mask built pair by pair, and against densities of the released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import RadialAttnProcessor, token_mask

WAN_69: Triple = (18, 48, 80)
HUNYUAN_117: Triple = (30, 48, 80)
HUNYUAN_125: Triple = (32, 45, 80)
WAN_81: Triple = (21, 45, 80)

PUBLISHED = [
    pytest.param(WAN_69, {"decay": 0.2}, (0.2871, 0.2987, 0.2689), id="wan-69f-decay-0.2"),
    pytest.param(WAN_69, {"decay": 1.0}, (0.4309, 0.4309, 0.4084), id="wan-69f-decay-1"),
    pytest.param(HUNYUAN_117, {"decay": 0.95, "sink": False}, (0.2746, 0.2932, 0.2593), id="hunyuan-117f"),
    pytest.param(HUNYUAN_125, {"decay": 0.95, "sink": False}, (0.2753, 0.3220, 0.2583), id="hunyuan-125f"),
    pytest.param(WAN_81, {"decay": 0.2}, (0.2622, 0.3028, 0.2454), id="wan-81f-ragged"),
]

SMALL = [
    pytest.param((6, 12, 12), 128, id="thinned-from-distance-2"),
    pytest.param((5, 9, 11), 32, id="frames-shorter-than-128"),
    pytest.param((3, 10, 20), 32, id="frames-not-whole-tiles"),
    pytest.param((7, 1, 3), 16, id="many-frames-per-tile"),
    pytest.param((1, 7, 9), 16, id="image"),
    pytest.param((4, 16, 16), 64, id="frames-whole-tiles"),
    pytest.param((5, 5, 19), 32, id="frames-one-token-short-of-whole-tiles"),
]


def frame_pair(i: int, j: int, size: int, method: RadialAttnProcessor) -> np.ndarray:
    """The token rule between query frame i and key frame j, bool [size, size]."""
    if method.sink and j == 0:
        return np.ones((size, size), dtype=bool)
    distance = abs(i - j)
    scale = 2 ** size.bit_length() / 2 ** distance.bit_length()
    if distance <= 1:
        width = size // 2 if distance == 1 and method.first_distance == "half" else size
    else:
        width = max(method.decay * scale, method.tile)
    if scale < 128 and distance % int(128 / scale) != 0:
        return np.zeros((size, size), dtype=bool)
    position = np.arange(size)
    return np.abs(position[:, None] - position[None, :]) <= width


def token_rule(grid: Triple, method: RadialAttnProcessor) -> np.ndarray:
    frames, size = grid[0], grid[1] * grid[2]
    return np.block([[frame_pair(i, j, size, method) for j in range(frames)] for i in range(frames)])


def any_tiles(mask: np.ndarray, tile: int) -> np.ndarray:
    count = -(-len(mask) // tile)
    starts = [slice(tile * a, tile * (a + 1)) for a in range(count)]
    return np.array([[mask[rows, columns].any() for columns in starts] for rows in starts])


def strict_tiles(grid: Triple, method: RadialAttnProcessor) -> np.ndarray:
    """The released judgement: each frame pair laid on tiles at its remainder offsets, OR over pairs."""
    frames, size, tile = grid[0], grid[1] * grid[2], method.tile
    count, per_frame = -(-frames * size // tile), -(-size // tile)
    kept = np.zeros((count, count), dtype=bool)
    for i in range(frames):
        for j in range(frames):
            placed = np.zeros(((per_frame + 1) * tile, (per_frame + 1) * tile), dtype=bool)
            row, column = i * size % tile, j * size % tile
            placed[row : row + size, column : column + size] = frame_pair(i, j, size, method)
            for a in range(per_frame):
                for b in range(per_frame):
                    block = placed[a * tile : (a + 1) * tile, b * tile : (b + 1) * tile]
                    density = block.sum(0) / tile
                    filled = (density > 0).sum()
                    if filled and (density > 1 / 3).sum() / filled > 0.6:
                        kept[i * size // tile + a, j * size // tile + b] = True
    return kept


@pytest.mark.parametrize(("grid", "options", "densities"), PUBLISHED)
def test_densities_equal_those_of_the_released_rule(
    grid: Triple, options: dict[str, float], densities: tuple[float, float, float]
) -> None:
    layout = TokenLayout(grid)
    whole_tiles = layout.visual_tokens // 128  # the released mask has no ragged last tile
    tile_densities = [
        RadialAttnProcessor(tile_rule=rule, **options)  # type: ignore[arg-type]
        .plan(layout)
        .tile_mask()[0, 0, :whole_tiles, :whole_tiles]
        .double()
        .mean()
        .item()
        for rule in ("strict", "any")
    ]
    ideal = RadialAttnProcessor(**options).ideal_density(layout)  # type: ignore[arg-type]
    assert [round(value, 4) for value in (*tile_densities, ideal)] == list(densities)


@pytest.mark.parametrize("first_distance", ["full", "half"])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize(("grid", "tile"), SMALL)
def test_any_rule_computes_every_tile_that_holds_a_kept_pair(
    grid: Triple, tile: int, sink: bool, first_distance: str
) -> None:
    method = RadialAttnProcessor(decay=0.3, sink=sink, first_distance=first_distance, tile=tile)  # type: ignore[arg-type]
    rule = token_rule(grid, method)
    plan = method.plan(TokenLayout(grid))
    np.testing.assert_array_equal(plan.tile_mask()[0, 0].numpy(), any_tiles(rule, tile))
    assert not (torch.from_numpy(rule) & ~token_mask(method, grid)[0]).any()
    assert method.ideal_density(TokenLayout(grid)) == pytest.approx(rule.mean(), abs=1e-12)


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize(("grid", "tile"), SMALL)
def test_strict_rule_is_the_released_judgement_plus_diagonal_and_ragged_tile(
    grid: Triple, tile: int, sink: bool
) -> None:
    method = RadialAttnProcessor(decay=0.3, sink=sink, tile=tile, tile_rule="strict")
    expected = strict_tiles(grid, method)
    np.fill_diagonal(expected, True)
    if grid[0] * grid[1] * grid[2] % tile:
        touched = any_tiles(token_rule(grid, method), tile)
        expected[-1], expected[:, -1] = touched[-1], touched[:, -1]
    np.testing.assert_array_equal(method.plan(TokenLayout(grid)).tile_mask()[0, 0].numpy(), expected)


@pytest.mark.parametrize("rule", ["any", "strict"])
@pytest.mark.parametrize("grid", [WAN_69, HUNYUAN_125, WAN_81, (13, 30, 45), (5, 9, 11)], ids=str)
def test_diagonal_is_kept_and_only_the_sink_is_asymmetric(grid: Triple, rule: str) -> None:
    method = RadialAttnProcessor(decay=0.2, sink=False, tile_rule=rule)  # type: ignore[arg-type]
    kept = method.plan(TokenLayout(grid)).tile_mask()[0, 0]
    assert kept.diagonal().all()
    if rule == "any":
        assert torch.equal(kept, kept.T)


def test_sink_shows_the_first_frame_to_every_query() -> None:
    mask = token_mask(RadialAttnProcessor(decay=0.2, tile=32), (6, 8, 16))[0]
    assert mask[:, :128].all()
    assert not token_mask(RadialAttnProcessor(decay=0.2, tile=32, sink=False), (6, 8, 16))[0, :, :128].all()


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize("grid", [(6, 12, 12), (5, 9, 11), (1, 16, 16)], ids=str)
def test_density_takes_the_densest_mask_of_its_family(grid: Triple, sink: bool) -> None:
    frames, size = grid[0], grid[1] * grid[2]
    position = np.arange(size)

    def thinning(distance: int) -> int:
        """2^bl(d) over the largest power of two dividing d, as a power of two; 0 for the frame itself."""
        return distance.bit_length() - (distance & -distance).bit_length() + 1 if distance else 0

    most = max(thinning(distance) for distance in range(frames))

    def member(scale: int) -> np.ndarray:
        """w(d) = c * ell(d) with c = scale / 2^bl(s); below zero, distances dropped one level after the other."""
        rows = []
        for i in range(frames):
            row = []
            for j in range(frames):
                near = np.abs(position[:, None] - position[None, :]) <= max(scale, 0) / 2 ** abs(i - j).bit_length()
                kept = near if thinning(abs(i - j)) <= most + min(scale, 0) else np.zeros_like(near)
                row.append(np.ones_like(near) if sink and j == 0 and frames > 1 else kept)
            rows.append(row)
        return np.block(rows)

    layout = TokenLayout(grid)
    sizes = layout.raster(32).tile_tokens().numpy()
    reached = []
    for scale in [*range(-most, 0), *range(0, 3000, 7)]:
        rule = member(scale)
        pairs = (any_tiles(rule, 32) * np.outer(sizes, sizes)).sum() / layout.visual_tokens**2
        reached.append(pairs)
        if rule.all():
            break
    assert reached == sorted(reached)
    assert reached[-1] == 1
    for target in (0.1, 0.3, 0.5, 0.8):
        got = RadialAttnProcessor(density=target, sink=sink, tile=32).plan(layout).visual_density
        assert got <= max(target, reached[0]) + 1e-9
        assert got >= max(value for value in reached if value <= max(target, reached[0])) - 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"decay": 0.0}, "decay must be above 0", id="decay"),
        pytest.param({"first_distance": "third"}, "first_distance must be full or half", id="first_distance"),
        pytest.param({"tile_rule": "most"}, "tile_rule must be any or strict", id="tile_rule"),
        pytest.param({"tile": 0}, "tile must be at least 1", id="tile"),
        pytest.param({"density": 1.5}, "density must be in", id="density"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadialAttnProcessor(**options)  # type: ignore[arg-type]
