"""The oracle of log-linear attention: full matrices from the formulas, float64-able. For tests and small grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_linear_reference(
    q: Tensor,  # [B, L, H, D]
    k: Tensor,
    v: Tensor,
    *,
    order: Tensor,
    top_k: int,
    block: int,
    levels: int,
    exclude_covered: bool = True,
    prefix: int = 0,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
    chosen: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, L] of ``log_linear_attention``, in float64 for float64 inputs, else float32.

    ``chosen`` replaces the choice: indices [B, H, n_l, K_l] for level 1 and on.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    text = _text_positions(q.shape[1], len(order), prefix, q.device)
    sequence = [x.to(compute).transpose(1, 2) for x in (q, k, v)]  # [B, H, L, D]
    on_curve = [x[:, :, order.long()] for x in sequence]
    means = [[_pooling(len(order), block**level, x) @ x for x in on_curve] for level in range(1, levels + 1)]
    masks = _masks(chosen, means) if chosen is not None else _choice(means, top_k, block)
    weights = seen_weights(masks, len(order), block, exclude_covered)
    valid = torch.ones(q.shape[0], len(text), dtype=torch.bool, device=q.device)
    if text_lengths is not None:
        valid = torch.arange(len(text), device=q.device) < text_lengths[:, None]
    of_text = valid[:, None, None].to(weights.dtype).expand(*weights.shape[:3], -1)
    weights = torch.cat([weights, of_text], -1)
    keys, values = (
        torch.cat([on_curve[i], *(level[i] for level in means), sequence[i][:, :, text]], 2) for i in (1, 2)
    )
    out, lse = _attention(on_curve[0], keys, values, weights.to(compute), scale)
    dense = torch.ones(q.shape[0], 1, 1, q.shape[1], dtype=compute, device=q.device)
    dense[..., text] = valid[:, None, None].to(compute)
    text_out, text_lse = _attention(sequence[0][:, :, text], sequence[1], sequence[2], dense, scale)
    places = torch.cat([order.long(), text]).argsort()
    out, lse = torch.cat([out, text_out], 2)[:, :, places], torch.cat([lse, text_lse], 2)[:, :, places]
    return out.transpose(1, 2).to(q.dtype), lse


def seen_weights(masks: Sequence[Tensor], tokens: int, block: int, exclude_covered: bool) -> Tensor:
    """How many tokens each key stands for in the eyes of each query, 0 where it is not seen.

    Args:
        masks: for level 1 and on, which blocks each block chose, bool [B, H, n_l, n_l].
        tokens: tokens on the curve, N.
        block: blocks of one block of the next level.
        exclude_covered: leave out the means of chosen blocks.

    Returns:
        float64 [B, H, N, N + n_1 + n_2 + ...], tokens first, then the means of each level.
    """
    token = torch.arange(tokens, device=masks[0].device)
    parts = [masks[0][:, :, token // block][..., token // block].double()]
    for level, mask in enumerate(masks, 1):
        means = torch.arange(mask.shape[-1], device=mask.device)
        of_query = token // block**level
        if level == len(masks):
            seen = torch.ones_like(mask)[:, :, of_query]
        else:
            seen = masks[level][:, :, of_query // block][..., means // block]
        if exclude_covered:
            seen = seen & ~mask[:, :, of_query]
        stands_for = torch.bincount(of_query, minlength=len(means)).double()
        parts.append(seen * stands_for)
    return torch.cat(parts, -1)


def _attention(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and LSE [B, H, Q]; a key of weight W counts as W equal keys."""
    scores = (q @ k.mT * scale + weights.log()).masked_fill(weights == 0, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _pooling(tokens: int, run: int, like: Tensor) -> Tensor:
    """The matrix that takes the mean of every ``run`` tokens."""
    token = torch.arange(tokens, device=like.device)
    member = (torch.arange(-(-tokens // run), device=like.device)[:, None] == token // run).to(like.dtype)
    return member / member.sum(-1, keepdim=True)


def _choice(means: Sequence[Sequence[Tensor]], top_k: int, block: int) -> list[Tensor]:
    """Level by level from the top: the best of what the parent's choice allows."""
    masks: list[Tensor] = []
    for q, k, _ in reversed(means):
        scores = (q @ k.mT).detach()
        if masks:
            index = torch.arange(k.shape[2], device=k.device) // block
            scores = scores.masked_fill(~masks[0][:, :, index][..., index], -torch.inf)
        best = scores.argsort(stable=True, dim=-1, descending=True)[..., :top_k]
        masks.insert(0, torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True))
    return masks


def _masks(chosen: Sequence[Tensor], means: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Indices as masks over the blocks of their level."""
    blocks = [level[1].shape[2] for level in means]
    masks = [x.new_zeros(*x.shape[:3], n, dtype=torch.bool) for x, n in zip(chosen, blocks, strict=True)]
    return [mask.scatter_(-1, x.long(), True) for mask, x in zip(masks, chosen, strict=True)]


def _text_positions(length: int, tokens: int, prefix: int, device: torch.device) -> Tensor:
    return torch.tensor([*range(prefix), *range(prefix + tokens, length)], dtype=torch.long, device=device)
