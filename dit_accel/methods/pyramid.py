"""Pyramid sparse attention: blocks of keys that matter less to a block of queries are seen as coarser means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch

from dit_accel.kernels.pyramid.lists import SIZES
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import AttnMethod, largest_within
from dit_accel.methods.pyramid_attention import PyramidAttention, Quota

LEVELS = (1, 2, 4, 8)  # keys of one mean
_LEAST = 0.06  # of the blocks of a row, and one more, are of level 1 where mass decides
_STEPS = 8  # of ``density`` per block of level 1


@dataclass(frozen=True, kw_only=True)
class PyramidAttnProcessor(AttnMethod):
    """Pyramid sparse attention (arXiv 2512.04025): a block of keys is seen at one of four resolutions or not at all.

    Tokens are taken along a space-filling curve and cut into blocks. Each block of queries ranks all blocks of keys by
    importance and sees them, best first, at level 1 (every key), 2, 4 or 8 (means of so many consecutive keys and of
    their values, the log of that number added to the score); the rest it does not see. All shares one softmax.

    The importance of a pair of blocks is the largest softmax probability between their sampled queries and keys.
    ``assign="rank"`` gives every level a share of the blocks; ``"mass"`` ends a level at the first block with which it
    and the finer ones hold a share of the row's importance, level 1 never before 6 % of the blocks and one more. Of
    blocks that matter alike the lower index comes first. The best block is seen in every case.

    Text keys are seen by every query as they are, and text queries see every key of the sequence.

    ``density=`` replaces ``assign``: blocks are given by rank, in shares that keep the ratios of ``ends`` and grow
    until every block is of level 1; as they grow, a block only becomes finer.

    Args:
        assign: "rank" (default) or "mass".
        ends: cumulative shares at which the levels 1, 2, 4 and 8 end; a level that ends where the finer one does is not
            used, and its means are not made. Default (0.1, 0.15, 0.15, 0.35), a density of 0.15.
        importance: "sampled" (default), or "mean": the softmax over the means of blocks, which costs less and blurs.
        samples: tokens of each block that are looked at, at positions drawn once. Default 8; the paper's code takes a
            quarter of the block.
        query_block: tokens of a query block, 16, 32, 64 or 128. Default 128.
        key_block: tokens of a key block, likewise, at least 16 times the coarsest level used. Default 128.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "pyramid"

    assign: Literal["rank", "mass"] = "rank"
    ends: tuple[float, float, float, float] = (0.1, 0.15, 0.15, 0.35)
    importance: Literal["sampled", "mean"] = "sampled"
    samples: int = 8
    query_block: int = 128
    key_block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assign not in ("rank", "mass"):
            raise ValueError(f"assign must be rank or mass, got {self.assign!r}.")
        if self.importance not in ("sampled", "mean"):
            raise ValueError(f"importance must be sampled or mean, got {self.importance!r}.")
        self._check_ends()
        if self.query_block not in SIZES or self.key_block not in SIZES:
            raise ValueError(
                f"query_block and key_block must be one of {', '.join(map(str, SIZES))}, "
                f"got {self.query_block} and {self.key_block}."
            )
        coarsest = max(level for level, (begin, end) in self._spans() if end > begin)
        if self.key_block < coarsest * SIZES[0]:
            raise ValueError(
                f"level {coarsest} needs a key_block of at least {coarsest * SIZES[0]} tokens, got {self.key_block}; "
                "enlarge it or end the level where the finer one ends."
            )
        tokens = min(self.query_block, self.key_block)
        if self.samples < 1 or tokens % self.samples:
            raise ValueError(f"samples must divide the {tokens} tokens of a block, got {self.samples}.")

    def _check_ends(self) -> None:
        if len(self.ends) != len(LEVELS) or sorted([0, *self.ends, 1]) != [0, *self.ends, 1] or not self.ends[-1]:
            raise ValueError(
                f"ends must be {len(LEVELS)} shares in [0, 1] that never fall, the last above 0, got {self.ends!r}."
            )
        if self.density is not None and not self.ends[0]:
            raise ValueError(f"density needs ends with a share of level 1, got {self.ends!r}.")

    def bind(self, layout: TokenLayout, device: torch.device) -> PyramidAttention:
        return PyramidAttention(
            layout,
            device,
            self.quotas(layout),
            query_block=self.query_block,
            key_block=self.key_block,
            samples=self.samples if self.importance == "sampled" else None,
            density=layout.joint_density(self.ideal_density(layout)),
        )

    def ideal_density(self, layout: TokenLayout) -> float:
        """Share of the grid's pairs that are computed, a mean being one key; where mass decides, the most it can be."""
        return self._density(layout, self.quotas(layout))

    def quotas(self, layout: TokenLayout) -> list[Quota]:
        """What each level that is used is given on ``layout``, the finest first."""
        if self.density is not None:
            steps = _STEPS * self._blocks(layout)
            scales = [(step + 1) / (steps * self.ends[0]) for step in range(steps)]

            def density_of(step: int) -> float:
                return self._density(layout, self._by_rank(layout, scales[step]))

            return self._by_rank(layout, scales[largest_within(self.density, steps, density_of)])
        return self._by_mass(layout) if self.assign == "mass" else self._by_rank(layout, 1.0)

    def _by_rank(self, layout: TokenLayout, scale: float) -> list[Quota]:
        """The first level with a share has a block in any case."""
        blocks, quotas, finer = self._blocks(layout), list[Quota](), 0
        for level, end in zip(LEVELS, self.ends, strict=True):
            share = min(1.0, scale * end)
            given = max(1, math.floor(share * blocks + 1e-9)) if end else 0
            if given > finer:
                quotas.append(Quota(level, given))
            finer = given
        return quotas

    def _by_mass(self, layout: TokenLayout) -> list[Quota]:
        """The fewest blocks that hold a share are at most that share of all, and one that rounding may add."""
        blocks = self._blocks(layout)
        least = int(_LEAST * blocks) + 1
        return [
            Quota(level, min(blocks, max(least, math.ceil(end * blocks) + 1)), end, least if level == 1 else 0)
            for level, (begin, end) in self._spans()
            if end > begin or level == 1
        ]

    def _density(self, layout: TokenLayout, quotas: Sequence[Quota]) -> float:
        keys = sum(
            (quota.blocks - finer) * self.key_block // quota.level
            for quota, finer in zip(quotas, [0, *(quota.blocks for quota in quotas)], strict=False)
        )
        blocks, tokens = self._blocks(layout), layout.visual_tokens
        if quotas[-1].blocks == blocks:  # the ragged block is among them, of the coarsest level for all that is known
            keys -= (blocks * self.key_block - tokens) // quotas[-1].level
        return keys / tokens

    def _blocks(self, layout: TokenLayout) -> int:
        return -(-layout.visual_tokens // self.key_block)

    def _spans(self) -> list[tuple[int, tuple[float, float]]]:
        """Level, and the shares at which it begins and ends."""
        return list(zip(LEVELS, pairwise((0.0, *self.ends)), strict=True))
