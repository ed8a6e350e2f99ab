"""Sampling a batch of prompts with one method, for judging: nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.commands.arguments import method_call
from dit_accel.commands.models import Frames, Model, OnStep, Request, call_arguments, step_end
from dit_accel.eval.frames import as_uint8
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.shapes.evaluate import decode_clips
from dit_accel.pipelines.shapes.scenes import CLIPS
from dit_accel.plugin import apply


@dataclass(frozen=True)
class Batch:
    """Clips sampled at once.

    Args:
        clips: uint8 [B, T, H, W, 3].
        executed: share of the query-key pairs computed by the sparse calls of the batch; 1.0 without any.
        density: that of all its calls.
    """

    clips: Frames
    executed: float
    density: float


def sample(
    model: Model, requests: Sequence[Request], method: AttnMethod, backend: Any, on_step: OnStep | None = None
) -> Batch:
    """One call of the stock pipeline for requests that differ in prompt and seed alone.

    Each clip starts from the noise of its own CPU seed, whatever the batch. Clips of embedded models are decoded
    whole, which equals the stock decoder up to rounding and is faster.

    Args:
        model: the pipeline.
        requests: of one size, step count and guidance.
        method: the processor.
        backend: of the operator.
        on_step: called at the end of each step; what it raises ends the run.

    Raises:
        ValueError: frames with NaN, or outside [0, 1].
    """
    whole_clips = model.embedded is not None and model.embedded.language is CLIPS
    arguments = call_arguments(model, *requests) | step_end(None, on_step)
    arguments["output_type"] = "latent" if whole_clips else "np"
    model.pipe.set_progress_bar_config(disable=True)
    with apply(model.pipe, method, backend=backend) as handle:
        output = model.pipe(**arguments)[0]
        tally = handle.tally
    clips = decode_clips(model.pipe, output) if whole_clips else np.asarray(output, dtype=np.float32)
    if clips.ndim == 4:  # images
        clips = clips[:, None]
    frames = np.stack([as_uint8(clip, f"the output of {method_call(method)}") for clip in clips])
    return Batch(frames, tally.sparse_density, tally.density)
