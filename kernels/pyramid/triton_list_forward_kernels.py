"""The kernels of the Triton forward over block lists: a pass at a time, or both passes in one program.

Keys are gathered by pointer, several blocks at a step, so that a product is as wide as the tensor cores want even if
blocks hold 16 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tiles import load_rows, store_rows
from dit_accel.kernels.pyramid.triton_list_rows import gather_rows, listed_keys, listed_pooled_keys, readable

# Lengths and sizes are not specialised on: another shape must not compile another kernel.
_SIZES = ["stride_weight_b", "stride_weight_h", "heads", "length", "tokens", "key_blocks"]


@triton.jit
def _attend(
    q, k_ptr, v_ptr, rows, bias, stride_kl, stride_vl, acc, row_max, row_sum, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys at ``rows``; ``bias`` is -inf where a key is not seen."""
    k = gather_rows(k_ptr, rows, stride_kl, D, BLOCK_D, INDEX)
    v = gather_rows(v_ptr, rows, stride_vl, D, BLOCK_D, INDEX)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + tl.expand_dims(bias, -2)
    new_max = tl.maximum(row_max, tl.max(scores, -1))
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # rows that have seen no key yet
    p = tl.math.exp2(scores - tl.expand_dims(shift, -1))
    alpha = tl.math.exp2(row_max - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * tl.expand_dims(alpha, -1), input_precision=PRECISION)
    return acc, new_max, row_sum * alpha + tl.sum(p, -1)


@triton.jit
def _walk_pooled(
    q, k_ptr, v_ptr, stride_kl, stride_vl, indices_ptr, hidden_ptr, weight_ptr, count, most, key_blocks,
    acc, row_max, row_sum, scale_log2, BLOCK: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HIDDEN: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The blocks of pooled keys that lists begin with: ``count`` of each, ``most`` of any."""
    for start in range(0, most * BLOCK, STEP):
        at = start + tl.arange(0, STEP)
        key, bias = listed_pooled_keys(indices_ptr, hidden_ptr, weight_ptr, at, count, key_blocks, BLOCK, HIDDEN)
        acc, row_max, row_sum = _attend(
            q, k_ptr, v_ptr, key, bias, stride_kl, stride_vl, acc, row_max, row_sum, scale_log2,
            D, BLOCK_D, INDEX, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def _walk(
    q, k_ptr, v_ptr, stride_kl, stride_vl, indices_ptr, order_ptr, count, most, tokens,
    acc, row_max, row_sum, scale_log2, BLOCK: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The blocks of the sequence's own keys, from ``indices_ptr`` on: ``count`` of each list, ``most`` of any."""
    for start in range(0, most * BLOCK, STEP):
        at = start + tl.arange(0, STEP)
        key, bias = listed_keys(indices_ptr, order_ptr, at, count, tokens, BLOCK)
        acc, row_max, row_sum = _attend(
            q, k_ptr, v_ptr, key, bias, stride_kl, stride_vl, acc, row_max, row_sum, scale_log2,
            D, BLOCK_D, INDEX, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def _write(out_ptr, lse_ptr, acc, row_max, row_sum, row, token, valid_row, stride,
           D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Output and LSE of the rows; 0 and -inf where a row has seen no key."""
    seen = row_sum > 0
    total = tl.where(seen, row_sum, 1.0)
    store_rows(out_ptr, acc / total[:, None], token, valid_row, stride, D, BLOCK_D)
    lse = tl.where(seen, (row_max + tl.math.log2(total)) * 0.6931471805599453, -float("inf"))
    tl.store(lse_ptr + row, lse, mask=valid_row)


@triton.jit(do_not_specialize=[*_SIZES, "stride_list_b", "stride_list_h", "kept"])
def list_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pooled_k_ptr, pooled_v_ptr, weight_ptr, order_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_pkb, stride_pkl, stride_pkh, stride_pvb, stride_pvl, stride_pvh, stride_weight_b, stride_weight_h,
    scale_log2, heads, length, tokens, key_blocks,
    counts_ptr, pooled_ptr, indices_ptr, hidden_ptr, stride_list_b, stride_list_h, kept,
    LIST_ROWS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    POOLED: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One pass; unless it is the FIRST, output and LSE hold what the passes before it found.

    It takes their softmax up as it is in the output: normalised, with the LSE as its maximum and 1 as its sum.
    """
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    programs = (tokens + ROWS - 1) // ROWS
    first_row = tl.program_id(0) % programs * ROWS
    head = (tl.program_id(0) // programs % heads).to(tl.int64)
    item = (tl.program_id(0) // programs // heads).to(tl.int64)

    row = first_row + tl.arange(0, ROWS)
    valid_row = row < tokens
    token = tl.load(order_ptr + row, mask=valid_row, other=0)
    q = load_rows(q_ptr + item * stride_qb + head * stride_qh, token, valid_row, stride_ql, D, BLOCK_D, True)
    out_ptr += (item * length * heads + head) * D
    lse_ptr += (item * heads + head) * tokens
    if FIRST:
        row_max = tl.full([ROWS], -float("inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    else:
        row_max = tl.load(lse_ptr + row, mask=valid_row, other=-float("inf")) * 1.4426950408889634
        row_sum = tl.where(row_max == -float("inf"), 0.0, 1.0)
        acc = load_rows(out_ptr, token, valid_row, heads * D, D, BLOCK_D, True).to(tl.float32)

    listed = item * stride_list_b + head * stride_list_h + first_row // LIST_ROWS
    count = tl.load(counts_ptr + listed)
    indices_ptr += listed * kept
    pooled = 0
    if POOLED:
        pooled = tl.load(pooled_ptr + listed)
        acc, row_max, row_sum = _walk_pooled(
            q, pooled_k_ptr + item * stride_pkb + head * stride_pkh,
            pooled_v_ptr + item * stride_pvb + head * stride_pvh,
            stride_pkl, stride_pvl, indices_ptr, hidden_ptr + listed * kept * WORDS,
            weight_ptr + item * stride_weight_b + head * stride_weight_h, pooled, pooled, key_blocks,
            acc, row_max, row_sum, scale_log2, BLOCK, STEP, D, BLOCK_D, HIDDEN, INDEX, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _walk(
        q, k_ptr + item * stride_kb + head * stride_kh, v_ptr + item * stride_vb + head * stride_vh,
        stride_kl, stride_vl, indices_ptr + pooled, order_ptr, count - pooled, count - pooled, tokens,
        acc, row_max, row_sum, scale_log2, BLOCK, STEP, D, BLOCK_D, INDEX, PRECISION,
    )  # fmt: skip
    _write(out_ptr, lse_ptr, acc, row_max, row_sum, row, token, valid_row, heads * D, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[*_SIZES, "stride_list_b", "stride_list_h", "kept", "stride_near_b", "stride_near_h", "near_kept"]
)
def list_forward_both(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pooled_k_ptr, pooled_v_ptr, weight_ptr, order_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_pkb, stride_pkl, stride_pkh, stride_pvb, stride_pvl, stride_pvh, stride_weight_b, stride_weight_h,
    scale_log2, heads, length, tokens, key_blocks,
    counts_ptr, pooled_ptr, indices_ptr, hidden_ptr, stride_list_b, stride_list_h, kept,
    LIST_ROWS: tl.constexpr, HIDDEN: tl.constexpr,
    near_counts_ptr, near_pooled_ptr, near_indices_ptr, near_hidden_ptr, stride_near_b, stride_near_h, near_kept,
    NEAR_ROWS: tl.constexpr, NEAR_HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    POOLED: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, NEAR_STEP: tl.constexpr,
):  # fmt: skip
    """Both passes of ROWS queries: those of one list, and of ROWS / NEAR_ROWS near ones that are walked side by side.

    The second part's products are [lists, NEAR_ROWS, NEAR_STEP]; each list has its own keys, all take as many steps as
    the longest.
    """
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    LISTS: tl.constexpr = ROWS // NEAR_ROWS
    programs = (tokens + ROWS - 1) // ROWS
    first_row = tl.program_id(0) % programs * ROWS
    head = (tl.program_id(0) // programs % heads).to(tl.int64)
    item = (tl.program_id(0) // programs // heads).to(tl.int64)
    q_ptr += item * stride_qb + head * stride_qh
    k_ptr += item * stride_kb + head * stride_kh
    v_ptr += item * stride_vb + head * stride_vh
    if POOLED:
        pooled_k_ptr += item * stride_pkb + head * stride_pkh
        pooled_v_ptr += item * stride_pvb + head * stride_pvh
        weight_ptr += item * stride_weight_b + head * stride_weight_h

    row = first_row + tl.arange(0, ROWS)
    q = gather_rows(q_ptr, tl.load(order_ptr + tl.minimum(row, tokens - 1)), stride_ql, D, BLOCK_D, INDEX)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    listed = item * stride_list_b + head * stride_list_h + first_row // LIST_ROWS
    count = tl.load(counts_ptr + listed)
    indices_ptr += listed * kept
    pooled = 0
    if POOLED:
        pooled = tl.load(pooled_ptr + listed)
        acc, row_max, row_sum = _walk_pooled(
            q, pooled_k_ptr, pooled_v_ptr, stride_pkl, stride_pvl, indices_ptr, hidden_ptr + listed * kept * WORDS,
            weight_ptr, pooled, pooled, key_blocks, acc, row_max, row_sum, scale_log2,
            BLOCK, STEP, D, BLOCK_D, HIDDEN, INDEX, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _walk(
        q, k_ptr, v_ptr, stride_kl, stride_vl, indices_ptr + pooled, order_ptr, count - pooled, count - pooled, tokens,
        acc, row_max, row_sum, scale_log2, BLOCK, STEP, D, BLOCK_D, INDEX, PRECISION,
    )  # fmt: skip

    acc = tl.reshape(acc, [LISTS, NEAR_ROWS, BLOCK_D])
    row_max = tl.reshape(row_max, [LISTS, NEAR_ROWS])
    row_sum = tl.reshape(row_sum, [LISTS, NEAR_ROWS])
    each = tl.arange(0, LISTS)[:, None]
    near_row = first_row + each * NEAR_ROWS + tl.arange(0, NEAR_ROWS)[None, :]
    near_q = gather_rows(q_ptr, tl.load(order_ptr + tl.minimum(near_row, tokens - 1)), stride_ql, D, BLOCK_D, INDEX)
    near = tl.minimum(first_row // NEAR_ROWS + each, (tokens - 1) // NEAR_ROWS)  # beyond the end: the last list
    near = item * stride_near_b + head * stride_near_h + near
    near_count = tl.load(near_counts_ptr + near)
    near_first = near * near_kept
    if POOLED:
        near_pooled = tl.load(near_pooled_ptr + near)
        start = readable(near_first, near_pooled)
        acc, row_max, row_sum = _walk_pooled(
            near_q, pooled_k_ptr, pooled_v_ptr, stride_pkl, stride_pvl, near_indices_ptr + start,
            near_hidden_ptr + start * WORDS, weight_ptr, near_pooled, tl.max(near_pooled), key_blocks,
            acc, row_max, row_sum, scale_log2, BLOCK, NEAR_STEP, D, BLOCK_D, NEAR_HIDDEN, INDEX, PRECISION,
        )  # fmt: skip
        near_first += near_pooled
        near_count -= near_pooled
    acc, row_max, row_sum = _walk(
        near_q, k_ptr, v_ptr, stride_kl, stride_vl, near_indices_ptr + readable(near_first, near_count), order_ptr,
        near_count, tl.max(near_count), tokens, acc, row_max, row_sum, scale_log2,
        BLOCK, NEAR_STEP, D, BLOCK_D, INDEX, PRECISION,
    )  # fmt: skip

    acc = tl.reshape(acc, [ROWS, BLOCK_D])
    row_max = tl.reshape(row_max, [ROWS])
    row_sum = tl.reshape(row_sum, [ROWS])
    valid_row = row < tokens
    token = tl.load(order_ptr + row, mask=valid_row, other=0)
    out_ptr += (item * length * heads + head) * D
    lse_ptr += (item * heads + head) * tokens
    _write(out_ptr, lse_ptr, acc, row_max, row_sum, row, token, valid_row, heads * D, D, BLOCK_D)
