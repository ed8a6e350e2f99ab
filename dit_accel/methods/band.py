"""Band attention: each token sees the tokens before and after it in raster order, DiTFastAttn's window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import StaticMethod, largest_within
from dit_accel.plan import pairs_within, plan_from_tile_mask


@dataclass(frozen=True, kw_only=True)
class BandAttnProcessor(StaticMethod):
    """A band along the flattened grid (arXiv 2406.08552, and per head 2503.22796).

    The query at place i of the grid in raster order (frame by frame, row by row) sees the key at place j when

        |i - j| <= w,

    exactly for each token, cut off at both ends. Text sees and is seen by everything.

    Args:
        share: w as a share of the grid's tokens, rounded down, in (0, 1]. Default 0.125, DiTFastAttn's 1/8. It is the
            width of one side: the band is about twice as wide, a quarter of the tokens. The widths 8, 16 and 32 of its
            successor are of both sides, shares of 1/16, 1/32 and 1/64 here.
        half_width: w in tokens, in place of ``share``. Default None.
        tile: tokens per tile of the flattened grid. Default 128.
        density: replaces ``share`` and ``half_width`` by the widest band whose computed share stays within it.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "band"

    share: float = 0.125
    half_width: int | None = None
    tile: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}.")
        if self.half_width is not None and self.half_width < 0:
            raise ValueError(f"half_width must be at least 0 tokens or None, got {self.half_width}.")
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1 token, got {self.tile}.")

    def plan(self, layout: TokenLayout) -> BlockPlan:
        """The tiles that the band touches, and the band itself inside those that it cuts."""
        tiles, width = layout.raster(self.tile), self._half_width(layout)
        token = torch.arange(layout.visual_tokens)
        ends = torch.stack([token - width, token + width], 1).clamp(0, layout.visual_tokens - 1)
        band = AxisWindows(torch.cat([ends.new_zeros(2, 2), ends]).int())  # one frame of one row
        first = torch.arange(tiles.num_tiles) * self.tile
        last = first + tiles.tile_tokens() - 1
        touched = first - last[:, None] <= width
        covered = last - first[:, None] <= width
        keep, whole = touched & touched.T, covered & covered.T
        return plan_from_tile_mask(layout, tiles, keep, whole, None if bool((whole == keep).all()) else band)

    def ideal_density(self, layout: TokenLayout) -> float:
        """Share of the grid's pairs inside the band."""
        return pairs_within(layout.visual_tokens, self._half_width(layout)) / layout.visual_tokens**2

    def _half_width(self, layout: TokenLayout) -> int:
        """w on ``layout``, at most the distance of its ends."""
        tokens = layout.visual_tokens
        if self.density is not None:
            return largest_within(self.density, tokens, lambda width: self._computed(tokens, width))
        width = int(self.share * tokens) if self.half_width is None else self.half_width
        return min(width, tokens - 1)

    def _computed(self, tokens: int, width: int) -> float:
        """Share of the grid's pairs in tiles that a band touches."""
        count = -(-tokens // self.tile)
        reach = min(-(-width // self.tile), count - 1)  # tiles d apart have a gap of (d - 1) * tile + 1 tokens
        missing = count * self.tile - tokens  # of the last tile, which sees and is seen by reach + 1 tiles
        pairs = pairs_within(count, reach) * self.tile**2 - missing * (2 * (reach + 1) * self.tile - missing)
        return pairs / tokens**2
