"""The log-linear method: its output on real layouts, densities, groups, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.kernels.pyramid.log_linear_reference import log_linear_reference
from dit_accel.kernels.pyramid.order import curve_order
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods.attention import AttnCall, AttnResult
from dit_accel.methods.log_linear import LogLinearAttnProcessor

TARGETS = (0.001, 0.05, 0.1, 0.35, 0.7, 1.0)


def tensors(layout: TokenLayout) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    return [torch.randn(2, layout.num_tokens, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def attend(method: LogLinearAttnProcessor, layout: TokenLayout, qkv: list[Tensor], **call: Any) -> AttnResult:
    attention = method.attention(layout)
    assert attention is not None
    return attention.attend(AttnCall(*qkv, **call))


def dense(qkv: list[Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


@pytest.mark.parametrize("options", [{}, {"exclude_covered": False}, {"levels": 2, "top_k": 3}], ids=str)
@pytest.mark.parametrize(
    ("grid", "text", "position"),
    [((4, 9, 11), 0, "none"), ((1, 23, 19), 7, "prefix"), ((5, 13, 7), 20, "suffix")],
    ids=["video", "image after text", "video before text"],
)
def test_output_and_lse_are_those_of_full_matrices(
    grid: Triple, text: int, position: TextPosition, options: dict[str, Any]
) -> None:
    layout, method = TokenLayout(grid, text, position), LogLinearAttnProcessor(**{"top_k": 2, **options})
    qkv = tensors(layout)
    lengths = torch.tensor([text, text // 2], dtype=torch.int32) if text else None
    want, want_lse = log_linear_reference(
        *qkv,
        order=curve_order(grid) + layout.prefix,
        top_k=method.top_k,
        block=16,
        levels=method.levels or 1,
        exclude_covered=method.exclude_covered,
        prefix=layout.prefix,
        text_lengths=lengths,
    )
    with_lse = attend(method, layout, qkv, text_lengths=lengths, with_lse=True)
    torch.testing.assert_close(with_lse.out, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(with_lse.lse, want_lse, rtol=0, atol=1e-6)
    alone = attend(method, layout, qkv, text_lengths=lengths)
    assert alone.lse is None
    torch.testing.assert_close(alone.out, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "levels", "keys"),
    [(64, 1, 384), (64, 2, 272), (128, 1, 1152), (128, 2, 320), (256, 1, 4224), (256, 2, 512), (512, 2, 1280)],
)
def test_keys_of_a_query_are_the_published_ones(side: int, levels: int, keys: int) -> None:
    layout = TokenLayout((1, side, side))
    assert LogLinearAttnProcessor(levels=levels).ideal_density(layout) * side * side == keys


def test_default_levels_keep_the_density_falling() -> None:
    sides = (16, 32, 64, 128, 256, 512, 1024)
    densities = [LogLinearAttnProcessor().ideal_density(TokenLayout((1, side, side))) for side in sides]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == (3 * 128 + 256) / 1024**2


@pytest.mark.parametrize("options", [{}, {"levels": 1}, {"block": 32}, {"exclude_covered": False}], ids=str)
@pytest.mark.parametrize("grid", [(7, 24, 32), (21, 45, 80), (5, 9, 11), (1, 83, 83), (1, 1, 1)], ids=str)
def test_density_is_monotone_within_its_target_and_complete_at_one(grid: Triple, options: dict[str, Any]) -> None:
    layout = TokenLayout(grid)
    methods = [LogLinearAttnProcessor(density=target, **options) for target in TARGETS]
    kept = [method.ideal_density(layout) for method in methods]
    least = LogLinearAttnProcessor(top_k=1, **options).ideal_density(layout)
    assert kept == sorted(kept)
    assert all(got <= max(target, least) + 1e-12 for got, target in zip(kept, TARGETS, strict=True))
    assert kept[-1] == 1.0


def test_density_counts_text_as_seen_and_seeing() -> None:
    layout = TokenLayout((1, 64, 64), 100, "suffix")
    attention = LogLinearAttnProcessor().attention(layout)
    assert attention is not None
    assert attention.density == (384 * 4096 + 2 * 4096 * 100 + 100**2) / 4196**2
    assert attend(LogLinearAttnProcessor(), layout, tensors(layout)).density == attention.density


@pytest.mark.parametrize("options", [{}, {"exclude_covered": False}, {"block": 32, "levels": 2}], ids=str)
def test_density_one_is_dense_attention(options: dict[str, Any]) -> None:
    layout = TokenLayout((4, 11, 13), 5, "prefix")
    qkv = tensors(layout)
    result = attend(LogLinearAttnProcessor(density=1.0, **options), layout, qkv)
    torch.testing.assert_close(result.out, dense(qkv), rtol=0, atol=1e-12)
    assert result.density == pytest.approx(1.0)


def test_groups_are_blocks_of_the_curve_and_their_anchors_can_be_corrected() -> None:
    layout = TokenLayout((3, 11, 13), 6, "prefix")
    attention = LogLinearAttnProcessor(top_k=2, delta="add").attention(layout)
    assert attention is not None
    groups, order = attention.groups(), curve_order(layout.grid).long()
    assert groups.group_of[order].tolist() == [place // 16 for place in range(429)]
    assert groups.group_of[groups.anchors].tolist() == list(range(27))
    qkv = tensors(layout)
    rows = groups.anchors + 6
    torch.testing.assert_close(attention.attend(AttnCall(*qkv)).out[:, rows], dense(qkv)[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0."),
        ({"block": 8}, "block must be one of 16, 32, 64, 128, got 8."),
        ({"levels": 0}, "levels must be at least 1, got 0."),
        ({"density": 0.0}, "density must be in (0, 1], got 0.0."),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_out_of_range_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        LogLinearAttnProcessor(**options)
    assert str(error.value) == sentence


def test_more_levels_than_a_layout_has_are_refused_before_the_first_call() -> None:
    with pytest.raises(ValueError, match="levels must be 1 to 2 for 256 tokens in blocks of 16, got 3."):
        LogLinearAttnProcessor(levels=3).attention(TokenLayout((1, 16, 16)))


def test_a_backend_without_means_is_refused() -> None:
    attention = LogLinearAttnProcessor().attention(TokenLayout((1, 16, 16)))
    assert attention is not None
    with pytest.raises(ValueError, match="runs on the backends auto, reference, torch, triton, got 'gluon'"):
        attention.check(torch.zeros(1, 256, 1, 16), "gluon")
