"""Log-linear attention (arXiv 2512.16615): fine keys near what matters, means of ever longer runs for the rest."""

from __future__ import annotations

import functools
import itertools
from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import PooledKeys
from dit_accel.kernels.pyramid.attend import check_sequence, list_attention
from dit_accel.kernels.pyramid.hierarchy import hierarchical_top_k
from dit_accel.kernels.pyramid.list_operator import ListBackend
from dit_accel.kernels.pyramid.lists import SIZES
from dit_accel.kernels.pyramid.log_linear_lists import log_linear_lists
from dit_accel.kernels.pyramid.means import Levels, curve_means
from dit_accel.kernels.pyramid.text import with_text_queries, without_padding

_TOP = 256  # blocks of the top level, at most, where ``levels`` is not given


@overload
def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: Tensor,
    top_k: int = 8,
    block: int = 16,
    levels: int | None = None,
    exclude_covered: bool = True,
    prefix: int = 0,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: ListBackend = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: Tensor,
    top_k: int = 8,
    block: int = 16,
    levels: int | None = None,
    exclude_covered: bool = True,
    prefix: int = 0,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: ListBackend = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def log_linear_attention(
    q: Tensor,  # [B, L, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    *,
    order: Tensor,  # int32 [N]
    top_k: int = 8,
    block: int = 16,
    levels: int | None = None,
    exclude_covered: bool = True,
    prefix: int = 0,
    text_lengths: Tensor | None = None,  # int32 [B]
    scale: float | None = None,
    backend: ListBackend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over some tokens and the means of all others: log-linear in the number of tokens.

    The curve is cut into blocks of ``block`` tokens, level 1; a block of level l holds ``block`` ones of level l - 1.
    Every block of the top level ranks all blocks there by the product of mean query and mean key and keeps the
    ``top_k`` best; from level to level its children choose among the children of what it kept. A query then sees

    - the tokens of the level 1 blocks that its own block chose,
    - of each level but the top, the means of the children of the blocks that its ancestor one level up chose,
    - the means of the whole top level,

    all in one softmax, where a mean weighs as many keys as it stands for: the log of that is added to its score.

    Args:
        q, k, v: queries, keys, values [batch, tokens, heads, head dim]; any strides.
        order: int32 [N], position in the sequence of the curve's n-th token, as ``prefix + curve_order(grid)``.
            The other positions are text: every query sees its keys, and text queries see every token.
        top_k: blocks that a block keeps, at least 1; all of a level that has no more. Default 8.
        block: 16, 32, 64 or 128, default 16.
        levels: default: as few as leave at most 256 blocks on the top level.
        exclude_covered: hide a mean from the queries that see what it stands for. Every token then counts once, and
            with ``top_k`` of all blocks this is dense attention. False is the published rule, which counts what is seen
            finely on every level above again; models trained with it need it. Default True.
        prefix: text tokens before the grid.
        text_lengths: valid text tokens per batch item, int32 [batch]; no query sees the rest. Default: all of them.
        scale: factor on the scores; default head_dim ** -0.5. The choice needs none.
        backend: of the attention over the chosen keys: "triton", "torch", "reference" or "auto".
        return_lse: also return the natural-log LSE of each query's scores, float32 [batch, heads, tokens]; that of text
            queries carries no gradient.

    Gradients reach q, k and v through tokens and means, not through the choice. Equal calls give equal bits; for the
    gradients of text queries, which torch's dense attention computes, under ``torch.use_deterministic_algorithms``.

    Returns:
        The output, shaped and typed as ``q``; with ``return_lse`` a pair (output, LSE).

    Raises:
        ValueError: shapes that do not fit, or options out of range.
    """
    _check(q, k, v, order, top_k, prefix, text_lengths)
    tokens = len(order)
    levels_of = Levels(tokens, block, depth_of(tokens, block, levels), q.shape[1] - tokens)
    mean_q, mean_k, mean_v = curve_means((q.detach(), k, v), order, levels_of, prefix)
    chosen = hierarchical_top_k(levels_of.split(mean_q), levels_of.split(mean_k.detach()), top_k, block)
    out, lse = list_attention(
        q,
        k,
        v,
        log_linear_lists(chosen, levels_of, exclude_covered),
        order=order,
        pooled=PooledKeys(mean_k, mean_v, _log_weights(levels_of, text_lengths, q.device)),
        scale=scale,
        backend=backend,
        return_lse=True,
    )
    out, row_lse = with_text_queries(
        q, k, v, out, lse if return_lse else None, order=order, prefix=prefix, text_lengths=text_lengths, scale=scale
    )
    return out if row_lse is None else (out, row_lse)


def depth_of(tokens: int, block: int, levels: int | None = None) -> int:
    """``levels``, or the fewest with at most 256 blocks on the top level; a ValueError if there cannot be as many."""
    if block not in SIZES:
        raise ValueError(f"block must be one of {', '.join(map(str, SIZES))}, got {block}.")
    fewest = next(level for level in itertools.count(1) if tokens <= _TOP * block**level)
    most = next(level for level in itertools.count(1) if tokens <= block**level)
    if levels is not None and not 1 <= levels <= most:
        raise ValueError(f"levels must be 1 to {most} for {tokens} tokens in blocks of {block}, got {levels}.")
    return fewest if levels is None else levels


def _log_weights(levels: Levels, text_lengths: Tensor | None, device: torch.device) -> Tensor:
    """Log of what each row of means and text stands for, float32 [B or 1, 1, 1, rows]."""
    weights = _shared_log_weights(levels, device)
    if text_lengths is None:
        return weights
    return without_padding(weights, levels.start(levels.depth + 1), levels.text, text_lengths)


@functools.lru_cache(maxsize=64)
def _shared_log_weights(levels: Levels, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for calls that have gradients
        weights = torch.zeros(1, levels.rows, device=device)
        for level, row in enumerate(levels.split(weights), 1):
            row.copy_(levels.tokens_per(level, device))
        text_start = levels.start(levels.depth + 1)
        weights[:, text_start : text_start + levels.text] = 1
        return weights.log()[:, None, None]


def _check(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, top_k: int, prefix: int, text_lengths: Tensor | None
) -> None:
    check_sequence(q, k, v, order)
    batch, length = q.shape[:2]
    if not 0 <= prefix <= length - len(order):
        raise ValueError(
            f"prefix must be 0 to {length - len(order)}, the positions that are not in order, got {prefix}."
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if text_lengths is not None and (text_lengths.shape != (batch,) or text_lengths.dtype != torch.int32):
        raise ValueError(
            f"text_lengths must be int32 of shape [{batch}], got {text_lengths.dtype} of {list(text_lengths.shape)}."
        )
