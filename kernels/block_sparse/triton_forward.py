"""The Triton backend: one program per (query tile, head, batch item), tiles read as boxes of the token grid.

Nothing is permuted: a lane of a tile computes the position of its token from the box, so any grid, any stride and any
text length run in the same kernel. Lists are walked in two loops, first the partial tiles with a mask inside, then
the whole ones without, then the text. It runs on every GPU Triton knows and in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.triton_launch import Launch, choose, fit
from dit_accel.kernels.block_sparse.triton_tiles import (
    LOG2_E,
    grid_coordinates,
    list_strides,
    listed_tile,
    load_rows,
    owned_rows,
    pack_entries,
    padded,
    pooled_entries,
    pooled_rows,
    query_bounds,
    rule_flags,
    rule_sizes,
    store_rows,
    unit_stride,
    window_pairs,
)

# (compute capability major, padded head dim), 16-bit inputs; every entry is checked numerically on the GPU.
LAUNCHES = {(9, 64): Launch(128, 64, 4, 3), (9, 128): Launch(128, 128, 8, 2)}
DEFAULT_LAUNCHES = {2: Launch(128, 64, 8, 2), 4: Launch(32, 32, 8, 1)}  # by the bytes of an element


@triton.jit
def _attend(
    q, k_ptr, v_ptr, first, offset, valid, pairs, bias, stride_kl, stride_vl, acc, row_max, row_sum, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOADED: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys at ``first + offset`` [COLUMNS].

    LOADED: keys that are not valid are not read; MASKED: pairs not in ``pairs`` are left out.
    """
    first = tl.cast(first, tl.int64)
    k = load_rows(k_ptr + first * stride_kl, offset, valid, stride_kl, D, BLOCK_D, LOADED)
    v = load_rows(v_ptr + first * stride_vl, offset, valid, stride_vl, D, BLOCK_D, LOADED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, COLUMNS]
    if MASKED:
        scores *= scale_log2
        if BIASED:
            scores += bias[None, :]
        scores = tl.where(pairs, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # rows that have seen no key yet
        p = tl.math.exp2(scores - shift[:, None])
    else:  # the scale is not negative: one multiply-add per pair
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = new_max
        p = tl.math.exp2(scores * scale_log2 - shift[:, None])
    alpha = tl.math.exp2(row_max - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * alpha + tl.sum(p, 1)


# Lengths and sizes are not specialised on: another shape must not compile another kernel.
@triton.jit(
    do_not_specialize=[
        "stride_list_b", "stride_list_h", "max_kept", "stride_weight_b", "stride_weight_h", "stride_weight_q",
        "heads", "length", "T", "H", "W", "num_tiles", "pooled", "prefix", "text", "text_start",
        "dilation_t", "dilation_h", "dilation_w", "radius",
    ]
)  # fmt: skip
def block_sparse_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pooled_k_ptr, pooled_v_ptr, weight_ptr,
    counts_ptr, partial_ptr, entries_ptr, bounds_ptr, text_lengths_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_pkb, stride_pkl, stride_pkh, stride_pvb, stride_pvl, stride_pvh,
    stride_weight_b, stride_weight_h, stride_weight_q, stride_list_b, stride_list_h, max_kept, scale_log2,
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

    visual, tile, qt, qh, qw, token, valid_row, _ = owned_rows(
        tl.program_id(0) % programs, T, H, W, num_tiles, prefix, text, text_start, TT, TH, TW, BLOCK, ROWS
    )
    q = load_rows(q_ptr + item * stride_qb + head * stride_qh, token, valid_row, stride_ql, D, BLOCK_D, True)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)

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
            acc, row_max, row_sum = _attend(
                q, pooled_k_ptr, pooled_v_ptr, key, lane, valid, valid[None, :], weight, stride_pkl, stride_pvl,
                acc, row_max, row_sum, scale_log2, D, BLOCK_D, True, True, True, PRECISION,
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
        acc, row_max, row_sum = _attend(
            q, k_ptr, v_ptr, prefix + position, offset, valid, pairs, row_max, stride_kl, stride_vl,
            acc, row_max, row_sum, scale_log2, D, BLOCK_D, False, True, False, PRECISION,
        )  # fmt: skip
    for step in range(partial * STEPS, count * STEPS):
        entry, start = tl.load(entries_ptr + step // STEPS), step % STEPS * COLUMNS
        position, offset, valid = listed_tile(entry, start, column, H, W, TH, TW, ODD)
        acc, row_max, row_sum = _attend(
            q, k_ptr, v_ptr, prefix + position, offset, valid, valid[None, :], row_max, stride_kl, stride_vl,
            acc, row_max, row_sum, scale_log2, D, BLOCK_D, False, ODD, False, PRECISION,
        )  # fmt: skip
    # Text: a visual row sees the valid text, a text row the whole sequence but the text's padding.
    text_end = text_start + text
    if TEXT_LENGTHS:
        text_end = text_start + tl.load(text_lengths_ptr + item)
    end = tl.where(visual, text_end, length)
    for start in range(tl.where(visual, text_start, 0), end, COLUMNS):
        key = start + column
        valid = (key < end) & ((key < text_end) | (key >= text_start + text))
        acc, row_max, row_sum = _attend(
            q, k_ptr, v_ptr, start, column, valid, valid[None, :], row_max, stride_kl, stride_vl,
            acc, row_max, row_sum, scale_log2, D, BLOCK_D, True, True, False, PRECISION,
        )  # fmt: skip

    seen = row_sum > 0
    acc = acc / tl.where(seen, row_sum, 1.0)[:, None]
    store_rows(out_ptr + (item * length * heads + head) * D, acc, token, valid_row, heads * D, D, BLOCK_D)
    lse = tl.where(seen, (row_max + tl.math.log2(tl.where(seen, row_sum, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(lse_ptr + (item * heads + head) * length + token, lse, mask=valid_row)


def needs(inputs: Inputs) -> str | None:
    q = inputs.q
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        return f"a GPU, got tensors on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[-1] > 128:
        return f"a head dim of at most 128, got {q.shape[-1]}"
    if inputs.plan.tiles.tile_size > 128:
        return f"tiles of at most 128 tokens, got {inputs.plan.tiles.tile_size}"
    return None if inputs.precision == "native" else f"precision='native', got {inputs.precision!r}"


def forward(inputs: Inputs, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, L] in float32."""
    plan, text_lengths = inputs.plan, inputs.text_lengths
    q = -inputs.q if inputs.scale < 0 else inputs.q  # the kernel takes a factor that is not negative
    q, k, v = (unit_stride(x) for x in (q, inputs.k, inputs.v))
    batch, length, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    block, launch = fit(launch or choose(LAUNCHES, DEFAULT_LAUNCHES, q), plan.tiles)
    pooled_k, pooled_v, weights = pooled_rows(inputs)
    programs = (triton.cdiv(inputs.text, launch.rows) + plan.tiles.num_tiles * (block // launch.rows)) * heads * batch
    block_sparse_forward[(programs,)](
        q, k, v, out, lse, pooled_k, pooled_v, weights, plan.counts, plan.partial,
        pack_entries(plan.indices, plan.tiles),
        plan.counts if plan.window is None else plan.window.bounds,
        plan.counts if text_lengths is None else text_lengths,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *pooled_k.stride()[:3], *pooled_v.stride()[:3],
        *weights.stride()[:3], *list_strides(plan.counts), plan.indices.shape[-1], abs(inputs.scale) * LOG2_E,
        heads, length, *plan.tiles.grid, plan.tiles.num_tiles, plan.pooled, plan.prefix, inputs.text,
        inputs.text_start, *rule_sizes(plan),
        *plan.tiles.tile, block, launch.rows, launch.columns, dim, padded(dim),
        *rule_flags(plan), text_lengths is not None, inputs.pooled is not None,
        "ieee" if q.dtype == torch.float32 else None,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out, lse
