"""The portable backend: gather the key blocks of a few query blocks at a time, then plain batched matrix products.

Tokens are first laid out along the curve, head after head, so that a gather copies whole blocks. Nothing is kept
between calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.pyramid.lists import BlockLists, ListInputs

GATHERED = 1 << 19  # elements of keys, or of scores, at a time: few enough for the caches


class _Blocks(NamedTuple):
    """Key blocks of all heads, one head's after the other's: the sequence's own, pooled ones, and a block without keys.

    What is not listed is read from that block of zeros, because rows that no list names may hold anything.
    """

    k: Tensor  # [B * H * blocks, block * D]
    v: Tensor  # [B * H * blocks, block * D]
    bias: Tensor  # [B * H * blocks, block], added to the scores: log weights, and -inf beyond the curve's end


def needs(inputs: ListInputs) -> str | None:
    return None


def forward(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, N], this one and all work in at least float32."""
    batch, _, heads, _ = inputs.q.shape
    order = inputs.order.long()
    q, k, v = (_rows(inputs, x[:, order]) for x in (inputs.q, inputs.k, inputs.v))
    blocks = _key_blocks(inputs, k, v)
    out, lse = _merged([_pass(inputs, lists, q, blocks) for lists in inputs.lists])
    out = out.unflatten(0, (batch, heads)).transpose(1, 2).to(inputs.q.dtype)
    return torch.zeros_like(inputs.q).index_copy(1, order, out), lse.unflatten(0, (batch, heads))


def _rows(inputs: ListInputs, x: Tensor) -> Tensor:
    """[B, tokens, H, D] as [B * H, tokens, D] in the dtype of the work."""
    return x.to(torch.promote_types(inputs.q.dtype, torch.float32)).transpose(1, 2).flatten(0, 1)


def _key_blocks(inputs: ListInputs, k: Tensor, v: Tensor) -> _Blocks:
    batch, _, heads, _ = inputs.q.shape
    padding = inputs.key_blocks * inputs.block - inputs.tokens
    k, v = (F.pad(x, (0, 0, 0, padding)) for x in (k, v))
    bias = F.pad(k.new_zeros(batch * heads, inputs.tokens), (0, padding), value=-torch.inf)
    if inputs.pooled is not None:
        k = torch.cat([k, _rows(inputs, inputs.pooled.k)], 1)
        v = torch.cat([v, _rows(inputs, inputs.pooled.v)], 1)
        weights = inputs.pooled.log_weights[:, :, 0].to(k.dtype).expand(batch, heads, -1)
        bias = torch.cat([bias, weights.flatten(0, 1)], 1)
    k, v = (F.pad(x, (0, 0, 0, inputs.block)).unflatten(1, (-1, inputs.block)).flatten(0, 1) for x in (k, v))
    bias = F.pad(bias, (0, inputs.block), value=-torch.inf)
    return _Blocks(k.flatten(1), v.flatten(1), bias.reshape(-1, inputs.block))


def _pass(inputs: ListInputs, lists: BlockLists, q: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Attention over the keys of one pass: output [B * H, N, D] and LSE [B * H, N]."""
    batch, _, heads, dim = inputs.q.shape
    num_queries = lists.counts.shape[2]
    q = F.pad(q, (0, 0, 0, num_queries * lists.rows - inputs.tokens)).reshape(-1, lists.rows, dim)
    kept = int(lists.counts.max())
    blocks_each = len(blocks.k) // (batch * heads)
    entries, seen = (
        x[:, :, :, :kept].expand(batch, heads, num_queries, kept, *x.shape[4:]).flatten(0, 2)
        for x in (lists.listed(blocks_each - 1), lists.visible())
    )
    head = torch.arange(batch * heads, device=q.device).repeat_interleave(num_queries)
    entries = entries + head[:, None] * blocks_each
    step = max(1, GATHERED // (max(1, kept) * lists.block * max(dim, lists.rows)))
    parts = []
    for rows, picked, mask in zip(q.split(step), entries.split(step), seen.split(step), strict=True):
        k, v, bias = (x.index_select(0, picked.flatten()) for x in blocks)
        k, v = (x.reshape(len(rows), kept * lists.block, dim) for x in (k, v))
        bias = bias.reshape(len(rows), 1, kept * lists.block).masked_fill(~mask.flatten(1)[:, None], -torch.inf)
        parts.append(_softmax_attention(rows, k, v, bias, inputs.scale))
    out, lse = (torch.cat(x).unflatten(0, (-1, num_queries)).flatten(1, 2) for x in zip(*parts, strict=True))
    return out[:, : inputs.tokens], lse[:, : inputs.tokens, 0]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [N, T, D] over k, v [N, keys, D] with ``bias`` [N, 1, keys]: output [N, T, D], LSE [N, T, 1]."""
    scores = torch.baddbmm(bias, q, k.mT, alpha=scale)
    empty = (bias == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0) if bool(empty.any()) else scores
    out = torch.bmm(scores.softmax(-1), v)
    return out.masked_fill(empty, 0.0), scores.logsumexp(-1, True).masked_fill(empty, -torch.inf)


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all parts, from each part's output [..., D] and LSE [...]."""
    lse = torch.stack([part_lse for _, part_lse in parts])
    top = lse.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    shares = (lse - top).exp()
    total = shares.sum(0)
    out = (shares[..., None] * torch.stack([part for part, _ in parts])).sum(0)
    some = total > 0
    safe = torch.where(some, total, 1.0)
    return out / safe[..., None], torch.where(some, top + safe.log(), -torch.inf)
