"""The kernels of the Triton backward over block lists.

``list_query_gradients`` walks the lists as the forward does; ``list_key_gradients`` walks them the other way round, in
pieces of bounded length whose sums ``sum_pieces`` adds up in a fixed order. Both recompute P = exp(S - LSE) and
dS = P * (dP - delta); the second works on transposed scores, so that no result of a product is ever transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tiles import load_rows, store_rows
from dit_accel.kernels.pyramid.triton_list_rows import gather_rows, listed_keys, listed_pooled_keys

_SIZES = [
    "stride_weight_b", "stride_weight_h", "stride_list_b", "stride_list_h", "kept", "heads", "length", "tokens",
    "key_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=["heads", "length", "tokens"])
def list_prepare(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, order_ptr, shift_ptr, delta_ptr,
    stride_gb, stride_gl, stride_gh, heads, length, tokens,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """LSE in log2 units, +inf where a query has no keys: P is then 0; delta = sum(dO * O) - dLSE."""
    programs = (tokens + ROWS - 1) // ROWS
    head = (tl.program_id(0) // programs % heads).to(tl.int64)
    item = (tl.program_id(0) // programs // heads).to(tl.int64)
    row = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    valid = row < tokens
    token = tl.load(order_ptr + row, mask=valid, other=0)
    out = load_rows(out_ptr + (item * length * heads + head) * D, token, valid, heads * D, D, BLOCK_D, True)
    grad = load_rows(grad_ptr + item * stride_gb + head * stride_gh, token, valid, stride_gl, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    flat = (item * heads + head) * tokens + row
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + flat, mask=valid, other=0.0)
    lse = tl.load(lse_ptr + flat, mask=valid, other=0.0)
    tl.store(shift_ptr + flat, tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634), mask=valid)
    tl.store(delta_ptr + flat, delta, mask=valid)


@triton.jit
def _query_step(
    q, do, shift, delta, k_ptr, v_ptr, rows, bias, stride_kl, stride_vl, acc, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale from the keys at ``rows``; ``bias`` is -inf where a key is not seen."""
    k = gather_rows(k_ptr, rows, stride_kl, D, BLOCK_D, INDEX)
    v = gather_rows(v_ptr, rows, stride_vl, D, BLOCK_D, INDEX)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias[None, :]
    p = tl.math.exp2(scores - shift[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def list_query_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, shift_ptr, delta_ptr, dq_ptr, part_ptr, pooled_k_ptr, pooled_v_ptr, weight_ptr,
    order_ptr, counts_ptr, pooled_ptr, indices_ptr, hidden_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, stride_pkb, stride_pkl, stride_pkh, stride_pvb, stride_pvl, stride_pvh,
    stride_weight_b, stride_weight_h, stride_list_b, stride_list_h, kept, scale, scale_log2, heads, length, tokens,
    key_blocks, LIST_ROWS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    POOLED: tl.constexpr, HIDDEN: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass. ``part``, float32 [B, H, N, D], hands dQ / scale from a pass to the next."""
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    programs = (tokens + ROWS - 1) // ROWS
    first_row = tl.program_id(0) % programs * ROWS
    head = (tl.program_id(0) // programs % heads).to(tl.int64)
    item = (tl.program_id(0) // programs // heads).to(tl.int64)

    listed = item * stride_list_b + head * stride_list_h + first_row // LIST_ROWS
    count = tl.load(counts_ptr + listed)
    indices_ptr += listed * kept
    row = first_row + tl.arange(0, ROWS)
    valid_row = row < tokens
    token = tl.load(order_ptr + row, mask=valid_row, other=0)
    q = load_rows(q_ptr + item * stride_qb + head * stride_qh, token, valid_row, stride_ql, D, BLOCK_D, True)
    do = load_rows(grad_ptr + item * stride_gb + head * stride_gh, token, valid_row, stride_gl, D, BLOCK_D, True)
    flat = (item * heads + head) * tokens
    shift = tl.load(shift_ptr + flat + row, mask=valid_row, other=float("inf"))
    delta = tl.load(delta_ptr + flat + row, mask=valid_row, other=0.0)
    if FIRST:
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    else:
        acc = load_rows(part_ptr + flat * D, row, valid_row, D, D, BLOCK_D, True)

    pooled = 0
    if POOLED:
        pooled = tl.load(pooled_ptr + listed)
        pooled_k_ptr += item * stride_pkb + head * stride_pkh
        pooled_v_ptr += item * stride_pvb + head * stride_pvh
        weight_ptr += item * stride_weight_b + head * stride_weight_h
        if HIDDEN:
            hidden_ptr += listed * kept * WORDS
        for start in range(0, pooled * BLOCK, STEP):
            at = start + tl.arange(0, STEP)
            key, bias = listed_pooled_keys(indices_ptr, hidden_ptr, weight_ptr, at, pooled, key_blocks, BLOCK, HIDDEN)
            acc = _query_step(
                q, do, shift, delta, pooled_k_ptr, pooled_v_ptr, key, bias, stride_pkl, stride_pvl, acc,
                scale_log2, D, BLOCK_D, INDEX, PRECISION,
            )  # fmt: skip
    k_ptr += item * stride_kb + head * stride_kh
    v_ptr += item * stride_vb + head * stride_vh
    for start in range(0, (count - pooled) * BLOCK, STEP):
        at = start + tl.arange(0, STEP)
        key, bias = listed_keys(indices_ptr + pooled, order_ptr, at, count - pooled, tokens, BLOCK)
        acc = _query_step(
            q, do, shift, delta, k_ptr, v_ptr, key, bias, stride_kl, stride_vl, acc, scale_log2,
            D, BLOCK_D, INDEX, PRECISION,
        )  # fmt: skip

    if LAST:
        dq_ptr += (item * length * heads + head) * D
        store_rows(dq_ptr, acc * scale, token, valid_row, heads * D, D, BLOCK_D)
    else:
        store_rows(part_ptr + flat * D, acc, row, valid_row, D, D, BLOCK_D)


@triton.jit
def _pieces_of_block(first_ptr, block, blocks, item, head, list_items, list_heads, first_row):
    """The first of a key block's pieces in one pass, and the first after them."""
    row = first_row + (item % list_items * list_heads + head % list_heads) * blocks + block
    return tl.load(first_ptr + row), tl.load(first_ptr + row + 1)


@triton.jit
def _write_keys(
    dk, dv, dk_ptr, dv_ptr, pooled_dk_ptr, pooled_dv_ptr, order_ptr, block, lane, item, head,
    heads, length, tokens, key_blocks, blocks, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys ``lane`` of a block, the sequence's own or pooled ones."""
    key = block * BLOCK + lane
    if block < key_blocks:
        valid = key < tokens
        token = tl.load(order_ptr + key, mask=valid, other=0)
        at = (item.to(tl.int64) * length * heads + head) * D
        store_rows(dk_ptr + at, dk, token, valid, heads * D, D, BLOCK_D)
        store_rows(dv_ptr + at, dv, token, valid, heads * D, D, BLOCK_D)
    else:
        at = (item.to(tl.int64) * (blocks - key_blocks) * BLOCK * heads + head) * D
        key -= key_blocks * BLOCK
        store_rows(pooled_dk_ptr + at, dk, key, lane >= 0, heads * D, D, BLOCK_D)
        store_rows(pooled_dv_ptr + at, dv, key, lane >= 0, heads * D, D, BLOCK_D)


@triton.jit(
    do_not_specialize=["stride_weight_b", "stride_weight_h", "kept", "heads", "length", "tokens", "key_blocks",
                       "blocks", "list_items", "list_heads", "first_row", "first_entry", "pieces", "per_head",
                       "first_sum", "other_items", "other_heads", "other_row"]
)  # fmt: skip
def list_key_gradients(
    q_ptr, k_ptr, v_ptr, grad_ptr, shift_ptr, delta_ptr, sums_k_ptr, sums_v_ptr, pooled_k_ptr, pooled_v_ptr, weight_ptr,
    order_ptr, dk_ptr, dv_ptr, pooled_dk_ptr, pooled_dv_ptr, entries_ptr, starts_ptr, first_ptr, owners_ptr, hidden_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, stride_pkb, stride_pkl, stride_pkh, stride_pvb, stride_pvl, stride_pvh,
    stride_weight_b, stride_weight_h, scale, scale_log2, heads, length, tokens, key_blocks, blocks,
    list_items, list_heads, first_row, first_entry, pieces, per_head, kept, first_sum, other_items, other_heads,
    other_row, PASSES: tl.constexpr,
    LIST_ROWS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, LONGEST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, POOLED: tl.constexpr, HIDDEN: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of ROWS keys of one block from one piece of the block's queries, see triton_list_pieces.

    Each of a pass's ``pieces`` is walked once for every item and head that share the list. A piece that is its block's
    only one, of all passes, is the result. Others leave dK / scale and dV in sums, float32
    [pieces of all passes and sharers, BLOCK, D], which have this pass's from ``first_sum`` on.
    """
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    PARTS: tl.constexpr = BLOCK // ROWS
    number = tl.program_id(0) // PARTS  # of the sum
    lane = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    piece = tl.load(first_ptr + first_row) + number % pieces
    if piece >= tl.load(first_ptr + first_row + list_items * list_heads * blocks):
        return
    sharer = number // pieces
    owner = tl.load(owners_ptr + piece)
    group = (owner - first_row) // blocks
    block = (owner - first_row) % blocks
    head = (group % list_heads + sharer % (heads // list_heads)).to(tl.int64)
    item = (group // list_heads + sharer // (heads // list_heads)).to(tl.int64)
    begin = tl.load(starts_ptr + owner) + (piece - tl.load(first_ptr + owner)) * LONGEST
    walked = tl.minimum(tl.load(starts_ptr + owner + 1) - begin, LONGEST)

    key = block * BLOCK + lane
    valid_key = key < tokens
    token = tl.load(order_ptr + key, mask=valid_key, other=0)
    k = load_rows(k_ptr + item * stride_kb + head * stride_kh, token, valid_key, stride_kl, D, BLOCK_D, True)
    v = load_rows(v_ptr + item * stride_vb + head * stride_vh, token, valid_key, stride_vl, D, BLOCK_D, True)
    bias = tl.where(valid_key, 0.0, -float("inf"))
    if POOLED:
        key -= key_blocks * BLOCK
        valid_key = key >= 0
        weight_ptr += item * stride_weight_b + head * stride_weight_h
        weight = tl.load(weight_ptr + key, mask=valid_key, other=-float("inf")) * 1.4426950408889634
        bias = tl.maximum(bias, weight)
        pooled_k_ptr += item * stride_pkb + head * stride_pkh
        pooled_v_ptr += item * stride_pvb + head * stride_pvh
        k += load_rows(pooled_k_ptr, key, valid_key, stride_pkl, D, BLOCK_D, True)  # one of the two is 0
        v += load_rows(pooled_v_ptr, key, valid_key, stride_pvl, D, BLOCK_D, True)
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)

    q_ptr += item * stride_qb + head * stride_qh
    grad_ptr += item * stride_gb + head * stride_gh
    flat = (item * heads + head) * tokens
    for start in range(0, walked * LIST_ROWS, STEP):
        at = start + tl.arange(0, STEP)
        entry = tl.load(entries_ptr + begin + tl.minimum(at // LIST_ROWS, walked - 1)).to(tl.int32) - first_entry
        row = (entry - group * per_head) // kept * LIST_ROWS + at % LIST_ROWS
        valid = (at // LIST_ROWS < walked) & (row < tokens)
        row = tl.minimum(row, tokens - 1)
        position = tl.load(order_ptr + row)
        q = gather_rows(q_ptr, position, stride_ql, D, BLOCK_D, INDEX)
        do = gather_rows(grad_ptr, position, stride_gl, D, BLOCK_D, INDEX)
        shift = tl.where(valid, tl.load(shift_ptr + flat + row), float("inf"))  # P is 0 then
        delta = tl.load(delta_ptr + flat + row)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 + bias[:, None]  # [ROWS, STEP]
        p = tl.math.exp2(scores - shift[None, :])
        if POOLED and HIDDEN:
            word = tl.load(
                hidden_ptr + entry[None, :].to(tl.int64) * WORDS + lane[:, None] // 32, mask=valid_key[:, None], other=0
            )  # fmt: skip
            p = tl.where((word >> (lane % 32)[:, None] & 1) == 1, 0.0, p)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    alone = tl.load(first_ptr + owner + 1) - tl.load(first_ptr + owner)
    if PASSES == 2:
        others = _pieces_of_block(first_ptr, block, blocks, item, head, other_items, other_heads, other_row)
        alone += others[1] - others[0]
    if alone == 1:
        _write_keys(
            dk * scale, dv, dk_ptr, dv_ptr, pooled_dk_ptr, pooled_dv_ptr, order_ptr, block, lane, item, head,
            heads, length, tokens, key_blocks, blocks, BLOCK, D, BLOCK_D,
        )  # fmt: skip
    else:
        base = (first_sum + number).to(tl.int64) * (BLOCK * D)
        store_rows(sums_k_ptr + base, dk, lane, lane >= 0, D, D, BLOCK_D)
        store_rows(sums_v_ptr + base, dv, lane, lane >= 0, D, D, BLOCK_D)


@triton.jit
def _add_pieces(
    dk, dv, sums_k_ptr, sums_v_ptr, first_ptr, begin, end, lane, item, head, heads,
    list_items, list_heads, first_row, pieces, first_sum, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One pass's sums of a block of keys, those of its pieces from ``begin`` to ``end``."""
    sharer = item // list_items * (heads // list_heads) + head // list_heads
    first_sum += sharer.to(tl.int64) * pieces - tl.load(first_ptr + first_row)
    for piece in range(begin, end):
        at = (first_sum + piece) * (BLOCK * D)
        dk += load_rows(sums_k_ptr + at, lane, lane >= 0, D, D, BLOCK_D, True)
        dv += load_rows(sums_v_ptr + at, lane, lane >= 0, D, D, BLOCK_D, True)
    return dk, dv


@triton.jit(
    do_not_specialize=["heads", "length", "tokens", "key_blocks", "blocks", "list_items", "list_heads", "first_row",
                       "pieces", "first_sum", "second_items", "second_heads", "second_row", "second_pieces",
                       "second_sum"]
)  # fmt: skip
def sum_pieces(
    sums_k_ptr, sums_v_ptr, first_ptr, order_ptr, dk_ptr, dv_ptr, pooled_dk_ptr, pooled_dv_ptr,
    scale, heads, length, tokens, key_blocks, blocks, list_items, list_heads, first_row, pieces, first_sum,
    second_items, second_heads, second_row, second_pieces, second_sum,
    PASSES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of 16 keys of one block, 0 where no list names it; blocks of one piece are done."""
    PARTS: tl.constexpr = BLOCK // 16
    block = tl.program_id(0) // PARTS % blocks
    lane = tl.program_id(0) % PARTS * 16 + tl.arange(0, 16)
    head = tl.program_id(0) // PARTS // blocks % heads
    item = tl.program_id(0) // PARTS // blocks // heads
    begin, end = _pieces_of_block(first_ptr, block, blocks, item, head, list_items, list_heads, first_row)
    second_begin, second_end = 0, 0
    if PASSES == 2:
        second_begin, second_end = _pieces_of_block(
            first_ptr, block, blocks, item, head, second_items, second_heads, second_row
        )
    if end - begin + second_end - second_begin == 1:
        return
    dk = tl.zeros([16, BLOCK_D], tl.float32)
    dv = tl.zeros([16, BLOCK_D], tl.float32)
    dk, dv = _add_pieces(
        dk, dv, sums_k_ptr, sums_v_ptr, first_ptr, begin, end, lane, item, head, heads,
        list_items, list_heads, first_row, pieces, first_sum, BLOCK, D, BLOCK_D,
    )  # fmt: skip
    if PASSES == 2:
        dk, dv = _add_pieces(
            dk, dv, sums_k_ptr, sums_v_ptr, first_ptr, second_begin, second_end, lane, item, head, heads,
            second_items, second_heads, second_row, second_pieces, second_sum, BLOCK, D, BLOCK_D,
        )  # fmt: skip
    _write_keys(
        dk * scale, dv, dk_ptr, dv_ptr, pooled_dk_ptr, pooled_dv_ptr, order_ptr, block, lane, item, head,
        heads, length, tokens, key_blocks, blocks, BLOCK, D, BLOCK_D,
    )  # fmt: skip
