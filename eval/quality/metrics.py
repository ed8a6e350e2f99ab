"""Metrics as declarations: what each needs, which way is better, its unit, its formula."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

Against = Tensor | str | None  # what a clip is judged against: the reference clip, the prompt, or nothing
Compute = Callable[[Tensor, Against], Tensor]
Scope = Literal["frame", "clip", "set"]


@dataclass(frozen=True)
class Score:
    """What a metric said about one clip, or about a set of clips.

    Args:
        value: the score; ``math.inf`` for the PSNR of identical clips; None when skipped.
        values: the parts it was pooled from: one per frame, one per pair of successive frames (flicker), or what the
            metric of a whole clip says (prompt accuracy: one value).
        skipped: why there is no value, else None.
    """

    value: float | None
    values: tuple[float, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class SetScore(Score):
    """What a metric said about a set.

    Args:
        samples: frames or clips, as the metric counts, that it saw.
    """

    samples: int = 0


@dataclass(frozen=True)
class Metric:
    """A measure of one clip.

    Args:
        name: its key in results and records.
        needs_reference: whether it compares with the reference clip (the dense output).
        higher_is_better: None where neither direction is better by itself.
        unit: "" for a pure number.
        compute: (frames, reference or None), float [T, H, W, 3] in [0, 1] each -> the parts, 1-D. With
            ``needs_prompt`` it takes (frames, prompt).
        pool: the clip's score from the parts. Default: their mean.
        scope: "frame": one part per frame, or per run of ``min_frames`` successive frames; "clip": parts of the whole.
            Default "frame".
        min_frames: shorter clips are skipped with a reason. Default 1.
        min_side: clips with a shorter side, in pixels, are skipped with a reason. Default 1.
        dependencies: packages it needs beyond the core ones, from the extra ``eval``; skipped where one is missing.
        needs_prompt: whether it compares with the prompt instead of a clip. Default False.
        needs: what (frames, reference or None) lack for it, as a clause after "needs"; None: nothing. Default: nothing.
    """

    name: str
    needs_reference: bool
    higher_is_better: bool | None
    unit: str
    compute: Compute
    pool: Callable[[Tensor], Tensor] = torch.mean
    scope: Literal["frame", "clip"] = "frame"
    min_frames: int = 1
    min_side: int = 1
    dependencies: tuple[str, ...] = ()
    needs_prompt: bool = False
    needs: Callable[[Tensor, Tensor | None], str | None] | None = None


class Accumulator(Protocol):
    """A metric of a set at work: takes clips one by one and keeps nothing that grows with their number."""

    def add(self, frames: Tensor, reference: Tensor | None, prompt: str | None = None) -> None:
        """One clip, float [T, H, W, 3] in [0, 1], the reference it belongs to, of the same shape, and its prompt."""

    def result(self) -> SetScore:
        """The score of all clips so far, the same in whatever order they came."""


@dataclass(frozen=True)
class SetMetric:
    """A measure of two sets of clips that no single clip has, such as the Fréchet distance of their features.

    Args:
        name: its key in results.
        higher_is_better: None where neither direction is better by itself.
        unit: "" for a pure number.
        dependencies: packages it needs beyond the core ones, from the extra ``eval``; skipped where one is missing.
        start: makes an accumulator for one run over the set.
    """

    name: str
    higher_is_better: bool | None
    unit: str
    dependencies: tuple[str, ...]
    start: Callable[[], Accumulator]
    scope: ClassVar[Scope] = "set"


def prompt_accuracy(judge: Callable[[Tensor], float]) -> Metric:
    """A metric from a judge that reads a clip, float [T, H, W, 3] in [0, 1], and says how much of the prompt it shows.

    Args:
        judge: clip -> share of the prompt's statements that hold, in [0, 1].
    """
    return Metric(
        "prompt_accuracy",
        needs_reference=False,
        higher_is_better=True,
        unit="",
        compute=lambda clip, _: torch.tensor([judge(clip)], dtype=torch.float64),
        scope="clip",
    )


def missing_packages(metric: str, packages: Iterable[str]) -> str | None:
    """Why a metric that needs these packages cannot run here, or None where it can."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{metric} needs {' and '.join(missing)}: pip install 'dit-accel[eval]'." if missing else None


def score_of(metric: Metric, clip: Tensor, target: Tensor | None, prompt: str | None = None) -> Score:
    """What the metric says about float clips [T, H, W, 3] in [0, 1] of one shape, or the reason why it says nothing."""
    reason = _obstacle(metric, clip, target, prompt)
    if reason:
        return Score(None, skipped=reason)
    values = metric.compute(clip, prompt if metric.needs_prompt else target)
    return Score(float(metric.pool(values)), tuple(values.tolist()))


def _obstacle(metric: Metric, clip: Tensor, target: Tensor | None, prompt: str | None) -> str | None:
    """Why the metric cannot judge this clip, or None."""
    if metric.needs_reference and target is None:
        return f"{metric.name} needs a reference clip."
    if metric.needs_prompt and prompt is None:
        return f"{metric.name} needs the clip's prompt."
    if len(clip) < metric.min_frames:
        return f"{metric.name} needs at least {metric.min_frames} frames, got {len(clip)}."
    if min(clip.shape[1:3]) < metric.min_side:
        return f"{metric.name} needs sides of at least {metric.min_side}, got {list(clip.shape[1:3])}."
    lack = metric.needs(clip, target) if metric.needs else None
    return f"{metric.name} needs {lack}." if lack else missing_packages(metric.name, metric.dependencies)


def paired(compare: Callable[[Tensor, Tensor], Tensor]) -> Compute:
    """The ``compute`` of a metric that needs a reference."""

    def compute(clip: Tensor, target: Against) -> Tensor:
        assert isinstance(target, Tensor), "measure() skips metrics whose reference is missing"
        return compare(clip, target)

    return compute
