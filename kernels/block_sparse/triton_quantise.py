"""Queries, keys and values rounded to 8 bits and gathered into tiles that lie one after another in memory.

Tiles of a batch item and head are numbered like a plan's key tiles, the text's behind them; boxes that stick out of the
grid and padded text are filled up with zeros. Each tile has its own scales. Keys lose a vector per head, about their
mean, first: that changes no softmax, and the same for all keys it would cost most of their 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.triton_tiles import box, tile_corner

TILE = 128
SCALES = 32  # float32 words per tile: the 128 bytes that a copy to shared memory is aligned to
# Float8 scores are summed in float16: D * 16 * 16 stays below its end for the 128 channels of a head.
TOPS = {torch.float8_e4m3fn: 16.0, torch.int8: 127.0}
SAMPLE = 16384  # keys per head that their mean is taken of, about
ROWS = 512  # of them, keys per program


class Tiles(NamedTuple):
    """Tiles of every batch item and head, one after another.

    Args:
        q: [B * H * query tiles * 128, D], float8 e4m3 or int8.
        k: [B * H * key tiles * 128, D], of the same dtype.
        v: [B * H * key tiles * D, 128], float8 e4m3; keys of each 16 in the order 0, 1, 8, 9, 2, 3, 10, 11, ...
        q_scales: float32 [B * H * query tiles, 32]; word 0 takes scores against ``k`` to log2 units.
        scales: float32 [B * H * key tiles, 32]; words 0 to 2 are those of keys, values, and 1 over that of values.
        shift: float32 [B, H, L], what each query's scores lost with the keys' mean, natural log; empty without LSE.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scales: Tensor
    scales: Tensor
    shift: Tensor


@triton.jit
def _place(
    tile, lane, valid, num_tiles, text_start, prefix, T, H, W, TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr
):
    """Positions of a tile's lanes in the sequence, and which exist; from ``num_tiles`` on tiles are runs of text."""
    corner_t, corner_h, corner_w = tile_corner(tile, H, W, TT, TH, TW)
    t, h, w, inside = box(corner_t, corner_h, corner_w, lane, T, H, W, TT, TH, TW)
    run = (tile - num_tiles) * (TT * TH * TW) + lane
    is_text = tile >= num_tiles
    position = tl.where(is_text, text_start + run, prefix + (t * H + h) * W + w)
    return position, tl.where(is_text, run < valid, inside)


@triton.jit
def _load(x, pair, heads, position, inside, stride_b, stride_l, stride_h, stride_d, D: tl.constexpr):
    start = x + (pair // heads).to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_h
    at = position.to(tl.int64)[:, None] * stride_l + tl.arange(0, D)[None, :] * stride_d
    return tl.load(start + at, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _round(z, dtype: tl.constexpr):
    if dtype == tl.int8:
        return ((z + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23: to the nearest integer
    else:
        return z.to(dtype)


@triton.jit
def _row_of(tile, pair, num_tiles, text_first, tiles):
    """The number of a tile in memory."""
    return pair.to(tl.int64) * tiles + tl.where(tile >= num_tiles, text_first + tile - num_tiles, tile)


SIZES = ("heads", "num_tiles", "text_first", "tiles", "text_start", "text", "prefix", "T", "H", "W", "length")


@triton.jit(do_not_specialize=("heads", "count", "prefix", "every"))
def key_sums(
    k, sums, heads, count, prefix, every, stride_b, stride_l, stride_h, stride_d,
    ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Part of the mean over ``count`` keys of the grid, every so many: sums [chunks, B * H, D]."""
    pair = tl.program_id(0)
    total = tl.zeros([D], tl.float32)
    for first in range(0, ROWS, 64):
        row = tl.program_id(1) * ROWS + first + tl.arange(0, 64)
        x = _load(k, pair, heads, prefix + row * every, row < count, stride_b, stride_l, stride_h, stride_d, D)
        total += tl.sum(x, 0)
    at = (tl.program_id(1) * tl.num_programs(0) + pair).to(tl.int64) * D
    tl.store(sums + at + tl.arange(0, D), total / count)


@triton.jit(do_not_specialize=SIZES)
def quantise_rows(
    x, y, scales, mean, shift, text_lengths, scale, top,
    heads, num_tiles, text_first, tiles, text_start, text, prefix, T, H, W, length,
    stride_b, stride_l, stride_h, stride_d,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, SHIFT: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Tiles of queries or keys. Programs of one tile run side by side: in memory its heads often are."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, TT * TH * TW)
    channel = tl.arange(0, D)
    valid = tl.load(text_lengths + pair // heads) if LENGTHS else text
    position, inside = _place(tile, lane, valid, num_tiles, text_start, prefix, T, H, W, TT, TH, TW)
    z = _load(x, pair, heads, position, inside, stride_b, stride_l, stride_h, stride_d, D)
    if not QUERIES or SHIFT:
        m = tl.load(mean + pair * D + channel)
    if not QUERIES:
        z = tl.where(inside[:, None], z - m[None, :], 0.0)
    step = tl.maximum(tl.max(tl.abs(z)), 2.0**-40) / top
    row = _row_of(tile, pair, num_tiles, text_first, tiles)
    if QUERIES:
        tl.store(scales + row * 32, step * (scale * 1.4426950408889634))
        if SHIFT:
            lost = tl.sum(z * m[None, :], 1) * scale
            tl.store(shift + pair.to(tl.int64) * length + position, lost, mask=inside)
    else:
        tl.store(scales + row * 32, step)
    at = (row * (TT * TH * TW) + lane[:, None]) * D + channel[None, :]
    tl.store(y + at, _round(z * (1.0 / step), y.dtype.element_ty))


@triton.jit
def _byte(z, place: tl.constexpr):
    return z.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * place)


@triton.jit(do_not_specialize=SIZES)
def quantise_values(
    x, y, scales, text_lengths,
    heads, num_tiles, text_first, tiles, text_start, text, prefix, T, H, W, length,
    stride_b, stride_l, stride_h, stride_d,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Tiles of values, transposed: words of four keys (0, 1, 8 and 9 of 16, then 2, 3, 10 and 11, ...)."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    word = tl.arange(0, TT * TH * TW // 4)
    lane = word // 4 * 16 + word % 4 * 2
    valid = tl.load(text_lengths + pair // heads) if LENGTHS else text
    position, inside = _place(tile, lane, valid, num_tiles, text_start, prefix, T, H, W, TT, TH, TW)
    z0 = _load(x, pair, heads, position, inside, stride_b, stride_l, stride_h, stride_d, D)
    position, inside = _place(tile, lane + 1, valid, num_tiles, text_start, prefix, T, H, W, TT, TH, TW)
    z1 = _load(x, pair, heads, position, inside, stride_b, stride_l, stride_h, stride_d, D)
    position, inside = _place(tile, lane + 8, valid, num_tiles, text_start, prefix, T, H, W, TT, TH, TW)
    z2 = _load(x, pair, heads, position, inside, stride_b, stride_l, stride_h, stride_d, D)
    position, inside = _place(tile, lane + 9, valid, num_tiles, text_start, prefix, T, H, W, TT, TH, TW)
    z3 = _load(x, pair, heads, position, inside, stride_b, stride_l, stride_h, stride_d, D)
    largest = tl.maximum(tl.maximum(tl.abs(z0), tl.abs(z1)), tl.maximum(tl.abs(z2), tl.abs(z3)))
    step = tl.maximum(tl.max(largest), 2.0**-40) / 448.0
    row = _row_of(tile, pair, num_tiles, text_first, tiles)
    tl.store(scales + row * 32 + 1, step)
    tl.store(scales + row * 32 + 2, 1.0 / step)
    factor = 1.0 / step
    packed = _byte(z0 * factor, 0) | _byte(z1 * factor, 1) | _byte(z2 * factor, 2) | _byte(z3 * factor, 3)
    at = (row * D + tl.arange(0, D)[:, None]) * (TT * TH * TW // 4) + word[None, :]
    tl.store(y + at, tl.trans(packed))


def quantise(inputs: Inputs) -> Tiles:
    """Tiles of ``TILE`` tokens; precision "fp8" or "int8" says what queries and keys become."""
    plan, q = inputs.plan, inputs.q
    batch, length, heads, dim = q.shape
    pairs, text_tiles = batch * heads, -(-inputs.text // TILE)
    query_tiles, key_tiles = plan.tiles.num_tiles + text_tiles, plan.num_key_tiles + text_tiles
    dtype = torch.int8 if inputs.precision == "int8" else torch.float8_e4m3fn
    tiles = Tiles(
        q=q.new_empty(pairs * query_tiles * TILE, dim, dtype=dtype),
        k=q.new_empty(pairs * key_tiles * TILE, dim, dtype=dtype),
        v=q.new_empty(pairs * key_tiles * dim, TILE, dtype=torch.float8_e4m3fn),
        q_scales=q.new_empty(pairs * query_tiles, SCALES, dtype=torch.float32),
        scales=q.new_empty(pairs * key_tiles, SCALES, dtype=torch.float32),
        shift=q.new_empty((batch, heads, length) if inputs.with_lse else (0,), dtype=torch.float32),
    )
    mean = _key_mean(inputs)
    values = tiles.v.view(torch.int32)
    grid, text = plan.tiles.num_tiles, inputs.text
    sequence = (grid, plan.num_key_tiles, key_tiles, inputs.text_start, text, plan.prefix, *plan.tiles.grid, length)
    lengths = inputs.text_lengths
    keys = (tiles.scales, mean, tiles.shift, lengths, inputs.scale, TOPS[dtype], heads)
    queries = (tiles.q_scales, mean, tiles.shift, None, inputs.scale, TOPS[dtype], heads)
    query_sequence = (grid, grid, query_tiles, *sequence[3:])
    shape = dict(zip(("TT", "TH", "TW"), plan.tiles.tile, strict=True), D=dim)
    runs = (pairs, query_tiles)
    quantise_rows[runs](
        q, tiles.q, *queries, *query_sequence, *q.stride(),
        **shape, QUERIES=True, SHIFT=inputs.with_lse, LENGTHS=False, num_warps=8,
    )  # fmt: skip
    of_keys = dict(**shape, QUERIES=False, SHIFT=False, num_warps=8)
    runs = (pairs, grid + text_tiles)
    has_lengths = lengths is not None
    quantise_rows[runs](inputs.k, tiles.k, *keys, *sequence, *inputs.k.stride(), **of_keys, LENGTHS=has_lengths)
    quantise_values[runs](
        inputs.v, values, tiles.scales, lengths, heads, *sequence, *inputs.v.stride(),
        **shape, LENGTHS=has_lengths, num_warps=8,
    )  # fmt: skip
    if inputs.pooled is not None and plan.pooled:  # as text after a grid of no tiles
        k, v, _ = inputs.pooled
        pooled = (0, grid, key_tiles, 0, plan.pooled, 0, *plan.tiles.grid, plan.pooled)
        runs = (pairs, plan.num_key_tiles - grid)
        quantise_rows[runs](k, tiles.k, *keys, *pooled, *k.stride(), **of_keys, LENGTHS=False)
        quantise_values[runs](
            v, values, tiles.scales, None, heads, *pooled, *v.stride(), **shape, LENGTHS=False, num_warps=8
        )
    return tiles


def _key_mean(inputs: Inputs) -> Tensor:
    """About the mean of the grid's keys, of every so many of them, float32 [B * H, D]. It need not be exact."""
    plan, k = inputs.plan, inputs.k
    batch, _, heads, dim = k.shape
    every = max(1, plan.tiles.num_tokens // SAMPLE)
    count = -(-plan.tiles.num_tokens // every)
    chunks = -(-count // ROWS)
    sums = k.new_empty(chunks, batch * heads, dim, dtype=torch.float32)
    key_sums[(batch * heads, chunks)](
        k, sums, heads, count, plan.prefix, every, *k.stride(), ROWS=ROWS, D=dim, num_warps=4
    )
    return sums.sum(0)
