"""DiTFastAttn from run to run: what is kept and for how long, what is skipped, aborted runs, refusals."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import dit_accel
from dit_accel import runtime
from dit_accel.methods import attention
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment
from dit_accel.methods.assigned import Run
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.methods.draft import DraftAttnProcessor
from dit_accel.methods.kept import Keep
from dit_accel.plugin import Handle

HEADS, BLOCKS, STEPS = 2, 2, 7
BAND, NARROW = BandAttnProcessor(half_width=4, tile=8), BandAttnProcessor(half_width=1, tile=8)
ACTIONS = (
    FULL,
    REUSE,
    Action(BAND),
    Action(BAND, residual=True),
    Action(NARROW, residual=True),
    Action(share=True),
    Action(BAND, residual=True, share=True),
)
# Grid and text tokens, head dim if not 16, and options of the tiny pipelines and their runs.
TOKENS = {"wan": 60, "flux": 26, "dit": 16, "pixart": 20, "sd3": 26, "pixel_dit": 35}
HEAD_DIM = {"wan": 12, "pixel_dit": 12}
OPTIONS: dict[str, dict[str, Any]] = {"sd3": {"layers": 2, "dual": ()}}
SIZES: dict[str, dict[str, Any]] = {"pixel_dit": {"height": 5, "width": 7}}
each_family = pytest.mark.parametrize("family", TOKENS)
one_of_each_guidance = pytest.mark.parametrize("family", ["wan", "sd3", "dit"])


def pipeline(tiny: ModuleType, family: str) -> Any:
    return tiny.pipeline(family, **OPTIONS.get(family, {}))


def run(tiny: ModuleType, pipe: Any, family: str, steps: int = STEPS, **changes: Any) -> Tensor:
    output: Tensor = tiny.run(pipe, steps=steps, **(SIZES.get(family, {}) | changes))
    return output


def random_plan(seed: int, heads: int = HEADS) -> Assignment:
    make = torch.Generator().manual_seed(seed)
    table = torch.randint(5, (STEPS, BLOCKS, heads), generator=make)
    shared = torch.randint(5, 7, (STEPS, BLOCKS, heads), generator=make)
    table = torch.where(torch.rand(STEPS, BLOCKS, 1, generator=make) < 0.35, shared, table)
    return Assignment(ACTIONS, torch.where(torch.rand(STEPS, BLOCKS, 1, generator=make) < 0.3, 1, table))


def plan(rows: list[int], actions: tuple[Action, ...] = ACTIONS) -> DiTFastAttnProcessor:
    """One action for each step, of all blocks."""
    return DiTFastAttnProcessor(assignment=Assignment(actions, torch.tensor(rows)[:, None, None].repeat(1, BLOCKS, 1)))


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(getattr(module, "processor", None), "_dit_accel_layer")]


@contextmanager
def kept_over_a_run(handle: Handle, model: nn.Module) -> Iterator[list[int]]:
    """Bytes that are kept after each attention module."""
    seen: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *_: seen.append(handle.kept_bytes)) for module in attention_modules(model)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@each_family
@pytest.mark.parametrize("keep", ["device", "8bit"])
def test_the_announced_bytes_are_those_kept_at_the_peak(tiny: ModuleType, family: str, keep: Keep) -> None:
    separate = family in ("wan", "flux")
    for seed, heads in ((0, HEADS), (1, 1), (2, HEADS)):
        method = DiTFastAttnProcessor(assignment=random_plan(seed, heads), keep=keep)
        pipe = pipeline(tiny, family)
        handle = dit_accel.apply(pipe, method)
        with kept_over_a_run(handle, pipe.transformer) as seen:
            run(tiny, pipe, family)
        layout = handle.states[0].layout
        assert layout is not None and layout.num_tokens == TOKENS[family]
        size = Run(STEPS, BLOCKS, 1 if separate else 2, HEADS, HEAD_DIM.get(family, 16), 4)
        told = method.bind(layout, torch.device("cpu")).kept_bytes(size, guided=True, separate=separate)
        assert max(seen) == pytest.approx(told * (2 if separate else 1), rel=0.05)
        assert handle.kept_bytes == 0


def test_what_will_be_kept_is_said_once(tiny: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    runtime._say.cache_clear()
    pipe = pipeline(tiny, "wan")
    dit_accel.apply(pipe, plan([0, 1, 0, 1, 0, 1, 1]))
    for _ in range(2):
        run(tiny, pipe, "wan")
    (said,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(
        r"dit_fast_attn keeps up to [1-9]\d*\.\d\d KiB from step to step in each guidance branch\.", said
    )


class Abort(Exception):
    pass


@one_of_each_guidance
@pytest.mark.parametrize("error", [Abort, KeyboardInterrupt])
def test_a_run_that_ends_in_the_middle_leaves_nothing(tiny: ModuleType, family: str, error: Any) -> None:
    pipe = pipeline(tiny, family)
    handle = dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=random_plan(3)))
    whole = run(tiny, pipe, family)
    left = [STEPS * len(tiny.branches(family)) // 2 + 1]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    hook = attention_modules(pipe.transformer)[1].register_forward_hook(fail)
    with pytest.raises(error):
        run(tiny, pipe, family)
    hook.remove()
    if family == "dit":
        gc.collect()  # a pipeline that iterates over its progress bar is done with it when the traceback goes
    assert handle.kept_bytes == 0
    assert torch.equal(run(tiny, pipe, family), whole)


def test_a_run_aborted_by_its_callback_leaves_nothing(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    handle = dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=random_plan(3)))
    whole = run(tiny, pipe, "wan")

    def abort(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 3:
            assert handle.kept_bytes > 0
            raise Abort
        return {}

    with pytest.raises(Abort):
        run(tiny, pipe, "wan", callback_on_step_end=abort)
    assert handle.kept_bytes == 0
    assert torch.equal(run(tiny, pipe, "wan"), whole)


def test_a_model_called_by_hand_begins_anew_with_the_first_step(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    handle = dit_accel.apply(pipe, plan([0, 1, 3, 0, 1, 1]))
    outputs = []
    for latest in (3, 6):  # the first run is left in the middle, and no progress bar tells
        outputs.append(by_hand(tiny, pipe, ("cond", "uncond"), latest))
    assert torch.equal(outputs[0], outputs[1][:3])
    assert handle.kept_bytes == 0, "after the last step nothing is needed"


def by_hand(tiny: ModuleType, pipe: Any, branches: tuple[str, ...], latest: int = 6, named: bool = True) -> Tensor:
    """Outputs of a denoiser called in a loop of 6 steps that ends after ``latest``, [latest, branches, ...]."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.set_timesteps(6)
    inputs = tiny.inputs("wan")
    texts = {"cond": inputs["encoder_hidden_states"], "uncond": -inputs["encoder_hidden_states"]}
    latents, found = inputs["hidden_states"], []
    for timestep in pipe.scheduler.timesteps[:latest]:
        outputs = {}
        for branch in branches:
            changes = {"hidden_states": latents, "encoder_hidden_states": texts[branch], "timestep": timestep[None]}
            with pipe.transformer.cache_context(branch) if named else nullcontext():
                outputs[branch] = tiny.forward(pipe.transformer, inputs | changes)
        found.append(torch.stack([outputs["cond"], outputs["uncond"]]))
        velocity = 3 * outputs["cond"] - 2 * outputs["uncond"]
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return torch.stack(found)


def test_a_pipeline_that_asks_for_the_unconditional_half_first_shares_nothing(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    outputs = []
    for rows in ([0, 5, 6, 1, 5, 6], [0, 0, 3, 1, 0, 3]):
        handle = dit_accel.apply(pipe, plan(rows))
        with kept_over_a_run(handle, pipe.transformer) as seen:
            outputs.append((by_hand(tiny, pipe, ("uncond", "cond")), max(seen)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1] == outputs[1][1], "and nothing waits for it"
    dit_accel.apply(pipe, plan([0, 5, 6, 1, 5, 6]))
    shared = by_hand(tiny, pipe, ("cond", "uncond"))
    assert not torch.allclose(shared, outputs[0][0], atol=1e-4)


def test_branches_without_a_name_take_nothing_of_each_other(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    dit_accel.apply(pipe, plan([0, 0, 2, 0, 2, 0]))
    wanted = by_hand(tiny, pipe, ("cond", "uncond"))
    handle = dit_accel.apply(pipe, plan([0, 1, 2, 3, 2, 5]))
    for _ in range(2):
        assert torch.equal(by_hand(tiny, pipe, ("cond", "uncond"), named=False), wanted)
    handle.restore()


def test_skip_layer_guidance_keeps_its_own(tiny: ModuleType) -> None:
    """Its call of a half-size batch lies between the others, with a block left out."""
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe = pipeline(tiny, "sd3")
    stock = run(tiny, pipe, "sd3", **options)
    outputs = []
    for method in (plan([0] * STEPS), plan([0, 1, 0, 1, 0, 1, 0]), plan([0, 3, 3, 3, 3, 3, 3])):
        handle = dit_accel.apply(pipe, method)
        outputs.append(run(tiny, pipe, "sd3", **options))
        assert handle.kept_bytes == 0
    assert torch.equal(outputs[0], stock)
    for output in outputs[1:]:
        assert 1e-5 < (output - stock).abs().max() < 0.2 * stock.abs().max()


def test_both_denoisers_of_a_pipeline_keep_their_own(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan", two=True)
    handle = dit_accel.apply(pipe, plan([0, 1, 1, 1, 1, 1, 1]))
    with kept_over_a_run(handle, pipe.transformer) as first, kept_over_a_run(handle, pipe.transformer_2) as second:
        outputs = [run(tiny, pipe, "wan") for _ in range(2)]
    assert max(first) == max(second) > 0, "when the second one begins, the first one is done"
    assert torch.equal(*outputs)
    assert handle.kept_bytes == 0
    assert handle.tally.density == pytest.approx(2 / STEPS), "each begins with a full step"


@one_of_each_guidance
def test_the_host_keeps_the_same_bits(tiny: ModuleType, family: str) -> None:
    pipe = pipeline(tiny, family)
    outputs = []
    for keep in ("device", "cpu", "8bit"):
        dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=random_plan(9), keep=keep))
        outputs.append(run(tiny, pipe, family))
    assert torch.equal(outputs[0], outputs[1])
    assert 0 < (outputs[0] - outputs[2]).abs().max() < 0.1 * outputs[0].abs().max()


@each_family
def test_a_layer_that_reuses_projects_nothing(tiny: ModuleType, family: str) -> None:
    pipe = pipeline(tiny, family)
    handle = dit_accel.apply(pipe, plan([0, 1, 1, 0, 1, 2, 1]))
    calls: list[str] = []
    for name, module in pipe.transformer.named_modules():
        if name.rpartition(".")[2] in ("to_q", "to_k", "to_v", "to_out") and "attn2" not in name:
            leaf = module[0] if isinstance(module, nn.ModuleList) else module
            leaf.register_forward_hook(lambda *_, name=name: calls.append(name))
    run(tiny, pipe, family)
    assert set(calls), "the projections were found"
    branches = len(tiny.branches(family))
    outside = {name for name in calls if family == "pixel_dit" and name.endswith("to_out")}  # its block projects
    assert {calls.count(name) for name in set(calls) - outside} == {3 * branches}
    assert handle.tally.calls == STEPS * branches * BLOCKS
    assert handle.tally.dense_calls == 0


@pytest.mark.parametrize(
    ("rows", "windows"),
    [([0, 0, 0, 3, 3, 0, 0], 3), ([0, 2, 2, 0, 0, 2, 2], 4), ([0, 3, 0, 3, 4, 1, 1], 6), ([0, 1, 1, 1, 0, 0, 0], 0)],
    ids=["residual later", "windows alone", "two widths", "none"],
)
def test_a_full_step_computes_a_window_only_for_a_residual(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: list[int], windows: int
) -> None:
    computed = []
    operator = attention.block_sparse_attention
    monkeypatch.setattr(attention, "block_sparse_attention", lambda *a, **k: computed.append(1) or operator(*a, **k))
    pipe = pipeline(tiny, "dit")
    dit_accel.apply(pipe, plan(rows))
    run(tiny, pipe, "dit")
    assert len(computed) == windows * BLOCKS


def test_density_counts_what_a_run_computes(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "sd3")
    handle = dit_accel.apply(pipe, plan([0, 5, 1, 0, 3, 2, 6]))
    run(tiny, pipe, "sd3")
    layout = handle.states[0].layout
    assert layout is not None
    band = BAND.attention(layout).density  # type: ignore[union-attr]
    steps = [1, 0.5, 0, 1 + band, band, band, band / 2]
    assert handle.tally.density == pytest.approx(sum(steps) / STEPS)


def test_heads_that_choose_by_content_keep_their_choices_apart(tiny: ModuleType) -> None:
    """Two dynamic methods in one layer, each with tiles chosen at another step."""
    first = Action(DraftAttnProcessor(region=(1, 2, 2), keep=0.3, refresh=3))
    second = Action(DraftAttnProcessor(region=(1, 2, 2), keep=0.6, refresh=2))
    pipe = pipeline(tiny, "wan")
    whole = []
    for actions in ((FULL, first, first), (FULL, second, second), (FULL, first, second)):
        table = torch.tensor([[0, 0]] + [[1, 2]] * 6)[:, None].repeat(1, BLOCKS, 1)
        handle = dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=Assignment(actions, table)))
        run(tiny, pipe, "wan")
        whole.append(handle.tally.density)
    assert whole[2] == pytest.approx((whole[0] + whole[1]) / 2, rel=0.02)


@each_family
def test_apply_and_restore_leave_the_very_same_objects(tiny: ModuleType, family: str) -> None:
    pipe = pipeline(tiny, family)
    stock = run(tiny, pipe, family)
    processors = {
        name: module.processor for name, module in pipe.transformer.named_modules() if hasattr(module, "processor")
    }
    before = sorted(vars(pipe)), sorted(vars(pipe.transformer))
    handle = dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=random_plan(2)))
    run(tiny, pipe, family)
    handle.restore()
    assert handle.kept_bytes == 0
    assert all(pipe.transformer.get_submodule(name).processor is one for name, one in processors.items())
    assert (sorted(vars(pipe)), sorted(vars(pipe.transformer))) == before
    assert "progress_bar" not in vars(pipe)
    assert torch.equal(run(tiny, pipe, family), stock)


def test_restoring_the_model_alone_and_then_the_pipeline_leaves_no_trace(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    before = sorted(vars(pipe))
    handle = dit_accel.apply(pipe, "dit_fast_attn")
    dit_accel.restore(pipe.transformer)
    handle.restore()
    assert sorted(vars(pipe)) == before


def test_restoring_in_the_middle_of_a_run_lets_go(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    handle = dit_accel.apply(pipe, plan([0, 1, 3, 1, 1, 1, 1]))

    def restore(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            assert handle.kept_bytes > 0
            handle.restore()
            assert handle.kept_bytes == 0
        return {}

    assert run(tiny, pipe, "wan", callback_on_step_end=restore).isfinite().all()


def test_a_copied_pipeline_wants_the_plan_applied_to_itself(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    method = DiTFastAttnProcessor(assignment=random_plan(4))
    dit_accel.apply(pipe, method)
    wanted = run(tiny, pipe, "wan")
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(tiny, pipe, "wan"), wanted)
    del pipe
    gc.collect()
    with pytest.raises(ValueError, match="apply the method to the pipeline"):
        run(tiny, twin, "wan")
    handle = dit_accel.apply(twin, method)
    assert torch.equal(run(tiny, twin, "wan"), wanted)
    handle.restore()
    assert "progress_bar" not in vars(twin)


def test_a_copy_outlives_its_pipeline(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    dit_accel.apply(pipe, tiny.Tiles(everything=False))
    wanted, twin = run(tiny, pipe, "wan"), copy.deepcopy(pipe)
    del pipe
    gc.collect()
    assert torch.equal(run(tiny, twin, "wan"), wanted)


def test_compiled_blocks_follow_the_plan(tiny: ModuleType) -> None:
    outputs = []
    for compiled in (False, True):
        pipe = pipeline(tiny, "wan")
        if compiled:
            torch._dynamo.reset()
            pipe.transformer.compile_repeated_blocks(backend="eager")
        dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=random_plan(5)))
        outputs.append(run(tiny, pipe, "wan"))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        run(tiny, pipe, "wan")


def test_short_sequences_stay_dense(tiny: ModuleType) -> None:
    pipe = pipeline(tiny, "wan")
    stock = run(tiny, pipe, "wan")
    handle = dit_accel.apply(pipe, "dit_fast_attn", min_tokens=61)
    assert torch.equal(run(tiny, pipe, "wan"), stock)
    assert handle.tally.sparse_calls == 0
