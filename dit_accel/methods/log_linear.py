"""Log-linear attention: what matters most in full, everything else as means of ever longer runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.kernels.pyramid.lists import SIZES
from dit_accel.kernels.pyramid.log_linear import depth_of, log_linear_attention
from dit_accel.kernels.pyramid.order import curve_order
from dit_accel.layout import TokenLayout
from dit_accel.methods.attention import (
    AttnCall,
    AttnResult,
    BoundAttention,
    QueryGroups,
    check_list_backend,
    curve_groups,
)
from dit_accel.methods.base import AttnMethod, largest_within


@dataclass(frozen=True, kw_only=True)
class LogLinearAttnProcessor(AttnMethod):
    """Trainable log-linear sparse attention (arXiv 2512.16615): tokens where a block looks, means elsewhere.

    Tokens are taken along a space-filling curve; with B = ``block`` and X any of q, k and v, level l holds means of
    runs of B**l of them, the last one of what is left:

        X_0 = X,    X_l[i] = mean(X_l-1[iB], ..., X_l-1[iB + B - 1]),    l = 1, ..., L.

    Block i of level L keeps the K = ``top_k`` blocks j with the highest Q_L[i] · K_L[j]; block i of a level below keeps
    K of the children of what block ⌊i / B⌋ of the level above kept. A query token sees, in one softmax over its scores
    s = q · k / sqrt(D),

        the tokens of the level 1 blocks kept by its own,               weight 1,
        of level l < L the children of what its level l + 1 block kept, weight: the tokens each stands for,
        all means of level L,                                           likewise,

    where a key of weight W enters as W exp(s). A query's keys are about (L K B + N / B**L) of N. Text keys are seen by
    every query, and text queries see every token.

    ``density=`` replaces ``top_k`` by the largest that stays within it. The least, at top_k = 1, is about
    (L B + N / B**L) / N; 1 is dense attention, whatever ``exclude_covered`` is.

    Args:
        top_k: blocks that each block keeps on every level. Default 8.
        block: tokens or means of a block: 16 (default), 32, 64 or 128.
        levels: L. Default: the fewest that leave at most 256 means on the top level.
        exclude_covered: leave out the mean of what is seen more finely, so that every token counts once and K = all is
            dense attention. Default True, for models trained with full attention. False is the published rule, which
            counts it again on each level; models trained with it want it so.

    Raises:
        ValueError: an option out of its range, or more levels than a layout has.
    """

    name: ClassVar[str] = "log_linear"

    top_k: int = 8
    block: int = 16
    levels: int | None = None
    exclude_covered: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")
        if self.block not in SIZES:
            raise ValueError(f"block must be one of {', '.join(map(str, SIZES))}, got {self.block}.")
        if self.levels is not None and self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}.")

    def bind(self, layout: TokenLayout, device: torch.device) -> BoundAttention:
        return LogLinearAttention(layout, device, self, self._top_k(layout))

    def ideal_density(self, layout: TokenLayout) -> float:
        """Keys of a query, tokens and means, as a share of the grid's tokens; 1 where that is less."""
        return self._density(layout, self._top_k(layout))

    def _top_k(self, layout: TokenLayout) -> int:
        if self.density is None:
            return self.top_k
        blocks = -(-layout.visual_tokens // self.block)
        return 1 + largest_within(self.density, blocks, lambda below: self._density(layout, 1 + below))

    def _density(self, layout: TokenLayout, top_k: int) -> float:
        """Every block that is kept brings ``block`` keys, whether or not some of them are hidden."""
        tokens = layout.visual_tokens
        depth = depth_of(tokens, self.block, self.levels)
        sizes = [-(-tokens // self.block**level) for level in range(depth + 1)]
        kept = sum(min(top_k * self.block, size) for size in sizes[:-1])
        keys: int = kept + sizes[-1]
        return min(1.0, keys / tokens)


class LogLinearAttention(BoundAttention):
    """Log-linear attention on one layout."""

    def __init__(self, layout: TokenLayout, device: torch.device, method: LogLinearAttnProcessor, top_k: int) -> None:
        self.layout, self.tile = layout, (1, 1, method.block)
        self.density = layout.joint_density(method.ideal_density(layout))
        self._options: dict[str, Any] = {
            "order": curve_order(layout.grid).to(device) + layout.prefix,
            "top_k": top_k,
            "block": method.block,
            "levels": method.levels,
            "exclude_covered": method.exclude_covered or method.density == 1,
            "prefix": layout.prefix,
        }

    def attend(self, call: AttnCall) -> AttnResult:
        options = self._options | {
            "text_lengths": call.text_lengths,
            "scale": call.scale,
            "backend": call.backend,
        }
        if call.with_lse:
            out, lse = log_linear_attention(call.q, call.k, call.v, return_lse=True, **options)
            return AttnResult(out, lse, self.density)
        return AttnResult(log_linear_attention(call.q, call.k, call.v, **options), None, self.density)

    def groups(self) -> QueryGroups:
        """The blocks of level 1, of runs along the curve."""
        return curve_groups(self._options["order"] - self.layout.prefix, self._options["block"])

    def check(self, q: Tensor, backend: Backend) -> None:
        check_list_backend(q, backend)
