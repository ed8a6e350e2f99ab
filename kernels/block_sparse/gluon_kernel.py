"""Block-sparse attention forward for Hopper, in Triton's Gluon dialect.

One persistent CTA per SM. A producer warp takes query tiles from a queue and copies their key and value tiles into
small rings (TMA); two consumer warpgroups own 64 query rows each and keep scores, probabilities and the accumulator in
registers (wgmma). The scores of a step are issued before the P V of the step before, also across query tiles: the
first scores of a tile run with the last P V of the tile before it, so that a tile has no pipeline fill of its own.

The steps of a query tile, in order: the listed tiles that need a mask, the ragged last text tile, the whole listed
tiles, the whole text tiles. Only the first two kinds run the masked loop.
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

from dit_accel.kernels.block_sparse.gluon_masks import look_up, mask
from dit_accel.kernels.block_sparse.gluon_tools import (
    HIDDEN,
    LN_2,
    TILE,
    block_boundary,
    draw,
    drawn,
    exp2,
    locate,
    origin,
    pack,
    raised,
    read_order,
    rescale,
    row_sum,
    scalar,
    thread_barrier,
    tma_load,
    tma_store,
    unpack,
    view,
)

# ---- producer --------------------------------------------------------------------------------------------------------


@gluon.jit
def _copy_box(desc, item, head, t, h, w, bar, bufs, slot, S: gl.constexpr, heads):
    halves: gl.constexpr = S.dim // 64
    outer = item if S.heads_inside else item * heads + head
    channel = head * S.dim if S.heads_inside else 0
    for x in gl.static_range(halves):
        if S.flat:
            tma_load(desc, [outer, w, channel + x * 64], bar, bufs.index(slot * halves + x))
        else:
            tma_load(desc, [outer, t, h, w, channel + x * 64], bar, bufs.index(slot * halves + x))


@gluon.jit
def _copy_span(desc, item, head, row, bar, bufs, slot, S: gl.constexpr, heads):
    halves: gl.constexpr = S.dim // 64
    outer = item if S.heads_inside else item * heads + head
    channel = head * S.dim if S.heads_inside else 0
    for x in gl.static_range(halves):
        tma_load(desc, [outer, row, channel + x * 64], bar, bufs.index(slot * halves + x))


@gluon.jit
def _copy_tile(
    desc, text_desc, pooled_desc, bufs, spans, slot, bar, key_tile, item, head, sizes, grid, S: gl.constexpr
):
    """A key or value tile: of the text where negative, a pooled one from ``num_tiles`` on."""
    heads, num_tiles = sizes[0], sizes[1]
    on_grid = key_tile >= 0
    if S.text:
        if key_tile < 0:
            _copy_span(text_desc, item, head, (-1 - key_tile) * TILE, bar, spans, slot, S, heads)
    if S.pooled:
        on_grid = on_grid & (key_tile < num_tiles)
        if key_tile >= num_tiles:
            _copy_span(pooled_desc, item, head, (key_tile - num_tiles) * TILE, bar, spans, slot, S, heads)
    if on_grid:
        t, h, w = origin(key_tile, grid, S)
        _copy_box(desc, item, head, t, h, w, bar, bufs, slot, S, heads)


@gluon.jit
def _fill_queries(source, slot, bars, item, head, row, is_text, sizes, grid, S: gl.constexpr):
    descs, bufs = source
    q_desc, text_q, q_bufs, q_spans = descs[0], descs[3], bufs[0], bufs[3]
    t, h, w = origin(row, grid, S)
    for half in gl.static_range(2):
        place = slot * 2 + half
        bar = bars.index(place)
        mbarrier.expect(bar, TILE * S.dim)
        if S.text:
            if is_text:
                start = row * TILE + half * (TILE // 2)
                _copy_span(text_q, item, head, start, bar, q_spans, place, S, sizes[0])
        if is_text == 0:
            _copy_box(
                q_desc, item, head, t + half * S.half[0], h + half * S.half[1], w + half * S.half[2],
                bar, q_bufs, place, S, sizes[0],
            )  # fmt: skip


@gluon.jit
def _fill_keys(source, slot, bar, key_tile, item, head, sizes, grid, S: gl.constexpr):
    descs, bufs = source
    mbarrier.expect(bar, TILE * S.dim * 2)
    _copy_tile(descs[1], descs[4], descs[6], bufs[1], bufs[4], slot, bar, key_tile, item, head, sizes, grid, S)


@gluon.jit
def _fill_values(source, slot, bar, key_tile, item, head, sizes, grid, S: gl.constexpr):
    descs, bufs = source
    mbarrier.expect(bar, TILE * S.dim * 2)
    _copy_tile(descs[2], descs[5], descs[7], bufs[2], bufs[5], slot, bar, key_tile, item, head, sizes, grid, S)


@gluon.jit
def _list_of(work, num_items, lists, sizes, text_size, S: gl.constexpr):
    """Where the list of a query tile starts, its length, its masked part, its first tile, and the item's text."""
    counts, partial, indices, width, stride_item, stride_head, text_lengths = lists
    item, head, row, is_text = locate(work, sizes, S)
    entry = item.to(gl.int64) * stride_item + head.to(gl.int64) * stride_head + row
    listed = (work < num_items) & (is_text == 0)
    count = gl.load(counts + entry, mask=listed, other=0)
    cut = gl.load(partial + entry, mask=listed, other=0)
    first = gl.load(indices + entry * width, mask=listed, other=0)
    valid = text_size
    if S.text_lengths:
        valid = gl.load(text_lengths + item, mask=work < num_items, other=0)
    return entry, count, cut, first, valid


@gluon.jit
def producer(
    fill_queries: gl.constexpr, fill_keys: gl.constexpr, fill_values: gl.constexpr, source,
    pipes, lists, sizes, text_size, grid, num_items, queue, S: gl.constexpr,
):  # fmt: skip
    """Walks the queue and the lists; the three functions announce and start the copies of a tile."""
    q_full, k_full, k_empty, v_full, v_empty, orders, key_tiles = pipes
    num_tiles = sizes[1]
    indices, width = lists[2], lists[3]
    four: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = 0
    phase = 1  # the rings of K and V have two slots each and move in step
    turn = 0
    work = gl.program_id(0)
    entry, count, cut, first, valid = _list_of(work, num_items, lists, sizes, text_size, S)
    ticket = draw(queue)
    while work < num_items:
        item, head, row, is_text = locate(work, sizes, S)
        if S.text:
            count = gl.where(is_text, num_tiles, count)
            if S.ragged:
                cut = gl.where(is_text, num_tiles, cut)
        text_tiles = (valid + (TILE - 1)) // TILE
        tail = valid % TILE
        ragged_text = (tail > 0).to(gl.int32)
        masked = cut + ragged_text
        steps = count + text_tiles
        lst = indices + entry * width

        next_work = drawn(ticket)
        ticket = draw(queue)
        next_entry, next_count, next_cut, next_first, next_valid = _list_of(
            next_work, num_items, lists, sizes, text_size, S
        )
        upcoming = first
        for i in range(gl.maximum(steps, 1)):
            # the position in the list, and whether this step is one of the text's
            j = gl.where(i < cut, i, i - ragged_text)
            key_tile = gl.where(is_text, j, upcoming)
            if S.text:
                text_step = (i == cut) & (tail > 0)
                key_tile = gl.where(text_step, -text_tiles, key_tile)
                key_tile = gl.where(i >= count + ragged_text, count + ragged_text - i - 1, key_tile)
            after = gl.where(i + 1 < cut, i + 1, i + 1 - ragged_text)
            on_list = (after < count) & (is_text == 0)
            upcoming = gl.load(lst + after, mask=on_list, other=0)
            mbarrier.wait(k_empty.index(slot), phase)
            if S.masked:
                key_tiles.index(slot).store(gl.full([1], key_tile, gl.int32, one))
            if i == 0:
                # The two slots of Q and of the orders need no "empty" barrier: the K slot just granted was last read in
                # a step of an earlier tile, after which nothing reads the Q of the tile before that.
                lane = gl.arange(0, 4, four)
                order = gl.where(lane == 0, work, gl.where(lane == 1, steps, gl.where(lane == 2, masked, tail)))
                orders.index(turn & 1).store(order)
                thread_barrier()
                fill_queries(source, turn & 1, q_full, item, head, row, is_text, sizes, grid, S)
            elif S.masked:
                thread_barrier()
            fill_keys(source, slot, k_full.index(slot), key_tile, item, head, sizes, grid, S)
            mbarrier.wait(v_empty.index(slot), phase)
            fill_values(source, slot, v_full.index(slot), key_tile, item, head, sizes, grid, S)
            slot ^= 1
            phase ^= slot ^ 1
        turn += 1
        work = next_work
        entry, count, cut, first, valid = next_entry, next_count, next_cut, next_first, next_valid
    # the end, as one more query tile that says so
    mbarrier.wait(k_empty.index(slot), phase)
    orders.index(turn & 1).store(gl.full([4], -1, gl.int32, four))
    thread_barrier()
    mbarrier.arrive(q_full.index((turn & 1) * 2))
    mbarrier.arrive(q_full.index((turn & 1) * 2 + 1))


# ---- consumers -------------------------------------------------------------------------------------------------------


@gluon.jit
def _finish(acc, l, m, work, steps, outs, sizes, text_size, grid, scale, half: gl.constexpr, S: gl.constexpr):
    """Normalises a query tile, writes its output and its LSE."""
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    total = gl.convert_layout(gl.sum(l, 1), rows)
    top = gl.convert_layout(m, rows)
    seen = (top > HIDDEN * 0.5 * scale) & (steps > 0)
    inverse = 1.0 / gl.where(seen, total, 1.0)
    acc = gl.where(seen[:, None], acc * inverse[:, None], 0.0)
    value = gl.where(seen, (top + gl.log2(gl.where(seen, total, 1.0))) * LN_2, -float("inf"))
    store_tile(acc, value, work, outs, sizes, text_size, grid, half, S)


@gluon.jit
def store_tile(acc, value, work, outs, sizes, text_size, grid, half: gl.constexpr, S: gl.constexpr):
    """Writes a consumer's half of a query tile: the output [64, D], and the LSE [64]."""
    out_desc, text_out, out_bufs, out_spans, out_rows, lse, length, prefix, text_start = outs
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    halves: gl.constexpr = S.dim // 64
    heads = sizes[0]
    item, head, row, is_text = locate(work, sizes, S)
    tma.store_wait(0)
    thread_barrier()  # one thread issued and awaited the last store; the others must not overwrite its buffer before
    out_rows.index(half).store(acc.to(out_desc.dtype))
    fence_async_shared()
    t, h, w = origin(row, grid, S)
    t += half * S.half[0]
    h += half * S.half[1]
    w += half * S.half[2]
    r = gl.arange(0, TILE // 2, rows)
    for x in gl.static_range(halves):
        channel = head * S.dim + x * 64
        place = half * halves + x
        if S.text:
            if is_text:
                start = row * TILE + half * (TILE // 2)
                tma_store(text_out, [item, start, channel], out_spans.index(place))
        if is_text == 0:
            if S.flat:
                tma_store(out_desc, [item, w, channel], out_bufs.index(place))
            else:
                tma_store(out_desc, [item, t, h, w, channel], out_bufs.index(place))
    qt = t + r // (S.tile[1] * S.tile[2])
    qh = h + r // S.tile[2] % S.tile[1]
    qw = w + r % S.tile[2]
    if S.flat:
        qt, qh, qw = r * 0, r * 0, w + r
    token = prefix + (qt * grid[1] + qh) * grid[2] + qw
    inside = (qt < grid[0]) & (qh < grid[1]) & (qw < grid[2])
    if S.text:
        text_row = row * TILE + half * (TILE // 2) + r
        token = gl.where(is_text, text_start + text_row, token)
        inside = gl.where(is_text, text_row < text_size, inside)
    gl.store(lse + (item.to(gl.int64) * heads + head) * length + token, value, mask=inside)


@gluon.jit
def key_tile_of(key_tiles, slot):
    return scalar(key_tiles.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])))


@gluon.jit
def _scores(
    q, rows, pipes, px, acc, slot, phase, follows, masked: gl.constexpr, applies, work, place, tail,
    half: gl.constexpr, rules, sizes, grid, scale, dtype: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Issues the scores of this step and the P V of the step before, and waits for the scores.

    Returns:
        The scores, hidden where they have to be, and the P V under way with its operand.
    """
    _, k_full, k_empty, v_full, _, _, key_tiles = pipes
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    none = gl.full([TILE // 2, TILE], 0.0, gl.float32, SL)
    mbarrier.wait(k_full.index(slot), phase)
    p = unpack(px, dtype, PL)
    s = warpgroup_mma(q, rows[1].index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    before = slot ^ 1  # V lags one step behind K
    mbarrier.wait(v_full.index(before), phase ^ before, pred=follows)
    acc = warpgroup_mma(p, rows[2].index(before), acc, is_async=True)
    if masked:
        key_tile = key_tile_of(key_tiles, slot)
        found = look_up(key_tile, place, half, rules, grid, gl.SliceLayout(1, SL), S)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    if masked:
        if applies:
            s = mask(s, key_tile, found, work, place, tail, half, rules, sizes, grid, scale, S)
    return s, acc, p


@gluon.jit
def _step(
    q, rows, pipes, state, masked: gl.constexpr, work, place, tail, half: gl.constexpr,
    rules, sizes, grid, scale, guard, dtype: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    px, acc, l, m, slot, phase = state
    s, acc, p = _scores(
        q, rows, pipes, px, acc, slot, phase, True, masked, True, work, place, tail, half,
        rules, sizes, grid, scale, dtype, S,
    )  # fmt: skip
    new_m = raised(m, gl.max(s, 1) * scale)
    prob = exp2(s * scale - new_m[:, None])
    alpha = exp2(m - new_m)
    lanes = row_sum(prob)
    l = l * gl.convert_layout(alpha, gl.SliceLayout(1, lanes.type.layout))[:, None] + lanes
    block_boundary(guard)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(pipes[4].index(slot ^ 1), count=1)
    acc = rescale(acc, alpha)
    return pack(prob, dtype), acc, l, new_m, slot ^ 1, phase ^ slot


@gluon.jit
def _consumer(
    half: gl.constexpr, outs, rows, pipes, rules, sizes, text_size, grid, scale, guard,
    dtype: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    q_full, v_full, v_empty, orders = pipes[0], pipes[3], pipes[4], pipes[5]
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, S.dim, 16])
    QL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SL, k_width=2)
    acc = gl.full([TILE // 2, S.dim], 0.0, gl.float32, OL)
    prob = gl.full([TILE // 2, TILE], scale, gl.float32, SL)  # any finite value: its product is thrown away
    px = pack(prob, dtype)
    l = row_sum(prob)
    m = gl.full([TILE // 2], 0.0, gl.float32, gl.SliceLayout(1, SL))
    slot = 0
    phase = 0
    turn = 0
    mbarrier.wait(q_full.index(half), 0)
    work, steps, masked, tail = read_order(orders, 0)
    # Not `work` and `steps`: of two variables of a while loop with one initial value, one of which takes the other's,
    # that one is lost (triton 3.6: MLIR takes it for invariant).
    last_work = 0
    last_steps = 0
    while work >= 0:
        q = rows[0].index((turn & 1) * 2 + half)
        if S.hold_queries:
            q = q.load(QL)
        follows = turn > 0
        _, _, row, is_text = locate(work, sizes, S)
        place = (row, is_text)
        s, acc, p = _scores(
            q, rows, pipes, px, acc, slot, phase, follows, S.masked, masked > 0, work, place, tail, half,
            rules, sizes, grid, scale, dtype, S,
        )  # fmt: skip
        first_m = gl.max(s, 1) * scale
        prob = exp2(s * scale - first_m[:, None])
        lanes = row_sum(prob)
        block_boundary(guard)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        px = pack(prob, dtype)
        if follows:
            mbarrier.arrive(v_empty.index(slot ^ 1), count=1)
            _finish(acc, l, m, last_work, last_steps, outs, sizes, text_size, grid, scale, half, S)
        acc = gl.full([TILE // 2, S.dim], 0.0, gl.float32, OL)
        l = lanes
        m = first_m
        phase ^= slot
        slot ^= 1
        if S.masked:
            for _ in range(1, masked):
                px, acc, l, m, slot, phase = _step(
                    q, rows, pipes, (px, acc, l, m, slot, phase), True, work, place, tail, half,
                    rules, sizes, grid, scale, guard, dtype, S,
                )  # fmt: skip
        for _ in range(gl.maximum(masked, 1), steps):
            px, acc, l, m, slot, phase = _step(
                q, rows, pipes, (px, acc, l, m, slot, phase), False, work, place, tail, half,
                rules, sizes, grid, scale, guard, dtype, S,
            )  # fmt: skip
        last_work = work
        last_steps = steps
        turn += 1
        mbarrier.wait(q_full.index((turn & 1) * 2 + half), (turn >> 1) & 1)
        work, steps, masked, tail = read_order(orders, turn & 1)
    mbarrier.wait(v_full.index(slot ^ 1), phase ^ slot ^ 1)
    p = unpack(px, dtype, gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2))
    acc = warpgroup_mma(p, rows[2].index(slot ^ 1), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _finish(acc, l, m, last_work, last_steps, outs, sizes, text_size, grid, scale, half, S)
    tma.store_wait(0)


# Sizes are not specialised on: another shape must not compile another kernel.
SIZES = (
    "heads", "num_tiles", "text_tiles", "text_items", "num_items", "text_size", "text_start", "prefix", "length",
    "T", "H", "W", "tiles_h", "tiles_w", "width", "list_item", "list_head", "guard", "pooled_size",
    "weights_item", "weights_head", "weights_row", "dilation_t", "dilation_h", "dilation_w", "radius",
)  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def block_sparse_forward(
    q_desc, k_desc, v_desc, out_desc, text_q, text_k, text_v, text_out, pooled_k, pooled_v,
    lse, counts, partial, indices, text_lengths, bounds, log_weights, queue,
    scale, per_frame, per_row,
    heads, num_tiles, text_tiles, text_items, num_items, text_size, text_start, prefix, length,
    T, H, W, tiles_h, tiles_w, width, list_item, list_head, guard, pooled_size,
    weights_item, weights_head, weights_row, dilation_t, dilation_h, dilation_w, radius,
    S: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    halves: gl.constexpr = S.dim // 64
    rank2: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rank3: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    # TMA fills boxes of 64 channels; wgmma reads the same bytes as [rows, D], column blocks of 64 one after another.
    q_bufs = gl.allocate_shared_memory(dtype, [4 * halves] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [2 * halves] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2 * halves] + v_desc.block_type.shape, v_desc.layout)
    out_bufs = gl.allocate_shared_memory(dtype, [2 * halves] + out_desc.block_type.shape, out_desc.layout)
    q_spans = view(q_bufs, dtype, [4 * halves, 1, TILE // 2, 64], rank3)
    k_spans = view(k_bufs, dtype, [2 * halves, 1, TILE, 64], rank3)
    v_spans = view(v_bufs, dtype, [2 * halves, 1, TILE, 64], rank3)
    out_spans = view(out_bufs, dtype, [2 * halves, 1, TILE // 2, 64], rank3)
    q_rows = view(q_bufs, dtype, [4, TILE // 2, S.dim], rank2)
    k_rows = view(k_bufs, dtype, [2, TILE, S.dim], rank2)
    v_rows = view(v_bufs, dtype, [2, TILE, S.dim], rank2)
    out_rows = view(out_bufs, dtype, [2, TILE // 2, S.dim], rank2)

    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
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

    descs = (q_desc, k_desc, v_desc, text_q, text_k, text_v, pooled_k, pooled_v)
    source = (descs, (q_bufs, k_bufs, v_bufs, q_spans, k_spans, v_spans))
    pipes = (q_full, k_full, k_empty, v_full, v_empty, orders, key_tiles)
    lists = (counts, partial, indices, width, list_item, list_head, text_lengths)
    sizes = (heads, num_tiles, text_tiles, text_items)
    grid = (T, H, W, tiles_h, tiles_w, per_frame, per_row)
    pooled = (log_weights, pooled_size, weights_item, weights_head, weights_row)
    rules = (bounds, (dilation_t, dilation_h, dilation_w), pooled, radius)
    rows = (q_rows, k_rows, v_rows)
    outs = (out_desc, text_out, out_bufs, out_spans, out_rows, lse, length, prefix, text_start)
    fill_q: gl.constexpr = _fill_queries
    fill_k: gl.constexpr = _fill_keys
    fill_v: gl.constexpr = _fill_values
    gl.warp_specialize(
        [
            (_consumer, (0, outs, rows, pipes, rules, sizes, text_size, grid, scale, guard, dtype, S)),
            (_consumer, (1, outs, rows, pipes, rules, sizes, text_size, grid, scale, guard, dtype, S)),
            (producer, (fill_q, fill_k, fill_v, source, pipes, lists, sizes, text_size, grid, num_items, queue, S)),
        ],
        [4, 1],
        [240, 24],
    )
