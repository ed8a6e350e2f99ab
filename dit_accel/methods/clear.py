"""CLEAR: each token sees the disc of the image around itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel.kernels.block_sparse.plan import MAX_RADIUS, AxisWindows, TileGrid, Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import WindowMethod, check_triple, largest_within
from dit_accel.plan import best_boxes, windows_density


@dataclass(frozen=True, kw_only=True)
class CLEARAttnProcessor(WindowMethod):
    """Circular windows, in cost linear in the number of tokens (arXiv 2412.16112).

    The query at row y and column x sees the key at y', x' when

        (y - y')^2 + (x - x')^2 < r^2,

    exactly for each token, cut off at the borders. Text sees and is seen by everything. The paper is about images; on
    a video the same disc holds in every frame that ``frames`` admits.

    Boxes of tokens are two-dimensional, so that a disc touches few of them; those that its edge crosses are masked.

    Args:
        radius: r, in tokens. Default 16; the paper has 8, 16 and 32.
        frames: a pair may be this many latent frames apart, 0 the same frame only. Default None: any number.
        tile: tokens per box and axis; default None takes the box of 128 tokens that touches the fewest pairs of boxes.
        density: replaces ``radius`` by the largest that stays within it; it needs ``frames=None``, which alone can keep
            every pair.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "clear"

    radius: int = 16
    frames: int | None = None
    tile: Triple | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.radius <= MAX_RADIUS:
            raise ValueError(f"radius must be from 1 to {MAX_RADIUS} tokens, got {self.radius}.")
        if self.frames is not None and self.frames < 0:
            raise ValueError(f"frames must be at least 0 or None, got {self.frames}.")
        if self.density is not None and self.frames is not None:
            raise ValueError(f"density needs frames=None, got frames={self.frames}; set radius instead of density.")
        if self.tile is not None:
            check_triple("tile", self.tile)

    def windows(self, layout: TokenLayout) -> AxisWindows:
        if self.density is None:
            return self._disc(layout, self.radius)
        boxes, (_, rows, columns) = self.boxes(layout), layout.grid
        everything = math.isqrt((rows - 1) ** 2 + (columns - 1) ** 2) + 1

        def density_of(index: int) -> float:
            return windows_density(boxes, self._disc(layout, index + 1))

        return self._disc(layout, 1 + largest_within(self.density, everything, density_of))

    def boxes(self, layout: TokenLayout) -> TileGrid:
        """One cut for all of ``density=``, so that larger discs never touch fewer pairs."""
        if self.tile is not None:
            return layout.boxes(self.tile)
        return best_boxes(layout, self._disc(layout, self.radius))

    def _disc(self, layout: TokenLayout, radius: int) -> AxisWindows:
        """The disc and the box around it."""
        reach = (layout.grid[0] if self.frames is None else self.frames, radius - 1, radius - 1)
        axes = []
        for size, distance in zip(layout.grid, reach, strict=True):
            token = torch.arange(size)
            axes.append(torch.stack([(token - distance).clamp(min=0), (token + distance).clamp(max=size - 1)], 1))
        return AxisWindows(torch.cat(axes).int(), radius=radius)
