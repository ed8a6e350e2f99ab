"""GRAT: tokens attend in groups, to the groups around theirs (B) or to those in line with it (X)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dit_accel.kernels.block_sparse.plan import AxisWindows, TileGrid, Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import WindowMethod, check_triple, largest_within
from dit_accel.plan import best_boxes, windows_density


@dataclass(frozen=True, kw_only=True)
class GRATAttnProcessor(WindowMethod):
    """Grouping first, attending smartly (arXiv 2505.14687): all queries of a group of tokens share one set of keys.

    The grid is cut into boxes, the groups; a group has an index g per axis. With radius b, query group g sees key
    group g' when

        pattern "B":  |g_a - g'_a| <= b on every axis a,
        pattern "X":  |g_a - g'_a| <= b on any axis a of more than one token.

    X with b = 0 is the row and the column of groups on an image, and three planes of groups on a video. Groups at the
    border have fewer neighbours. Sizes that do not divide leave a smaller last group.

    ``density=`` replaces ``radius``: from the group alone, the radius grows one axis at a time (column, row, frame)
    until everything is seen; where the group alone is too much, it is split into equal parts, first down to the box.

    Args:
        pattern: "X" (default) or "B".
        radius: b, in groups. Default None: 1 for B, 0 for X.
        group: tokens per group and axis (frame, row, column). Default None: (1, 16, 16) on images, (4, 8, 8) on videos.
        tile: tokens per box and axis; default None takes the box of 128 tokens that touches the fewest pairs of boxes,
            which divides a group of 256 tokens in two.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "grat"

    pattern: Literal["B", "X"] = "X"
    radius: int | None = None
    group: Triple | None = None
    tile: Triple | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in ("B", "X"):
            raise ValueError(f"pattern must be B or X, got {self.pattern!r}.")
        if self.radius is not None and self.radius < 0:
            raise ValueError(f"radius must be at least 0 groups, got {self.radius}.")
        if self.group is not None:
            check_triple("group", self.group)
        if self.tile is not None:
            check_triple("tile", self.tile)

    def windows(self, layout: TokenLayout) -> AxisWindows:
        if self.density is None:
            return self._given(layout)
        boxes = self.boxes(layout)
        family = self._family(layout, boxes.tile)

        def density_of(index: int) -> float:
            return windows_density(boxes, self._bounds(layout, *family[index]))

        return self._bounds(layout, *family[largest_within(self.density, len(family), density_of)])

    def boxes(self, layout: TokenLayout) -> TileGrid:
        """One cut for all of ``density=``, so that more groups never touch fewer pairs."""
        return layout.boxes(self.tile) if self.tile is not None else best_boxes(layout, self._given(layout))

    def _given(self, layout: TokenLayout) -> AxisWindows:
        radius = self.radius if self.radius is not None else 1 if self.pattern == "B" else 0
        return self._bounds(layout, self._group(layout), (radius, radius, radius))

    def _group(self, layout: TokenLayout) -> Triple:
        if self.group is not None:
            return self.group
        return (1, 16, 16) if layout.grid[0] == 1 else (4, 8, 8)

    def _family(self, layout: TokenLayout, box: Triple) -> list[tuple[Triple, Triple]]:
        """Group and radius per axis, each mask inside the next, from single tokens to everything."""
        group = self._group(layout)
        parts = [group]
        while max(parts[0]) > 1:
            parts.insert(0, _split(parts[0], box))
        farthest = max(layout.boxes(group).tiles) - 1
        radii = [(step // 3, (step + 1) // 3, (step + 2) // 3) for step in range(1, 3 * farthest + 1)]
        return [(size, (0, 0, 0)) for size in parts] + [(group, radius) for radius in radii]

    def _bounds(self, layout: TokenLayout, group: Triple, radius: Triple) -> AxisWindows:
        union = self.pattern == "X"
        axes = []
        for size, length, reach in zip(layout.grid, group, radius, strict=True):
            start = torch.arange(size) // length * length
            first = (start - reach * length).clamp(min=0)
            last = (start + (reach + 1) * length - 1).clamp(max=size - 1)
            if union and size == 1 and layout.visual_tokens > 1:
                first = last + 1  # sharing the only index of an axis means nothing
            axes.append(torch.stack([first, last], 1))
        return AxisWindows(torch.cat(axes).int(), union=union)


def _split(group: Triple, box: Triple) -> Triple:
    """The group cut into the fewest equal parts along the axis on which it holds the most boxes."""
    axis = max((axis for axis in range(3) if group[axis] > 1), key=lambda axis: group[axis] / box[axis])
    part = next(size for size in range(group[axis] // 2, 0, -1) if group[axis] % size == 0)
    t, h, w = (part if other == axis else size for other, size in enumerate(group))
    return t, h, w
