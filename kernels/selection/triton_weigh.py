"""The best that a budget allows, without sorting: the threshold is found a few bits at a time.

A launch reads every row once, in chunks, and adds up the weights above each of the values that the next bits may take:
integers, exact in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.selection.triton_choose import ordered_keys

BITS = 4  # of the threshold, found by one launch
CHUNK = 2048  # scores of one program


@triton.jit
def _threshold(sums_ptr, budget, steps, BITS: tl.constexpr):
    """The threshold's first digits: the highest value from which on a row weighs more than the budget, or 0."""
    digits = tl.arange(0, 2**BITS)
    prefix = tl.full([], 0, tl.uint32)
    for step in range(steps):
        at_least = tl.load(sums_ptr + step * 2**BITS + digits)
        digit = tl.max(tl.where(at_least > budget, digits, 0), 0)
        prefix = (prefix << BITS) | digit.to(tl.uint32)
    return prefix


@triton.jit(do_not_specialize=["length", "chunks", "budget", "done"])
def weigh_digits(
    scores_ptr, weights_ptr, sums_ptr, length, chunks, budget, done, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add a chunk to what a row weighs from each value of digit ``done`` on, after the threshold's digits so far."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    lane = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    _, keys = ordered_keys(scores_ptr + row * length, lane, lane < length)
    weights = tl.load(weights_ptr + lane, mask=lane < length, other=0)
    sums_ptr += row * (32 // BITS * 2**BITS)
    prefix = _threshold(sums_ptr, budget, done, BITS)
    for digit in range(1, 2**BITS):
        least = ((prefix << BITS) | tl.full([], digit, tl.uint32)) << (32 - BITS - done * BITS)
        heavy = tl.sum(tl.where(keys >= least, weights, 0).to(tl.int64), 0)
        tl.atomic_add(sums_ptr + done * 2**BITS + digit, heavy, mask=heavy > 0, sem="relaxed")


@triton.jit(do_not_specialize=["length", "chunks", "budget"])
def weigh_ties(
    scores_ptr, weights_ptr, sums_ptr, parts_ptr, length, chunks, budget, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What a chunk weighs above the threshold and at it."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    lane = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    _, keys = ordered_keys(scores_ptr + row * length, lane, lane < length)
    weights = tl.load(weights_ptr + lane, mask=lane < length, other=0).to(tl.int64)
    threshold = _threshold(sums_ptr + row * (32 // BITS * 2**BITS), budget, 32 // BITS, BITS)
    parts_ptr += tl.program_id(0) * 2
    tl.store(parts_ptr, tl.sum(tl.where(keys > threshold, weights, 0), 0))
    tl.store(parts_ptr + 1, tl.sum(tl.where(keys == threshold, weights, 0), 0))


@triton.jit(do_not_specialize=["length", "chunks", "budget"])
def keep_within(
    scores_ptr, weights_ptr, sums_ptr, parts_ptr, mask_ptr, length, chunks, budget,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All above the threshold, and those at it that come first and fit beside them."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    lane = chunk * BLOCK + tl.arange(0, BLOCK)
    _, keys = ordered_keys(scores_ptr + row * length, lane, lane < length)
    weights = tl.load(weights_ptr + lane, mask=lane < length, other=0).to(tl.int64)
    threshold = _threshold(sums_ptr + row * (32 // BITS * 2**BITS), budget, 32 // BITS, BITS)
    room = budget.to(tl.int64)
    parts_ptr += row * chunks * 2
    for start in range(0, chunks, 256):
        other = start + tl.arange(0, 256)
        above = tl.load(parts_ptr + other * 2, mask=other < chunks, other=0)
        tied_before = tl.load(parts_ptr + other * 2 + 1, mask=other < chunk, other=0)
        room -= tl.sum(above + tied_before, 0)
    tied = keys == threshold
    so_far = tl.cumsum(tl.where(tied, weights, 0), 0)
    kept = (keys > threshold) | (tied & (so_far <= room))
    tl.store(mask_ptr + row * length + lane, kept.to(tl.int8), mask=lane < length)


def triton_best_within(scores: Tensor, weights: Tensor, budget: int) -> Tensor:
    """Bool [..., N], of contiguous float32 scores [..., N] and int32 weights [N]."""
    length = scores.shape[-1]
    rows, chunks, steps = scores.numel() // length, triton.cdiv(length, CHUNK), 32 // BITS
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    sums = torch.zeros(rows, steps, 2**BITS, dtype=torch.int64, device=scores.device)
    parts = torch.empty(rows, chunks, 2, dtype=torch.int64, device=scores.device)
    grid, sizes = (rows * chunks,), (length, chunks, budget)
    for step in range(steps):
        weigh_digits[grid](scores, weights, sums, *sizes, step, BITS, CHUNK)
    weigh_ties[grid](scores, weights, sums, parts, *sizes, BITS, CHUNK)
    keep_within[grid](scores, weights, sums, parts, mask.view(torch.int8), *sizes, BITS, CHUNK)
    return mask
