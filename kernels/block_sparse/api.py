"""The public operator: validation, and the backend that runs it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import backends, operator
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.kernels.block_sparse.inputs import Inputs, Precision
from dit_accel.kernels.block_sparse.plan import BlockPlan, PooledKeys


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    text_lengths: Tensor | None = None,
    pooled: PooledKeys | None = None,
    precision: Precision = "native",
    backend: Backend = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    text_lengths: Tensor | None = None,
    pooled: PooledKeys | None = None,
    precision: Precision = "native",
    backend: Backend = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,  # [B, L, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    plan: BlockPlan,
    *,
    scale: float | None = None,
    text_lengths: Tensor | None = None,  # int32 [B]
    pooled: PooledKeys | None = None,
    precision: Precision = "native",
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that ``plan`` keeps; text tokens see and are seen by everything.

    Args:
        q, k, v: queries, keys, values [batch, tokens, heads, head dim]; any strides, the host's layout as it is.
        plan: tiles and lists; its batch and head dimensions are broadcast.
        scale: factor on the scores; default head_dim ** -0.5.
        text_lengths: valid text tokens per batch item, int32 [batch], the rest of the text span is padding that no
            query sees; default all of them.
        pooled: the keys that the plan's pooled tiles name; every text token sees the sequence's own keys only.
        precision: "native" computes in the dtype of the inputs. For inference on Hopper, "fp8" rounds queries, keys,
            probabilities and values to float8 e4m3, with scales per tile and the keys' mean taken out; "int8" the
            same with int8 queries and keys, closer and a little slower.
        backend: "gluon" (Hopper), "triton" (any GPU), "torch" (anywhere), "reference" (eager oracle, full mask), or
            "auto": the first of gluon, triton and torch that can run the call. An explicit backend never falls back.
        return_lse: also return the natural-log LSE of each query's scores, [batch, heads, tokens], -inf (and a zero
            output) where a query has no keys.

    Gradients reach q, k, v and the pooled k and v, from the output and from the LSE; log weights have none. Gluon and
    Triton share one backward without atomics, so gradients repeat bit for bit. Second derivatives are refused.

    Returns:
        The output, shaped and typed as ``q``; with ``return_lse`` a pair (output, LSE).

    Raises:
        ValueError: inputs that do not fit the plan, or a backend that cannot run them.
    """
    _check(q, k, v, plan, text_lengths, pooled)
    plan = plan if plan.device == q.device else plan.to(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    text_lengths = None if text_lengths is None else text_lengths.contiguous()
    out, lse = operator.run(q, k, v, plan, scale, text_lengths, pooled, precision, backend, return_lse)
    return (out, lse) if return_lse else out


def can_run(backend: str, q: Tensor, plan: BlockPlan, *, raise_error: bool = False) -> bool:
    """Whether ``backend`` can run the plan on tensors like ``q``; with ``raise_error`` a ValueError says why not."""
    inputs = Inputs(q, q, q, plan, q.shape[-1] ** -0.5, gradients=torch.is_grad_enabled() and q.requires_grad)
    if raise_error:
        backends.check(backend, inputs)
    return backends.missing(backend, inputs) is None


def _check(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, text_lengths: Tensor | None, pooled: PooledKeys | None
) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must share one shape [batch, tokens, heads, head dim], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must share dtype and device, got {q.dtype}, {k.dtype}, {v.dtype} "
            f"on {q.device}, {k.device}, {v.device}."
        )
    batch, length, heads, _ = q.shape
    if length != plan.num_tokens:
        raise ValueError(f"the plan was made for {plan.num_tokens} tokens, got {length}.")
    if plan.counts.shape[0] not in (1, batch) or plan.counts.shape[1] not in (1, heads):
        raise ValueError(
            f"the plan's lists are for batch {plan.counts.shape[0]} and {plan.counts.shape[1]} heads, "
            f"got batch {batch} and {heads} heads."
        )
    lists = (plan.counts, plan.partial, plan.indices, *((plan.window.bounds,) if plan.window else ()))
    if not all(x.is_contiguous() for x in lists):
        raise ValueError("the plan's lists and window bounds must be contiguous, got strided views; copy them.")
    if text_lengths is not None and (text_lengths.shape != (batch,) or text_lengths.dtype != torch.int32):
        raise ValueError(
            f"text_lengths must be int32 of shape [{batch}], got {text_lengths.dtype} of {list(text_lengths.shape)}."
        )
    _check_pooled(q, plan, pooled)


def _check_pooled(q: Tensor, plan: BlockPlan, pooled: PooledKeys | None) -> None:
    if pooled is None:
        if plan.pooled:
            raise ValueError(f"the plan lists {plan.pooled} pooled keys, got none; pass pooled=PooledKeys(...).")
        return
    batch, _, heads, dim = q.shape
    want = [batch, plan.pooled, heads, dim]
    if list(pooled.k.shape) != want or list(pooled.v.shape) != want:
        raise ValueError(f"pooled k and v must have shape {want}, got {list(pooled.k.shape)}, {list(pooled.v.shape)}.")
    if not pooled.k.dtype == pooled.v.dtype == q.dtype or pooled.log_weights.dtype != torch.float32:
        raise ValueError(
            f"pooled k and v must be {q.dtype} and log_weights float32, "
            f"got {pooled.k.dtype}, {pooled.v.dtype} and {pooled.log_weights.dtype}."
        )
    full = (batch, heads, plan.tiles.num_tiles, plan.pooled)
    shape = pooled.log_weights.shape
    if len(shape) != 4 or any(got not in (1, size) for got, size in zip(shape[:3], full[:3], strict=True)):
        raise ValueError(
            f"log_weights must broadcast to {list(full)} (batch, heads, query tiles, keys), got {list(shape)}."
        )
    if shape[3] != plan.pooled:
        raise ValueError(f"log_weights must have one entry per pooled key, {plan.pooled}, got {shape[3]}.")
