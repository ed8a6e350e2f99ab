"""Statistics of scores over prompts, and of paired differences between two methods on the same prompts.

Percentiles are order statistics (the smallest value with at least that share at or below it), never between two values:
scores may be infinite, as the PSNR of identical clips is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]  # one score per prompt
Statistic = Callable[..., Any]  # (values, axis=) -> values without that axis, such as np.mean

RESAMPLES = 10_000
_EXACT = 200  # pairs up to which the signed-rank distribution is counted out


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One method's scores of one metric.

    Args:
        count: prompts.
        mean, median: over them; the median of an even count is its lower middle value.
        worst: the lowest score, or the highest where less is better.
        fifth: 5th percentile from the worst end.
        interval: of the mean, 95 %.
    """

    count: int
    mean: float
    median: float
    worst: float
    fifth: float
    interval: Interval


@dataclass(frozen=True)
class Paired:
    """The difference of two methods, prompt by prompt.

    Args:
        count: prompts that both have.
        difference: mean of first minus second; equal scores differ by 0, infinite ones too.
        interval: of that mean, 95 %.
        p_value: two-sided, of the Wilcoxon signed-rank test.
    """

    count: int
    difference: float
    interval: Interval
    p_value: float


def summarise(values: npt.ArrayLike, *, higher_is_better: bool = True) -> Summary:
    """Scores of one method, one per prompt.

    Raises:
        ValueError: no values, more than one axis, or NaN.
    """
    scores = _checked(values)
    from_worst = np.sort(scores) if higher_is_better else -np.sort(-scores)
    return Summary(
        count=len(scores),
        mean=float(scores.mean()),
        median=_percentile(scores, 0.5),
        worst=float(from_worst[0]),
        fifth=float(from_worst[math.ceil(0.05 * len(scores)) - 1]),
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
    np.subtract(ours, theirs, out=differences, where=ours != theirs)  # inf - inf would be NaN
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
    chosen = np.random.default_rng(seed).integers(len(scores), size=(resamples, len(scores)))
    results = statistic(scores[chosen], axis=1)
    if np.isnan(results).any():
        return Interval(math.nan, math.nan)
    tail = (1 - level) / 2
    return Interval(_percentile(results, tail), _percentile(results, 1 - tail))


def signed_rank_p(differences: npt.ArrayLike) -> float:
    """Two-sided p-value of the Wilcoxon signed-rank test (1945): are the differences symmetric about 0?

    Zeros are dropped and equal magnitudes share their mean rank. Up to 200 differences the distribution over all signs
    is counted out, ties included; beyond, it is taken to be normal with the variance of the tied ranks.

    Raises:
        ValueError: no values, more than one axis, or NaN.
    """
    signed = _checked(differences)
    signed = signed[signed != 0]
    if not len(signed):
        return 1.0
    doubled = _doubled_ranks(np.abs(signed))
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


def _doubled_ranks(magnitudes: Values) -> npt.NDArray[np.int64]:
    """Twice the mean rank of each value from 1, whole numbers."""
    _, place, count = np.unique(magnitudes, return_inverse=True, return_counts=True)
    last = count.cumsum()
    ranks: npt.NDArray[np.int64] = (2 * last - count + 1)[place]
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
