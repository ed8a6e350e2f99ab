"""Delta correction and the discarded softmax mass, against dense attention and the identities they rest on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.dense_rows import dense_rows
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods import make_method, token_mask
from dit_accel.methods.attention import AttnCall, BoundAttention, tile_groups
from dit_accel.methods.correction import dense_anchors, discarded_mass

GRID: Triple = (3, 6, 7)


def inputs(layout: TokenLayout, batch: int = 1, heads: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.num_tokens, heads, dim)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def bound(layout: TokenLayout, **options: object) -> BoundAttention:
    attention = make_method("grat", pattern="B", radius=0, group=(1, 4, 4), tile=(1, 4, 4), **options).attention(layout)
    assert attention is not None
    return attention


@pytest.mark.parametrize("kind", ["add", "merge"])
@pytest.mark.parametrize(("text", "position"), [(0, "none"), (5, "prefix"), (5, "suffix")], ids=str)
def test_anchors_become_dense_and_text_stays(kind: str, text: int, position: TextPosition) -> None:
    layout = TokenLayout(GRID, text, position)
    q, k, v = inputs(layout)
    attention = bound(layout, delta=kind)
    call = AttnCall(q, k, v, backend="reference")
    out, expected = attention.attend(call).out, dense(q, k, v)
    anchors = attention.groups().anchors + layout.prefix
    torch.testing.assert_close(out[:, anchors], expected[:, anchors])
    plain = bound(layout).attend(call).out
    on_text = torch.ones(layout.num_tokens, dtype=torch.bool)
    on_text[layout.prefix : layout.prefix + layout.visual_tokens] = False
    assert torch.equal(out[:, on_text], plain[:, on_text])
    torch.testing.assert_close(plain[:, on_text], expected[:, on_text])


def test_add_moves_each_tile_by_what_its_anchor_lacks() -> None:
    layout = TokenLayout(GRID)
    q, k, v = inputs(layout)
    call = AttnCall(q, k, v, backend="reference")
    plain, corrected, expected = (
        bound(layout).attend(call).out,
        bound(layout, delta="add").attend(call).out,
        dense(q, k, v),
    )
    groups = bound(layout).groups()
    for token in range(layout.visual_tokens):
        anchor = groups.anchors[groups.group_of[token]]
        torch.testing.assert_close(corrected[:, token] - plain[:, token], (expected - plain)[:, anchor])


def test_merge_is_exact_where_all_queries_are_alike() -> None:
    """Then the queries of a group share tau and the mean of what was left out."""
    layout = TokenLayout((1, 4, 8))
    q, k, v = inputs(layout)
    q[:, :] = q[:, :1]
    call = AttnCall(q, k, v, backend="reference")
    torch.testing.assert_close(bound(layout, delta="merge").attend(call).out, dense(q, k, v))


@pytest.mark.parametrize("kind", ["add", "merge"])
def test_nothing_is_moved_where_nothing_was_left_out(kind: str) -> None:
    layout = TokenLayout(GRID)
    q, k, v = inputs(layout)
    attention = make_method("radial", density=1.0, tile=32, delta=kind).attention(layout)
    assert attention is not None
    torch.testing.assert_close(attention.attend(AttnCall(q, k, v, backend="reference")).out, dense(q, k, v))


def test_one_token_a_tile_makes_any_method_dense() -> None:
    layout = TokenLayout((2, 3, 4))
    q, k, v = inputs(layout)
    attention = make_method("grat", pattern="B", radius=0, group=(1, 1, 1), tile=(1, 1, 1), delta="add").attention(
        layout
    )
    assert attention is not None
    torch.testing.assert_close(attention.attend(AttnCall(q, k, v, backend="reference")).out, dense(q, k, v))


def test_discarded_mass_is_the_softmax_share_of_the_keys_left_out() -> None:
    layout = TokenLayout(GRID)
    q, k, v = inputs(layout)
    attention = bound(layout)
    call = AttnCall(q, k, v, backend="reference", with_lse=True)
    result, groups = attention.attend(call), attention.groups()
    assert result.lse is not None
    mass = discarded_mass(dense_anchors(call, layout, groups), result.lse)
    mask = token_mask(make_method("grat", pattern="B", radius=0, group=(1, 4, 4), tile=(1, 4, 4)), GRID)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    expected = (weights * ~mask).sum(-1)[..., groups.anchors]
    torch.testing.assert_close(mass, expected.float(), atol=1e-6, rtol=1e-5)


def test_the_output_error_is_the_mass_times_the_distance_of_the_means() -> None:
    """|o - s| = tau |mean of the tail - mean of the head| <= 2 tau max |v|."""
    layout = TokenLayout(GRID)
    q, k, v = inputs(layout)
    mask = token_mask(make_method("grat", pattern="B", radius=0, group=(1, 4, 4), tile=(1, 4, 4)), GRID)[0]
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    tau = (weights * ~mask).sum(-1, keepdim=True)
    tail = torch.einsum("bhqk,bkhd->bhqd", weights * ~mask / tau, v)
    sparse, full = dense(q, k, v, mask).transpose(1, 2), dense(q, k, v).transpose(1, 2)
    torch.testing.assert_close(full - sparse, tau * (tail - sparse))
    assert ((full - sparse).norm(dim=-1) <= 2 * tau[..., 0] * v.norm(dim=-1).max() + 1e-12).all()


def test_padding_of_the_text_is_hidden_from_anchors_too() -> None:
    layout = TokenLayout(GRID, 6, "suffix")
    q, k, v = inputs(layout, batch=2)
    lengths = torch.tensor([2, 6], dtype=torch.int32)
    keys = torch.arange(layout.num_tokens) < layout.visual_tokens + lengths[:, None]
    attention = bound(layout, delta="add")
    out = attention.attend(AttnCall(q, k, v, text_lengths=lengths, backend="reference")).out
    anchors = attention.groups().anchors
    torch.testing.assert_close(out[:, anchors], dense(q, k, v, keys[:, None, None])[:, anchors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_rows_equal_attention_and_its_lse_in_any_number_of_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.to(dtype) for x in inputs(TokenLayout((1, 5, 9)), batch=2))
    whole = dense_rows(q[:, 3:20], k, v)
    monkeypatch.setattr("dit_accel.kernels.block_sparse.dense_rows._SCORES", 2 * 2 * 45 * 3)
    for got, want in zip(dense_rows(q[:, 3:20], k, v), whole, strict=True):
        torch.testing.assert_close(got, want)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, 3:20], k) / math.sqrt(q.shape[-1])
    torch.testing.assert_close(whole[0], dense(q, k, v)[:, 3:20])
    torch.testing.assert_close(whole[1], scores.logsumexp(-1))


@pytest.mark.parametrize("grid", [(3, 6, 7), (1, 5, 9), (1, 1, 1)], ids=str)
def test_each_anchor_lies_in_its_own_tile(grid: Triple) -> None:
    groups = tile_groups(TokenLayout(grid).boxes((2, 4, 4)))
    assert torch.equal(groups.group_of[groups.anchors], torch.arange(len(groups.anchors)))


def test_gradients_flow_through_the_correction() -> None:
    layout = TokenLayout((1, 4, 8))
    q, k, v = (x[..., :1, :].requires_grad_() for x in inputs(layout))

    def run(*tensors: Tensor) -> Tensor:
        return bound(layout, delta="add").attend(AttnCall(*tensors, backend="reference")).out

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_an_unknown_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="delta must be add, merge or None, got 'mean'"):
        make_method("radial", delta="mean")
