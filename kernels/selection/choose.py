"""From scores of tile pairs to the pairs that are kept.

One order everywhere: higher score first, then lower index. NaN counts as -inf. Nothing is read back to the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.kernels.selection.backend import ROW_LIMIT, runs_triton


def row_top_k(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best keys of each query.

    Args:
        scores: [B, H, Q, K], compared in float32.
        k: keys kept per query, at least 1; all of them if there are no more.

    Returns:
        bool [B, H, Q, K].
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return _keep_highest(scores, k)


def head_percentile(scores: Tensor, density: float) -> Tensor:
    """The best pairs of each head's whole map, as DraftAttention (arXiv 2505.14708) selects them.

    Rows compete: one may keep all of its keys, another none.

    Args:
        scores: [B, H, Q, K], compared in float32.
        density: share of the map that is kept, in (0, 1]; each batch item and head keeps ceil(density * Q * K) pairs,
            ties broken by the lower query, then the lower key.

    Returns:
        bool [B, H, Q, K].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}.")
    pairs = scores.shape[-2] * scores.shape[-1]
    kept = max(1, math.ceil(round(density * pairs, 6)))  # 0.07 * 100 is a little more than 7
    return _keep_highest(scores.flatten(-2), kept).reshape(scores.shape)


def row_top_p(scores: Tensor, p: float) -> Tensor:
    """The fewest best keys of each query that hold at least ``p`` of the softmax over its scores.

    Masses are summed in float32, so a key whose share is lost in rounding may be left out even at p = 1. Every query
    keeps a key: one without a finite score weighs its highest ones alike.

    Args:
        scores: [B, H, Q, K], compared in float32.
        p: share of the mass, in (0, 1].

    Returns:
        bool [B, H, Q, K].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must lie in (0, 1], got {p}.")
    if runs_triton(scores) and scores.shape[-1] <= ROW_LIMIT:
        from dit_accel.kernels.selection.triton_choose import triton_keep_mass

        return triton_keep_mass(scores.float().contiguous(), p)
    best, order = _descending(scores)
    highest = best[..., :1]
    weights = torch.where(best == highest, 1.0, (best - highest).exp())  # equal ones may be infinite
    before = weights.cumsum(-1) - weights
    kept = before < p * weights.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _keep_highest(scores: Tensor, kept: int) -> Tensor:
    """The ``kept`` highest along the last dimension."""
    if runs_triton(scores):
        from dit_accel.kernels.selection.triton_choose import triton_keep_highest

        return triton_keep_highest(scores.float().contiguous(), min(kept, scores.shape[-1]))
    _, order = _descending(scores)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :kept], True)


def _descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.float()
    values, order = scores.masked_fill(scores.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True)
    return values, order
