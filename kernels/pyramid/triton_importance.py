"""Importance of key blocks without a map of all representatives: one program per few query blocks, keys read twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    rows: int  # representative queries of a program, of whole blocks
    columns: int  # representative keys per step, of whole blocks
    num_warps: int
    num_stages: int


HALF = Launch(128, 64, 8, 2)
FLOAT32 = Launch(32, 32, 4, 2)  # without tensor cores
_LOG2_E = 1.4426950408889634


@triton.jit
def _scores(q, k_ptr, stride_l, stride_d, column, num_keys, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of the queries with a step of keys, -inf where there is no key."""
    channel = tl.arange(0, BLOCK_D)
    keys = tl.load(
        k_ptr + column.to(tl.int64)[None, :] * stride_l + channel[:, None] * stride_d,
        mask=(column < num_keys)[None, :] & (channel < D)[:, None],
        other=0.0,
    )
    scores = tl.dot(q, keys, input_precision="ieee")
    return tl.where((column < num_keys)[None, :], scores, -float("inf"))


@triton.jit(do_not_specialize=["heads", "num_queries", "num_keys"])
def importance_of_blocks(
    q_ptr, k_ptr, out_ptr, q_b, q_l, q_h, q_d, k_b, k_l, k_h, k_d, heads, num_queries, num_keys, scale_log2,
    PER_QUERY: tl.constexpr, PER_KEY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_queries, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    channel = tl.arange(0, BLOCK_D)
    k_ptr += head // heads * k_b + head % heads * k_h
    q = tl.load(
        q_ptr + head // heads * q_b + head % heads * q_h + row.to(tl.int64)[:, None] * q_l + channel[None, :] * q_d,
        mask=(row < num_queries)[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_keys, COLUMNS):  # every step has a key, so ``highest`` is finite after the first
        scores = _scores(q, k_ptr, k_l, k_d, start + lane, num_keys, D, BLOCK_D) * scale_log2
        higher = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        highest = higher
    lse = highest + tl.log2(total)

    blocks, key_blocks = num_queries // PER_QUERY, num_keys // PER_KEY
    block = tile * (ROWS // PER_QUERY) + tl.arange(0, ROWS // PER_QUERY)
    out_ptr += head * blocks * key_blocks
    for start in range(0, num_keys, COLUMNS):
        scores = _scores(q, k_ptr, k_l, k_d, start + lane, num_keys, D, BLOCK_D) * scale_log2 - lse[:, None]
        best = tl.max(tl.reshape(scores, (ROWS, COLUMNS // PER_KEY, PER_KEY)), 2)
        best = tl.max(tl.reshape(best, (ROWS // PER_QUERY, PER_QUERY, COLUMNS // PER_KEY)), 1)
        key_block = start // PER_KEY + tl.arange(0, COLUMNS // PER_KEY)
        tl.store(
            out_ptr + block.to(tl.int64)[:, None] * key_blocks + key_block[None, :],
            best * 0.6931471805599453,
            mask=(block < blocks)[:, None] & (key_block < key_blocks)[None, :],
        )


def triton_log_importance(
    q: Tensor, k: Tensor, per_query_block: int, per_key_block: int, scale: float, launch: Launch | None = None
) -> Tensor:
    """Float32 [B, H, Q, K] of representatives [B, Q * per_query_block, H, D] and [B, K * per_key_block, H, D]."""
    batch, num_queries, heads, dim = q.shape
    num_keys = k.shape[1]
    out = q.new_empty(batch, heads, num_queries // per_query_block, num_keys // per_key_block, dtype=torch.float32)
    launch = launch or (FLOAT32 if q.dtype == torch.float32 else HALF)
    rows, columns = max(launch.rows, per_query_block), max(launch.columns, per_key_block)
    importance_of_blocks[(triton.cdiv(num_queries, rows) * heads * batch,)](
        q, k, out, *q.stride(), *k.stride(), heads, num_queries, num_keys, scale * _LOG2_E,
        per_query_block, per_key_block, rows, columns, dim, max(16, triton.next_power_of_2(dim)),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out
