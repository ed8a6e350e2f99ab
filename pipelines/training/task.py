"""What a training task is, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.pipelines.flow import FlowBatch
from dit_accel.pipelines.specs import ModelSpec


@dataclass(frozen=True)
class Feed:
    """What one process of a run asks its task for.

    Args:
        size: (frames, height, width) of the samples in pixels.
        batch: samples of a forward.
        seed: of the run.
        device: of the batches.
        process, processes: which one, of how many.
    """

    size: tuple[int, int, int]
    batch: int
    seed: int
    device: torch.device
    process: int
    processes: int


# Batch n of a run, counted over its processes: process p of P draws n = p, p + P, p + 2 P, ...
Draw = Callable[[int], FlowBatch]


@dataclass(frozen=True)
class Task:
    """Something to train a denoiser on.

    Args:
        spec: its default size, the sizes that can be made, and their tokens.
        fresh: whether training without a pretrained pipeline starts from random weights.
        build: a pipeline, float32 on the CPU, from a folder or the task's own start; its ``transformer`` is trained.
        feed: batches for a pipeline that lies on the feed's device.
    """

    spec: ModelSpec
    fresh: bool
    build: Callable[[Path | None], Any]
    feed: Callable[[Any, Feed], Draw]
