"""DraftAttention: the pairs of regions it keeps, against the published procedure written out."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import dit_accel
from dit_accel import DraftAttnProcessor, token_mask
from dit_accel.kernels import BlockPlan
from dit_accel.kernels.block_sparse.plan import TileGrid, Triple
from dit_accel.kernels.selection.choose import head_percentile
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods import attention
from dit_accel.methods.attention import AttnCall

ODD: Triple = (3, 5, 7)  # in regions (1, 2, 4): eight of 8, 6, 4 and 3 tokens per frame
SMALL: dict[str, Any] = {"region": (1, 2, 4)}
CHOICES = [
    pytest.param({"select_by": "head", "keep": 0.2}, id="head"),
    pytest.param({"select_by": "head", "keep": 0.5, "sink": True}, id="head-sink"),
    pytest.param({"select_by": "head", "keep": 0.01, "same_frame": True}, id="head-forced-alone"),
    pytest.param({"select_by": "row", "keep": 0.3}, id="row"),
    pytest.param({"select_by": "row", "keep": 0.5, "sink": True, "same_frame": True}, id="row-sink-frame"),
    pytest.param({"select_by": "mass", "mass": 0.6}, id="mass"),
    pytest.param({"select_by": "mass", "mass": 0.3, "sink": True}, id="mass-sink"),
    pytest.param({"select_by": "head", "density": 0.3}, id="head-density"),
    pytest.param({"select_by": "row", "density": 0.4, "sink": True}, id="row-density-sink"),
]


def queries_and_keys(layout: TokenLayout, batch: int = 2, heads: int = 2, dim: int = 8) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    q, k = 4 * torch.randn(2, batch, layout.num_tokens, heads, dim, generator=make)
    return q, k


def select(grid: Triple, **options: Any) -> BlockPlan:
    layout = TokenLayout(grid)
    return DraftAttnProcessor(**options).select(layout, *queries_and_keys(layout))


def regions_of(tiles: TileGrid) -> list[list[int]]:
    """Tokens of each region, by frame, row and column of regions."""
    held: dict[Triple, list[int]] = {}
    for token, (t, h, w) in enumerate(itertools.product(*map(range, tiles.grid))):
        held.setdefault((t // tiles.tile[0], h // tiles.tile[1], w // tiles.tile[2]), []).append(token)
    return [held[region] for region in sorted(held)]


def by_hand(method: DraftAttnProcessor, tiles: TileGrid, q: Tensor, k: Tensor) -> Tensor:
    """The pairs of one head with q, k [N, D], token by token in float64: bool [regions, regions]."""
    regions = regions_of(tiles)
    q, k = (torch.stack([x[tokens].double().mean(0) for tokens in regions]) for x in (q, k))
    draft = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
    frames = torch.tensor([tokens[0] // (tiles.grid[1] * tiles.grid[2]) for tokens in regions])
    forced = torch.zeros_like(draft, dtype=torch.bool)
    forced[range(len(regions)), draft.argmax(-1)] = True
    if method.sink:
        forced[:, frames == 0] = True
    if method.same_frame:
        forced |= frames[:, None] == frames
    sizes = [len(tokens) for tokens in regions]
    rows = [[(query, key) for key in range(len(regions))] for query in range(len(regions))]
    for competing in [list(itertools.chain(*rows))] if method.select_by == "head" else rows:
        for query, key in best(method, draft, forced, sizes, competing):
            forced[query, key] = True
    return forced


def best(
    method: DraftAttnProcessor, draft: Tensor, forced: Tensor, sizes: list[int], competing: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The pairs that are kept of those that compete."""
    if method.select_by == "mass":
        order = sorted(competing, key=lambda pair: (-float(draft[pair]), pair))
        before = [0.0, *itertools.accumulate(float(draft[pair]) for pair in order)]
        return [pair for pair, mass in zip(order, before, strict=False) if mass < method.mass]
    order = sorted(competing, key=lambda pair: (not forced[pair], -float(draft[pair]), pair))
    if method.density is None:
        return order[: math.ceil(round(method.keep * len(order), 6))]
    tokens = list(itertools.accumulate(sizes[query] * sizes[key] for query, key in order))
    return [pair for pair, used in zip(order, tokens, strict=True) if used <= method.density * tokens[-1]]


@pytest.mark.parametrize("grid", [ODD, (2, 4, 8), (4, 3, 9)], ids=str)
@pytest.mark.parametrize("options", CHOICES)
def test_the_choice_is_the_definition(options: dict[str, Any], grid: Triple) -> None:
    method, layout = DraftAttnProcessor(**SMALL, **options), TokenLayout(grid)
    q, k = queries_and_keys(layout)
    plan = method.select(layout, q, k)
    tiles = method.tiles(layout)
    for item, head in itertools.product(range(2), repeat=2):
        expected = by_hand(method, tiles, q[item, :, head], k[item, :, head])
        assert torch.equal(plan.tile_mask()[item, head], expected)


def test_each_region_finds_the_region_its_queries_look_for() -> None:
    """Queries of region i are the one-hot key of region ``partner[i]``: the draft's index is the region's."""
    layout, method = TokenLayout((2, 19, 37)), DraftAttnProcessor(select_by="row", keep=0.01)
    regions = regions_of(method.tiles(layout))
    assert [len(regions[i]) for i in (0, 2, 6, 8)] == [128, 40, 48, 15]
    partner = torch.randperm(len(regions), generator=torch.Generator().manual_seed(1))
    q, k = torch.zeros(2, 1, layout.num_tokens, 1, len(regions))
    for region, tokens in enumerate(regions):
        k[:, tokens, :, region] = 1
        q[:, tokens, :, partner[region]] = 1
    mask = method.select(layout, q, k).tile_mask()[0, 0]
    assert torch.equal(mask.nonzero()[:, 1], partner)


@pytest.mark.parametrize("position", ["none", "prefix", "suffix"])
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"density": 1.0}, {"mass": 1.0}], ids=str)
def test_everything_kept_is_dense_attention(options: dict[str, float], position: TextPosition) -> None:
    layout = TokenLayout(ODD, 0 if position == "none" else 6, position)
    make = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, layout.num_tokens, 2, 8, generator=make)
    for by in ("mass",) if "mass" in options else ("head", "row"):
        bound = DraftAttnProcessor(**SMALL, select_by=by, **options).attention(layout)  # type: ignore[arg-type]
        assert bound is not None
        result = bound.attend(AttnCall(q, k, v))
        dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(result.out, dense, atol=1e-5, rtol=1e-5)
        assert float(result.density) == 1.0


def test_regions_in_place_are_the_published_reordering() -> None:
    """Published: tokens of a region are moved together, attention runs on blocks of 128 tokens, tokens move back."""
    frames, rows, columns = grid = (2, 16, 32)
    layout = TokenLayout(grid)
    make = torch.Generator().manual_seed(0)
    q, k, v = 3 * torch.randn(3, 1, layout.num_tokens, 2, 8, generator=make)
    method = DraftAttnProcessor(keep=0.4)
    bound = method.attention(layout)
    assert bound is not None
    out = bound.attend(AttnCall(q, k, v)).out

    order = torch.arange(layout.num_tokens).reshape(frames, rows // 8, 8, columns // 16, 16)
    order = order.permute(0, 1, 3, 2, 4).flatten()
    moved_q, moved_k, moved_v = (x[:, order].transpose(1, 2) for x in (q, k, v))
    pooled_q, pooled_k = (x.unflatten(2, (-1, 128)).mean(3) for x in (moved_q, moved_k))
    draft = (pooled_q @ pooled_k.mT * 8**-0.5).softmax(-1)
    kept = math.ceil(0.4 * draft.shape[-1] ** 2)
    threshold = draft.flatten(-2).topk(kept).values[..., -1]
    mask = draft >= threshold[..., None, None]
    assert mask.any(-1).all(), "here no region is left empty, and the rules agree"
    mask = mask.repeat_interleave(128, -2).repeat_interleave(128, -1)
    moved = scaled_dot_product_attention(moved_q, moved_k, moved_v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out[:, order], moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [0.07, 0.1, 0.25, 0.31, 1.0])
def test_kept_pairs_are_exactly_as_many_as_asked_even_if_all_tie(keep: float) -> None:
    layout = TokenLayout((2, 10, 20))
    q = torch.zeros(1, layout.num_tokens, 1, 8)  # 20 regions of (1, 2, 10)
    by_head = DraftAttnProcessor(region=(1, 2, 10), keep=keep).select(layout, q, q).tile_mask()
    assert int(by_head.sum()) == max(20, math.ceil(round(keep * 400, 6)))
    by_row = DraftAttnProcessor(region=(1, 2, 10), select_by="row", keep=keep).select(layout, q, q).tile_mask()
    per_row = math.ceil(round(keep * 20, 6))
    assert torch.equal(by_row, (torch.arange(20) < per_row).expand_as(by_row)), "the lower index wins"
    rest = by_head[0, 0, :, 1:].flatten()
    assert rest[: int(rest.sum())].all(), "after each region's first key, the lower query, then the lower key"


def test_no_region_is_left_without_keys_and_the_share_stays() -> None:
    """Regions whose queries are zero have a flat draft, and lose every key to regions that are sure."""
    layout, method = TokenLayout((1, 8, 32)), DraftAttnProcessor(region=(1, 2, 4), keep=0.1)
    tiles = method.tiles(layout)
    q, k = queries_and_keys(layout, batch=1)
    flat = (tiles.token_tile() % 3 == 0)[None, :, None, None].expand_as(q)
    q = torch.where(flat, 0.0, 8 * q)
    means = [x.transpose(1, 2)[:, :, torch.tensor(regions_of(tiles))].mean(3) for x in (q, k)]
    published = head_percentile((means[0] @ means[1].mT).softmax(-1), 0.1)
    assert not published.any(-1).all()
    counts = method.select(layout, q, k).counts
    assert counts.min() >= 1
    assert torch.equal(counts.sum(-1), torch.full((1, 2), math.ceil(0.1 * tiles.num_tiles**2)))


def test_batch_items_and_guidance_halves_keep_their_own_masks() -> None:
    layout, method = TokenLayout(ODD), DraftAttnProcessor(**SMALL)
    q, k = queries_and_keys(layout)
    together = method.select(layout, q, k).tile_mask()
    apart = [method.select(layout, q[i : i + 1], k[i : i + 1]).tile_mask() for i in range(2)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(*apart)


@pytest.mark.parametrize("select_by", ["head", "row", "mass"])
def test_first_and_own_frame_are_seen(select_by: Any) -> None:
    grid = (4, 5, 7)
    frame = DraftAttnProcessor(**SMALL).tiles(TokenLayout(grid)).token_tile()  # regions in order of frames
    frame = torch.arange(int(frame.max()) + 1) // 6
    options = SMALL | {"select_by": select_by, "keep": 0.2, "mass": 0.2}
    sink = select(grid, **options, sink=True).tile_mask()
    own = select(grid, **options, same_frame=True).tile_mask()
    assert sink[..., frame == 0].all() and not sink.all()
    assert own[..., frame[:, None] == frame].all() and not own[..., frame == 0].all()


@pytest.mark.parametrize("region", [(1, 2, 4), (2, 2, 4)], ids=str)
def test_a_single_layer_of_regions_has_neither_sink_nor_same_frame(region: Triple) -> None:
    grid = (region[0], 5, 7)
    plain = select(grid, region=region).tile_mask()
    assert torch.equal(select(grid, region=region, sink=True, same_frame=True).tile_mask(), plain)
    assert not plain.all()


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_text_is_dense_and_takes_no_part_in_the_choice(position: TextPosition) -> None:
    method, text = DraftAttnProcessor(**SMALL), 6
    q, k = queries_and_keys(TokenLayout(ODD), batch=1)
    plain = token_mask(method, ODD, query=q, key=k)
    noise = torch.full((1, text, 2, 8), 1e4)
    parts = (noise, q), (noise, k)
    q_text, k_text = (torch.cat(part if position == "prefix" else part[::-1], 1) for part in parts)
    mask = token_mask(method, ODD, text, position, query=q_text, key=k_text)
    visual = slice(text, None) if position == "prefix" else slice(0, -text)
    words = slice(0, text) if position == "prefix" else slice(-text, None)
    assert plain.shape == (2, 105, 105)
    assert torch.equal(mask[:, visual, visual], plain)
    assert mask[:, words].all() and mask[:, :, words].all()


@pytest.mark.parametrize("grid", [ODD, (4, 9, 11), (1, 83, 37), (1, 1, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"sink": True, "same_frame": True}], ids=["free", "forced"])
@pytest.mark.parametrize("select_by", ["head", "row"])
def test_density_is_used_up_but_not_exceeded(select_by: Any, options: dict[str, bool], grid: Triple) -> None:
    region = (1, 8, 16) if grid[1] > 50 else (1, 2, 4)
    layout = TokenLayout(grid)
    targets = (0.001, 0.1, 0.35, 0.7, 0.99, 1.0)
    plans = [select(grid, region=region, select_by=select_by, density=target, **options) for target in targets]
    masks = torch.stack([plan.tile_mask() for plan in plans])
    sizes = plans[0].tiles.tile_tokens().double()
    shares = masks.double() @ sizes / layout.visual_tokens  # of each region's keys: [targets, batch, heads, regions]
    if select_by == "head":
        shares = shares @ sizes / layout.visual_tokens
    assert not (masks[:-1] & ~masks[1:]).any(), "a larger density keeps all that a smaller one keeps"
    assert masks[-1].all()
    largest = (float(sizes.max()) / layout.visual_tokens) ** (2 if select_by == "head" else 1)
    for target, share in zip(targets, shares, strict=True):
        assert (share <= torch.clamp(shares[0], min=target) + 1e-9).all()
        assert (share > target - largest - 1e-9).all()


def test_expected_density_is_the_executed_one_where_regions_are_equal() -> None:
    layout = TokenLayout((4, 4, 8))
    for options in ({"keep": 0.3}, {"select_by": "row", "keep": 0.3}, {"keep": 0.4, "sink": True}, {"keep": 0.001}):
        method = DraftAttnProcessor(**SMALL, **options)  # type: ignore[arg-type]
        plan = method.select(layout, *queries_and_keys(layout))
        assert method.ideal_density(layout) == pytest.approx(plan.visual_density)
    mass = DraftAttnProcessor(**SMALL, select_by="mass", mass=0.6)
    q, k = queries_and_keys(layout)
    assert mass.select(layout, q, k).visual_density < mass.ideal_density(layout)
    assert mass.select(layout, 0 * q, k).visual_density == pytest.approx(mass.ideal_density(layout))
    assert DraftAttnProcessor(**SMALL, density=0.3, sink=True).ideal_density(TokenLayout(ODD)) == pytest.approx(1 / 3)


def test_density_with_text_as_published() -> None:
    """HunyuanVideo at 768x1280: 990 regions and two blocks of text at 90 % sparsity."""
    layout, method = TokenLayout((33, 48, 80), 256, "suffix"), DraftAttnProcessor(keep=0.1)
    assert method.tiles(layout).num_tiles == 990
    plan = method.select(layout, *queries_and_keys(layout, batch=1, heads=1, dim=4))
    assert plan.density == pytest.approx(0.1036, abs=5e-5)
    assert plan.density == pytest.approx(layout.joint_density(method.ideal_density(layout)), abs=1e-9)
    assert float(plan.computed_share()) == pytest.approx(plan.density)


@pytest.mark.parametrize(
    ("grid", "region"),
    [((21, 45, 80), (1, 8, 16)), ((21, 80, 45), (1, 16, 8)), ((1, 64, 64), (1, 8, 16))],
    ids=["wide", "tall", "square"],
)
def test_regions_follow_the_longer_side_of_the_frame(grid: Triple, region: Triple) -> None:
    assert DraftAttnProcessor().tiles(TokenLayout(grid)).tile == region


@pytest.mark.parametrize("options", [{}, {"select_by": "row"}, {"select_by": "mass", "sink": True}, {"density": 0.3}])
def test_the_choice_never_waits_for_the_device(options: dict[str, Any]) -> None:
    """A value that decided a shape or a branch would raise here."""
    layout = TokenLayout((3, 9, 17), 4, "prefix")
    with FakeTensorMode():
        q = torch.empty(2, layout.num_tokens, 2, 8)
        plan = DraftAttnProcessor(**options).select(layout, q, q)
        share = plan.computed_share()
    assert plan.indices.shape == (2, 2, 12, 12) and share.shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0."),
        ({"keep": 1.5}, r"keep must be in \(0, 1\], got 1.5."),
        ({"mass": 0}, r"mass must be in \(0, 1\], got 0."),
        ({"select_by": "column"}, "select_by must be head, row or mass, got 'column'."),
        ({"region": (1, 0, 16)}, "region must be three integers of at least 1 .*got"),
        ({"refresh": 0}, "refresh must be at least 1 step, got 0."),
        ({"density": 0.3, "select_by": "mass"}, "density does not go with select_by='mass'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftAttnProcessor(**options)


def test_a_mask_needs_queries_and_keys() -> None:
    with pytest.raises(ValueError, match="draft chooses by queries and keys, got none; pass query= and key=."):
        token_mask(DraftAttnProcessor(), ODD)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[BlockPlan]:
    """The plan of every sparse call, in order."""
    used: list[BlockPlan] = []
    attend = attention.attend_by_plan

    def noting(call: AttnCall, plan: BlockPlan, density: float | Tensor) -> attention.AttnResult:
        used.append(plan)
        return attend(call, plan, density)

    monkeypatch.setattr(attention, "attend_by_plan", noting)
    return used


@pytest.mark.parametrize(("steps", "start_percent"), [(4, 0.0), (5, 0.2)], ids=["first-step", "later"])
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_a_choice_serves_its_steps_in_its_layer_and_branch_only(
    tiny: ModuleType, plans: list[BlockPlan], family: str, steps: int, start_percent: float
) -> None:
    pipe = tiny.pipeline(family)
    dit_accel.apply(pipe, "draft", region=(1, 2, 2), refresh=3, start_percent=start_percent)
    first = tiny.run(pipe, steps=steps)
    calls = tiny.TARGETS * 2  # of a step: two layers in the conditional branch, then in the other
    by_step = [plans[start : start + calls] for start in range(0, len(plans), calls)]
    assert len(by_step) == 4
    assert by_step[0] == by_step[1] == by_step[2], "plans are equal only if they are the same object"
    assert len(set(by_step[0] + by_step[3])) == 2 * calls
    assert torch.equal(tiny.run(pipe, steps=steps), first), "nothing is left over from the run before"
    assert not set(plans[: 4 * calls]) & set(plans[4 * calls :])
    tiny.run(pipe, steps=2, width=48)
    assert {plan.tiles.grid for plan in plans[-calls:]} == {(3, 4, 3)}


def test_a_run_of_one_step_does_not_see_the_choice_of_the_one_before(tiny: ModuleType, plans: list[BlockPlan]) -> None:
    pipe = tiny.pipeline("wan")
    dit_accel.apply(pipe, "draft", region=(1, 2, 2), refresh=3)
    tiny.run(pipe, steps=1)
    tiny.run(pipe, steps=1)
    assert len(set(plans)) == len(plans) == 2 * tiny.TARGETS * 2


def test_without_refresh_every_call_chooses(tiny: ModuleType, plans: list[BlockPlan]) -> None:
    pipe = tiny.pipeline("wan")
    with dit_accel.apply(pipe, "draft", region=(1, 2, 2)):
        tiny.run(pipe, steps=3)
    assert len(set(plans)) == len(plans) == 3 * tiny.TARGETS * 2


def test_the_measured_density_of_a_run_is_the_expected_one(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    handle = dit_accel.apply(pipe, "draft", region=(1, 2, 5), keep=0.5)  # 60 tokens in 6 equal regions
    tiny.run(pipe)
    assert handle.tally.density == pytest.approx(0.5)
