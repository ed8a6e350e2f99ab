"""Text tokens beside a curve: their queries see every key of the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.dense_rows import aligned, dense_rows, wants_one_order


def with_text_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    order: Tensor,
    prefix: int = 0,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention along a curve made that of the whole sequence.

    Args:
        q, k, v: [B, L, H, D]; the positions that are not on the curve are text.
        out: [B, L, H, D], of the curve's queries; written to where nothing needs its gradient.
        lse: of the curve's queries along the curve, [B, H, N]; None if it is not asked for.
        order: int32 [N], position in the sequence of the curve's n-th token.
        prefix: text tokens before the grid.
        text_lengths: valid text tokens per batch item, int32 [B]; no query sees the rest. Default: all of them.
        scale: factor on the scores; default D ** -0.5.

    Returns:
        Output [B, L, H, D], and the LSE in the order of the sequence, [B, H, L], if one was given; that of text queries
        carries no gradient.
    """
    tokens, length = len(order), q.shape[1]
    if tokens == length:
        return out, None if lse is None else torch.empty_like(lse).index_copy(2, order.long(), lse)
    position = torch.arange(length, device=q.device)
    text = torch.cat([position[:prefix], position[prefix + tokens :]])
    hidden = None
    if text_lengths is not None:
        padding = text_padding(len(text), text_lengths)
        hidden = torch.zeros(len(padding), length, dtype=torch.bool, device=q.device).index_copy(1, text, padding)
    if lse is not None:
        rows, text_lse = dense_rows(q[:, text], k, v, scale=scale, hidden=hidden)
        places = torch.cat([order.long(), text])
        lse = lse.new_empty(*lse.shape[:2], length).index_copy(2, places, torch.cat([lse, text_lse], 2))
        return _joined(out, rows, prefix, tokens), lse
    if wants_one_order(q, k, v):
        return _joined(out, dense_rows(q[:, text], k, v, scale=scale, hidden=hidden)[0], prefix, tokens), None
    queries, keys, values = (aligned(x).transpose(1, 2) for x in (q[:, text], k, v))
    mask = None if hidden is None else ~hidden[:, None, None]
    rows = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).transpose(1, 2)
    return _joined(out, rows, prefix, tokens), None


def text_padding(text_tokens: int, text_lengths: Tensor) -> Tensor:
    """Which text tokens are padding, bool [B, text tokens]."""
    return torch.arange(text_tokens, device=text_lengths.device) >= text_lengths[:, None]


def without_padding(log_weights: Tensor, first: int, text_tokens: int, text_lengths: Tensor) -> Tensor:
    """Log weights [1, 1, 1, P] as [B, 1, 1, P] with -inf for the text's padding; text keys begin at ``first``."""
    beyond = log_weights.shape[-1] - first - text_tokens
    hidden = F.pad(text_padding(text_tokens, text_lengths), (first, beyond))
    return log_weights.masked_fill(hidden[:, None, None], -torch.inf)


def _joined(out: Tensor, rows: Tensor, prefix: int, tokens: int) -> Tensor:
    if out.requires_grad or rows.requires_grad:
        return torch.cat([rows[:, :prefix], out[:, prefix : prefix + tokens], rows[:, prefix:]], 1)
    out[:, :prefix] = rows[:, :prefix]
    out[:, prefix + tokens :] = rows[:, prefix:]
    return out
