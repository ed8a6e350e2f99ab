"""Sparse attention for diffusers' image and video transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dit_accel.attach import attach

if TYPE_CHECKING:
    from dit_accel.explanation import Explanation, explain
    from dit_accel.methods import token_mask
    from dit_accel.methods.attention_tile import AttentionTileAttnProcessor
    from dit_accel.methods.band import BandAttnProcessor
    from dit_accel.methods.clear import CLEARAttnProcessor
    from dit_accel.methods.dense import DenseAttnProcessor
    from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
    from dit_accel.methods.draft import DraftAttnProcessor
    from dit_accel.methods.grat import GRATAttnProcessor
    from dit_accel.methods.log_linear import LogLinearAttnProcessor
    from dit_accel.methods.neighborhood import NeighborhoodAttnProcessor
    from dit_accel.methods.pyramid import PyramidAttnProcessor
    from dit_accel.methods.radial import RadialAttnProcessor
    from dit_accel.methods.sliding_tile import SlidingTileAttnProcessor
    from dit_accel.plugin import Handle, apply, restore
    from dit_accel.tuned_plan import TunedPlan

__version__ = "0.1.0"

# Loaded when first used, so that importing the package needs neither torch nor diffusers.
_LAZY = {
    "AttentionTileAttnProcessor": "dit_accel.methods.attention_tile",
    "BandAttnProcessor": "dit_accel.methods.band",
    "CLEARAttnProcessor": "dit_accel.methods.clear",
    "DenseAttnProcessor": "dit_accel.methods.dense",
    "DiTFastAttnProcessor": "dit_accel.methods.dit_fast_attn",
    "DraftAttnProcessor": "dit_accel.methods.draft",
    "Explanation": "dit_accel.explanation",
    "GRATAttnProcessor": "dit_accel.methods.grat",
    "Handle": "dit_accel.plugin",
    "LogLinearAttnProcessor": "dit_accel.methods.log_linear",
    "NeighborhoodAttnProcessor": "dit_accel.methods.neighborhood",
    "PyramidAttnProcessor": "dit_accel.methods.pyramid",
    "RadialAttnProcessor": "dit_accel.methods.radial",
    "SlidingTileAttnProcessor": "dit_accel.methods.sliding_tile",
    "TunedPlan": "dit_accel.tuned_plan",
    "apply": "dit_accel.plugin",
    "explain": "dit_accel.explanation",
    "restore": "dit_accel.plugin",
    "token_mask": "dit_accel.methods",
}

__all__ = [
    "AttentionTileAttnProcessor",
    "BandAttnProcessor",
    "CLEARAttnProcessor",
    "DenseAttnProcessor",
    "DiTFastAttnProcessor",
    "DraftAttnProcessor",
    "Explanation",
    "GRATAttnProcessor",
    "Handle",
    "LogLinearAttnProcessor",
    "NeighborhoodAttnProcessor",
    "PyramidAttnProcessor",
    "RadialAttnProcessor",
    "SlidingTileAttnProcessor",
    "TunedPlan",
    "apply",
    "explain",
    "restore",
    "token_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


attach()
