"""What a study says: every metric of every method over its prompts, and against dense attention."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, cast

import numpy as np

from dit_accel.eval.quality import METRICS
from dit_accel.eval.records import Record
from dit_accel.eval.statistics import Paired, Sample, Spread, Summary, compare_samples, per_prompt, spread, summarise
from dit_accel.eval.studies import Role, Row, Samples, Study

Scores = Mapping[str, Mapping[Sample, float]]  # by metric, or by row

SPEED_UP, SPEED_UP_FASTEST = "speed_up", "speed_up_over_fastest"
_TIMINGS = ("denoise", "attention", "total", "peak_memory_bytes")
_WHOLE_MODULES = ("dit_fast_attn", "plan")  # they skip projections too, which no count of pairs tells
_LOWER_IS_BETTER = {*_TIMINGS, "trajectory", "attention_error", "discarded_mass", "repeat_difference"}
_LOWER_IS_BETTER |= {"seam", "seam_step", "lpips", "fid"}  # metrics that are made from options


@dataclass(frozen=True)
class MetricSummary:
    """One metric of one method.

    Args:
        by_sample: the scores, by prompt and seed.
        by_prompt: their means over seeds, by prompt; what everything below is of.
        summary: of them.
        identical: prompts with an infinite score.
        finite: of the other prompts, which is what a mean can be given of; None where all are infinite.
        worst_prompt: text of the prompt with the worst of them.
        compared_with: label of the row that the method is compared with: dense attention where it has this metric,
            else the other method with the best mean; None without either.
        difference: to that row, on the samples that both have.
    """

    by_sample: Mapping[Sample, float]
    by_prompt: Mapping[str, float]
    summary: Summary
    identical: int
    finite: Summary | None
    worst_prompt: str
    compared_with: str | None
    difference: Paired | None


@dataclass(frozen=True)
class MethodSummary:
    """One method at one setting of one model, over the samples that it finished.

    Args:
        row: its records.
        densities: means of those that are known.
        speed_up: dense denoise time over the method's, sample by sample; None where nothing was timed.
        speed_up_fastest: the same over the fastest dense kernel; None where no other dense kernel was timed.
        bound: from computed pairs, 1 / (1 - a + a d) at this density of the run: the most that a method can reach that
            saves pairs alone. None for one that skips whole modules, and where the density or the share is unknown.
        metrics: by name: quality, speed-ups and times.
        to_floor: PSNR less that of the kernel's noise floor, the median over prompts, for some may be identical and
            infinitely above; None without a floor.
    """

    row: Row
    densities: Mapping[str, float]
    speed_up: Spread | None
    speed_up_fastest: Spread | None
    bound: float | None
    metrics: Mapping[str, MetricSummary]
    to_floor: float | None

    @property
    def label(self) -> str:
        return self.row.label

    @property
    def role(self) -> Role:
        return self.row.role

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those with a record, sorted."""
        return tuple(dict.fromkeys(prompt for prompt, _ in self.row.samples))


@dataclass(frozen=True)
class StudySummary:
    """The methods of a study in numbers.

    Args:
        study: what was run.
        attention_share: part of the dense run's denoise time inside the attention layers; None where not timed.
        fastest: label of the fastest exact dense kernel, on the samples that all of them have; None unless at least
            two were timed on the same ones.
        floor: label of the dense run by another kernel with the least median PSNR, likewise; None without one.
        methods: a summary for each row of the study.
    """

    study: Study
    attention_share: float | None
    fastest: str | None
    floor: str | None
    methods: tuple[MethodSummary, ...]

    def __getitem__(self, label: str) -> MethodSummary:
        return next(method for method in self.methods if method.label == label)

    def of(self, role: Role) -> tuple[MethodSummary, ...]:
        return tuple(method for method in self.methods if method.role == role)


def summarise_study(study: Study) -> StudySummary:
    """Every method of a study, over its prompts."""
    fastest = _fastest_dense(study)
    dense = study.reference.samples if study.reference else {}
    quickest = next((row.samples for row in study.rows if row.label == fastest), {})
    scores = {row.label: _scores(row.samples, dense, quickest) for row in study.rows}
    share, floor = _attention_share(dense), _kernel_floor(study, scores)
    return StudySummary(
        study=study,
        attention_share=share,
        fastest=fastest,
        floor=floor,
        methods=tuple(_method(row, study, scores, share, floor) for row in study.rows),
    )


def is_better_high(metric: str) -> bool:
    if metric in METRICS:
        return METRICS[metric].higher_is_better is not False
    return metric not in _LOWER_IS_BETTER


def _scores(samples: Samples, dense: Samples, quickest: Samples) -> Scores:
    """Every number of every sample by metric; NaN and what was skipped left out."""
    found: dict[str, dict[Sample, float]] = defaultdict(dict)
    for sample, record in samples.items():
        values: dict[str, Any] = {name: record["timings"].get(name) for name in _TIMINGS}
        values |= {name: score["value"] for name, score in record["quality"].items() if not name.endswith("_by_step")}
        values[SPEED_UP] = _ratio(dense.get(sample), record)
        values[SPEED_UP_FASTEST] = _ratio(quickest.get(sample), record)
        for name, value in values.items():
            if value is not None and not math.isnan(value):
                found[name][sample] = float(value)
    return dict(found)


def _ratio(dense: Record | None, record: Record) -> float | None:
    theirs, ours = dense and dense["timings"].get("denoise"), record["timings"].get("denoise")
    return theirs / ours if theirs and ours else None


def is_exact(row: Row, study: Study) -> bool:
    """Whether it is dense attention with every step, by whatever kernel."""
    return all(record["method"] == "dense" and record["steps"] == study.steps for record in row.samples.values())


def _fastest_dense(study: Study) -> str | None:
    times = {
        row.label: {
            sample: record["timings"]["denoise"]
            for sample, record in row.samples.items()
            if "denoise" in record["timings"]
        }
        for row in study.rows
        if is_exact(row, study)
    }
    timed = {label: seconds for label, seconds in times.items() if seconds}
    return _least_median(timed) if len(timed) > 1 else None


def _kernel_floor(study: Study, scores: Mapping[str, Scores]) -> str | None:
    floors = [row.label for row in study.rows if row.role == "floor" and is_exact(row, study)]
    return _least_median({label: scores[label]["psnr"] for label in floors if "psnr" in scores[label]})


def _least_median(scores: Scores) -> str | None:
    """Of several rows the one with the least median over prompts, on the samples that all have; None without any."""
    if not scores:
        return None
    common = set.intersection(*(set(own) for own in scores.values()))
    medians = {
        label: median_low(per_prompt({sample: own[sample] for sample in common}).values())
        for label, own in scores.items()
        if common
    }
    return min(medians, key=medians.__getitem__) if medians else None


def _attention_share(dense: Samples) -> float | None:
    timed = [record["timings"] for record in dense.values() if {"attention", "denoise"} <= record["timings"].keys()]
    return float(np.median([times["attention"] / times["denoise"] for times in timed])) if timed else None


def _method(
    row: Row, study: Study, scores: Mapping[str, Scores], share: float | None, floor: str | None
) -> MethodSummary:
    own, densities = scores[row.label], _densities(row.samples)
    run = densities.get("run")
    skips = next(iter(row.samples.values()))["method"] in _WHOLE_MODULES
    return MethodSummary(
        row=row,
        densities=densities,
        speed_up=_spread(own, SPEED_UP),
        speed_up_fastest=_spread(own, SPEED_UP_FASTEST),
        bound=None if skips or share is None or run is None else 1 / (1 - share + share * run),
        metrics={name: _metric(name, row, study, scores) for name in sorted(own)},
        to_floor=_to_floor(own["psnr"], scores[floor]["psnr"]) if floor and "psnr" in own else None,
    )


def _to_floor(own: Mapping[Sample, float], floor: Mapping[Sample, float]) -> float | None:
    both = own.keys() & floor.keys()
    ours, theirs = (per_prompt({sample: scores[sample] for sample in both}) for scores in (own, floor))
    gaps = [0.0 if ours[prompt] == theirs[prompt] else ours[prompt] - theirs[prompt] for prompt in ours]
    return summarise(gaps).median if gaps else None


def _metric(name: str, row: Row, study: Study, scores: Mapping[str, Scores]) -> MetricSummary:
    own = scores[row.label][name]
    by_prompt = per_prompt(own)
    better_high = is_better_high(name)
    summary = summarise(list(by_prompt.values()), higher_is_better=better_high)
    finite = [score for score in by_prompt.values() if math.isfinite(score)]
    other = _opponent(name, row, study, scores)
    return MetricSummary(
        by_sample=own,
        by_prompt=by_prompt,
        summary=summary,
        identical=len(by_prompt) - len(finite),
        finite=summary if len(finite) == len(by_prompt) else _summary(finite, better_high),
        worst_prompt=list(by_prompt)[summary.worst_index],
        compared_with=other,
        difference=compare_samples(own, scores[other][name]) if other else None,
    )


def _summary(scores: Sequence[float], higher_is_better: bool) -> Summary | None:
    return summarise(scores, higher_is_better=higher_is_better) if scores else None


def _opponent(name: str, row: Row, study: Study, scores: Mapping[str, Scores]) -> str | None:
    if row is study.reference:
        return None
    if study.reference and name in scores[study.reference.label]:
        return study.reference.label
    means = {
        rival.label: np.mean(list(per_prompt(scores[rival.label][name]).values()))
        for rival in study.rows
        if rival.role == "method" and rival is not row and name in scores[rival.label]
    }
    best = max if is_better_high(name) else min
    return best(means, key=means.__getitem__) if means else None


def _spread(scores: Scores, name: str) -> Spread | None:
    return spread(list(scores[name].values())) if name in scores else None


def _densities(samples: Samples) -> dict[str, float]:
    known: dict[str, list[float]] = defaultdict(list)
    for record in samples.values():
        for name, value in record["densities"].items():
            known[name].append(cast(float, value))
    return {name: float(np.mean(values)) for name, values in sorted(known.items())}
