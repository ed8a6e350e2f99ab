"""The tuner: candidates as text, errors and times against what they stand for, and a search that holds its budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dit_accel import plugin
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.methods import make_method
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment, course_of
from dit_accel.methods.attention import AttnCall, AttnResult, BoundAttention, QueryGroups
from dit_accel.methods.base import AttnMethod
from dit_accel.tuning import search as search_module
from dit_accel.tuning.budget import Budget, Measured, parse_budget
from dit_accel.tuning.candidates import (
    KEEP_FULL,
    Candidate,
    assignment_of,
    candidates_for,
    parse_action,
    parse_candidates,
    step_groups,
)
from dit_accel.tuning.profile import Profile, onlooker, profile
from dit_accel.tuning.report import in_words, ranges
from dit_accel.tuning.runner import Facts, Runner, Sample
from dit_accel.tuning.search import Options, search
from dit_accel.tuning.times import LayerTimes, measure_layer

FACTS = Facts(TokenLayout((3, 4, 5)), blocks=2, heads=2, head_dim=12, steps=4, calls=2, guided=True)
DRAFT = make_method("draft", density=0.2)


# Candidates


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("full", FULL),
        ("reuse", REUSE),
        ("full+share", Action(share=True)),
        ("draft(density=0.2)", Action(DRAFT)),
        ("draft(density=0.2)+residual", Action(DRAFT, residual=True)),
        ("draft(density=0.2) + residual + share", Action(DRAFT, residual=True, share=True)),
    ],
)
def test_an_action_is_written_as_it_is_read(text: str, action: Action) -> None:
    assert parse_action(text) == action
    assert parse_action(str(action)) == action


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft(density=0.2)+half", "may end in \\+residual or \\+share"),
        ("reuse/full", "nothing to take at the first step"),
        ("draft/draft+residual", "nothing to take at the first step"),
        ("dit_fast_attn", "made of sparse methods, got dit_fast_attn"),
        ("dense", "made of sparse methods, got dense"),
        ("radial(start_percent=0.2)", "decides by itself when radial runs, got start_percent"),
        ("drafft", "did you mean 'draft'"),
    ],
)
def test_what_is_no_candidate_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_candidates(text)


def test_a_bare_method_stands_for_several_densities() -> None:
    densities = [candidate.cycle[0].method.density for candidate in parse_candidates("draft")]  # type: ignore[union-attr]
    assert densities == [0.5, 0.3, 0.2, 0.1]


def test_candidates_that_do_not_differ_at_a_size_are_left_out() -> None:
    layout = TokenLayout((3, 12, 16))  # grat is dense on it, and neighborhood has two densities
    facts = dataclasses.replace(FACTS, layout=layout)
    found = [
        str(candidate) for candidate in candidates_for(["neighborhood", "grat", "full/reuse", "full+share"], facts)
    ]
    assert found == [
        "full",
        "neighborhood(density=0.5)",
        "neighborhood(density=0.3)",
        "full/reuse",
        "full+share",
    ]
    unguided = candidates_for(["full/reuse", "full+share"], dataclasses.replace(facts, guided=False))
    assert [str(candidate) for candidate in unguided] == ["full", "full/reuse"]


@pytest.mark.parametrize(("steps", "groups"), [(1, 1), (7, 3), (16, 5), (3, 8)])
def test_groups_cut_a_run_into_steps_in_order(steps: int, groups: int) -> None:
    found = step_groups(steps, groups)
    assert [step for group in found for step in group] == list(range(steps))
    assert len(found) == min(steps, groups)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_an_assignment_takes_the_chosen_turns_and_names_nothing_else() -> None:
    candidates = [KEEP_FULL, *parse_candidates("draft(density=0.2)"), *parse_candidates("full/reuse/reuse")]
    choice = torch.tensor([[0, 2], [2, 0]])
    assignment = assignment_of(candidates, choice, step_groups(7, 2))
    assert assignment.actions == (FULL, REUSE)
    assert assignment.table[..., 0].T.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0]]
    course = course_of(assignment, 7)  # nothing reuses what is not there
    assert torch.equal(course.table, assignment.table)


# Local errors


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(AttnMethod):
    """Dense attention that keeps its outputs by block, step and order of the call."""

    name: ClassVar[str] = "recorder"
    outputs: dict[tuple[int, int], list[AttnCall]] = field(default_factory=dict)

    def bind(self, layout: TokenLayout, device: torch.device) -> BoundAttention:
        return RecorderAttention(layout, self.outputs)

    def ideal_density(self, layout: TokenLayout) -> float:
        return 1.0


class RecorderAttention(BoundAttention):
    def __init__(self, layout: TokenLayout, outputs: dict[tuple[int, int], list[AttnCall]]) -> None:
        self.layout, self.density, self.tile, self.outputs = layout, 1.0, (1, 1, 1), outputs

    def attend(self, call: AttnCall) -> AttnResult:
        self.outputs.setdefault((call.place.block, call.place.step), []).append(call)
        return AttnResult(call.dense(call), None, 1.0)

    def groups(self) -> QueryGroups:
        raise NotImplementedError

    def check(self, q: Tensor, backend: Backend) -> None:
        pass


def runner_of(tiny: ModuleType, pipe: Any, facts: Facts) -> Runner:
    """Latents of the tiny pipeline; its times are not looked at."""

    def generate(number: int, method: AttnMethod) -> Sample:
        with plugin.apply(pipe, method) as handle, handle.timing() as tally:
            latents = tiny.run(pipe, steps=facts.steps)
        return Sample(latents.float(), 1.0, 0.5, tally.density)

    return Runner(facts, generate, frames=False, report=lambda line: None)


def relative(missed: Tensor, dense: Tensor) -> Tensor:
    """Squared error per head as a share of the layer, [H]."""
    return missed.square().sum((0, 1, 3)) / dense.square().sum()


def test_local_errors_are_those_of_the_outputs_side_by_side(tiny: ModuleType) -> None:
    own_tiles = tiny.Tiles(everything=False)
    pipe = tiny.pipeline("wan")
    candidates = [
        KEEP_FULL,
        Candidate((Action(own_tiles),)),
        Candidate((FULL, REUSE)),
        Candidate((FULL, Action(own_tiles, residual=True))),
        Candidate((Action(share=True),)),
    ]
    groups = step_groups(FACTS.steps, 2)
    runner = runner_of(tiny, pipe, FACTS)
    found, _ = profile(runner, candidates, groups)
    recorder = Recorder()
    runner.generate(0, recorder)
    bound = own_tiles.attention(FACTS.layout)
    assert bound is not None
    for group, (before, after) in enumerate(((0, 1), (2, 3))):
        for block in range(FACTS.blocks):
            expected = torch.zeros(FACTS.heads, len(candidates))
            earlier, later = recorder.outputs[block, before], recorder.outputs[block, after]
            for first, second in zip(earlier, later, strict=True):  # both branches of guidance
                old, new = first.dense(first), second.dense(second)
                old_tiles, new_tiles = bound.attend(first).out, bound.attend(second).out
                expected[:, 1] += relative(old_tiles - old, old) / 2
                expected[:, 2] += relative(old - new, new) / 4  # at one of two steps
                expected[:, 3] += relative(new_tiles + (old - old_tiles) - new, new) / 4
            conditional, other = (call.dense(call) for call in earlier)
            expected[:, 4] = relative(conditional - other, other) / 2
            torch.testing.assert_close(found.error[group, block].float(), expected, rtol=1e-3, atol=1e-7)
    assert found.mass[..., 0].min() == found.mass[..., 0].max() == 1
    assert (found.mass[..., 1] < 1).all()
    assert found.mass[..., [2, 4]].isnan().all()


@pytest.mark.parametrize("family", ["hunyuan_video", "flux"])
def test_a_method_that_keeps_every_pair_has_no_error(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    tokens = tiny.TEXT_TOKENS
    layouts = {
        "hunyuan_video": TokenLayout((3, 4, 5), tokens, "suffix"),
        "flux": TokenLayout((1, 4, 5), tokens, "prefix"),
    }
    facts = dataclasses.replace(FACTS, layout=layouts[family], head_dim=16, steps=2)
    candidates = [KEEP_FULL, Candidate((Action(tiny.Tiles()),)), Candidate((Action(tiny.Tiles(everything=False)),))]
    found, _ = profile(runner_of(tiny, pipe, facts), candidates, step_groups(2, 1))
    assert float(found.error[..., 1].max()) < 1e-8
    assert float(found.error[..., 2].min()) > 1e-6
    torch.testing.assert_close(found.mass[..., 1], torch.ones_like(found.mass[..., 1]))


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["unguided", "guided"])
def test_sharing_is_judged_where_one_call_holds_both_branches(tiny: ModuleType, guidance: float) -> None:
    pipe = tiny.pipeline("pixel_dit")
    facts = dataclasses.replace(FACTS, layout=TokenLayout((1, 6, 7)), steps=3, calls=1, batch=2)

    def generate(number: int, method: AttnMethod) -> Sample:
        with plugin.apply(pipe, method):
            return Sample(tiny.run(pipe, steps=3, height=6, width=7, guidance_scale=guidance), 1.0, 0.5, 1.0)

    found, _ = profile(Runner(facts, generate), [KEEP_FULL, Candidate((Action(share=True),))], step_groups(3, 1))
    assert bool((found.error[..., 1].sum(-1) > 1e-6).all()) == (guidance > 1)


def test_an_onlooker_hands_out_the_pipelines_own_attention(tiny: ModuleType) -> None:
    pipe, looking = tiny.pipeline("wan"), onlooker(FACTS)
    stock = tiny.run(pipe, steps=2)
    with plugin.apply(pipe, looking):
        assert torch.equal(tiny.run(pipe, steps=2), stock)
    q, k, v = torch.randn(3, 1, 60, 2, 12).unbind()
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "dit_accel.interception.dispatch_attention_fn", lambda *qkv, **options: calls.append(qkv) or qkv[0]
        )
        assert looking.tables.dense(AttnCall(q, k, v)) is q
    assert len(calls) == 1


# Times


def layer_times(**changes: Any) -> LayerTimes:
    return LayerTimes(**({"dense": 10.0, "methods": {DRAFT: 4.0}, "projections": 2.0, "measured": (1, 1)} | changes))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("full", 4 * 12),
        ("draft(density=0.2)", 4 * 6),
        ("full+share", 4 * 6),
        ("full/reuse", 2 * 12),
        ("full/reuse/reuse", 2 * 12),  # full, reuse, reuse, full
        ("full/draft(density=0.2)+residual", 2 * (12 + 4) + 2 * 6),
        ("full/draft(density=0.2)+residual/reuse", (12 + 4) + 6 + 0 + 12),  # the last one leaves nothing
    ],
)
def test_seconds_of_four_steps_count_projections_and_residuals(text: str, seconds: float) -> None:
    [candidate] = parse_candidates(text)
    assert layer_times().of_group(candidate, 4) == pytest.approx(seconds)


def test_fewer_pairs_are_measured_where_all_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.tuning.times.PAIRS", {"cpu": 64**2})
    facts = Facts(TokenLayout((8, 16, 16)), blocks=1, heads=4, head_dim=8, steps=1)
    times = measure_layer(facts, facts.layout, parse_candidates("draft(density=0.2)"), lambda call: call.q)
    tokens, heads = times.measured
    assert heads == 1
    assert 32 <= tokens <= 128
    assert min(times.dense, times.projections, *times.methods.values()) > 0


# The search


def fake(monkeypatch: pytest.MonkeyPatch, error_of: Callable[[float], float] = lambda error: error) -> Runner:
    """A model whose runs take and miss exactly what its tables say; ``error_of`` bends what its runs end with."""
    facts = dataclasses.replace(FACTS, layout=TokenLayout((7, 24, 32)), blocks=6, steps=8, calls=1)
    make = torch.Generator().manual_seed(0)
    per_block = torch.rand(6, 1, generator=make) * torch.tensor([0.0, 0.01, 0.02, 0.05])
    methods = {make_method("draft", density=density): density * 10 for density in (0.5, 0.3, 0.1)}
    layers = [LayerTimes(10.0, methods, 0.0, (1, 1))] * 6
    actions = [FULL, *(Action(method) for method in methods)]
    local = per_block[None, :, None].expand(2, 6, 1, 4).double()
    monkeypatch.setattr(search_module, "measure_layers", lambda *_: layers)
    monkeypatch.setattr(search_module, "profile", lambda *_: (Profile(local, 1 - 2 * local), []))
    dense = torch.ones(100)

    def generate(number: int, method: AttnMethod) -> Sample:
        assignment: Assignment | None = getattr(method, "assignment", None)
        if assignment is None:
            return Sample(dense, 500.0, 480.0, 1.0)
        index = [[actions.index(assignment.actions[i]) for i in row] for row in assignment.table[..., 0].tolist()]
        seconds = sum([10.0, 5.0, 3.0, 1.0][i] for row in index for i in row)
        error = sum(float(per_block[block, i]) for row in index for block, i in enumerate(row)) / 8
        return Sample(dense * (1 + error_of(error) ** 0.5), 20 + seconds, seconds, 0.5)

    return Runner(facts, generate, frames=False, report=lambda line: None)


METHODS = tuple(f"draft(density={density})" for density in (0.5, 0.3, 0.1))


@pytest.mark.parametrize("bend", [1.0, 3.0, 0.5], ids=["as predicted", "worse than predicted", "better"])
def test_the_fastest_plan_within_a_floor_of_quality_is_found(monkeypatch: pytest.MonkeyPatch, bend: float) -> None:
    runner = fake(monkeypatch, lambda error: error * (bend if error > 0.02 else 1.0))
    found = search(runner, Options(Budget("relative_error", 0.2), METHODS, groups=2))
    assert found.best.measured.relative_error <= 0.2
    faster = [point for point in found.curve if point.measured.seconds < found.best.measured.seconds]
    assert all(point.measured.relative_error > 0.2 for point in faster)
    assert faster  # the search has seen where the budget ends
    assert found.best.measured.speedup > 1.3


def test_the_best_plan_within_a_limit_of_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(fake(monkeypatch), Options(Budget("speedup", 2.0), METHODS, groups=2))
    assert found.best.measured.speedup >= 2.0
    slower = [point for point in found.curve if point.measured.seconds > found.best.measured.seconds]
    assert slower
    assert all(point.measured.speedup < 2.0 for point in slower)


def test_predictions_hold_where_errors_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(fake(monkeypatch), Options(Budget("relative_error", 0.2), METHODS, groups=2))
    for point in found.curve:
        assert point.predicted is not None
        assert point.predicted.seconds == pytest.approx(point.measured.seconds)
        assert point.predicted.quality(frames=False) == pytest.approx(point.measured.relative_error, rel=1e-3)
    seconds = [point.measured.seconds for point in found.curve]
    assert seconds == sorted(seconds, reverse=True)
    errors = [point.measured.relative_error for point in found.curve]
    assert errors == sorted(errors)


def test_layers_keep_the_mass_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(fake(monkeypatch), Options(Budget("kept_mass", 0.96), METHODS, groups=2))
    table = found.best.assignment.table[..., 0]
    assert len(found.curve) == 1
    assert len(table.unique()) > 1
    assert (table == table[0]).all()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("relative_error=0.001", "no plan keeps relative_error=0.001 and is faster .* nearest reached"),
        ("speedup=40", "no plan reaches speedup=40, the fastest took 68.00 s"),
        ("kept_mass=0.9999", "faster than full attention here and keeps kept_mass"),
        ("seconds=600", "dense attention takes 500.00 s here, within seconds=600"),
    ],
)
def test_a_budget_that_cannot_be_met_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, budget: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        search(fake(monkeypatch), Options(parse_budget(budget), METHODS, groups=2))
    assert "\n" not in str(caught.value)


def test_a_search_without_time_for_one_plan_says_how_much_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = dataclasses.replace(fake(monkeypatch), deadline=0.0)
    with pytest.raises(ValueError, match="one plan takes about .* pass more --minutes"):
        search(runner, Options(Budget("relative_error", 0.2), METHODS))


@pytest.mark.parametrize("text", ["psnr", "psnr=high", "ssim=0.9", "kept_mass=1.5", "speedup=0.5", "psnr=-3"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "met"),
    [("psnr=28", True), ("psnr=31", False), ("relative_error=0.1", True), ("seconds=9", False), ("speedup=1.5", True)],
)
def test_a_budget_knows_when_it_is_met(text: str, met: bool) -> None:
    assert parse_budget(text).met(Measured(10.0, 1.6, 0.05, 30.0, 0.4)) is met


def test_a_plan_in_words_names_shares_steps_and_blocks() -> None:
    assignment = Assignment((FULL, REUSE), torch.tensor([[[0], [0]], [[1], [0]], [[1], [0]], [[0], [1]]]))
    assert in_words(assignment) == [" 62.5%  full, steps 0-3, blocks 0-1", " 37.5%  reuse, steps 1-3, blocks 0-1"]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
