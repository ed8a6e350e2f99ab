"""Tile lists the other way round: which query tiles see each key tile, what a backward over keys walks."""

from __future__ import annotations

import torch
from torch import Tensor


def transpose_lists(counts: Tensor, partial: Tensor, indices: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each key tile the query tiles that list it, one list after the other.

    Nothing is read back to the host, shapes depend on the arguments' shapes alone, and the result repeats bit for bit.

    Args:
        counts: int32 [B or 1, H or 1, Q], key tiles seen by each query tile.
        partial: int32 [B or 1, H or 1, Q], how many of them, first in the list, need a mask inside the tile.
        indices: int32 [B or 1, H or 1, Q, M], the key tiles; entries from ``counts`` on are not read.
        num_keys: key tiles that an entry may name, pooled ones included.

    Returns:
        starts: int32 [B or 1, H or 1, num_keys + 1]; the list of key tile j is ``queries[starts[j] : starts[j + 1]]``.
        partial_counts: int32 [B or 1, H or 1, num_keys], how many query tiles, first in the list, need a mask inside.
        queries: int32 [B or 1, H or 1, Q * M], query tiles, partial ones first, each part ascending; entries from
            ``starts[num_keys]`` on are unspecified but in range.
    """
    kept = indices.shape[-1]
    slots = torch.arange(kept, device=indices.device, dtype=torch.int32)
    bucket = 2 * indices + (slots >= partial[..., None])  # key tile, then partial before whole
    bucket = torch.where(slots < counts[..., None], bucket, 2 * num_keys).flatten(2)
    # Entries stand in query order, which a stable sort keeps within a bucket.
    bucket, order = bucket.sort(dim=-1, stable=True)
    edges = torch.arange(2 * num_keys + 1, device=indices.device, dtype=torch.int32)
    first = torch.searchsorted(bucket, edges.expand(*bucket.shape[:-1], -1).contiguous(), out_int32=True)
    starts = first[..., ::2].contiguous()
    return starts, first[..., 1::2] - starts[..., :-1], (order // kept).int()
