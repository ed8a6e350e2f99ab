"""The Triton backward over block lists: dQ by query rows, dK and dV by pieces of the transposed lists; no atomics."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dit_accel.kernels.block_sparse.triton_launch import Launch, choose
from dit_accel.kernels.block_sparse.triton_tiles import LOG2_E, list_strides, padded, unit_stride
from dit_accel.kernels.pyramid.lists import BlockLists, ListInputs
from dit_accel.kernels.pyramid.triton_list_backward_kernels import (
    list_key_gradients,
    list_prepare,
    list_query_gradients,
    sum_pieces,
)
from dit_accel.kernels.pyramid.triton_list_forward import Launches, fit, pooled_rows, precision
from dit_accel.kernels.pyramid.triton_list_pieces import Pieces, pieces_of
from dit_accel.kernels.pyramid.triton_list_rows import index_type

PIECE_ROWS = 1024  # query rows of a piece of a key block's queries


class BackwardLaunches(NamedTuple):
    """Of dQ, and of dK and dV; key blocks of fewer rows than ``keys`` has take warps in proportion."""

    queries: Launches
    keys: Launch


# (compute capability major, padded head dim), 16-bit inputs; every entry is checked numerically on the GPU.
LAUNCHES = {
    (9, 64): BackwardLaunches(Launches(Launch(64, 32, 4, 2), Launch(16, 32, 1, 2)), Launch(64, 32, 4, 3)),
    (9, 128): BackwardLaunches(Launches(Launch(64, 32, 4, 2), Launch(16, 32, 1, 1)), Launch(64, 32, 8, 1)),
}
DEFAULT_LAUNCHES = {  # by the bytes of an element
    2: BackwardLaunches(Launches(Launch(64, 32, 4, 1), Launch(16, 32, 1, 1)), Launch(64, 32, 8, 1)),
    4: BackwardLaunches(Launches(Launch(32, 16, 4, 1), Launch(16, 16, 1, 1)), Launch(32, 16, 8, 1)),
}


class _Call(NamedTuple):
    """What the kernels of both sides read: rows with unit channel stride, and what ``list_prepare`` left."""

    inputs: ListInputs
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    shift: Tensor  # float32 [B, H, N]
    delta: Tensor  # float32 [B, H, N]

    @property
    def rows(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.grad, self.shift, self.delta

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(stride for x in self.rows[:4] for stride in x.stride()[:3])


class _KeySums(NamedTuple):
    """Where gradients of keys go: a piece's sums, or the results."""

    sums_k: Tensor
    sums_v: Tensor
    dk: Tensor
    dv: Tensor
    pooled_dk: Tensor  # any tensor without pooled keys
    pooled_dv: Tensor


def backward(
    inputs: ListInputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    launches: BackwardLaunches | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of the pooled k and v if there are any, from what the forward returned, contiguous."""
    q, k, v, grad = (unit_stride(x) for x in (inputs.q, inputs.k, inputs.v, grad_out))
    batch, length, heads, dim = q.shape
    shift, delta = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device)
    list_prepare[(triton.cdiv(inputs.tokens, 64) * heads * batch,)](
        out, grad, lse, lse if grad_lse is None else grad_lse.contiguous(), inputs.order, shift, delta,
        *grad.stride()[:3], heads, length, inputs.tokens, 64, dim, padded(dim), grad_lse is not None, num_warps=4,
    )  # fmt: skip
    launches = launches or choose(LAUNCHES, DEFAULT_LAUNCHES, q)
    call = _Call(inputs, q, k, v, grad, shift, delta)
    return query_gradients(call, launches.queries), *key_gradients(call, launches.keys)


def query_gradients(call: _Call, launches: Launches) -> Tensor:
    """dQ."""
    inputs = call.inputs
    batch, length, heads, dim = call.q.shape
    dq = _rows_of_sequence(inputs)
    last = len(inputs.lists) - 1
    part = torch.empty(batch, heads, inputs.tokens if last else 0, dim, dtype=torch.float32, device=dq.device)
    pooled_k, pooled_v, weights = pooled_rows(inputs)
    for number, lists in enumerate(inputs.lists):
        rows, launch = fit(launches, lists)
        list_query_gradients[(triton.cdiv(inputs.tokens, rows) * heads * batch,)](
            *call.rows, dq, part, pooled_k, pooled_v, weights,
            inputs.order, lists.counts, lists.pooled, lists.indices,
            lists.indices if lists.hidden is None else lists.hidden,
            *call.strides, *pooled_k.stride()[:3], *pooled_v.stride()[:3],
            *list_strides(weights), *list_strides(lists.counts), lists.indices.shape[-1],
            inputs.scale, inputs.scale * LOG2_E, heads, length, inputs.tokens, inputs.key_blocks,
            lists.rows, lists.block, rows, launch.columns, dim, padded(dim), number == 0, number == last,
            inputs.pooled is not None, lists.hidden is not None,
            index_type(call.k, call.v, pooled_k, pooled_v), precision(call.q),
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return dq


def key_gradients(call: _Call, launch: Launch) -> tuple[Tensor, ...]:
    """dK and dV, and those of the pooled keys if there are any."""
    inputs = call.inputs
    batch, length, heads, dim = call.q.shape
    blocks = inputs.key_blocks + inputs.pooled_keys // inputs.block
    cut = pieces_of(inputs.lists, blocks, PIECE_ROWS)
    number = [each.pieces * (batch // each.items) * (heads // each.heads) for each in cut.passes]
    first_sums = [0, number[0]]
    sums = torch.empty(2, sum(number), inputs.block, dim, dtype=torch.float32, device=call.q.device)
    dk, dv = _rows_of_sequence(inputs), _rows_of_sequence(inputs)
    pooled = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (inputs.pooled or ())[:2]]
    pooled_dk, pooled_dv = pooled or (dk, dv)
    results = _KeySums(sums[0], sums[1], dk, dv, pooled_dk, pooled_dv)
    for place, lists in enumerate(inputs.lists):
        _sum_within_pieces(call, lists, cut, place, results, number[place], first_sums[place], launch)
    spans = [
        (each.items, each.heads, each.first_row, each.pieces, first_sum)
        for each, first_sum in zip((cut.passes[0], cut.passes[-1]), first_sums, strict=True)
    ]
    sum_pieces[(blocks * (inputs.block // 16) * heads * batch,)](
        *results[:2], cut.first, inputs.order, *results[2:],
        inputs.scale, heads, length, inputs.tokens, inputs.key_blocks, blocks, *spans[0], *spans[1],
        len(cut.passes), inputs.block, dim, padded(dim), num_warps=2,
    )  # fmt: skip
    return dk, dv, *pooled


def _sum_within_pieces(
    call: _Call, lists: BlockLists, cut: Pieces, place: int, results: _KeySums, count: int, first: int, launch: Launch
) -> None:
    inputs = call.inputs
    length, heads, dim = call.q.shape[1:]
    pooled_k, pooled_v, weights = pooled_rows(inputs)
    rows = min(launch.rows, lists.block)
    kept = lists.indices.shape[-1]
    each, other = cut.passes[place], cut.passes[-1 - place]
    list_key_gradients[(count * (lists.block // rows),)](
        *call.rows, *results[:2], pooled_k, pooled_v, weights, inputs.order, *results[2:],
        cut.entries, cut.starts, cut.first, cut.owners, lists.indices if lists.hidden is None else lists.hidden,
        *call.strides, *pooled_k.stride()[:3], *pooled_v.stride()[:3], *list_strides(weights),
        inputs.scale, inputs.scale * LOG2_E, heads, length, inputs.tokens, inputs.key_blocks,
        inputs.key_blocks + inputs.pooled_keys // inputs.block,
        each.items, each.heads, each.first_row, each.first_entry, each.pieces, lists.counts.shape[2] * kept, kept,
        first, other.items, other.heads, other.first_row, len(cut.passes),
        lists.rows, lists.block, rows, launch.columns, each.longest, dim, padded(dim),
        inputs.pooled is not None, lists.hidden is not None, index_type(call.q, call.grad), precision(call.q),
        num_warps=max(1, launch.num_warps * rows // launch.rows), num_stages=launch.num_stages,
    )  # fmt: skip


def _rows_of_sequence(inputs: ListInputs) -> Tensor:
    """Room for [B, L, H, D], zeros where positions are not on the curve."""
    q = inputs.q
    allocate = torch.empty if inputs.tokens == q.shape[1] else torch.zeros
    return allocate(q.shape, dtype=q.dtype, device=q.device)
