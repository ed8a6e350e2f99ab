"""Metrics by name: those at hand at once, and those that are made from options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dit_accel.eval.frames import Frames, as_float, as_pair
from dit_accel.eval.quality.clip import clip_score
from dit_accel.eval.quality.formulas import decibels, flicker, flicker_gap, pool_decibels, squared_error
from dit_accel.eval.quality.frechet import fid
from dit_accel.eval.quality.lpips import lpips
from dit_accel.eval.quality.metrics import Metric, Score, SetMetric, paired, score_of
from dit_accel.eval.quality.motion import MIN_SIDE, motion_gap
from dit_accel.eval.quality.outside import DIMENSIONS, image_reward, vbench
from dit_accel.eval.quality.seam import border, seam, seam_step
from dit_accel.eval.quality.ssim import ms_ssim, ssim

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("mse", True, False, "", paired(squared_error)),
        Metric("psnr", True, True, "dB", paired(lambda x, y: decibels(squared_error(x, y))), pool=pool_decibels),
        Metric("ssim", True, True, "", paired(ssim)),
        Metric("ms_ssim", True, True, "", paired(ms_ssim), min_side=176),
        Metric("flicker", False, None, "", lambda clip, _: flicker(clip), min_frames=2),
        Metric("flicker_gap", True, False, "", paired(flicker_gap), min_frames=2),
        Metric("motion_gap", True, False, "px", paired(motion_gap), min_frames=2, min_side=MIN_SIDE),
        border(),
    )
}

MAKERS: dict[str, Callable[..., Metric | SetMetric]] = {  # those that take options
    "seam": seam,
    "seam_step": seam_step,
    "border": border,
    "lpips": lpips,
    "clip_score": clip_score,
    "fid": fid,
    "image_reward": image_reward,
    **{f"vbench_{dimension}": partial(vbench, dimension) for dimension in DIMENSIONS},
}


def make_metric(name: str, options: Mapping[str, Any], **tools: Any) -> Metric | SetMetric:
    """A metric by name and options, as suites and the command line write it.

    Args:
        name: of ``METRICS``, which take none, or of ``MAKERS``.
        options: arguments of its maker.
        tools: arguments that no file can hold, for the makers that have them, such as ``load_clip`` of ``clip_score``.

    Raises:
        ValueError: an unknown name, options that are missing or unknown, or what the maker refuses.
    """
    if name not in METRICS.keys() | MAKERS.keys():
        raise ValueError(f"metric must be one of {', '.join(METRICS | MAKERS)}, got {name!r}.")
    if name in METRICS and not options:
        return METRICS[name]
    if name not in MAKERS:
        raise ValueError(f"metric {name} takes no options, got {', '.join(options)}.")
    maker = MAKERS[name]
    signature = inspect.signature(maker)
    needed = {key: tool for key, tool in tools.items() if key in signature.parameters}
    try:
        signature.bind(**options, **needed)
    except TypeError as error:
        known = ", ".join(key for key in signature.parameters if key not in needed)
        raise ValueError(f"metric {name} takes the options {known}, but {error}.") from None
    return maker(**options, **needed)


def measure(
    frames: Frames,  # [T, H, W, 3]
    reference: Frames | None = None,  # [T, H, W, 3]
    metrics: Sequence[str | Metric] = tuple(METRICS),
    prompt: str | None = None,
) -> dict[str, Score]:
    """Scores of a clip by metric name; a metric that cannot apply is skipped with the reason, never guessed.

    Args:
        frames: the clip to judge: floating in [0, 1], or uint8.
        reference: the clip it should equal; the same frame count and size.
        metrics: names from ``METRICS``, or metrics of your own such as ``prompt_accuracy(judge)``. Default: all of
            ``METRICS``.
        prompt: the text of the clip, for metrics that need it.

    Raises:
        ValueError: for an unknown name, or clips that are malformed, out of range, or do not match.
    """
    clip, target = (as_float(frames), None) if reference is None else as_pair(frames, reference)
    chosen = [_named(metric) if isinstance(metric, str) else metric for metric in metrics]
    return {metric.name: score_of(metric, clip, target, prompt) for metric in chosen}


def _named(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}.")
    return METRICS[name]
