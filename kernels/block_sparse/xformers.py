"""xformers' memory-efficient attention: every pair, or a window along a grid of one axis.

Its biases know distances in the sequence only, so windows over two or three axes are out of reach.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.blocks import keeps_everything
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import BlockPlan


class Reach(NamedTuple):
    """Keys that each query sees before and after itself."""

    before: int
    after: int


def needs(inputs: Inputs) -> str | None:
    q = inputs.q
    if not q.is_cuda:
        return f"a GPU, got tensors on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"a head dim of at most 256 that 8 divides, got {q.shape[-1]}"
    if inputs.precision != "native":
        return f"precision='native', got {inputs.precision!r}"
    return plan_needs(inputs)


def plan_needs(inputs: Inputs) -> str | None:
    if inputs.pooled is not None:
        return "a plan without pooled keys"
    if inputs.text_lengths is not None:
        return "text without padding, got text_lengths"
    if keeps_everything(inputs.plan) or local_reach(inputs.plan) is not None:
        return None
    return "a plan that keeps every pair, or one window of equal reach along a grid of one axis without text"


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, L] in float32."""
    from xformers.ops import fmha

    bias = None
    if not keeps_everything(inputs.plan):
        reach = local_reach(inputs.plan)
        assert reach is not None
        bias = fmha.attn_bias.LocalAttentionFromBottomRightMask(*reach)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=bias, scale=inputs.scale)
    return out, lse[..., : q.shape[1]]  # some of its kernels round the length up


def local_reach(plan: BlockPlan) -> Reach | None:
    """The reach of a plan whose pairs are exactly those of one window over one axis; None for any other plan."""
    tiles, window = plan.tiles, plan.window
    axes = [axis for axis in range(3) if tiles.grid[axis] > 1]
    if (
        window is None
        or window.union
        or window.radius is not None
        or len(axes) != 1
        or plan.prefix
        or plan.suffix
        or plan.pooled
    ):
        return None
    axis = axes[0]
    size, step = tiles.grid[axis], tiles.tile[axis]
    position = torch.arange(size, device=plan.device)
    first, last = window.bounds_of(tiles.grid, axis).unbind(1)
    reach = Reach(int((position - first).max()), int((last - position).max()))
    uniform = torch.equal(first, (position - reach.before).clamp(min=0)) and torch.equal(
        last, (position + reach.after).clamp(max=size - 1)
    )
    others = all(bool((window.bounds_of(tiles.grid, other) == 0).all()) for other in range(3) if other != axis)
    if not uniform or not others or window.dilation[axis] != 1:
        return None

    start = torch.arange(0, size, step, device=plan.device)
    end = (start + step).clamp(max=size) - 1
    touched = (start <= end[:, None] + reach.after) & (end >= start[:, None] - reach.before)
    covered = (start >= end[:, None] - reach.before) & (end <= start[:, None] + reach.after)
    listed, cut = plan.tile_mask(), plan.partial_mask()
    exact = bool((listed == touched).all()) and bool((covered | ~listed | cut).all())
    return reach if exact else None
