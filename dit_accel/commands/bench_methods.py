"""What `dit-accel bench methods` measures: methods on shapes of their papers and of the models they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.eval.bench.calls import AttendTensors, CallCase
from dit_accel.layout import TokenLayout
from dit_accel.methods import make_method
from dit_accel.methods.attention import AttnCall, BoundAttention, PlannedAttention, SelectedAttention
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.correction import CorrectedAttention

_WAN = TokenLayout((21, 45, 80))
_CLIP = TokenLayout((30, 48, 80))
_FLUX = TokenLayout((1, 256, 256), 512, "prefix")
_FLUX_8K = TokenLayout((1, 512, 512), 512, "prefix")
_HUNYUAN = TokenLayout((32, 48, 80), 256, "suffix")  # 128 frames cut off one latent frame
_SHAPES = TokenLayout((7, 24, 32))
_LARGEST = 300_000  # tokens; beyond it another backend and dense attention would take longer than all the rest


@dataclass(frozen=True)
class Setting:
    """A method on a layout; with a ``group``, one point of its curve."""

    label: str
    method: str
    layout: TokenLayout
    heads: int
    head_dim: int
    options: dict[str, Any]
    batch: int = 1
    group: str = ""
    training: bool = False

    @property
    def name(self) -> str:
        shape = f"{self.batch} x {self.layout.num_tokens:,} tokens, {self.heads} heads, D={self.head_dim}"
        return f"{self.label}, {shape}" + (", training" if self.training else "")

    @property
    def operator(self) -> str:
        return _described(make_method(self.method, **self.options))

    def case(self, device: torch.device) -> CallCase:
        method = make_method(self.method, **self.options)
        bound = method.attention(self.layout, device)
        assert bound is not None, "every method here is sparse on its layout"
        tokens = self.layout.num_tokens
        return CallCase(
            name=self.name,
            operator=self.operator,
            batch=self.batch,
            tokens=tokens,
            heads=self.heads,
            head_dim=self.head_dim,
            attend=_attend(bound, "auto"),
            check=_attend(bound, _other_backend(bound, device)) if tokens <= _LARGEST else None,
            density=bound.density,
            group=self.group,
            training=self.training,
            against_dense=tokens <= _LARGEST,
        )


def _attend(bound: BoundAttention, backend: Any) -> AttendTensors:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bound.attend(AttnCall(q, k, v, backend=backend)).out

    return attend


def _other_backend(bound: BoundAttention, device: torch.device) -> str:
    """One that auto does not choose; on a GPU the portable kernel for tiles, gathering for lists of small blocks."""
    if device.type == "cpu":
        return "reference"
    return "triton" if isinstance(bound, PlannedAttention | SelectedAttention | CorrectedAttention) else "torch"


def _described(method: AttnMethod) -> str:
    inner = ", ".join(f"{name}={value}" for name, value in method.options().items())
    return f"{method.name}({inner})" if inner else method.name


_PUBLISHED = {"top_k": 8, "exclude_covered": False}
_IMAGES = {side: TokenLayout((1, side, side)) for side in (64, 128, 256, 512, 1024)}

GPU_SETTINGS: tuple[Setting, ...] = (
    Setting("LLSA", "log_linear", _IMAGES[256], 4, 64, {**_PUBLISHED, "levels": 2}, batch=2),
    Setting("LLSA", "log_linear", _IMAGES[256], 4, 64, {"top_k": 8, "levels": 2}, batch=2),
    Setting("DiT-S", "log_linear", _IMAGES[256], 6, 64, _PUBLISHED, training=True),
    *(
        Setting("growth", "log_linear", layout, 4, 64, _PUBLISHED, group="log-linear, 4 heads, D=64")
        for layout in _IMAGES.values()
    ),
    Setting("Wan 720p", "draft", _WAN, 40, 128, {"keep": 0.25}),
    Setting("Wan 720p", "draft", _WAN, 40, 128, {"keep": 0.1}),
    Setting("Wan 720p", "draft", _WAN, 40, 128, {"keep": 0.25, "delta": "add"}),
    Setting("Wan 720p", "log_linear", _WAN, 40, 128, {"top_k": 16}),
    Setting("Wan 720p", "pyramid", _WAN, 40, 128, {"density": 0.15}),
    Setting("HunyuanVideo clip", "sliding_tile", _CLIP, 24, 128, {"window": (3, 3, 3)}),
    Setting("NATTEN Flux 4K", "neighborhood", _IMAGES[256], 24, 128, {"window": (1, 80, 80)}),
    Setting("Flux 4K", "clear", _FLUX, 24, 128, {"radius": 16}),
    *(
        Setting(label, "grat", layout, 24, 128, {"pattern": pattern})
        for label, layout in (("Flux 8K", _FLUX_8K), ("HunyuanVideo 128 frames", _HUNYUAN))
        for pattern in ("B", "X")
    ),
    Setting("Wan 720p", "attention_tile", _WAN, 40, 128, {"reference_frames": 3}),
)
CPU_SETTINGS: tuple[Setting, ...] = tuple(
    Setting("shapes", method, _SHAPES, 4, 64, options)
    for method, options in (
        ("draft", {"density": 0.3}),
        ("log_linear", {"density": 0.12}),
        ("pyramid", {"density": 0.3}),
    )
)


def settings(device: torch.device) -> tuple[Setting, ...]:
    """What fits the device."""
    return GPU_SETTINGS if device.type == "cuda" else CPU_SETTINGS
