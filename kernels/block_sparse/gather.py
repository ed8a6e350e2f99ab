"""The portable backend: gather the keys of each query tile, then run torch's own attention on the short rows.

Query tiles that see the same key tiles form one *bundle* and share one gather; bundles of equal shape run as one
batched call. The index tables depend on the plan alone and are kept as long as the plan lives.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan

# Gathered keys per call, in elements: small enough to stay near the caches, large enough to batch.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Bundles:
    """Bundles of one shape, as positions on the grid (text left out).

    Args:
        queries: int64 [bundles, queries].
        keys: int64 [bundles, keys].
        mask: bool [bundles, queries, keys] where a window cuts tiles, else None.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


_TABLES: weakref.WeakKeyDictionary[BlockPlan, list[Bundles]] = weakref.WeakKeyDictionary()


def gather_attention(
    q: Tensor,  # [B, L, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    plan: BlockPlan,
    scale: float,
    text_lengths: Tensor | None,  # int32 [B]
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, L, H, D] and, if asked for, LSE [B, H, L] in float32 (float64 for float64 inputs)."""
    batch, length, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_lse:
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full((batch, heads, length), -torch.inf, dtype=lse_dtype, device=q.device)
    for items, head, part, text in _shares(plan, batch, text_lengths):
        query, key, value, result = (x[items, :, head] for x in (q, k, v, out))
        _attend_shared(query, key, value, result, None if lse is None else lse[items, head], part, scale, text)
    return out, lse


def _shares(plan: BlockPlan, batch: int, text_lengths: Tensor | None) -> Iterator[tuple[slice, slice, BlockPlan, int]]:
    """Batch items and heads that share one list and one text length: (items, heads, plan, valid text tokens)."""
    plans, per_head, _ = plan.counts.shape
    text = plan.prefix + plan.suffix
    lengths = [text] * batch if text_lengths is None else text_lengths.tolist()
    together = plans == 1 and len(set(lengths)) == 1
    for item in range(1 if together else batch):
        items = slice(None) if together else slice(item, item + 1)
        for head in range(per_head):
            heads = slice(None) if per_head == 1 else slice(head, head + 1)
            part = plan
            if plans > 1 or per_head > 1:
                pick = (slice(item, item + 1) if plans > 1 else slice(None), slice(head, head + 1))
                part = replace(plan, counts=plan.counts[pick], partial=plan.partial[pick], indices=plan.indices[pick])
            yield items, heads, part, lengths[item]


def _attend_shared(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, plan: BlockPlan, scale: float, text: int
) -> None:
    """One list for all items and heads at hand; ``text`` valid text tokens are keys of every query."""
    span = plan.prefix + plan.suffix
    first_text = 0 if plan.prefix else plan.tiles.num_tokens
    text_tokens = torch.arange(first_text, first_text + span, device=q.device)
    if span:
        visual = torch.arange(plan.prefix, plan.prefix + plan.tiles.num_tokens, device=q.device)
        keys = torch.cat([visual, text_tokens[:text]])
        _attend_rows(q, k, v, out, lse, text_tokens[None], keys[None], None, scale)
    for bundles in _tables(plan):
        keys = torch.cat([bundles.keys + plan.prefix, text_tokens[:text].expand(len(bundles.keys), -1)], 1)
        mask = None if bundles.mask is None else F.pad(bundles.mask, (0, text), value=True)
        if keys.shape[1]:
            _attend_rows(q, k, v, out, lse, bundles.queries + plan.prefix, keys, mask, scale)


def _attend_rows(
    q: Tensor,  # [B, L, H, D]
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,  # [B, H, L]
    queries: Tensor,  # [U, M]
    keys: Tensor,  # [U, K]
    mask: Tensor | None,  # [U, M, K]
    scale: float,
) -> None:
    """Attention of U groups of M queries over K keys each, written into ``out`` and ``lse``."""
    batch, _, heads, dim = q.shape
    step = max(1, CHUNK_ELEMENTS // (batch * heads * dim * keys.shape[1]))
    for start in range(0, len(queries), step):
        rows, columns = queries[start : start + step], keys[start : start + step]
        part = None if mask is None else mask[start : start + step].repeat(batch, 1, 1)[:, None]
        gq, gk, gv = (
            x[:, index.reshape(-1)].reshape(batch * len(rows), -1, heads, dim).transpose(1, 2)
            for x, index in ((q, rows), (k, columns), (v, columns))
        )
        if lse is None:
            got = F.scaled_dot_product_attention(gq, gk, gv, attn_mask=part, scale=scale)
        else:
            got, got_lse = _attention_with_lse(gq, gk, gv, part, scale, lse.dtype)
            got_lse = got_lse.reshape(batch, len(rows), heads, -1).transpose(1, 2)
            lse[:, :, rows.reshape(-1)] = got_lse.reshape(batch, heads, -1)
        if part is not None:  # a row whose every key is cut has no keys: zeros, not NaN
            got = torch.where(part.any(-1, keepdim=True), got, 0.0)
        out[:, rows.reshape(-1)] = got.transpose(1, 2).reshape(batch, -1, heads, dim)


def _attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax attention that also gives its LSE, which torch's fused call does not."""
    scores = (q.to(dtype) @ k.to(dtype).mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.to(dtype)).to(q.dtype), scores.logsumexp(-1)


def _tables(plan: BlockPlan) -> list[Bundles]:
    if plan not in _TABLES:
        _TABLES[plan] = [
            Bundles(queries.to(plan.device), keys.to(plan.device), None if mask is None else mask.to(plan.device))
            for queries, keys, mask in _build_tables(plan.to("cpu"))
        ]
    return _TABLES[plan]


def _build_tables(plan: BlockPlan) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Tables of a plan with one shared list, on the CPU: (queries, keys, mask) for each bundle shape."""
    tile_tokens = plan.tiles.token_tile().argsort(stable=True).split(plan.tiles.tile_tokens().tolist())
    lists: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    counts, partial, indices = (x[0, 0].tolist() for x in (plan.counts, plan.partial, plan.indices))
    for tile, (count, cut, row) in enumerate(zip(counts, partial, indices, strict=True)):
        lists[cut, tuple(row[:count])].append(tile)

    shapes: dict[tuple[int, int, bool], list[tuple[Tensor, Tensor, Tensor | None]]] = defaultdict(list)
    for (cut, row), members in lists.items():
        queries = torch.cat([tile_tokens[tile] for tile in members])
        keys = torch.cat([tile_tokens[tile] for tile in row]) if row else torch.empty(0, dtype=torch.long)
        mask = None
        if plan.window is not None and cut:
            mask = _window_mask(plan, plan.window, queries, keys)
            mask[:, sum(len(tile_tokens[tile]) for tile in row[:cut]) :] = True
        shapes[len(queries), len(keys), mask is not None].append((queries, keys, mask))
    for bundles in shapes.values():
        queries, keys = (torch.stack([bundle[part] for bundle in bundles]) for part in (0, 1))  # type: ignore[misc]
        masks = [mask for _, _, mask in bundles if mask is not None]
        yield queries, keys, torch.stack(masks) if masks else None


def _window_mask(plan: BlockPlan, window: AxisWindows, queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys each query admits, bool [queries, keys]."""
    coordinates = zip(plan.tiles.coordinates(queries), plan.tiles.coordinates(keys), strict=True)
    return window.joined([window.admitted(plan.tiles.grid, axis, q, k) for axis, (q, k) in enumerate(coordinates)])
