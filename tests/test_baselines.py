"""Exact dense kernels: found, checked against native, and told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.commands import baselines
from dit_accel.commands.baselines import ExactKernel, compare_kernels, floor_kernel
from dit_accel.interception import AttentionCall, Layer
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.pipelines.families import FAMILIES, family_named
from dit_accel.pipelines.random_models import random_call, random_denoiser
from dit_accel.pipelines.specs import SPECS, ModelSpec
from dit_accel.plugin import apply

LAYOUT = TokenLayout((2, 5, 7), text_tokens=3, text_position="prefix")
CPU = torch.device("cpu")


def small(model: str) -> ModelSpec:
    """A block of each kind, narrow, at a size that every family makes."""
    spec = SPECS[model]
    kinds = ("blocks", "single_blocks", "visual_blocks")
    blocks: dict[str, Any] = {kind: min(1, getattr(spec, kind)) for kind in kinds}
    side, frames = 12 if spec.family == "pixel_dit" else 64, 1 if spec.num_frames == 1 else 9
    return replace(spec, heads=3, head_dim=16, ffn_dim=48, height=side, width=side, num_frames=frames, **blocks)


UNMASKED, MASKED = small("flux.1-dev"), small("hunyuanvideo")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_is_among_the_kernels_of_every_type_and_the_fastest_come_first(dtype: torch.dtype) -> None:
    kernels = compare_kernels(CPU, dtype, UNMASKED, LAYOUT)
    assert {"native", "_native_math"} <= {kernel.name for kernel in kernels} <= set(baselines.KERNELS)
    seconds = [kernel.seconds for kernel in kernels]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_kernel_is_native_if_its_output_is_bit_identical() -> None:
    same = {kernel.name: kernel.is_native for kernel in compare_kernels(CPU, torch.float32, UNMASKED, LAYOUT)}
    assert same["native"] and not same["_native_math"]


def test_the_floor_is_the_fastest_kernel_that_rounds_otherwise() -> None:
    quick, native, slow = ExactKernel("a", 1.0, True), ExactKernel("native", 2.0, True), ExactKernel("b", 3.0, False)
    assert floor_kernel([quick, native, slow, ExactKernel("c", 4.0, False)]) == "b"
    assert floor_kernel([quick, native]) is None


def test_kernels_that_are_wrong_or_fail_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Layer.dense

    def dense(layer: Layer, call: AttentionCall) -> Tensor:
        if layer.kernel == "_native_flash":
            raise AssertionError("not on this device")
        return exact(layer, call) + (0.1 if layer.kernel == "_native_math" else 0.0)

    monkeypatch.setattr(Layer, "dense", dense)
    assert [kernel.name for kernel in compare_kernels(CPU, torch.float32, UNMASKED, LAYOUT)] == ["native"]


def test_a_kernel_that_takes_no_mask_is_no_baseline_of_a_model_that_passes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Layer.dense

    def dense(layer: Layer, call: AttentionCall) -> Tensor:
        if layer.kernel == "_native_math" and call.mask is not None:
            raise ValueError("attn_mask is not supported")
        return exact(layer, call)

    monkeypatch.setattr(Layer, "dense", dense)
    without, beside = (compare_kernels(CPU, torch.float32, spec, LAYOUT) for spec in (UNMASKED, MASKED))
    assert {"native", "_native_math"} <= {kernel.name for kernel in without}
    assert "_native_math" not in {kernel.name for kernel in beside} >= {"native"}


@pytest.mark.parametrize(("position", "hidden"), [("prefix", [3, 4]), ("suffix", [73, 74])])
def test_the_mask_hides_the_second_half_of_the_text(
    monkeypatch: pytest.MonkeyPatch, position: TextPosition, hidden: list[int]
) -> None:
    masks: list[Tensor | None] = []
    exact = Layer.dense

    def dense(layer: Layer, call: AttentionCall) -> Tensor:
        masks.append(call.mask)
        return exact(layer, call)

    monkeypatch.setattr(Layer, "dense", dense)
    compare_kernels(CPU, torch.float32, MASKED, TokenLayout((2, 5, 7), 5, position))
    assert masks
    for mask in masks:
        assert mask is not None and mask.shape == (1, 1, 1, 75) and mask.dtype == torch.bool
        assert (~mask).flatten().nonzero().flatten().tolist() == hidden


@torch.no_grad()
@pytest.mark.parametrize(
    "model",
    ["wan2.1-1.3b", "hunyuanvideo", "flux.1-dev", "sd3.5-medium", "pixart-sigma-1k", "dit-xl-2-512", "pixel-dit-s"],
)
def test_a_family_says_whether_its_calls_have_a_mask(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    spec, masked = small(model), set()
    exact = Layer.dense

    def dense(layer: Layer, call: AttentionCall) -> Tensor:
        masked.add(call.mask is not None)
        return exact(layer, call)

    monkeypatch.setattr(Layer, "dense", dense)
    denoiser = random_denoiser(spec, CPU, torch.float32)
    with apply(denoiser, "dense"):
        denoiser(**random_call(spec, spec.layout(), CPU, torch.float32))
    assert masked == {family_named(spec.family).masks_text}


def test_every_family_is_found_by_its_name() -> None:
    assert [family_named(family.name) for family in FAMILIES] == [*FAMILIES]


def test_a_kernel_that_keeps_every_score_is_not_tried_where_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_MOST_SCORES", 3 * LAYOUT.num_tokens**2 - 1)
    found = compare_kernels(CPU, torch.float32, UNMASKED, LAYOUT)
    assert found and all(kernel.name != "_native_math" for kernel in found)
