"""Means over boxes of the token grid in one pass: each program sums the tokens of one box over a run of channels.

The channels of all heads count as one axis, so neighbouring programs read neighbouring memory of the same tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import TileGrid


class PoolLaunch(NamedTuple):
    rows: int  # tokens in flight at a time
    columns: int  # channels, of any heads
    num_warps: int


LAUNCH = PoolLaunch(16, 256, 4)


@triton.jit(do_not_specialize=["heads", "T", "H", "W", "num_tiles", "prefix"])
def mean_over_boxes(
    x_ptr, means_ptr, stride_b, stride_l, stride_h, stride_d, heads, T, H, W, num_tiles, prefix,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    runs = tl.cdiv(heads * D, COLUMNS)
    column = tl.program_id(0) % runs * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(0) // runs % num_tiles
    item = (tl.program_id(0) // (runs * num_tiles)).to(tl.int64)
    head = column // D
    channel = column % D
    on_row = column < heads * D

    tiles_h = tl.cdiv(H, TH)
    tiles_w = tl.cdiv(W, TW)
    first_t = tile // (tiles_h * tiles_w) * TT
    first_h = tile // tiles_w % tiles_h * TH
    first_w = tile % tiles_w * TW
    x_ptr += item * stride_b
    offsets = head.to(tl.int64) * stride_h + channel * stride_d
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, TT * TH * TW, ROWS):
        lane = start + tl.arange(0, ROWS)
        t = first_t + lane // (TH * TW)
        h = first_h + lane // TW % TH
        w = first_w + lane % TW
        token = (prefix + (t * H + h) * W + w).to(tl.int64)
        valid = (lane < TT * TH * TW) & (t < T) & (h < H) & (w < W)
        x = tl.load(
            x_ptr + token[:, None] * stride_l + offsets[None, :], mask=valid[:, None] & on_row[None, :], other=0.0
        )
        sums += x.to(tl.float32)
    tokens = tl.minimum(TT, T - first_t) * tl.minimum(TH, H - first_h) * tl.minimum(TW, W - first_w)
    row = (item * heads + head) * num_tiles + tile
    tl.store(means_ptr + row * D + channel, tl.sum(sums, 0) / tokens, mask=on_row)


def triton_tile_means(x: Tensor, tiles: TileGrid, prefix: int, launch: PoolLaunch = LAUNCH) -> Tensor:
    """float32 [B, H, num_tiles, D] of x [B, L, H, D]."""
    batch, _, heads, dim = x.shape
    means = torch.empty(batch, heads, tiles.num_tiles, dim, dtype=torch.float32, device=x.device)
    rows = min(launch.rows, triton.next_power_of_2(tiles.tile_size))
    columns = min(launch.columns, triton.next_power_of_2(heads * dim))
    programs = triton.cdiv(heads * dim, columns) * tiles.num_tiles * batch
    mean_over_boxes[(programs,)](
        x, means, *x.stride(), heads, *tiles.grid, tiles.num_tiles, prefix,
        *tiles.tile, dim, rows, columns, num_warps=launch.num_warps,
    )  # fmt: skip
    return means
