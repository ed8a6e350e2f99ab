"""The portable backend: gather the key tiles of each query tile, then plain batched matrix products.

Tokens are first laid out tile by tile, so that a gather copies whole tiles. Query tiles that see equally many key tiles
run together, a few at a time so that their scores stay in the caches. Nothing is kept between calls: lists may differ
per head and from call to call.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import BlockPlan, PooledKeys, TileGrid
from dit_accel.kernels.block_sparse.threads import each_on_one_thread
from dit_accel.kernels.block_sparse.tile_bias import tile_bias
from dit_accel.kernels.block_sparse.tiling import TileLists, equal_lists, key_tiles, query_tiles, tile_lists, untile

# Elements of the keys laid out at a time, in whole heads: the allocator keeps pieces of this size for the next call.
GROUP_ELEMENTS = 1 << 22
# Scores at a time on one thread: few enough for the caches, many enough to be worth a turn of the interpreter.
SCORES = 1 << 19

Rows = tuple[Tensor, Tensor, Tensor]  # numbers of query tiles among all heads' [N], output [N, T, D], LSE [N, T, 1]


def needs(inputs: Inputs) -> str | None:
    return None if inputs.precision == "native" else f"precision='native', got {inputs.precision!r}"


def forward(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Output [B, L, H, D] and, if asked for, LSE [B, H, L] in float32 (float64 for float64 inputs)."""
    inputs = replace(inputs, plan=_tight(inputs.plan))
    batch, length, heads, dim = inputs.q.shape
    out = inputs.q.new_empty(batch, length, heads, dim)
    compute = torch.promote_types(inputs.q.dtype, torch.float32)
    lse = inputs.q.new_empty(batch, length, heads, 1, dtype=compute) if inputs.with_lse else None
    step = max(1, GROUP_ELEMENTS // (length * dim))
    for item, first in itertools.product(range(batch), range(0, heads, step)):
        group = slice(first, first + step)
        part = _part(inputs, slice(item, item + 1), group)
        tiles, tiles_lse = _attend(part)
        untile(part, tiles, out[item, :, group])
        if lse is not None:
            untile(part, tiles_lse, lse[item, :, group])
    return out, None if lse is None else lse[..., 0].transpose(1, 2)


def _tight(plan: BlockPlan) -> BlockPlan:
    """The same plan without what tiles longer than an axis reach beyond it."""
    tiles = plan.tiles
    t, h, w = (min(side, size) for side, size in zip(tiles.tile, tiles.grid, strict=True))
    if plan.pooled or (t, h, w) == tiles.tile:  # a tile of pooled keys is as large as the plan's
        return plan
    tight = TileGrid(tiles.grid, (t, h, w))
    full = plan.window is None and tight.num_tiles * tight.tile_size == tight.num_tokens
    return replace(plan, tiles=tight, partial=torch.zeros_like(plan.partial) if full else plan.partial)


def _part(inputs: Inputs, item: slice, heads: slice) -> Inputs:
    """One batch item and some of its heads."""

    def lists(x: Tensor) -> Tensor:
        x = x if x.shape[0] == 1 else x[item]
        return x if x.shape[1] == 1 else x[:, heads]

    plan, pooled = inputs.plan, inputs.pooled
    if pooled is not None:
        pooled = PooledKeys(pooled.k[item, :, heads], pooled.v[item, :, heads], lists(pooled.log_weights))
    return replace(
        inputs,
        q=inputs.q[item, :, heads],
        k=inputs.k[item, :, heads],
        v=inputs.v[item, :, heads],
        plan=replace(plan, counts=lists(plan.counts), partial=lists(plan.partial), indices=lists(plan.indices)),
        text_lengths=None if inputs.text_lengths is None else inputs.text_lengths[item],
        pooled=pooled,
    )


def _attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and LSE of one batch item's query tiles: [heads, query tiles, T, D] and [heads, query tiles, T, 1]."""
    q = query_tiles(inputs)
    k = key_tiles(inputs, inputs.k, inputs.pooled and inputs.pooled.k)
    v = key_tiles(inputs, inputs.v, inputs.pooled and inputs.pooled.v)
    heads, queries, size, dim = q.shape
    together = max(1, SCORES // size**2)
    bias = tile_bias(inputs)
    merge = inputs.plan.counts.shape[1] == 1 and inputs.pooled is None  # lists that hold for all heads alike

    def attend(lists: TileLists) -> list[Rows]:
        same = lists.queries.shape[1]
        added, most, found = bias.of(lists), max(1, together // (lists.tiles.shape[1] * same)), []
        for start in range(0, lists.heads.shape[1], most):
            some = slice(start, start + most)
            rows = lists.heads[:, some, None] * queries + lists.queries[:, None]
            keys = lists.heads[:, some, None] * k.shape[1] + lists.tiles[:, None]
            gathered = _gather(q, rows), _gather(k, keys), _gather(v, keys)
            part = None if added is None else added[:, some]
            results = _softmax_attention(*gathered, part, inputs.scale)
            found.append((rows.flatten(), *(x.unflatten(1, (same, size)).flatten(0, 1) for x in results)))
        return found

    work = itertools.chain.from_iterable(equal_lists(lists, together, merge=merge) for lists in tile_lists(inputs))
    recorded = any(x is not None and x.requires_grad for x in (q, k, v, bias.log_weights))
    run = each_on_one_thread if q.is_cpu and not recorded else map
    found = itertools.chain.from_iterable(run(attend, work))
    without_keys = q.new_empty(0, dtype=torch.long), q.new_zeros(1, size, dim), q.new_full((1, size, 1), -torch.inf)
    rows, out, lse = (torch.cat(x) for x in zip(*found, without_keys, strict=True))
    source = torch.full((heads * queries,), len(rows), device=q.device)
    source[rows] = torch.arange(len(rows), device=q.device)
    out, lse = (x.index_select(0, source).unflatten(0, (heads, queries)) for x in (out, lse))
    return out, lse


def _gather(x: Tensor, tiles: Tensor) -> Tensor:
    """Tiles of x, [heads, tiles, T, D], numbered over all heads, [lists, heads, ...], to [lists * heads, tokens, D]."""
    picked = x.flatten(0, 1).flatten(1).index_select(0, tiles.flatten())
    return picked.reshape(tiles.shape[0] * tiles.shape[1], -1, x.shape[-1])


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [N, T, D] over k, v [N, keys, D]: output [N, T, D], LSE [N, T, 1].

    ``bias``, [lists, heads, T or 1, first keys] with N = lists * heads, is added to the scores of the first keys.
    """
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
    if bias is not None:
        scores.unflatten(0, bias.shape[:2])[..., : bias.shape[-1]] += bias
    top = scores.detach().amax(-1, keepdim=True)
    empty = top == -torch.inf if bias is not None else None
    if empty is not None and bool(empty.any()):
        scores = scores.masked_fill(empty, 0.0)
    weights = scores.softmax(-1)
    out = torch.bmm(weights, v)
    # The largest weight is exp(top - LSE). Between equal scores the gradient of that is not the LSE's.
    lse = scores.logsumexp(-1, True) if scores.requires_grad else top - weights.amax(-1, True).log()
    return (out, lse) if empty is None else (out.masked_fill(empty, 0.0), lse.masked_fill(empty, -torch.inf))
