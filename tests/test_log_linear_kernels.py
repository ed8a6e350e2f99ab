"""Log-linear attention: its curve, means, choice and lists, and the whole against full matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.kernels.pyramid import hierarchy, log_linear_lists, means
from dit_accel.kernels.pyramid.hierarchy import hierarchical_top_k
from dit_accel.kernels.pyramid.lists import BlockLists
from dit_accel.kernels.pyramid.log_linear import depth_of, log_linear_attention
from dit_accel.kernels.pyramid.log_linear_reference import log_linear_reference, seen_weights
from dit_accel.kernels.pyramid.means import Levels, coarser, curve_means
from dit_accel.kernels.pyramid.order import curve_order

IMPLEMENTATIONS = ("torch", "triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton is not interpreted, it compiles
GRIDS: dict[str, Triple] = {
    "one token": (1, 1, 1),
    "a row": (1, 1, 37),
    "odd image": (1, 83, 83),
    "small video": (7, 24, 32),
    "video": (21, 45, 80),
}
LENGTHS = (1, 15, 16, 17, 31, 33, 255, 256, 257, 1023, 1025)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of means, choice and lists on any machine."""
    chosen: str = request.param
    for module in (means, hierarchy, log_linear_lists):
        monkeypatch.setattr(module, "runs_triton", lambda x: chosen == "triton")
    return chosen


def sequence(tokens: int, batch: int = 2, heads: int = 2, dim: int = 8) -> list[Tensor]:
    """Queries, keys and values, float64 [batch, tokens, heads, dim] on the device under test."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(3)
    ]


def shuffled(tokens: int, prefix: int = 0) -> Tensor:
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).int().to(DEVICE) + prefix


def choice(q: Tensor, k: Tensor, order: Tensor, top_k: int, block: int, depth: int, prefix: int = 0) -> list[Tensor]:
    levels = Levels(len(order), block, depth, q.shape[1] - len(order))
    pooled = curve_means((q.detach(), k.detach()), order, levels, prefix)
    return hierarchical_top_k(levels.split(pooled[0]), levels.split(pooled[1]), top_k, block)


def deepest(tokens: int, block: int) -> int:
    return next(depth for depth in itertools.count(1) if tokens <= block**depth)


# The curve.


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_curve_visits_every_token_once(grid: Triple) -> None:
    order = curve_order(grid)
    assert order.dtype == torch.int32
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid), dtype=torch.int32))


@pytest.mark.parametrize("side", [1, 2, 4, 32])
def test_on_square_power_of_two_images_the_curve_is_mortons(side: int) -> None:
    bits = range(side.bit_length())
    code = [
        sum((x >> b & 1) << 2 * b | (y >> b & 1) << 2 * b + 1 for b in bits) for y in range(side) for x in range(side)
    ]
    assert curve_order((1, side, side)).tolist() == sorted(range(side * side), key=code.__getitem__)


@pytest.mark.parametrize("name", ["odd image", "small video", "video"])
def test_runs_of_16_lie_closer_together_than_in_raster_order(name: str) -> None:
    grid = GRIDS[name]

    def half_perimeter(order: Tensor) -> float:
        runs = order[: len(order) // 16 * 16].view(-1, 16)
        places = torch.stack([runs // (grid[1] * grid[2]), runs // grid[2] % grid[1], runs % grid[2]])
        return float((places.amax(-1) - places.amin(-1) + 1).sum(0).double().mean())

    assert half_perimeter(curve_order(grid)) < 0.7 * half_perimeter(torch.arange(math.prod(grid)))


@pytest.mark.parametrize("grid", [(3, 7, 11), (1, 12, 20), (5, 6, 6)], ids=str)
def test_every_half_of_every_box_is_a_run(grid: Triple) -> None:
    def is_run(box: Tensor) -> bool:
        return int(box.amax() - box.amin()) + 1 == box.numel()

    def check(box: Tensor) -> None:  # places on the curve
        assert is_run(box)
        if box.numel() > 1:
            axis = max((1, 2, 0), key=lambda side: box.shape[side])
            side = box.shape[axis]
            cuts = [n for n in range(1, side) if all(is_run(half) for half in box.split([n, side - n], axis))]
            cut = min(cuts, key=lambda n: abs(2 * n - side))
            assert abs(2 * cut - side) <= 4
            for half in box.split([cut, side - cut], axis):
                check(half)

    check(curve_order(grid).argsort().view(grid))


# Means.


@pytest.mark.parametrize(
    ("tokens", "prefix", "suffix", "block", "depth"),
    [(5, 0, 0, 16, 1), (273, 3, 2, 16, 3), (70, 1, 0, 32, 2)],
)
def test_means_of_every_level_equal_pooling_from_the_tokens(
    implementation: str, poisoned_memory: None, tokens: int, prefix: int, suffix: int, block: int, depth: int
) -> None:
    order, levels = shuffled(tokens, prefix), Levels(tokens, block, depth, prefix + suffix)
    tensors = [x.float() for x in sequence(tokens + prefix + suffix, batch=1, dim=20)]
    tensors[1] = tensors[1].transpose(1, 2).contiguous().transpose(1, 2)
    tensors[2] = torch.stack(tensors[:1] * 3, -1)[..., 1]
    for x, pooled in zip(tensors, curve_means(tensors, order, levels, prefix), strict=True):
        assert pooled.shape == (1, levels.rows, 2, 20)
        on_curve = x[:, order.long()].double()
        for level, got in enumerate(levels.split(pooled), 1):
            want = torch.stack([run.mean(1) for run in on_curve.split(block**level, 1)], 1)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
        text = torch.cat([x[:, :prefix], x[:, prefix + tokens :]], 1)
        start = levels.start(depth + 1)
        assert torch.equal(pooled[:, start : start + levels.text], text)
        padding = pooled.sum() - sum(y.sum() for y in levels.split(pooled)) - text.sum()
        assert abs(float(padding)) < 1e-3


@pytest.mark.parametrize("tokens", [17, 257])
def test_gradients_of_means_are_the_shares_of_their_tokens(implementation: str, tokens: int) -> None:
    order, levels = shuffled(tokens, 2), Levels(tokens, 16, 2, 5)
    x, other, _ = (x.float() for x in sequence(tokens + 5, batch=1, dim=12))
    x.requires_grad_()
    pooled, _ = curve_means((x, other), order, levels, 2)
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    (got,) = torch.autograd.grad((pooled * weights).sum(), x)
    want = torch.zeros_like(x)
    for level, gradient in enumerate(levels.split(weights), 1):
        shares = gradient / levels.tokens_per(level, DEVICE)[:, None, None]
        want[:, order.long()] += shares[:, torch.arange(tokens, device=DEVICE) // 16**level]
    start = levels.start(3)
    want[:, [0, 1, tokens + 2, tokens + 3, tokens + 4]] += weights[:, start : start + 5]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_ragged_mean_weighs_what_it_stands_for() -> None:
    x = torch.arange(35, dtype=torch.float64).view(1, 35, 1, 1)
    fine, tokens = coarser(x, torch.ones(35, dtype=torch.long), 16)
    top, total = coarser(fine, tokens, 16)
    assert tokens.tolist() == [16, 16, 3]
    assert total.tolist() == [35]
    assert float(top) == pytest.approx(17)


# The choice.


def brute_choice(query_levels: list[Tensor], key_levels: list[Tensor], top_k: int, block: int) -> list[list[Any]]:
    """Row by row with Python's sort; levels [n, D] of one head."""
    chosen: list[list[Any]] = []
    for queries, keys in zip(query_levels[::-1], key_levels[::-1], strict=True):
        scores = (queries.double() @ keys.double().T).tolist()
        rows = []
        for i, row in enumerate(scores):
            parents = chosen[0][i // block] if chosen else range(len(keys))
            allowed = [c for p in parents for c in range(p * block, (p + 1) * block)] if chosen else parents
            key = {c: math.inf if math.isnan(row[c]) else -row[c] for c in allowed if c < len(keys)}
            rows.append(sorted(sorted(key, key=lambda c: (key[c], c))[:top_k]))
        chosen.insert(0, rows)
    return chosen


@pytest.mark.parametrize(
    ("blocks", "block", "top_k", "kind"),
    [
        (1, 16, 8, "random"),
        (17, 16, 3, "random"),
        (33, 16, 5, "ties"),
        (300, 16, 8, "ties"),
        (300, 16, 3, "nan"),
        (100, 32, 7, "random"),
        (260, 128, 2, "random"),
        (40, 16, 100, "random"),
    ],
)
def test_the_choice_follows_its_definition(implementation: str, blocks: int, block: int, top_k: int, kind: str) -> None:
    sizes = [blocks]
    while sizes[-1] > block:
        sizes.append(-(-sizes[-1] // block))
    generator = torch.Generator().manual_seed(blocks)
    levels = [torch.randn(2, 2, n, 2, 24, generator=generator).to(DEVICE) for n in sizes]
    if kind == "ties":
        levels = [x.sign() * (x.abs() > 1) for x in levels]
    if kind == "nan":
        levels[0][1, :, ::3] = math.nan
    queries, keys = [x[0] for x in levels], [x[1] for x in levels]
    got = hierarchical_top_k(queries, keys, top_k, block)
    for batch, head in itertools.product(range(2), range(2)):
        want = brute_choice([x[batch, :, head] for x in queries], [x[batch, :, head] for x in keys], top_k, block)
        assert [x[batch, head].tolist() for x in got] == want


def test_with_every_parent_chosen_the_hierarchy_chooses_as_a_flat_ranking(implementation: str) -> None:
    q, k, _ = (x.float() for x in sequence(40))
    tops = [coarser(x, torch.ones(40, device=DEVICE), 16)[0] for x in (q, k)]
    got = hierarchical_top_k([q, tops[0]], [k, tops[1]], 3, 16)
    assert torch.equal(got[0], hierarchical_top_k([q], [k], 3, 16)[0])


def test_many_candidates_take_the_same_choice_by_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = (x.float() for x in sequence(16 * 50))
    want = choice(q, k, shuffled(16 * 50), 3, 16, 2)
    monkeypatch.setattr(hierarchy, "runs_triton", lambda x: True)
    monkeypatch.setattr(hierarchy, "_CANDIDATES", 16)
    got = choice(q, k, shuffled(16 * 50), 3, 16, 2)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# The whole.


@pytest.mark.parametrize("exclude_covered", [True, False])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_agrees_with_full_matrices_at_lengths_around_powers_of_two(tokens: int, exclude_covered: bool) -> None:
    for depth in range(1, deepest(tokens, 16) + 1):
        top_k = 1 + depth
        q, k, v = sequence(tokens)
        options: dict[str, Any] = {
            "order": shuffled(tokens), "top_k": top_k, "block": 16, "levels": depth, "exclude_covered": exclude_covered
        }  # fmt: skip
        got = log_linear_attention(q, k, v, return_lse=True, **options)
        torch.testing.assert_close(got, log_linear_reference(q, k, v, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("exclude_covered", [True, False])
@pytest.mark.parametrize(
    ("tokens", "prefix", "suffix", "block", "depth", "padded"),
    [(300, 5, 0, 16, 1, False), (300, 0, 21, 16, 2, True), (300, 2, 19, 16, 2, True), (700, 40, 0, 32, 2, True),
     (290, 0, 7, 64, 2, False), (280, 0, 3, 128, 2, True)],
)  # fmt: skip
def test_agrees_with_full_matrices_beside_text(
    implementation: str,
    tokens: int,
    prefix: int,
    suffix: int,
    block: int,
    depth: int,
    padded: bool,
    exclude_covered: bool,
) -> None:
    q, k, v = sequence(tokens + prefix + suffix)
    lengths = torch.tensor([prefix + suffix - 1, 2], dtype=torch.int32, device=DEVICE) if padded else None
    options: dict[str, Any] = {
        "order": shuffled(tokens, prefix), "top_k": 2, "block": block, "levels": depth, "prefix": prefix,
        "text_lengths": lengths, "exclude_covered": exclude_covered, "scale": 0.6,
    }  # fmt: skip
    want, want_lse = log_linear_reference(q, k, v, **options)
    got, lse = log_linear_attention(q, k, v, return_lse=True, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_linear_attention(q, k, v, **options), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_keeping_every_block_is_dense_attention(depth: int) -> None:
    q, k, v = sequence(300 + 9)
    got = log_linear_attention(q, k, v, order=shuffled(300, 4), prefix=4, top_k=19, levels=depth)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tokens", [17, 257, 1025])
def test_without_what_is_covered_every_query_counts_every_token_once(tokens: int) -> None:
    q, k, _ = sequence(tokens, heads=1)
    for depth in range(1, deepest(tokens, 16) + 1):
        masks = [
            torch.zeros(*x.shape[:2], x.shape[2], x.shape[2], dtype=torch.bool).scatter_(-1, x.cpu().long(), True)
            for x in choice(q, k, shuffled(tokens), 3, 16, depth)
        ]
        for batch in range(2):
            counted = seen_weights([x[batch : batch + 1, :, :] for x in masks], tokens, 16, True).sum(-1)
            assert torch.equal(counted, torch.full_like(counted, tokens))


@pytest.mark.parametrize("depth", [1, 2])
def test_keys_that_are_equal_within_each_coarsest_block_are_exact(depth: int) -> None:
    q, k, v = sequence(700)
    order, run = shuffled(700), 16**depth
    k[:, order.long()] = k[:, order.long()][:, torch.arange(700) // run * run]
    v[:, order.long()] = v[:, order.long()][:, torch.arange(700) // run * run]
    got = log_linear_attention(q, k, v, order=order, top_k=1, levels=depth)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exclude_covered", [True, False])
@pytest.mark.parametrize(("tokens", "depth"), [(17, 1), (255, 1), (257, 2), (513, 2)])
def test_gradients_equal_those_of_full_matrices(tokens: int, depth: int, exclude_covered: bool) -> None:
    tensors = [x.requires_grad_() for x in sequence(tokens + 5, dim=4)]
    options: dict[str, Any] = {
        "order": shuffled(tokens, 2), "top_k": 2, "block": 16, "levels": depth, "prefix": 2,
        "exclude_covered": exclude_covered, "text_lengths": torch.tensor([5, 3], dtype=torch.int32, device=DEVICE),
    }  # fmt: skip
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    chosen = choice(tensors[0], tensors[1], options["order"], 2, 16, depth, 2)
    got = torch.autograd.grad((log_linear_attention(*tensors, **options) * weights).sum(), tensors)
    want_out, _ = log_linear_reference(*tensors, chosen=chosen, **options)
    for x, y in zip(got, torch.autograd.grad((want_out * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_triton_computes_output_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (means, hierarchy, log_linear_lists):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
    tensors = [x.float().requires_grad_() for x in sequence(50 + 3, heads=1, dim=16)]
    options: dict[str, Any] = {"order": shuffled(50), "top_k": 2, "block": 16, "levels": 2}
    chosen = choice(tensors[0], tensors[1], options["order"], 2, 16, 2)
    out = log_linear_attention(*tensors, backend="triton", **options)
    want, _ = log_linear_reference(*(x.double() for x in tensors), chosen=chosen, **options)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    got = torch.autograd.grad((out * weights).sum(), tensors)
    for x, y in zip(got, torch.autograd.grad((want * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_batch_items_and_heads_choose_for_themselves() -> None:
    q, k, v = sequence(600)
    options: dict[str, Any] = {"order": shuffled(600), "top_k": 2, "levels": 2}
    together = log_linear_attention(q, k, v, **options)
    for batch, head in itertools.product(range(2), range(2)):
        alone = log_linear_attention(*(x[batch : batch + 1, :, head : head + 1] for x in (q, k, v)), **options)
        torch.testing.assert_close(together[batch : batch + 1, :, head : head + 1], alone, rtol=0, atol=1e-12)


def test_repeats_bit_for_bit() -> None:
    tensors = [x.float().requires_grad_() for x in sequence(520)]
    options: dict[str, Any] = {"order": shuffled(520), "top_k": 3, "levels": 2}

    def results() -> tuple[Tensor, ...]:
        out = log_linear_attention(*tensors, **options)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    assert all(torch.equal(x, y) for x, y in zip(results(), results(), strict=True))


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x._base is None:
                self.elements = max(self.elements, x.numel())
        return result


def test_two_levels_need_no_map_of_tokens_by_blocks() -> None:
    tokens = 4096
    q, k = torch.randn(2, 1, tokens, 1, 16).to(DEVICE)
    order, levels = shuffled(tokens), Levels(tokens, 16, 2)
    largest = LargestTensor()
    with largest:
        pooled = curve_means((q, k), order, levels)
        chosen = hierarchical_top_k(levels.split(pooled[0]), levels.split(pooled[1]), 2, 16)
        lists = log_linear_lists.log_linear_lists(chosen, levels, True)
    assert largest.elements < tokens * (tokens // 16) // 4
    assert sum(x.numel() for part in lists for x in part.tensors) < tokens * 4


@pytest.mark.parametrize("exclude_covered", [True, False])
@pytest.mark.parametrize(("tokens", "block", "depth"), [(300, 16, 1), (300, 16, 2), (5000, 16, 3), (3000, 64, 2)])
def test_both_implementations_write_the_same_lists(
    monkeypatch: pytest.MonkeyPatch, tokens: int, block: int, depth: int, exclude_covered: bool
) -> None:
    q, k, _ = (x.float() for x in sequence(tokens + 20, dim=4))
    levels = Levels(tokens, block, depth, 20)
    chosen = choice(q, k, shuffled(tokens), 3, block, depth)
    found: list[tuple[BlockLists, ...]] = []
    for triton in (False, True):
        monkeypatch.setattr(log_linear_lists, "runs_triton", lambda x, triton=triton: triton)
        found.append(log_linear_lists.log_linear_lists(chosen, levels, exclude_covered))
    for one, other in zip(*found, strict=True):
        assert (one.rows, one.block) == (other.rows, other.block)
        assert torch.equal(one.indices, other.indices)
        if one.hidden is not None and other.hidden is not None:
            pooled = int(one.pooled[0, 0, 0])
            assert torch.equal(one.hidden[..., :pooled, :], other.hidden[..., :pooled, :])


def test_the_number_of_levels_grows_with_the_logarithm_of_the_length() -> None:
    assert [depth_of(n, 16) for n in (1, 4096, 4097, 65536, 65537, 1 << 20)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0."),
        ({"block": 24}, "block must be one of 16, 32, 64, 128, got 24."),
        ({"levels": 0}, "levels must be 1 to 2 for 100 tokens in blocks of 16, got 0."),
        ({"levels": 3}, "levels must be 1 to 2 for 100 tokens in blocks of 16, got 3."),
        ({"prefix": 4}, "prefix must be 0 to 3, the positions that are not in order, got 4."),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    q, k, v = sequence(103)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        log_linear_attention(q, k, v, order=shuffled(100), **options)


def test_shapes_that_differ_are_refused() -> None:
    q, k, v = sequence(100)
    with pytest.raises(ValueError, match="q, k and v must share one shape"):
        log_linear_attention(q, k[:, :99], v, order=shuffled(100))
    with pytest.raises(ValueError, match="order must be int32 with 1 to 100 positions, got torch.int64 of"):
        log_linear_attention(q, k, v, order=shuffled(100).long())
