"""From a method's rule to the operator's lists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, TileGrid, Triple
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
    touched, covered = [], []
    for axis in range(3):
        any_pair, all_pairs = _axis_tiles(windows, tiles, axis)
        touched.append(any_pair)
        covered.append(all_pairs)
    keep, whole = _over_tiles(windows, touched), _over_tiles(windows, covered)
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
    kept = missed = 1.0
    for axis, weight in enumerate(weights):
        touched, _ = _axis_tiles(windows, tiles, axis)
        weight = weight.double()
        share = float(weight @ touched.double() @ weight / weight.sum() ** 2)
        kept, missed = kept * share, missed * (1 - share)
    return 1 - missed if windows.union else kept


def _axis_tiles(windows: AxisWindows, tiles: TileGrid, axis: int) -> tuple[Tensor, Tensor]:
    """From coordinates to tiles of one axis, bool [tiles, tiles]: does any pair of a tile pair pass, do all of them?

    Judged per query coordinate and key tile, by the first admitted key at or after the tile's start.
    """
    size, step, count = tiles.grid[axis], tiles.tile[axis], tiles.tiles[axis]
    first, last = windows.bounds_of(tiles.grid, axis).unbind(1)
    first, last, query = first[:, None], last[:, None], torch.arange(size)[:, None]
    start = torch.arange(count) * step
    end = (start + step).clamp(max=size) - 1
    begin = torch.maximum(first, start)
    dilation = windows.dilation[axis]
    touched = begin + (query - begin) % dilation <= torch.minimum(last, end)
    covered = touched & (first <= start) & (last >= end) & ((start == end) | (dilation == 1))
    beyond = (0, 0, 0, count * step - size)
    return (
        F.pad(touched, beyond, value=False).reshape(count, step, count).any(1),
        F.pad(covered, beyond, value=True).reshape(count, step, count).all(1),
    )


def _over_tiles(windows: AxisWindows, axes: list[Tensor]) -> Tensor:
    """Tile masks of three axes to one over tiles in (frame, row, column) order: bool [Q, Q]."""
    frame, row, column = axes
    joined = windows.joined(
        [
            frame[:, None, None, :, None, None],
            row[None, :, None, None, :, None],
            column[None, None, :, None, None, :],
        ]
    )
    tiles = len(frame) * len(row) * len(column)
    return joined.reshape(tiles, tiles)
