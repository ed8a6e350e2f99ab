"""Means over runs of a curve, level after level, next to the text keys: the keys that log-linear attention adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.selection.backend import runs_triton


@dataclass(frozen=True)
class Levels:
    """Where the means of a curve lie in one tensor: level 1, level 2 and so on, then the text keys as they are.

    A mean of level l stands for ``block`` means of level l - 1, that is for ``block**l`` tokens, the last one of a
    level for what is left. Every level and the text are padded to whole blocks of rows, so that the means below one of
    the next level are one block.

    Args:
        tokens: tokens on the curve.
        block: means or tokens of one mean.
        depth: number of levels, at least 1.
        text: text tokens of the sequence, before and after the grid.
    """

    tokens: int
    block: int
    depth: int
    text: int = 0

    def size(self, level: int) -> int:
        """Means of a level; level 0 are the tokens."""
        span: int = self.block**level
        return -(-self.tokens // span)

    def start(self, level: int) -> int:
        """The row of a level's first mean; that of the first text key for level ``depth + 1``."""
        return sum(self._padded(self.size(lower)) for lower in range(1, level))

    @property
    def rows(self) -> int:
        return self.start(self.depth + 1) + self._padded(self.text)

    def split(self, means: Tensor) -> list[Tensor]:
        """The levels of means [B, rows, ...] as views [B, size, ...]."""
        return [means.narrow(1, self.start(level), self.size(level)) for level in range(1, self.depth + 1)]

    def tokens_per(self, level: int, device: torch.device | None = None) -> Tensor:
        """Tokens that each mean of a level stands for, int64 [size]."""
        starts = torch.arange(0, self.tokens, self.block**level, device=device)
        return (self.tokens - starts).clamp(max=self.block**level)

    def _padded(self, rows: int) -> int:
        return -(-rows // self.block) * self.block


def curve_means(tensors: Sequence[Tensor], order: Tensor, levels: Levels, prefix: int = 0) -> tuple[Tensor, ...]:
    """The means of all levels, and the text.

    Sums are float32 (float64 for float64 inputs). Means have the dtype of the tokens, as attention takes them together
    with tokens; a level is made from the rounded one below.

    Args:
        tensors: queries, keys or values, up to three [B, L, H, D] of one shape and dtype, any strides.
        order: int32 [N], position in the sequence of the curve's n-th token.
        levels: of these tokens; the L - N positions that are not on the curve are its text.
        prefix: text tokens before the grid.

    Returns:
        [B, levels.rows, H, D] for each tensor, 0 in the rows of padding; differentiable.
    """
    if runs_triton(tensors[0]) and tensors[0].dtype != torch.float64:
        means: tuple[Tensor, ...] = _TritonMeans.apply(order, levels, prefix, *tensors)  # type: ignore[no-untyped-call]
        return means
    return tuple(_means(x, order, levels, prefix) for x in tensors)


def _means(x: Tensor, order: Tensor, levels: Levels, prefix: int) -> Tensor:
    parts = []
    fine, weights = x[:, order.long()], levels.tokens_per(0, x.device)
    for _ in range(levels.depth):
        fine, weights = coarser(fine, weights, levels.block)
        parts.append(_pad_rows(fine, levels.block))
    if levels.text:
        text = torch.cat([x[:, :prefix], x[:, prefix + levels.tokens :]], 1)
        parts.append(_pad_rows(text, levels.block))
    return torch.cat(parts, 1)


def coarser(means: Tensor, tokens_per: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The next level, as if pooled from the tokens.

    Args:
        means: [B, n, H, D].
        tokens_per: tokens that each stands for, [n].
        block: means of one coarser mean; the last may have fewer.

    Returns:
        Means [B, ceil(n / block), H, D] in the dtype of ``means``, and the tokens each stands for.
    """
    compute = torch.promote_types(means.dtype, torch.float32)
    sums = _pad_rows(means.to(compute) * tokens_per[:, None, None], block).unflatten(1, (-1, block)).sum(2)
    tokens = F.pad(tokens_per, (0, -len(tokens_per) % block)).view(-1, block).sum(-1)
    return (sums / tokens[:, None, None]).to(means.dtype), tokens


def _pad_rows(x: Tensor, block: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block))


class _TritonMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: Tensor, levels: Levels, prefix: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        from dit_accel.kernels.pyramid.triton_means import triton_means

        ctx.order, ctx.levels, ctx.prefix = order, levels, prefix
        ctx.set_materialize_grads(False)
        return triton_means(tensors, order, levels, prefix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Each token gets its share of the mean of every level, a text token its own row."""
        from dit_accel.kernels.pyramid.triton_means import triton_shares

        wanted = zip(gradients, ctx.needs_input_grad[3:], strict=True)
        shares = (
            triton_shares(x.contiguous(), ctx.order, ctx.levels, ctx.prefix) if x is not None and needed else None
            for x, needed in wanted
        )
        return None, None, None, *shares
