"""Sampling a batch of prompts with one method, for judging: nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.commands.models import Frames, Model, Request, call_arguments
from dit_accel.eval.discarded import DiscardedMass, gather
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.shapes.evaluate import decode_clips
from dit_accel.pipelines.shapes.scenes import CLIPS
from dit_accel.plugin import apply
from dit_accel.runtime import Discarded


@dataclass(frozen=True)
class Batch:
    """Clips sampled at once.

    Args:
        clips: uint8 [B, T, H, W, 3].
        executed: share of the query-key pairs computed by the sparse calls of the batch; 1.0 without any.
        density: that of all its calls.
        discarded: softmax mass left out in each clip; empty where it was not asked for or no call was sparse.
    """

    clips: Frames
    executed: float
    density: float
    discarded: Sequence[DiscardedMass]


def sample(
    model: Model, requests: Sequence[Request], method: AttnMethod, backend: Any, discarded: bool = False
) -> Batch:
    """One call of the stock pipeline for requests that differ in prompt and seed alone.

    Each clip starts from the noise of its own CPU seed, whatever the batch. Clips of embedded models are decoded
    whole, which equals the stock decoder up to rounding and is faster.

    Args:
        model: the pipeline.
        requests: of one size, step count and guidance.
        method: the processor.
        backend: of the operator.
        discarded: also measure the softmax mass left out. Default no.
    """
    whole_clips = model.embedded is not None and model.embedded.language is CLIPS
    arguments = call_arguments(model, *requests) | {"output_type": "latent" if whole_clips else "np"}
    model.pipe.set_progress_bar_config(disable=True)
    with apply(model.pipe, method, backend=backend) as handle:
        probing: AbstractContextManager[list[Discarded]] = (
            handle.probing() if discarded and not method.whole_modules else nullcontext([])
        )
        with probing as calls:
            output = model.pipe(**arguments)[0]
        tally = handle.tally
    clips = decode_clips(model.pipe, output) if whole_clips else np.asarray(output, dtype=np.float32)
    if clips.ndim == 4:  # images
        clips = clips[:, None]
    masses = gather(calls, blocks=model.spec.num_blocks, steps=requests[0].steps, batch=len(requests))
    return Batch((clips * 255).round().astype(np.uint8), tally.sparse_density, tally.density, masses)
