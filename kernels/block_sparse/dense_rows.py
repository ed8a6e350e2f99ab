"""Dense attention of a few queries over the whole sequence, with its LSE: a measure of what sparse attention lacks."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores at a time where no fused kernel returns the LSE.
_SCORES = 1 << 26


def dense_rows(
    q: Tensor,  # [B, R, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    *,
    scale: float | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the queries ``q`` over all keys.

    Args:
        q, k, v: [B, R, H, D] and twice [B, L, H, D], any strides.
        scale: factor on the scores; default D ** -0.5.
        hidden: keys that nobody sees, bool [B, L]; default none.

    Returns:
        Output [B, R, H, D], differentiable, and LSE float32 [B, H, R] (float64 for float64 inputs), which is not.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if hidden is None and _flash_takes(q, k, v):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *(aligned(x).transpose(1, 2) for x in (q, k, v)), 0.0, False, scale=scale
        )
        return out.transpose(1, 2), lse[..., : q.shape[1]].detach()
    rows = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    parts = [_eager(part, k, v, scale, hidden) for part in q.split(rows, 1)]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


def aligned(x: Tensor) -> Tensor:
    """``x``, copied where it begins off the 16 bytes that torch's fused attention reads at once without a check."""
    return x if x.storage_offset() * x.element_size() % 16 == 0 else x.clone()


def wants_one_order(*tensors: Tensor) -> bool:
    """Whether gradients are to be summed in one order, which torch's fused backward kernels may not do."""
    return torch.are_deterministic_algorithms_enabled() and any(x.requires_grad for x in tensors)


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and all(x.stride(-1) == 1 for x in (q, k, v))
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and not wants_one_order(q, k, v)
    )


def _eager(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("brhd,bkhd->bhrk", q.to(compute), k.to(compute)) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.einsum("bhrk,bkhd->brhd", (scores - lse).exp(), v.to(compute))
    return out.to(q.dtype), lse[..., 0].detach()
