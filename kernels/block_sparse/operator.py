"""The operator as the dispatcher knows it: flat arguments, shapes for tracing, and its gradients.

A compiled graph holds one node per call. Plans, text lengths and pooled keys are its inputs, so that another layer,
step or plan of the same shape runs the same graph; which backend runs is decided inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import backends
from dit_accel.kernels.block_sparse.inputs import Inputs, Precision
from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, PooledKeys, TileGrid, Triple


class Call(NamedTuple):
    """What a call brings besides q, k and v, tensors first."""

    counts: Tensor
    partial: Tensor
    indices: Tensor
    bounds: Tensor | None
    text_lengths: Tensor | None
    pooled_k: Tensor | None
    pooled_v: Tensor | None
    log_weights: Tensor | None
    grid: Triple
    tile: Triple
    prefix: int
    suffix: int
    dilation: Triple
    union: bool
    radius: int | None
    scale: float
    backend: str
    precision: Precision


_TENSORS = 8  # of a Call
_CALL = (
    "Tensor counts, Tensor partial, Tensor indices, Tensor? bounds, Tensor? text_lengths, "
    "Tensor? pooled_k, Tensor? pooled_v, Tensor? log_weights, "
    "SymInt[] grid, SymInt[] tile, SymInt prefix, SymInt suffix, SymInt[] dilation, bool union, SymInt? radius, "
    "float scale, str backend, str precision"
)
# Not by torch.library.custom_op, which adds a frame of Python to every call.
_LIBRARY = torch.library.Library("dit_accel", "FRAGMENT")
_LIBRARY.define(
    f"block_sparse_forward(Tensor q, Tensor k, Tensor v, {_CALL}, bool with_lse, bool gradients) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "block_sparse_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
    f"Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# Plans of eager calls by the identity of their lists: what a backend keeps about a plan is found again.
_PLANS: weakref.WeakValueDictionary[int, BlockPlan] = weakref.WeakValueDictionary()


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    text_lengths: Tensor | None,
    pooled: PooledKeys | None,
    precision: Precision,
    backend: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, L], this one empty unless it is asked for or gradients need it."""
    if not torch.compiler.is_compiling():
        _PLANS[id(plan.indices)] = plan
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if pooled is not None and torch.is_grad_enabled():
        gradients = gradients or pooled.k.requires_grad or pooled.v.requires_grad
    lists, shape = _described(plan)
    call = (*lists, text_lengths, *(pooled or (None, None, None)), *shape, scale, backend, precision)
    results: tuple[Tensor, Tensor] = torch.ops.dit_accel.block_sparse_forward(
        q, k, v, *call, with_lse or gradients, gradients
    )
    return results


def _described(plan: BlockPlan) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors and shape of a plan, as they stand in a ``Call``."""
    window, tiles = plan.window, plan.tiles
    bounds, dilation, union, radius = None, (1, 1, 1), False, None
    if window is not None:
        bounds, dilation, union, radius = window.bounds, window.dilation, window.union, window.radius
    lists = (plan.counts, plan.partial, plan.indices, bounds)
    return lists, (tiles.grid, tiles.tile, plan.prefix, plan.suffix, dilation, union, radius)


def _call(arguments: Sequence[Any]) -> Call:
    """The arguments as they come from the dispatcher, which makes lists of tuples."""
    return Call._make(tuple(x) if isinstance(x, list) else x for x in arguments)


def _plan(call: Call) -> BlockPlan:
    pooled = 0 if call.pooled_k is None else call.pooled_k.shape[1]
    known = _PLANS.get(id(call.indices))
    if known is not None and known.pooled == pooled:
        lists, shape = _described(known)
        same_lists = all(mine is given for mine, given in zip(lists, call, strict=False))
        if same_lists and shape == call[_TENSORS : _TENSORS + len(shape)]:
            return known
    window = None if call.bounds is None else AxisWindows(call.bounds, call.dilation, call.union, call.radius)
    counts, partial, indices = (x.contiguous() for x in (call.counts, call.partial, call.indices))
    return BlockPlan(TileGrid(call.grid, call.tile), counts, partial, indices, call.prefix, call.suffix, window, pooled)


def _inputs(q: Tensor, k: Tensor, v: Tensor, call: Call, with_lse: bool, gradients: bool) -> Inputs:
    pooled = PooledKeys.detached(call.pooled_k, call.pooled_v, call.log_weights)
    q, k, v = q.detach(), k.detach(), v.detach()
    return Inputs(q, k, v, _plan(call), call.scale, call.text_lengths, pooled, with_lse, gradients, call.precision)


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *flat, with_lse, gradients = arguments
    call = _call(flat)
    inputs = _inputs(q, k, v, call, with_lse, gradients)
    # Autocast would round the products of the backends that are written in torch.
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        out, lse = backends.load(backends.resolve(call.backend, inputs)).forward(inputs)
    return out.contiguous(), q.new_empty(0) if lse is None or not with_lse else lse.contiguous()


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    with_lse = arguments[-2]
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=lse_dtype) if with_lse else q.new_empty(0)


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    call = _call(arguments)
    inputs = _inputs(q, k, v, call, True, True)
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        gradients = backends.gradients(backends.resolve(call.backend, inputs), inputs, out, lse, grad_out, grad_lse)
    return tuple(q.new_empty(0) if x is None else x.contiguous() for x in gradients)


def _backward_shapes(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    q, call = arguments[0], _call(arguments[3:])
    pooled = q.new_empty(0 if call.pooled_k is None else call.pooled_k.shape)
    return *(q.new_empty(q.shape) for _ in range(3)), pooled, torch.empty_like(pooled)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *flat = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *flat[:_TENSORS])
    ctx.rest = flat[_TENSORS:-2]


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    dq, dk, dv, *pooled = torch.ops.dit_accel.block_sparse_backward(
        grad_out, grad_lse, out, lse, q, k, v, *tensors, *ctx.rest
    )
    given = dict(zip(Call._fields, tensors, strict=False))
    of_call = dict.fromkeys(Call._fields)
    if given["pooled_k"] is not None:
        of_call["pooled_k"], of_call["pooled_v"] = pooled
    return dq, dk, dv, *of_call.values(), None, None


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("block_sparse_attention has first derivatives only, got create_graph=True; leave it out.")


for _name, _implementation, _shapes in (
    ("block_sparse_forward", _forward, _forward_shapes),
    ("block_sparse_backward", _backward, _backward_shapes),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dit_accel::{_name}", _shapes, lib=_LIBRARY)
torch.library.register_autograd("dit_accel::block_sparse_forward", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("dit_accel::block_sparse_backward", _refuse, lib=_LIBRARY)
