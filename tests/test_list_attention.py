"""Attention over block lists: every backend against float64 autograd of the full mask."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from dit_accel.kernels import PooledKeys
from dit_accel.kernels.pyramid import list_reference, triton_list_backward, triton_list_forward
from dit_accel.kernels.pyramid.attend import list_attention
from dit_accel.kernels.pyramid.lists import BlockLists, ListInputs
from dit_accel.kernels.pyramid.triton_list_pieces import pieces_of
from dit_accel.kernels.pyramid.triton_list_rows import index_type

BACKENDS = ("reference", "torch", "triton")
Attend = Callable[[ListInputs, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    tokens: int = 63
    text: int = 0  # positions off the curve
    rows: tuple[int, ...] = (64, 16)  # of each pass
    block: int = 16
    pooled: int = 32
    hidden: bool = False
    shared: bool = False  # one list for all items and heads
    keep: float = 0.6
    batch: int = 1
    heads: int = 2
    dim: int = 16


CASES = {
    "one token": Case(1, text=2),
    "one short block": Case(15, rows=(16,), pooled=0),
    "one key beyond a block": Case(17, rows=(16, 16), hidden=True),
    "ragged": Case(63, text=7, batch=2),
    "ragged, hidden, shared": Case(63, hidden=True, shared=True, heads=3),
    "whole blocks": Case(64, rows=(32,), hidden=True),
    "long, large blocks": Case(257, rows=(128, 64), block=128, pooled=128, hidden=True, heads=1),
    "long, few keys": Case(257, text=3, rows=(128,), block=32, pooled=64, keep=0.2, hidden=True, heads=1),
    "rows wider than keys": Case(90, rows=(128,), block=64, pooled=0, dim=24),
    "pooled in both passes": Case(40, rows=(16, 64), pooled=48, dim=5),
    "short lists side by side": Case(141, text=3, rows=(128, 16), hidden=True, keep=0.3, heads=1),
    "short lists of large blocks": Case(150, rows=(64, 16), block=64, pooled=64, hidden=True, heads=1, dim=40),
    "short lists, no pooled keys": Case(130, rows=(128, 16), pooled=0, keep=0.2),
    "empty lists": Case(40, keep=0.0, hidden=True),
}


def build_lists(case: Case, rows: int, generator: torch.Generator) -> BlockLists:
    """Random lists, pooled blocks first; the first of several query blocks sees nothing."""
    fine, pooled = -(-case.tokens // case.block), case.pooled // case.block
    shape = (1, 1) if case.shared else (case.batch, case.heads)
    keep = torch.rand(*shape, -(-case.tokens // rows), pooled + fine, generator=generator) < case.keep
    keep[0, 0, : keep.shape[2] > 1] = False
    ids = torch.cat([torch.arange(fine, fine + pooled), torch.arange(fine)]).int()
    indices = ids[(~keep).int().sort(dim=-1, stable=True).indices]
    words = (*indices.shape, -(-case.block // 32))
    hidden = torch.randint(-(2**31), 2**31, words, generator=generator).int() if case.hidden else None
    return BlockLists(rows, case.block, keep.sum(-1).int(), keep[..., :pooled].sum(-1).int(), indices, hidden)


def build(case: Case, dtype: torch.dtype = torch.float32) -> ListInputs:
    """Strided views of a fused projection, NaN around it and at positions off the curve."""
    generator = torch.Generator().manual_seed(0)
    length = case.tokens + case.text
    order = torch.randperm(length, generator=generator)[: case.tokens]
    fused = torch.full((case.batch, length + 8, 3, case.heads, case.dim), torch.nan, dtype=dtype)
    rows = torch.randn(case.batch, case.tokens, 3, case.heads, case.dim, generator=generator)
    fused[:, order + 4] = rows.to(dtype)
    lists = tuple(build_lists(case, rows, generator) for rows in case.rows)
    pooled = None
    if case.pooled:
        lead = (1, 1) if case.shared else (case.batch, case.heads)
        weights = torch.randn(*lead, 1, case.pooled, generator=generator)
        weights[..., -3:] = -torch.inf
        keys = torch.randn(2, case.batch, case.pooled, case.heads, case.dim, generator=generator).to(dtype)
        pooled = PooledKeys(*keys, weights)
    return ListInputs(*fused[:, 4:-4].unbind(2), lists, order.int(), pooled, 0.4)


def attend(inputs: ListInputs, backend: Any) -> tuple[Tensor, Tensor]:
    return list_attention(
        inputs.q, inputs.k, inputs.v, inputs.lists, order=inputs.order, pooled=inputs.pooled, scale=inputs.scale,
        backend=backend, return_lse=True,
    )  # fmt: skip


def leaves_of(inputs: ListInputs) -> tuple[ListInputs, list[Tensor]]:
    """The same call on leaves that require gradients, strides kept."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, *(inputs.pooled or ())[:2])]
    q, k, v, *pooled = leaves
    keys = PooledKeys(pooled[0], pooled[1], inputs.pooled.log_weights) if inputs.pooled else None
    return replace(inputs, q=q, k=k, v=v, pooled=keys), leaves


def results(inputs: ListInputs, run: Attend, backend: str = "") -> tuple[Tensor, ...]:
    """Output, LSE, and gradients of a random weighting of both, where the LSE of a query without keys counts 0."""
    call, leaves = leaves_of(inputs)
    out, lse = run(call, backend)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum()
    weight = torch.randn(lse.shape, dtype=torch.float64, generator=generator)
    loss = loss + (torch.where(lse > -torch.inf, lse, 0.0) * weight).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)


def exact(inputs: ListInputs) -> tuple[Tensor, ...]:
    """The same in float64 by the oracle, with zeros for what must not be read."""
    q, k, v = (x.double().nan_to_num() for x in (inputs.q, inputs.k, inputs.v))
    pooled = inputs.pooled and PooledKeys(inputs.pooled.k.double(), inputs.pooled.v.double(), inputs.pooled.log_weights)
    clean = replace(inputs, q=q, k=k, v=v, pooled=pooled)
    return results(clean, lambda call, _: list_reference.forward(call))


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], roundings: float = 256) -> None:
    assert len(got) == len(want)
    assert torch.equal(got[1] == -torch.inf, want[1] == -torch.inf)
    for mine, yours in zip(got, want, strict=True):
        mine, yours = (torch.where(x == -torch.inf, 0.0, x) for x in (mine, yours))
        bound = roundings * torch.finfo(got[0].dtype).eps * max(1.0, float(yours.abs().max()))
        assert (mine.double() - yours).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_float64_autograd(
    name: str, backend: str, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_list_backward, "PIECE_ROWS", 128)  # several pieces for a key block
    inputs = build(CASES[name])
    assert_close(results(inputs, attend, backend), exact(inputs))


@pytest.mark.parametrize("name", ["whole blocks", "short lists, no pooled keys"])
def test_gradients_of_key_blocks_of_one_piece(name: str, poisoned_memory: None) -> None:
    inputs = build(CASES[name])
    assert_close(results(inputs, attend, "triton"), exact(inputs))


def test_half_precision_is_rounded_float64(poisoned_memory: None) -> None:
    inputs = build(Case(63, text=5, hidden=True), torch.float16)
    got = results(inputs, attend, "triton")
    assert [x.dtype for x in got] == [torch.float16, torch.float32, *[torch.float16] * 5]
    assert_close(got, exact(inputs), 16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_keys_that_no_list_names_are_never_read_and_get_zero_gradients(backend: str, poisoned_memory: None) -> None:
    inputs = build(Case(81, rows=(64, 16), keep=0.0))
    for lists, block in zip(inputs.lists, (5, 3), strict=True):  # the ragged one among them
        lists.counts.fill_(1)
        lists.indices[..., 0] = block
    inputs.lists[1].counts[..., 0] = 0
    inputs.lists[1].counts[..., 1] = 2
    inputs.lists[1].indices[..., 1] = 5
    named = torch.cat([inputs.order[48:64], inputs.order[80:]]).long()
    unnamed = torch.ones(81, dtype=torch.bool).index_fill(0, named, False)
    for x in (inputs.k, inputs.v):
        x[:, unnamed] = math.nan
    assert inputs.pooled is not None
    for x in inputs.pooled[:2]:
        x.fill_(math.nan)
    out, lse, dq, dk, dv, *pooled = results(inputs, attend, backend)
    clean = replace(inputs, pooled=PooledKeys(*(x.nan_to_num() for x in inputs.pooled[:2]), inputs.pooled.log_weights))
    assert_close((out, lse, dq, dk, dv, *pooled), exact(clean))
    assert not dk[:, unnamed].any()
    assert not dv[:, unnamed].any()
    assert not any(x.any() for x in pooled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_lists_are_dense_attention(backend: str) -> None:
    inputs = build(Case(50, rows=(32,), pooled=0, keep=1.1))
    inputs.lists[0].counts.fill_(4)  # of the first query block too
    inputs.lists[0].indices.copy_(torch.arange(4))
    out, lse = attend(inputs, backend)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)[:, :, inputs.order.long()] * 0.4
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("name", ["ragged, hidden, shared", "short lists side by side"])
def test_both_passes_in_one_program_are_one_after_the_other(name: str) -> None:
    inputs = build(CASES[name])
    both, after = (
        triton_list_forward.forward(inputs, launches)
        for launches in (triton_list_forward.DEFAULT_BOTH_LAUNCHES[4], triton_list_forward.DEFAULT_LAUNCHES[4])
    )
    for one, other in zip(both, after, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_items_or_heads_that_share_lists_have_equal_ones(backend: str) -> None:
    inputs = build(Case(20, rows=(16, 64), pooled=16, hidden=True, shared=True, batch=2, heads=3))
    want = results(inputs, attend, backend)
    lists = []
    for x, lead in zip(inputs.lists, [(2, 1), (1, 3)], strict=True):
        counts, pooled, indices, hidden = (y.expand(*lead, *y.shape[2:]) for y in x.tensors)
        lists.append(replace(x, counts=counts, pooled=pooled, indices=indices, hidden=hidden))
    for one, other in zip(results(replace(inputs, lists=tuple(lists)), attend, backend), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_two_equal_passes_count_twice(backend: str) -> None:
    inputs = build(Case(40, rows=(16,), hidden=True))
    out, lse = attend(inputs, backend)
    twice, lse_twice = attend(replace(inputs, lists=inputs.lists * 2), backend)
    torch.testing.assert_close(twice, out)
    torch.testing.assert_close(lse_twice, lse + math.log(2))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_offsets_and_strides_of_any_size(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets that need 64 bits, a last axis that is not dense, and lists and an order that are strided views."""
    monkeypatch.setattr(triton_list_forward, "index_type", lambda *rows: tl.int64)
    monkeypatch.setattr(triton_list_backward, "index_type", lambda *rows: tl.int64)
    inputs = build(Case(17))
    want = exact(inputs)
    q, k, v = (x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v))
    lists = tuple(
        replace(x, counts=x.counts.mT.contiguous().mT, indices=x.indices.mT.contiguous().mT) for x in inputs.lists
    )
    order = torch.stack([inputs.order, -inputs.order], 1)[:, 0]
    assert_close(results(replace(inputs, q=q, k=k, v=v, lists=lists, order=order), attend, backend), want)


def test_offsets_are_64_bit_where_they_must_be() -> None:
    small, large = (torch.empty(2, length, 24, 128, device="meta") for length in (699_050, 699_051))
    assert index_type(small) == tl.int32
    assert index_type(small, large) == tl.int64


@pytest.mark.parametrize("name", ["ragged", "ragged, hidden, shared", "long, few keys", "empty lists"])
def test_pieces_are_the_transposed_lists_in_order(name: str) -> None:
    inputs = build(CASES[name])
    blocks = inputs.key_blocks + inputs.pooled_keys // inputs.block
    cut = pieces_of(inputs.lists, blocks, 128)
    entries, starts, first, owners = (x.tolist() for x in cut[1:])
    listed: list[list[int]] = []  # entries of each row, by their number
    number = 0
    for lists in inputs.lists:
        flat = zip(lists.counts.flatten(0, 1).tolist(), lists.indices.flatten(0, 1).tolist(), strict=True)
        for counts, rows in flat:
            listed += ([] for _ in range(blocks))
            for count, row in zip(counts, rows, strict=True):
                for slot, block in enumerate(row[:count]):
                    listed[block - blocks].append(number + slot)
                number += len(row)
    assert [entries[start:end] for start, end in itertools.pairwise(starts)] == listed
    second = [*(each.first_row for each in cut.passes[1:]), len(listed)][0]
    longest = [128 // inputs.lists[0 if row < second else -1].rows for row in range(len(listed))]
    needed = [-(-len(row) // length) for row, length in zip(listed, longest, strict=True)]
    assert first == list(itertools.accumulate(needed, initial=0))
    assert owners[: first[-1]] == [row for row, pieces in enumerate(needed) for _ in range(pieces)]
    for each, last in zip(cut.passes, [first[second], first[-1]], strict=False):
        assert last - first[each.first_row] <= each.pieces


def test_the_operator_is_well_formed() -> None:
    inputs, _ = leaves_of(build(Case(17, text=2)))
    flat = [y for x in inputs.lists for y in (*x.tensors, x.counts.new_empty(0))]
    pooled = inputs.pooled or (None, None, None)
    arguments = (inputs.q, inputs.k, inputs.v, flat, inputs.order, *pooled, [64, 16], 16, 0.4, "torch")
    torch.library.opcheck(torch.ops.dit_accel.list_attention_forward.default, arguments)


def test_a_compiled_call_has_no_graph_break() -> None:
    inputs = build(Case(17, hidden=True))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(inputs, "torch"), attend(inputs, "torch"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend: str) -> None:
    call, leaves = leaves_of(build(Case(17)))
    (gradient,) = torch.autograd.grad(attend(call, backend)[0].nansum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only, got create_graph=True; leave it out."):
        gradient.nansum().backward()


def _with_lists(inputs: ListInputs, **changes: Any) -> ListInputs:
    return replace(inputs, lists=(replace(inputs.lists[0], **changes), *inputs.lists[1:]))


def _with_pooled(inputs: ListInputs, **changes: Any) -> ListInputs:
    assert inputs.pooled is not None
    return replace(inputs, pooled=inputs.pooled._replace(**changes))


ERRORS: dict[str, tuple[Callable[[ListInputs], ListInputs], str]] = {
    "keys of another length": (lambda x: replace(x, k=x.k[:, 1:]), "q, k and v must share one shape"),
    "values of another dtype": (lambda x: replace(x, v=x.v.double()), "q, k and v must share one dtype"),
    "an order of int64": (lambda x: replace(x, order=x.order.long()), "order must be int32 with 1 to 40 positions"),
    "an order that is too long": (lambda x: replace(x, order=x.order.repeat(2)), "order must be int32"),
    "no list": (lambda x: replace(x, lists=()), "one or two passes with equal key blocks, got blocks of none"),
    "three passes": (lambda x: replace(x, lists=x.lists * 2), "one or two passes"),
    "an odd block": (
        lambda x: _with_lists(x, block=24),
        "rows and block must be one of 16, 32, 64, 128, got 64 and 24",
    ),
    "lists for other heads": (lambda x: replace(x, q=x.q[:, :, :1], k=x.k[:, :, :1], v=x.v[:, :, :1]), "2 heads"),
    "too few query blocks": (lambda x: replace(x, lists=(replace(x.lists[0], rows=16),)), "must have 3 query blocks"),
    "lists of int64": (lambda x: _with_lists(x, counts=x.lists[0].counts.long()), "lists must be int32"),
    "hidden words missing": (lambda x: _with_lists(x, hidden=x.lists[0].indices), "hidden must have shape"),
    "counts of another shape": (lambda x: _with_lists(x, counts=x.lists[0].counts[..., 0]), "counts and pooled must"),
    "pooled keys that end in a block": (
        lambda x: _with_pooled(x, k=x.pooled.k[:, 1:], v=x.pooled.v[:, 1:]),  # type: ignore[union-attr]
        "pooled k and v must have shape [1, a multiple of 16, 2, 16]",
    ),
    "a weight per query block": (
        lambda x: _with_pooled(x, log_weights=x.pooled.log_weights.expand(-1, -1, 3, -1)),  # type: ignore[union-attr]
        "log_weights must have shape",
    ),
    "pooled keys of another dtype": (
        lambda x: _with_pooled(x, k=x.pooled.k.half()),  # type: ignore[union-attr]
        "and log_weights float32",
    ),
    "lists elsewhere": (
        lambda x: replace(x, order=x.order.to("meta")),
        "must be on the device of q, cpu, got one on meta",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(name: str) -> None:
    change, message = ERRORS[name]
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*\.$"):
        attend(change(build(Case(40))), "auto")


def test_unknown_and_unfit_backends_are_refused() -> None:
    inputs = build(Case(17))
    with pytest.raises(ValueError, match="backend must be one of auto, reference, torch, triton, got 'dense'."):
        attend(inputs, "dense")
    wide = replace(inputs, q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double(), pooled=None)
    with pytest.raises(ValueError, match="backend='triton' needs float16, bfloat16 or float32, got torch.float64; use"):
        attend(wide, "triton")


def test_auto_takes_torch_off_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    inputs = build(Case(17))
    want = attend(inputs, "torch")
    for mine, yours in zip(attend(inputs, "auto"), want, strict=True):
        assert torch.equal(mine, yours)
