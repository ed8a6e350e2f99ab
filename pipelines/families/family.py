"""What a model family is, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dit_accel.state import CallTokens


@dataclass(frozen=True)
class Family:
    """Denoisers whose attention is entered in the same way.

    Args:
        name: the family's name.
        models: class names of its denoisers.
        targets: regular expressions over whole module names, the self- or joint-attention modules, in the order in
            which blocks are counted; never cross-attention, text refiners or audio.
        read: the tokens of one call, from its arguments by name and the model's config.
        shape: the fields of ``ModelSpec`` that a denoiser's config tells.
        guidance: conditional and unconditional branch in "separate" calls, "batched" in one, or "none".
        cond_half: which half of a batched call is the conditional one. Default "second".
        visual_targets: like ``targets``, modules that see the grid alone though the others see text too; counted last.
        timestep_scale: the scheduler's timesteps in units of the denoiser's. Default 1.
        masks_text: whether its calls hide the text's padding by a mask over keys. Default False.
    """

    name: str
    models: tuple[str, ...]
    targets: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Any], CallTokens]
    shape: Callable[[Any], dict[str, Any]]
    guidance: Literal["separate", "batched", "none"]
    cond_half: Literal["first", "second"] = "second"
    visual_targets: tuple[str, ...] = ()
    timestep_scale: float = 1.0
    masks_text: bool = False
