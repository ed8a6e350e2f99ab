"""What DiTFastAttn refuses, and that it does so before any attention."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import runtime
from dit_accel.methods.actions import FULL, Assignment
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor

ONLY_FULL = Assignment((FULL,), torch.zeros(4, 2, 1, dtype=torch.int16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"between": "share"}, "between must be residual or reuse, got 'share'"),
        ({"between": "reuse", "density": 0.5}, "density is of a window, got 0.5 with between='reuse'"),
        ({"keep": "disk"}, "keep must be one of device, cpu, 8bit, got 'disk'"),
        ({"max_age": 0}, "max_age must be at least 1 step or None, got 0"),
        ({"delta": "add"}, "delta corrects one method"),
        ({"window": 0.0}, "share must be in"),
        ({"window": (1, 0, 1)}, "window"),
        ({"assignment": ONLY_FULL, "density": 0.5}, "density is of the fixed schedule's window"),
    ],
    ids=["every", "between", "no window", "keep", "max_age", "delta", "share", "box", "density"],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTFastAttnProcessor(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((7, 3, 1), "for 3 blocks, the model has 2"), ((7, 2, 5), "for 5 heads, the model has 2")],
    ids=["blocks", "heads"],
)
def test_a_plan_for_another_model_is_refused_before_any_attention(
    tiny: ModuleType, shape: tuple[int, int, int], message: str
) -> None:
    pipe = tiny.pipeline("wan")
    table = torch.zeros(shape, dtype=torch.int16)
    handle = dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=Assignment((FULL,), table)))
    with pytest.raises(ValueError, match=message):
        tiny.run(pipe)
    assert handle.tally.calls == 0


def test_a_model_without_its_pipeline_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(ValueError, match="dit_fast_attn follows denoising steps, .* apply the method to the pipeline"):
        dit_accel.apply(tiny.model("wan"), "dit_fast_attn")


def test_probing_is_refused_at_once(tiny: ModuleType) -> None:
    handle = dit_accel.apply(tiny.pipeline("wan"), "dit_fast_attn")
    with pytest.raises(ValueError, match="takes earlier outputs again"), handle.probing():
        pass


def test_what_the_gpu_has_no_room_for_is_refused_before_any_attention(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.pipeline("wan")
    monkeypatch.setattr(runtime, "_free_bytes", lambda device: 2048)
    handle = dit_accel.apply(pipe, "dit_fast_attn")
    with pytest.raises(ValueError, match=r'2\.00 KiB of the GPU are free; use keep="cpu", keep="8bit" or a plan'):
        tiny.run(pipe)
    assert handle.tally.calls == 0
    dit_accel.apply(pipe, DiTFastAttnProcessor(assignment=ONLY_FULL))
    tiny.run(pipe)
    dit_accel.apply(pipe, "dit_fast_attn", keep="cpu")
    tiny.run(pipe)


def test_memory_that_torch_holds_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (10, 100)), ("memory_reserved", 40), ("memory_allocated", 15)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert runtime._free_bytes(torch.device("cuda")) == 35
    assert runtime._free_bytes(torch.device("cpu")) is None
