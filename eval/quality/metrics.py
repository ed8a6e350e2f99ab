"""Metrics as declarations: what each needs, which way is better, its unit, its formula."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel.eval.frames import Frames, as_float, as_pair
from dit_accel.eval.quality.ssim import ssim

Compute = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Score:
    """What a metric said about one clip.

    Args:
        value: the clip's score; ``math.inf`` for the PSNR of identical clips; None when skipped.
        values: the parts it was pooled from: one per frame, one per pair of successive frames (flicker), or one for
            the clip (prompt accuracy).
        skipped: why there is no value, else None.
    """

    value: float | None
    values: tuple[float, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class Metric:
    """A measure of frames.

    Args:
        name: its key in results and records.
        needs_reference: whether it compares with the reference clip (the dense output).
        higher_is_better: None where neither direction is better by itself.
        unit: "" for a pure number.
        compute: (frames, reference or None), float [T, H, W, 3] in [0, 1] each -> the parts, 1-D.
        pool: the clip's score from the parts. Default: their mean.
        min_frames: shorter clips are skipped with a reason. Default 1.
        min_side: clips with a shorter side, in pixels, are skipped with a reason. Default 1.
        package: the package it needs beyond the core ones, from the extra ``eval``; skipped where it is missing.
    """

    name: str
    needs_reference: bool
    higher_is_better: bool | None
    unit: str
    compute: Compute
    pool: Callable[[Tensor], Tensor] = torch.mean
    min_frames: int = 1
    min_side: int = 1
    package: str | None = None


def measure(
    frames: Frames,  # [T, H, W, 3]
    reference: Frames | None = None,  # [T, H, W, 3]
    metrics: Sequence[str | Metric] = ("mse", "psnr", "ssim", "ms_ssim", "flicker", "flicker_gap"),
) -> dict[str, Score]:
    """Scores of a clip by metric name; a metric that cannot apply is skipped with the reason, never guessed.

    Args:
        frames: the clip to judge: floating in [0, 1], or uint8.
        reference: the clip it should equal; the same frame count and size.
        metrics: names from ``METRICS``, or metrics of your own such as ``prompt_accuracy(judge)``.

    Raises:
        ValueError: for an unknown name, or clips that are malformed, out of range, or do not match.
    """
    clip, target = (as_float(frames), None) if reference is None else as_pair(frames, reference)
    chosen = [_lookup(metric) if isinstance(metric, str) else metric for metric in metrics]
    return {metric.name: _score(metric, clip, target) for metric in chosen}


def prompt_accuracy(judge: Callable[[Tensor], float]) -> Metric:
    """A metric from a judge that reads a clip, float [T, H, W, 3] in [0, 1], and says how much of the prompt it shows.

    Args:
        judge: clip -> share of the prompt's statements that hold, in [0, 1].
    """
    return Metric("prompt_accuracy", False, True, "", lambda clip, _: torch.tensor([judge(clip)], dtype=torch.float64))


def _lookup(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}.")
    return METRICS[name]


def _score(metric: Metric, clip: Tensor, target: Tensor | None) -> Score:
    if metric.needs_reference and target is None:
        return Score(None, skipped=f"{metric.name} needs a reference clip.")
    if len(clip) < metric.min_frames:
        return Score(None, skipped=f"{metric.name} needs at least {metric.min_frames} frames, got {len(clip)}.")
    if min(clip.shape[1:3]) < metric.min_side:
        return Score(
            None, skipped=f"{metric.name} needs sides of at least {metric.min_side}, got {list(clip.shape[1:3])}."
        )
    if metric.package and importlib.util.find_spec(metric.package) is None:
        return Score(None, skipped=f"{metric.name} needs {metric.package}: pip install 'dit-accel[eval]'.")
    values = metric.compute(clip, target)
    return Score(float(metric.pool(values)), tuple(values.tolist()))


def _paired(compare: Callable[[Tensor, Tensor], Tensor]) -> Compute:
    def compute(clip: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None, "measure() skips metrics whose reference is missing"
        return compare(clip, target)

    return compute


def _mse(clip: Tensor, target: Tensor) -> Tensor:
    # Frame by frame: a double copy of a long clip would cost gigabytes.
    return torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(clip, target, strict=True)])


def _decibels(mse: Tensor) -> Tensor:
    """PSNR for data range 1; infinite where the error is exactly zero."""
    return -10 * torch.log10(mse)


def _pool_psnr(decibels: Tensor) -> Tensor:
    """PSNR of the whole clip's mean squared error: infinite only if every frame is identical."""
    return _decibels((10 ** (-decibels / 10)).mean())


def _ms_ssim(clip: Tensor, target: Tensor) -> Tensor:
    """Multi-scale SSIM (Wang et al. 2003) with its usual five scales, frame by frame."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as score

    frames = zip(clip.movedim(-1, 1).double(), target.movedim(-1, 1).double(), strict=True)
    return torch.stack([score(x[None], y[None], data_range=1.0) for x, y in frames])


def _flicker(clip: Tensor) -> Tensor:
    """Mean absolute difference of successive frames, [T - 1]."""
    return torch.stack([(after - before).abs().double().mean() for before, after in pairwise(clip)])


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("mse", True, False, "", _paired(_mse)),
        Metric("psnr", True, True, "dB", _paired(lambda x, y: _decibels(_mse(x, y))), pool=_pool_psnr),
        Metric("ssim", True, True, "", _paired(ssim)),
        Metric("ms_ssim", True, True, "", _paired(_ms_ssim), min_side=176, package="torchmetrics"),
        Metric("flicker", False, None, "", lambda clip, _: _flicker(clip), min_frames=2),
        Metric(
            "flicker_gap",
            True,
            False,
            "",
            _paired(lambda x, y: (_flicker(x) - _flicker(y)).abs()),
            min_frames=2,
        ),
    )
}
