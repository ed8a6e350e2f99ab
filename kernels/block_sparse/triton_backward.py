"""The Triton backward: dQ over the lists, dK and dV over the transposed ones; no atomics, so results repeat exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dit_accel.kernels.block_sparse import triton_forward
from dit_accel.kernels.block_sparse.inputs import Gradients, Inputs
from dit_accel.kernels.block_sparse.transpose import transpose_lists
from dit_accel.kernels.block_sparse.triton_backward_kernels import key_gradients, prepare, query_gradients
from dit_accel.kernels.block_sparse.triton_launch import Launch, choose, fit
from dit_accel.kernels.block_sparse.triton_tiles import (
    LOG2_E,
    list_strides,
    pack_entries,
    padded,
    pooled_rows,
    rule_flags,
    rule_sizes,
    unit_stride,
)


class Launches(NamedTuple):
    queries: Launch
    keys: Launch


# (compute capability major, padded head dim), 16-bit inputs; every entry is checked numerically on the GPU.
LAUNCHES = {
    (9, 64): Launches(Launch(64, 128, 4, 3), Launch(64, 32, 4, 3)),
    (9, 128): Launches(Launch(128, 128, 8, 2), Launch(128, 64, 8, 2)),
}
DEFAULT_LAUNCHES = {  # by the bytes of an element
    2: Launches(Launch(64, 32, 4, 1), Launch(64, 32, 4, 1)),
    4: Launches(Launch(32, 16, 8, 1), Launch(32, 16, 8, 1)),
}

needs = triton_forward.needs


class _Call(NamedTuple):
    """What both sides read: rows with unit channel stride, and what ``prepare`` left."""

    inputs: Inputs
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    stats: Tensor  # float32 [B, H, slots, 2]


class _Lists(NamedTuple):
    """The queries of each key tile, and all query tiles, which text keys walk.

    A span is where the tile's list starts, where its partial entries end, and where it ends.
    """

    spans: Tensor  # int32 [B or 1, H or 1, key tiles, 3]
    queries: Tensor  # int32 [B or 1, H or 1, *]
    entries: Tensor  # int64, of queries
    every: Tensor  # int32 [query tiles]
    every_entry: Tensor  # int64, of every


class _Keys(NamedTuple):
    """Whose gradients one launch makes: the sequence's keys or the pooled ones."""

    k: Tensor
    v: Tensor
    first_tile: int
    num_tiles: int
    text: int
    pooled: bool


def backward(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    launches: Launches | None = None,
) -> Gradients:
    """Gradients from what the forward returned, contiguous, and the gradients of both."""
    plan = inputs.plan
    q, k, v, grad = (unit_stride(x) for x in (inputs.q, inputs.k, inputs.v, grad_out))
    batch, length, heads, dim = q.shape
    block = padded(plan.tiles.tile_size)
    programs = triton.cdiv(inputs.text, block) + plan.tiles.num_tiles
    stats = torch.empty(batch, heads, programs * block, 2, dtype=torch.float32, device=q.device)
    prepare[(programs * heads * batch,)](
        out, grad, lse, lse if grad_lse is None else grad_lse.contiguous(), stats,
        *grad.stride()[:3], heads, length, *plan.tiles.grid, plan.tiles.num_tiles, plan.prefix, inputs.text,
        inputs.text_start, *plan.tiles.tile, block, dim, padded(dim), grad_lse is not None, num_warps=8,
    )  # fmt: skip
    call = _Call(inputs, q, k, v, grad, stats)
    of_queries, of_keys = launches or choose(LAUNCHES, DEFAULT_LAUNCHES, q)
    dq = _of_queries(call, of_queries)
    lists = _transposed(inputs)
    dk, dv = _of_keys(call, _Keys(k, v, 0, plan.tiles.num_tiles, inputs.text, False), lists, of_keys)
    if inputs.pooled is None:
        return Gradients(dq, dk, dv)
    first, count = plan.tiles.num_tiles, plan.num_key_tiles - plan.tiles.num_tiles
    pooled = _Keys(unit_stride(inputs.pooled.k), unit_stride(inputs.pooled.v), first, count, 0, True)
    return Gradients(dq, dk, dv, *_of_keys(call, pooled, lists, of_keys))


def _of_queries(call: _Call, launch: Launch) -> Tensor:
    inputs, plan = call.inputs, call.inputs.plan
    batch, length, heads, dim = call.q.shape
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    pooled_k, pooled_v, weights = pooled_rows(inputs)
    block, launch = fit(launch, plan.tiles)
    programs = (triton.cdiv(inputs.text, launch.rows) + plan.tiles.num_tiles * (block // launch.rows)) * heads * batch
    query_gradients[(programs,)](
        call.q, call.k, call.v, call.grad, call.stats, dq,
        pooled_k, pooled_v, weights, plan.counts, plan.partial, pack_entries(plan.indices, plan.tiles),
        *_side_tensors(inputs),
        *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3], *call.grad.stride()[:3],
        *pooled_k.stride()[:3], *pooled_v.stride()[:3], *weights.stride()[:3],
        *list_strides(plan.counts), plan.indices.shape[-1], inputs.scale, inputs.scale * LOG2_E,
        heads, length, *plan.tiles.grid, plan.tiles.num_tiles, plan.pooled, plan.prefix, inputs.text,
        inputs.text_start, *rule_sizes(plan), *plan.tiles.tile, block, launch.rows, launch.columns, dim,
        padded(dim), *rule_flags(plan), inputs.text_lengths is not None, inputs.pooled is not None, _precision(call.q),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return dq


def _transposed(inputs: Inputs) -> _Lists:
    plan = inputs.plan
    starts, cut, queries = transpose_lists(plan.counts, plan.partial, plan.indices, plan.num_key_tiles)
    spans = torch.stack([starts[..., :-1], starts[..., :-1] + cut, starts[..., 1:]], -1)
    every = torch.arange(plan.tiles.num_tiles, dtype=torch.int32, device=queries.device)
    return _Lists(spans, queries, pack_entries(queries, plan.tiles), every, pack_entries(every, plan.tiles))


def _of_keys(call: _Call, keys: _Keys, lists: _Lists, launch: Launch) -> tuple[Tensor, Tensor]:
    """dK and dV of one side's keys."""
    inputs, plan = call.inputs, call.inputs.plan
    batch, _, heads, dim = call.q.shape
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in keys[:2])
    _, _, weights = pooled_rows(inputs)
    block, launch = fit(launch, plan.tiles)
    flags = (False, False, False, False) if keys.pooled else rule_flags(plan)
    ragged = plan.tiles.tile_size != block or any(g % t for g, t in zip(plan.tiles.grid, plan.tiles.tile, strict=True))
    programs = (triton.cdiv(keys.text, launch.rows) + keys.num_tiles * (block // launch.rows)) * heads * batch
    key_gradients[(programs,)](
        call.q, keys.k, keys.v, call.grad, call.stats, dk, dv,
        weights, *lists, *_side_tensors(inputs),
        *call.q.stride()[:3], *keys.k.stride()[:3], *keys.v.stride()[:3], *call.grad.stride()[:3],
        *weights.stride()[:3], *list_strides(lists.spans), *list_strides(lists.queries),
        inputs.scale, inputs.scale * LOG2_E,
        heads, keys.k.shape[1], *plan.tiles.grid, keys.first_tile, keys.num_tiles, plan.tiles.num_tiles, plan.prefix,
        inputs.text, keys.text, inputs.text_start, *rule_sizes(plan), *plan.tiles.tile, block, launch.rows,
        launch.columns, dim, padded(dim), ragged, *flags, inputs.text_lengths is not None,
        keys.pooled, _precision(call.q),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return dk, dv


def _side_tensors(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Window bounds and text lengths; without them any tensor, which the kernels do not read."""
    counts, window = inputs.plan.counts, inputs.plan.window
    return (
        counts if window is None else window.bounds,
        counts if inputs.text_lengths is None else inputs.text_lengths,
    )


def _precision(q: Tensor) -> str | None:
    return "ieee" if q.dtype == torch.float32 else None
