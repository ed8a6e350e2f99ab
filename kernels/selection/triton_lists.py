"""One program writes the list of one query tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _read(keep_ptr, partial_ptr, stride_k, num_keys, pooled_tiles, lane):
    """Key tiles at places ``lane`` of the list order, pooled ones first: number, kept as partial, kept as whole."""
    tile = tl.where(lane < pooled_tiles, num_keys - pooled_tiles + lane, lane - pooled_tiles)
    keep = tl.load(keep_ptr + tile, mask=lane < num_keys, other=0) != 0
    partial = tl.load(partial_ptr + tile.to(tl.int64) * stride_k, mask=lane < num_keys, other=0) != 0
    partial = partial | (lane < pooled_tiles)
    return tile, (keep & partial).to(tl.int32), (keep & (partial == 0)).to(tl.int32)


@triton.jit(do_not_specialize=["heads", "queries", "num_keys", "pooled_tiles", "width"])
def list_kept_tiles(
    keep_ptr, partial_ptr, counts_ptr, partial_counts_ptr, indices_ptr,
    stride_b, stride_h, stride_q, stride_k, heads, queries, num_keys, pooled_tiles, width, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    keep_ptr += row * num_keys
    partial_ptr += row // queries // heads * stride_b + row // queries % heads * stride_h + row % queries * stride_q
    indices_ptr += row * width
    lane = tl.arange(0, BLOCK)

    cuts = tl.full([], 0, tl.int32)
    for start in range(0, num_keys, BLOCK):
        _, cut, _ = _read(keep_ptr, partial_ptr, stride_k, num_keys, pooled_tiles, start + lane)
        cuts += tl.sum(cut, 0)
    next_cut = tl.full([], 0, tl.int32)
    next_whole = cuts
    for start in range(0, num_keys, BLOCK):
        tile, cut, whole = _read(keep_ptr, partial_ptr, stride_k, num_keys, pooled_tiles, start + lane)
        slot = tl.where(cut != 0, next_cut + tl.cumsum(cut, 0), next_whole + tl.cumsum(whole, 0)) - 1
        tl.store(indices_ptr + slot, tile, mask=(cut + whole > 0) & (slot < width))
        next_cut += tl.sum(cut, 0)
        next_whole += tl.sum(whole, 0)
    for start in range(next_whole // BLOCK * BLOCK, width, BLOCK):
        slot = start + lane
        tl.store(indices_ptr + slot, tl.zeros([BLOCK], tl.int32), mask=(slot >= next_whole) & (slot < width))
    tl.store(counts_ptr + row, tl.minimum(next_whole, width))
    tl.store(partial_counts_ptr + row, tl.minimum(cuts, width))


def triton_lists(keep: Tensor, partial: Tensor, width: int, pooled_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, partial counts and indices of keep [B, H, Q, K], contiguous, and partial of its shape, any strides."""
    _, heads, queries, num_keys = keep.shape
    counts, partial_counts = (torch.empty(keep.shape[:-1], dtype=torch.int32, device=keep.device) for _ in range(2))
    indices = torch.empty(*keep.shape[:-1], width, dtype=torch.int32, device=keep.device)
    list_kept_tiles[(counts.numel(),)](
        keep.view(torch.int8), partial.view(torch.int8), counts, partial_counts, indices,
        *partial.stride(), heads, queries, num_keys, pooled_tiles, width,
        min(1024, triton.next_power_of_2(num_keys)), num_warps=4,
    )  # fmt: skip
    return counts, partial_counts, indices
