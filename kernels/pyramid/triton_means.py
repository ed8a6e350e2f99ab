"""Means along a curve and their gradients: a program reads the tokens of one mean over a run of channels.

The channels of all heads count as one axis, so a token is read in one piece where heads lie next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.pyramid.means import Levels


class Launch(NamedTuple):
    columns: int  # channels, of any heads
    num_warps: int  # per 16 tokens


MEANS = Launch(256, 1)
SHARES = Launch(256, 4)
_TOKENS = 16  # of one program that spreads gradients


@triton.jit
def _channels(first, heads, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Heads and channels of a run of columns, and which of them there are."""
    column = first + tl.arange(0, COLUMNS)
    return column // D, column % D, column < heads * D


@triton.jit
def _write_mean(x, weight, means_ptr, row, heads, head, channel, on_row, D: tl.constexpr):
    """Weighted mean of the rows of ``x`` into a row of means [rows, heads, D], 0 where there is no weight."""
    tokens = tl.sum(weight, 0)
    mean = tl.sum(x.to(tl.float32) * weight[:, None].to(tl.float32), 0) / tl.maximum(tokens, 1)
    tl.store(means_ptr + (row * heads + head) * D + channel, mean, mask=on_row)


@triton.jit
def _mean_of_tokens(
    x_ptr, x_b, x_l, x_h, x_d, item, position, valid, means_ptr, row, heads, head, channel, on_row, D: tl.constexpr
):  # fmt: skip
    offsets = head.to(tl.int64) * x_h + channel * x_d
    x = tl.load(
        x_ptr + item * x_b + position.to(tl.int64)[:, None] * x_l + offsets[None, :],
        mask=valid[:, None] & on_row[None, :],
        other=0.0,
    )
    _write_mean(x, valid.to(tl.int32), means_ptr, row, heads, head, channel, on_row, D)


@triton.jit(do_not_specialize=["heads", "tokens", "prefix", "text", "runs", "text_start", "rows"])
def mean_of_tokens(
    a_ptr, b_ptr, c_ptr, order_ptr, means_ptr,
    a_b, a_l, a_h, a_d, b_b, b_l, b_h, b_d, c_b, c_l, c_h, c_d,
    heads, tokens, prefix, text, runs, text_start, rows,
    BLOCK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of level 1 and of the text, one per program and run of columns, padding included."""
    pieces = tl.cdiv(heads * D, COLUMNS)
    head, channel, on_row = _channels(tl.program_id(0) % pieces * COLUMNS, heads, D, COLUMNS)
    run = tl.program_id(0) // pieces
    item = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    means_ptr += (which * tl.num_programs(1) + item) * rows * heads * D

    lane = tl.arange(0, BLOCK)
    of_text = run - runs  # a text key is a run of one token
    if run < runs:
        row = run
        valid = lane < tokens - run * BLOCK
        position = tl.load(order_ptr + run * BLOCK + lane, mask=valid, other=0)
    else:
        row = text_start + of_text
        valid = lane < tl.minimum(text - of_text, 1)
        position = tl.where(of_text < prefix, of_text, of_text + tokens) + lane
    if which == 0:
        _mean_of_tokens(
            a_ptr, a_b, a_l, a_h, a_d, item, position, valid, means_ptr, row, heads, head, channel, on_row, D
        )
    elif which == 1:
        _mean_of_tokens(
            b_ptr, b_b, b_l, b_h, b_d, item, position, valid, means_ptr, row, heads, head, channel, on_row, D
        )
    else:
        _mean_of_tokens(
            c_ptr, c_b, c_l, c_h, c_d, item, position, valid, means_ptr, row, heads, head, channel, on_row, D
        )


@triton.jit(do_not_specialize=["heads", "tokens", "below", "start", "span", "rows"])
def mean_of_means(
    means_ptr, heads, tokens, below, start, span, rows, BLOCK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows of a level from those of the level below, which start at ``below`` and stand for ``span`` tokens each."""
    pieces = tl.cdiv(heads * D, COLUMNS)
    head, channel, on_row = _channels(tl.program_id(0) % pieces * COLUMNS, heads, D, COLUMNS)
    run = tl.program_id(0) // pieces
    means_ptr += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows * heads * D
    fine = run * BLOCK + tl.arange(0, BLOCK)
    weight = tl.minimum(tl.maximum(tokens - fine * span, 0), span)
    column = head * D + channel
    x = tl.load(
        means_ptr + (below + fine)[:, None] * (heads * D) + column[None, :],
        mask=(weight > 0)[:, None] & on_row[None, :],
        other=0.0,
    )
    _write_mean(x, weight, means_ptr, start + run, heads, head, channel, on_row, D)


@triton.jit(do_not_specialize=["heads", "tokens", "prefix", "length", "text_start", "rows"])
def shares_of_tokens(
    gradient_ptr, order_ptr, shares_ptr, heads, tokens, prefix, length, text_start, rows,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients [rows, heads, D] of the means -> [length, heads, D] of the tokens, those of the curve first."""
    pieces = tl.cdiv(heads * D, COLUMNS)
    head, channel, on_row = _channels(tl.program_id(0) % pieces * COLUMNS, heads, D, COLUMNS)
    column = head * D + channel
    item = tl.program_id(1).to(tl.int64)
    gradient_ptr += item * rows * heads * D
    shares_ptr += item * length * heads * D

    place = tl.program_id(0) // pieces * TOKENS + tl.arange(0, TOKENS)
    on_curve = place < tokens
    of_text = place - tokens
    position = tl.load(order_ptr + place, mask=on_curve, other=0)
    position = tl.where(on_curve, position, tl.where(of_text < prefix, of_text, place))
    share = tl.load(
        gradient_ptr + (text_start + of_text)[:, None] * (heads * D) + column[None, :],
        mask=((place >= tokens) & (place < length))[:, None] & on_row[None, :],
        other=0.0,
    ).to(tl.float32)
    span = 1
    start = 0
    for _ in tl.static_range(DEPTH):
        span *= BLOCK
        mean = place // span
        weight = tl.minimum(tokens - mean * span, span).to(tl.float32)
        x = tl.load(
            gradient_ptr + (start + mean)[:, None] * (heads * D) + column[None, :],
            mask=on_curve[:, None] & on_row[None, :],
            other=0.0,
        )
        share += tl.where(on_curve[:, None], x.to(tl.float32) / weight[:, None], 0.0)
        start += tl.cdiv(tl.cdiv(tokens, span), BLOCK) * BLOCK
    tl.store(
        shares_ptr + position.to(tl.int64)[:, None] * (heads * D) + column[None, :],
        share,
        mask=(place < length)[:, None] & on_row[None, :],
    )


def triton_means(
    tensors: Sequence[Tensor], order: Tensor, levels: Levels, prefix: int, launch: Launch = MEANS
) -> tuple[Tensor, ...]:
    """[B, levels.rows, H, D] for each of up to three tensors [B, L, H, D]."""
    batch, _, heads, dim = tensors[0].shape
    means = tensors[0].new_empty(len(tensors), batch, levels.rows, heads, dim)
    columns = min(launch.columns, triton.next_power_of_2(heads * dim))
    pieces = triton.cdiv(heads * dim, columns)
    three = [tensors[min(i, len(tensors) - 1)] for i in range(3)]
    runs, text_start = levels.start(2), levels.start(levels.depth + 1)
    mean_of_tokens[(pieces * (runs + levels.rows - text_start), batch, len(tensors))](
        *three, order, means, *(stride for x in three for stride in x.stride()),
        heads, levels.tokens, prefix, levels.text, runs, text_start, levels.rows,
        levels.block, dim, columns, num_warps=launch.num_warps * levels.block // 16,
    )  # fmt: skip
    for level in range(2, levels.depth + 1):
        start, end = levels.start(level), levels.start(level + 1)
        mean_of_means[(pieces * (end - start), batch, len(tensors))](
            means, heads, levels.tokens, levels.start(level - 1), start, levels.block ** (level - 1), levels.rows,
            levels.block, dim, columns, num_warps=launch.num_warps * levels.block // 16,
        )  # fmt: skip
    return means.unbind(0)


def triton_shares(gradient: Tensor, order: Tensor, levels: Levels, prefix: int, launch: Launch = SHARES) -> Tensor:
    """Gradients [B, L, H, D] of the tokens from those of their means, contiguous [B, levels.rows, H, D]."""
    batch, _, heads, dim = gradient.shape
    length = levels.tokens + levels.text
    shares = gradient.new_empty(batch, length, heads, dim)
    columns = min(launch.columns, triton.next_power_of_2(heads * dim))
    programs = triton.cdiv(heads * dim, columns) * triton.cdiv(length, _TOKENS)
    shares_of_tokens[(programs, batch)](
        gradient, order, shares, heads, levels.tokens, prefix, length, levels.start(levels.depth + 1), levels.rows,
        levels.depth, levels.block, dim, columns, _TOKENS, num_warps=launch.num_warps,
    )  # fmt: skip
    return shares
