"""Dense attention by every exact kernel at hand: what a method has to beat, and how far exact results differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.eval.speed import measure
from dit_accel.interception import AttentionCall, Layer, dense_kernel
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.families import family_named
from dit_accel.pipelines.specs import ModelSpec

KERNELS = (
    "native",
    "_native_cudnn",
    "_native_flash",
    "_native_efficient",
    "_native_math",
    "flash",
    "_flash_3",
    "fa4",
    "xformers",
)
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of ||got - native|| / ||native||
_ONCE_FROM = 0.1  # seconds of a call that is timed once, others five times
_MOST_SCORES = 2**30  # of all heads: _native_math keeps them all, and is no rival where they are more


class ExactKernel(NamedTuple):
    """One kernel that computes dense attention here.

    Args:
        name: as ``dense(kernel=...)`` takes it.
        seconds: of one call.
        is_native: whether its output is bit-identical to that of "native", which therefore is the same kernel.
    """

    name: str
    seconds: float
    is_native: bool


def compare_kernels(
    device: torch.device, dtype: torch.dtype, spec: ModelSpec, layout: TokenLayout
) -> list[ExactKernel]:
    """Kernels that run an attention call of the model at batch 1 and agree with "native", fastest first.

    The call has a mask where the model's have one: a kernel that takes none is no baseline of it.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, layout.num_tokens, spec.heads, spec.head_dim)
    q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype).unbind()
    attention = AttentionCall(q, k, v, _text_mask(layout, device) if family_named(spec.family).masks_text else None)
    native = _call("native", attention)()
    found = []
    for name in KERNELS:
        if name == "_native_math" and spec.heads * layout.num_tokens**2 > _MOST_SCORES:
            continue
        try:
            call = _call(name, attention)
            out = call()
        except Exception:  # not installed, or not for this device, dtype or size: every package says so in its own way
            continue
        if _error(out, native) <= _TOLERANCES[dtype]:
            found.append(ExactKernel(name, _seconds(call, device), torch.equal(out, native)))
    return sorted(found, key=lambda kernel: kernel.seconds)


def floor_kernel(kernels: Sequence[ExactKernel]) -> str | None:
    """The fastest kernel that rounds in another way than "native"; None where there is none."""
    return next((kernel.name for kernel in kernels if not kernel.is_native), None)


def _text_mask(layout: TokenLayout, device: torch.device) -> Tensor:
    """bool [1, 1, 1, L]: the second half of the text is padding."""
    end = layout.prefix or layout.num_tokens
    shown = torch.ones(1, 1, 1, layout.num_tokens, dtype=torch.bool, device=device)
    shown[..., end - layout.text_tokens // 2 : end] = False
    return shown


def _call(name: str, attention: AttentionCall) -> Callable[[], Tensor]:
    """The call that ``dense(kernel=name)`` makes of a layer's."""

    def attend(layer: Layer, call: AttentionCall) -> Tensor:
        return layer.dense(call)

    layer = Layer(0, attend, None, kernel=dense_kernel(name))
    return torch.no_grad()(lambda: layer.dense(attention))


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of a call that has been made before."""
    once = measure(call, warmup=0, runs=1, device=device).median
    return once if once >= _ONCE_FROM else measure(call, warmup=1, runs=5, device=device).median


def _error(out: Tensor, native: Tensor) -> float:
    return float((out.double() - native.double()).norm() / native.double().norm())
