"""Attention to blocks of keys, each at the resolution that its importance buys."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.kernels.block_sparse.plan import PooledKeys
from dit_accel.kernels.pyramid.attend import list_attention
from dit_accel.kernels.pyramid.importance import log_importance
from dit_accel.kernels.pyramid.list_operator import ListBackend
from dit_accel.kernels.pyramid.lists import BlockLists
from dit_accel.kernels.pyramid.order import curve_order
from dit_accel.kernels.pyramid.text import with_text_queries, without_padding
from dit_accel.kernels.selection.choose import row_top_k, row_top_p
from dit_accel.kernels.selection.lists import lists_from_mask
from dit_accel.layout import TokenLayout
from dit_accel.methods.attention import (
    AttnCall,
    AttnResult,
    BoundAttention,
    QueryGroups,
    check_list_backend,
    curve_groups,
)


class Quota(NamedTuple):
    """What a level is given, together with the finer ones.

    Args:
        level: keys of one mean.
        blocks: key blocks of a row; the most there can be where mass decides.
        mass: share of the row's importance; None where rank decides.
        least: key blocks of a row where mass would give it fewer.
    """

    level: int
    blocks: int
    mass: float | None = None
    least: int = 0


class PyramidAttention(BoundAttention):
    """List attention over the curve's tokens, the means of the levels used and the text.

    Lists name *pieces*: as many keys or means as a key block has at the coarsest level used, so that a block is whole
    pieces at every level.

    Args:
        layout: the sequence.
        device: of the calls.
        quotas: of the levels used, the finest first.
        query_block, key_block: tokens along the curve.
        samples: tokens of a block that its importance is judged by; None: their mean.
        density: what a call is expected to compute, text included.
    """

    def __init__(
        self,
        layout: TokenLayout,
        device: torch.device,
        quotas: list[Quota],
        *,
        query_block: int,
        key_block: int,
        samples: int | None,
        density: float,
    ) -> None:
        self.layout, self.density, self.tile = layout, density, (1, 1, query_block)
        self._quotas, self._query_block, self._key_block = quotas, query_block, key_block
        self._order = curve_order(layout.grid).to(device) + layout.prefix
        self._sampled: list[Tensor] | None = None
        if samples is not None:
            generator = torch.Generator().manual_seed(0)
            drawn = [_drawn(layout.visual_tokens, block, samples, generator) for block in (query_block, key_block)]
            self._sampled = [self._order[positions.to(device)] for positions in drawn]
        self._samples = samples or 1
        starts = torch.arange(0, layout.visual_tokens, query_block, device=device)
        self._rows = (layout.visual_tokens - starts).clamp(max=query_block)

        self._piece = key_block // quotas[-1].level
        self._levels = [quota.level for quota in quotas if quota.level > 1]
        kinds = [layout.visual_tokens, *(-(-layout.visual_tokens // level) for level in self._levels)]
        kinds.append(layout.text_tokens)
        self._pieces = [-(-keys // self._piece) for keys in kinds]
        self._last_pieces = torch.tensor([end - 1 for end in accumulate(self._pieces)], device=device)
        lacking = [-keys % self._piece for keys in kinds]
        self._lacking = torch.tensor(lacking, device=device)  # keys that the last piece of each kind has too few
        self._log_weights = self._all_log_weights(device)

    def attend(self, call: AttnCall) -> AttnResult:
        with torch.no_grad():
            lists, density = self._lists(call)
        out, lse = list_attention(
            call.q,
            call.k,
            call.v,
            [lists],
            order=self._order,
            pooled=self._pooled(call),
            scale=call.scale,
            backend=cast(ListBackend, call.backend),
            return_lse=True,
        )
        out, whole_lse = with_text_queries(
            call.q,
            call.k,
            call.v,
            out,
            lse if call.with_lse else None,
            order=self._order,
            prefix=self.layout.prefix,
            text_lengths=call.text_lengths,
            scale=call.scale,
        )
        return AttnResult(out, whole_lse, density)

    def groups(self) -> QueryGroups:
        return curve_groups(self._order - self.layout.prefix, self._query_block)

    def check(self, q: Tensor, backend: Backend) -> None:
        check_list_backend(q, backend)

    def _lists(self, call: AttnCall) -> tuple[BlockLists, Tensor]:
        """The lists of one call, and the share of all pairs that they and the text make."""
        keep = self._keep(self._importance(call))
        none_partial = torch.zeros_like(keep[:1, :1, :1])
        counts, pooled, indices = lists_from_mask(keep, none_partial, self._width(), sum(self._pieces[1:]))
        lists = BlockLists(self._query_block, self._piece, counts, pooled, indices)

        lacking = (keep[..., self._last_pieces] * self._lacking).sum(-1)
        pairs = ((counts * self._piece - lacking) * self._rows).sum(-1).double().mean()
        tokens = self.layout.num_tokens
        return lists, (pairs + self.layout.text_tokens * tokens) / tokens**2

    def _width(self) -> int:
        """Pieces that a row lists at most."""
        width, finer = self._pieces[-1], 0
        for quota in self._quotas:
            width += (quota.blocks - finer) * (self._key_block // quota.level // self._piece)
            finer = quota.blocks
        return width

    def _importance(self, call: AttnCall) -> Tensor:
        """Log importance of the pairs of blocks, [B, H, Q, K]."""
        if self._sampled is not None:
            q, k = (x.index_select(1, at) for x, at in zip((call.q, call.k), self._sampled, strict=True))
        else:
            q = _means(call.q.index_select(1, self._order), self._query_block)
            k = _means(call.k.index_select(1, self._order), self._key_block)
        return log_importance(q, k, self._samples, self._samples, scale=call.scale)

    def _keep(self, importance: Tensor) -> Tensor:
        """The pieces that each query block sees, bool [B, H, Q, pieces]."""
        nothing = torch.zeros_like(importance, dtype=torch.bool)
        finer, kept = nothing, []
        if self._quotas[0].level > 1:
            kept.append(self._spread(nothing, 1, self._pieces[0]))
        kinds = self._pieces[len(kept) : -1]
        for quota, pieces in zip(self._quotas, kinds, strict=True):
            chosen = _chosen(importance, quota) | finer
            kept.append(self._spread(chosen & ~finer, quota.level, pieces))
            finer = chosen
        text = torch.ones(*importance.shape[:3], self._pieces[-1], dtype=torch.bool, device=importance.device)
        return torch.cat([*kept, text], -1)

    def _spread(self, blocks: Tensor, level: int, pieces: int) -> Tensor:
        """From key blocks to their pieces at a level; those of the last block beyond its tokens are cut off."""
        each = self._key_block // level // self._piece
        return blocks[..., None].expand(*blocks.shape, each).flatten(-2)[..., :pieces]

    def _pooled(self, call: AttnCall) -> PooledKeys | None:
        """Means of the levels used, then the text."""
        if not sum(self._pieces[1:]):
            return None
        weights = self._log_weights
        if call.text_lengths is not None:
            first = self._piece * sum(self._pieces[1:-1])
            weights = without_padding(weights, first, self.layout.text_tokens, call.text_lengths)
        return PooledKeys(self._stacked(call.k), self._stacked(call.v), weights)

    def _stacked(self, x: Tensor) -> Tensor:
        along_curve = x.index_select(1, self._order)
        parts = [_means(along_curve, level) for level in self._levels]
        prefix, end = self.layout.prefix, self.layout.prefix + self.layout.visual_tokens
        parts.append(torch.cat([x[:, :prefix], x[:, end:]], 1))
        return torch.cat([F.pad(part, (0, 0, 0, 0, 0, -part.shape[1] % self._piece)) for part in parts], 1)

    def _all_log_weights(self, device: torch.device) -> Tensor:
        """Log of the tokens that each stacked key stands for, -inf for padding: float32 [1, 1, 1, P]."""
        tokens = self.layout.visual_tokens
        standing = [(tokens - torch.arange(0, tokens, level)).clamp(max=level) for level in self._levels]
        standing.append(torch.ones(self.layout.text_tokens))
        parts = [F.pad(x.float().log(), (0, -len(x) % self._piece), value=-torch.inf) for x in standing]
        return torch.cat(parts)[None, None, None].to(device)


def _chosen(importance: Tensor, quota: Quota) -> Tensor:
    """The key blocks that a level and the finer ones are given, bool like ``importance``."""
    if quota.mass is None:
        return row_top_k(importance, quota.blocks)
    if quota.mass == 1:
        return torch.ones_like(importance, dtype=torch.bool)
    at_least = row_top_k(importance, quota.least) if quota.least else torch.zeros_like(importance, dtype=torch.bool)
    return at_least | row_top_p(importance, quota.mass) if quota.mass else at_least


def _means(x: Tensor, run: int) -> Tensor:
    """Means over runs of tokens [B, N, H, D], the last one over what is left."""
    runs = x.shape[1] // run
    whole, rest = x[:, : runs * run], x[:, runs * run :]
    means = whole.unflatten(1, (runs, run)).mean(2)
    return torch.cat([means, rest.mean(1, keepdim=True)], 1) if rest.shape[1] else means


def _drawn(tokens: int, block: int, samples: int, generator: torch.Generator) -> Tensor:
    """Places on the curve of the samples of every block, the same ones in each; in a ragged block they wrap around."""
    places = torch.randperm(block, generator=generator)[:samples].sort().values
    starts = torch.arange(0, tokens, block)[:, None]
    return (starts + places % (tokens - starts)).flatten()
