"""The public operator: validation, choice of backend, one sentence when something cannot be."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.gather import gather_attention
from dit_accel.kernels.block_sparse.plan import BlockPlan
from dit_accel.kernels.block_sparse.reference import reference_attention

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "torch", "triton")

_LOG = logging.getLogger(__name__)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    text_lengths: Tensor | None = None,
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
        backend: "triton" (GPUs), "torch" (anywhere, differentiable), "reference" (eager oracle, full mask) or "auto":
            triton on a GPU, else torch. An explicit backend never falls back.
        return_lse: also return the natural-log LSE of each query's scores, [batch, heads, tokens], -inf (and a zero
            output) where a query has no keys.

    Returns:
        The output, shaped and typed as ``q``; with ``return_lse`` a pair (output, LSE).

    Raises:
        ValueError: inputs that do not fit the plan, or a backend that cannot run them.
    """
    _check(q, k, v, plan, text_lengths)
    if backend == "auto":
        backend = _choose(q, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan = plan if plan.device == q.device else plan.to(q.device)
    if backend == "triton":
        can_run_triton(q, plan, raise_error=True)
        from dit_accel.kernels.block_sparse.triton_forward import triton_attention

        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = triton_attention(q, k, v, plan, scale, text_lengths)
    elif backend == "torch":
        got = gather_attention(q, k, v, plan, scale, text_lengths, return_lse)
        if not return_lse:
            return got[0]
        return got  # type: ignore[return-value]
    elif backend == "reference":
        out, lse = reference_attention(q, k, v, plan, scale, text_lengths)
    else:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
    return (out, lse) if return_lse else out


def can_run_triton(q: Tensor, plan: BlockPlan, *, raise_error: bool = False) -> bool:
    """Whether the triton backend can run these inputs; with ``raise_error`` a ValueError says why not."""
    problem = None
    if importlib.util.find_spec("triton") is None:
        problem = "the package triton, which is not installed"
    elif not q.is_cuda and not _interpreted():
        problem = f"a GPU, got tensors on {q.device}"
    elif q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        problem = f"float16, bfloat16 or float32, got {q.dtype}"
    elif q.shape[-1] > 128:
        problem = f"a head dim of at most 128, got {q.shape[-1]}"
    elif plan.tiles.tile_size > 128:
        problem = f"tiles of at most 128 tokens, got {plan.tiles.tile_size}"
    elif torch.is_grad_enabled() and q.requires_grad:
        problem = "inputs without gradients, it has no backward"
    if problem and raise_error:
        raise ValueError(f"backend='triton' needs {problem}; use backend='torch'.")
    return problem is None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _choose(q: Tensor, plan: BlockPlan) -> Backend:
    chosen: Backend = "triton" if q.is_cuda and can_run_triton(q, plan) else "torch"
    _notice(chosen, q.device.type)
    return chosen


@functools.cache
def _notice(backend: str, device: str) -> None:
    _LOG.info("block-sparse attention runs on the %s backend (%s tensors).", backend, device)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, text_lengths: Tensor | None) -> None:
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
    if text_lengths is not None and text_lengths.shape != (batch,):
        raise ValueError(f"text_lengths must have shape [{batch}], got {list(text_lengths.shape)}.")
