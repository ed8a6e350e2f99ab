"""One form for all clips: float32 [T, H, W, 3] in [0, 1] for measuring, uint8 for showing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Frames = Tensor | np.ndarray[Any, Any]  # [T, H, W, 3], floating in [0, 1] or uint8; an image is a clip of one frame


def as_float(frames: Frames, name: str = "frames") -> Tensor:
    """The clip as a float32 tensor [T, H, W, 3] in [0, 1], on its device; ``name`` is what errors call it.

    Raises:
        ValueError: for another shape or dtype, an empty clip, NaN, or values outside [0, 1].
    """
    clip = torch.as_tensor(frames).detach()
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.numel() == 0:
        raise ValueError(f"{name} must have shape [frames, height, width, 3 channels], got {list(clip.shape)}.")
    if clip.dtype == torch.uint8:
        return clip.float() / 255
    if not clip.is_floating_point():
        raise ValueError(f"{name} must be floating in [0, 1] or uint8, got {clip.dtype}.")
    clip = clip.float()
    if bool(clip.isnan().any()):
        bad = int(clip.isnan().flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{name} must not contain NaN, but frame {bad} does.")
    low, high = clip.aminmax()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}.")
    return clip


def as_uint8(frames: Frames, name: str = "frames") -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The clip as a contiguous uint8 array [T, H, W, 3], rounded to nearest."""
    rounded = (as_float(frames, name) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded.cpu().numpy())


def as_pair(frames: Frames, reference: Frames) -> tuple[Tensor, Tensor]:
    """Both clips as float32 where ``frames`` is, refused unless they have one size: nothing is cut or scaled."""
    clip, target = as_float(frames, "frames"), as_float(reference, "reference")
    target = target.to(clip.device)
    if len(clip) != len(target):
        raise ValueError(f"frames and reference must have the same frame count, got {len(clip)} and {len(target)}.")
    if clip.shape != target.shape:
        (_, height, width, _), (_, target_height, target_width, _) = clip.shape, target.shape
        raise ValueError(
            "frames and reference must have the same size, "
            f"got {height}x{width} and {target_height}x{target_width} (height x width)."
        )
    return clip, target
