"""Statistics of scores over prompts, and of paired differences between two methods on the same prompts.

What is drawn, ranked and resampled is the prompt. Clips of one prompt from several seeds are not independent: they are
averaged first (``per_prompt``), or the same evidence would count once for each seed.

Percentiles are order statistics (the smallest value with at least that share at or below it), never between two values:
scores may be infinite, as the PSNR of identical clips is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]  # one score per prompt
Sample = tuple[str, int]  # prompt and seed
Statistic = Callable[..., Any]  # (values, axis=) -> values without that axis, such as np.mean

RESAMPLES = 10_000
_DRAWN = 1_000_000  # values drawn at once
_EXACT = 200  # pairs up to which the signed-rank distribution is counted out
_ROUNDING = 1e-12  # relative: scores are often thirds or quarters, whose means over seeds differ in their last bits


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One method's scores of one metric; of a single prompt the interval has no width and means nothing.

    Args:
        count: prompts.
        mean, median: over them; the median of an even count is its lower middle value.
        worst: the lowest score, or the highest where less is better.
        worst_index: which of the values that is, the first of equal ones.
        fifth: 5th percentile from the worst end.
        interval: of the mean, 95 %.
    """

    count: int
    mean: float
    median: float
    worst: float
    worst_index: int
    fifth: float
    interval: Interval


@dataclass(frozen=True)
class Paired:
    """The difference of two methods, prompt by prompt; of a single one neither interval nor test mean anything.

    Args:
        count: prompts that both have.
        difference: mean of first minus second; scores that are equal up to rounding differ by 0, infinite ones too.
        interval: of that mean, 95 %.
        p_value: two-sided, of the Wilcoxon signed-rank test.
    """

    count: int
    difference: float
    interval: Interval
    p_value: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of so many values, between two of them in proportion where they fall there."""

    count: int
    median: float
    low: float
    high: float


def per_prompt(scores: Mapping[Sample, float]) -> dict[str, float]:
    """The mean over the seeds of each prompt, prompts sorted; whatever the order of ``scores``."""
    seeds: dict[str, list[float]] = defaultdict(list)
    for sample in sorted(scores):
        seeds[sample[0]].append(scores[sample])
    return {prompt: float(np.mean(values)) for prompt, values in seeds.items()}


def spread(values: npt.ArrayLike) -> Spread:
    """Median and interquartile range of repeated measurements, such as speed-ups of single samples.

    Raises:
        ValueError: no values, more than one axis, or NaN.
    """
    checked = _checked(values)
    low, median, high = np.quantile(checked, (0.25, 0.5, 0.75))
    return Spread(len(checked), float(median), float(low), float(high))


def compare_samples(first: Mapping[Sample, float], second: Mapping[Sample, float]) -> Paired | None:
    """First against second on the samples that both have, prompt by prompt; None without any."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    ours, theirs = (per_prompt({sample: scores[sample] for sample in both}) for scores in (first, second))
    return compare(list(ours.values()), list(theirs.values()))


def summarise(values: npt.ArrayLike, *, higher_is_better: bool = True) -> Summary:
    """Scores of one method, one per prompt.

    Raises:
        ValueError: no values, more than one axis, or NaN.
    """
    scores = _checked(values)
    towards_best = scores if higher_is_better else -scores
    order = np.argsort(towards_best, kind="stable")
    return Summary(
        count=len(scores),
        mean=float(scores.mean()),
        median=_percentile(scores, 0.5),
        worst=float(scores[order[0]]),
        worst_index=int(order[0]),
        fifth=float(scores[order[math.ceil(0.05 * len(scores)) - 1]]),
        interval=bootstrap_interval(scores),
    )


def compare(first: npt.ArrayLike, second: npt.ArrayLike) -> Paired:
    """First against second, aligned by prompt.

    Raises:
        ValueError: no values, more than one axis, NaN, or different lengths.
    """
    ours, theirs = _checked(first), _checked(second)
    if len(ours) != len(theirs):
        raise ValueError(f"paired scores must be of the same prompts, got {len(ours)} and {len(theirs)}.")
    differences = np.zeros(len(ours))
    same = np.isclose(ours, theirs, rtol=_ROUNDING, atol=0)  # both infinite too, whose difference would be NaN
    np.subtract(ours, theirs, out=differences, where=~same)
    with np.errstate(invalid="ignore"):  # a mean over both infinities has no value
        mean, interval = float(differences.mean()), bootstrap_interval(differences)
    return Paired(len(differences), mean, interval, signed_rank_p(differences))


def bootstrap_interval(
    values: npt.ArrayLike,
    statistic: Statistic = np.mean,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval (Efron 1979): quantiles of the statistic over resamples with replacement.

    Args:
        values: one per prompt.
        statistic: takes an array and ``axis``. Default: the mean.
        level: confidence. Default 0.95.
        resamples: how many. Default 10,000.
        seed: of the resampling; equal lengths are resampled alike, so that methods meet the same prompts.

    Raises:
        ValueError: no values, more than one axis, or NaN.
    """
    scores = _checked(values)
    draw, rows = np.random.default_rng(seed), math.ceil(_DRAWN / len(scores))
    sizes = [(min(rows, resamples - start), len(scores)) for start in range(0, resamples, rows)]
    results = np.concatenate([statistic(scores[draw.integers(len(scores), size=size)], axis=1) for size in sizes])
    if np.isnan(results).any():
        return Interval(math.nan, math.nan)
    tail = (1 - level) / 2
    return Interval(_percentile(results, tail), _percentile(results, 1 - tail))


def signed_rank_p(differences: npt.ArrayLike) -> float:
    """Two-sided p-value of the Wilcoxon signed-rank test (1945): are the differences symmetric about 0?

    Zeros are dropped and equal magnitudes share their mean rank; what is a 10⁻¹² of the largest finite one or less
    is rounding, and tells no two of them apart. Up to 200 differences the distribution over all signs
    is counted out, ties included; beyond, it is taken to be normal with the variance of the tied ranks.

    Raises:
        ValueError: no values, more than one axis, or NaN.
    """
    signed = _checked(differences)
    noise = _ROUNDING * np.abs(signed[np.isfinite(signed)]).max(initial=0)
    signed = signed[np.abs(signed) > noise]
    if not len(signed):
        return 1.0
    doubled = _doubled_ranks(np.abs(signed), noise)
    positive, total = int(doubled[signed > 0].sum()), int(doubled.sum())
    smaller = min(positive, total - positive)
    if len(signed) > _EXACT:
        deviation = math.sqrt(float((doubled.astype(np.float64) ** 2).sum())) / 2
        return math.erfc((total / 2 - smaller) / deviation / math.sqrt(2))
    chances = np.zeros(total + 1)  # of each sum of positive ranks, every sign as likely as the other
    chances[0] = 1.0
    for rank in doubled:
        chances *= 0.5
        chances[rank:] += chances[:-rank].copy()
    return min(1.0, 2 * float(chances[: smaller + 1].sum()))


def _doubled_ranks(magnitudes: Values, noise: float) -> npt.NDArray[np.int64]:
    """Twice the mean rank of each value from 1, whole numbers; neighbours no further apart than the noise are equal."""
    order = np.argsort(magnitudes)
    ordered = magnitudes[order]
    larger = ordered[1:] > ordered[:-1] + noise
    place = np.concatenate([[0], larger.cumsum()])
    count = np.bincount(place)
    last = count.cumsum()
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = (2 * last - count + 1)[place]
    return ranks


def _percentile(values: Values, share: float) -> float:
    return float(np.quantile(values, share, method="inverted_cdf"))


def _checked(values: npt.ArrayLike) -> Values:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores must be one value per prompt, got shape {list(scores.shape)}.")
    if np.isnan(scores).any():
        raise ValueError(f"scores must not be NaN, but number {int(np.isnan(scores).argmax())} is.")
    return scores
