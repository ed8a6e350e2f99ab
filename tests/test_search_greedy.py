"""The greedy search against its definition, replayed run by run, and what it leaves behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.pipelines.pixels.pipeline import PixelDiTPipeline
from dit_accel.runtime import denoiser_of
from dit_accel.tuning import greedy
from dit_accel.tuning.rehearsal import Searched

FAMILIES = ("wan", "hunyuan_video", "flux", "dit", "pixart", "sd3", "pixel_dit")
STEPS = 4
REUSES, SHARES = 1, 4  # places in the published order
each_family = pytest.mark.parametrize("family", FAMILIES)


def generate(tiny: ModuleType, pipe: Any, **changes: Any) -> Tensor:
    """A short run; PixelDiT has a token for each pixel, so fewer of them."""
    small = {"height": 9, "width": 10} if isinstance(pipe, PixelDiTPipeline) else {}
    latents: Tensor = tiny.run(pipe, **({"steps": STEPS} | small | changes))
    return latents


def searched(tiny: ModuleType, pipe: Any, *, delta: float, **options: Any) -> tuple[Searched, Tensor]:
    """What is found, and the latents of the search's own run."""
    latents = []
    found = greedy.search(pipe, lambda: latents.append(generate(tiny, pipe)), delta=delta, **options)
    return found, latents[0]


def outputs_of(tiny: ModuleType, pipe: Any, assignment: Assignment) -> list[Tensor]:
    """What the denoiser says at each step of a run, both branches of guidance one after the other."""
    calls: list[Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda model, args, output: calls.append(output[0]))
    with hook, dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment)):
        generate(tiny, pipe)
    per_step = len(calls) // STEPS
    return [torch.cat(calls[step * per_step : (step + 1) * per_step]) for step in range(STEPS)]


def paper_loss(out: Tensor, full: Tensor) -> float:
    ratio = (out - full).abs() / (torch.stack([out.abs(), full.abs()]).amax(0) + 1e-6)
    return ratio.clip(0, 10).mean().item()


def code_loss(out: Tensor, full: Tensor) -> float:
    ratio = (out - full) / (torch.stack([out, full]).amax(0) + 1e-6)
    return ratio.abs().clip(0, 10).mean().item()


def by_definition(tiny: ModuleType, pipe: Any, delta: float, loss_of: Callable[[Tensor, Tensor], float]) -> Tensor:
    """The published algorithm with a run of its own for each number that it asks for."""
    band = dit_accel.BandAttnProcessor(share=1 / 8)
    candidates = [REUSE, Action(band, residual=True, share=True), Action(band, residual=True), Action(share=True)]
    actions = (FULL, *candidates)
    blocks = tiny.TARGETS
    table = torch.zeros(STEPS, blocks, 1, dtype=torch.int16)
    for step, block in itertools.product(range(1, STEPS), range(blocks)):
        in_full = table.clone()
        in_full[step] = 0
        full = outputs_of(tiny, pipe, Assignment(actions, in_full))[step]
        for candidate in range(1, 5):
            trial = table.clone()
            trial[step, block] = candidate
            if loss_of(outputs_of(tiny, pipe, Assignment(actions, trial))[step], full) < delta * (block + 1) / blocks:
                table = trial
                break
    return table


def traces(model: Any) -> tuple[Any, ...]:
    """What a search could leave in a denoiser."""
    processors = [id(module.processor) for module in model.modules() if hasattr(module, "processor")]
    return processors, sorted(vars(model)), len(model._forward_pre_hooks), len(model._forward_hooks)


@pytest.mark.parametrize(
    ("family", "delta", "metric", "loss_of"),
    [
        ("wan", 0.05, "relative", paper_loss),
        ("flux", 0.05, "relative", paper_loss),
        ("dit", 0.2, "relative", paper_loss),
        ("pixel_dit", 0.2, "relative_signed", code_loss),
    ],
)
def test_decisions_follow_the_definition(
    tiny: ModuleType, family: str, delta: float, metric: str, loss_of: Callable[[Tensor, Tensor], float]
) -> None:
    found, _ = searched(tiny, tiny.pipeline(family), delta=delta, metric=metric)
    expected = by_definition(tiny, tiny.pipeline(family), delta, loss_of)
    assert found.assignment.table.tolist() == expected.tolist()
    assert len(expected.unique()) > 2


@each_family
def test_the_plan_repeats_the_run_of_its_search(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    found, latents = searched(tiny, pipe, delta=0.2)
    with dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=found.assignment)):
        assert torch.equal(generate(tiny, pipe), latents)


@each_family
def test_no_threshold_leaves_full_attention(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    stock = generate(tiny, pipe)
    found, latents = searched(tiny, pipe, delta=0.0)
    assert not found.assignment.table.any() and not found.losses.any()
    assert torch.equal(latents, stock)


@each_family
def test_no_limit_reuses_from_the_second_step_on(tiny: ModuleType, family: str) -> None:
    found, _ = searched(tiny, tiny.pipeline(family), delta=math.inf)
    assert found.assignment.actions[REUSES] == REUSE
    assert found.assignment.table.flatten(1).tolist() == [[0] * tiny.TARGETS] + [[REUSES] * tiny.TARGETS] * (STEPS - 1)


def test_losses_stay_below_thresholds_that_grow_with_the_block(tiny: ModuleType) -> None:
    found, _ = searched(tiny, tiny.pipeline("pixel_dit"), delta=0.1)
    bounds = torch.tensor([greedy.threshold(0.1, block, tiny.TARGETS) for block in range(tiny.TARGETS)])
    assert bounds.tolist() == pytest.approx([0.05, 0.1])
    assert bool((found.losses[..., 0] < bounds).all()) and bool((found.losses > 0).any())


@pytest.mark.parametrize(("family", "calls"), [("wan", 2), ("pixel_dit", 1)])
def test_forwards_are_those_of_the_published_loop(tiny: ModuleType, family: str, calls: int) -> None:
    found, _ = searched(tiny, tiny.pipeline(family), delta=0.0)
    assert found.forwards == calls * (STEPS + (STEPS - 1) * (1 + 4 * tiny.TARGETS))


@pytest.mark.parametrize(
    ("scale", "expected"), [(2.0, [0, REUSES, SHARES, REUSES]), (1.0, [0, REUSES, 0, REUSES])], ids=["guided", "plain"]
)
def test_old_tensors_are_not_taken_and_sharing_needs_guidance(
    tiny: ModuleType, scale: float, expected: list[int]
) -> None:
    pipe = tiny.pipeline("pixel_dit")
    found = greedy.search(pipe, lambda: generate(tiny, pipe, guidance_scale=scale), delta=math.inf, max_age=1)
    assert found.assignment.table[:, 0, 0].tolist() == expected


def test_each_denoiser_begins_in_full(tiny: ModuleType) -> None:
    found, _ = searched(tiny, tiny.pipeline("wan", two=True), delta=math.inf)
    full = (found.assignment.table == 0).all(-1).all(-1)
    assert int(full.sum()) == 2 and bool(full[0])


@pytest.mark.parametrize(
    ("out", "full", "paper", "code"),
    [
        ([1.0, -1.0, 0.0, 4.0], [2.0, -1.0, 0.0, 3.0], (0.5 + 0 + 0 + 0.25) / 4, (0.5 + 0 + 0 + 0.25) / 4),
        ([-1.0, -4.0], [-2.0, -1.0], (0.5 + 0.75) / 2, (1 + 3) / 2),
        ([1.0, 0.0], [-1.0, -1.0], (2 + 1) / 2, (2 + 10) / 2),
    ],
    ids=["positive", "negative", "mixed"],
)
def test_metrics_on_known_values(out: list[float], full: list[float], paper: float, code: float) -> None:
    tensors = torch.tensor(out), torch.tensor(full)
    assert greedy.relative(*tensors) == pytest.approx(paper, abs=1e-5)
    assert greedy.relative_signed(*tensors) == pytest.approx(code, abs=1e-5)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["wan", "pixel_dit"])
def test_nothing_is_left_behind(
    tiny: ModuleType, family: str, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.pipeline(family)
    stock, before, own = generate(tiny, pipe), traces(pipe.transformer), sorted(vars(pipe))
    trials = []

    def metric(out: Tensor, full: Tensor) -> float:
        trials.append(out)
        if error and len(trials) > 5:
            raise error
        return 0.0

    monkeypatch.setitem(greedy.METRICS, "relative", metric)
    if error:
        with pytest.raises(error):
            searched(tiny, pipe, delta=1.0)
    else:
        searched(tiny, pipe, delta=1.0)
    assert denoiser_of(pipe.transformer) is None
    assert (traces(pipe.transformer), sorted(vars(pipe))) == (before, own)
    assert torch.equal(generate(tiny, pipe), stock)


def test_refusals_are_one_sentence(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("pixel_dit")

    def once() -> None:
        generate(tiny, pipe, steps=2)

    with pytest.raises(ValueError, match=r"metric must be one of relative, relative_signed, got 'ssim'\."):
        greedy.search(pipe, once, delta=0.1, metric="ssim")
    with pytest.raises(ValueError, match=r"delta must be at least 0, got -1\."):
        greedy.search(pipe, once, delta=-1)
    with pytest.raises(ValueError, match=r"needs one run of the pipeline, got step 0 after step 1; generate all"):
        greedy.search(pipe, lambda: (once(), once()), delta=0.1)
    with pytest.raises(
        ValueError, match=r"needs a run of the pipeline, got none; pass a function that calls it once\."
    ):
        greedy.search(pipe, lambda: None, delta=0.1)
    with dit_accel.apply(pipe, "band"), pytest.raises(ValueError, match=r"got one with a method; call dit_accel\.rest"):
        greedy.search(pipe, once, delta=0.1)
