"""The oracle: eager attention under the plan's full mask. Clear, slow, float64-able; for tests and small grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import BlockPlan, PooledKeys


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
        keys = torch.arange(grid, device=plan.device)
        coordinates = plan.tiles.coordinates(position), plan.tiles.coordinates(keys)
        kept &= plan.window.kept(plan.tiles.grid, *coordinates) | ~cut
    mask = kept.new_ones(*kept.shape[:3], length)
    mask[..., plan.prefix : plan.prefix + grid] = kept | ~visual[:, None]
    return mask


def reference_attention(inputs: Inputs, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, queries, H, D] and LSE [B, H, queries]; in float64 for float64 inputs, in float32 otherwise."""
    q, k, v = inputs.q, inputs.k, inputs.v
    compute = torch.promote_types(q.dtype, torch.float32)
    mask = visible(inputs, queries)
    q = q if queries is None else q[:, queries]
    bias = None
    if inputs.pooled is not None:
        seen, bias = visible_pooled(inputs, inputs.pooled, queries)
        lead = torch.broadcast_shapes(mask.shape[:2], seen.shape[:2])
        mask = torch.cat([part.expand(*lead, -1, -1) for part in (mask, seen)], -1)
        k, v = torch.cat([k, inputs.pooled.k], 1), torch.cat([v, inputs.pooled.v], 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(compute), k.to(compute)) * inputs.scale
    if bias is not None:
        scores = scores + F.pad(bias.to(compute), (inputs.plan.num_tokens, 0))
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)  # an empty row is zeros, not NaN
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.to(compute))
    return out.to(q.dtype), lse


def visible(inputs: Inputs, queries: Tensor | None = None) -> Tensor:
    """``token_mask`` with the text's padding hidden: bool [B or 1, H or 1, queries, L]."""
    mask = token_mask(inputs.plan, queries)
    if inputs.text_lengths is None:
        return mask
    position = torch.arange(inputs.plan.num_tokens, device=mask.device)
    start = inputs.text_start
    padding = (position >= start + inputs.text_lengths[:, None]) & (position < start + inputs.text)
    return mask & ~padding[:, None, None, :]


def visible_pooled(inputs: Inputs, pooled: PooledKeys, queries: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which pooled keys each query sees, and what is added to their scores: [B or 1, H or 1, queries, P]."""
    plan = inputs.plan
    queries = torch.arange(plan.num_tokens, device=plan.device) if queries is None else queries
    position = queries - plan.prefix
    visual = (position >= 0) & (position < plan.tiles.num_tokens)
    tile = plan.tiles.token_tile().to(plan.device)[position.clamp(0, plan.tiles.num_tokens - 1)]
    listed = plan.tile_mask()[..., plan.tiles.num_tiles :].repeat_interleave(plan.tiles.tile_size, -1)
    weights = pooled.log_weights.expand(-1, -1, plan.tiles.num_tiles, -1)[..., tile, :]
    seen = listed[..., tile, : plan.pooled] & visual[:, None] & (weights > -torch.inf)
    return seen, torch.where(seen, weights, 0.0)


def needs(inputs: Inputs) -> str | None:
    return None if inputs.precision == "native" else f"precision='native', got {inputs.precision!r}"


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return reference_attention(inputs)
