"""Means over the boxes of a token grid, and over boxes of boxes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import TileGrid, Triple
from dit_accel.kernels.selection.backend import runs_triton


def tile_means(x: Tensor, tiles: TileGrid, prefix: int = 0) -> Tensor:
    """Mean of the valid tokens of each tile; a box that sticks out of the grid divides by what it holds.

    Args:
        x: queries, keys or values [B, L, H, D], any strides; text before and after the grid is left out.
        tiles: the grid and the boxes to pool; they need not be the tiles that attention runs on.
        prefix: text tokens before the grid.

    Returns:
        float32 [B, H, num_tiles, D], summed in float32; differentiable.

    Raises:
        ValueError: a sequence too short for the text before the grid and the grid.
    """
    if x.shape[1] < prefix + tiles.num_tokens:
        raise ValueError(
            f"x must hold {prefix} tokens before the grid and {tiles.num_tokens} on it, got {x.shape[1]} in all."
        )
    if runs_triton(x):
        means: Tensor = _TritonMeans.apply(x, tiles, prefix)  # type: ignore[no-untyped-call]
        return means
    grid = x[:, prefix : prefix + tiles.num_tokens].transpose(1, 2)
    return _box_sums(grid.float(), tiles) / tiles.tile_tokens(x.device)[:, None]


def pool_means(means: Tensor, tiles: TileGrid, factor: Triple) -> tuple[Tensor, TileGrid]:
    """The next level of a pyramid: means over boxes of ``factor`` tiles, as if pooled from the tokens.

    Args:
        means: float32 [B, H, num_tiles, D], of ``tiles``.
        tiles: the level at hand.
        factor: tiles of one coarser tile per axis.

    Returns:
        The means of the coarser tiles, float32 [B, H, coarser num_tiles, D], and these tiles.
    """
    t, h, w = (step * times for step, times in zip(tiles.tile, factor, strict=True))
    coarser = TileGrid(tiles.grid, (t, h, w))
    sums = _box_sums(means * tiles.tile_tokens(means.device)[:, None], TileGrid(tiles.tiles, factor))
    return sums / coarser.tile_tokens(means.device)[:, None], coarser


class _TritonMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: TileGrid, prefix: int) -> Tensor:
        from dit_accel.kernels.selection.triton_pool import triton_tile_means

        ctx.tiles, ctx.prefix, ctx.length, ctx.dtype = tiles, prefix, x.shape[1], x.dtype
        return triton_tile_means(x, tiles, prefix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Each token gets its share of its box, text nothing."""
        tiles: TileGrid = ctx.tiles
        shares = (gradient / tiles.tile_tokens(gradient.device)[:, None]).to(ctx.dtype).transpose(1, 2)
        on_grid = shares.index_select(1, tiles.token_tile(gradient.device))
        after = ctx.length - ctx.prefix - tiles.num_tokens
        return F.pad(on_grid, (0, 0, 0, 0, ctx.prefix, after)), None, None


def _box_sums(x: Tensor, tiles: TileGrid) -> Tensor:
    """[..., num_tokens, D] -> [..., num_tiles, D]."""
    t, h, w = (count * step - size for count, step, size in zip(tiles.tiles, tiles.tile, tiles.grid, strict=True))
    x = F.pad(x.unflatten(-2, tiles.grid), (0, 0, 0, w, 0, h, 0, t))
    for axis in (-4, -3, -2):
        x = x.unflatten(axis, (tiles.tiles[axis + 4], tiles.tile[axis + 4])).sum(axis)
    return x.flatten(-4, -2)
