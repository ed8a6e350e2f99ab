"""A plan in the words of kernels that know nothing but equal blocks of consecutive tokens.

Tokens are packed tile by tile, each tile padded to a whole block, and the text in blocks of its own behind them.
Where tiles are runs of the sequence already, nothing moves.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import BlockPlan


@dataclass(frozen=True, eq=False)
class Lists:
    """Blocks seen by each block of queries, ascending: counts int32 [B or 1, H or 1, N], indices int32 [.., N, M]."""

    counts: Tensor
    indices: Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """The packed sequence and its lists; N blocks, P packed tokens.

    Args:
        order: position in the sequence of each packed token, int64 [P], 0 for padding; None where nothing moves.
        place: packed position of each token of the sequence, int64 [L]; None where nothing moves.
        valid: which packed tokens are tokens, bool [P].
        text: which packed tokens are text, bool [P].
        coordinates: (frame, row, column) of packed tokens, int32 [3, P]; 0 for text and padding.
        bounds: first and last coordinate per axis that the window admits for each packed query, int32 [6, P]; None
            without a window.
        masked: blocks with a pair that is not kept, whose mask is ``kept``.
        whole: blocks that are kept whole.
    """

    order: Tensor | None
    place: Tensor | None
    valid: Tensor
    text: Tensor
    coordinates: Tensor
    bounds: Tensor | None
    masked: Lists
    whole: Lists

    @property
    def padded(self) -> bool:
        return self.place is not None and len(self.place) < len(self.valid)

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, H, D] to [B, P, H, D]."""
        return x if self.order is None else x.index_select(1, self.order)

    def unpack(self, x: Tensor, dim: int) -> Tensor:
        """Packed tokens along ``dim`` back to the sequence's own order."""
        return x if self.place is None else x.index_select(dim, self.place)

    def keys(self, inputs: Inputs) -> Tensor:
        """Which packed tokens are keys of each batch item, the text's padding hidden: bool [B, P]."""
        batch = inputs.q.shape[0]
        if inputs.text_lengths is None:
            return self.valid.expand(batch, -1)
        within = self.text.cumsum(0) - 1  # position in the text
        padding = self.text & (within >= inputs.text_lengths.to(within.device)[:, None])
        return self.valid & ~padding


_BLOCKS: weakref.WeakKeyDictionary[BlockPlan, Blocks] = weakref.WeakKeyDictionary()
_DENSE: weakref.WeakKeyDictionary[BlockPlan, bool] = weakref.WeakKeyDictionary()


def blocks_of(plan: BlockPlan) -> Blocks:
    """The plan's blocks, made once and kept as long as the plan lives."""
    if plan not in _BLOCKS:
        _BLOCKS[plan] = _build(plan)
    return _BLOCKS[plan]


def keeps_everything(plan: BlockPlan) -> bool:
    """Whether every query sees every key; read back from the plan's lists once."""
    if plan not in _DENSE:
        _DENSE[plan] = plan.window is None and not plan.pooled and bool((plan.counts == plan.tiles.num_tiles).all())
    return _DENSE[plan]


def _build(plan: BlockPlan) -> Blocks:
    tiles, device, text = plan.tiles, plan.device, plan.prefix + plan.suffix
    block, grid = tiles.tile_size, tiles.num_tokens
    text_blocks = -(-text // block)
    masked, whole = _lists(plan, text_blocks)
    moves = tiles.grid[:2] != (1, 1) or plan.prefix > 0 or (text > 0 and grid % block > 0)
    length = (tiles.num_tiles + text_blocks) * block if moves else grid + text

    tile = tiles.token_tile()
    by_tile = tile.argsort(stable=True)
    starts = tiles.tile_tokens().cumsum(0) - tiles.tile_tokens()
    place = torch.empty(plan.num_tokens, dtype=torch.long)
    place[plan.prefix + by_tile] = tile[by_tile] * block + torch.arange(grid) - starts[tile[by_tile]]
    text_start = 0 if plan.prefix else grid
    place[text_start : text_start + text] = tiles.num_tiles * block + torch.arange(text)

    valid = torch.zeros(length, dtype=torch.bool)
    valid[place] = True
    is_text = valid & (torch.arange(length) >= tiles.num_tiles * block)
    order = torch.zeros(length, dtype=torch.long)
    order[place] = torch.arange(plan.num_tokens)
    coordinates = torch.stack(tiles.coordinates(torch.where(valid & ~is_text, order - plan.prefix, 0))).to(device)
    bounds = None
    if plan.window is not None:
        rows = [plan.window.bounds_of(tiles.grid, axis)[coordinates[axis]].T for axis in range(3)]
        bounds = torch.cat(rows).int().contiguous()
    return Blocks(
        order=order.to(device) if moves else None,
        place=place.to(device) if moves else None,
        valid=valid.to(device),
        text=is_text.to(device),
        coordinates=coordinates.int(),
        bounds=bounds,
        masked=masked,
        whole=whole,
    )


def _lists(plan: BlockPlan, text_blocks: int) -> tuple[Lists, Lists]:
    """The plan's lists with the text's blocks, whose keys may be padding, at the end of every masked list."""
    device, count, slots = plan.device, plan.tiles.num_tiles, plan.indices.shape[-1]
    sizes = plan.tiles.tile_tokens().to(device)
    ragged = (sizes < plan.tiles.tile_size).nonzero()[:, 0].int()
    full = (sizes == plan.tiles.tile_size).nonzero()[:, 0].int()
    text = torch.arange(count, count + text_blocks, device=device, dtype=torch.int32)
    whole_counts = plan.counts - plan.partial
    width = max(int(plan.partial.max()), len(ragged) if text_blocks else 0)
    whole_width = max(int(whole_counts.max()), len(full) if text_blocks else 0, 1)

    shape = (*plan.counts.shape[:2], count + text_blocks)
    masked = torch.zeros(*shape, max(width + text_blocks, 1), device=device, dtype=torch.int32)
    masked[..., :count, : min(width, slots)] = plan.indices[..., :width]
    listed = (plan.partial[..., None] + torch.arange(text_blocks, device=device)).long()
    masked[..., :count, :].scatter_(-1, listed, text.expand(listed.shape))
    whole = torch.zeros(*shape, whole_width, device=device, dtype=torch.int32)
    picked = (plan.partial[..., None] + torch.arange(whole_width, device=device)).clamp(max=slots - 1)
    whole[..., :count, :] = plan.indices.gather(-1, picked.long())
    if text_blocks:
        masked[..., count:, : len(ragged) + text_blocks] = torch.cat([ragged, text])
        whole[..., count:, : len(full)] = full

    def with_text(counts: Tensor, of_text: int) -> Tensor:
        rows = counts.new_full((*shape[:2], text_blocks), of_text)
        return torch.cat([counts, rows], dim=-1).int().contiguous()

    return (
        Lists(with_text(plan.partial + text_blocks, len(ragged) + text_blocks), masked),
        Lists(with_text(whole_counts, len(full)), whole),
    )
