"""Exact selection without sorting: the threshold is found bit by bit, ties at it are taken by index.

A short row is held by one program, which searches the threshold among all 2^32 values in 32 counting steps. A long row
(a head's whole map) is read once per digit by many programs: histograms of integer counts, exact in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.selection.backend import ROW_LIMIT

DIGIT_BITS = 8
CHUNK = 4096  # scores that one program reads of a long row


@triton.jit
def ordered_keys(scores_ptr, lane, inside):
    """Scores and unsigned integers in their order; those outside come last, below -inf."""
    scores = tl.load(scores_ptr + lane, mask=inside, other=-float("inf"))
    scores = tl.where(scores != scores, -float("inf"), scores)
    bits = tl.where(scores == 0, 0.0, scores).to(tl.uint32, bitcast=True)  # -0 equals 0
    keys = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return scores, tl.where(inside, keys, 0)


@triton.jit
def _up_to(keys, threshold, room):
    """All above the threshold and the first ``room`` equal to it."""
    tied = keys == threshold
    return (keys > threshold) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit(do_not_specialize=["length", "kept"])
def keep_highest_of_row(scores_ptr, mask_ptr, length, kept, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * length
    lane = tl.arange(0, BLOCK)
    _, keys = ordered_keys(scores_ptr + row, lane, lane < length)
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        at_least = tl.sum((keys >= (threshold | bit)).to(tl.int32), 0)
        threshold = tl.where(at_least >= kept, threshold | bit, threshold)
        bit = bit >> 1
    room = kept - tl.sum((keys > threshold).to(tl.int32), 0)
    tl.store(mask_ptr + row + lane, _up_to(keys, threshold, room).to(tl.int8), mask=lane < length)


@triton.jit(do_not_specialize=["length", "p"])
def keep_mass_of_row(scores_ptr, mask_ptr, length, p, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * length
    lane = tl.arange(0, BLOCK)
    scores, keys = ordered_keys(scores_ptr + row, lane, lane < length)
    highest = tl.max(scores, 0)
    weights = tl.where(scores == highest, 1.0, tl.exp(scores - highest))  # equal ones may be infinite
    weights = tl.where(lane < length, weights, 0.0)
    # A sum in a fixed order never falls when terms are added to it, so the search is exact in float32.
    target = p * tl.sum(weights, 0)
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        mass = tl.sum(tl.where(keys >= (threshold | bit), weights, 0.0), 0)
        threshold = tl.where(mass >= target, threshold | bit, threshold)
        bit = bit >> 1
    above = tl.sum(tl.where(keys > threshold, weights, 0.0), 0)
    tied = tl.max(tl.where(keys == threshold, weights, 0.0), 0)
    room = tl.minimum(tl.maximum(tl.ceil((target - above) / tied), 1.0), length).to(tl.int32)
    tl.store(mask_ptr + row + lane, _up_to(keys, threshold, room).to(tl.int8), mask=lane < length)


@triton.jit
def _narrowed(histogram_ptr, kept, digits, BITS: tl.constexpr):
    """The threshold's first digits, and how many of the scores that start with them are kept."""
    bins = tl.arange(0, 2**BITS)
    prefix = tl.full([], 0, tl.uint32)
    for i in range(digits):
        count = tl.load(histogram_ptr + i * 2**BITS + bins)
        at_least = tl.cumsum(count, 0, reverse=True)
        digit = tl.sum((at_least >= kept).to(tl.int32), 0) - 1
        kept -= tl.sum(tl.where(bins > digit, count, 0), 0)
        prefix = (prefix << BITS) | digit.to(tl.uint32)
    return prefix, kept


@triton.jit(do_not_specialize=["length", "chunks", "kept", "done"])
def count_digits(
    scores_ptr, histogram_ptr, length, chunks, kept, done, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add a chunk to the histogram of digit ``done``, over the scores that start with the threshold's digits so far."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    lane = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    _, keys = ordered_keys(scores_ptr + row * length, lane, lane < length)
    histogram_ptr += row * (32 // BITS * 2**BITS)
    prefix, _ = _narrowed(histogram_ptr, kept, done, BITS)
    counted = (lane < length) & (keys >> (31 - done * BITS) >> 1 == prefix)  # in two steps: a shift by 32 is undefined
    digit = (keys >> (32 - BITS - done * BITS)) & (2**BITS - 1)
    counts = tl.histogram(digit.to(tl.int32), 2**BITS, mask=counted)
    tl.atomic_add(histogram_ptr + done * 2**BITS + tl.arange(0, 2**BITS), counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["length", "chunks", "kept"])
def count_ties(
    scores_ptr, histogram_ptr, ties_ptr, length, chunks, kept, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64)
    lane = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    _, keys = ordered_keys(scores_ptr + row * length, lane, lane < length)
    threshold, _ = _narrowed(histogram_ptr + row * (32 // BITS * 2**BITS), kept, 32 // BITS, BITS)
    tl.store(ties_ptr + tl.program_id(0), tl.sum((keys == threshold).to(tl.int32), 0))


@triton.jit(do_not_specialize=["length", "chunks", "kept"])
def keep_highest_of_chunk(
    scores_ptr, histogram_ptr, ties_ptr, mask_ptr, length, chunks, kept, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    lane = chunk * BLOCK + tl.arange(0, BLOCK)
    _, keys = ordered_keys(scores_ptr + row * length, lane, lane < length)
    threshold, room = _narrowed(histogram_ptr + row * (32 // BITS * 2**BITS), kept, 32 // BITS, BITS)
    earlier = tl.arange(0, 256)
    for start in range(0, chunk, 256):
        ties = tl.load(ties_ptr + row * chunks + start + earlier, mask=start + earlier < chunk, other=0)
        room -= tl.sum(ties, 0)
    tl.store(mask_ptr + row * length + lane, _up_to(keys, threshold, room).to(tl.int8), mask=lane < length)


def triton_keep_highest(scores: Tensor, kept: int) -> Tensor:
    """The ``kept`` highest of each row, bool [..., N], of contiguous float32 scores [..., N]; ``kept`` is at most N."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    length = scores.shape[-1]
    rows = scores.numel() // length
    if length <= ROW_LIMIT:
        block, num_warps = _row_launch(length)
        keep_highest_of_row[(rows,)](scores, mask.view(torch.int8), length, kept, block, num_warps=num_warps)
        return mask
    digits, chunks = 32 // DIGIT_BITS, triton.cdiv(length, CHUNK)
    histogram = torch.zeros(rows, digits, 2**DIGIT_BITS, dtype=torch.int32, device=scores.device)
    ties = torch.empty(rows, chunks, dtype=torch.int32, device=scores.device)
    grid, sizes = (rows * chunks,), (length, chunks, kept)
    for digit in range(digits):
        count_digits[grid](scores, histogram, *sizes, digit, DIGIT_BITS, CHUNK)
    count_ties[grid](scores, histogram, ties, *sizes, DIGIT_BITS, CHUNK)
    keep_highest_of_chunk[grid](scores, histogram, ties, mask.view(torch.int8), *sizes, DIGIT_BITS, CHUNK)
    return mask


def triton_keep_mass(scores: Tensor, p: float) -> Tensor:
    """The highest of each row that hold ``p`` of its softmax, bool [..., N], of contiguous float32 scores [..., N]."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    length = scores.shape[-1]
    block, num_warps = _row_launch(length)
    keep_mass_of_row[(scores.numel() // length,)](
        scores, mask.view(torch.int8), length, p, block, num_warps=num_warps
    )  # fmt: skip
    return mask


def _row_launch(length: int) -> tuple[int, int]:
    """Block size, and warps of 32 scores a thread: a row of one warp needs no barrier."""
    block = triton.next_power_of_2(length)
    return block, max(1, min(16, block // 1024))
