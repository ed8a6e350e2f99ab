"""The torch backend: chunks, threads, pooled keys and precision, against the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import gather, reference
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, PooledKeys
from dit_accel.kernels.block_sparse.threads import each_on_one_thread
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask, plan_from_windows

BATCH, HEADS, DIM = 2, 3, 24


def lists_plan(layout: TokenLayout, shared: bool = False) -> BlockPlan:
    """Random lists of unequal lengths, one of them empty."""
    tiles = layout.boxes((1, 3, 4))
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(BATCH, HEADS, tiles.num_tiles, tiles.num_tiles, generator=generator) < 0.4
    keep[:, :, 1] = False
    return plan_from_tile_mask(layout, tiles, keep[:1, :1] if shared else keep)


def windows_plan(layout: TokenLayout) -> BlockPlan:
    """At most 1 frame and 2 rows and columns away."""
    bounds = [
        (max(x - reach, 0), min(x + reach, size - 1))
        for size, reach in zip(layout.grid, (1, 2, 2), strict=True)
        for x in range(size)
    ]
    return plan_from_windows(layout, layout.boxes((1, 3, 4)), AxisWindows(torch.tensor(bounds, dtype=torch.int32)))


def pooled_plan(layout: TokenLayout) -> tuple[BlockPlan, int]:
    """Lists that begin with two tiles of pooled keys, the second not full; and the number of keys."""
    plan = lists_plan(layout)
    size, first = plan.tiles.tile_size, plan.tiles.num_tiles
    pooled = torch.tensor([first, first + 1], dtype=torch.int32).expand(*plan.counts.shape, -1)
    indices = torch.cat([pooled, plan.indices], -1)
    listed = replace(plan, counts=plan.counts + 2, partial=plan.partial + 2, indices=indices, pooled=size + 3)
    return listed, size + 3


def inputs_of(plan: BlockPlan, dtype: torch.dtype = torch.float64, pooled: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def random(tokens: int) -> Tensor:
        return torch.randn(BATCH, tokens, HEADS, DIM, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (random(plan.num_tokens) for _ in range(3))
    keys = None
    if pooled:
        weights = torch.randn(1, HEADS, plan.tiles.num_tiles, pooled, generator=generator)
        weights[weights > 1] = -torch.inf
        weights[:, :, 1] = -torch.inf  # of the query tile that lists nothing else
        keys = PooledKeys(random(pooled), random(pooled), weights)
    return Inputs(q, k, v, plan, DIM**-0.5, pooled=keys)


def assert_agree(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor], bound: float) -> None:
    out, lse = got
    assert lse is not None
    torch.testing.assert_close(out.double(), want[0].double(), rtol=0, atol=bound)
    torch.testing.assert_close(lse.double(), want[1].double(), rtol=0, atol=bound)  # infinities must be equal


PLANS: dict[str, Callable[[TokenLayout], BlockPlan]] = {
    "lists": lists_plan,
    "shared lists": lambda layout: lists_plan(layout, shared=True),
    "window": windows_plan,
}


@pytest.mark.parametrize("budget", [1, 1 << 12], ids=["one list at a time", "some lists at a time"])
@pytest.mark.parametrize("kind", PLANS)
def test_results_do_not_depend_on_how_the_work_is_cut(
    kind: str, budget: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    inputs = inputs_of(PLANS[kind](TokenLayout((2, 5, 7), 14, "suffix")))
    monkeypatch.setattr(gather, "GROUP_ELEMENTS", budget)
    monkeypatch.setattr(gather, "SCORES", budget)
    assert_agree(gather.forward(inputs), reference.forward(inputs), 1e-12)


@pytest.mark.parametrize("text", [("none", 0), ("prefix", 5), ("suffix", 24)], ids=["none", "before", "after"])
def test_pooled_keys_are_weighted_hidden_and_not_seen_by_text(text: tuple[str, int], poisoned_memory: None) -> None:
    layout = TokenLayout((2, 5, 7), text[1], text[0])  # type: ignore[arg-type]
    inputs = inputs_of(*pooled_plan(layout)[:1], pooled=pooled_plan(layout)[1])
    assert_agree(gather.forward(inputs), reference.forward(inputs), 1e-12)


def test_text_padding_is_not_read_and_may_be_all_of_the_text() -> None:
    inputs = inputs_of(lists_plan(TokenLayout((2, 5, 7), 30, "prefix")))
    inputs = replace(inputs, text_lengths=torch.tensor([0, 13], dtype=torch.int32))
    want = reference.forward(inputs)
    for x in (inputs.k, inputs.v):
        x[0, :30] = x[1, 13:30] = torch.nan
    assert_agree(gather.forward(inputs), want, 1e-12)


@pytest.mark.parametrize("with_lse", [False, True], ids=["output", "output and LSE"])
def test_gradients_are_those_of_the_oracle_also_between_equal_keys(with_lse: bool) -> None:
    inputs = inputs_of(*pooled_plan(TokenLayout((2, 5, 7), 5, "suffix"))[:1], pooled=15)
    inputs.k[:] = inputs.k[:, :1]
    assert inputs.pooled is not None
    rows = (inputs.q, inputs.k, inputs.v, inputs.pooled.k, inputs.pooled.v)
    generator = torch.Generator().manual_seed(2)
    weight, lse_weight = (torch.randn(x.shape, generator=generator).double() for x in reference.forward(inputs))
    gradients = []
    for forward in (gather.forward, reference.forward):
        q, k, v, *pooled = leaves = [x.detach().clone().requires_grad_() for x in rows]
        keys = PooledKeys(pooled[0], pooled[1], inputs.pooled.log_weights)
        out, lse = forward(replace(inputs, q=q, k=k, v=v, pooled=keys))
        assert lse is not None
        loss = (out * weight).sum()
        if with_lse:
            loss = loss + torch.where(lse.isfinite(), lse * lse_weight, 0.0).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_sixteen_bit_inputs_lose_no_more_than_their_own_rounding() -> None:
    inputs = inputs_of(lists_plan(TokenLayout((2, 5, 7), 5, "suffix")), torch.bfloat16)
    out, lse = gather.forward(inputs)
    exact = reference.forward(replace(inputs, q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double()))
    assert out.dtype == torch.bfloat16 and lse is not None and lse.dtype == torch.float32
    # Products of bfloat16 values are exact in float32, so the LSE is; probabilities and the output are rounded.
    assert_agree((torch.zeros(()), lse), (torch.zeros(()), exact[1]), 1e-5)
    unit = float(torch.finfo(torch.bfloat16).eps) * float(exact[0].abs().max())
    assert float((out.double() - exact[0]).abs().max()) <= unit


def test_torch_keeps_its_settings() -> None:
    inputs = inputs_of(windows_plan(TokenLayout((2, 5, 7))), torch.bfloat16)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    gather.forward(inputs)
    assert matmul.fp32_precision == before
    with pytest.raises(TypeError):
        gather.forward(replace(inputs, scale="none"))  # type: ignore[arg-type]
    assert matmul.fp32_precision == before


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_threads_change_no_result(mode: Callable[[], torch.no_grad], two_threads: None) -> None:
    inputs = inputs_of(lists_plan(TokenLayout((2, 5, 7), 5, "suffix")))
    with mode():
        assert_agree(gather.forward(inputs), reference.forward(inputs), 1e-12)
    assert torch.get_num_threads() == 2


def test_jobs_run_on_single_threads_in_order_and_raise(two_threads: None) -> None:
    assert list(each_on_one_thread(lambda job: (job, torch.get_num_threads()), range(5))) == [(i, 1) for i in range(5)]
    with pytest.raises(ZeroDivisionError):
        list(each_on_one_thread(lambda job: 1 // job, range(3)))
