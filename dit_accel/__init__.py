"""Sparse attention for diffusers' image and video transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dit_accel.attach import attach

if TYPE_CHECKING:
    from dit_accel.explanation import Explanation, explain
    from dit_accel.methods import token_mask
    from dit_accel.methods.dense import DenseAttnProcessor
    from dit_accel.methods.grat import GRATAttnProcessor
    from dit_accel.methods.neighborhood import NeighborhoodAttnProcessor
    from dit_accel.methods.radial import RadialAttnProcessor
    from dit_accel.plugin import Handle, apply, restore

__version__ = "0.1.0"

# Loaded when first used, so that importing the package needs neither torch nor diffusers.
_LAZY = {
    "DenseAttnProcessor": "dit_accel.methods.dense",
    "Explanation": "dit_accel.explanation",
    "GRATAttnProcessor": "dit_accel.methods.grat",
    "Handle": "dit_accel.plugin",
    "NeighborhoodAttnProcessor": "dit_accel.methods.neighborhood",
    "RadialAttnProcessor": "dit_accel.methods.radial",
    "apply": "dit_accel.plugin",
    "explain": "dit_accel.explanation",
    "restore": "dit_accel.plugin",
    "token_mask": "dit_accel.methods",
}

__all__ = [
    "DenseAttnProcessor",
    "Explanation",
    "GRATAttnProcessor",
    "Handle",
    "NeighborhoodAttnProcessor",
    "RadialAttnProcessor",
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
