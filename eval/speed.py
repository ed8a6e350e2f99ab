"""Time: of a callable, and of the denoising steps of a running pipeline."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dit_accel.marks import Mark, mark, seconds_between


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs.

    Args:
        median: seconds of the middle run.
        iqr: seconds between the first and third quartile; 0 for one run.
        runs: seconds of each timed run, in order.
        warmup_seconds: seconds of the runs before them (compilation, tuning, plan building), kept apart.
        peak_memory: most bytes that torch had allocated on the GPU during the timed runs; None on the CPU.
    """

    median: float
    iqr: float
    runs: tuple[float, ...]
    warmup_seconds: float
    peak_memory: int | None


class StepClock:
    """Seconds of each denoising step; one clock per run.

    A step ends when the pipeline calls ``callback_on_step_end``. The first one starts at ``start()``, which can also
    serve as a forward pre-hook of the denoiser, so that text encoding is left out:

        clock = StepClock(pipe.device)
        hook = pipe.transformer.register_forward_pre_hook(clock.start)
        pipe(prompt, callback_on_step_end=clock)
        hook.remove()
        clock.denoise_seconds

    Args:
        device: where the steps run. On a GPU, events are recorded and read only at the end: no step is held up.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._marks: list[Mark] = []

    def start(self, *_: object) -> None:
        """Marks the start of the first step; later calls do nothing."""
        if not self._marks:
            self._marks.append(mark(self._device))

    def __call__(self, pipe: object, step: int, timestep: object, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Marks the end of a step; the signature of diffusers' ``callback_on_step_end``.

        Raises:
            RuntimeError: when ``start`` was not called before.
        """
        if not self._marks:
            raise RuntimeError(f"StepClock was called at the end of step {step} before start(); call start() first.")
        self._marks.append(mark(self._device))
        return kwargs

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Seconds of each step so far, in order."""
        synchronize(self._device)
        return tuple(seconds_between(before, after) for before, after in pairwise(self._marks))

    @property
    def denoise_seconds(self) -> float:
        """Seconds from the start of the first step to the end of the last one."""
        return sum(self.step_seconds)


def measure(fn: Callable[[], object], warmup: int = 1, runs: int = 5, device: torch.device | str = "cpu") -> Timing:
    """Runs ``fn`` and times it: CUDA events on a GPU, ``time.perf_counter`` on the CPU.

    Args:
        fn: what to time. To check the output of the timed runs, let it store its output.
        warmup: untimed runs before. Default 1.
        runs: timed runs. Default 5.
        device: where the work happens.

    Raises:
        ValueError: when ``runs`` is less than 1 or ``warmup`` is negative.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"runs must be at least 1 and warmup at least 0, got {runs} and {warmup}.")
    device = torch.device(device)
    warmup_seconds = sum(_time(fn, device) for _ in range(warmup))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = tuple(_time(fn, device) for _ in range(runs))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timing(statistics.median(seconds), _iqr(seconds), seconds, warmup_seconds, peak)


def synchronize(device: torch.device) -> None:
    """Waits until the work queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(fn: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    before = mark(device)
    fn()
    after = mark(device)
    synchronize(device)
    return seconds_between(before, after)


def _iqr(seconds: tuple[float, ...]) -> float:
    if len(seconds) == 1:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return third - first
