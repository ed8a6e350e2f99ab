"""What the block-sparse operator is told: tiles of a token grid, and which key tiles each query tile sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Triple = tuple[int, int, int]
Coordinates = tuple[Tensor, Tensor, Tensor]  # (frame, row, column)
MAX_RADIUS = 4096  # its square is the last up to which float32 counts every integer
Share = TypeVar("Share", float, Tensor)


def joint_density(visual_density: Share, grid_tokens: int, text_tokens: int) -> Share:
    """A share of the grid's pairs as a share of all pairs, where text sees and is seen by everything."""
    text_pairs = 2 * grid_tokens * text_tokens + text_tokens**2
    return (visual_density * grid_tokens**2 + text_pairs) / (grid_tokens + text_tokens) ** 2


def in_disc(rows: Tensor, columns: Tensor, radius: int) -> Tensor:
    """Whether distances along rows and columns, integers that broadcast, lie in the disc rows^2 + columns^2 < radius^2.

    In float32, as in the kernels: exact near the edge of a disc of at most ``MAX_RADIUS``, and never wrapped around.
    """
    return rows.float().square() + columns.float().square() < radius**2


@dataclass(frozen=True)
class TileGrid:
    """A token grid cut into boxes. Sizes that do not divide are normal: the last box of an axis is smaller.

    A *raster tile* of 128 consecutive tokens is the box (1, 1, 128) of the grid (1, 1, N).

    Args:
        grid: tokens per axis, (frame, row, column).
        tile: tokens of one whole tile per axis.
    """

    grid: Triple
    tile: Triple

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid must be three sizes of at least 1 (frame, row, column), got {self.grid}.")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile must be three sizes of at least 1 (frame, row, column), got {self.tile}.")

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tile_size(self) -> int:
        """Tokens of a whole tile."""
        return self.tile[0] * self.tile[1] * self.tile[2]

    @property
    def tiles(self) -> Triple:
        """Tiles per axis."""
        t, h, w = (-(-size // step) for size, step in zip(self.grid, self.tile, strict=True))
        return t, h, w

    @property
    def num_tiles(self) -> int:
        return self.tiles[0] * self.tiles[1] * self.tiles[2]

    def axis_sizes(self, axis: int, device: torch.device | None = None) -> Tensor:
        """Valid tokens of each tile along one axis, int64 [tiles[axis]]."""
        starts = torch.arange(self.tiles[axis], device=device) * self.tile[axis]
        return (self.grid[axis] - starts).clamp(max=self.tile[axis])

    def tile_tokens(self, device: torch.device | None = None) -> Tensor:
        """Valid tokens of each tile, int64 [num_tiles]; smaller than ``tile_size`` where a box sticks out."""
        t, h, w = (self.axis_sizes(axis, device) for axis in range(3))
        return (t[:, None, None] * h[None, :, None] * w[None, None, :]).reshape(-1)

    def coordinates(self, tokens: Tensor) -> Coordinates:
        """(frame, row, column) of tokens given by their position on the grid."""
        _, rows, columns = self.grid
        return tokens // (rows * columns), tokens // columns % rows, tokens % columns

    def token_tile(self, device: torch.device | None = None) -> Tensor:
        """The tile of each token in frame, row, column order, int64 [num_tokens]."""
        t, h, w = (torch.arange(size, device=device) // step for size, step in zip(self.grid, self.tile, strict=True))
        _, tiles_h, tiles_w = self.tiles
        return ((t[:, None, None] * tiles_h + h[None, :, None]) * tiles_w + w[None, None, :]).reshape(-1)


@dataclass(frozen=True, eq=False)
class AxisWindows:
    """An exact rule inside tiles, one interval per axis and query coordinate.

    On axis ``a`` a query at coordinate x admits a key at coordinate y when ``first <= y <= last`` and
    ``(y - x) % dilation[a] == 0``. A pair is kept when all axes admit it, or any axis if ``union``. With ``radius`` a
    pair that all axes admit is kept only if it lies in the disc ``rows**2 + columns**2 < radius**2`` as well, where
    rows and columns are its distances along these axes.

    Args:
        bounds: int32 [frames + rows + columns, 2], (first, last) inclusive; the three axes one after the other.
        dilation: step between admitted keys per axis.
        union: keep a pair that any single axis admits.
        radius: of the disc, in tokens, at most ``MAX_RADIUS``; None: no disc.
    """

    bounds: Tensor
    dilation: Triple = (1, 1, 1)
    union: bool = False
    radius: int | None = None

    def __post_init__(self) -> None:
        if self.radius is not None and not 1 <= self.radius <= MAX_RADIUS:
            raise ValueError(f"radius must be from 1 to {MAX_RADIUS} tokens, got {self.radius}.")
        if self.radius is not None and self.union:
            raise ValueError(
                "a disc narrows windows that every axis admits, got union=True; leave radius or union out."
            )

    def bounds_of(self, grid: Triple, axis: int) -> Tensor:
        """(first, last) of each query coordinate on one axis, int64 [size, 2]."""
        offset = sum(grid[:axis])
        return self.bounds[offset : offset + grid[axis]].long()

    def admitted(self, grid: Triple, axis: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Which of the coordinates ``keys``, [..., K], each of ``queries``, [..., Q], admits: bool [..., Q, K]."""
        first, last = self.bounds_of(grid, axis).to(keys.dtype)[queries][..., None].unbind(-2)
        keys = keys[..., None, :]
        inside = (keys >= first) & (keys <= last)
        if self.dilation[axis] == 1:
            return inside
        return inside & ((keys - queries[..., None]) % self.dilation[axis] == 0)

    def joined(self, axes: Sequence[Tensor]) -> Tensor:
        """The rule over all axes but for the disc, from one mask per axis of shapes that broadcast."""
        frame, row, column = axes
        return frame | row | column if self.union else frame & row & column

    def kept(self, grid: Triple, queries: Coordinates, keys: Coordinates) -> Tensor:
        """Which pairs the whole rule keeps, bool [..., Q, K], from the coordinates of queries, [..., Q], and keys."""
        kept = self.joined([self.admitted(grid, axis, queries[axis], keys[axis]) for axis in range(3)])
        if self.radius is None:
            return kept
        rows, columns = (queries[axis][..., None] - keys[axis][..., None, :] for axis in (1, 2))
        return kept & in_disc(rows, columns, self.radius)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Compact lists of the key tiles each query tile sees; never an L x L mask.

    Tokens lie as ``prefix`` text tokens, the grid in (frame, row, column) order, ``suffix`` text tokens. Text keys
    are seen by every query and text queries see every key of the sequence, so lists speak of grid tiles only, and of
    pooled tiles: ``tile_size`` consecutive ones of the pooled keys that a call brings along.

    Args:
        tiles: the grid and its tile.
        counts: int32 [B or 1, H or 1, Q], key tiles seen by each query tile (0 is allowed).
        partial: int32, the shape of ``counts``: how many of them, first in the list, need a mask inside the tile,
            because the tile sticks out of the grid, ``window`` cuts it or it is a pooled one.
        indices: int32 [B or 1, H or 1, Q, M], the key tiles, partial ones first, each part ascending; pooled tile j
            is number ``tiles.num_tiles + j`` and stands before all others; entries from ``counts`` on are
            unspecified but in range.
        prefix: text tokens before the grid.
        suffix: text tokens after the grid.
        window: exact rule inside partial tiles; None keeps every pair of a listed tile.
        pooled: how many pooled keys a call brings.
    """

    tiles: TileGrid
    counts: Tensor
    partial: Tensor
    indices: Tensor
    prefix: int = 0
    suffix: int = 0
    window: AxisWindows | None = None
    pooled: int = 0

    def __post_init__(self) -> None:
        if self.indices.ndim != 4 or self.indices.shape[2] != self.tiles.num_tiles:
            raise ValueError(
                f"indices must have shape [batch or 1, heads or 1, {self.tiles.num_tiles} query tiles, kept], "
                f"got {list(self.indices.shape)}."
            )
        if self.counts.shape != self.indices.shape[:3] or self.partial.shape != self.counts.shape:
            raise ValueError(
                f"counts and partial must have shape {list(self.indices.shape[:3])}, "
                f"got {list(self.counts.shape)} and {list(self.partial.shape)}."
            )

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.tiles.num_tokens + self.suffix

    @property
    def num_key_tiles(self) -> int:
        """Tiles of the grid and of the pooled keys."""
        return self.tiles.num_tiles - (-self.pooled // self.tiles.tile_size)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan with its tensors on ``device``."""
        window = self.window and replace(self.window, bounds=self.window.bounds.to(device))
        return replace(
            self,
            counts=self.counts.to(device),
            partial=self.partial.to(device),
            indices=self.indices.to(device),
            window=window,
        )

    def tile_mask(self) -> Tensor:
        """Which key tiles each query tile sees, pooled ones last: bool [B or 1, H or 1, Q, num_key_tiles]."""
        return self._first_listed(self.counts)

    def partial_mask(self) -> Tensor:
        """Which of them need a mask inside the tile: bool [B or 1, H or 1, Q, num_key_tiles]."""
        return self._first_listed(self.partial)

    def _first_listed(self, counts: Tensor) -> Tensor:
        slots = torch.arange(self.indices.shape[-1], device=self.device)
        mask = torch.zeros(*counts.shape, self.num_key_tiles, dtype=torch.int32, device=self.device)
        return mask.scatter_add_(-1, self.indices.long(), (slots < counts[..., None]).int()) > 0

    @cached_property
    def visual_density(self) -> float:
        """Share of the grid's query-key pairs inside listed tiles (what is computed), text left out.

        Pairs with pooled keys count as any other.
        """
        return float(self._visual_share())

    @property
    def density(self) -> float:
        """Share of all query-key pairs that are computed, text rows and columns included."""
        return joint_density(self.visual_density, self.tiles.num_tokens, self.prefix + self.suffix)

    def computed_share(self) -> Tensor:
        """``density`` as a float64 tensor on the plan's device, which nobody waits for."""
        return joint_density(self._visual_share(), self.tiles.num_tokens, self.prefix + self.suffix)

    def _visual_share(self) -> Tensor:
        device = self.device
        pooled = torch.arange(0, self.pooled, self.tiles.tile_size, device=device)
        sizes = self.tiles.tile_tokens(device)
        key_sizes = torch.cat([sizes, (self.pooled - pooled).clamp(max=self.tiles.tile_size)]).int()
        listed = torch.arange(self.indices.shape[-1], device=device) < self.counts[..., None]
        keys = torch.where(listed, key_sizes[self.indices.long()], 0).sum(-1)
        return (keys * sizes).sum(-1).double().mean() / self.tiles.num_tokens**2


class PooledKeys(NamedTuple):
    """Keys that stand for many, as the means of log-linear and pyramid attention do.

    A key of weight W counts as W equal keys: log W is added to its scores.

    Args:
        k, v: [B, P, H, D].
        log_weights: natural log, float32 [B or 1, H or 1, Q or 1, P], per query tile; -inf hides a key from it.
    """

    k: Tensor
    v: Tensor
    log_weights: Tensor

    @staticmethod
    def detached(k: Tensor | None, v: Tensor | None, log_weights: Tensor | None) -> PooledKeys | None:
        """From the optional arguments of an operator."""
        if k is None or v is None or log_weights is None:
            return None
        return PooledKeys(k.detach(), v.detach(), log_weights.detach())
