"""Operations that actions leave over, against DiTFastAttn's table, and of whole runs, counted out layer by layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_accel import explanation
from dit_accel.eval.rates import Rates
from dit_accel.layout import TokenLayout
from dit_accel.methods import BandAttnProcessor, make_method
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment, course_of
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.pipelines.costs import (
    Counted,
    action_share,
    course_share,
    full_work,
    is_guided,
    layer_flops,
    pair_share,
)
from dit_accel.pipelines.specs import SPECS, find_spec

BAND = BandAttnProcessor()
ISOLATED = {
    "full": FULL,
    "WA-RS": Action(BAND, residual=True),
    "ASC": Action(share=True),
    "WA-RS+ASC": Action(BAND, residual=True, share=True),
    "AST": REUSE,
}
PUBLISHED = {  # per cent of the operations kept at tokens per side, arXiv 2406.08552, table 2
    32: (100, 77, 50, 38, 0),
    64: (100, 51, 50, 26, 0),
    128: (100, 33, 50, 16, 0),
}


@pytest.mark.parametrize("side", PUBLISHED)
def test_isolated_actions_cost_what_is_published(side: int) -> None:
    layout = TokenLayout((1, side, side))
    shares = [100 * action_share(action, layout, 1152) for action in ISOLATED.values()]
    assert shares == pytest.approx(PUBLISHED[side], abs=0.6)
    tiles = [100 * action_share(action, layout, 1152, counted="tiles") for action in ISOLATED.values()]
    assert tiles == pytest.approx(PUBLISHED[side], abs=3)
    assert all(exact <= computed for exact, computed in zip(shares, tiles, strict=True))


def test_a_layer_counts_projections_and_products() -> None:
    layout = TokenLayout((1, 3, 4), 5, "suffix")
    assert layer_flops(layout, 10, 0.25) == 2 * (4 * 17 * 10 * 10 + 2 * 17 * 17 * 10 * 0.25)


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_is_counted_as_the_spec_counts_it(name: str) -> None:
    spec = dataclasses.replace(find_spec(name), visual_blocks=0, cross_tokens=0, ffn_dim=0)
    layout = spec.layout()
    whole = spec.attention_flops(layout, 0.3) + spec.linear_flops(layout)
    assert spec.num_blocks * layer_flops(layout, spec.hidden_dim, 0.3) == pytest.approx(whole, rel=1e-12)


def test_pairs_count_text_in_full() -> None:
    layout = TokenLayout((1, 8, 8), 16, "prefix")
    band = BandAttnProcessor(half_width=3, tile=8)
    grid = band.ideal_density(layout) * 64**2
    assert pair_share(band, layout) == pytest.approx((grid + 80**2 - 64**2) / 80**2)
    assert pair_share(band, layout, "tiles") == band.plan(layout).density
    assert pair_share(None, layout) == 1.0
    assert pair_share(make_method("clear", min_tokens=10**6), layout) == 1.0


SMALL = dataclasses.replace(find_spec("dit-xl-2-512"), heads=3, head_dim=8, blocks=2)
LAYOUT = TokenLayout((1, 8, 8))
NARROW = BandAttnProcessor(half_width=3, tile=16)
ACTIONS = (FULL, REUSE, Action(share=True), Action(NARROW, residual=True), Action(NARROW, residual=True, share=True))


def counted_out(table: list[list[list[int]]], kept: list[list[float]], counted: Counted = "rule") -> None:
    """``kept``: share of pairs, or -1 for no operations at all, halved where written as x + 10."""
    course = course_of(Assignment(ACTIONS, torch.tensor(table)), len(table))
    costs = [
        0.0 if share == -1 else layer_flops(LAYOUT, 24, share % 10) / (2 if share >= 10 else 1)
        for shares in kept
        for share in shares
    ]
    want = sum(costs) / (len(costs) * layer_flops(LAYOUT, 24))
    assert course_share(course, SMALL, LAYOUT, counted=counted) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("counted", ["rule", "tiles"])
def test_a_run_adds_up_step_by_step(counted: Counted) -> None:
    band = pair_share(NARROW, LAYOUT, counted)
    counted_out(
        [[[0], [0]], [[3], [1]], [[4], [1]], [[0], [2]], [[1], [0]]],
        [[1 + band, 1], [band, -1], [10 + band, -1], [1, 11], [-1, 1]],
        counted,
    )


def test_heads_that_reuse_spare_pairs_but_no_projections() -> None:
    band = pair_share(NARROW, LAYOUT)
    counted_out(
        [[[0, 0, 0], [0, 0, 0]], [[1, 3, 0], [1, 1, 1]], [[1, 1, 1], [0, 0, 0]]],
        [[1 + band / 3, 1], [(band + 1) / 3, -1], [-1, 1]],
    )


def test_without_guidance_sharing_spares_nothing() -> None:
    course = course_of(Assignment(ACTIONS, torch.tensor([[[0], [0]], [[2], [2]]])), 2)
    assert course_share(course, SMALL, LAYOUT, guided=False) == 1.0
    assert course_share(course, SMALL, LAYOUT) == 0.75


def test_layers_of_the_grid_alone_count_without_text() -> None:
    spec, layout = dataclasses.replace(SMALL, visual_blocks=1), TokenLayout((1, 8, 8), 16, "suffix")
    table = torch.zeros(2, 3, 1, dtype=torch.int16)
    table[1, 2] = 1
    joint, alone = layer_flops(layout, 24), layer_flops(LAYOUT, 24)
    share = course_share(course_of(Assignment(ACTIONS, table), 2), spec, layout)
    assert share == pytest.approx((4 * joint + alone) / (4 * joint + 2 * alone))


@pytest.mark.parametrize(
    ("name", "guided"),
    [("pixart-sigma-1k", True), ("wan2.1-14b", True), ("flux.1-dev", False), ("hunyuanvideo", False)],
)
def test_guidance_is_known_from_the_spec(name: str, guided: bool) -> None:
    assert is_guided(find_spec(name)) is guided


def test_explain_counts_every_step_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one rate for everything, so that the speed-up is that of the operations."""
    one = Rates(matmul=1.0, dense=1.0, sparse=1.0, tokens=1, density=1.0)
    monkeypatch.setattr(explanation, "rates", lambda *arguments: one)
    spec = find_spec("pixart-sigma-2k")
    layout, blocks = spec.layout(), spec.num_blocks
    table = torch.tensor([[[0]] * blocks, [[3]] * blocks, [[1]] * blocks, [[2]] * blocks])
    actions = (FULL, REUSE, Action(share=True), Action(BAND, residual=True))
    told = explanation.explain_spec(spec, DiTFastAttnProcessor(assignment=Assignment(actions, table)), steps=8)
    rule, tiles = pair_share(BAND, layout), pair_share(BAND, layout, "tiles")
    # Rows are taken twice each: full twice (a residual once, from the later one), window, reuse, half.
    assert told.ideal_density == pytest.approx((2 + rule + 2 * rule + 0 + 2 * 0.5) / 8)
    assert told.executed_density == told.run_density == pytest.approx((3 + 3 * tiles) / 8)
    full = spec.linear_flops(layout) + spec.attention_flops(layout)
    whole = full_work(spec, layout)
    left = full - whole.projections * (2 + 1) / 8 - whole.dense * (1 - told.run_density)
    assert told.predicted_speedup == pytest.approx(full / left)
