"""Statistics over prompts: values worked out by hand, and coverage on synthetic scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import PermutationMethod, wilcoxon

from dit_accel.eval import statistics
from dit_accel.eval.statistics import Interval, bootstrap_interval, compare, per_prompt, signed_rank_p, summarise


def test_summary_of_one_to_a_hundred() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1, 101))
    better_high, better_low = summarise(scores), summarise(scores, higher_is_better=False)
    assert (better_high.count, better_high.mean, better_high.median) == (100, 50.5, 50)
    assert (better_high.worst, better_high.fifth) == (1, 5)
    assert (better_low.worst, better_low.fifth) == (100, 96)
    half_width = 1.96 * math.sqrt((100**2 - 1) / 12 / 100)  # of a mean of 100 draws from these scores
    assert better_high.interval.low == pytest.approx(50.5 - half_width, abs=0.3)
    assert better_high.interval.high == pytest.approx(50.5 + half_width, abs=0.3)


@pytest.mark.parametrize(
    ("level", "interval"), [(0.95, Interval(0, 1)), (0.4, Interval(0.5, 0.5))], ids=["outer", "inner"]
)
def test_resamples_of_a_zero_and_a_one_have_a_known_distribution(level: float, interval: Interval) -> None:
    """Their means are 0, 1/2 and 1 with the chances 1/4, 1/2 and 1/4."""
    assert bootstrap_interval([0, 1], level=level) == interval


def test_interval_of_equal_scores_has_no_width() -> None:
    assert bootstrap_interval([3.5] * 7) == Interval(3.5, 3.5)
    assert summarise([2.0]).interval == Interval(2, 2)


def test_interval_takes_any_statistic_and_repeats_itself() -> None:
    scores = np.random.default_rng(1).normal(size=31)
    assert bootstrap_interval(scores, np.median, seed=5) == bootstrap_interval(scores, np.median, seed=5)
    assert bootstrap_interval(scores, np.max).high == scores.max()


def test_interval_does_not_depend_on_how_many_values_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.arange(30.0) ** 2
    whole = bootstrap_interval(scores)
    monkeypatch.setattr(statistics, "_DRAWN", 1000)  # 34 resamples at once, which does not divide their number
    assert bootstrap_interval(scores) == whole


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(2).normal(3, 2, size=(400, 40))
    intervals = [bootstrap_interval(scores, resamples=1000, seed=number) for number, scores in enumerate(draws)]
    covered = np.mean([interval.low <= 3 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.97


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        pytest.param([1, 2, 3], 2 / 8, id="all positive"),
        pytest.param([-1, -2, -3, -4, -5], 2 / 32, id="all negative"),
        pytest.param([1, -2, 3], 6 / 8, id="the sums 0, 1 and 2 of eight"),
        pytest.param([0, 0, 1, 2, 3], 2 / 8, id="zeros are dropped"),
        pytest.param([0.0, 0.0], 1.0, id="nothing but zeros"),
        pytest.param([2, 2, -2], 1.0, id="ties: ranks 2, 2, 2"),
        pytest.param([1, 1, 1, 5, -1], 2 * 5 / 32, id="ties: ranks 2.5, 2.5, 2.5, 2.5, 5"),
        pytest.param([1, -2, 3, 4, -6, 5, 7, 8, 9, 10], 50 / 1024, id="ten, sum 8: 25 sums of distinct ranks"),
        pytest.param([math.inf, math.inf, 1], 2 / 8, id="infinite"),
    ],
)
def test_signed_rank_p_by_hand(differences: list[float], p: float) -> None:
    assert signed_rank_p(differences) == pytest.approx(p, rel=1e-12)
    assert signed_rank_p([-difference for difference in differences]) == signed_rank_p(differences)


def test_means_of_thirds_tie_as_scipy_ties_them_when_rounded() -> None:
    """Accuracies are thirds; their means over seeds, and differences of these, are equal up to the last bits only."""
    draw, every_sign = np.random.default_rng(6), PermutationMethod(n_resamples=np.inf)
    split = 0
    for _ in range(20):
        ours, theirs = ([np.mean(scores) for scores in draw.integers(0, 4, size=(11, 7)) / 3] for _ in range(2))
        differences = np.subtract(ours, theirs)
        rounded = differences.round(9)
        split += len(np.unique(np.abs(differences))) > len(np.unique(np.abs(rounded)))
        expected = wilcoxon(rounded[rounded != 0], method=every_sign).pvalue
        assert signed_rank_p(differences) == pytest.approx(expected, rel=1e-9)
        assert compare(ours, theirs).p_value == pytest.approx(expected, rel=1e-9)
    assert split > 10


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_rounding_is_no_difference_at_any_scale(unit: float) -> None:
    first, second = per_prompt({("a", 0): 0.3 * unit}), per_prompt({("a", 0): 0.1 * unit, ("a", 1): 0.5 * unit})
    assert compare([0.1 * unit + 0.2 * unit], [0.3 * unit]).difference == 0
    assert compare(list(first.values()), list(second.values())).p_value == 1
    assert signed_rank_p([unit, 2 * unit, 3 * unit, 1e-14 * unit, -1e-14 * unit]) == 2 / 8
    assert signed_rank_p([unit, -unit * (1 + 1e-15), 1e-3 * unit]) == signed_rank_p([2, -2, 1])


def test_normal_approximation_meets_the_exact_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(3).normal(0.15, 1, size=(20, 180)).round(1)  # with ties
    exact = [signed_rank_p(row) for row in differences]
    monkeypatch.setattr(statistics, "_EXACT", 10)
    assert [signed_rank_p(row) for row in differences] == pytest.approx(exact, rel=0.03, abs=5e-4)
    assert min(exact) < 0.05 < max(exact)


def test_p_values_are_even_where_methods_are_equal() -> None:
    rows = np.random.default_rng(4).normal(size=(400, 30))
    assert 0.02 <= np.mean([signed_rank_p(row) <= 0.05 for row in rows]) <= 0.08


def test_paired_difference_is_narrower_than_either_method() -> None:
    make = np.random.default_rng(5)
    prompts, noise = make.normal(30, 5, 48), make.normal(0, 0.1, 48)
    paired = compare(prompts + 1 + noise, prompts)
    assert paired.count == 48
    assert paired.difference == pytest.approx(1 + noise.mean())
    assert 0.9 < paired.interval.low < paired.difference < paired.interval.high < 1.1
    assert paired.p_value < 1e-8
    back = compare(prompts, prompts + 1 + noise)
    assert back.difference == pytest.approx(-paired.difference)
    assert back.p_value == paired.p_value


def test_identical_clips_of_both_methods_differ_by_nothing() -> None:
    paired = compare([math.inf, math.inf, 30], [math.inf, math.inf, 30])
    assert (paired.difference, paired.interval, paired.p_value) == (0, Interval(0, 0), 1)
    assert compare([math.inf, 30], [20, 30]).difference == math.inf
    assert summarise([math.inf, 30]).worst == 30


@pytest.mark.parametrize(
    ("values", "sentence"),
    [([], r"got shape \[0\]"), ([[1.0, 2.0]], r"got shape \[1, 2\]"), ([1.0, math.nan], "number 1 is")],
    ids=["none", "two axes", "NaN"],
)
def test_malformed_scores_are_refused(values: list[float], sentence: str) -> None:
    for function in (summarise, bootstrap_interval, signed_rank_p):
        with pytest.raises(ValueError, match=sentence):
            function(values)


def test_scores_of_different_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts, got 2 and 3"):
        compare([1, 2], [1, 2, 3])
