"""Attention tile: frames see themselves and a few reference frames, which see and are seen by all frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import BlockPlan, Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import StaticMethod, largest_within
from dit_accel.plan import plan_from_tile_mask

# Of one frame, so that none is cut: frames are seldom whole numbers of tiles.
BOXES: list[Triple] = [(1, 8, 16), (1, 16, 8)]
BOX_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class AttentionTileAttnProcessor(StaticMethod):
    """The frame-level mask of Efficient-vDiT (arXiv 2502.06155), in cost linear in the number of frames.

    Of F latent frames k are reference frames, floor(i F / k) for i = 0 ... k - 1: evenly spaced, the first one frame 0,
    which causal video encoders treat apart. Query frame f sees all of key frame f' when

        f = f',  or f is a reference frame,  or f' is one.

    The density is (F^2 - (F - k)^2 + F - k) / F^2. With k >= F - 1, and so on every image, nothing is left out.

    Args:
        reference_frames: k, in latent frames, from 1; more than there are means all. Default 4.
        density: replaces ``reference_frames`` by the largest k that stays within it, at least 1.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "attention_tile"

    reference_frames: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_frames < 1:
            raise ValueError(f"reference_frames must be at least 1, got {self.reference_frames}.")

    def plan(self, layout: TokenLayout) -> BlockPlan:
        """The boxes of the frames seen."""
        _, rows, columns = layout.grid
        cuts = BOXES if rows * columns > BOX_TOKENS else [(1, rows, columns)]
        tiles = min((layout.boxes(box) for box in cuts), key=lambda tiles: tiles.num_tiles)
        frame = torch.arange(tiles.num_tiles) // (tiles.tiles[1] * tiles.tiles[2])
        return plan_from_tile_mask(layout, tiles, self._frames_seen(layout)[frame[:, None], frame])

    def ideal_density(self, layout: TokenLayout) -> float:
        """Share of the grid's pairs in frames seen; all that is computed."""
        return _share(layout.grid[0], self._references(layout))

    def _references(self, layout: TokenLayout) -> int:
        """k on this layout."""
        frames = layout.grid[0]
        if self.density is None:
            return min(self.reference_frames, frames)
        return 1 + largest_within(self.density, frames, lambda index: _share(frames, index + 1))

    def _frames_seen(self, layout: TokenLayout) -> Tensor:
        """Which key frames each query frame sees, bool [F, F]."""
        frames, count = layout.grid[0], self._references(layout)
        reference = torch.zeros(frames, dtype=torch.bool)
        reference[torch.arange(count) * frames // count] = True
        return torch.eye(frames, dtype=torch.bool) | reference[:, None] | reference


def _share(frames: int, references: int) -> float:
    others = frames - references
    return (frames**2 - others**2 + others) / frames**2
