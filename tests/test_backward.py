"""Gradients of the block-sparse operator against float64 autograd through the full mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.eval.kernel_check import attend
from dit_accel.kernels import AxisWindows, BlockPlan, PooledKeys, TileGrid
from dit_accel.kernels.block_sparse import triton_backward, triton_forward
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.reference import reference_attention
from dit_accel.kernels.block_sparse.triton_backward import Launches
from dit_accel.kernels.block_sparse.triton_launch import Launch


@dataclass(frozen=True)
class Case:
    grid: tuple[int, int, int] = (2, 3, 7)
    tile: tuple[int, int, int] = (1, 3, 5)
    prefix: int = 0
    suffix: int = 0
    window: str = ""
    pooled: int = 0
    batch: int = 1
    heads: int = 2
    shared: bool = False  # one list for all items and heads
    lengths: tuple[int, ...] = ()
    dim: int = 8


CASES = {
    "lists": Case(),
    "lists, text before": Case(prefix=5, batch=2, heads=1, lengths=(5, 2)),
    "window, text after": Case((1, 7, 5), (1, 4, 4), suffix=19, window="window", batch=2, heads=1, lengths=(19, 0)),
    "union, text before": Case((1, 7, 5), (1, 4, 4), prefix=3, window="union"),
    "dilated": Case(window="dilated", dim=24),
    "pooled": Case(pooled=23),
    "pooled, window, text after": Case(pooled=16, window="window", suffix=3),
    "pooled, raster, one list": Case((1, 1, 52), (1, 1, 16), pooled=17, shared=True, heads=3),
    "raster without a ragged end": Case((1, 1, 48), (1, 1, 16)),
}


def windows(case: Case) -> AxisWindows | None:
    """At most 1 frame, 2 rows and 3 columns away."""
    if not case.window:
        return None
    bounds = [
        (max(x - reach, 0), min(x + reach, size - 1))
        for size, reach in zip(case.grid, (1, 2, 3), strict=True)
        for x in range(size)
    ]
    dilation = (2, 1, 3) if case.window == "dilated" else (1, 1, 1)
    return AxisWindows(torch.tensor(bounds, dtype=torch.int32), dilation, case.window == "union")


def build_plan(case: Case, generator: torch.Generator) -> BlockPlan:
    """Random lists; with a window half of the entries are cut by it, and the first query tile sees no tile."""
    tiles = TileGrid(case.grid, case.tile)
    grid, keys = tiles.num_tiles, tiles.num_tiles - (-case.pooled // tiles.tile_size)
    shape = (1, 1) if case.shared else (case.batch, case.heads)
    keep = torch.rand(*shape, grid, keys, generator=generator) < 0.6
    keep[0, 0, 0] = False
    partial = torch.rand(*shape, grid, keys, generator=generator) < (0.5 if case.window else 0.0)
    partial[..., :grid] |= tiles.tile_tokens() < tiles.tile_size
    rank = torch.where(keep, torch.where(partial, 1, 2), 3).to(torch.int8)
    rank[..., grid:] = torch.where(keep[..., grid:], 0, 3)
    partial[..., grid:] = True
    return BlockPlan(
        tiles,
        keep.sum(-1).int(),
        (keep & partial).sum(-1).int(),
        rank.sort(dim=-1, stable=True).indices.int(),
        case.prefix,
        case.suffix,
        windows(case),
        case.pooled,
    )


def build(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    """Strided views of a fused projection surrounded by NaN; a fifth of the pooled keys hidden."""
    generator = torch.Generator().manual_seed(0)
    plan = build_plan(case, generator)
    fused = torch.full((case.batch, plan.num_tokens + 8, 3, case.heads, case.dim), torch.nan, dtype=dtype)
    fused[:, 4:-4] = torch.randn(case.batch, plan.num_tokens, 3, case.heads, case.dim, generator=generator)
    q, k, v = fused[:, 4:-4].unbind(2)
    pooled = None
    if case.pooled:
        weights = torch.randn(case.batch, case.heads, plan.tiles.num_tiles, case.pooled, generator=generator)
        weights[torch.rand(weights.shape, generator=generator) < 0.2] = -torch.inf
        rows = torch.randn(2, case.batch, case.pooled, case.heads, case.dim, generator=generator).to(dtype)
        pooled = PooledKeys(*rows, weights)
    lengths = torch.tensor(case.lengths, dtype=torch.int32) if case.lengths else None
    return Inputs(q, k, v, plan, 0.4, lengths, pooled)


def leaves_of(inputs: Inputs, dtype: torch.dtype | None = None) -> tuple[Inputs, list[Tensor]]:
    """The same call on leaves that require gradients, strides kept unless the dtype changes."""
    rows = [inputs.q, inputs.k, inputs.v, *(inputs.pooled[:2] if inputs.pooled else ())]
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in rows]
    q, k, v, *pooled = leaves
    keys = PooledKeys(pooled[0], pooled[1], inputs.pooled.log_weights) if inputs.pooled else None
    return replace(inputs, q=q, k=k, v=v, pooled=keys), leaves


def loss_of(out: Tensor, lse: Tensor) -> Tensor:
    """Both results with random weights; the LSE of a query without keys is -inf and left out."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    lse_weight = torch.randn(lse.shape, dtype=torch.float64, generator=generator)
    return (out * weight).sum() + (torch.where(lse > -torch.inf, lse, 0.0) * lse_weight).sum()


def exact(inputs: Inputs, loss: Any = loss_of) -> tuple[Tensor, ...]:
    twin, leaves = leaves_of(inputs, torch.float64)
    return torch.autograd.grad(loss(*reference_attention(twin)), leaves)


def assert_close(
    got: Any, want: tuple[Tensor, ...], roundings: float = 256, dtype: torch.dtype = torch.float32
) -> None:
    """A few hundred roundings of the largest gradient."""
    assert len(got) == len(want)
    for mine, yours in zip(got, want, strict=True):
        bound = roundings * torch.finfo(dtype).eps * max(1.0, float(yours.abs().max()))
        assert (mine.double() - yours).abs().max() <= bound


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64_autograd(name: str, backend: str, poisoned_memory: None) -> None:
    inputs = build(CASES[name])
    call, leaves = leaves_of(inputs)
    got = torch.autograd.grad(loss_of(*attend(call, backend)), leaves)
    assert_close(got, exact(inputs))


def test_half_precision_gradients_are_rounded_float64_ones(poisoned_memory: None) -> None:
    inputs = build(CASES["pooled, window, text after"], torch.float16)
    call, leaves = leaves_of(inputs)
    got = torch.autograd.grad(loss_of(*attend(call, "triton")), leaves)
    assert [x.dtype for x in got] == [torch.float16] * 5
    assert_close(got, exact(inputs), 16, torch.float16)


LOSSES = {
    "output alone": lambda out, lse: out.pow(3).sum(),
    "LSE alone": lambda out, lse: lse.sum(),
    "expanded gradient": lambda out, lse: out.sum(),
    "transposed gradient": lambda out, lse: (
        out.transpose(1, 2).contiguous() * torch.arange(out.shape[1], device=out.device)[:, None]
    ).sum(),
    "gradient with strided channels": lambda out, lse: (
        out.mT.contiguous() * torch.arange(out.shape[2], device=out.device)
    ).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_either_result_and_of_any_strides(loss: str, poisoned_memory: None) -> None:
    inputs = build(replace(CASES["lists, text before"], lengths=(5, 2)))
    call, leaves = leaves_of(inputs)
    got = torch.autograd.grad(LOSSES[loss](*attend(call, "triton")), leaves, allow_unused=True, materialize_grads=True)
    want = exact(inputs, lambda out, lse: LOSSES[loss](out, lse) + 0 * out.sum())
    assert_close(got, want)


SPLITS = [(16, 16), (32, 16), (16, 32), (32, 32)]


@pytest.mark.parametrize("tile", [(1, 4, 8), (2, 3, 5)], ids=["powers of two", "odd tile"])
@pytest.mark.parametrize(("rows", "columns"), SPLITS, ids=[f"{rows} x {columns}" for rows, columns in SPLITS])
def test_parts_of_a_tile_add_up(rows: int, columns: int, tile: tuple[int, int, int], poisoned_memory: None) -> None:
    inputs = build(Case((1, 5, 11), tile, suffix=19, window="window", pooled=35, heads=1))
    out, lse = triton_forward.forward(inputs)
    launch = Launch(rows, columns, 4, 1)
    got = triton_backward.backward(inputs, out, lse, torch.ones_like(out), None, Launches(launch, launch))
    assert_close(got, exact(inputs, lambda out, lse: out.sum()))


def test_gradients_repeat_bit_for_bit() -> None:
    call, leaves = leaves_of(build(CASES["pooled, window, text after"]))
    loss = loss_of(*attend(call, "triton"))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_rows_without_keys_have_zero_gradients(backend: str, poisoned_memory: None) -> None:
    inputs = build(CASES["lists"])
    empty = replace(
        inputs.plan, counts=torch.zeros_like(inputs.plan.counts), partial=torch.zeros_like(inputs.plan.partial)
    )
    call, leaves = leaves_of(replace(inputs, plan=empty))
    out, lse = attend(call, backend)
    got = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in got)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_may_hold_nan_and_has_zero_gradients(backend: str, poisoned_memory: None) -> None:
    inputs = build(CASES["window, text after"])
    padding = torch.zeros(inputs.q.shape[:2], dtype=torch.bool)
    padding[1, inputs.text_start :] = True  # lengths are (19, 0)
    call, (q, k, v) = leaves_of(inputs)
    want = torch.autograd.grad(loss_of(*attend(call, backend)), (q, k, v))
    with torch.no_grad():
        k[padding] = v[padding] = torch.nan
    got = torch.autograd.grad(loss_of(*attend(call, backend)), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not got[1][padding].any() and not got[2][padding].any()


def test_a_hidden_pooled_key_has_zero_gradient_and_log_weights_none() -> None:
    inputs = build(CASES["pooled"])
    assert inputs.pooled is not None
    weights = inputs.pooled.log_weights.clone()
    weights[..., 7] = -torch.inf
    call, leaves = leaves_of(replace(inputs, pooled=inputs.pooled._replace(log_weights=weights)))
    weights.requires_grad_()
    *_, pooled_k, pooled_v, of_weights = torch.autograd.grad(
        loss_of(*attend(call, "triton")), (*leaves, weights), allow_unused=True
    )
    assert of_weights is None
    for gradient in (pooled_k, pooled_v):
        assert not gradient[:, 7].any() and gradient[:, 6].any()
