"""What a denoiser is doing right now: its token layout, denoising step and guidance branch."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_accel.layout import TokenLayout


@dataclass(frozen=True, eq=False)
class CallTokens:
    """What a model family reads from the arguments of one call of its denoiser.

    Args:
        layout: the sequence of the targeted attention calls; None where the tokens are no regular grid.
        batch: videos or images in the call.
        text_lengths: valid text tokens of each, int32 [batch]; None when the model masks no text.
        irregular: why ``layout`` is None, the rest of a sentence.
    """

    layout: TokenLayout | None
    batch: int
    text_lengths: Tensor | None = None
    irregular: str = ""


@dataclass(eq=False)
class DenoisingState:
    """The call that a denoiser is in; written before its forward, read by its attention layers.

    Args:
        layout: tokens of this call; None before the first call and for irregular tokens.
        step: denoising step, from 0, of ``num_steps``; 0 of 1 for a model without a pipeline.
        branch: guidance branch as the pipeline names it ("cond", "uncond"), "batched", or None.
        batch: videos or images in the call.
        text_lengths: valid text tokens, int32 [batch], or None.
    """

    layout: TokenLayout | None = None
    step: int = 0
    num_steps: int = 1
    branch: str | None = None
    batch: int = 1
    text_lengths: Tensor | None = None


class Schedule:
    """The denoising step, read at each call from the scheduler that the pipeline has then.

    Only a weak reference to the pipeline is kept. A copy of a model does not know its pipeline, nor does a bare model.
    """

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = weakref.ref(pipe) if hasattr(pipe, "scheduler") else lambda: None
        self._scheduler = getattr(pipe, "scheduler", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return Schedule()

    @property
    def known(self) -> bool:
        return self._scheduler is not None

    def position(self, timestep: Tensor, scale: float = 1.0) -> tuple[int, int]:
        """(step, number of steps), the step from 0; (0, 1) without a pipeline.

        Args:
            timestep: as the denoiser got it, any shape.
            scale: the scheduler's timesteps in its units. Default 1.
        """
        pipe = self._pipe()
        if pipe is not None:
            self._scheduler = pipe.scheduler
        if self._scheduler is None:
            return 0, 1
        return scheduler_position(self._scheduler, timestep, scale)


def scheduler_position(scheduler: Any, timestep: Tensor, scale: float = 1.0) -> tuple[int, int]:
    """Where a run is, as the scheduler counts: its index survives guidance calls, solver order and aborted runs.

    Before the first step the index is unset: then the one to begin with, if the pipeline chose one, else, as for
    schedulers that keep no index, the place of ``timestep`` in the list (a device sync).
    """
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        timesteps = scheduler.timesteps.float()
        index = (timesteps - timestep.max().to(timesteps) * scale).abs().argmin()
    num_steps = len(scheduler.timesteps)
    return min(int(index), num_steps - 1), num_steps


def bind_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a forward call by name."""
    return _signature(type(model).forward).bind(model, *args, **kwargs).arguments


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
