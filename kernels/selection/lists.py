"""From a mask over tiles to the lists of a BlockPlan."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.selection.backend import runs_triton

Lists = tuple[Tensor, Tensor, Tensor]


def lists_from_mask(keep: Tensor, partial: Tensor, width: int | None = None, pooled_tiles: int = 0) -> Lists:
    """The kept key tiles of each query tile, as BlockPlan wants them. Nothing is read back to the host.

    Args:
        keep: bool [B or 1, H or 1, Q, K], which key tiles each query tile sees.
        partial: bool, broadcast to ``keep``: which of them need a mask inside the tile; one row [K] says it of key
            tiles that stick out of the grid.
        width: entries per list, default K. A query tile that keeps more loses the last ones of its list, unnoticed:
            pass a smaller width only where the choice bounds what a row keeps, as ``row_top_k`` does.
        pooled_tiles: how many of the key tiles, the last ones, are pooled; they are partial and stand first.

    Returns:
        counts: int32 [B or 1, H or 1, Q].
        partial: int32 [B or 1, H or 1, Q].
        indices: int32 [B or 1, H or 1, Q, width], partial tiles first, each part ascending, 0 beyond the counts.
    """
    width = keep.shape[-1] if width is None else width
    if runs_triton(keep):
        from dit_accel.kernels.selection.triton_lists import triton_lists

        return triton_lists(keep.contiguous(), partial.expand_as(keep), width, pooled_tiles)
    # Columns in list order within each part: pooled tiles, then those of the grid.
    tile = torch.arange(keep.shape[-1], device=keep.device, dtype=torch.int32).roll(pooled_tiles)
    keep = keep.roll(pooled_tiles, -1)
    cut = keep & (partial.expand_as(keep).roll(pooled_tiles, -1) | (tile >= keep.shape[-1] - pooled_tiles))
    counts, partial_counts = keep.sum(-1), cut.sum(-1)
    cuts_so_far = cut.cumsum(-1)
    slot = torch.where(cut, cuts_so_far, keep.cumsum(-1) - cuts_so_far + partial_counts[..., None]) - 1
    slot = torch.where(keep, slot, width).clamp(max=width)  # what is not listed goes into one more entry
    indices = torch.zeros(*keep.shape[:-1], width + 1, dtype=torch.int32, device=keep.device)
    indices = indices.scatter_(-1, slot, tile.expand_as(slot))[..., :width].contiguous()
    return counts.clamp(max=width).int(), partial_counts.clamp(max=width).int(), indices
