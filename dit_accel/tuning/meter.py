"""Running assignments on the calibration prompts, beside dense attention."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace

import torch

from dit_accel.eval.quality import measure
from dit_accel.methods import make_method
from dit_accel.methods.actions import Assignment
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.tuning.budget import Measured
from dit_accel.tuning.runner import Runner, Sample


@dataclass(frozen=True)
class Predicted:
    """What a choice was expected to give.

    Args:
        seconds: of the denoising loop.
        error: at the end: the mean squared error of frames, or the squared relative error of latents; None where
            nothing was predicted.
    """

    seconds: float
    error: float | None

    def quality(self, frames: bool) -> float | None:
        """PSNR of frames in [0, 1], in dB, or the relative error of latents."""
        if self.error is None:
            return None
        if not frames:
            return math.sqrt(self.error)
        return -10 * math.log10(self.error) if self.error > 0 else math.inf


@dataclass(frozen=True, eq=False)
class Point:
    """An assignment that was tried.

    Args:
        assignment: the actions.
        measured: what it gave.
        predicted: what it was expected to; None where nothing was.
        multiplier: seconds that a unit of error had to save for it; None likewise.
    """

    assignment: Assignment
    measured: Measured
    predicted: Predicted | None = None
    multiplier: float | None = None


class Meter:
    """The dense runs of all prompts, which others are held against.

    Args:
        runner: the pipeline.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, self._walls = runner, list[float]()
        self.dense = self._dense_runs()

    def time_again(self) -> None:
        """Runs dense attention once more and keeps the faster runs: a first one may pay for what others do not."""
        self.dense = [
            min(pair, key=lambda run: run.denoise) for pair in zip(self.dense, self._dense_runs(), strict=True)
        ]

    @property
    def dense_seconds(self) -> float:
        """Of the denoising loop, the mean over prompts."""
        return statistics.fmean(sample.denoise for sample in self.dense)

    @property
    def run_seconds(self) -> float:
        """What one run takes at most, by the clock on the wall."""
        return max(self._walls)

    def time_for(self, runs: int) -> bool:
        """Whether so many runs end before the deadline."""
        return self._runner.time_for(runs * self.run_seconds)

    def end_error(self, assignment: Assignment) -> float:
        """How far the first prompt ends from dense attention, as ``Predicted.error`` counts it."""
        return self._error(0, self._run(0, self._method(assignment)))

    def point(
        self, assignment: Assignment, predicted: Predicted | None = None, multiplier: float | None = None
    ) -> Point:
        """Runs an assignment on every prompt."""
        samples = [self._run(number, self._method(assignment)) for number in range(self._runner.prompts)]
        seconds = statistics.fmean(sample.denoise for sample in samples)
        measured = Measured(
            seconds=seconds,
            speedup=self.dense_seconds / seconds,
            relative_error=max(self._relative(number, sample) for number, sample in enumerate(samples)),
            psnr=self._psnr(samples) if self._runner.frames else None,
            density=statistics.fmean(sample.density for sample in samples),
        )
        return Point(assignment, measured, predicted, multiplier)

    def timed_again(self, point: Point) -> Point:
        """The point after another run on every prompt, with the lesser time, as that of dense attention is."""
        measured, again = point.measured, self.point(point.assignment).measured
        seconds = min(measured.seconds, again.seconds)
        return replace(point, measured=replace(measured, seconds=seconds, speedup=self.dense_seconds / seconds))

    def _method(self, assignment: Assignment) -> AttnMethod:
        return DiTFastAttnProcessor(assignment=assignment, keep=self._runner.keep)

    def _dense_runs(self) -> list[Sample]:
        return [self._run(number, make_method("dense")) for number in range(self._runner.prompts)]

    def _run(self, number: int, method: AttnMethod) -> Sample:
        begin = time.monotonic()
        sample = self._runner.generate(number, method)
        self._walls.append(time.monotonic() - begin)
        return sample

    def _relative(self, number: int, sample: Sample) -> float:
        dense = self.dense[number].output
        return float((sample.output - dense).norm() / dense.norm().clamp(min=torch.finfo(torch.float32).tiny))

    def _psnr(self, samples: list[Sample]) -> float:
        return statistics.fmean(
            measure(sample.output, self.dense[number].output, ["psnr"])["psnr"].value or 0.0
            for number, sample in enumerate(samples)
        )

    def _error(self, number: int, sample: Sample) -> float:
        if self._runner.frames:
            return float((sample.output - self.dense[number].output).square().mean())
        return self._relative(number, sample) ** 2
