"""Time: of a callable, and of the denoising steps of a running pipeline."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
    synchronize(device)
    warmup_seconds = sum(_time(fn, device) for _ in range(warmup))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = tuple(_time(fn, device) for _ in range(runs))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timing(statistics.median(seconds), interquartile_range(seconds), seconds, warmup_seconds, peak)


def measure_in_turns(
    fns: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    turn_seconds: float = 0.0,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    on_turn: Callable[[str, float, float], None] = lambda name, begin, end: None,
) -> dict[str, Timing]:
    """Times several callables against each other: A B C, C B A, ..., so that a drifting clock meets all of them.

    The order turns around each round: a GPU at its power limit carries one kernel's heat into the next one's turn.

    On a GPU the L2 cache is overwritten before each turn, and meanwhile the host queues the calls: what is timed is the
    device. Each callable runs before (compilation, tuning).

    Args:
        fns: what to time, by name.
        rounds: turns of each callable; a turn's seconds are the mean of its calls. Default 5.
        turn_seconds: a turn is as many calls in a row as last this long, at least one. Default one call.
        warmup: untimed runs of each before, of which the last one tells a call's seconds and memory. Default 2; with 0,
            for what is warm already, turns are single calls and no peak memory is told.
        device: where the work happens.
        on_turn: is told each turn's name and its begin and end by ``time.time()``.

    Raises:
        ValueError: when ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    device = torch.device(device)
    scratch = torch.empty(1 << 28 if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    before, calls, peaks = dict.fromkeys(fns, 0.0), {}, {}
    for name, fn in fns.items():
        latest = math.inf
        for _ in range(warmup):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            latest = _time(fn, device)
            before[name] += latest
        calls[name] = max(1, math.ceil(turn_seconds / max(latest, 1e-6)))
        peaks[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" and warmup else None
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for number in range(rounds):
        turns = list(fns.items())
        for name, fn in turns if number % 2 == 0 else reversed(turns):
            begin = time.time()
            scratch.zero_()
            seconds[name].append(_time(fn, device, calls[name]))
            on_turn(name, begin, time.time())
    return {
        name: Timing(statistics.median(runs), interquartile_range(runs), tuple(runs), before[name], peaks[name])
        for name, runs in seconds.items()
    }


def synchronize(device: torch.device) -> None:
    """Waits until the work queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interquartile_range(seconds: Sequence[float]) -> float:
    """Seconds between the first and the third quartile; 0 for one run."""
    if len(seconds) == 1:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return third - first


def _time(fn: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one of ``calls`` in a row, from when the device is done with what was queued before."""
    before = mark(device)
    for _ in range(calls):
        fn()
    after = mark(device)
    synchronize(device)
    return seconds_between(before, after) / calls
