"""GRAT against groups compared token by token, and against published densities."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import GRATAttnProcessor, token_mask

PUBLISHED = [
    pytest.param("B", (1, 64, 64), 0.391, id="B-64"),
    pytest.param("B", (1, 128, 128), 0.118, id="B-128"),
    pytest.param("B", (1, 256, 256), 0.032, id="B-256"),
    pytest.param("B", (1, 512, 512), 0.0084, id="B-512"),
    pytest.param("X", (1, 64, 64), 0.4375, id="X-64"),
    pytest.param("X", (1, 128, 128), 0.234, id="X-128"),
    pytest.param("X", (1, 256, 256), 0.121, id="X-256"),
    pytest.param("X", (1, 512, 512), 0.0615, id="X-512"),
    pytest.param("B", (32, 48, 80), 0.0428, id="B-hunyuan"),
    pytest.param("X", (32, 48, 80), 0.344, id="X-hunyuan"),
]

GRIDS: list[Triple] = [(5, 4, 7), (1, 9, 13), (3, 1, 20), (1, 1, 30), (1, 1, 1)]


def pair_rule(grid: Triple, pattern: str, group: Triple, radius: int) -> torch.Tensor:
    """Every pair of tokens judged by the indices of their groups."""
    tokens = list(itertools.product(*(range(size) for size in grid)))
    crossed = [axis for axis in range(3) if grid[axis] > 1] or [0]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            near = [abs(x // g - y // g) <= radius for x, y, g in zip(query, key, group, strict=True)]
            mask[i, j] = all(near) if pattern == "B" else any(near[axis] for axis in crossed)
    return mask


@pytest.mark.parametrize(("pattern", "grid", "density"), PUBLISHED)
def test_densities_of_the_paper_with_groups_of_whole_tiles(pattern: str, grid: Triple, density: float) -> None:
    layout = TokenLayout(grid)
    method = GRATAttnProcessor(pattern=pattern)  # type: ignore[arg-type]
    plan = method.plan(layout)
    digits = len(str(density)) - 2
    assert round(method.ideal_density(layout), digits) == density
    assert plan.visual_density == pytest.approx(method.ideal_density(layout), abs=1e-9)
    assert plan.tiles.tile == ((1, 8, 16) if grid[0] == 1 else (2, 8, 8))
    assert int(plan.partial.sum()) == 0


@pytest.mark.parametrize("tile", [None, (1, 4, 4)], ids=["chosen", "1x4x4"])
@pytest.mark.parametrize(
    ("pattern", "group", "radius"),
    [
        pytest.param("B", (2, 3, 4), 1, id="B"),
        pytest.param("B", (2, 4, 4), 0, id="B-own-group"),
        pytest.param("B", (1, 2, 2), 2, id="B-radius-2"),
        pytest.param("X", (2, 3, 4), 0, id="X"),
        pytest.param("X", (1, 2, 3), 1, id="X-radius-1"),
        pytest.param("X", (16, 16, 16), 0, id="X-one-group"),
    ],
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mask_is_the_group_rule(grid: Triple, pattern: str, group: Triple, radius: int, tile: Triple | None) -> None:
    method = GRATAttnProcessor(pattern=pattern, group=group, radius=radius, tile=tile)  # type: ignore[arg-type]
    rule = pair_rule(grid, pattern, group, radius)
    mask = token_mask(method, grid)[0]
    assert torch.equal(mask, rule)
    assert torch.equal(mask, mask.T)
    assert mask.diagonal().all()
    assert method.ideal_density(TokenLayout(grid)) == pytest.approx(rule.double().mean().item(), abs=1e-12)


def test_border_groups_see_fewer() -> None:
    mask = token_mask(GRATAttnProcessor(pattern="B", group=(1, 2, 2)), (1, 8, 8))[0]
    assert mask[0].sum() == 16
    assert mask[3 * 8 + 3].sum() == 36


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"pattern": "Y"}, "pattern must be B or X", id="pattern"),
        pytest.param({"radius": -1}, "radius must be at least 0", id="radius"),
        pytest.param({"group": (0, 8, 8)}, "group must be three integers", id="group"),
        pytest.param({"tile": 128}, "tile must be three integers", id="tile"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRATAttnProcessor(**options)  # type: ignore[arg-type]
