"""What the Triton kernels over block lists share: which keys a step of a list holds, and how scattered rows are read.

A step has a fixed number of lanes. Lanes beyond the end of a list or of the curve repeat its last entry or token, so
that loads need no mask and nothing is read that is not listed; a bias of -inf takes them out of the softmax.

A program walks one list, or several side by side: then what is one number of the list is a column [lists, 1], and
lanes [STEP] become [lists, STEP].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def listed_pooled_keys(indices_ptr, hidden_ptr, weight_ptr, at, count, key_blocks, BLOCK: tl.constexpr,
                       HIDDEN: tl.constexpr):  # fmt: skip
    """Keys ``at`` of the ``count`` > 0 blocks of pooled keys that come first in a list.

    Returns:
        Numbers of the keys, and log2 weights: -inf where a key does not exist or is hidden.
    """
    lane = at % BLOCK
    slot = tl.minimum(at // BLOCK, tl.maximum(count - 1, 0))
    key = (tl.load(indices_ptr + slot) - key_blocks) * BLOCK + lane
    bias = tl.where(at // BLOCK < count, tl.load(weight_ptr + key) * 1.4426950408889634, -float("inf"))
    if HIDDEN:
        WORDS: tl.constexpr = (BLOCK + 31) // 32
        word = tl.load(hidden_ptr + slot * WORDS + lane // 32)
        bias = tl.where((word >> (lane % 32) & 1) == 1, -float("inf"), bias)
    return key, bias


@triton.jit
def listed_keys(indices_ptr, order_ptr, at, count, tokens, BLOCK: tl.constexpr):
    """Keys ``at`` of a list of ``count`` > 0 blocks.

    Returns:
        Positions of the keys in the sequence, and 0, or -inf where a key does not exist.
    """
    slot = tl.minimum(at // BLOCK, tl.maximum(count - 1, 0))
    key = tl.load(indices_ptr + slot) * BLOCK + at % BLOCK
    bias = tl.where((at // BLOCK < count) & (key < tokens), 0.0, -float("inf"))
    return tl.load(order_ptr + tl.minimum(key, tokens - 1)), bias


@triton.jit
def readable(first, count):
    """Where each of several lists starts; one of no entries takes another's start, so that slot 0 is always listed."""
    return tl.where(count > 0, first, tl.max(tl.where(count > 0, first, 0)))


@triton.jit
def gather_rows(ptr, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr):
    """Rows [..., BLOCK_D] of a [tokens, D] view, channels beyond D zero; offsets are computed in the type INDEX.

    They are multiplied out before they spread over the channels, which is a sixth of a narrow step's instructions.
    """
    channel = tl.arange(0, BLOCK_D)
    address = ptr + tl.expand_dims(rows.to(INDEX) * stride, -1) + channel
    if D != BLOCK_D:
        return tl.load(address, mask=channel < D, other=0.0)
    else:
        return tl.load(address)


def index_type(*rows: Tensor) -> tl.dtype:
    """The type of offsets within one head of tensors [B, tokens, H, D]."""
    return tl.int32 if all(x.shape[1] * x.stride(1) < 2**31 for x in rows) else tl.int64
