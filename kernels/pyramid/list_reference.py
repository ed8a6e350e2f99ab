"""The oracle: eager attention with the number of times that the lists name each key. Clear, slow, float64-able."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.pyramid.lists import BlockLists, ListInputs


def named(inputs: ListInputs, lists: BlockLists) -> Tensor:
    """How often a pass names each key, pooled ones last: int32 [B or 1, H or 1, N, N + P] by the curve."""
    blocks = inputs.key_blocks + inputs.pooled_keys // lists.block
    seen = lists.visible()
    entries = lists.listed(0).long()[..., None].expand(seen.shape)
    times = seen.new_zeros(*seen.shape[:3], blocks, lists.block, dtype=torch.int32).scatter_add_(3, entries, seen.int())
    times = times.repeat_interleave(lists.rows, 2)[:, :, : inputs.tokens].flatten(3)
    padding = inputs.key_blocks * lists.block
    return torch.cat([times[..., : inputs.tokens], times[..., padding:]], -1)


def forward(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, N]; computed in float64 for float64 inputs, in float32 otherwise."""
    order = inputs.order.long()
    compute = torch.promote_types(inputs.q.dtype, torch.float32)
    q, k, v = (x[:, order].to(compute) for x in (inputs.q, inputs.k, inputs.v))
    times = torch.stack(torch.broadcast_tensors(*(named(inputs, x) for x in inputs.lists))).sum(0)
    bias = times.to(compute).log()
    if inputs.pooled is not None:
        k, v = torch.cat([k, inputs.pooled.k.to(compute)], 1), torch.cat([v, inputs.pooled.v.to(compute)], 1)
        bias = bias + F.pad(inputs.pooled.log_weights.to(compute), (inputs.tokens, 0))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * inputs.scale + bias
    scores = scores.masked_fill(bias == -torch.inf, -torch.inf)  # also where a hidden key is not finite
    lse = scores.logsumexp(-1)
    weights = torch.where(bias == -torch.inf, 0.0, (scores - lse[..., None]).exp())  # an empty row is zeros, not NaN
    rows = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    out = torch.zeros_like(inputs.q, dtype=compute).index_copy(1, order, rows)
    return out.to(inputs.q.dtype), lse


def needs(inputs: ListInputs) -> str | None:
    return None
