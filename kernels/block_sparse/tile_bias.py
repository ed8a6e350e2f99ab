"""What is added to the scores inside tiles: -inf where there is no key or a window cuts, log-weights of pooled keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import AxisWindows, TileGrid
from dit_accel.kernels.block_sparse.tiling import TileLists, boxes, key_tiles


@dataclass(frozen=True)
class TileBias:
    """The parts of the bias of one batch item.

    Args:
        cut: the grid cut into tiles.
        hidden: [key tiles, T], -inf for what only fills up a tile, else 0.
        positions: int32 [grid tiles, T], where on the grid a token lies; 0 beyond the grid.
        window: the rule inside tiles.
        log_weights: [heads, grid tiles, pooled tiles, T] of pooled keys.
    """

    cut: TileGrid
    hidden: Tensor
    positions: Tensor
    window: AxisWindows | None
    log_weights: Tensor | None

    def of(self, lists: TileLists) -> Tensor | None:
        """Bias on the first scores of lists of one length, [lists, heads, queries or 1, keys]; None if none."""
        cut = int(lists.biased.max())
        if not cut:
            return None
        tiles, grid = lists.tiles[:, :cut], self.cut.num_tiles
        bias = self.hidden[tiles].flatten(1)[:, None, None]
        if lists.queries[0, 0] < grid:  # text sees every key of the sequence
            if self.log_weights is not None:
                pooled = (tiles >= grid) & (tiles < grid + self.log_weights.shape[2])
                number = torch.where(pooled, tiles - grid, 0)
                weights = self.log_weights[lists.heads[..., None], lists.queries[:, :, None], number[:, None]]
                bias = bias + torch.where(pooled[:, None, :, None], weights, 0.0).flatten(2)[:, :, None]
            if self.window is not None:
                slots = torch.arange(cut, device=tiles.device)
                whole = (slots >= lists.biased[:, None]) | (tiles >= grid)
                bias = bias + self._cut_out(self.window, lists.queries, tiles, whole)[:, None]
        return bias.expand(-1, lists.heads.shape[1], -1, -1)

    def _cut_out(self, window: AxisWindows, queries: Tensor, tiles: Tensor, whole: Tensor) -> Tensor:
        """-inf where ``window`` cuts tiles that are not ``whole``, else 0: [lists, T, keys]."""
        query, key = self.positions[queries].flatten(1), self.positions[torch.where(whole, 0, tiles)].flatten(1)
        kept = window.kept(self.cut.grid, self.cut.coordinates(query), self.cut.coordinates(key))
        kept |= whole.repeat_interleave(self.cut.tile_size, 1)[:, None]
        return torch.zeros_like(kept, dtype=self.hidden.dtype).masked_fill_(~kept, -torch.inf)


def tile_bias(inputs: Inputs) -> TileBias:
    cut, plan = inputs.plan.tiles, inputs.plan
    one = inputs.q.new_ones(())
    real = key_tiles(inputs, one.expand(1, plan.num_tokens, 1, 1), one.expand(1, plan.pooled, 1, 1))
    tokens = torch.arange(cut.num_tokens, dtype=torch.int32, device=inputs.q.device)
    weights = None
    if inputs.pooled is not None:
        weights = F.pad(inputs.pooled.log_weights[0], (0, -plan.pooled % cut.tile_size))
        weights = weights.unflatten(-1, (-1, cut.tile_size)).expand(inputs.q.shape[2], cut.num_tiles, -1, -1)
    return TileBias(cut, real[0, ..., 0].log(), boxes(tokens, cut).flatten(0, 2).flatten(1), plan.window, weights)
