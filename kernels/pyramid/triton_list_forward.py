"""The Triton backend: one program per run of query rows along the curve, head and batch item.

Two passes, over a list that many queries share and over short ones of 16 queries each, run in one program; others in
one kernel after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dit_accel.kernels.block_sparse.triton_launch import Launch, choose
from dit_accel.kernels.block_sparse.triton_tiles import LOG2_E, list_strides, padded, unit_stride
from dit_accel.kernels.pyramid.lists import BlockLists, ListInputs
from dit_accel.kernels.pyramid.triton_list_forward_kernels import list_forward, list_forward_both
from dit_accel.kernels.pyramid.triton_list_rows import index_type


class Launches(NamedTuple):
    """For query blocks of at least 64 rows, and for smaller ones; columns are keys per step, of any blocks."""

    wide: Launch
    narrow: Launch


class BothLaunch(NamedTuple):
    """For both passes in one program: as a pass of its rows, keys per step of each near list, registers at most."""

    wide: Launch
    near_columns: int
    registers: int | None = None


# (compute capability major, padded head dim), 16-bit inputs; every entry is checked numerically on the GPU.
LAUNCHES = {
    (9, 64): Launches(Launch(64, 128, 4, 2), Launch(16, 32, 1, 3)),
    (9, 128): Launches(Launch(64, 64, 4, 2), Launch(16, 32, 1, 2)),
}
DEFAULT_LAUNCHES = {  # by the bytes of an element
    2: Launches(Launch(64, 64, 4, 2), Launch(16, 32, 1, 1)),
    4: Launches(Launch(64, 32, 8, 1), Launch(16, 16, 1, 1)),
}
BOTH_LAUNCHES = {
    (9, 64): BothLaunch(Launch(64, 64, 4, 2), 32, 128),
    (9, 128): BothLaunch(Launch(64, 32, 4, 2), 16, 168),
}
DEFAULT_BOTH_LAUNCHES = {
    2: BothLaunch(Launch(64, 32, 4, 1), 16),
    4: BothLaunch(Launch(64, 16, 16, 1), 16),
}
NEAR_ROWS = 16  # of the second pass, if one program takes both


def needs(inputs: ListInputs) -> str | None:
    q = inputs.q
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        return f"a GPU, got tensors on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"float16, bfloat16 or float32, got {q.dtype}"
    return None if q.shape[-1] <= 256 else f"a head dim of at most 256, got {q.shape[-1]}"


def forward(inputs: ListInputs, launches: Launches | BothLaunch | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, N] in float32."""
    q, k, v = (unit_stride(x) for x in (inputs.q, inputs.k, inputs.v))
    batch, length, heads, dim = q.shape
    allocate = torch.empty if inputs.tokens == length else torch.zeros  # positions off the curve
    out = allocate(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, inputs.tokens, dtype=torch.float32, device=q.device)
    pooled_k, pooled_v, weights = pooled_rows(inputs)
    call = (
        q, k, v, out, lse, pooled_k, pooled_v, weights, inputs.order,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *pooled_k.stride()[:3], *pooled_v.stride()[:3],
        *list_strides(weights), inputs.scale * LOG2_E, heads, length, inputs.tokens, inputs.key_blocks,
    )  # fmt: skip
    constants = dim, padded(dim), inputs.pooled is not None, index_type(q, k, v, pooled_k, pooled_v), precision(q)

    def programs(rows: int) -> tuple[int]:
        return (triton.cdiv(inputs.tokens, rows) * heads * batch,)

    if launches is None:
        launches = _choose(inputs)
    if isinstance(launches, BothLaunch):
        rows, columns, warps, stages = launches.wide
        limit = {"maxnreg": launches.registers} if launches.registers else {}  # not every GPU's compiler knows it
        list_forward_both[programs(rows)](
            *call, *_list_arguments(inputs.lists[0]), *_list_arguments(inputs.lists[1]),
            inputs.block, rows, columns, *constants, launches.near_columns, num_warps=warps, num_stages=stages, **limit,
        )  # fmt: skip
        return out, lse
    for number, lists in enumerate(inputs.lists):
        rows, launch = fit(launches, lists)
        list_forward[programs(rows)](
            *call, *_list_arguments(lists), inputs.block, rows, launch.columns, *constants, number == 0,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out, lse


def _choose(inputs: ListInputs) -> Launches | BothLaunch:
    """One program for both passes where its tables have a launch and its lists divide its rows."""
    rows = [lists.rows for lists in inputs.lists]
    if len(rows) == 2 and rows[0] >= 64 and rows[1] == NEAR_ROWS and padded(inputs.q.shape[-1]) <= 128:
        return choose(BOTH_LAUNCHES, DEFAULT_BOTH_LAUNCHES, inputs.q)
    return choose(LAUNCHES, DEFAULT_LAUNCHES, inputs.q)


def _list_arguments(lists: BlockLists) -> tuple[Tensor | int | bool, ...]:
    hidden = lists.indices if lists.hidden is None else lists.hidden
    return (
        lists.counts, lists.pooled, lists.indices, hidden, *list_strides(lists.counts), lists.indices.shape[-1],
        lists.rows, lists.hidden is not None,
    )  # fmt: skip


def fit(launches: Launches, lists: BlockLists) -> tuple[int, Launch]:
    """Rows of a program, at most a query block's, and the rest of the launch with warps in proportion."""
    launch = launches.wide if lists.rows >= 64 else launches.narrow
    rows = min(launch.rows, lists.rows)
    return rows, launch._replace(num_warps=max(1, launch.num_warps * rows // launch.rows))


def pooled_rows(inputs: ListInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled k, v and log weights as the kernels read them; without pooled keys any tensors."""
    if inputs.pooled is None:
        return inputs.k, inputs.v, inputs.q
    k, v, weights = inputs.pooled
    return unit_stride(k), unit_stride(v), unit_stride(weights)


def precision(q: Tensor) -> str | None:
    return "ieee" if q.dtype == torch.float32 else None
