"""DiTFastAttn's actions in whole pipelines, against the same actions written into torch's attention of a stock run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

import dit_accel
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor

HEADS, BLOCKS, STEPS = 2, 2, 6
BAND, NARROW = BandAttnProcessor(half_width=4, tile=8), BandAttnProcessor(half_width=1, tile=8)
ACTIONS = (
    FULL,
    REUSE,
    Action(BAND),
    Action(BAND, residual=True),
    Action(NARROW, residual=True),
    Action(share=True),
    Action(BAND, share=True),
    Action(BAND, residual=True, share=True),
)
ALONE = 5  # how many actions do not share


class Size(NamedTuple):
    """A family's tiny run: grid and text tokens, text before the grid, guidance, options of its pipeline and run."""

    visual: int
    text: int = 0
    prefix: bool = False
    conditional: str = "separate"
    options: Mapping[str, Any] = MappingProxyType({})
    run: Mapping[str, Any] = MappingProxyType({})


SIZES = {
    "wan": Size(60),
    "hunyuan_video": Size(60, 6),
    "flux": Size(20, 6, prefix=True),
    "dit": Size(16, conditional="first"),
    "pixart": Size(20, conditional="second"),
    "sd3": Size(20, 6, conditional="second", options={"layers": 2, "dual": ()}),
    "pixel_dit": Size(35, conditional="first", run={"height": 5, "width": 7}),
}
each_family = pytest.mark.parametrize("family", SIZES)


def pipeline(tiny: ModuleType, family: str) -> Any:
    return tiny.pipeline(family, **SIZES[family].options)


def run(tiny: ModuleType, pipe: Any, family: str, steps: int = STEPS, **changes: Any) -> Tensor:
    output: Tensor = tiny.run(pipe, steps=steps, **{**SIZES[family].run, **changes})
    return output


def plan(rows: list[Any], actions: tuple[Action, ...] = ACTIONS) -> Assignment:
    """One action for each step, of all blocks, or a list of one per head."""
    table = torch.tensor([row if isinstance(row, list) else [row] for row in rows])
    return Assignment(actions, table[:, None].repeat(1, BLOCKS, 1))


def random_plan(seed: int, heads: int, steps: int = STEPS) -> Assignment:
    make = torch.Generator().manual_seed(seed)
    table = torch.randint(ALONE, (steps, BLOCKS, heads), generator=make)
    shared = torch.randint(ALONE, len(ACTIONS), (steps, BLOCKS, heads), generator=make)
    table = torch.where(torch.rand(steps, BLOCKS, 1, generator=make) < 0.35, shared, table)
    return Assignment(ACTIONS, torch.where(torch.rand(steps, BLOCKS, 1, generator=make) < 0.2, 1, table))


class Reference:
    """A plan written into ``scaled_dot_product_attention``, whose calls [B, H, L, D] of a stock run are counted.

    All heads of the whole batch are computed at every step, and what the plan says is taken of it.
    """

    def __init__(
        self,
        size: Size,
        assignment: Assignment,
        num_steps: int,
        full: Callable[[int, int], bool] = lambda block, step: False,
        max_age: int = 1000,
    ) -> None:
        self.size, self.assignment, self.full, self.max_age = size, assignment, full, max_age
        self.rows = assignment.rows(num_steps).expand(-1, -1, HEADS)
        self.stock = torch.nn.functional.scaled_dot_product_attention
        self.calls = 0
        self.out: dict[tuple[int, int], Tensor] = {}
        self.residual: dict[tuple[int, int, AttnMethod], Tensor] = {}
        self.made: dict[tuple[int, int, int, str], int] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        q, k, v = query, key, value
        if not q.shape[2] == k.shape[2] == self.size.visual + self.size.text:
            return self.stock(q, k, v, **options)
        branches = 2 if self.size.conditional == "separate" else 1
        (rest, block), self.calls = divmod(self.calls, BLOCKS), self.calls + 1
        step, branch = divmod(rest, branches)
        actions = [self.action(step, branch, block, head) for head in range(HEADS)]
        valid = options.get("attn_mask")
        full = self.stock(q, k, v, attn_mask=valid)
        masks = {method: self.mask(method) & (valid if valid is not None else True) for method in (BAND, NARROW)}
        bands = {method: self.stock(q, k, v, attn_mask=mask) for method, mask in masks.items()}
        shares = step > 0 and all(action.share for action in actions)
        out = torch.stack([self.head(head, a, full, bands, branch, block) for head, a in enumerate(actions)], 1)
        self.out[branch, block] = out = self.shared(out, self.out.get((0, block)), branch) if shares else out
        for head, action in enumerate(actions):
            if not action.reuse:
                self.made[branch, block, head, "out"] = step
            if action.method is None and not action.reuse:
                self.made[branch, block, head, "residual"] = step
                for method, band in bands.items():
                    kept = self.residual.setdefault((branch, block, method), torch.zeros_like(full))
                    new = full - band
                    if shares:
                        new = self.shared(new, self.residual.get((0, block, method)), branch)
                    self.residual[branch, block, method] = kept.clone()
                    self.residual[branch, block, method][:, head] = new[:, head]
        return out

    def action(self, step: int, branch: int, block: int, head: int) -> Action:
        action = self.assignment.actions[int(self.rows[step, block, head])]
        made = self.made.get((branch, block, head, "out" if action.reuse else "residual"))
        lacks = (action.reuse or action.residual) and (made is None or step - made > self.max_age)
        return FULL if lacks or self.full(block, step) else action

    def head(
        self, head: int, action: Action, full: Tensor, bands: dict[AttnMethod, Tensor], branch: int, block: int
    ) -> Tensor:
        if action.reuse:
            return self.out[branch, block][:, head]
        if action.method is None:
            return full[:, head]
        out = bands[action.method][:, head]
        return out + self.residual[branch, block, action.method][:, head] if action.residual else out

    def shared(self, own: Tensor, of_conditional: Tensor | None, branch: int) -> Tensor:
        if self.size.conditional == "separate":
            assert of_conditional is not None
            return of_conditional if branch else own
        first, second = own.chunk(2)
        half = first if self.size.conditional == "first" else second
        return torch.cat([half, half])

    def mask(self, method: AttnMethod) -> Tensor:
        assert isinstance(method, BandAttnProcessor) and method.half_width is not None
        tokens = self.size.visual + self.size.text
        place = torch.arange(tokens) - (self.size.text if self.size.prefix else 0)
        text = (place < 0) | (place >= self.size.visual)
        return ((place - place[:, None]).abs() <= method.half_width) | text | text[:, None]


def expected(
    tiny: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    assignment: Assignment,
    pipe: Any = None,
    num_steps: int = STEPS,
    calls: int | None = None,
    reference: dict[str, Any] | None = None,
    **changes: Any,
) -> Tensor:
    """The latents of a stock run with the plan in torch's attention."""
    follows = Reference(SIZES[family], assignment, calls or num_steps, **(reference or {}))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", follows)
        output = run(tiny, pipe or pipeline(tiny, family), family, num_steps, **changes)
    branches = 2 if SIZES[family].conditional == "separate" else 1
    assert follows.calls == (calls or num_steps) * branches * BLOCKS, "every call was seen"
    return output


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


@each_family
def test_full_attention_at_every_step_is_the_stock_run(tiny: ModuleType, family: str) -> None:
    pipe = pipeline(tiny, family)
    stock = run(tiny, pipe, family)
    handle = dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=plan([0] * STEPS)))
    assert torch.equal(run(tiny, pipe, family), stock)
    assert handle.tally.density == 1.0


@each_family
@pytest.mark.parametrize("window", [1.0, (9, 9, 9)], ids=["band", "box"])
def test_a_window_over_everything_with_its_residual_is_full_attention(
    tiny: ModuleType, family: str, window: Any
) -> None:
    pipe = pipeline(tiny, family)
    stock = run(tiny, pipe, family)
    if isinstance(window, tuple):  # windows may not be larger than the grid
        grids = {"wan": (3, 4, 5), "hunyuan_video": (3, 4, 5), "dit": (1, 4, 4), "pixel_dit": (1, 5, 7)}
        window = grids.get(family, (1, 4, 5))
    dit_accel.apply(pipe, "dit_fast_attn", window=window, every=3)
    assert_same(run(tiny, pipe, family), stock)


@each_family
@pytest.mark.parametrize("heads", [1, HEADS], ids=["layers", "heads"])
@pytest.mark.parametrize("seed", range(2))
def test_random_plans_are_followed(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, heads: int, seed: int
) -> None:
    assignment = random_plan(seed, heads)
    wanted = expected(tiny, monkeypatch, family, assignment)
    pipe = pipeline(tiny, family)
    stock = run(tiny, pipe, family)
    dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment))
    found = run(tiny, pipe, family)
    assert_same(found, wanted)
    assert (found - wanted).abs().max() < 0.01 * (wanted - stock).abs().max(), "what the plan changes is far larger"


@pytest.mark.parametrize("family", ["wan", "flux", "sd3"])
@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0], [3, 1], [1, 3], [4, 0], [1, 1], [3, 4]],
        [[0, 0], [5, 5], [1, 3], [7, 7], [1, 0], [4, 1]],
        [[5, 6], [1, 1], [1, 0], [1, 1], [7, 7], [3, 1]],
    ],
    ids=["no sharing", "sharing between", "sharing first"],
)
def test_heads_that_do_different_things(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, rows: list[Any]
) -> None:
    assignment = plan(rows)
    pipe = pipeline(tiny, family)
    dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment))
    assert_same(run(tiny, pipe, family), expected(tiny, monkeypatch, family, assignment))


@pytest.mark.parametrize("family", ["wan", "pixart", "dit"])
@pytest.mark.parametrize("steps", [3, 9, 12])
def test_a_run_of_another_length_follows_the_plan_by_shares(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, steps: int
) -> None:
    assignment = random_plan(4, HEADS)
    pipe = pipeline(tiny, family)
    dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment))
    wanted = expected(tiny, monkeypatch, family, assignment, num_steps=steps)
    assert_same(run(tiny, pipe, family, steps), wanted)


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("wan", FlowMatchHeunDiscreteScheduler),
        ("sd3", FlowMatchHeunDiscreteScheduler),
        ("pixart", HeunDiscreteScheduler),
    ],
)
def test_a_scheduler_with_two_evaluations_a_step(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, scheduler: Any
) -> None:
    assignment = random_plan(5, HEADS)
    outputs = []
    for product in (False, True):
        pipe = pipeline(tiny, family)
        pipe.scheduler = scheduler()
        if product:
            dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment))
            outputs.append(run(tiny, pipe, family, 4))
        else:
            outputs.append(expected(tiny, monkeypatch, family, assignment, pipe, 4, calls=7))
    assert_same(outputs[1], outputs[0])


@pytest.mark.parametrize("family", ["wan", "sd3", "dit"])
def test_the_schedule_and_the_age_make_layers_full(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    assignment = random_plan(6, HEADS, 12)
    schedule = {"start_percent": 0.25, "end_percent": 0.9, "dense_blocks": (1,)}

    def full(block: int, step: int) -> bool:
        return block == 1 or not 3 <= step < 10.8

    pipe = pipeline(tiny, family)
    for options, reference in (
        (schedule, {"full": full}),
        ({"max_age": 1}, {"max_age": 1}),
        ({"max_age": 2}, {"max_age": 2}),
    ):
        dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment, **options))
        found = run(tiny, pipe, family, 12)
        assert_same(found, expected(tiny, monkeypatch, family, assignment, num_steps=12, reference=reference))


PROMPTS = 2


def two_prompts(family: str) -> dict[str, Any]:
    """Arguments of a run of two different items from the same noise, with guidance."""
    make = torch.Generator().manual_seed(7)
    texts, pooled = torch.randn(2, PROMPTS, 6, 32, generator=make), torch.randn(2, PROMPTS, 32, generator=make)
    changes: dict[str, Any] = {"generator": [torch.Generator().manual_seed(8) for _ in range(PROMPTS)]}
    if family in ("dit", "pixel_dit"):
        return changes | {"class_labels": [1, 4]}
    texts = texts[..., :16] if family in ("wan", "hunyuan_video") else texts
    pooled = pooled[..., :8] if family == "hunyuan_video" else pooled
    changes |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    if family in ("sd3", "flux", "hunyuan_video"):
        changes |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    if family in ("pixart", "hunyuan_video"):
        valid = (torch.arange(6) < torch.tensor([[4], [6]])).float()
        changes |= {"prompt_attention_mask": valid, "negative_prompt_attention_mask": valid.flip(0)}
    return changes


def without_guidance(family: str) -> dict[str, Any]:
    return {"true_cfg_scale": 1.0} if family in ("flux", "hunyuan_video") else {"guidance_scale": 1.0}


@each_family
def test_two_prompts_at_once(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    assignment, changes = random_plan(8, HEADS), two_prompts(family)
    pipe = pipeline(tiny, family)
    dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=assignment))
    found = run(tiny, pipe, family, **changes)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert_same(found, expected(tiny, monkeypatch, family, assignment, **two_prompts(family)))


@each_family
def test_nothing_is_shared_without_guidance(tiny: ModuleType, family: str) -> None:
    rows = [5, 5, 7, 6, 5, 7]
    alone = {5: 0, 6: 2, 7: 3}
    pipe = pipeline(tiny, family)
    outputs = []
    for taken in (rows, [alone[row] for row in rows]):
        dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=plan(taken)))
        outputs.append(run(tiny, pipe, family, **(two_prompts(family) | without_guidance(family))))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("options", "rows", "action"),
    [
        ({"window": 0.1, "every": 3}, [0, 1, 1, 0, 1, 1], Action(BandAttnProcessor(share=0.1), residual=True)),
        ({"between": "reuse", "every": 2, "start_percent": 0.5}, [0, 0, 0, 1, 0, 1], REUSE),
    ],
    ids=["residual", "reuse"],
)
def test_the_fixed_schedule_is_a_full_step_in_every_few(
    tiny: ModuleType, options: dict[str, Any], rows: list[int], action: Action
) -> None:
    fixed, pipe = plan(rows, (FULL, action)), pipeline(tiny, "wan")
    outputs = []
    for method in (DiTFastAttnProcessor(**options), DiTFastAttnProcessor(assignment=fixed)):
        dit_accel.apply(pipe, method)
        outputs.append(run(tiny, pipe, "wan"))
    assert torch.equal(*outputs)
