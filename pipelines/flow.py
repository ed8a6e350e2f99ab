"""Flow matching: how much noise a sample gets in training and at each step of sampling, and batches to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

_UNIFORM_SHARE = 0.1

Times = TypeVar("Times", Tensor, np.ndarray)


def shift_times(times: Times, shift: float) -> Times:
    """Times in [0, 1] moved towards noise: ``s t / (1 + (s - 1) t)``, which leaves 0 and 1 where they are."""
    return shift * times / (1 + (shift - 1) * times)


def noise_times(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Shares of noise [B] to train on: a tenth uniform, the rest logit-normal, all shifted.

    Args:
        batch: B.
        shift: 1 leaves them; larger samples, whose neighbours tell much of each other, need more.
        generator: on the device that the times are for.
    """

    def uniform() -> Tensor:
        return torch.rand(batch, device=generator.device, generator=generator)

    times = torch.randn(batch, device=generator.device, generator=generator).sigmoid()
    return shift_times(torch.where(uniform() < _UNIFORM_SHARE, uniform(), times), shift)


@dataclass(frozen=True)
class FlowBatch:
    """Samples with their noise, and what the denoiser is told besides.

    Args:
        clean: samples [B, ...].
        noise: of the same shape.
        times: share of the noise [B].
        conditions: the denoiser's further arguments by name.
        last_time: the denoiser's timestep at pure noise. Default 1000.
    """

    clean: Tensor
    noise: Tensor
    times: Tensor
    conditions: dict[str, Tensor]
    last_time: float = 1000.0

    @property
    def velocity(self) -> Tensor:
        """What a denoiser should predict."""
        return self.noise - self.clean

    def predicted_by(self, denoiser: nn.Module) -> Tensor:
        """The denoiser's velocity at the noisy samples, float32."""
        share = self.times.view(-1, *[1] * (self.clean.ndim - 1))
        arguments: dict[str, Any] = {"timestep": self.times * self.last_time, **self.conditions, "return_dict": False}
        velocity: Tensor = denoiser(hidden_states=torch.lerp(self.clean, self.noise, share), **arguments)[0]
        return velocity.float()


def flow_batch(
    clean: Tensor,
    shift: float,
    generator: torch.Generator,
    conditions: dict[str, Tensor],
    last_time: float = 1000.0,
) -> FlowBatch:
    """Samples with noise and times drawn for them."""
    times = noise_times(len(clean), shift, generator)
    noise = torch.randn(clean.shape, device=clean.device, generator=generator)
    return FlowBatch(clean, noise, times, conditions, last_time)
