"""Pyramid attention: the published rule by brute force, its exact cases, quotas and densities."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.kernels.pyramid.importance import log_importance
from dit_accel.kernels.pyramid.order import curve_order
from dit_accel.kernels.pyramid.triton_importance import triton_log_importance
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods.attention import AttnCall, AttnResult
from dit_accel.methods.pyramid import LEVELS, PyramidAttnProcessor
from dit_accel.pipelines.presets import PRESETS, preset_method
from dit_accel.pipelines.specs import find_spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = (0.001, 0.05, 0.1, 0.35, 0.7, 1.0)
MASS = {"assign": "mass", "ends": (0.4, 0.5, 0.6, 0.8)}
MEAN = {"importance": "mean"}
RULES = [
    pytest.param("none", (4, 15, 17), MEAN | {"ends": (0.2, 0.4, 0.6, 0.9)}, id="rank-of-means"),
    pytest.param("prefix", (4, 14, 16), {"ends": (0.2, 0.4, 0.6, 0.9), "samples": 128}, id="rank-prefix"),
    pytest.param("none", (4, 14, 16), MASS | {"samples": 128}, id="mass"),
    pytest.param(
        "suffix", (9, 5, 11), MEAN | {"ends": (0.3, 0.3, 0.3, 0.8), "query_block": 64}, id="rank-1-and-8-suffix"
    ),
    pytest.param("prefix", (5, 9, 7), MEAN | {"key_block": 32, "ends": (0, 0.5, 0.5, 0.5)}, id="rank-2-prefix"),
    pytest.param("none", (5, 9, 7), MASS | MEAN | {"key_block": 32, "ends": (0, 0.7, 0.7, 0.7)}, id="mass-least"),
    pytest.param(
        "suffix", (1, 25, 23), MASS | MEAN | {"key_block": 64, "ends": (0.5, 0.7, 1, 1)}, id="mass-all-suffix"
    ),
]


def tensors(layout: TokenLayout, *, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    shape = (batch, layout.num_tokens, 2, 8)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.to(dtype) for x in (2 * q, k, v)]


def attend(method: PyramidAttnProcessor, layout: TokenLayout, qkv: list[Tensor], **call: Any) -> AttnResult:
    attention = method.attention(layout)
    assert attention is not None
    return attention.attend(AttnCall(*qkv, **call))


def dense(qkv: list[Tensor], lengths: Tensor | None = None, text: slice = slice(0)) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv)
    seen = torch.ones(len(q), 1, 1, q.shape[2], dtype=torch.bool)
    if lengths is not None:
        seen[..., text] = (torch.arange(text.stop - text.start) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


class Choice(NamedTuple):
    """Level of every key block, 0 where it is not seen, per batch item, head and query block."""

    levels: dict[tuple[int, int, int], list[int]]


def chosen_levels(method: PyramidAttnProcessor, q: Tensor, k: Tensor, order: Tensor) -> Choice:
    """By the definition, with all tokens of the blocks for samples, or their means."""
    found = {}
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        queries, keys = q[b, order, h].split(method.query_block), k[b, order, h].split(method.key_block)
        if method.importance == "mean":
            queries, keys = ([x.mean(0, keepdim=True) for x in blocks] for blocks in (queries, keys))
        for i, rows in enumerate(queries):
            probability = (rows @ torch.cat(keys).T / q.shape[-1] ** 0.5).softmax(-1)
            worth = [float(x.max()) for x in probability.split([len(x) for x in keys], 1)]
            best = sorted(range(len(worth)), key=lambda j: (-worth[j], j))
            levels, begin = [0] * len(worth), 0
            for level, end in zip(LEVELS, method.ends, strict=True):
                if method.assign == "rank":
                    stop = int(len(worth) * end)
                else:
                    before = itertools.accumulate([worth[j] for j in best[:-1]], initial=0.0)
                    stop = sum(mass < end * sum(worth) for mass in before)
                    stop = max(stop, int(0.06 * len(worth)) + 1) if level == 1 else stop
                for j in best[begin:stop]:
                    levels[j] = level
                begin = max(begin, stop)
            found[b, h, i] = levels
    return Choice(found)


def means_of(x: Tensor, level: int) -> Tensor:
    return x if level == 1 else torch.stack([run.mean(0) for run in x.split(level)])


def by_the_rule(method: PyramidAttnProcessor, layout: TokenLayout, qkv: list[Tensor]) -> tuple[Tensor, Tensor, Choice]:
    """Output and LSE of all queries, key by key; text keys and text queries in full."""
    q, k, v = qkv
    order = curve_order(layout.grid).long() + layout.prefix
    text = torch.ones(layout.num_tokens).index_fill(0, order, 0).nonzero()[:, 0]
    choice = chosen_levels(method, q.detach(), k.detach(), order)
    rows: list[list[Tensor]] = []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        out, lse = q.new_zeros(layout.num_tokens, q.shape[-1]), q.new_zeros(layout.num_tokens)
        parts = [(queries, choice.levels[b, h, i]) for i, queries in enumerate(order.split(method.query_block))]
        parts.append((text, [1] * len(parts[0][1])))
        for queries, levels in parts:
            keys, values, weights = [k[b, text, h]], [v[b, text, h]], [1] * len(text)
            for block, level in zip(order.split(method.key_block), levels, strict=True):
                if level:
                    keys.append(means_of(k[b, block, h], level))
                    values.append(means_of(v[b, block, h], level))
                    weights += [len(run) for run in block.split(level)]
            scores = q[b, queries, h] @ torch.cat(keys).T / q.shape[-1] ** 0.5 + torch.tensor(weights).log()
            out = out.index_copy(0, queries, scores.softmax(-1) @ torch.cat(values))
            lse = lse.index_copy(0, queries, scores.logsumexp(-1))
        rows.append([out, lse])
    shape = (q.shape[0], q.shape[2])
    out, lse = (torch.stack(x).unflatten(0, shape) for x in zip(*rows, strict=True))
    return out.transpose(1, 2), lse, choice


@pytest.mark.parametrize(("position", "grid", "options"), RULES)
def test_output_lse_and_gradients_are_those_of_the_rule(
    position: TextPosition, grid: Triple, options: dict[str, Any]
) -> None:
    layout = TokenLayout(grid, 0 if position == "none" else 5, position)
    method = PyramidAttnProcessor(**options)
    qkv = [x.requires_grad_() for x in tensors(layout)]
    out, lse, choice = by_the_rule(method, layout, qkv)
    result = attend(method, layout, qkv, with_lse=True)
    torch.testing.assert_close(result.out, out, atol=1e-12, rtol=0)
    torch.testing.assert_close(result.lse, lse, atol=1e-12, rtol=0)
    assert any(choice.levels[0, h, i] != choice.levels[1, h, i] for _, h, i in choice.levels)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for got, want in zip(*(torch.autograd.grad((x * weight).sum(), qkv) for x in (result.out, out)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("blocks", "samples", "dim"),
    [((5, 7), (8, 8), 24), ((9, 3), (1, 1), 16), ((3, 5), (32, 16), 64), ((2, 3), (128, 128), 32)],
    ids=str,
)
def test_triton_importance_is_the_largest_probability_of_each_pair_of_blocks(
    blocks: tuple[int, int], samples: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [count * each for count, each in zip(blocks, samples, strict=True)]
    q, k = (torch.randn(2, length, 3, dim, generator=generator).to(DEVICE, dtype) for length in tokens)
    found = triton_log_importance(q, k, *samples, scale=0.3)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.3
    worth = scores.softmax(-1).unflatten(-1, (-1, samples[1])).amax(-1).unflatten(2, (-1, samples[0])).amax(3)
    torch.testing.assert_close(found.double(), worth.log(), atol=2e-5, rtol=0)
    torch.testing.assert_close(log_importance(q.double(), k.double(), *samples, scale=0.3), worth.log())


@pytest.mark.parametrize("options", [{"ends": (1, 1, 1, 1)}, MASS | {"ends": (1, 1, 1, 1)}, {"density": 1.0}], ids=str)
@pytest.mark.parametrize("grid", [(9, 10, 11), (1, 23, 13), (1, 1, 5)], ids=str)
def test_everything_at_level_1_is_dense_attention(grid: Triple, options: dict[str, Any]) -> None:
    layout = TokenLayout(grid)
    qkv = tensors(layout, dtype=torch.float32)
    exact = dense([x.double() for x in qkv])
    result = attend(PyramidAttnProcessor(**options), layout, qkv)
    worst_of_dense = (dense(qkv) - exact).abs().max()
    assert (result.out - exact).abs().max() <= 4 * worst_of_dense + torch.finfo(torch.float32).eps
    assert float(result.density) == PyramidAttnProcessor(**options).ideal_density(layout) == 1.0


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_text_padding_is_seen_by_nobody(position: TextPosition) -> None:
    layout = TokenLayout((3, 10, 11), 21, position)
    start = 0 if position == "prefix" else layout.visual_tokens
    text, lengths = slice(start, start + 21), torch.tensor([21, 4], dtype=torch.int32)
    qkv = tensors(layout)
    result = attend(PyramidAttnProcessor(ends=(1, 1, 1, 1)), layout, qkv, text_lengths=lengths, with_lse=True)
    torch.testing.assert_close(result.out, dense(qkv, lengths, text), atol=1e-12, rtol=0)
    padding = slice(text.start + 4, text.stop)
    for x in qkv[1:]:
        x[1, padding] = 1e4
    sparse = [attend(PyramidAttnProcessor(), layout, qkv, text_lengths=lengths, with_lse=True) for _ in range(2)]
    for x in qkv[1:]:
        x[1, padding] = -1e4
    again = attend(PyramidAttnProcessor(), layout, qkv, text_lengths=lengths, with_lse=True)
    assert torch.equal(sparse[0].out, again.out)
    assert torch.equal(sparse[0].out, sparse[1].out)
    assert sparse[0].lse is not None and again.lse is not None and torch.equal(sparse[0].lse, again.lse)


@pytest.mark.parametrize(("level", "ends"), [(2, (0, 1, 1, 1)), (4, (0, 0, 1, 1)), (8, (0, 0, 0, 1))], ids=str)
def test_a_level_is_exact_where_keys_are_constant_in_its_runs(level: int, ends: tuple[float, ...]) -> None:
    layout = TokenLayout((4, 15, 17))
    q, k, v = tensors(layout)
    order = curve_order(layout.grid).long()
    run = order[torch.arange(len(order)) // level * level]  # the first token of each token's run
    k = k.index_copy(1, order, k[:, run])
    result = attend(PyramidAttnProcessor(ends=ends), layout, [q, k, v], with_lse=True)  # type: ignore[arg-type]
    torch.testing.assert_close(result.out, dense([q, k, v]), atol=1e-6, rtol=0)  # log weights are float32
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    torch.testing.assert_close(result.lse, scores.logsumexp(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("importance", ["sampled", "mean"])
def test_fewer_tokens_than_a_run_are_one_mean(importance: Any) -> None:
    layout = TokenLayout((1, 1, 5))
    q, k, v = tensors(layout)
    result = attend(PyramidAttnProcessor(ends=(0, 0, 0, 1), importance=importance), layout, [q, k, v], with_lse=True)
    torch.testing.assert_close(result.out, v.mean(1, keepdim=True).expand_as(v), atol=1e-12, rtol=0)
    score = torch.einsum("bqhd,bhd->bhq", q, k.mean(1)) / q.shape[-1] ** 0.5
    torch.testing.assert_close(result.lse, score + torch.tensor(5.0).log(), atol=1e-12, rtol=0)
    assert float(result.density) == pytest.approx(1 / 5, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        pytest.param({"ends": (0.1, 0.3, 0.6, 0.9)}, (1, 2, 3, 3), id="rank"),
        pytest.param({"ends": (0.19, 0.19, 0.19, 0.59)}, (1, 0, 0, 4), id="rank-rounded-down"),
        pytest.param({"ends": (0.01, 0.2, 0.2, 0.2)}, (1, 1, 0, 0), id="rank-best-block"),
        pytest.param({"ends": (0.0, 0.01, 0.2, 0.2)}, (0, 1, 1, 0), id="rank-best-block-level-2"),
        pytest.param(MASS, (4, 1, 1, 2), id="mass"),
        pytest.param(MASS | {"ends": (0.41, 0.41, 0.59, 0.6)}, (5, 0, 1, 0), id="mass-with-crossing-block"),
        pytest.param(MASS | {"ends": (0.0, 0.0, 0.0, 0.2)}, (1, 0, 0, 1), id="mass-least-of-level-1"),
    ],
)
def test_blocks_that_matter_alike_are_given_in_their_order(options: dict[str, Any], blocks: tuple[int, ...]) -> None:
    layout = TokenLayout((1, 32, 40))  # ten blocks
    _, k, v = tensors(layout)
    result = attend(PyramidAttnProcessor(**options), layout, [torch.zeros_like(k), k, v])
    share = sum(count / level for count, level in zip(blocks, LEVELS, strict=True)) / 10
    assert float(result.density) == pytest.approx(share, abs=1e-12)
    seen = curve_order(layout.grid).long()[: sum(blocks) * 128]
    torch.testing.assert_close(result.out, v[:, seen].mean(1, keepdim=True).expand_as(v), atol=1e-7, rtol=0)


def test_mass_in_one_block_leaves_the_others_out() -> None:
    layout = TokenLayout((1, 64, 64))  # 32 blocks
    q, k, v = tensors(layout)
    seen = curve_order(layout.grid).long()[5 * 128 : 6 * 128]
    q[..., 0] = 30.0
    k[..., 0] = 0.0
    k[:, seen, :, 0] = 8.0
    result = attend(PyramidAttnProcessor(assign="mass", ends=(0.4, 0.5, 0.6, 0.8)), layout, [q, k, v])
    assert float(result.density) == pytest.approx((int(0.06 * 32) + 1) / 32, abs=1e-12)
    torch.testing.assert_close(result.out, dense([q, k, v]), atol=1e-9, rtol=0)


def test_means_of_unused_levels_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def attention(q: Tensor, *args: Any, pooled: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        made.append(0 if pooled is None else pooled.k.shape[1])
        return torch.zeros_like(q), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr("dit_accel.methods.pyramid_attention.list_attention", attention)
    layout = TokenLayout((1, 32, 40))
    for ends in ((0.1, 0.2, 0.3, 0.4), (0.1, 0.1, 0.1, 0.4), (0.1, 0.1, 0.1, 0.1)):
        attend(PyramidAttnProcessor(ends=ends), layout, tensors(layout))
    assert made == [1280 * 7 // 8, 1280 // 8, 0]


@pytest.mark.parametrize("options", [{}, MASS, MEAN], ids=["rank", "mass", "mean"])
def test_batch_items_choose_for_themselves_and_repeat_bit_for_bit(options: dict[str, Any]) -> None:
    layout, method = TokenLayout((3, 15, 17)), PyramidAttnProcessor(**options)
    q, k, v = tensors(layout, dtype=torch.float32)
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))  # guidance branches differ in their queries alone
    both = attend(method, layout, [q, k, v]).out
    assert torch.equal(both, attend(method, layout, [q, k, v]).out)
    for item in (slice(0, 1), slice(1, 2)):
        alone = attend(method, layout, [q[item], k[item], v[item]]).out
        torch.testing.assert_close(both[item], alone, atol=1e-6, rtol=0)
    assert not torch.allclose(both[0], attend(method, layout, [q[[1, 0]], k, v]).out[0], atol=1e-2)


@pytest.mark.parametrize("ends", [(0.1, 0.15, 0.15, 0.35), (0.4, 0.5, 0.6, 0.8), (0.3, 0.3, 0.3, 0.3)], ids=str)
@pytest.mark.parametrize("grid", [(7, 24, 32), (21, 45, 80), (5, 9, 11), (1, 1, 1)], ids=str)
def test_density_is_monotone_within_its_target_and_complete_at_one(grid: Triple, ends: tuple[float, ...]) -> None:
    layout = TokenLayout(grid)
    methods = [PyramidAttnProcessor(density=target, ends=ends, assign="mass") for target in TARGETS]  # type: ignore[arg-type]
    kept = [method.ideal_density(layout) for method in methods]
    assert kept == sorted(kept)
    assert all(got <= max(target, kept[0]) + 1e-12 for got, target in zip(kept, TARGETS, strict=True))
    assert kept[-1] == 1.0
    assert all(target - got < 0.01 for got, target in zip(kept, TARGETS, strict=True) if grid == (21, 45, 80))


@pytest.mark.parametrize("grid", [(4, 15, 17), (2, 23, 25), (1, 16, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"density": 0.4}, MASS], ids=["rank", "density", "mass"])
def test_computed_density_is_at_most_the_expected_one(grid: Triple, options: dict[str, Any]) -> None:
    layout = TokenLayout(grid, 9, "suffix")
    attention = PyramidAttnProcessor(**options).attention(layout)
    assert attention is not None
    computed = float(attention.attend(AttnCall(*tensors(layout))).density)
    finer = 64 / layout.visual_tokens  # of the ragged block, which is expected to be of the coarsest level
    assert computed <= attention.density + 1e-12
    assert "assign" in options or computed >= attention.density - finer


def test_groups_are_blocks_of_the_curve_and_their_anchors_can_be_corrected() -> None:
    layout = TokenLayout((4, 15, 17), 6, "prefix")
    qkv = tensors(layout)
    attention = PyramidAttnProcessor(delta="add").attention(layout)
    assert attention is not None
    groups, order = attention.groups(), curve_order(layout.grid).long()
    assert groups.group_of[order].tolist() == [place // 128 for place in range(1020)]
    assert groups.group_of[groups.anchors].tolist() == list(range(8))
    out, rows = attention.attend(AttnCall(*qkv)).out, groups.anchors + 6
    torch.testing.assert_close(out[:, rows], dense(qkv)[:, rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("model", "density"), [("wan2.1-14b", 0.51), ("wan2.1-1.3b", 0.59), ("shapes", 0.34)])
def test_presets_fit_their_models(model: str, density: float) -> None:
    preset = PRESETS[model, "pyramid"]
    layout = find_spec(model).layout(preset.height, preset.width, preset.num_frames)
    assert preset_method(model, "pyramid").ideal_density(layout) == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"assign": "best"}, "assign must be rank or mass, got 'best'.", id="assign"),
        pytest.param({"importance": "max"}, "importance must be sampled or mean, got 'max'.", id="importance"),
        pytest.param({"ends": (0.1, 0.2, 0.3)}, "ends must be 4 shares", id="ends-three"),
        pytest.param({"ends": (0.2, 0.1, 0.3, 0.4)}, "ends must be 4 shares", id="ends-fall"),
        pytest.param({"ends": (0.2, 0.3, 0.4, 1.4)}, "ends must be 4 shares", id="ends-beyond-one"),
        pytest.param({"ends": (0, 0, 0, 0)}, "the last above 0", id="ends-empty"),
        pytest.param(
            {"ends": (0, 0, 0, 1), "density": 0.3}, "density needs ends with a share of level 1", id="density"
        ),
        pytest.param({"key_block": 48}, "query_block and key_block must be one of 16, 32, 64, 128", id="block"),
        pytest.param({"key_block": 64}, "level 8 needs a key_block of at least 128 tokens, got 64", id="level"),
        pytest.param({"samples": 0}, "samples must divide the 128 tokens of a block, got 0", id="no-samples"),
        pytest.param({"samples": 64, "query_block": 32}, "must divide the 32 tokens of a block, got 64", id="samples"),
    ],
)
def test_options_out_of_range_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PyramidAttnProcessor(**options)
    assert str(error.value).count(". ") == 0
    assert str(error.value).endswith(".")


def test_a_backend_without_means_is_refused() -> None:
    attention = PyramidAttnProcessor().attention(TokenLayout((1, 16, 16)))
    assert attention is not None
    with pytest.raises(ValueError, match="runs on the backends auto, reference, torch, triton, got 'gluon'"):
        attention.check(torch.zeros(1, 256, 1, 16), "gluon")
