"""Attention over block lists: the public function and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import PooledKeys
from dit_accel.kernels.pyramid import list_operator
from dit_accel.kernels.pyramid.list_operator import ListBackend
from dit_accel.kernels.pyramid.lists import BlockLists, ListInputs


@overload
def list_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[BlockLists],
    *,
    order: Tensor,
    pooled: PooledKeys | None = None,
    scale: float | None = None,
    backend: ListBackend = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def list_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[BlockLists],
    *,
    order: Tensor,
    pooled: PooledKeys | None = None,
    scale: float | None = None,
    backend: ListBackend = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def list_attention(
    q: Tensor,  # [B, L, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    lists: Sequence[BlockLists],
    *,
    order: Tensor,  # int32 [N]
    pooled: PooledKeys | None = None,
    scale: float | None = None,
    backend: ListBackend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax per query over all the keys that its block's lists name, blocks being runs along a curve.

    Args:
        q, k, v: queries, keys, values [batch, tokens, heads, head dim]; any strides, the host's layout as it is.
        lists: one or two passes over different keys, with equal key blocks and query blocks of any size; a long list
            that many queries share and a short one that few share each take the block that suits them.
        order: int32 [N], position in the sequence of the curve's n-th token, no position twice. Positions that are not
            in it, text say, are neither queries nor keys.
        pooled: keys that stand for many, as many as fill whole blocks (pad them with finite rows of log weight -inf);
            log weights [B or 1, H or 1, 1, P].
        scale: factor on the scores; default head_dim ** -0.5.
        backend: "triton" (any GPU), "torch" (anywhere), "reference" (eager oracle, full mask), or "auto": triton on a
            GPU, torch elsewhere. An explicit backend never falls back.
        return_lse: also return the natural-log LSE of each query's scores, [batch, heads, N] along the curve, -inf (and
            a zero output) where a query has no keys.

    Gradients reach q, k, v and the pooled k and v, from the output and from the LSE; log weights have none. There are
    no atomics, so results repeat bit for bit. Second derivatives are refused.

    Returns:
        The output, shaped and typed as ``q``, 0 at positions that are not in ``order``; with ``return_lse`` a pair
        (output, LSE).

    Raises:
        ValueError: inputs that do not fit the lists, or a backend that cannot run them.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = ListInputs(q, k, v, tuple(lists), order, pooled, scale)
    _check(inputs)
    out, lse = list_operator.run(inputs, backend)
    return (out, lse) if return_lse else out


def check_sequence(q: Tensor, k: Tensor, v: Tensor, order: Tensor) -> None:
    """Raise a ValueError unless q, k and v are alike and ``order`` can be one of their positions."""
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must share one shape [batch, tokens, heads, head dim], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if order.ndim != 1 or order.dtype != torch.int32 or not 1 <= len(order) <= q.shape[1]:
        raise ValueError(
            f"order must be int32 with 1 to {q.shape[1]} positions, got {order.dtype} of {list(order.shape)}."
        )


def _check(inputs: ListInputs) -> None:
    q, k, v, order = inputs.q, inputs.k, inputs.v, inputs.order
    check_sequence(q, k, v, order)
    if not 1 <= len(inputs.lists) <= 2 or any(x.block != inputs.block for x in inputs.lists):
        raise ValueError(
            "lists must be one or two passes with equal key blocks, "
            f"got blocks of {', '.join(str(x.block) for x in inputs.lists) or 'none'}."
        )
    for lists in inputs.lists:
        _check_lists(inputs, lists)
    _check_pooled(inputs)
    others = [k, v, order, *(x for lists in inputs.lists for x in lists.tensors), *(inputs.pooled or ())]
    elsewhere = next((x.device for x in others if x.device != q.device), None)
    if elsewhere is not None:
        raise ValueError(f"all tensors must be on the device of q, {q.device}, got one on {elsewhere}; move it.")


def _check_lists(inputs: ListInputs, lists: BlockLists) -> None:
    batch, _, heads, _ = inputs.q.shape
    items, lists_heads, blocks = lists.counts.shape
    if items not in (1, batch) or lists_heads not in (1, heads):
        raise ValueError(
            f"the lists are for batch {items} and {lists_heads} heads, got batch {batch} and {heads} heads."
        )
    if blocks != -(-inputs.tokens // lists.rows):
        raise ValueError(
            f"lists of {lists.rows} rows over {inputs.tokens} tokens must have {-(-inputs.tokens // lists.rows)} "
            f"query blocks, got {blocks}."
        )


def _check_pooled(inputs: ListInputs) -> None:
    q, pooled = inputs.q, inputs.pooled
    if pooled is None:
        return
    batch, _, heads, dim = q.shape
    shape = pooled.k.shape
    if pooled.v.shape != shape or [*shape[:1], *shape[2:]] != [batch, heads, dim] or shape[1] % inputs.block:
        raise ValueError(
            f"pooled k and v must have shape [{batch}, a multiple of {inputs.block}, {heads}, {dim}], "
            f"got {list(shape)} and {list(pooled.v.shape)}."
        )
    weights = pooled.log_weights
    if weights.ndim != 4 or weights.shape[2:] != (1, shape[1]) or not _broadcasts(weights, batch, heads):
        raise ValueError(
            f"log_weights must have shape [{batch} or 1, {heads} or 1, 1, {shape[1]}], got {list(weights.shape)}."
        )
    if not pooled.k.dtype == pooled.v.dtype == q.dtype or weights.dtype != torch.float32:
        raise ValueError(
            f"pooled k and v must be {q.dtype} and log_weights float32, "
            f"got {pooled.k.dtype}, {pooled.v.dtype} and {weights.dtype}."
        )


def _broadcasts(x: Tensor, batch: int, heads: int) -> bool:
    return x.shape[0] in (1, batch) and x.shape[1] in (1, heads)
