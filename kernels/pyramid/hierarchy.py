"""Which blocks of a curve each block attends to, chosen from coarse means to fine ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.selection.backend import runs_triton
from dit_accel.kernels.selection.choose import row_top_k
from dit_accel.kernels.selection.lists import lists_from_mask

_CANDIDATES = 1024  # of one row that a program of the Triton kernel holds
_ELEMENTS = 1 << 27  # of scores or gathered means at a time, elsewhere


def hierarchical_top_k(
    query_levels: Sequence[Tensor], key_levels: Sequence[Tensor], top_k: int, block: int
) -> list[Tensor]:
    """The ``top_k`` best blocks of each block, on every level.

    On the top level every block is a candidate. Below it, the candidates of a block are the children of the blocks that
    its parent chose, ``block`` of them each. Higher scores q · k come first, then lower indices; NaN counts as -inf.

    Args:
        query_levels, key_levels: means of level 1, 2 and so on, [B, n_l, H, D], any strides; a mean is the parent of
            ``block`` means of the level below, the last one of what is left.
        top_k: blocks that each block keeps, all of them on a level that has no more.
        block: children of a block.

    Returns:
        For each level int32 [B, H, n_l, min(top_k, n_l)], ascending within a row. Nothing is read back to the host.
    """
    chosen: list[Tensor] = []
    parents = None
    for queries, keys in zip(reversed(query_levels), reversed(key_levels), strict=True):
        parents = _choose(queries, keys, parents, min(top_k, keys.shape[1]), block)
        chosen.insert(0, parents)
    return chosen


def _choose(queries: Tensor, keys: Tensor, parents: Tensor | None, kept: int, block: int) -> Tensor:
    """The best blocks of one level, among the children of ``parents`` or among all where there are none."""
    batch, blocks, heads, dim = keys.shape
    if parents is not None and parents.shape[-1] == parents.shape[2]:
        parents = None  # everybody's children
    candidates = blocks if parents is None else parents.shape[-1] * block
    if runs_triton(queries) and candidates <= _CANDIDATES and queries.dtype != torch.float64:
        from dit_accel.kernels.pyramid.triton_hierarchy import triton_choose

        return triton_choose(queries, keys, parents, kept, block)
    compute = torch.promote_types(queries.dtype, torch.float32)
    q, k = (x.transpose(1, 2).to(compute) for x in (queries, keys))
    if parents is None:
        rows = max(1, _ELEMENTS // (batch * heads * blocks))
        return torch.cat([_best(part @ k.mT, kept) for part in q.split(rows, 2)], 2)
    siblings = F.pad(q, (0, 0, 0, -blocks % block)).unflatten(2, (-1, block))
    families = max(1, _ELEMENTS // (batch * heads * candidates * max(block, dim)))
    parts = zip(siblings.split(families, 2), parents.split(families, 2), strict=True)
    return torch.cat([_among_children(*part, k, kept) for part in parts], 2)[:, :, :blocks].contiguous()


def _among_children(siblings: Tensor, parents: Tensor, keys: Tensor, kept: int) -> Tensor:
    """The best of siblings [B, H, F, block, D] among the children of parents [B, H, F, G]: [B, H, F * block, kept]."""
    block = siblings.shape[3]
    children = parents[..., None] * block + torch.arange(block, device=keys.device, dtype=torch.int32)
    children = children.flatten(-2)
    known = children.clamp(max=keys.shape[2] - 1).long()
    candidates = keys[:, :, None].expand(-1, -1, known.shape[2], -1, -1).take_along_dim(known[..., None], 3)
    scores = (siblings @ candidates.mT).masked_fill((children >= keys.shape[2])[..., None, :], -torch.inf)
    slots = _best(scores.flatten(2, 3), kept).unflatten(2, (-1, block))
    return children[..., None, :].expand(-1, -1, -1, block, -1).gather(-1, slots.long()).flatten(2, 3)


def _best(scores: Tensor, kept: int) -> Tensor:
    """Indices of the highest of each row, ascending: int32 [..., kept]."""
    keep = row_top_k(scores, kept)
    return lists_from_mask(keep, torch.zeros_like(keep[:1, :1, :1]), kept)[2]
