"""The greedy search of DiTFastAttn: layer by layer, the first action that hardly changes what the denoiser says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.methods.actions import FULL, REUSE, Action
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.base import AttnMethod
from dit_accel.tuning.rehearsal import Decision, Searched, Step, search_steps

WINDOW = BandAttnProcessor()  # half-width 1/8 of the tokens


def relative(out: Tensor, full: Tensor) -> float:
    """Mean of |a - b| / (max(|a|, |b|) + 1e-6), cut off at 10, as the paper writes it."""
    return _mean_ratio(out, full, torch.maximum(out.abs(), full.abs()))


def relative_signed(out: Tensor, full: Tensor) -> float:
    """Mean of |a - b| / |max(a, b) + 1e-6|, cut off at 10, as the released code computes it."""
    return _mean_ratio(out, full, torch.maximum(out, full))


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {"relative": relative, "relative_signed": relative_signed}


def threshold(delta: float, block: int, num_blocks: int) -> float:
    """What a block may cost, counted from 0: delta * (block + 1) / num_blocks."""
    return delta * (block + 1) / num_blocks


def search(
    pipe: Any,
    run: Callable[[], Any],
    *,
    delta: float,
    metric: str = "relative",
    window: AttnMethod = WINDOW,
    max_age: int | None = None,
    backend: Backend = "auto",
) -> Searched:
    """Find the actions of each layer and step by the greedy search of DiTFastAttn (arXiv 2406.08552, algorithm 1).

    The first step is full attention. At every other one blocks are decided in order. Each takes the first of reuse
    (AST), window with residual shared across guidance (WA-RS + ASC), window with residual (WA-RS) and sharing (ASC)
    with which the denoiser's output at this step differs by less than its threshold from the output with all blocks in
    full, and full attention if none does. Blocks before it have what was decided for them, blocks after it are full.
    A step takes up to 4 * blocks + 1 forwards, of both branches where guidance calls the denoiser twice.

    Args:
        pipe: a pipeline without a method.
        run: generates the calibration prompts, a batch of them, by one call of the pipeline, with guidance.
        delta: threshold of the last block; the published ones are 0.025 to 0.15 by the released code's metric.
        metric: "relative" (default), the paper's, or "relative_signed", the released code's, whose values are about one
            and a half times as large.
        window: the method of WA-RS. Default: a band of half-width 1/8 of the tokens.
        max_age: steps that a kept output or residual may serve. Default None, as published: any number.
        backend: of the operator. Default "auto".

    Returns:
        One action per layer and step; the losses are those by the metric.

    Raises:
        ValueError: an unknown metric, a negative delta, a pipeline with a method, or anything but one run.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    if not delta >= 0:
        raise ValueError(f"delta must be at least 0, got {delta}.")
    loss_of = METRICS[metric]

    def decide(step: Step) -> Decision:
        row, losses = torch.zeros(step.num_blocks, 1, dtype=torch.int16), torch.zeros(step.num_blocks, 1)
        full, allowed = step.output(row), step.allowed()
        for block in range(step.num_blocks):
            for number in allowed[1:, block, 0].nonzero().flatten().tolist():
                trial = row.clone()
                trial[block] = 1 + number
                loss = loss_of(step.output(trial), full)
                if loss < threshold(delta, block, step.num_blocks):
                    row, losses[block] = trial, loss
                    break
        return Decision(row, losses)

    residual, shared = Action(window, residual=True), Action(window, residual=True, share=True)
    return search_steps(
        pipe, run, (FULL, REUSE, shared, residual, Action(share=True)), decide, max_age=max_age, backend=backend
    )


def _mean_ratio(out: Tensor, full: Tensor, size: Tensor) -> float:
    return float(((out - full) / (size + 1e-6)).abs().clamp(max=10).mean())
