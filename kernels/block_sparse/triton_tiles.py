"""What the Triton kernels share: where the lanes of a tile lie, which pairs a window keeps, how rows are loaded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import BlockPlan, TileGrid

LOG2_E = 1.4426950408889634


@triton.jit
def lane_coordinates(lane, TH: tl.constexpr, TW: tl.constexpr):
    """Coordinates of a tile's lanes relative to its first token."""
    return lane // (TH * TW), lane // TW % TH, lane % TW


@triton.jit
def tile_corner(tile, H, W, TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """Coordinates of a tile's first token on the grid."""
    tiles_h = (H + TH - 1) // TH
    tiles_w = (W + TW - 1) // TW
    return tile // (tiles_h * tiles_w) * TT, tile // tiles_w % tiles_h * TH, tile % tiles_w * TW


@triton.jit
def box(corner_t, corner_h, corner_w, lane, T, H, W, TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """Coordinates of a tile's lanes on the grid and whether they lie on it."""
    lane_t, lane_h, lane_w = lane_coordinates(lane, TH, TW)
    t, h, w = corner_t + lane_t, corner_h + lane_h, corner_w + lane_w
    return t, h, w, (lane < TT * TH * TW) & (t < T) & (h < H) & (w < W)


@triton.jit
def owned_rows(
    program, T, H, W, num_tiles, prefix, text, text_start,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a program owns: text rows, which come first because they run longest, or part of a tile.

    Returns:
        Whether it is a tile and which, coordinates on the grid, positions in the sequence, which rows exist, and their
        slots: positions where tiles stand one after another, padded to BLOCK, and the text behind them.
    """
    lane = tl.arange(0, ROWS)
    text_programs = (text + ROWS - 1) // ROWS
    visual = program >= text_programs
    part = tl.maximum(program - text_programs, 0)
    tile, own = part // (BLOCK // ROWS), part % (BLOCK // ROWS) * ROWS + lane
    corner_t, corner_h, corner_w = tile_corner(tile, H, W, TT, TH, TW)
    t, h, w, on_grid = box(corner_t, corner_h, corner_w, own, T, H, W, TT, TH, TW)
    text_row = program * ROWS + lane
    token = tl.where(visual, prefix + (t * H + h) * W + w, text_start + text_row)
    valid = tl.where(visual, on_grid, text_row < text)
    slot = tl.where(visual, tile * BLOCK + own, num_tiles * BLOCK + text_row)
    return visual, tile, t, h, w, token, valid, slot


@triton.jit
def listed_tile(entry, start, lane, H, W, TH: tl.constexpr, TW: tl.constexpr, RAGGED: tl.constexpr):
    """Lanes ``start + lane`` of a listed tile (see ``pack_entries``); start is a multiple of lane's power of two.

    Returns:
        A position on the grid, offsets of the lanes from it, and with RAGGED which lanes exist; others have offset 0
        from the tile's first token, so that they can be read.
    """
    if (TH & (TH - 1)) == 0 and (TW & (TW - 1)) == 0:
        # No digit carries: what depends on the lane alone is the same in every step and leaves the loop.
        start_t, start_h, start_w = lane_coordinates(start, TH, TW)
    else:
        start_t, start_h, start_w = 0, 0, 0
        lane = start + lane
    t, h, w = lane_coordinates(lane, TH, TW)
    first = entry.to(tl.int32)
    skipped = (start_t * H + start_h) * W + start_w
    offset = (t * H + h) * W + w
    valid = lane >= 0
    if RAGGED:
        valid = t < (entry >> 32 & 255).to(tl.int32) - start_t
        valid = valid & (h < (entry >> 40 & 255).to(tl.int32) - start_h)
        valid = valid & (w < (entry >> 48 & 255).to(tl.int32) - start_w)
        offset = tl.where(valid, offset + skipped, 0)
    else:
        first += skipped
    return first, offset, valid


@triton.jit
def grid_coordinates(entry, lane, H, W, TH: tl.constexpr, TW: tl.constexpr):
    """Coordinates of a listed tile's lanes on the grid."""
    t, h, w = lane_coordinates(lane, TH, TW)
    first = entry.to(tl.int32)
    return first // (H * W) + t, first // W % H + h, first % W + w


@triton.jit
def pooled_entries(entries_ptr, partial, grid, BLOCK: tl.constexpr):
    """How many of a list's partial entries, first among them, name tiles of pooled keys; ``grid`` tokens are on it."""
    found = 0
    for start in range(0, partial, BLOCK):
        at = start + tl.arange(0, BLOCK)
        position = tl.load(entries_ptr + at, mask=at < partial, other=0).to(tl.int32)
        found += tl.sum((position >= grid).to(tl.int32), 0)
    return found


@triton.jit
def query_bounds(bounds_ptr, t, h, w, T, H, W):
    """(first, last) key that each query admits on the three axes; none where a coordinate lies off the grid."""
    first_t, last_t = _bounds(bounds_ptr, t, t < T)
    first_h, last_h = _bounds(bounds_ptr, T + h, h < H)
    first_w, last_w = _bounds(bounds_ptr, T + H + w, w < W)
    return first_t, last_t, first_h, last_h, first_w, last_w


@triton.jit
def _bounds(bounds_ptr, coordinate, on_grid):
    first = tl.load(bounds_ptr + 2 * coordinate, mask=on_grid, other=0)
    last = tl.load(bounds_ptr + 2 * coordinate + 1, mask=on_grid, other=-1)
    return first, last


@triton.jit
def window_pairs(
    qt, qh, qw, kt, kh, kw, first_t, last_t, first_h, last_h, first_w, last_w,
    dilation_t, dilation_h, dilation_w, radius, UNION: tl.constexpr, DILATED: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """Which pairs the window keeps; values of queries lie along one axis, values of keys along the other."""
    in_t = _admits(qt, kt, first_t, last_t, dilation_t, DILATED)
    in_h = _admits(qh, kh, first_h, last_h, dilation_h, DILATED)
    in_w = _admits(qw, kw, first_w, last_w, dilation_w, DILATED)
    if UNION:
        pairs = in_t | in_h | in_w
    else:
        pairs = in_t & in_h & in_w
    if DISC:
        rows = qh.to(tl.float32) - kh.to(tl.float32)
        columns = qw.to(tl.float32) - kw.to(tl.float32)
        edge = tl.cast(radius, tl.float32)
        pairs = pairs & (rows * rows + columns * columns < edge * edge)
    return pairs


@triton.jit
def _admits(q, k, first, last, dilation, DILATED: tl.constexpr):
    inside = (k >= first) & (k <= last)
    if DILATED:
        inside = inside & ((k - q) % dilation == 0)
    return inside


@triton.jit
def load_rows(ptr, tokens, valid, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [lanes, BLOCK_D] of a [tokens, D] view; channels beyond D and, if MASKED, rows not valid are zero.

    Invalid rows are never read: what lies there may be NaN.
    """
    channel = tl.arange(0, BLOCK_D)
    address = ptr + tokens.to(tl.int64)[:, None] * stride + channel[None, :]
    if MASKED:
        rows = tl.load(address, mask=valid[:, None] & (channel < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        rows = tl.load(address, mask=(channel < D)[None, :], other=0.0)
    else:
        rows = tl.load(address)
    return rows


@triton.jit
def store_rows(ptr, values, tokens, valid, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of ``load_rows``."""
    channel = tl.arange(0, BLOCK_D)
    address = ptr + tokens.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(address, values.to(ptr.dtype.element_ty), mask=valid[:, None] & (channel < D)[None, :])


@triton.jit(do_not_specialize=["count", "T", "H", "W", "num_tiles"])
def _pack_entries(
    tiles_ptr, entries_ptr, count, T, H, W, num_tiles,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(tiles_ptr + at, mask=at < count, other=0)
    t, h, w = tile_corner(tile, H, W, TT, TH, TW)
    on_grid = tile < num_tiles
    size_t = tl.where(on_grid, tl.minimum(T - t, TT), TT).to(tl.int64)
    size_h = tl.where(on_grid, tl.minimum(H - h, TH), TH).to(tl.int64)
    size_w = tl.where(on_grid, tl.minimum(W - w, TW), TW).to(tl.int64)
    first = tl.where(on_grid, (t * H + h) * W + w, T * H * W + (tile - num_tiles) * (TT * TH * TW)).to(tl.int64)
    tl.store(entries_ptr + at, first | size_t << 32 | size_h << 40 | size_w << 48, mask=at < count)


def pack_entries(indices: Tensor, tiles: TileGrid) -> Tensor:
    """What lists name a tile by inside the kernels, so that their loops need no division: int64, the indices' shape.

    Bits 0-31: position of the tile's first token on the grid, pooled keys counted after it. Bits 32-39, 40-47, 48-55:
    tokens that the tile has along each axis.
    """
    entries = torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    count = indices.numel()
    _pack_entries[(triton.cdiv(count, 1024),)](
        indices, entries, count, *tiles.grid, tiles.num_tiles, *tiles.tile, 1024
    )  # fmt: skip
    return entries


def list_strides(lists: Tensor) -> tuple[int, int]:
    """Strides over batch items and heads; 0 where all share one."""
    item, head = (lists.stride(axis) if lists.shape[axis] > 1 else 0 for axis in range(2))
    return item, head


def padded(size: int) -> int:
    """Lanes that hold ``size``: a power of two, and what a matrix product takes at least."""
    return max(16, int(triton.next_power_of_2(size)))


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with its last axis dense, as the kernels read rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rule_sizes(plan: BlockPlan) -> tuple[int, int, int, int]:
    """The window's dilation per axis and radius, as the kernels take them."""
    window = plan.window
    return (1, 1, 1, 0) if window is None else (*window.dilation, window.radius or 0)


def rule_flags(plan: BlockPlan) -> tuple[bool, bool, bool, bool]:
    """The kernels' WINDOW, UNION, DILATED and DISC."""
    window = plan.window
    if window is None:
        return False, False, False, False
    return True, window.union, max(window.dilation) > 1, window.radius is not None


def pooled_rows(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled k, v and log weights, these with a stride for every axis; without pooled keys any tensors of four axes."""
    pooled = inputs.pooled
    if pooled is None:
        return inputs.k, inputs.v, inputs.q
    batch, _, heads, _ = inputs.q.shape
    weights = unit_stride(pooled.log_weights).expand(batch, heads, inputs.plan.tiles.num_tiles, -1)
    return unit_stride(pooled.k), unit_stride(pooled.v), weights
