"""What both training stages share: several GPUs by plain gradient averaging, the optimiser with its EMA, the clock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """The processes of this run, one per GPU, or one alone."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def from_environment() -> Workers:
        """Reads torchrun's variables and joins its process group."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        return Workers(rank, world, device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average_(self, tensor: Tensor) -> Tensor:
        """The mean over all workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def share_(self, tensors: Iterable[Tensor]) -> None:
        """Copies the first worker's tensors to all, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def seed(self, offset: int) -> int:
        """A seed of this worker's own."""
        return 1000 * offset + self.rank

    def leave(self) -> None:
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


class Optimiser:
    """AdamW on averaged, clipped gradients, with an exponential moving average of the parameters.

    All gradients live in one buffer, so that averaging and clipping are one call each; a step whose gradient is not
    finite is taken with a zero gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        workers: Workers,
        betas: tuple[float, float],
        ema_decay: float,
    ) -> None:
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self._workers, self._ema_decay = workers, ema_decay
        self._adamw = torch.optim.AdamW(
            [{"rate": 1.0, **group} for group in groups], betas=betas, fused=workers.device.type == "cuda"
        )
        self._gradients = torch.zeros(sum(p.numel() for p in self.parameters), device=workers.device)
        offset = 0
        for parameter in self.parameters:
            parameter.grad = self._gradients.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    def zero_gradients(self) -> None:
        self._gradients.zero_()

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """One update; returns the norm of the averaged gradient before clipping to 1, on the device."""
        gradients = self._workers.average_(self._gradients)
        norm: Tensor = gradients.norm()
        torch.nan_to_num_(gradients, nan=0.0, posinf=0.0, neginf=0.0)
        gradients *= torch.where(norm.isfinite(), (1 / norm).clamp(max=1), 0)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["rate"]
        self._adamw.step()
        self.steps += 1
        decay = min(self._ema_decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        return norm

    @torch.no_grad()
    def use_ema(self) -> None:
        """Replaces the parameters by their average."""
        torch._foreach_copy_(self.parameters, self.ema)

    def state_dict(self) -> dict[str, Any]:
        parameters = [parameter.detach() for parameter in self.parameters]
        return {"adamw": self._adamw.state_dict(), "parameters": parameters, "ema": self.ema, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adamw.load_state_dict(state["adamw"])
        torch._foreach_copy_(self.parameters, state["parameters"])
        torch._foreach_copy_(self.ema, state["ema"])
        self.steps = state["steps"]


class Clock:
    """A stage's wall-clock budget, as the first worker counts it, within the time this process may take."""

    def __init__(self, budget: float, spent: float, session_end: float, workers: Workers) -> None:
        self._workers, self._budget, self._session_end = workers, budget, session_end
        self._start = time.time() - spent
        self.share, self.stop = 0.0, False

    @property
    def spent(self) -> float:
        return time.time() - self._start

    def look(self) -> None:
        """Waits for the device and sets ``share`` of the budget spent and ``stop``, the same for all workers."""
        if self._workers.device.type == "cuda":
            torch.cuda.synchronize()
        values = torch.tensor([self.spent / self._budget, float(time.time() > self._session_end)], dtype=torch.float64)
        values = values.to(self._workers.device)
        self._workers.share_([values])
        share, out_of_session = values.tolist()
        self.share, self.stop = share, share >= 1 or out_of_session > 0


class Journal:
    """One JSON object a line, to a file and to the screen, from the first worker only."""

    def __init__(self, path: Path, workers: Workers) -> None:
        self._path, self._workers, self._start = path, workers, time.time()

    def write(self, stage: str, **values: Any) -> None:
        if not self._workers.first:
            return
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps({"stage": stage, "at": round(time.time() - self._start, 1), **rounded})
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")
