"""Sliding tile attention: all queries of a tile of tokens see the tiles of a window around it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, TileGrid, Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import StaticMethod, check_triple, largest_within
from dit_accel.plan import plan_from_tile_mask, plan_from_windows, windows_density

BOX_TOKENS = 128  # of the operator's largest box


@dataclass(frozen=True, kw_only=True)
class SlidingTileAttnProcessor(StaticMethod):
    """Windows that slide by whole tiles, STA (arXiv 2502.04507): no tile is cut, so nothing is computed in vain.

    The grid is cut into tiles; on an axis of n tokens and m tiles, p is the tile of a query. With a window of k tiles,
    reach h = floor(k / 2) and centre c = min(max(p, h), m - 1 - h), it sees the keys of the tiles

        c - h, ..., c + h   on every axis.

    An odd window keeps k tiles, borders included. An even one keeps k + 1, or the whole axis if k is at least m.
    Sizes that do not divide leave a smaller last tile.

    A tile may have more tokens than a box of the operator, 384 by default: it is then a group of boxes that share one
    set of keys. Boxes divide the tile, (2, 8, 8) the default one, so that none is cut by a window.

    Args:
        window: k per axis in tiles (frame, row, column), -1 all of the axis; or a tuple of such windows, one per head.
            Default (3, 3, 3), a density of .09 on the 30 x 48 x 80 tokens of HunyuanVideo.
        tile: tokens per tile and axis. Default None: (1, 16, 16) on images, (6, 8, 8) on videos.
        density: replaces ``window``: from the tile alone, the window grows to the next odd number of tiles on the axis
            that sees the smallest share of itself, until everything is seen.

    Raises:
        ValueError: an option out of its range; from the operator, windows for another number of heads.
    """

    name: ClassVar[str] = "sliding_tile"

    window: Triple | tuple[Triple, ...] = (3, 3, 3)
    tile: Triple | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for window in self._heads():
            check_triple("window", window, also=-1)
        if self.tile is not None:
            check_triple("tile", self.tile)

    def plan(self, layout: TokenLayout) -> BlockPlan:
        """The boxes of the tiles seen, one list per head where windows are given per head."""
        boxes, windows = self._boxes(layout), self._windows(layout)
        masks = {
            window: plan_from_windows(layout, boxes, self._bounds(layout, window)).tile_mask()[0, 0]
            for window in set(windows)
        }
        return plan_from_tile_mask(layout, boxes, torch.stack([masks[window] for window in windows]))

    def ideal_density(self, layout: TokenLayout) -> float:
        """Share of the grid's pairs inside the tiles seen, the mean over heads; all that is computed."""
        shares = [self._share(layout, window) for window in self._windows(layout)]
        return sum(shares) / len(shares)

    def _heads(self) -> tuple[Triple, ...]:
        """The windows given, one for all heads or one per head."""
        given: Any = self.window
        per_head = isinstance(given, tuple) and len(given) > 0 and isinstance(given[0], tuple)
        return given if per_head else (given,)

    def _windows(self, layout: TokenLayout) -> tuple[Triple, ...]:
        if self.density is None:
            return self._heads()
        family = self._family(layout)
        return (family[largest_within(self.density, len(family), lambda i: self._share(layout, family[i]))],)

    def _family(self, layout: TokenLayout) -> list[Triple]:
        """Windows, each inside the next, from the tile alone to everything."""
        tiles = layout.boxes(self._tile(layout)).tiles
        family = [[1, 1, 1]]
        while any(width < count for width, count in zip(family[-1], tiles, strict=True)):
            wider = list(family[-1])
            wider[min(range(3), key=lambda axis: wider[axis] / tiles[axis])] += 2
            family.append(wider)
        return [(t, h, w) for t, h, w in family]

    def _share(self, layout: TokenLayout, window: Triple) -> float:
        return windows_density(layout.boxes((1, 1, 1)), self._bounds(layout, window))

    def _tile(self, layout: TokenLayout) -> Triple:
        if self.tile is not None:
            return self.tile
        return (1, 16, 16) if layout.grid[0] == 1 else (6, 8, 8)

    def _boxes(self, layout: TokenLayout) -> TileGrid:
        """The tile cut into equal boxes of as many tokens as the operator takes, long in columns and rows."""
        divisors = ([part for part in range(1, side + 1) if side % part == 0] for side in self._tile(layout))
        boxes = [(t, h, w) for t, h, w in itertools.product(*divisors) if t * h * w <= BOX_TOKENS]
        return layout.boxes(max(boxes, key=lambda box: (box[0] * box[1] * box[2], min(box[1:]), box[2])))

    def _bounds(self, layout: TokenLayout, window: Triple) -> AxisWindows:
        axes = []
        for size, side, width in zip(layout.grid, self._tile(layout), window, strict=True):
            tile, last = torch.arange(size) // side, (size - 1) // side
            reach = last + 1 if width == -1 else width // 2
            centre = tile.clamp(min=reach).clamp(max=last - reach)
            start, end = (centre - reach) * side, (centre + reach + 1) * side - 1
            axes.append(torch.stack([start.clamp(min=0), end.clamp(max=size - 1)], 1))
        return AxisWindows(torch.cat(axes).int())
