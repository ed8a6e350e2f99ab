"""How far a run's latents stray from those of the dense run, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np

from dit_accel.eval.quality.metrics import Score

Latents = np.ndarray[Any, np.dtype[np.float32]]  # [steps, ...], after each denoising step


def trajectory(latents: Latents, reference: Latents) -> Score:
    """||latents - reference|| / ||reference|| after each step; the value is that after the last one."""
    if latents.shape != reference.shape:
        shapes = f"{list(latents.shape)} and {list(reference.shape)}"
        return Score(None, skipped=f"trajectory needs as many steps and latents as the dense run, got {shapes}.")
    axes = tuple(range(1, latents.ndim))
    errors = np.sqrt(np.square(latents - reference, dtype=np.float64).sum(axes))
    norms = np.sqrt(np.square(reference, dtype=np.float64).sum(axes))
    values = tuple((errors / norms).tolist())
    return Score(values[-1], values)
