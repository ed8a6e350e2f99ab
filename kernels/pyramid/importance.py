"""How much blocks of queries care for blocks of keys, judged by a few representatives of each."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.selection.backend import runs_triton

_SCORES = 1 << 24  # of the portable code at a time


def log_importance(
    q: Tensor,  # [B, Q * per_query_block, H, D]
    k: Tensor,  # [B, K * per_key_block, H, D]
    per_query_block: int = 1,
    per_key_block: int = 1,
    *,
    scale: float | None = None,
) -> Tensor:
    """The largest softmax probability between the representatives of two blocks.

    Every representative query attends to all representative keys; a pair of blocks is worth the maximum over their
    representatives. Nothing is read back to the host.

    Args:
        q, k: representatives of the blocks, those of a block next to each other; any strides.
        per_query_block, per_key_block: representatives of a block, powers of two up to 128.
        scale: factor on the scores; default D ** -0.5.

    Returns:
        Natural logarithms, float32 [B, H, Q, K] (float64 for float64 inputs), at most 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if runs_triton(q) and q.dtype != torch.float64:
        from dit_accel.kernels.pyramid.triton_importance import triton_log_importance

        return triton_log_importance(q, k, per_query_block, per_key_block, scale)
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.transpose(1, 2).to(compute) for x in (q, k))
    q = q * scale
    blocks = max(1, _SCORES // (q.shape[0] * q.shape[1] * per_query_block * k.shape[2]))
    parts = [_of_blocks(part, k, per_query_block, per_key_block) for part in q.split(blocks * per_query_block, 2)]
    return torch.cat(parts, 2)


def _of_blocks(q: Tensor, k: Tensor, per_query_block: int, per_key_block: int) -> Tensor:
    scores = q @ k.mT
    best = scores.unflatten(-1, (-1, per_key_block)).amax(-1) - scores.logsumexp(-1, keepdim=True)
    importance: Tensor = best.unflatten(2, (-1, per_query_block)).amax(3)
    return importance
