"""Many methods on the same prompts: from records to one summary per method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dit_accel.eval.discarded import BY_HEAD, BY_STEP, DiscardedMass, average, discarded_of
from dit_accel.eval.quality import METRICS
from dit_accel.eval.records import Record
from dit_accel.eval.report.tables import MISSING, number
from dit_accel.eval.statistics import Paired, Summary, compare, summarise

Records = Mapping[int, Record]  # by number of the prompt
Metrics = Mapping[str, Mapping[int, float]]  # by metric and number of the prompt

SHOWN, CORRECT = "prompt_accuracy", "clip_correct"


@dataclass(frozen=True)
class MethodSummary:
    """One method over the prompts that it finished.

    Args:
        label: its name.
        prompts: how many.
        executed, run: densities of the sparse calls and of the whole run, measured, the mean over prompts.
        scores: by metric.
        to_dense: differences to the dense reference by metric, of those that need no reference; none for itself.
        best_other: the other sparse method with the highest mean PSNR; None without one.
        to_best_other: difference in PSNR to it.
        worst_prompt: number of the prompt with the lowest PSNR; None without a PSNR.
        discarded: softmax mass left out, the mean over prompts; None where it was not measured.
    """

    label: str
    prompts: int
    executed: float
    run: float
    scores: Mapping[str, Summary]
    to_dense: Mapping[str, Paired]
    best_other: str | None
    to_best_other: Paired | None
    worst_prompt: int | None
    discarded: DiscardedMass | None


def summarise_methods(results: Mapping[str, Records], heads: int) -> list[MethodSummary]:
    """One summary per method, in order; methods without a record are left out.

    Args:
        results: records by label and prompt, the dense reference first.
        heads: of the model, which a record of discarded mass does not say.
    """
    done = {label: records for label, records in results.items() if records}
    metrics = {label: _metrics(records) for label, records in done.items()}
    return [_summarise(label, records, metrics, heads) for label, records in done.items()]


def _summarise(label: str, records: Records, metrics: Mapping[str, Metrics], heads: int) -> MethodSummary:
    dense, own = next(iter(metrics)), metrics[label]
    psnr = {other: found["psnr"] for other, found in metrics.items() if other != label and "psnr" in found}
    best = max(psnr, key=lambda other: np.mean(list(psnr[other].values())), default=None) if "psnr" in own else None
    masses = [mass for record in records.values() if (mass := discarded_of(record["quality"], heads))]
    compared = {name: _paired(own[name], metrics[dense].get(name, {})) for name in own if label != dense}
    return MethodSummary(
        label=label,
        prompts=len(records),
        executed=_density(records, "executed"),
        run=_density(records, "run"),
        scores={name: summarise(list(own[name].values()), higher_is_better=_is_better_high(name)) for name in own},
        to_dense={name: paired for name, paired in compared.items() if paired},
        best_other=best,
        to_best_other=_paired(own["psnr"], psnr[best]) if best else None,
        worst_prompt=min(own["psnr"], key=own["psnr"].__getitem__) if "psnr" in own else None,
        discarded=average(masses) if masses else None,
    )


def table_row(summary: MethodSummary) -> dict[str, str]:
    """One row of the table, column heading -> text."""
    scores, paired = summary.scores, summary.to_dense.get(SHOWN)
    psnr = scores.get("psnr")
    return {
        "method": summary.label,
        "prompts": str(summary.prompts),
        "executed": f"{summary.executed:.1%}",
        "run": f"{summary.run:.1%}",
        "PSNR [95 %]": _with_interval(psnr, ".2f", " dB"),
        "SSIM": number(scores["ssim"].mean if "ssim" in scores else None, ".3f"),
        "shown [95 %]": _with_interval(scores.get(SHOWN), ".0%"),
        "correct": number(scores[CORRECT].mean if CORRECT in scores else None, ".0%"),
        "shown to dense": _difference(paired, 100, ".0f", " pp"),
        "PSNR to best other": _difference(summary.to_best_other, 1, ".2f", " dB"),
        "worst prompt": f"#{summary.worst_prompt}: {number(psnr.worst, '.1f', ' dB')}" if psnr else MISSING,
        "τ": f"{summary.discarded.mean:.1%}" if summary.discarded else MISSING,
    }


def as_dict(summary: MethodSummary) -> dict[str, Any]:
    """The summary in JSON's types; numbers may be infinite."""
    mass = summary.discarded
    parts = {"mean": mass.mean, "by_head": mass.by_head.tolist(), "by_step": mass.by_step.tolist()} if mass else None
    return dataclasses.asdict(dataclasses.replace(summary, discarded=None)) | {"discarded": parts}


def _metrics(records: Records) -> Metrics:
    """Scores by metric and prompt, where they were not skipped."""
    found: dict[str, dict[int, float]] = {}
    for prompt, record in records.items():
        for name, score in record["quality"].items():
            if name not in (BY_HEAD, BY_STEP) and score["value"] is not None:
                found.setdefault(name, {})[prompt] = score["value"]
    return found


def _density(records: Records, key: Literal["executed", "run"]) -> float:
    return float(np.mean([record["densities"][key] for record in records.values()]))


def _is_better_high(metric: str) -> bool:
    return metric not in METRICS or METRICS[metric].higher_is_better is not False


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """The difference on the prompts that both have, None without any."""
    both = sorted(ours.keys() & theirs.keys())
    return compare([ours[prompt] for prompt in both], [theirs[prompt] for prompt in both]) if both else None


def _with_interval(score: Summary | None, style: str, unit: str = "") -> str:
    if score is None:
        return MISSING
    if math.isinf(score.mean):
        return number(score.mean, style)
    return f"{score.mean:{style}}{unit} [{score.interval.low:{style}}, {score.interval.high:{style}}]"


def _difference(paired: Paired | None, factor: float, style: str, unit: str) -> str:
    if paired is None:
        return MISSING
    mean, low, high = (factor * end for end in (paired.difference, paired.interval.low, paired.interval.high))
    chance = f"p = {paired.p_value:.2g}" if paired.p_value >= 0.001 else "p < 0.001"
    return f"{mean:+{style}}{unit} [{low:+{style}}, {high:+{style}}], {chance}"
