"""From a method's rule to the operator's lists."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, TileGrid, Triple, in_disc
from dit_accel.kernels.selection.lists import lists_from_mask
from dit_accel.layout import TokenLayout

# Boxes of 128 tokens that a per-axis rule is cut into; earlier ones win ties.
BOXES: tuple[Triple, ...] = ((1, 8, 16), (1, 16, 8), (2, 8, 8), (4, 4, 8), (4, 8, 4), (8, 4, 4), (1, 1, 128))


def plan_from_tile_mask(
    layout: TokenLayout,
    tiles: TileGrid,
    keep: Tensor,  # bool [Q, Q], [H, Q, Q] or [B, H, Q, Q]
    whole: Tensor | None = None,  # bool, same shape: every pair of the tile is kept
    window: AxisWindows | None = None,
) -> BlockPlan:
    """Compact lists from a mask over tiles.

    Args:
        layout: the sequence; its text span goes into the plan.
        tiles: the grid cut into tiles.
        keep: which key tiles each query tile sees.
        whole: which of them need no mask; the default is every one. Key tiles that stick out of the grid are
            treated as partial in any case.
        window: the rule inside partial tiles.
    """
    if tiles.num_tokens != layout.visual_tokens:
        raise ValueError(f"tiles cover {tiles.num_tokens} tokens, the layout has {layout.visual_tokens} on its grid.")
    keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
    partial = tiles.tile_tokens(keep.device) < tiles.tile_size
    if whole is not None:
        partial = partial | ~whole.reshape(keep.shape)
    lists = lists_from_mask(keep, partial, max(1, int(keep.sum(-1).max())))
    return BlockPlan(tiles, *lists, prefix=layout.prefix, suffix=layout.suffix, window=window)


def plan_from_windows(layout: TokenLayout, tiles: TileGrid, windows: AxisWindows) -> BlockPlan:
    """Lists of the tiles that a per-axis rule touches, with the exact rule kept for those it cuts.

    The rule is judged per axis, on at most a few hundred coordinates each, and the axes are then combined over
    tiles: no token-level mask is built.
    """
    axes = [_axis_tiles(windows, tiles, axis) for axis in range(3)]
    keep = _over_tiles(windows, [axis.touched for axis in axes], [axis.nearest for axis in axes])
    whole = _over_tiles(windows, [axis.covered for axis in axes], [axis.farthest for axis in axes])
    return plan_from_tile_mask(layout, tiles, keep, whole, None if bool((whole == keep).all()) else windows)


def best_boxes(layout: TokenLayout, windows: AxisWindows) -> TileGrid:
    """The grid cut into those of ``BOXES`` with which ``windows`` touches the fewest tile pairs.

    Tile pairs are what a kernel pays for, so boxes that stick far out of the grid count in full; those that cover
    twice the tokens of the tightest boxes are not looked at.
    """
    cuts = [layout.boxes(box) for box in BOXES]
    fewest = min(tiles.num_tiles for tiles in cuts)

    def touched_pairs(tiles: TileGrid) -> float:
        ones = [torch.ones(count) for count in tiles.tiles]
        return _touched_share(tiles, windows, ones) * tiles.num_tiles**2

    return min((tiles for tiles in cuts if tiles.num_tiles < 2 * fewest), key=touched_pairs)


def windows_density(tiles: TileGrid, windows: AxisWindows) -> float:
    """Share of the grid's pairs in tiles that ``windows`` touches; with tiles of one token, of the pairs it keeps."""
    return _touched_share(tiles, windows, [tiles.axis_sizes(axis) for axis in range(3)])


def _touched_share(tiles: TileGrid, windows: AxisWindows, weights: list[Tensor]) -> float:
    """Share of tile pairs that ``windows`` touches, a tile weighing the product of its ``weights`` per axis."""
    axes = [_axis_tiles(windows, tiles, axis) for axis in range(3)]
    weights = [weight.double() / weight.sum() for weight in weights]
    shares = [float(w @ axis.touched.double() @ w) for axis, w in zip(axes, weights, strict=True)]
    if windows.radius is not None:
        rows, columns = (_shares_by_distance(axes[axis], weights[axis]) for axis in (1, 2))
        within = in_disc(torch.arange(len(rows))[:, None], torch.arange(len(columns)), windows.radius)
        return shares[0] * float(rows @ within.double() @ columns)
    frame, row, column = shares
    return 1 - (1 - frame) * (1 - row) * (1 - column) if windows.union else frame * row * column


Width = TypeVar("Width", int, Tensor)


def pairs_within(size: int, width: Width) -> Width:
    """Pairs among ``size`` places in a row at most ``width`` < size apart."""
    return size + width * (2 * size - 1 - width)


class _AxisTiles(NamedTuple):
    """Pairs of tiles of one axis, each [tiles, tiles]."""

    touched: Tensor  # bool: some pair of coordinates is admitted
    covered: Tensor  # bool: every pair is
    nearest: Tensor  # int64: least distance of an admitted pair; unspecified where there is none
    farthest: Tensor  # int64: largest distance of any pair


def _axis_tiles(windows: AxisWindows, tiles: TileGrid, axis: int) -> _AxisTiles:
    """From coordinates to tiles of one axis.

    Judged per query coordinate and key tile, by the first admitted key at or after the tile's start.
    """
    size, step, count = tiles.grid[axis], tiles.tile[axis], tiles.tiles[axis]
    first, last = windows.bounds_of(tiles.grid, axis).unbind(1)
    first, last, query = first[:, None], last[:, None], torch.arange(size)[:, None]
    start = torch.arange(count) * step
    end = (start + step).clamp(max=size) - 1
    begin, stop = torch.maximum(first, start), torch.minimum(last, end)
    dilation = windows.dilation[axis]
    touched = begin + (query - begin) % dilation <= stop
    covered = touched & (first <= start) & (last >= end) & ((start == end) | (dilation == 1))
    gap = torch.maximum(begin - query, query - stop).clamp(min=0)
    nearest = torch.where(touched, -(-gap // dilation) * dilation, 2 * size)
    farthest = torch.maximum((query - start).abs(), (query - end).abs())

    def by_tile(x: Tensor, beyond: int) -> Tensor:
        return F.pad(x, (0, 0, 0, count * step - size), value=beyond).reshape(count, step, count)

    return _AxisTiles(
        by_tile(touched, False).any(1),
        by_tile(covered, True).all(1),
        by_tile(nearest, 2 * size).amin(1),
        by_tile(farthest, 0).amax(1),
    )


def _shares_by_distance(axis: _AxisTiles, weight: Tensor) -> Tensor:
    """Share of tile pairs of an axis by the distance of their nearest admitted pair, float64 [distances]."""
    pairs = weight[:, None] * weight
    return torch.bincount(axis.nearest[axis.touched], pairs[axis.touched]).double()


def _over_tiles(windows: AxisWindows, axes: list[Tensor], distances: list[Tensor]) -> Tensor:
    """Tile masks and distances of three axes to one mask over tiles in (frame, row, column) order: bool [Q, Q]."""
    kept = windows.joined([_spread(mask, axis) for axis, mask in enumerate(axes)])
    if windows.radius is not None:
        kept = kept & in_disc(_spread(distances[1], 1), _spread(distances[2], 2), windows.radius)
    tiles = len(axes[0]) * len(axes[1]) * len(axes[2])
    return kept.reshape(tiles, tiles)


def _spread(x: Tensor, axis: int) -> Tensor:
    """[tiles, tiles] of one axis with dimensions for the others: three of queries, then three of keys."""
    shape = [1] * 6
    shape[axis] = shape[3 + axis] = len(x)
    return x.reshape(shape)
