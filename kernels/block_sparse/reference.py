"""The oracle: eager attention under the plan's full mask. Clear, slow, float64-able; for tests and small grids."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import BlockPlan


def token_mask(plan: BlockPlan, queries: Tensor | None = None) -> Tensor:
    """Which keys each query sees, bool [B or 1, H or 1, queries, L], text rows and columns included.

    Args:
        plan: tiles, lists and text span.
        queries: positions of the queries wanted, int64; default all of them.
    """
    length, grid = plan.num_tokens, plan.tiles.num_tokens
    queries = torch.arange(length, device=plan.device) if queries is None else queries.to(plan.device)
    position = queries - plan.prefix
    visual = (position >= 0) & (position < grid)
    position = position.clamp(0, grid - 1)
    tile = plan.tiles.token_tile().to(plan.device)
    kept = plan.tile_mask()[..., tile[position], :][..., tile]
    if plan.window is not None:
        cut = plan.partial_mask()[..., tile[position], :][..., tile]
        kept &= _window(plan, position) | ~cut
    mask = kept.new_ones(*kept.shape[:3], length)
    mask[..., plan.prefix : plan.prefix + grid] = kept | ~visual[:, None]
    return mask


def reference_attention(
    q: Tensor,  # [B, L, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    plan: BlockPlan,
    scale: float,
    text_lengths: Tensor | None = None,  # int32 [B]
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, queries, H, D] and LSE [B, H, queries]; in float64 for float64 inputs, in float32 otherwise."""
    compute = torch.promote_types(q.dtype, torch.float32)
    mask = visible(plan, queries, text_lengths).to(q.device)
    q = q if queries is None else q[:, queries]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(compute), k.to(compute)) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)  # an empty row is zeros, not NaN
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.to(compute))
    return out.to(q.dtype), lse


def visible(plan: BlockPlan, queries: Tensor | None, text_lengths: Tensor | None) -> Tensor:
    """``token_mask`` with the text's padding hidden: bool [B or 1, H or 1, queries, L]."""
    mask = token_mask(plan, queries)
    if text_lengths is None:
        return mask
    position = torch.arange(plan.num_tokens, device=mask.device)
    start = 0 if plan.prefix else plan.tiles.num_tokens
    valid = text_lengths.to(mask.device)[:, None]
    padding = (position >= start + valid) & (position < start + plan.prefix + plan.suffix)
    return mask & ~padding[:, None, None, :]


def _window(plan: BlockPlan, queries: Tensor) -> Tensor:
    """The window's rule for grid positions ``queries``, bool [queries, grid tokens]."""
    assert plan.window is not None
    grid = plan.tiles.grid
    axes = []
    for axis, coordinate in enumerate(plan.tiles.coordinates(queries)):
        shape = [len(queries), 1, 1, 1]
        shape[1 + axis] = grid[axis]
        keys = torch.arange(grid[axis], device=queries.device)
        axes.append(plan.window.admitted(grid, axis, coordinate, keys).reshape(shape))
    return plan.window.joined(axes).expand(-1, *grid).flatten(1)
