"""Where the tokens of one attention call lie: the latent grid and the text span."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dit_accel.kernels.block_sparse.plan import TileGrid, Triple, joint_density

TextPosition = Literal["none", "prefix", "suffix"]


@dataclass(frozen=True)
class TokenLayout:
    """The sequence of one self- or joint-attention call.

    Args:
        grid: latent grid after patchify, (frames, rows, columns); an image has one frame.
        text_tokens: text tokens in the same sequence, padding included.
        text_position: "prefix" (before the grid, as Flux), "suffix" (after it, as HunyuanVideo) or "none" (as Wan).
    """

    grid: Triple
    text_tokens: int = 0
    text_position: TextPosition = "none"

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid must be three sizes of at least 1 (frame, row, column), got {self.grid}.")
        if self.text_position not in ("none", "prefix", "suffix"):
            raise ValueError(f"text_position must be none, prefix or suffix, got {self.text_position!r}.")
        if self.text_tokens < 0 or (self.text_tokens > 0 and self.text_position == "none"):
            raise ValueError(
                f"text_tokens must be 0 when text_position is none and never negative, got {self.text_tokens}."
            )

    @property
    def visual_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        return self.visual_tokens + self.text_tokens

    @property
    def prefix(self) -> int:
        return self.text_tokens if self.text_position == "prefix" else 0

    @property
    def suffix(self) -> int:
        return self.text_tokens if self.text_position == "suffix" else 0

    def without_text(self) -> TokenLayout:
        """The grid alone."""
        return replace(self, text_tokens=0, text_position="none")

    def joint_density(self, visual_density: float) -> float:
        """A share of the grid's pairs as a share of all pairs, text included."""
        return joint_density(visual_density, self.visual_tokens, self.text_tokens)

    def boxes(self, tile: Triple) -> TileGrid:
        """The grid cut into boxes of (frames, rows, columns)."""
        return TileGrid(self.grid, tile)

    def raster(self, tile: int) -> TileGrid:
        """The grid's tokens cut into runs of ``tile`` consecutive tokens, across rows and frames."""
        return TileGrid((1, 1, self.visual_tokens), (1, 1, tile))
