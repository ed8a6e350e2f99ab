"""Model families: which denoisers are supported, and how each is read."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.pipelines.families.dit import DIT
from dit_accel.pipelines.families.family import Family
from dit_accel.pipelines.families.flux import FLUX
from dit_accel.pipelines.families.hunyuan_video import HUNYUAN_VIDEO
from dit_accel.pipelines.families.pixart import PIXART
from dit_accel.pipelines.families.pixel_dit import PIXEL_DIT
from dit_accel.pipelines.families.sd3 import SD3
from dit_accel.pipelines.families.wan import WAN

FAMILIES: tuple[Family, ...] = (WAN, HUNYUAN_VIDEO, FLUX, DIT, PIXART, SD3, PIXEL_DIT)

__all__ = ["FAMILIES", "Family", "denoisers_of", "family_named", "family_of"]


def family_of(model_class: type) -> Family | None:
    """The family of a denoiser's class or of a class it derives from; None if it is not supported."""
    names = {base.__name__ for base in model_class.__mro__}
    return next((family for family in FAMILIES if names.intersection(family.models)), None)


def family_named(name: str) -> Family:
    """The family of that name, as ``ModelSpec`` has it."""
    return next(family for family in FAMILIES if family.name == name)


def denoisers_of(pipe_or_model: Any) -> list[tuple[nn.Module, Family]]:
    """The denoisers of a pipeline, or the model itself, uncompiled, with their families.

    Raises:
        ValueError: none is supported.
    """
    is_model = isinstance(pipe_or_model, nn.Module)
    parts = [pipe_or_model] if is_model else getattr(pipe_or_model, "components", {}).values()
    models: list[nn.Module] = [getattr(part, "_orig_mod", part) for part in parts if isinstance(part, nn.Module)]
    found = [(model, family) for model in models if (family := family_of(type(model)))]
    if not found:
        supported = ", ".join(name for family in FAMILIES for name in family.models)
        raise ValueError(
            f"{type(pipe_or_model).__name__} has no supported denoiser; pass a pipeline with one of {supported}, "
            "or the model itself."
        )
    return found
