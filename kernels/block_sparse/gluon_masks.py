"""Which pairs of a partial tile the Hopper kernels hide: outside the grid, a window or its disc, text padding, pooled.

Only consumers use this, in the masked steps. What a mask needs is looked up while the scores are still being computed.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dit_accel.kernels.block_sparse.gluon_tools import HIDDEN, TILE, locate, origin


@gluon.jit
def _bits(bounds, base, x, seen, key, extent, size: gl.constexpr, dilation, S: gl.constexpr):
    """Bit j: the query at coordinate ``x`` admits the tile's j-th key coordinate on one axis of at most 32; int32 [M].

    No bit is set beyond the axis, ``extent`` tokens long.
    """
    first = gl.load(bounds + 2 * (base + x), mask=seen, other=-(1 << 30))
    last = gl.load(bounds + 2 * (base + x) + 1, mask=seen, other=1 << 30)
    low = gl.maximum(first - key, 0)
    high = gl.minimum(gl.minimum(last, extent - 1) - key, size - 1)
    two = gl.full([TILE // 2], 2, gl.int32, low.type.layout)
    bits = gl.where(high >= low, (two << high) - (1 << low), 0)
    if S.dilated:
        rungs = gl.where(seen, 0, -1)
        for y in gl.static_range(size):
            rungs = rungs | gl.where((key + y - x) % dilation == 0, 1 << y, 0)
        bits = bits & rungs
    return bits


@gluon.jit
def _long_axis(bounds, base, x, seen, key, place, extent, dilation, S: gl.constexpr):
    """The same for a longer axis, key by key: int32 [M, 128], 1 where admitted."""
    first = gl.load(bounds + 2 * (base + x), mask=seen, other=-(1 << 30))[:, None]
    last = gl.load(bounds + 2 * (base + x) + 1, mask=seen, other=1 << 30)[:, None]
    y = key + place[None, :]
    inside = (y >= first) & (y <= gl.minimum(last, extent - 1))
    if S.dilated:
        inside = inside & (((y - x[:, None]) % dilation == 0) | (seen == 0)[:, None])
    return inside.to(gl.int32)


@gluon.jit
def _queries(place, half: gl.constexpr, grid, layout: gl.constexpr, S: gl.constexpr):
    """Grid coordinates of a consumer's 64 queries, and which of them follow the window's rule."""
    row, is_text = place
    t, h, w = origin(row, grid, S)
    r = half * (TILE // 2) + gl.arange(0, TILE // 2, layout)
    t += r // (S.tile[1] * S.tile[2])
    h += r // S.tile[2] % S.tile[1]
    w += r % S.tile[2]
    return t, h, w, (t < grid[0]) & (h < grid[1]) & (w < grid[2]) & (is_text == 0)


@gluon.jit
def look_up(key_tile, place, half: gl.constexpr, rules, grid, layout: gl.constexpr, S: gl.constexpr):
    """Coordinates of a grid tile, and per axis the bits of the keys that each query admits."""
    bounds, dilations = rules[0], rules[1]
    kt, kh, kw = origin(key_tile, grid, S)
    in_t = gl.full([TILE // 2], 0, gl.int32, layout)
    in_h = in_t
    in_w = in_t
    if S.window:
        qt, qh, qw, seen = _queries(place, half, grid, layout, S)
        in_t = _bits(bounds, 0, qt, seen, kt, grid[0], S.tile[0], dilations[0], S)
        in_h = _bits(bounds, grid[0], qh, seen, kh, grid[1], S.tile[1], dilations[1], S)
        if S.tile[2] <= 32:
            in_w = _bits(bounds, grid[0] + grid[1], qw, seen, kw, grid[2], S.tile[2], dilations[2], S)
    return kt, kh, kw, in_t, in_h, in_w


@gluon.jit
def _in_disc(jh, jw, found, place, half: gl.constexpr, radius, grid, layout: gl.constexpr, S: gl.constexpr):
    """Which pairs lie in the disc, [M, 128], in float32 as in ``in_disc``; all where a query follows no rule."""
    _, qh, qw, seen = _queries(place, half, grid, layout, S)
    edge = radius.to(gl.float32)
    edge = gl.where(seen, edge * edge, float("inf"))
    rows = (found[1] + jh).to(gl.float32)[None, :] - qh.to(gl.float32)[:, None]
    columns = (found[2] + jw).to(gl.float32)[None, :] - qw.to(gl.float32)[:, None]
    return rows * rows + columns * columns < edge[:, None]


@gluon.jit
def mask_grid(s, found, place, half: gl.constexpr, rules, grid, S: gl.constexpr):
    """Hides keys of a grid tile: those outside the grid, and those outside a query's window."""
    kt, kh, kw, in_t, in_h, in_w = found
    rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    column = gl.arange(0, TILE, gl.SliceLayout(0, s.type.layout))
    jt, jh, jw = column // (S.tile[1] * S.tile[2]), column // S.tile[2] % S.tile[1], column % S.tile[2]
    if S.window:
        admits_t = in_t[:, None] >> jt[None, :]
        admits_h = in_h[:, None] >> jh[None, :]
        if S.tile[2] <= 32:
            admits_w = in_w[:, None] >> jw[None, :]
        else:
            _, _, qw, seen = _queries(place, half, grid, rows, S)
            admits_w = _long_axis(rules[0], grid[0] + grid[1], qw, seen, kw, jw, grid[2], rules[1][2], S)
        if S.union:
            admitted = admits_t | admits_h | admits_w
        else:
            admitted = admits_t & admits_h & admits_w
        admitted = (admitted & 1) != 0
        if S.disc:
            admitted = admitted & _in_disc(jh, jw, found, place, half, rules[3], grid, rows, S)
        s = gl.where(admitted, s, HIDDEN)
    if S.ragged and (S.union or not S.window):  # else the window has hidden them
        inside = (jt < grid[0] - kt) & (jh < grid[1] - kh) & (jw < grid[2] - kw)
        s = gl.where(inside[None, :], s, HIDDEN)
    return s


@gluon.jit
def pooled_weights(key_tile, work, pooled, sizes, layout: gl.constexpr, S: gl.constexpr):
    """Log weights of a pooled tile, natural log, float32 [128]; -inf beyond the last key."""
    weights, size, stride_item, stride_head, stride_row = pooled
    item, head, row, _ = locate(work, sizes, S)
    key = (key_tile - sizes[1]) * TILE + gl.arange(0, TILE, layout)
    start = item.to(gl.int64) * stride_item + head.to(gl.int64) * stride_head + row.to(gl.int64) * stride_row
    return gl.load(weights + start + key, mask=key < size, other=-float("inf"))


@gluon.jit
def _weigh_pooled(s, key_tile, work, pooled, sizes, scale, S: gl.constexpr):
    """Adds the log weights of a pooled tile, in the units of the scores."""
    log_weight = pooled_weights(key_tile, work, pooled, sizes, gl.SliceLayout(0, s.type.layout), S)
    hidden = log_weight == -float("inf")
    bias = gl.where(hidden, 0.0, log_weight) * (1.4426950408889634 / scale)
    return gl.where(hidden[None, :], HIDDEN, s + bias[None, :])


@gluon.jit
def mask(s, key_tile, found, work, place, tail, half: gl.constexpr, rules, sizes, grid, scale, S: gl.constexpr):
    """Scores of a key tile (of the text where negative, pooled from ``num_tiles`` on) with the hidden pairs hidden."""
    on_grid = key_tile >= 0
    if S.text:
        if key_tile < 0:
            column = gl.arange(0, TILE, gl.SliceLayout(0, s.type.layout))
            s = gl.where((column < tail)[None, :], s, HIDDEN)
    if S.pooled:
        on_grid = on_grid & (key_tile < sizes[1])
        if key_tile >= sizes[1]:
            s = _weigh_pooled(s, key_tile, work, rules[2], sizes, scale, S)
    if S.window or S.ragged:
        if on_grid:
            s = mask_grid(s, found, place, half, rules, grid, S)
    return s
