"""What a search is given: a model at a size, and a way to run it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.methods.attention import AttnCall, torch_dense
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.kept import Keep


@dataclass(frozen=True)
class Facts:
    """A model at one size, as its attention layers see it.

    Args:
        layout: the sequence of one call.
        blocks: attention layers that a method can replace.
        visual_blocks: how many of them, the last ones, see the grid without the text.
        heads, head_dim: of each.
        steps: denoising steps of a run.
        calls: attention calls of one layer at one step: 2 where guidance makes two forwards.
        batch: items of one call: 2 where guidance makes one forward of both branches.
        guided: whether each step computes a conditional and an unconditional branch.
        device, dtype: of the calls.
        backend: of the operator.
    """

    layout: TokenLayout
    blocks: int
    heads: int
    head_dim: int
    steps: int
    visual_blocks: int = 0
    calls: int = 1
    batch: int = 1
    guided: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    dtype: torch.dtype = torch.float32
    backend: Backend = "auto"

    def layout_of(self, block: int) -> TokenLayout:
        """The sequence that a block sees."""
        return self.layout if block < self.blocks - self.visual_blocks else self.layout.without_text()


@dataclass(frozen=True, eq=False)
class Sample:
    """One finished run.

    Args:
        output: frames in [0, 1] or final latents, float32 on the CPU, the first axis of one item.
        denoise: seconds of the denoising loop.
        attention: seconds within, in the attention layers.
        density: share of the query-key pairs computed.
    """

    output: Tensor
    denoise: float
    attention: float
    density: float


@dataclass(frozen=True)
class Runner:
    """A loaded pipeline at one size with its calibration prompts.

    Args:
        facts: the model at this size.
        generate: number of a prompt, method -> the run; the same noise every time.
        prompts: how many there are.
        frames: runs end at frames in [0, 1], else at latents.
        dense: full attention by the pipeline's own backend. Default torch's.
        keep: where plans keep tensors from step to step.
        deadline: by ``time.monotonic()``; a search begins no run that would end later.
        report: what a search says while it works.
        pipe: the pipeline, for searches that try every step as a run comes to it.
        together: generates all prompts by one call of it.
    """

    facts: Facts
    generate: Callable[[int, AttnMethod], Sample]
    prompts: int = 1
    frames: bool = True
    dense: Callable[[AttnCall], Tensor] = torch_dense
    keep: Keep = "device"
    deadline: float = float("inf")
    report: Callable[[str], None] = print
    pipe: Any = None
    together: Callable[[], object] = lambda: None

    def time_for(self, seconds: float) -> bool:
        """Whether so much work still ends before the deadline."""
        return time.monotonic() + seconds <= self.deadline
