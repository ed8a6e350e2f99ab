"""The block-sparse operator as torch's dispatcher, compiler and autograd see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.kernels import AxisWindows, BlockPlan, PooledKeys, block_sparse_attention
from dit_accel.kernels.block_sparse import backends, operator, recompute
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask

LAYOUT = TokenLayout((1, 5, 7), 4, "prefix")
TILES = LAYOUT.boxes((1, 4, 4))
HEADS, DIM = 2, 8


def plan_of(seed: int = 0, layout: TokenLayout = LAYOUT) -> BlockPlan:
    """Two random key tiles for each query tile and head."""
    tiles = layout.boxes((1, 4, 4))
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(1, HEADS, tiles.num_tiles, tiles.num_tiles, generator=generator).argsort(-1) < 2
    return plan_from_tile_mask(layout, tiles, keep)


def windowed(plan: BlockPlan) -> BlockPlan:
    bounds = [(max(x - 2, 0), min(x + 2, size - 1)) for size in plan.tiles.grid for x in range(size)]
    return replace(plan, partial=plan.counts, window=AxisWindows(torch.tensor(bounds, dtype=torch.int32)))


def with_pooled(plan: BlockPlan) -> tuple[BlockPlan, PooledKeys]:
    """Every query tile sees all 19 pooled keys."""
    tiles = torch.arange(TILES.num_tiles, TILES.num_tiles + 2).expand(*plan.counts.shape, -1)
    indices = torch.cat([tiles.int(), plan.indices], -1)
    plan = replace(plan, counts=plan.counts + 2, partial=plan.partial + 2, indices=indices, pooled=19)
    k, v = torch.randn(2, 2, 19, HEADS, DIM)
    return plan, PooledKeys(k, v, torch.randn(1, HEADS, 1, 19))


def rows(dtype: torch.dtype = torch.float32, gradients: bool = False, length: int = LAYOUT.num_tokens) -> list[Tensor]:
    return [torch.randn(2, length, HEADS, DIM).to(dtype).requires_grad_(gradients) for _ in range(3)]


def flat(plan: BlockPlan, backend: str, pooled: PooledKeys | None = None, lengths: Tensor | None = None) -> list[Any]:
    """The operator's arguments after q, k and v."""
    lists, shape = operator._described(plan)
    return [*lists, lengths, *(pooled or (None, None, None)), *shape, 0.3, backend, "native"]


CALLS = {
    "lists": lambda: (plan_of(), None, None),
    "window and text lengths": lambda: (windowed(plan_of()), None, torch.tensor([4, 1], dtype=torch.int32)),
    "pooled": lambda: (*with_pooled(plan_of()), None),
}


CHEAP = ("test_schema", "test_faketensor")  # those that run the operator once or twice


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("call", CALLS)
def test_the_operators_keep_the_dispatchers_contract(call: str, backend: str) -> None:
    plan, pooled, lengths = CALLS[call]()
    arguments = flat(plan, backend, pooled, lengths)
    q, k, v = rows(gradients=True)
    forward, backward = torch.ops.dit_accel.block_sparse_forward, torch.ops.dit_accel.block_sparse_backward
    opcheck(forward.default, (q, k, v, *arguments, True, True))
    q, k, v = (x.detach() for x in (q, k, v))
    opcheck(forward.default, (q, k, v, *arguments, False, False), test_utils=CHEAP)
    out, lse = forward(q, k, v, *arguments, True, False)
    opcheck(backward.default, (out, lse, out, lse, q, k, v, *arguments), test_utils=CHEAP)


def test_the_triton_backend_keeps_it_too() -> None:
    plan, pooled, lengths = CALLS["pooled"]()
    arguments = (*rows(), *flat(plan, "triton", pooled, lengths))
    forward, backward = torch.ops.dit_accel.block_sparse_forward, torch.ops.dit_accel.block_sparse_backward
    opcheck(forward.default, (*arguments, True, False), test_utils="test_faketensor")
    out, lse = forward(*arguments, True, False)
    opcheck(backward.default, (out, lse, out, lse, *arguments), test_utils="test_faketensor")


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": x,
        "heads outside": x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": x[:1].expand_as(x),
        "channels strided": x.mT.contiguous().mT,
    }


KINDS = [("torch", torch.float64), ("torch", torch.float16), ("triton", torch.float32)]


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("layout", layouts(torch.empty(1, 1, 1, 1)))
def test_results_and_gradients_are_contiguous_whatever_the_inputs(
    layout: str, backend: str, dtype: torch.dtype
) -> None:
    def described(leaves: list[Tensor], plan: BlockPlan) -> list[Any]:
        results = block_sparse_attention(*leaves, plan, backend=backend, return_lse=True)  # type: ignore[call-overload]
        gradients = torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])
        return [(x.shape, x.stride(), x.dtype) for x in (*results, *gradients)]

    leaves, plan = [layouts(x)[layout].requires_grad_() for x in rows(dtype)], plan_of()
    got = described(leaves, plan)
    assert all(strides == torch.empty(shape).stride() for shape, strides, _ in got)
    with FakeTensorMode() as mode:
        *fake, counts, partial, indices = map(mode.from_tensor, (*leaves, plan.counts, plan.partial, plan.indices))
        assert described(fake, replace(plan, counts=counts, partial=partial, indices=indices)) == got


class Layer(nn.Module):
    def __init__(self, backend: str = "torch") -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.backend = backend

    def forward(self, x: Tensor, plan: BlockPlan) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        out: Tensor = block_sparse_attention(q, k, v, plan, backend=self.backend)  # type: ignore[call-overload]
        return x + out.flatten(2)


@pytest.fixture
def fresh_compiler() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_graph_serves_all_layers_steps_and_plans_of_a_shape(
    training: bool, fresh_compiler: CompileCounterWithBackend
) -> None:
    compiled = torch.compile(Layer.forward, fullgraph=True, backend=fresh_compiler)
    for seed in range(3):
        layer, plan, x = Layer().requires_grad_(training), plan_of(seed), torch.randn(2, LAYOUT.num_tokens, HEADS * DIM)
        got, want = compiled(layer, x, plan), layer(x, plan)
        assert torch.equal(got, want)
        if training:
            gradients = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (got, want)]
            for mine, yours in zip(*gradients, strict=True):
                torch.testing.assert_close(mine, yours)
    assert fresh_compiler.frame_count == 1


def test_windows_text_lengths_and_pooled_keys_compile_whole(fresh_compiler: CompileCounterWithBackend) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, pooled: PooledKeys, lengths: Tensor) -> Any:
        return block_sparse_attention(
            q, k, v, plan, pooled=pooled, text_lengths=lengths, backend="reference", return_lse=True
        )

    compiled = torch.compile(attend, fullgraph=True, backend=fresh_compiler)
    for seed in range(2):
        plan, pooled = with_pooled(windowed(plan_of(seed)))
        arguments = (*rows(), plan, pooled, torch.tensor([4, seed], dtype=torch.int32))
        assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), attend(*arguments), strict=True))
    assert fresh_compiler.frame_count == 1


def test_dynamic_shapes_compile_once_for_all_grids(fresh_compiler: CompileCounterWithBackend) -> None:
    compiled = torch.compile(block_sparse_attention, fullgraph=True, dynamic=True, backend=fresh_compiler)
    for grid in ((2, 5, 9), (3, 6, 10), (4, 9, 10)):
        layout = TokenLayout(grid, 4, "prefix")
        arguments = (*rows(length=layout.num_tokens), plan_of(0, layout))
        assert torch.equal(compiled(*arguments, backend="torch"), block_sparse_attention(*arguments, backend="torch"))
    assert fresh_compiler.frame_count == 1


def test_nothing_is_saved_without_gradients_and_five_tensors_with() -> None:
    saved: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    plan = plan_of()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        block_sparse_attention(*rows(), plan)
        with torch.no_grad():
            block_sparse_attention(*rows(gradients=True), plan)
        assert not saved
        block_sparse_attention(*rows(gradients=True), plan)
    shape = (2, LAYOUT.num_tokens, HEADS, DIM)
    assert [x.shape for x in saved if x.is_floating_point()] == [shape] * 4 + [(2, HEADS, LAYOUT.num_tokens)]
    assert {x.data_ptr() for x in saved if not x.is_floating_point()} == {
        x.data_ptr() for x in (plan.counts, plan.partial, plan.indices)
    }


def test_a_plan_is_handed_to_backends_as_the_object_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    eager = SimpleNamespace(
        needs=lambda inputs: None, forward=lambda inputs: (seen.append(inputs.plan), inputs.q + 0, None)[1:]
    )
    monkeypatch.setattr(backends, "load", lambda backend: eager)
    plan = plan_of()
    windowed_plan = replace(plan, window=windowed(plan).window)  # the same lists, another plan
    for given in (plan, windowed_plan, plan):
        block_sparse_attention(*rows(), given, backend="torch")
        assert seen[-1] is given


def test_gradients_are_refused_by_a_backend_without_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.TABLE, "torch", backends.TABLE["torch"]._replace(backward=None))
    plan = plan_of()
    block_sparse_attention(*rows(), plan, backend="torch")
    q, k, v = rows()
    with pytest.raises(ValueError, match="needs inputs without gradients, it has no backward; use backend='auto'."):
        block_sparse_attention(q, k, v.requires_grad_(), plan, backend="torch")


def test_auto_takes_a_backend_with_gradients_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "PREFERRED", ("torch", "reference"))
    monkeypatch.setitem(backends.TABLE, "torch", backends.TABLE["torch"]._replace(backward=None))
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    inputs = Inputs(on_gpu, on_gpu, on_gpu, plan_of(), 1.0)
    assert backends.choose(inputs) == "torch"
    assert backends.choose(replace(inputs, gradients=True)) == "reference"


def test_auto_never_interprets_kernels() -> None:
    assert backends.choose(Inputs(*rows(), plan_of(), 1.0)) == "torch"


def test_gradients_of_8_bit_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="no backend runs precision='fp8' here"):
        block_sparse_attention(*rows(gradients=True), plan_of(), precision="fp8")


def test_second_derivatives_are_refused() -> None:
    q, k, v = rows(gradients=True)
    out = block_sparse_attention(q, k, v, plan_of(), backend="torch")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_are_the_same_under_a_dispatch_mode(backend: str) -> None:
    leaves = rows(gradients=True)

    def gradients() -> tuple[Tensor, ...]:
        out: Tensor = block_sparse_attention(*leaves, plan_of(), backend=backend)  # type: ignore[call-overload]
        return torch.autograd.grad(out.sum(), leaves)

    want = gradients()
    with FlopCounterMode(display=False):
        got = gradients()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_leaves_dtypes_alone_and_mixed_ones_are_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(*rows(), plan_of(), backend="torch").dtype == torch.float32
        q, k, v = rows()
        projected = nn.Linear(DIM, DIM)(q)
        with pytest.raises(ValueError, match="share dtype and device, got torch.bfloat16, torch.float32"):
            block_sparse_attention(projected, k, v, plan_of())


def test_inference_mode_gives_the_same_output() -> None:
    leaves = rows(gradients=True)
    want = block_sparse_attention(*leaves, plan_of())
    with torch.inference_mode():
        got = block_sparse_attention(*leaves, plan_of())
    assert got.is_inference() and torch.equal(got, want)


def test_training_takes_the_same_course_on_every_backend() -> None:
    curves = {}
    for backend in ("reference", "torch", "triton"):
        torch.manual_seed(0)
        model = nn.ModuleList(Layer(backend) for _ in range(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x, target = torch.randn(2, 1, LAYOUT.num_tokens, HEADS * DIM)
        losses = []
        for step in range(3):
            y = x
            for layer in model:
                y = layer(y, plan_of(step))
            loss = (y - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves[backend] = torch.stack(losses)
    assert curves["reference"][-1] < curves["reference"][0]
    torch.testing.assert_close(curves["torch"], curves["reference"], rtol=1e-5, atol=0)
    torch.testing.assert_close(curves["triton"], curves["reference"], rtol=1e-5, atol=0)


def test_recomputed_gradients_need_no_recording_outside() -> None:
    with torch.no_grad(), recompute._autograd():
        x = torch.ones(2).requires_grad_()
        assert (2 * x).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_rounds_nothing_inside(backend: str) -> None:
    plan = plan_from_tile_mask(TokenLayout((1, 1, 48)), TokenLayout((1, 1, 48)).raster(16), torch.eye(3) > 0)
    q, k, v = (torch.randn(1, 48, 2, 16) for _ in range(3))
    plain = block_sparse_attention(q, k, v, plan, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_sparse_attention(q, k, v, plan, backend=backend), plain)
