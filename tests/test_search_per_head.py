"""The per-head search: its programme against enumeration, and what it finds against the formulas."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_accel
from dit_accel.methods.actions import REUSE, Assignment
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.attention import AttnCall, AttnResult
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.pipelines.pixels.pipeline import PixelDiTPipeline
from dit_accel.runtime import denoiser_of
from dit_accel.tuning import per_head
from dit_accel.tuning.rehearsal import Searched

FAMILIES = ("wan", "hunyuan_video", "flux", "dit", "pixart", "sd3", "pixel_dit")
STEPS, HEADS = 4, 2
WAYS = len(per_head.WIDTHS) + 1
each_family = pytest.mark.parametrize("family", FAMILIES)


def generate(tiny: ModuleType, pipe: Any) -> Tensor:
    """A short run; PixelDiT has a token for each pixel, so fewer of them."""
    small = {"height": 9, "width": 10} if isinstance(pipe, PixelDiTPipeline) else {}
    latents: Tensor = tiny.run(pipe, steps=STEPS, **small)
    return latents


def searched(tiny: ModuleType, pipe: Any, *, delta: float, **options: Any) -> tuple[Searched, Tensor]:
    """What is found, and the latents of the search's own run."""
    latents = []
    found = per_head.search(pipe, lambda: latents.append(generate(tiny, pipe)), delta=delta, **options)
    return found, latents[0]


def calls_of(
    tiny: ModuleType, pipe: Any, assignment: Assignment, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, int], list[tuple[AttnCall, Tensor]]]:
    """The attention calls of a run that are not reused as a whole and their outputs, by step and block."""
    calls: dict[tuple[int, int], list[tuple[AttnCall, Tensor]]] = {}
    attend = AssignedAttention.attend

    def recording(self: AssignedAttention, call: AttnCall) -> AttnResult:
        result = attend(self, call)
        calls.setdefault((call.place.step, call.place.block), []).append((call, result.out.clone()))
        return result

    monkeypatch.setattr(AssignedAttention, "attend", recording)
    with dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment)):
        generate(tiny, pipe)
    return calls


def ways_of(call: AttnCall, before: Tensor, text: int) -> tuple[list[Tensor], list[float]]:
    """The output of each way to save by its formula, and the share of the pairs that it saves; text at the end."""
    tokens, grid = call.q.shape[1], call.q.shape[1] - text
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    on_grid = torch.arange(tokens) < grid
    outputs, gains = [], []
    for divisor in per_head.WIDTHS:
        seen = (distance <= grid // (2 * divisor)) | ~on_grid | ~on_grid[:, None]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=call.scale).transpose(1, 2))
        gains.append(1 - seen.double().mean().item())
    return [*outputs, before], [*gains, 1.0]


def dense(call: AttnCall) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    return F.scaled_dot_product_attention(q, k, v, scale=call.scale).transpose(1, 2)


def errors_by_formula(out: Tensor, full: Tensor) -> list[float]:
    return [
        (((a - b) ** 2).mean() / ((b - b.mean()) ** 2).mean()).item()
        for a, b in zip(out.unbind(2), full.unbind(2), strict=True)
    ]


def best_gain(errors: list[list[float]], gains: list[float], delta: float, slack: float) -> float:
    """By trying everything: [H][ways]."""
    best = 0.0
    for taken in itertools.product(range(-1, len(gains)), repeat=len(errors)):
        spent = [errors[head][way] for head, way in enumerate(taken) if way >= 0]
        if sum(spent) <= delta and all(error < slack * delta / len(errors) for error in spent):
            best = max(best, sum(gains[way] for way in taken if way >= 0))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_choice_is_the_best_of_all(seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    heads, ways = (int(torch.randint(1, 5, (), generator=make)) for _ in range(2))
    errors, gains = torch.rand(heads, ways, generator=make), torch.rand(ways, generator=make)
    delta, slack = heads * float(torch.rand((), generator=make)), 1.5
    taken = per_head.choose(errors, gains, delta, slack)
    spent = [errors[head, way - 1].item() for head, way in enumerate(taken.tolist()) if way]
    assert sum(spent) <= delta * (1 + 1e-6) and all(error < slack * delta / heads for error in spent)
    gain = sum(gains[way - 1].item() for way in taken.tolist() if way)
    assert gain == pytest.approx(best_gain(errors.tolist(), gains.tolist(), delta, slack))


@pytest.mark.parametrize(
    ("delta", "slack", "taken"),
    [(0.0, 1.5, [0, 0]), (0.25, 1.5, [1, 1]), (0.3, 1.5, [2, 1]), (0.3, 1.0, [1, 1]), (math.inf, 1.5, [2, 2])],
    ids=["none", "budget", "more", "slack", "all"],
)
def test_choice_on_known_values(delta: float, slack: float, taken: list[int]) -> None:
    errors = torch.tensor([[0.0, 0.2], [0.1, 0.3]])
    assert per_head.choose(errors, torch.tensor([0.5, 1.0]), delta, slack).tolist() == taken


def test_a_constant_head_is_left_in_full() -> None:
    full = torch.stack([torch.zeros(1, 4, 2), torch.tensor([[[1.0, -1.0]] * 4])], 2)
    out = full + torch.tensor([0.0, 0.5])[:, None]
    errors = per_head.relative_squared_errors(out, full)
    assert errors[1].item() == pytest.approx(0.25)
    assert per_head.choose(errors[:, None], torch.tensor([1.0]), math.inf).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("family", "text", "delta"),
    [("pixel_dit", 0, 0.1), ("dit", 0, 0.5), ("sd3", 6, 1.0)],
    ids=["pixel_dit", "dit", "sd3"],
)
def test_each_choice_is_the_best_within_its_budget(
    tiny: ModuleType, family: str, text: int, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = searched(tiny, tiny.pipeline(family), delta=delta)
    assignment = found.assignment
    calls = calls_of(tiny, tiny.pipeline(family), assignment, monkeypatch)
    compared = 0
    for step, block in itertools.product(range(1, STEPS), range(tiny.TARGETS)):
        taken = assignment.table[step, block].tolist()
        assert bool((found.losses[step, block] < 1.5 * delta / HEADS).all())
        assert float(found.losses[step, block].sum()) <= delta * (1 + 1e-6)
        if (step, block) not in calls:  # reused as a whole
            assert taken == [WAYS] * HEADS
            calls[step, block] = calls[step - 1, block]
            continue
        ((call, _),), ((_, before),) = calls[step, block], calls[step - 1, block]
        outputs, gains = ways_of(call, before, text if block == 0 else 0)
        full = dense(call)
        errors = [list(row) for row in zip(*(errors_by_formula(out, full) for out in outputs), strict=True)]
        expected = [errors[head][way - 1] if way else 0.0 for head, way in enumerate(taken)]
        assert found.losses[step, block].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)
        gain = sum(gains[way - 1] for way in taken if way)
        assert gain == pytest.approx(best_gain(errors, gains, delta, 1.5))
        compared += 1
    assert compared and len(assignment.table.unique()) > 2


def test_errors_are_those_of_the_worse_branch_of_guidance(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = searched(tiny, tiny.pipeline("wan"), delta=math.inf, max_age=1)
    narrowest = WAYS - 1
    assert found.assignment.table[2].tolist() == [[narrowest] * HEADS] * tiny.TARGETS
    calls = calls_of(tiny, tiny.pipeline("wan"), found.assignment, monkeypatch)
    worse = set()
    for block in range(tiny.TARGETS):
        branches = [call for call, _ in calls[2, block]]
        errors = torch.tensor(
            [errors_by_formula(ways_of(call, call.q, 0)[0][narrowest - 1], dense(call)) for call in branches]
        )
        assert found.losses[2, block].tolist() == pytest.approx(errors.amax(0).tolist(), rel=1e-3)
        worse |= set(errors.argmax(0).tolist())
    assert worse == {0, 1}


@each_family
def test_the_plan_repeats_the_run_of_its_search(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    found, latents = searched(tiny, pipe, delta=0.5)
    with dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=found.assignment)):
        assert torch.equal(generate(tiny, pipe), latents)
    assert found.assignment.table[1:].any() and not found.assignment.table[0].any()


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_no_budget_leaves_full_attention(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    stock = generate(tiny, pipe)
    found, latents = searched(tiny, pipe, delta=0.0)
    assert not found.assignment.table.any() and not found.losses.any()
    assert torch.equal(latents, stock)


@pytest.mark.parametrize(("max_age", "reused"), [(None, [0, 1, 1, 1]), (1, [0, 1, 0, 1])], ids=["any-age", "one-step"])
def test_no_limit_reuses_what_is_not_too_old(tiny: ModuleType, max_age: int | None, reused: list[int]) -> None:
    found, _ = searched(tiny, tiny.pipeline("flux"), delta=math.inf, max_age=max_age)
    assert found.assignment.actions[WAYS] == REUSE
    assert (found.assignment.table == WAYS).all(-1).all(-1).int().tolist() == reused


def test_bands_have_the_published_widths(tiny: ModuleType) -> None:
    found, _ = searched(tiny, tiny.pipeline("wan"), delta=0.0)
    layout = dit_accel.layout.TokenLayout((1, 64, 64))
    bands = [action.method for action in found.assignment.actions[1:WAYS]]
    pairs = [sum(min(4095, i + h) - max(0, i - h) + 1 for i in range(4096)) for h in (256, 128, 64)]
    assert [band.ideal_density(layout) for band in bands if band] == pytest.approx([n / 4096**2 for n in pairs])


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(
    tiny: ModuleType, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.pipeline("wan")
    stock, model, own = generate(tiny, pipe), sorted(vars(pipe.transformer)), sorted(vars(pipe))
    choose, choices = per_head.choose, []

    def failing(*arguments: Any) -> Tensor:
        choices.append(arguments)
        if error and len(choices) > 5:
            raise error
        return choose(*arguments)

    monkeypatch.setattr(per_head, "choose", failing)
    if error:
        with pytest.raises(error):
            searched(tiny, pipe, delta=0.1)
    else:
        searched(tiny, pipe, delta=0.1)
    assert denoiser_of(pipe.transformer) is None
    assert (sorted(vars(pipe.transformer)), sorted(vars(pipe))) == (model, own)
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(generate(tiny, pipe), stock)


def test_a_negative_budget_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"delta must be at least 0, got -0\.1\."):
        per_head.search(tiny.pipeline("wan"), lambda: None, delta=-0.1)
