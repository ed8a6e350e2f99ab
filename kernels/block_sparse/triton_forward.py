"""The Triton backend: one program per (query tile, head, batch item), tiles read as boxes of the token grid.

Nothing is permuted: a lane of a tile computes the position of its token from the box, so any grid, any stride and any
text length run in the same kernel. Lists are walked in two loops, first the partial tiles with a mask inside, then
the whole ones without, then the text. It runs on every GPU Triton knows and in Triton's interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import BlockPlan

LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    num_warps: int
    num_stages: int


# (compute capability major, padded head dim) -> launch; every entry is checked numerically on the GPU named in docs.
LAUNCHES: dict[tuple[int, int], Launch] = {(9, 64): Launch(4, 3), (9, 128): Launch(8, 3)}
DEFAULT_LAUNCH = Launch(8, 1)


@triton.jit
def _attend(
    q, k_ptr, v_ptr, tokens, valid, pair_mask, stride_kl, stride_vl, acc, row_max, row_sum, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys at ``tokens`` [BLOCK]."""
    channel = tl.arange(0, BLOCK_D)
    # Invalid lanes are loaded as zero and their scores set to -inf: what lies there may be NaN.
    inside = valid[:, None] & (channel < D)[None, :]
    k = tl.load(k_ptr + tokens.to(tl.int64)[:, None] * stride_kl + channel[None, :], mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK, BLOCK]
    if MASKED:
        scores = tl.where(pair_mask, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # rows that have seen no key yet
    p = tl.math.exp2(scores - shift[:, None])
    alpha = tl.math.exp2(row_max - shift)
    v = tl.load(v_ptr + tokens.to(tl.int64)[:, None] * stride_vl + channel[None, :], mask=inside, other=0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * alpha + tl.sum(p, 1)


@triton.jit
def _box(tile, lane, T, H, W, TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """Coordinates of a tile's lanes on the grid and whether they lie on it."""
    tiles_h = (H + TH - 1) // TH
    tiles_w = (W + TW - 1) // TW
    t = tile // (tiles_h * tiles_w) * TT + lane // (TH * TW)
    h = tile // tiles_w % tiles_h * TH + lane // TW % TH
    w = tile % tiles_w * TW + lane % TW
    return t, h, w, (lane < TT * TH * TW) & (t < T) & (h < H) & (w < W)


@triton.jit
def _admits(q, k, first, last, dilation, DILATED: tl.constexpr):
    """Which keys each query admits on one axis, bool [BLOCK, BLOCK]."""
    inside = (k[None, :] >= first[:, None]) & (k[None, :] <= last[:, None])
    if DILATED:
        inside = inside & ((k[None, :] - q[:, None]) % dilation == 0)
    return inside


# Lengths and sizes are not specialised on: another shape must not compile another kernel.
@triton.jit(
    do_not_specialize=[
        "stride_list_b", "stride_list_h", "max_kept", "heads", "length", "T", "H", "W",
        "num_tiles", "prefix", "text", "text_start", "dilation_t", "dilation_h", "dilation_w",
    ]
)  # fmt: skip
def block_sparse_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, partial_ptr, indices_ptr, bounds_ptr, text_lengths_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_list_b, stride_list_h, max_kept, scale_log2,
    heads, length, T, H, W, num_tiles, prefix, text, text_start, dilation_t, dilation_h, dilation_w,
    TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, UNION: tl.constexpr, DILATED: tl.constexpr,
    TEXT_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Text query tiles come first: they see every key and so run longest.
    text_tiles = (text + BLOCK - 1) // BLOCK
    row = tl.program_id(0) % (text_tiles + num_tiles)
    head = tl.program_id(0) // (text_tiles + num_tiles) % heads
    item = tl.program_id(0) // ((text_tiles + num_tiles) * heads)
    q_ptr += item.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += item.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += item.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh

    visual = row >= text_tiles
    lane = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)
    text_valid = text
    if TEXT_LENGTHS:
        text_valid = tl.load(text_lengths_ptr + item)

    q_tile = row - text_tiles
    qt, qh, qw, on_grid = _box(tl.maximum(q_tile, 0), lane, T, H, W, TT, TH, TW)
    text_row = row * BLOCK + lane
    q_token = tl.where(visual, prefix + (qt * H + qh) * W + qw, text_start + text_row)
    q_valid = tl.where(visual, on_grid, text_row < text)
    q = tl.load(
        q_ptr + q_token.to(tl.int64)[:, None] * stride_ql + channel[None, :],
        mask=q_valid[:, None] & (channel < D)[None, :], other=0.0,
    )  # fmt: skip
    row_max = tl.full([BLOCK], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)

    if visual:
        entry = item.to(tl.int64) * stride_list_b + head.to(tl.int64) * stride_list_h + q_tile
        count = tl.load(counts_ptr + entry)
        partial = tl.load(partial_ptr + entry)
        indices_ptr += entry * max_kept
        if WINDOW:
            first_t, last_t = _bounds(bounds_ptr, qt, on_grid)
            first_h, last_h = _bounds(bounds_ptr, T + qh, on_grid)
            first_w, last_w = _bounds(bounds_ptr, T + H + qw, on_grid)
        for i in range(0, partial):
            kt, kh, kw, valid = _box(tl.load(indices_ptr + i), lane, T, H, W, TT, TH, TW)
            pair = valid[None, :] & (lane >= 0)[:, None]
            if WINDOW:
                in_t = _admits(qt, kt, first_t, last_t, dilation_t, DILATED)
                in_h = _admits(qh, kh, first_h, last_h, dilation_h, DILATED)
                in_w = _admits(qw, kw, first_w, last_w, dilation_w, DILATED)
                if UNION:
                    pair = pair & (in_t | in_h | in_w)
                else:
                    pair = pair & in_t & in_h & in_w
            acc, row_max, row_sum = _attend(
                q, k_ptr, v_ptr, prefix + (kt * H + kh) * W + kw, valid, pair, stride_kl, stride_vl,
                acc, row_max, row_sum, scale_log2, D, BLOCK_D, True, PRECISION,
            )  # fmt: skip
        for i in range(partial, count):
            kt, kh, kw, valid = _box(tl.load(indices_ptr + i), lane, T, H, W, TT, TH, TW)
            acc, row_max, row_sum = _attend(
                q, k_ptr, v_ptr, prefix + (kt * H + kh) * W + kw, valid, valid[None, :], stride_kl, stride_vl,
                acc, row_max, row_sum, scale_log2, D, BLOCK_D, TT * TH * TW != BLOCK, PRECISION,
            )  # fmt: skip
    else:
        for start in range(0, T * H * W, BLOCK):
            valid = start + lane < T * H * W
            acc, row_max, row_sum = _attend(
                q, k_ptr, v_ptr, prefix + start + lane, valid, valid[None, :], stride_kl, stride_vl,
                acc, row_max, row_sum, scale_log2, D, BLOCK_D, True, PRECISION,
            )  # fmt: skip
    for start in range(0, text_valid, BLOCK):
        valid = start + lane < text_valid
        acc, row_max, row_sum = _attend(
            q, k_ptr, v_ptr, text_start + start + lane, valid, valid[None, :], stride_kl, stride_vl,
            acc, row_max, row_sum, scale_log2, D, BLOCK_D, True, PRECISION,
        )  # fmt: skip

    seen = row_sum > 0
    acc = acc / tl.where(seen, row_sum, 1.0)[:, None]
    out_row = (item.to(tl.int64) * length + q_token) * heads + head
    tl.store(
        out_ptr + out_row[:, None] * D + channel[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=q_valid[:, None] & (channel < D)[None, :],
    )  # fmt: skip
    lse = tl.where(seen, (row_max + tl.math.log2(tl.where(seen, row_sum, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(lse_ptr + (item.to(tl.int64) * heads + head) * length + q_token, lse, mask=q_valid)


@triton.jit
def _bounds(bounds_ptr, coordinate, on_grid):
    first = tl.load(bounds_ptr + 2 * coordinate, mask=on_grid, other=0)
    last = tl.load(bounds_ptr + 2 * coordinate + 1, mask=on_grid, other=-1)
    return first, last


def triton_attention(
    q: Tensor,  # [B, L, H, D], the last dimension contiguous
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    text_lengths: Tensor | None = None,  # int32 [B]
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, L] in float32."""
    batch, length, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    block = max(16, triton.next_power_of_2(plan.tiles.tile_size))
    block_d = max(16, triton.next_power_of_2(dim))
    launch = launch or launch_for(q.device, block_d)
    text = plan.prefix + plan.suffix
    window = plan.window
    dilation = window.dilation if window else (1, 1, 1)
    programs = (triton.cdiv(text, block) + plan.tiles.num_tiles) * heads * batch
    block_sparse_forward[(programs,)](
        q, k, v, out, lse, plan.counts, plan.partial, plan.indices,
        plan.counts if window is None else window.bounds,
        plan.counts if text_lengths is None else text_lengths,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        plan.counts.stride(0) if plan.counts.shape[0] > 1 else 0,
        plan.counts.stride(1) if plan.counts.shape[1] > 1 else 0,
        plan.indices.shape[-1], scale * LOG2_E,
        heads, length, *plan.tiles.grid, plan.tiles.num_tiles, plan.prefix, text,
        0 if plan.prefix else plan.tiles.num_tokens, *dilation,
        *plan.tiles.tile, block, dim, block_d,
        window is not None, window is not None and window.union, max(dilation) > 1,
        text_lengths is not None, "ieee" if q.dtype == torch.float32 else None,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out, lse


def launch_for(device: torch.device, block_d: int) -> Launch:
    """The checked launch of this GPU and head dim, or a conservative one."""
    if device.type != "cuda":
        return DEFAULT_LAUNCH
    major, _ = torch.cuda.get_device_capability(device)
    return LAUNCHES.get((major, block_d), DEFAULT_LAUNCH)
