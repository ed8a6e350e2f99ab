"""Choosing blocks among the children of what their parents chose: 16 siblings a program, which share all candidates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
_TAKEN = tl.constexpr(-(2**31))  # below every score, as ordered integers are
_NOT_THERE = tl.constexpr(-(2**31) + 1)
_STAGED_BYTES = 65536  # of the candidates' channels at a time


@triton.jit(do_not_specialize=["heads", "blocks"])
def choose_blocks(
    q_ptr, k_ptr, parents_ptr, chosen_ptr, q_b, q_l, q_h, q_d, k_b, k_l, k_h, k_d, heads, blocks,
    GIVEN: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``KEPT`` of the children of ``GIVEN`` parents, of all blocks where that is 0."""
    tiles = tl.cdiv(blocks, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, CANDIDATES)
    candidate = lane
    if GIVEN > 0:
        family = head * tl.cdiv(blocks, BLOCK) + tl.program_id(0) % tiles * ROWS // BLOCK
        parent = tl.load(parents_ptr + family * GIVEN + lane // BLOCK, mask=lane < GIVEN * BLOCK, other=0)
        candidate = tl.where(lane < GIVEN * BLOCK, parent * BLOCK + lane % BLOCK, blocks)
    there = candidate < blocks

    q_ptr += head // heads * q_b + head % heads * q_h
    k_ptr += head // heads * k_b + head % heads * k_h
    scores = tl.zeros([ROWS, CANDIDATES], tl.float32)
    for first in tl.static_range(0, D, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        queries = tl.load(
            q_ptr + row.to(tl.int64)[:, None] * q_l + channel[None, :] * q_d,
            mask=(row < blocks)[:, None] & (channel < D)[None, :],
            other=0.0,
        )
        keys = tl.load(
            k_ptr + candidate.to(tl.int64)[None, :] * k_l + channel[:, None] * k_d,
            mask=there[None, :] & (channel < D)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, scores, input_precision="ieee")

    # Integers in the order of the scores, so that what is taken or not there comes after -inf.
    scores = tl.where(scores == scores, scores, -float("inf"))
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 equals 0
    rank = tl.where(there[None, :], tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _NOT_THERE)
    for _ in range(KEPT):
        best = tl.max(rank, 1)
        earliest = tl.min(tl.where(rank == best[:, None], lane[None, :], CANDIDATES), 1)
        rank = tl.where(lane[None, :] == earliest[:, None], _TAKEN, rank)
    taken = rank == _TAKEN
    slot = tl.cumsum(taken.to(tl.int32), 1) - 1
    chosen_ptr += head * blocks * KEPT
    places = chosen_ptr + row[:, None] * KEPT + slot
    tl.store(places, tl.broadcast_to(candidate[None, :], [ROWS, CANDIDATES]), mask=taken & (row < blocks)[:, None])


def triton_choose(
    queries: Tensor, keys: Tensor, parents: Tensor | None, kept: int, block: int, num_warps: int | None = None
) -> Tensor:
    """int32 [B, H, n, kept] of queries and keys [B, n, H, D] and what their parents chose, [B, H, ceil(n / block), G].

    Without parents every block is a candidate; ``kept`` is at most the number of candidates.
    """
    batch, blocks, heads, dim = queries.shape
    given = 0 if parents is None else parents.shape[-1]
    candidates = max(16, triton.next_power_of_2(blocks if parents is None else given * block))
    bytes_each = queries.element_size()
    channels = max(16, min(triton.next_power_of_2(dim), _STAGED_BYTES // (candidates * bytes_each)))
    chosen = torch.empty(batch, heads, blocks, kept, dtype=torch.int32, device=queries.device)
    choose_blocks[(triton.cdiv(blocks, _ROWS) * batch * heads,)](
        queries, keys, chosen if parents is None else parents, chosen, *queries.stride(), *keys.stride(), heads, blocks,
        given, kept, block, dim, _ROWS, candidates, channels,
        num_warps=num_warps or max(1, candidates * bytes_each // 256),
    )  # fmt: skip
    return chosen
