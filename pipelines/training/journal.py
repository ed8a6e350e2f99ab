"""The journal of a run: one JSON object a line, from the first process."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor


class Journal:
    """Losses and speed since the line before, averaged over the processes.

    Args:
        path: file that lines are added to.
        accelerator: of the run.
        samples: of one step, of all processes together.
        tokens: of one sample.
    """

    def __init__(self, path: Path, accelerator: Accelerator, samples: int, tokens: int) -> None:
        self._path, self._accelerator, self._samples, self._tokens = path, accelerator, samples, tokens
        self._start = self._last = time.perf_counter()
        self._pending: list[dict[str, Tensor]] = []

    @property
    def seconds(self) -> float:
        """Of this session, as this process counts them."""
        return time.perf_counter() - self._start

    def add(self, losses: dict[str, Tensor]) -> None:
        """One more step; nothing waits for the device."""
        self._pending.append(losses)

    def write(self, step: int, learning_rate: float) -> float:
        """Adds a line and returns the mean loss; every process calls this.

        Raises:
            ValueError: the loss is not finite.
        """
        names = list(self._pending[0])
        sums = torch.stack([torch.stack([losses[name] for name in names]) for losses in self._pending]).mean(0)
        means: list[float] = self._accelerator.reduce(sums, "mean").tolist()
        now = time.perf_counter()
        rate = len(self._pending) * self._samples / (now - self._last)
        self._last, self._pending = now, []
        found = dict(zip(names, means, strict=True))
        if not math.isfinite(found["loss"]):
            raise ValueError(f"the loss is {found['loss']} at step {step}; train with a lower --learning-rate.")
        if self._accelerator.is_main_process:
            line = {
                "step": step,
                "seconds": round(self.seconds, 2),
                **{name: round(value, 6) for name, value in found.items()},
                "learning_rate": learning_rate,
                "samples_per_second": round(rate, 3),
                "tokens_per_second": round(rate * self._tokens),
            }
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return found["loss"]
