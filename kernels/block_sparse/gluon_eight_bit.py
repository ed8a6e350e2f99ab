"""Block-sparse attention forward in 8 bits for Hopper (Gluon): float8 or int8 scores, float8 probabilities and values.

The schedule, the queue and the lists are those of ``gluon_kernel.py``. Queries, keys and values come as whole tiles,
one after another per batch item and head (``triton_quantise.py``), each with its scales. P V of each key tile is
accumulated alone and added in float32, because the tensor core keeps fewer bits of 8-bit products; row sums are P times
a tile of ones, so they sum what P was rounded to.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.block_sparse.gluon_kernel import SIZES, key_tile_of, producer, store_tile
from dit_accel.kernels.block_sparse.gluon_masks import look_up, mask_grid, pooled_weights
from dit_accel.kernels.block_sparse.gluon_softmax8 import NO_KEY, P_SHIFT, joined, parted, probabilities
from dit_accel.kernels.block_sparse.gluon_tools import (
    LN_2,
    TILE,
    block_boundary,
    exp2,
    locate,
    read_order,
    scalar,
    tma_load,
    view,
)

# A row of scales is as long as a copy to shared memory has to be aligned: 128 bytes.
SCALES = gl.constexpr(32)
# Of queries: the factor of their scores, to log2 units. Of keys and values: that of keys, that of values, its inverse.
KEY_SCALE = gl.constexpr(0)
VALUE_SCALE = gl.constexpr(1)
VALUE_INVERSE = gl.constexpr(2)
MAX_LOG_WEIGHT = gl.constexpr(3000.0)


# ---- producer --------------------------------------------------------------------------------------------------------


@gluon.jit
def _fill_queries(source, slot, bars, item, head, row, is_text, sizes, grid, S: gl.constexpr):
    q_desc, _, _, q_scale_desc, _, q_bufs, _, _, q_scales, _, _ = source
    tile = (item * sizes[0] + head) * (sizes[1] + sizes[2]) + row
    if S.text:
        tile += gl.where(is_text, sizes[1], 0)
    for half in gl.static_range(2):
        place = slot * 2 + half
        bar = bars.index(place)
        mbarrier.expect(bar, TILE // 2 * S.dim + SCALES * 4)
        tma_load(q_desc, [tile * TILE + half * (TILE // 2), 0], bar, q_bufs.index(place))
        tma_load(q_scale_desc, [tile, 0], bar, q_scales.index(place))


@gluon.jit
def _row_of(key_tile, item, head, sizes, text_first, S: gl.constexpr):
    """The number of a key tile in memory: those of the grid, the pooled ones, those of the text, head after head."""
    tile = key_tile
    if S.text:
        tile = gl.where(key_tile < 0, text_first - 1 - key_tile, key_tile)
    return (item * sizes[0] + head) * (text_first + sizes[2]) + tile


@gluon.jit
def _fill_keys(source, slot, bar, key_tile, item, head, sizes, grid, S: gl.constexpr):
    _, k_desc, _, _, scale_desc, _, k_bufs, _, _, scales, text_first = source
    tile = _row_of(key_tile, item, head, sizes, text_first, S)
    mbarrier.expect(bar, TILE * S.dim + SCALES * 4)
    tma_load(k_desc, [tile * TILE, 0], bar, k_bufs.index(slot))
    tma_load(scale_desc, [tile, 0], bar, scales.index(slot))


@gluon.jit
def _fill_values(source, slot, bar, key_tile, item, head, sizes, grid, S: gl.constexpr):
    _, _, v_desc, _, _, _, _, v_bufs, _, _, text_first = source
    tile = _row_of(key_tile, item, head, sizes, text_first, S)
    mbarrier.expect(bar, TILE * S.dim)
    tma_load(v_desc, [tile * S.dim, 0], bar, v_bufs.index(slot))


# ---- consumers -------------------------------------------------------------------------------------------------------


@gluon.jit
def _operand(x, layout: gl.constexpr):
    """int32 [M, N / 4] of four e4m3 -> e4m3 [M, N] as the first operand of wgmma: the same registers."""
    y = gl.join(x, x)
    y = gl.join(y, y).reshape([x.shape[0], x.shape[1] * 4])
    p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [y], dtype=gl.float8e4nv, is_pure=True, pack=4)
    return gl.convert_layout(p, layout, assert_trivial=True)


@gluon.jit
def _word(scales, slot, which: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return scalar(scales.index(slot * SCALES + which).load(one))


@gluon.jit
def _weigh(s, c, key_tile, work, tail, rules, sizes, S: gl.constexpr):
    """Scores of a text or pooled tile in log2 units, log weights added, hidden keys hidden, and 1 for their factor.

    One branch for both kinds: ptxas serialises all wgmmas in a kernel with one more.
    """
    columns: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    log_weight = gl.where(gl.arange(0, TILE, columns) < tail, 0.0, -float("inf"))
    if S.pooled:
        weights = pooled_weights(gl.maximum(key_tile, sizes[1]), work, rules[2], sizes, columns, S)
        log_weight = gl.where(key_tile < 0, log_weight, weights)
    hidden = log_weight == -float("inf")
    bias = gl.minimum(gl.maximum(log_weight / LN_2, -MAX_LOG_WEIGHT), MAX_LOG_WEIGHT)
    weighed = s.to(gl.float32) * c + bias[None, :]
    return gl.where(hidden[None, :], -float("inf"), weighed).to(s.dtype), gl.to_tensor(1.0)


@gluon.jit
def _mask(s, c, key_tile, found, work, place, tail, half: gl.constexpr, rules, sizes, grid, S: gl.constexpr):
    on_grid = (key_tile >= 0) & (key_tile < sizes[1])
    if S.text or S.pooled:
        if on_grid == 0:
            s, c = _weigh(s, c, key_tile, work, tail, rules, sizes, S)
    if S.window or S.ragged:
        if on_grid:
            s = mask_grid(s, found, place, half, rules, grid, S)
    return s, c


@gluon.jit
def _accumulate(px, rows, before, D: gl.constexpr):
    """Issues P V of one key tile, and the row sums of P, [M, 8] of equal columns."""
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32])
    LL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 32])
    no_output = gl.full([TILE // 2, D], 0.0, gl.float32, OL)
    no_sum = gl.full([TILE // 2, 8], 0.0, gl.float32, LL)
    p = _operand(px, gl.DotOperandLayout(operand_index=0, parent=OL, k_width=4))
    pv = warpgroup_mma(p, rows[2].index(before).permute((1, 0)), no_output, use_acc=False, is_async=True)
    p = _operand(px, gl.DotOperandLayout(operand_index=0, parent=LL, k_width=4))
    sums = warpgroup_mma(p, rows[3].permute((1, 0)), no_sum, use_acc=False, is_async=True)
    return pv, sums


@gluon.jit
def _scores(
    q, q_factor, rows, pipes, px, slot, phase, follows, masked: gl.constexpr, applies, work, place, tail,
    half: gl.constexpr, rules, sizes, grid, S: gl.constexpr,
):  # fmt: skip
    """Issues the scores of this step and the products of the step before, and waits for the scores.

    Returns:
        The scores, hidden where they have to be; their factor; scale and inverse scale of the tile's values; the
        products under way.
    """
    k_full, k_empty, v_full, key_tiles = pipes[1], pipes[2], pipes[3], pipes[6]
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 32])
    mbarrier.wait(k_full.index(slot), phase)
    if q.dtype == gl.int8:
        none = gl.full([TILE // 2, TILE], 0, gl.int32, SL)
    else:
        none = gl.full([TILE // 2, TILE], 0.0, gl.float16, SL)
    s = warpgroup_mma(q, rows[1].index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    before = slot ^ 1  # V lags one step behind K
    mbarrier.wait(v_full.index(before), phase ^ before, pred=follows)
    pv, sums = _accumulate(px, rows, before, S.dim)
    v_scale = _word(rows[4], slot, VALUE_SCALE)
    v_inverse = _word(rows[4], slot, VALUE_INVERSE)
    # At least so much that a hidden score times c stays hidden; at most what makes scores of 2^14 of a single channel.
    c = q_factor * _word(rows[4], slot, KEY_SCALE)
    if q.dtype == gl.int8:
        c = gl.maximum(c, 2.0**-60)
    else:
        c = gl.minimum(gl.maximum(c, 2.0**-23), 64.0)
    if masked:
        key_tile = key_tile_of(key_tiles, slot)
        found = look_up(key_tile, place, half, rules, grid, gl.SliceLayout(1, SL), S)
    s = warpgroup_mma_wait(2, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    if q.dtype == gl.int8:
        s = s.to(gl.float32)
        if masked:
            if applies:
                s, c = _mask(s, c, key_tile, found, work, place, tail, half, rules, sizes, grid, S)
    else:
        s = joined(s)
        if masked:
            if applies:
                s = parted(s, SL)
                s, c = _mask(s, c, key_tile, found, work, place, tail, half, rules, sizes, grid, S)
                s = joined(s)
    return s, c, v_scale, v_inverse, pv, sums


@gluon.jit
def _add(acc, l, pv, sums, alpha, ratio):
    """Adds the products of a key tile to what came before, brought to its maximum and to the scale of its values."""
    l = l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None] + sums
    acc = acc * gl.convert_layout(alpha * ratio, gl.SliceLayout(1, acc.type.layout))[:, None] + pv
    return acc, l


@gluon.jit
def _step(
    q, q_factor, rows, pipes, state, masked: gl.constexpr, work, place, tail, half: gl.constexpr,
    rules, sizes, grid, guard, S: gl.constexpr,
):  # fmt: skip
    px, acc, l, m, alpha, ratio, v_scale, slot, phase = state
    operand = px
    s, c, new_scale, inverse, pv, sums = _scores(
        q, q_factor, rows, pipes, px, slot, phase, True, masked, True, work, place, tail, half, rules, sizes, grid, S
    )
    px, new_m = probabilities(s, m, c, False, masked)
    beta = exp2(m - new_m)
    block_boundary(guard)
    pv, sums, operand = warpgroup_mma_wait(0, deps=(pv, sums, operand))
    acc, l = _add(acc, l, pv, sums, alpha, ratio)
    mbarrier.arrive(pipes[4].index(slot ^ 1), count=1)
    # P of a step is relative to the maximum of that step, so the factor of what came before is used one step later
    return px, acc, l, new_m, beta, v_scale * inverse, new_scale, slot ^ 1, phase ^ slot


@gluon.jit
def _finish(acc, l, m, v_scale, work, steps, outs, sizes, text_size, grid, half: gl.constexpr, S: gl.constexpr):
    """Normalises a query tile, writes its output and the LSE of its scores against keys without their mean."""
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    total = gl.convert_layout(gl.sum(l, 1), rows) * 0.125
    top = gl.convert_layout(m, rows)
    seen = (top > NO_KEY * 0.96875) & (steps > 0)
    total = gl.where(seen, total, 1.0)
    acc = gl.where(seen[:, None], acc * (v_scale / total)[:, None], 0.0)
    lse = gl.where(seen, (top + gl.log2(total) - P_SHIFT) * LN_2, -float("inf"))
    store_tile(acc, lse, work, outs, sizes, text_size, grid, half, S)


@gluon.jit
def _consumer(half: gl.constexpr, outs, rows, pipes, rules, sizes, text_size, grid, guard, scale, S: gl.constexpr):
    q_full, v_full, v_empty, orders = pipes[0], pipes[3], pipes[4], pipes[5]
    any_masked: gl.constexpr = S.ragged or S.window or S.text or S.pooled
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 32])
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, S.dim, 32])
    LL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 32])
    # what the loops carry; these values are thrown away
    acc = gl.full([TILE // 2, S.dim], 0.0, gl.float32, OL)
    l = gl.full([TILE // 2, 8], 0.0, gl.float32, LL)
    m = gl.full([TILE // 2], 0.0, gl.float32, gl.SliceLayout(1, SL))
    if rows[0].dtype == gl.int8:
        none = gl.full([TILE // 2, TILE], 0.0, gl.float32, SL)
    else:
        none = joined(gl.full([TILE // 2, TILE], 0.0, gl.float16, SL))
    px, m = probabilities(none, m, scale, True, False)
    alpha = gl.full([TILE // 2], 1.0, gl.float32, gl.SliceLayout(1, SL))
    ratio = scale
    v_scale = scale + 1.0
    slot = 0
    phase = 0
    turn = 0
    mbarrier.wait(q_full.index(half), 0)
    work, steps, masked, tail = read_order(orders, 0)
    last_work = 0  # not `work` and `steps`, see gluon_kernel.py
    last_steps = 0
    while work >= 0:
        at = (turn & 1) * 2 + half
        q = rows[0].index(at)
        q_factor = _word(rows[5], at, KEY_SCALE)
        follows = turn > 0
        _, _, row, is_text = locate(work, sizes, S)
        place = (row, is_text)
        operand = px
        s, c, new_scale, _, pv, sums = _scores(
            q, q_factor, rows, pipes, px, slot, phase, follows, any_masked, masked > 0, work, place, tail, half,
            rules, sizes, grid, S,
        )  # fmt: skip
        px, first_m = probabilities(s, m, c, True, any_masked)
        block_boundary(guard)
        pv, sums, operand = warpgroup_mma_wait(0, deps=(pv, sums, operand))
        if follows:
            mbarrier.arrive(v_empty.index(slot ^ 1), count=1)
            acc, l = _add(acc, l, pv, sums, alpha, ratio)
            _finish(acc, l, m, v_scale, last_work, last_steps, outs, sizes, text_size, grid, half, S)
        acc = gl.full([TILE // 2, S.dim], 0.0, gl.float32, OL)
        l = gl.full([TILE // 2, 8], 0.0, gl.float32, LL)
        m = first_m
        alpha = gl.full([TILE // 2], 1.0, gl.float32, gl.SliceLayout(1, SL))
        ratio = new_scale
        v_scale = new_scale
        phase ^= slot
        slot ^= 1
        if any_masked:
            for _ in range(1, masked):
                px, acc, l, m, alpha, ratio, v_scale, slot, phase = _step(
                    q, q_factor, rows, pipes, (px, acc, l, m, alpha, ratio, v_scale, slot, phase), True,
                    work, place, tail, half, rules, sizes, grid, guard, S,
                )  # fmt: skip
        for _ in range(gl.maximum(masked, 1), steps):
            px, acc, l, m, alpha, ratio, v_scale, slot, phase = _step(
                q, q_factor, rows, pipes, (px, acc, l, m, alpha, ratio, v_scale, slot, phase), False,
                work, place, tail, half, rules, sizes, grid, guard, S,
            )  # fmt: skip
        last_work = work
        last_steps = steps
        turn += 1
        mbarrier.wait(q_full.index((turn & 1) * 2 + half), (turn >> 1) & 1)
        work, steps, masked, tail = read_order(orders, turn & 1)
    mbarrier.wait(v_full.index(slot ^ 1), phase ^ slot ^ 1)
    operand = px
    pv, sums = _accumulate(px, rows, slot ^ 1, S.dim)
    pv, sums, operand = warpgroup_mma_wait(0, deps=(pv, sums, operand))
    acc, l = _add(acc, l, pv, sums, alpha, ratio)
    _finish(acc, l, m, v_scale, last_work, last_steps, outs, sizes, text_size, grid, half, S)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=(*SIZES, "text_first"))
def eight_bit_forward(
    q_desc, k_desc, v_desc, q_scale_desc, scale_desc, out_desc, text_out,
    lse, counts, partial, indices, text_lengths, bounds, log_weights, queue,
    scale, per_frame, per_row,
    heads, num_tiles, text_tiles, text_items, num_items, text_size, text_start, prefix, length,
    T, H, W, tiles_h, tiles_w, width, list_item, list_head, guard, pooled_size,
    weights_item, weights_head, weights_row, dilation_t, dilation_h, dilation_w, radius, text_first,
    S: gl.constexpr,
):  # fmt: skip
    halves: gl.constexpr = S.dim // 64
    rank2: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rank3: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [4, TILE // 2, S.dim], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [2, TILE, S.dim], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [2, S.dim, TILE], v_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2 * halves] + out_desc.block_type.shape, out_desc.layout)
    out_spans = view(out_bufs, out_desc.dtype, [2 * halves, 1, TILE // 2, 64], rank3)
    out_rows = view(out_bufs, out_desc.dtype, [2, TILE // 2, S.dim], rank2)
    q_scales = gl.allocate_shared_memory(gl.float32, [4, 1, SCALES], q_scale_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [2, 1, SCALES], scale_desc.layout)
    q_words = view(q_scales, gl.float32, [4 * SCALES, 1], plain)
    words = view(scales, gl.float32, [2 * SCALES, 1], plain)
    ones = gl.allocate_shared_memory(v_desc.dtype, [8, TILE], v_desc.layout)
    one = gl.full([8, TILE], 56, gl.int8, gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # 1.0 in e4m3
    ones.store(one.to(v_desc.dtype, bitcast=True))
    fence_async_shared()

    orders = gl.allocate_shared_memory(gl.int32, [2, 4], plain)
    key_tiles = gl.allocate_shared_memory(gl.int32, [2, 1], plain)
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)

    source = (
        q_desc, k_desc, v_desc, q_scale_desc, scale_desc, q_bufs, k_bufs, v_bufs, q_scales, scales, text_first
    )  # fmt: skip
    pipes = (q_full, k_full, k_empty, v_full, v_empty, orders, key_tiles)
    lists = (counts, partial, indices, width, list_item, list_head, text_lengths)
    sizes = (heads, num_tiles, text_tiles, text_items)
    grid = (T, H, W, tiles_h, tiles_w, per_frame, per_row)
    pooled = (log_weights, pooled_size, weights_item, weights_head, weights_row)
    rules = (bounds, (dilation_t, dilation_h, dilation_w), pooled, radius)
    rows = (q_bufs, k_bufs, v_bufs, ones, words, q_words)
    outs = (out_desc, text_out, out_bufs, out_spans, out_rows, lse, length, prefix, text_start)
    fill_q: gl.constexpr = _fill_queries
    fill_k: gl.constexpr = _fill_keys
    fill_v: gl.constexpr = _fill_values
    gl.warp_specialize(
        [
            (_consumer, (0, outs, rows, pipes, rules, sizes, text_size, grid, guard, scale, S)),
            (_consumer, (1, outs, rows, pipes, rules, sizes, text_size, grid, guard, scale, S)),
            (producer, (fill_q, fill_k, fill_v, source, pipes, lists, sizes, text_size, grid, num_items, queue, S)),
        ],
        [4, 1],
        [240, 24],
    )
