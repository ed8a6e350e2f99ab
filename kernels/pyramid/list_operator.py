"""List attention as the dispatcher knows it: flat arguments, shapes for tracing, its gradients, and its backends.

A compiled graph holds one node per call. Lists, order and pooled keys are its inputs, so that another layer or step of
the same shape runs the same graph; which backend runs is decided inside.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import PooledKeys
from dit_accel.kernels.block_sparse.recompute import differentiated
from dit_accel.kernels.pyramid.lists import BlockLists, ListInputs

ListBackend = Literal["auto", "reference", "torch", "triton"]

_LOG = logging.getLogger(__name__)
_MODULES = {"reference": "list_reference", "torch": "list_gather", "triton": "triton_list_forward"}


class _Call(NamedTuple):
    """What a call brings besides q, k and v, tensors first."""

    lists: list[Tensor]  # counts, pooled, indices and hidden of every pass, hidden empty where nothing is
    order: Tensor
    pooled_k: Tensor | None
    pooled_v: Tensor | None
    log_weights: Tensor | None
    rows: list[int]  # of every pass
    block: int
    scale: float
    backend: str


_CALL = (
    "Tensor[] lists, Tensor order, Tensor? pooled_k, Tensor? pooled_v, Tensor? log_weights, "
    "int[] rows, int block, float scale, str backend"
)
_LIBRARY = torch.library.Library("dit_accel", "FRAGMENT")
_LIBRARY.define(f"list_attention_forward(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "list_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
    f"Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def run(inputs: ListInputs, backend: str) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, N]."""
    flat = []
    for lists in inputs.lists:
        hidden = lists.counts.new_empty(0) if lists.hidden is None else lists.hidden
        flat += [lists.counts, lists.pooled, lists.indices, hidden]
    rows = [lists.rows for lists in inputs.lists]
    pooled = inputs.pooled or (None, None, None)
    call = (flat, inputs.order, *pooled, rows, inputs.block, inputs.scale, backend)
    results: tuple[Tensor, Tensor] = torch.ops.dit_accel.list_attention_forward(inputs.q, inputs.k, inputs.v, *call)
    return results


def _inputs(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> ListInputs:
    lists = []
    for i, rows in enumerate(call.rows):
        counts, first, indices, hidden = (x.contiguous() for x in call.lists[4 * i : 4 * i + 4])
        lists.append(BlockLists(rows, call.block, counts, first, indices, hidden if hidden.ndim > 1 else None))
    pooled = PooledKeys.detached(call.pooled_k, call.pooled_v, call.log_weights)
    order = call.order.contiguous()
    return ListInputs(q.detach(), k.detach(), v.detach(), tuple(lists), order, pooled, call.scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call._make(arguments)
    inputs = _inputs(q, k, v, call)
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        out, lse = _module(_MODULES[_resolve(call.backend, inputs)]).forward(inputs)
    return out.contiguous(), lse.contiguous()


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, _, heads, _ = q.shape
    tokens = _Call._make(arguments).order.shape[0]
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=lse_dtype)


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
    call = _Call._make(arguments)
    inputs = _inputs(q, k, v, call)
    backend = _resolve(call.backend, inputs)
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            grad_out = out.new_zeros(()).expand(out.shape) if grad_out is None else grad_out
            found = _module("triton_list_backward").backward(inputs, out, lse, grad_out, grad_lse)
        else:
            found = _recomputed(_module(_MODULES[backend]), inputs, (grad_out, grad_lse))
    empty = [q.new_empty(0)] * (5 - len(found))
    return *(x.contiguous() for x in found), *empty


def _recomputed(module: ModuleType, inputs: ListInputs, gradients: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Gradients of q, k, v and the pooled k and v of a backend of plain torch code."""
    pooled = inputs.pooled

    def run(q: Tensor, k: Tensor, v: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        keys = pooled and PooledKeys(rows[0], rows[1], pooled.log_weights)
        results: tuple[Tensor, Tensor] = module.forward(replace(inputs, q=q, k=k, v=v, pooled=keys))
        return results

    return differentiated(run, (inputs.q, inputs.k, inputs.v, *(pooled[:2] if pooled else ())), gradients)


def _backward_shapes(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    q, call = arguments[0], _Call._make(arguments[3:])
    pooled = [q.new_empty(0 if call.pooled_k is None else call.pooled_k.shape) for _ in range(2)]
    return *(q.new_empty(q.shape) for _ in range(3)), *pooled


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *arguments = inputs
    call = _Call._make(arguments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *call[1:5], *call.lists)
    ctx.rest = call[5:]


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, order, *pooled_keys = ctx.saved_tensors
    (pooled_k, pooled_v, log_weights), lists = pooled_keys[:3], pooled_keys[3:]
    dq, dk, dv, *pooled = torch.ops.dit_accel.list_attention_backward(
        grad_out, grad_lse, out, lse, q, k, v, lists, order, pooled_k, pooled_v, log_weights, *ctx.rest
    )
    if pooled_k is None:
        pooled = [None, None]
    return dq, dk, dv, [None] * len(lists), None, *pooled, *[None] * (1 + len(ctx.rest))


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("list_attention has first derivatives only, got create_graph=True; leave it out.")


def check_backend(q: Tensor, backend: ListBackend) -> None:
    """Raise a ValueError if ``backend`` cannot run calls on tensors like ``q``; "auto" always can."""
    if backend != "auto":
        _resolve(backend, ListInputs(q, q, q, (), q.new_empty(0), None, 1.0))


def _resolve(backend: str, inputs: ListInputs) -> str:
    """The backend that runs these inputs; a ValueError if ``backend`` is not "auto" and cannot."""
    if backend == "auto":
        chosen = "triton" if inputs.q.is_cuda and _missing("triton", inputs) is None else "torch"
        _notice(chosen, inputs.q.device.type)
        return chosen
    if backend not in _MODULES:
        raise ValueError(f"backend must be one of auto, {', '.join(_MODULES)}, got {backend!r}.")
    clause = _missing(backend, inputs)
    if clause:
        raise ValueError(f"backend={backend!r} needs {clause}; use backend='auto'.")
    return backend


def _missing(backend: str, inputs: ListInputs) -> str | None:
    """What ``backend`` lacks to run these inputs, one clause; None if nothing."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed"
    clause: str | None = _module(_MODULES[backend]).needs(inputs)
    return clause


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"dit_accel.kernels.pyramid.{name}")


@functools.cache
def _notice(backend: str, device: str) -> None:
    _LOG.info("attention over block lists runs on the %s backend (%s tensors).", backend, device)


for _name, _implementation, _shapes in (
    ("list_attention_forward", _forward, _forward_shapes),
    ("list_attention_backward", _backward, _backward_shapes),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dit_accel::{_name}", _shapes, lib=_LIBRARY)
torch.library.register_autograd("dit_accel::list_attention_forward", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("dit_accel::list_attention_backward", _refuse, lib=_LIBRARY)
