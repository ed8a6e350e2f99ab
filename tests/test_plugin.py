"""apply and restore on whole pipelines: schedules, runs that follow each other, and a host left as it was found."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import math
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusionPipeline,
    WanTransformer3DModel,
)
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

import dit_accel
from dit_accel import interception
from dit_accel.methods import METHODS
from dit_accel.runtime import binder
from dit_accel.state import scheduler_position

FAMILIES = ("wan", "hunyuan_video", "flux", "dit", "pixart", "sd3")
each_family = pytest.mark.parametrize("family", FAMILIES)


def anatomy(model: Any) -> dict[str, Any]:
    """Everything a plugin could leave behind: attributes, hooks and processor objects of every module."""
    found: dict[str, Any] = {"": sorted(vars(model))}
    for name, module in model.named_modules():
        found[f"{name} hooks"] = (
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
            len(module._forward_hooks),
            module.forward,
        )
        processor = getattr(module, "processor", None)
        found[f"{name} processor"] = (id(processor), sorted(getattr(processor, "__dict__", {})))
    return found


@each_family
def test_restore_leaves_no_trace(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    stock, before = tiny.run(pipe), anatomy(pipe.transformer)
    handle = dit_accel.apply(pipe, tiny.Tiles(everything=False))
    assert not torch.allclose(tiny.run(pipe), stock, atol=1e-3)
    handle.restore()
    assert anatomy(pipe.transformer) == before
    assert torch.equal(tiny.run(pipe), stock)


@each_family
def test_every_target_is_called_in_every_step_and_branch(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    handle = dit_accel.apply(pipe, tiny.Tiles(everything=False))
    tiny.run(pipe, steps=5)
    assert handle.tally.sparse_calls == tiny.TARGETS * 5 * len(tiny.branches(family))
    assert handle.tally.dense_calls == 0


@each_family
def test_the_schedule_counts_denoising_steps(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    seen: list[tuple[int, int, str | None]] = []
    handle = dit_accel.apply(pipe, tiny.Tiles(start_percent=0.4, end_percent=0.8, dense_blocks=1))
    states = handle.states
    pipe.transformer.norm_out.register_forward_pre_hook(
        lambda *_: seen.append((states[0].step, states[0].num_steps, states[0].branch))
    )
    tiny.run(pipe, steps=5)
    assert seen == [(step, 5, branch) for step in range(5) for branch in tiny.branches(family)]
    assert handle.tally.sparse_calls == 2 * len(tiny.branches(family))  # steps 2 and 3, one block
    assert handle.tally.calls == tiny.TARGETS * 5 * len(tiny.branches(family))


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (FlowMatchEulerDiscreteScheduler(), 4),
        (FlowMatchHeunDiscreteScheduler(), 7),  # two calls a step but for the last
    ],
    ids=["euler", "second order"],
)
def test_the_scheduler_may_be_replaced_after_apply(tiny: ModuleType, scheduler: Any, calls: int) -> None:
    pipe = tiny.pipeline("wan")
    handle = dit_accel.apply(pipe, tiny.Tiles(start_percent=0.5))
    pipe.scheduler = scheduler
    for _ in range(2):
        tiny.run(pipe, steps=4)
    dense = math.ceil(calls / 2)
    assert (handle.tally.dense_calls, handle.tally.sparse_calls) == (8 * dense, 8 * (calls - dense))


def test_a_scheduler_that_keeps_no_index_is_searched() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    found = [scheduler_position(scheduler, timestep.expand(2)) for timestep in scheduler.timesteps]
    assert found == [(step, 5) for step in range(5)]


def test_a_scheduler_without_index_reads_scaled_timesteps(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("flux")  # its denoiser gets timesteps divided by 1000
    pipe.scheduler.set_timesteps(4, mu=1.0)
    handle = dit_accel.apply(pipe, tiny.Tiles(start_percent=0.5))
    for timestep in pipe.scheduler.timesteps:  # neither a step taken nor a first step chosen
        tiny.forward(pipe.transformer, tiny.inputs("flux") | {"timestep": timestep[None] / 1000})
    assert (handle.tally.dense_calls, handle.tally.sparse_calls) == (4, 4)


def test_a_run_after_an_aborted_one_starts_from_the_first_step(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    handle = dit_accel.apply(pipe, tiny.Tiles(start_percent=0.5))
    whole = tiny.run(pipe)

    def abort(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        tiny.run(pipe, callback_on_step_end=abort)
    before = handle.tally.dense_calls
    assert torch.equal(tiny.run(pipe), whole)
    assert handle.tally.dense_calls - before == 8
    assert handle.states[0].branch is None


def test_another_size_in_the_same_process(tiny: ModuleType) -> None:
    sizes: list[dict[str, int]] = [{}, {"height": 48, "width": 112, "frames": 5}, {}, {"height": 32, "width": 32}]
    pipe = tiny.pipeline("wan")
    dit_accel.apply(pipe, tiny.Tiles(everything=False))
    together = [tiny.run(pipe, **size) for size in sizes]
    for size, output in zip(sizes, together, strict=True):
        fresh = tiny.pipeline("wan")
        dit_accel.apply(fresh, tiny.Tiles(everything=False))
        assert torch.equal(tiny.run(fresh, **size), output)


def test_pipelines_with_different_methods_do_not_mix(tiny: ModuleType) -> None:
    def runs(pipes: list[Any]) -> list[torch.Tensor]:
        return [tiny.run(pipe, width=size) for size in (80, 48) for pipe in pipes]

    methods = [tiny.Tiles(everything=False), tiny.Tiles(), tiny.Tiles(everything=False, start_percent=0.5)]
    alone = []
    for method in methods:
        pipe = tiny.pipeline("wan")
        dit_accel.apply(pipe, method)
        alone.append(runs([pipe]))
    pipes = [tiny.pipeline("wan") for _ in methods]
    for pipe, method in zip(pipes, methods, strict=True):
        dit_accel.apply(pipe, method)
    assert all(
        torch.equal(together, apart)
        for together, apart in zip(runs(pipes), [run for size in zip(*alone, strict=True) for run in size], strict=True)
    )


def test_both_denoisers_of_a_pipeline_are_entered(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan", two=True)
    stock = tiny.run(pipe)
    with dit_accel.apply(pipe, tiny.Tiles(everything=False, start_percent=0.25)) as handle:
        tiny.run(pipe)
        high, low = handle.states
        assert (high.step, low.step) == (1, 3), "the pipeline changes denoisers at its boundary"
        assert (handle.tally.dense_calls, handle.tally.sparse_calls) == (4, 12)
    assert torch.equal(tiny.run(pipe), stock)


def test_applying_again_replaces_the_method(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    stock, before = tiny.run(pipe), anatomy(pipe.transformer)
    first = dit_accel.apply(pipe, tiny.Tiles(everything=False))
    second = dit_accel.apply(pipe, tiny.Tiles())
    first.restore()  # no longer its business
    torch.testing.assert_close(tiny.run(pipe), stock, atol=1e-5, rtol=0)
    assert (first.tally.calls, second.tally.calls) == (0, 16)
    second.restore()
    second.restore()
    assert anatomy(pipe.transformer) == before


def test_set_attn_processor_is_the_same_verb(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    stock = tiny.run(pipe)
    before = anatomy(pipe.transformer)
    pipe.set_attn_processor(tiny.Tiles(everything=False))
    assert not torch.allclose(tiny.run(pipe), stock, atol=1e-3)
    pipe.set_attn_processor("dense")
    assert torch.equal(tiny.run(pipe), stock)
    pipe.set_attn_processor(None)
    assert anatomy(pipe.transformer) == before
    for wrong in ("plan", 3, pipe.transformer.blocks[0].attn1.processor):
        with pytest.raises(ValueError, match="takes a method's name"):
            pipe.set_attn_processor(wrong)


def test_a_copied_pipeline_wants_the_method_applied_to_itself(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    dit_accel.apply(pipe, tiny.Tiles(everything=False))
    expected = tiny.run(pipe)
    assert torch.equal(tiny.run(copy.deepcopy(pipe)), expected)
    scheduled = tiny.Tiles(everything=False, start_percent=0.5)
    dit_accel.apply(pipe, scheduled)
    expected = tiny.run(pipe)
    twin = copy.deepcopy(pipe)
    with pytest.raises(ValueError, match="apply the method to the pipeline"):
        tiny.run(twin)
    dit_accel.apply(twin, scheduled)
    assert torch.equal(tiny.run(twin), expected)


@pytest.mark.parametrize("offload_first", [True, False], ids=["offload, apply", "apply, offload"])
def test_offload_in_either_order(tiny: ModuleType, offload_first: bool) -> None:
    pipe = tiny.pipeline("wan")
    dit_accel.apply(pipe, tiny.Tiles(everything=False, start_percent=0.5))
    expected = tiny.run(pipe)
    dit_accel.restore(pipe)
    method = tiny.Tiles(everything=False, start_percent=0.5)
    if not offload_first:
        handle = dit_accel.apply(pipe, method)
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    if offload_first:
        handle = dit_accel.apply(pipe, method)
    assert torch.equal(tiny.run(pipe), expected)
    hook.remove()  # as diffusers does between runs
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    assert torch.equal(tiny.run(pipe), expected)
    assert handle.tally.sparse_calls == 2 * 8
    handle.restore()
    hook.remove()
    assert "cache_context" not in vars(pipe.transformer)


def test_saving_is_unaffected(tiny: ModuleType, tmp_path: Path) -> None:
    pipe = tiny.pipeline("wan")
    pipe.transformer.save_pretrained(tmp_path / "stock")
    dit_accel.apply(pipe, tiny.Tiles())
    pipe.transformer.save_pretrained(tmp_path / "applied")
    for file in (tmp_path / "stock").iterdir():
        assert (tmp_path / "applied" / file.name).read_bytes() == file.read_bytes(), file.name
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "applied")
    assert not loaded._forward_pre_hooks


def test_the_pipeline_is_not_kept_alive(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    handle = dit_accel.apply(pipe, tiny.Tiles(start_percent=0.5))
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    handle.restore()


def test_density_and_time_of_a_run(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    method = tiny.Tiles(everything=False, start_percent=0.5)
    handle = dit_accel.apply(pipe, method)
    with handle.timing() as times:
        tiny.run(pipe)
    tiny.run(pipe)
    layout = handle.states[0].layout
    assert layout is not None
    assert times.calls == 16
    assert handle.tally.calls == 32
    assert times.density == pytest.approx(0.5 + 0.5 * method.plan(layout).density)
    assert handle.tally.density == pytest.approx(times.density)
    assert times.attention_seconds > 0
    assert handle.tally.attention_seconds == 0


def test_short_sequences_stay_dense(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    stock = tiny.run(pipe)  # 60 tokens
    handle = dit_accel.apply(pipe, "neighborhood", window=(100, 100, 100), min_tokens=61)
    assert torch.equal(tiny.run(pipe), stock)
    assert handle.tally.sparse_calls == 0


def test_plans_are_made_once_per_layout(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = tiny.Tiles.plan
    monkeypatch.setattr(tiny.Tiles, "plan", lambda self, layout: made.append(layout) or plan(self, layout))
    pipe = tiny.pipeline("wan", two=True)
    dit_accel.apply(pipe, tiny.Tiles())
    for width in (80, 48, 80):
        tiny.run(pipe, width=width)
    assert len(made) == 2
    bind = binder(tiny.Tiles())
    layouts = [tiny.TokenLayout((1, 1, columns)) for columns in range(1, 30)]
    for layout in layouts:
        bind(layout, torch.device("cpu"))
    assert bind.cache_info().currsize < 20  # type: ignore[attr-defined]


def test_a_method_that_cannot_serve_the_size_fails_before_any_attention(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    handle = dit_accel.apply(pipe, "neighborhood", window=(100, 100, 100), start_percent=0.5)
    with pytest.raises(ValueError, match="window"):
        tiny.run(pipe)
    assert handle.tally.calls == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "radail"}, "did you mean 'radial'"),
        ({"method": "radial", "decoy": 1}, "did you mean 'decay'"),
        ({"method": "radial", "backend": "cuda"}, "backend must be one of auto, reference, torch, triton"),
    ],
    ids=["method", "option", "backend"],
)
def test_wrong_arguments_are_refused(tiny: ModuleType, options: dict[str, Any], message: str) -> None:
    pipe = tiny.pipeline("wan")
    with pytest.raises(ValueError, match=message):
        dit_accel.apply(pipe, **options)
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("method", ["radial", "draft", "log_linear", "pyramid"])
def test_a_backend_that_cannot_run_is_refused_in_the_first_step(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    for name in ("block_sparse.triton_forward", "pyramid.triton_list_forward"):  # decorated while Triton interprets
        importlib.import_module(f"dit_accel.kernels.{name}")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    pipe = tiny.pipeline("wan")
    handle = dit_accel.apply(pipe, method, start_percent=0.5, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' needs a GPU"):
        tiny.run(pipe)
    assert handle.tally.calls == 0


def test_a_bare_model_has_no_schedule(tiny: ModuleType) -> None:
    model = tiny.model("wan")
    for schedule in ({"start_percent": 0.1}, {"end_percent": 0.9}):
        with pytest.raises(ValueError, match="apply the method to the pipeline"):
            dit_accel.apply(model, tiny.Tiles(**schedule))
    assert not model._forward_pre_hooks


def test_unknown_denoisers_are_refused_with_the_known_ones() -> None:
    unknown = StableDiffusionPipeline(None, None, None, None, None, None, None, requires_safety_checker=False)
    for given in (unknown, torch.nn.Linear(2, 2), "wan"):
        with pytest.raises(ValueError, match="WanTransformer3DModel, HunyuanVideoTransformer3DModel, FluxTransformer"):
            dit_accel.apply(given, "radial")


@each_family
def test_dense_attention_by_another_kernel(tiny: ModuleType, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline(family)
    stock, before = tiny.run(pipe), anatomy(pipe.transformer)
    registry, math_calls = interception._AttentionBackendRegistry, []
    kernel = registry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(**arguments: Any) -> torch.Tensor:
        math_calls.append(arguments)
        return kernel(**arguments)

    monkeypatch.setitem(registry._backends, AttentionBackendName._NATIVE_MATH, counted)
    with dit_accel.apply(pipe, "dense", kernel="_native_math") as handle:
        other = tiny.run(pipe)
    assert handle.tally.dense_calls == handle.tally.calls == len(math_calls)
    torch.testing.assert_close(other, stock, atol=1e-4, rtol=1e-4)
    assert anatomy(pipe.transformer) == before
    assert torch.equal(tiny.run(pipe), stock)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("cudnn", "kernel must be fa4 or one of .*_native_cudnn"),
        ("flash_4_hub", "kernel must be"),
        ("flash", "kernel='flash' cannot run here: .*flash-attn"),
        ("fa4", "needs the package flash-attn-4"),
    ],
)
def test_kernels_that_are_not_there_are_refused(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, kernel: str, message: str
) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pipe = tiny.pipeline("wan")
    with pytest.raises(ValueError, match=message):
        dit_accel.apply(pipe, "dense", kernel=kernel)
    assert not pipe.transformer._forward_pre_hooks


def test_every_pipeline_has_the_method() -> None:
    assert "dense" in METHODS
    assert callable(DiffusionPipeline.set_attn_processor)


STUB = "class DiffusionPipeline:\n    pass\n"
CHECK = """
import sys
{imports}
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
assert DiffusionPipeline.set_attn_processor.__module__ == "dit_accel.attach"
assert not any(type(finder).__module__ == "dit_accel.attach" for finder in sys.meta_path)
assert not {{"torch", "triton", "gradio", "matplotlib", "transformers"}} & set(sys.modules)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import dit_accel",
        "import dit_accel\nimport diffusers",
        "import diffusers\nimport dit_accel",
        "import diffusers.pipelines.pipeline_utils\nimport dit_accel",
    ],
    ids=["dit_accel", "dit_accel, diffusers", "diffusers, dit_accel", "pipelines, dit_accel"],
)
def test_the_method_is_there_in_either_order_of_imports(tmp_path: Path, imports: str) -> None:
    package = tmp_path / "diffusers" / "pipelines"  # stands in for the one that takes seconds
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "pipeline_utils.py").write_text(STUB)
    path = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    subprocess.run([sys.executable, "-c", path + CHECK.format(imports=imports)], check=True)


def test_the_method_comes_with_the_real_diffusers() -> None:
    code = "import dit_accel\nfrom diffusers import WanPipeline\nassert WanPipeline.set_attn_processor"
    subprocess.run([sys.executable, "-c", code], check=True)
