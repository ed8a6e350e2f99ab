"""The kernels of the Triton backward.

Programs own rows of one side and walk the other: ``query_gradients`` the keys that its queries see, ``key_gradients``
the queries that see its keys. Both recompute P = exp(S - LSE) and dS = P * (dP - delta); the second works on transposed
scores, so that no result of a product is ever transposed. Lists hold packed entries (``list_entries``), which keeps
divisions out of the loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tiles import (
    grid_coordinates,
    listed_tile,
    load_rows,
    owned_rows,
    pooled_entries,
    query_bounds,
    store_rows,
    window_pairs,
)

_SIZES = [
    "stride_list_b", "stride_list_h", "stride_weight_b", "stride_weight_h", "stride_weight_q", "heads", "length",
    "T", "H", "W", "num_tiles", "prefix", "text", "text_start", "dilation_t", "dilation_h", "dilation_w", "radius",
]  # fmt: skip


@triton.jit(do_not_specialize=["heads", "length", "T", "H", "W", "num_tiles", "prefix", "text", "text_start"])
def prepare(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, stats_ptr,
    stride_gb, stride_gl, stride_gh, heads, length, T, H, W, num_tiles, prefix, text, text_start,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Pairs (LSE in log2 units, delta = sum(dO * O) - dLSE) by slots.

    The LSE is +inf where a query has no keys and where a slot has no query: P is then 0.
    """
    programs = (text + BLOCK - 1) // BLOCK + num_tiles
    head = (tl.program_id(0) // programs % heads).to(tl.int64)
    item = (tl.program_id(0) // programs // heads).to(tl.int64)
    _, _, _, _, _, token, valid, slot = owned_rows(
        tl.program_id(0) % programs, T, H, W, num_tiles, prefix, text, text_start, TT, TH, TW, BLOCK, BLOCK
    )
    out = load_rows(out_ptr + (item * length * heads + head) * D, token, valid, heads * D, D, BLOCK_D, True)
    grad = load_rows(grad_ptr + item * stride_gb + head * stride_gh, token, valid, stride_gl, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    flat = (item * heads + head) * length + token
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + flat, mask=valid, other=0.0)
    lse = tl.load(lse_ptr + flat, mask=valid, other=-float("inf"))
    shift = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)
    pair = tl.arange(0, 2)[None, :]
    stats_ptr += (item * heads + head) * programs * (2 * BLOCK)
    tl.store(stats_ptr + slot[:, None] * 2 + pair, tl.where(pair == 0, shift[:, None], delta[:, None]))


@triton.jit
def _query_step(
    q, do, shift, delta, k_ptr, v_ptr, first, offset, valid, pairs, bias, stride_kl, stride_vl, acc, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOADED: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale from the keys at ``first + offset`` [COLUMNS].

    LOADED: keys that are not valid are not read; MASKED: pairs not in ``pairs`` are left out.
    """
    first = tl.cast(first, tl.int64)
    k = load_rows(k_ptr + first * stride_kl, offset, valid, stride_kl, D, BLOCK_D, LOADED)
    v = load_rows(v_ptr + first * stride_vl, offset, valid, stride_vl, D, BLOCK_D, LOADED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [ROWS, COLUMNS]
    if BIASED:
        scores += bias[None, :]
    if MASKED:
        scores = tl.where(pairs, scores, -float("inf"))
    p = tl.math.exp2(scores - shift[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def _key_step(
    k, v, q_ptr, grad_ptr, stats_ptr, first, offset, slot, valid, pairs, bias, stride_ql, stride_gl, dk, dv,
    scale_log2, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, LOADED: tl.constexpr,
    CUT: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV from the queries at ``first + offset``, slots ``slot`` on [COLUMNS]; scores stand transposed.

    LOADED: queries that are not valid are not read. They have P = 0, so only a window (CUT) needs a mask over pairs.
    """
    first = tl.cast(first, tl.int64)
    q = load_rows(q_ptr + first * stride_ql, offset, valid, stride_ql, D, BLOCK_D, LOADED)
    do = load_rows(grad_ptr + first * stride_gl, offset, valid, stride_gl, D, BLOCK_D, LOADED)
    stats = tl.load(stats_ptr + slot * 2 + tl.arange(0, 2 * COLUMNS))
    shift, delta = tl.split(tl.reshape(stats, (COLUMNS, 2)))
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [ROWS, COLUMNS]
    if BIASED:
        scores += bias[:, None]
    if CUT:
        scores = tl.where(pairs, scores, -float("inf"))
    p = tl.math.exp2(scores - shift[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=[*_SIZES, "max_kept", "pooled"])
def query_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, dq_ptr,
    pooled_k_ptr, pooled_v_ptr, weight_ptr, counts_ptr, partial_ptr, entries_ptr, bounds_ptr, text_lengths_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, stride_pkb, stride_pkl, stride_pkh, stride_pvb, stride_pvl, stride_pvh,
    stride_weight_b, stride_weight_h, stride_weight_q, stride_list_b, stride_list_h, max_kept, scale, scale_log2,
    heads, length, T, H, W, num_tiles, pooled, prefix, text, text_start, dilation_t, dilation_h, dilation_w, radius,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, UNION: tl.constexpr, DILATED: tl.constexpr, DISC: tl.constexpr,
    TEXT_LENGTHS: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = BLOCK // COLUMNS  # per listed tile
    ODD: tl.constexpr = TT * TH * TW != BLOCK  # lanes of a whole tile that hold no token
    programs = (text + ROWS - 1) // ROWS + num_tiles * (BLOCK // ROWS)
    head = (tl.program_id(0) // programs % heads).to(tl.int64)
    item = (tl.program_id(0) // programs // heads).to(tl.int64)
    k_ptr += item * stride_kb + head * stride_kh
    v_ptr += item * stride_vb + head * stride_vh

    visual, tile, qt, qh, qw, token, valid_row, slot = owned_rows(
        tl.program_id(0) % programs, T, H, W, num_tiles, prefix, text, text_start, TT, TH, TW, BLOCK, ROWS
    )
    q = load_rows(q_ptr + item * stride_qb + head * stride_qh, token, valid_row, stride_ql, D, BLOCK_D, True)
    do = load_rows(grad_ptr + item * stride_gb + head * stride_gh, token, valid_row, stride_gl, D, BLOCK_D, True)
    stats_ptr += (item * heads + head) * ((text + BLOCK - 1) // BLOCK + num_tiles) * (2 * BLOCK)
    shift = tl.load(stats_ptr + slot * 2)
    delta = tl.load(stats_ptr + slot * 2 + 1)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)

    listed = item * stride_list_b + head * stride_list_h + tile
    count = tl.where(visual, tl.load(counts_ptr + listed), 0)
    partial = tl.where(visual, tl.load(partial_ptr + listed), 0)
    entries_ptr += listed * max_kept
    column = tl.arange(0, COLUMNS)
    first = 0  # entry after the pooled ones
    if POOLED:
        pooled_k_ptr += item * stride_pkb + head * stride_pkh
        pooled_v_ptr += item * stride_pvb + head * stride_pvh
        weight_ptr += item * stride_weight_b + head * stride_weight_h + tile.to(tl.int64) * stride_weight_q
        first = pooled_entries(entries_ptr, partial, T * H * W, BLOCK)
        for step in range(0, first * STEPS):
            lane = step % STEPS * COLUMNS + column
            key = tl.load(entries_ptr + step // STEPS).to(tl.int32) - T * H * W
            valid = (lane < TT * TH * TW) & (key + lane < pooled)
            weight = tl.load(weight_ptr + key + lane, mask=valid, other=-float("inf")) * 1.4426950408889634
            dq = _query_step(
                q, do, shift, delta, pooled_k_ptr, pooled_v_ptr, key, lane, valid, valid[None, :], weight,
                stride_pkl, stride_pvl, dq, scale_log2, D, BLOCK_D, True, True, True, PRECISION,
            )  # fmt: skip
    if WINDOW:
        first_t, last_t, first_h, last_h, first_w, last_w = query_bounds(bounds_ptr, qt, qh, qw, T, H, W)
    for step in range(first * STEPS, partial * STEPS):
        entry, start = tl.load(entries_ptr + step // STEPS), step % STEPS * COLUMNS
        position, offset, valid = listed_tile(entry, start, column, H, W, TH, TW, True)
        pairs = valid[None, :]
        if WINDOW:
            kt, kh, kw = grid_coordinates(entry, start + column, H, W, TH, TW)
            pairs = pairs & window_pairs(
                qt[:, None], qh[:, None], qw[:, None], kt[None, :], kh[None, :], kw[None, :],
                first_t[:, None], last_t[:, None], first_h[:, None], last_h[:, None], first_w[:, None],
                last_w[:, None], dilation_t, dilation_h, dilation_w, radius, UNION, DILATED, DISC,
            )  # fmt: skip
        dq = _query_step(
            q, do, shift, delta, k_ptr, v_ptr, prefix + position, offset, valid, pairs, shift,
            stride_kl, stride_vl, dq, scale_log2, D, BLOCK_D, False, True, False, PRECISION,
        )  # fmt: skip
    for step in range(partial * STEPS, count * STEPS):
        entry, start = tl.load(entries_ptr + step // STEPS), step % STEPS * COLUMNS
        position, offset, valid = listed_tile(entry, start, column, H, W, TH, TW, ODD)
        dq = _query_step(
            q, do, shift, delta, k_ptr, v_ptr, prefix + position, offset, valid, valid[None, :], shift,
            stride_kl, stride_vl, dq, scale_log2, D, BLOCK_D, False, ODD, False, PRECISION,
        )  # fmt: skip

    # Text: a visual row sees the valid text, a text row the whole sequence but the text's padding.
    text_end = text_start + text
    if TEXT_LENGTHS:
        text_end = text_start + tl.load(text_lengths_ptr + item)
    end = tl.where(visual, text_end, length)
    for start in range(tl.where(visual, text_start, 0), end, COLUMNS):
        key = start + column
        valid = (key < end) & ((key < text_end) | (key >= text_start + text))
        dq = _query_step(
            q, do, shift, delta, k_ptr, v_ptr, start, column, valid, valid[None, :], shift,
            stride_kl, stride_vl, dq, scale_log2, D, BLOCK_D, True, True, False, PRECISION,
        )  # fmt: skip
    store_rows(dq_ptr + (item * length * heads + head) * D, dq * scale, token, valid_row, heads * D, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        *_SIZES, "stride_entries_b", "stride_entries_h", "keys", "first_tile", "query_tiles", "keys_text",
    ]
)  # fmt: skip
def key_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, dk_ptr, dv_ptr,
    weight_ptr, spans_ptr, queries_ptr, entries_ptr, all_queries_ptr, all_entries_ptr, bounds_ptr, text_lengths_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, stride_weight_b, stride_weight_h, stride_weight_q,
    stride_list_b, stride_list_h, stride_entries_b, stride_entries_h, scale, scale_log2,
    heads, keys, T, H, W, first_tile, num_tiles, query_tiles, prefix, text, keys_text, text_start,
    dilation_t, dilation_h, dilation_w, radius,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
    WINDOW: tl.constexpr, UNION: tl.constexpr, DILATED: tl.constexpr, DISC: tl.constexpr,
    TEXT_LENGTHS: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the sequence's keys, or with POOLED of the pooled ones, whose tiles start at ``first_tile``.

    ``num_tiles`` and ``keys_text`` count keys, ``query_tiles`` and ``text`` queries. A text key walks all query tiles.
    """
    STEPS: tl.constexpr = BLOCK // COLUMNS  # per listed tile
    programs = (keys_text + ROWS - 1) // ROWS + num_tiles * (BLOCK // ROWS)
    head = (tl.program_id(0) // programs % heads).to(tl.int64)
    item = (tl.program_id(0) // programs // heads).to(tl.int64)
    q_ptr += item * stride_qb + head * stride_qh
    grad_ptr += item * stride_gb + head * stride_gh
    stats_ptr += (item * heads + head) * ((text + BLOCK - 1) // BLOCK + query_tiles) * (2 * BLOCK)

    visual, tile, kt, kh, kw, token, stored, slot = owned_rows(
        tl.program_id(0) % programs, T, H, W, num_tiles, prefix, keys_text, text_start, TT, TH, TW, BLOCK, ROWS
    )
    if POOLED:
        lane = slot % BLOCK
        token = tile * (TT * TH * TW) + lane
        stored = (lane < TT * TH * TW) & (token < keys)
        weight_ptr += item * stride_weight_b + head * stride_weight_h
    valid_row = stored
    if TEXT_LENGTHS and not POOLED:  # no query sees padding
        valid_row = tl.where(visual, stored, token - text_start < tl.load(text_lengths_ptr + item))
    k = load_rows(k_ptr + item * stride_kb + head * stride_kh, token, valid_row, stride_kl, D, BLOCK_D, True)
    v = load_rows(v_ptr + item * stride_vb + head * stride_vh, token, valid_row, stride_vl, D, BLOCK_D, True)
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)

    spans_ptr += item * stride_list_b + head * stride_list_h + 3 * (first_tile + tile)
    begin, cut, end = tl.load(spans_ptr), tl.load(spans_ptr + 1), tl.load(spans_ptr + 2)
    if not WINDOW:
        cut = begin
    begin, cut, end = tl.where(visual, begin, 0), tl.where(visual, cut, 0), tl.where(visual, end, query_tiles)
    if visual:
        queries_ptr += item * stride_entries_b + head * stride_entries_h
        entries_ptr += item * stride_entries_b + head * stride_entries_h
    else:
        queries_ptr, entries_ptr = all_queries_ptr, all_entries_ptr
    column = tl.arange(0, COLUMNS)
    if WINDOW:
        for step in range(begin * STEPS, cut * STEPS):
            start = step % STEPS * COLUMNS
            entry, q_tile = tl.load(entries_ptr + step // STEPS), tl.load(queries_ptr + step // STEPS)
            position, offset, valid = listed_tile(entry, start, column, H, W, TH, TW, True)
            qt, qh, qw = grid_coordinates(entry, start + column, H, W, TH, TW)
            first_t, last_t, first_h, last_h, first_w, last_w = query_bounds(bounds_ptr, qt, qh, qw, T, H, W)
            pairs = window_pairs(
                qt[None, :], qh[None, :], qw[None, :], kt[:, None], kh[:, None], kw[:, None],
                first_t[None, :], last_t[None, :], first_h[None, :], last_h[None, :], first_w[None, :],
                last_w[None, :], dilation_t, dilation_h, dilation_w, radius, UNION, DILATED, DISC,
            )  # fmt: skip
            dk, dv = _key_step(
                k, v, q_ptr, grad_ptr, stats_ptr, prefix + position, offset, q_tile * BLOCK + start, valid, pairs,
                valid, stride_ql, stride_gl, dk, dv, scale_log2, COLUMNS, D, BLOCK_D, False, True, False, PRECISION,
            )  # fmt: skip
    for step in range(cut * STEPS, end * STEPS):
        start = step % STEPS * COLUMNS
        entry, q_tile = tl.load(entries_ptr + step // STEPS), tl.load(queries_ptr + step // STEPS)
        position, offset, valid = listed_tile(entry, start, column, H, W, TH, TW, RAGGED)
        weight = valid
        if POOLED:
            weight_at = weight_ptr + q_tile.to(tl.int64) * stride_weight_q + token
            weight = tl.load(weight_at, mask=valid_row, other=-float("inf")) * 1.4426950408889634
        dk, dv = _key_step(
            k, v, q_ptr, grad_ptr, stats_ptr, prefix + position, offset, q_tile * BLOCK + start, valid, valid,
            weight, stride_ql, stride_gl, dk, dv, scale_log2, COLUMNS, D, BLOCK_D, False, False, POOLED, PRECISION,
        )  # fmt: skip
    if not POOLED:
        for start in range(0, text, COLUMNS):
            valid = start + column < text
            dk, dv = _key_step(
                k, v, q_ptr, grad_ptr, stats_ptr, text_start + start, column, query_tiles * BLOCK + start, valid, valid,
                valid, stride_ql, stride_gl, dk, dv, scale_log2, COLUMNS, D, BLOCK_D, True, False, False, PRECISION,
            )  # fmt: skip
    dk = tl.where(valid_row[:, None], dk, 0.0) * scale
    dv = tl.where(valid_row[:, None], dv, 0.0)
    base = (item * keys * heads + head) * D
    store_rows(dk_ptr + base, dk, token, stored, heads * D, D, BLOCK_D)
    store_rows(dv_ptr + base, dv, token, stored, heads * D, D, BLOCK_D)
