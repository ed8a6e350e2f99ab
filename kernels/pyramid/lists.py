"""What attention over block lists is told: blocks of a curve, and which key blocks each query block sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import PooledKeys

SIZES = (16, 32, 64, 128)  # tokens that a block may have
WORD = 32  # keys that a word of ``hidden`` speaks of


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The key blocks that each query block sees, blocks of pooled keys before blocks of the sequence's own.

    Blocks are runs of tokens along a curve through the token grid: query block i holds the curve's tokens
    ``i * rows`` to ``(i + 1) * rows``, key block j those from ``j * block`` on. The last of each may be ragged. A block
    that is named twice counts twice.

    Args:
        rows: tokens of a query block: 16, 32, 64 or 128.
        block: tokens of a key block, pooled or not: 16, 32, 64 or 128.
        counts: int32 [B or 1, H or 1, Q], key blocks seen by each query block (0 is allowed).
        pooled: int32, the shape of ``counts``: how many of them, first in the list, are blocks of pooled keys.
        indices: int32 [B or 1, H or 1, Q, M], the key blocks; with N tokens on the curve pooled block j is number
            ``ceil(N / block) + j``; entries from ``counts`` on are not read.
        hidden: int32 [B or 1, H or 1, Q, M, ceil(block / 32)], pooled keys that an entry leaves out: bit c % 32 of word
            c // 32 hides key c of the block. Words of other blocks are not read. None hides nothing.
    """

    rows: int
    block: int
    counts: Tensor
    pooled: Tensor
    indices: Tensor
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows not in SIZES or self.block not in SIZES:
            raise ValueError(
                f"rows and block must be one of {', '.join(map(str, SIZES))}, got {self.rows} and {self.block}."
            )
        if self.indices.ndim != 4:
            raise ValueError(
                f"indices must have shape [batch or 1, heads or 1, query blocks, kept], got {list(self.indices.shape)}."
            )
        if self.counts.shape != self.indices.shape[:3] or self.pooled.shape != self.counts.shape:
            raise ValueError(
                f"counts and pooled must have shape {list(self.indices.shape[:3])}, "
                f"got {list(self.counts.shape)} and {list(self.pooled.shape)}."
            )
        want = (*self.indices.shape, self.words)
        if self.hidden is not None and self.hidden.shape != want:
            raise ValueError(f"hidden must have shape {list(want)}, got {list(self.hidden.shape)}.")
        if any(x.dtype != torch.int32 for x in self.tensors):
            raise ValueError(f"lists must be int32, got {', '.join(str(x.dtype) for x in self.tensors)}; convert them.")

    @property
    def words(self) -> int:
        """Words of ``hidden`` per entry."""
        return -(-self.block // WORD)

    def listed(self, other: int) -> Tensor:
        """``indices`` with ``other`` for what is not listed."""
        return torch.where(self._slots() < self.counts[..., None], self.indices, other)

    def visible(self) -> Tensor:
        """Which keys of each entry are seen, those of a ragged end too: bool [B or 1, H or 1, Q, M, block]."""
        slots = self._slots()
        seen = (slots < self.counts[..., None])[..., None].expand(*self.indices.shape, self.block)
        if self.hidden is None:
            return seen
        key = torch.arange(self.block, device=slots.device)
        bits = self.hidden[..., key // WORD] >> (key % WORD) & 1
        return seen & ((bits == 0) | (slots >= self.pooled[..., None])[..., None])

    def _slots(self) -> Tensor:
        return torch.arange(self.indices.shape[-1], device=self.indices.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        lists = (self.counts, self.pooled, self.indices)
        return lists if self.hidden is None else (*lists, self.hidden)


@dataclass(frozen=True, eq=False)
class ListInputs:
    """One call of list attention, checked and on one device: what every backend is given.

    Args:
        q, k, v: [B, L, H, D], any strides.
        lists: one or two passes with equal key blocks.
        order: int32 [N], position in the sequence of the curve's n-th token.
        pooled: the keys that blocks of pooled keys hold.
        scale: factor on the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lists: tuple[BlockLists, ...]
    order: Tensor
    pooled: PooledKeys | None
    scale: float

    @property
    def tokens(self) -> int:
        """Tokens on the curve."""
        return len(self.order)

    @property
    def block(self) -> int:
        return self.lists[0].block

    @property
    def key_blocks(self) -> int:
        """Blocks of the sequence's own keys; pooled ones are numbered after them."""
        return -(-self.tokens // self.block)

    @property
    def pooled_keys(self) -> int:
        return 0 if self.pooled is None else self.pooled.k.shape[1]
