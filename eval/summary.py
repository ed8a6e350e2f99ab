"""The summary of a run in tables: Markdown for people, CSV and JSON for programs, made from its records alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel.eval.aggregate import MethodSummary, MetricSummary, StudySummary, summarise_study
from dit_accel.eval.records import Record, to_json
from dit_accel.eval.report.tables import MISSING, format_table, number
from dit_accel.eval.statistics import Paired, Spread, Summary
from dit_accel.eval.studies import PART, Study, prompt_hash, studies

SHOWN = "prompt_accuracy"
FEW = 10  # prompts below which intervals are too narrow to be shown without a word
NOTE = (
    "Everything is per prompt: seeds of one prompt are averaged first, intervals are 95 % bootstrap intervals over "
    "prompts, p is of the Wilcoxon signed-rank test on paired prompts. Speed-ups are medians and quartiles over "
    "samples, each against the dense run of the same sample."
)

COLUMNS: Mapping[str, Callable[[MethodSummary], str]] = {
    "method": lambda method: method.label,
    "samples": lambda method: str(len(method.row.samples)),
    "speed-up [IQR]": lambda method: spread_text(method.speed_up),
    "over fastest dense": lambda method: spread_text(method.speed_up_fastest),
    "bound": lambda method: number(method.bound if method.role == "method" else None, ".2f", "×"),
    "computed": lambda method: number(method.densities.get("executed"), ".1%"),
    "of the run": lambda method: number(method.densities.get("run"), ".1%"),
    "PSNR [95 %]": lambda method: mean_text(method.metrics.get("psnr"), ".1f", " dB"),
    "worst": lambda method: _of_several(method, "worst"),
    "5th percentile": lambda method: _of_several(method, "fifth"),
    "to kernel floor": lambda method: floor_text(method.to_floor if method.role == "method" else None),
    "SSIM": lambda method: number(_mean(method, "ssim"), ".3f"),
    "prompt accuracy": lambda method: number(_mean(method, SHOWN), ".0%"),
    "to dense": lambda method: difference_text(_difference(method, SHOWN), 100, ".0f", " pp"),
}


def write_summary(folder: str | os.PathLike[str], records: Iterable[Record]) -> str:
    """Writes summary.md, summary.csv and summary.json, and returns the text of the first.

    Args:
        folder: made when missing.
        records: of one run, in any order.

    Raises:
        ValueError: what ``studies`` refuses.
    """
    return write_summaries(folder, [summarise_study(study) for study in studies(records)])


def write_summaries(folder: str | os.PathLike[str], summaries: Sequence[StudySummary]) -> str:
    """The same of studies that are summarised already, of one run or of several."""
    text = as_markdown(summaries)
    contents = {"summary.md": text, "summary.csv": as_csv(summaries), "summary.json": as_json(summaries)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (Path(folder) / name).write_text(content, encoding="utf-8")
    return text


def as_markdown(summaries: Sequence[StudySummary]) -> str:
    """A table for each study, with what it is of."""
    return "\n\n".join([*(_section(summary) for summary in summaries), NOTE]) + "\n"


def as_csv(summaries: Sequence[StudySummary]) -> str:
    """A line for each study, method and metric."""
    rows = [line for summary in summaries for line in _lines(summary)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(summaries: Sequence[StudySummary]) -> str:
    """The same as JSON, with the scores prompt by prompt."""
    found = [
        _facts(summary.study)
        | {"attention_share": summary.attention_share, "fastest_dense": summary.fastest, "kernel_floor": summary.floor}
        | {"prompts": summary.study.prompts, "methods": [_method(method, summary.study) for method in summary.methods]}
        for summary in summaries
    ]
    return json.dumps(to_json(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def table(methods: Sequence[MethodSummary], columns: Sequence[str] = tuple(COLUMNS)) -> list[dict[str, str]]:
    """Rows by column heading; a column that says nothing of any method is left out."""
    rows = [{name: COLUMNS[name](method) for name in columns} for method in methods]
    said = [name for name in columns if any(row[name] != MISSING for row in rows)]
    return [{name: row[name] for name in said} for row in rows]


def title(study: Study, with_run: bool = True) -> str:
    """What a study is of, in one line."""
    setting = "" if study.setting == study.size_words else study.setting
    named = ", ".join(filter(None, (study.model, setting)))
    return f"{study.run}: {named}" if with_run and study.run else named


def sample_words(study: Study) -> str:
    """How many samples of which prompts, with the hash of their texts."""
    prompts, seeds = len(study.prompts), len(study.seeds)
    samples = len(study.reference.samples if study.reference else study.rows[0].samples)
    lists = study.prompt_list.removeprefix(PART).split(f" and {PART}")
    if study.prompt_list.startswith(PART):
        named = f"{prompts} of {' and '.join(_possessive(name) for name in lists)} prompts"
    else:
        named = f"{count_words(prompts)}{f' of {study.prompt_list}' * bool(study.prompt_list)}"
    times = (
        f" × {seeds} seeds" if samples == prompts * seeds > prompts else f", {samples} samples" * (samples != prompts)
    )
    return f"{named} (hash {study.prompt_hash}){times}"


def count_words(prompts: int) -> str:
    return f"{prompts} prompt{'s' * (prompts != 1)}"


def _possessive(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def machine_words(study: Study) -> str:
    machine = study.machine
    return machine.get("gpu") or ", ".join(filter(None, (machine.get("cpu"), f"{machine.get('cores', '?')} cores")))


def mean_text(metric: MetricSummary | None, style: str, unit: str = "") -> str:
    """A mean, of several prompts with its interval; of a PSNR where clips differ, and how often they do not."""
    if metric is None:
        return MISSING
    if metric.finite is None:
        return number(metric.summary.mean, style)
    mean, interval = metric.finite.mean, metric.finite.interval
    text = f"{mean:{style}}{unit}"
    if metric.finite.count > 1:
        text += f" [{interval.low:{style}}, {interval.high:{style}}]"
    return text + f", identical on {metric.identical} of {metric.summary.count}" * bool(metric.identical)


def spread_text(spread: Spread | None) -> str:
    """A median, of several samples with its quartiles."""
    if spread is None:
        return MISSING
    return f"{spread.median:.2f}×" + f" [{spread.low:.2f}, {spread.high:.2f}]" * (spread.count > 1)


def difference_text(paired: Paired | None, factor: float, style: str, unit: str) -> str:
    """A paired difference, of several prompts with its interval and p."""
    if paired is None:
        return MISSING
    mean, low, high = (factor * end for end in (paired.difference, paired.interval.low, paired.interval.high))
    interval = f" [{low:+{style}}, {high:+{style}}], {chance_text(paired)}" * (paired.count > 1)
    return f"{mean:+{style}}{unit}{interval}"


def chance_text(paired: Paired) -> str:
    return f"p = {paired.p_value:.2g}" if paired.p_value >= 0.001 else "p < 0.001"


def floor_text(difference: float | None) -> str:
    """How far below the noise floor; infinitely where the floor itself is identical to dense."""
    if difference is None:
        return MISSING
    return f"{difference:+.1f} dB" if math.isfinite(difference) else "floor identical"


def _section(summary: StudySummary) -> str:
    study = summary.study
    floors, methods = summary.of("floor"), [*summary.of("reference"), *summary.of("method")]
    rows = table([*methods, *floors])
    for row in rows[len(methods) :]:
        row["method"] = f"noise floor: {row['method']}"
    parts = [
        f"## {title(study)}",
        f"{study.size_words}; {sample_words(study)}; {machine_words(study)}.",
        format_table(rows),
    ]
    return "\n\n".join(
        filter(None, [*parts, "\n".join(f"- {remark}" for remark in [*_worst_prompts(summary), *remarks(summary)])])
    )


def _worst_prompts(summary: StudySummary) -> Iterator[str]:
    for method in summary.of("method"):
        psnr = method.metrics.get("psnr")
        if psnr and psnr.summary.count > 1 and math.isfinite(psnr.summary.worst):
            yield f"worst prompt of {method.label}: {psnr.worst_prompt!r} ({psnr.summary.worst:.1f} dB)"


def remarks(summary: StudySummary) -> Iterator[str]:
    """What the table has no room for."""
    prompts, whole = len(summary.study.prompts), max(len(method.row.samples) for method in summary.methods)
    if prompts == 1:
        yield "one prompt: no interval, no test and no worst prompt follow from it"
    elif prompts < FEW:
        yield f"{prompts} prompts: bootstrap intervals of fewer than {FEW} are too narrow"
    for method in summary.methods:
        if len(method.row.samples) < whole:
            yield f"{method.label} finished {len(method.row.samples)} of {whole} samples"
    if summary.fastest:
        yield f"fastest dense kernel: {summary.fastest}"


def _lines(summary: StudySummary) -> Iterator[dict[str, object]]:
    study = summary.study
    for method in summary.methods:
        for name, metric in method.metrics.items():
            difference = metric.difference
            (low, high), (difference_low, difference_high) = _ends(metric.summary), _ends(difference)
            yield {
                "run": study.run,
                "model": study.model,
                "setting": study.setting,
                "method": method.label,
                "role": method.role,
                "metric": name,
                "samples": len(metric.by_sample),
                "prompts": metric.summary.count,
                "prompt_list": study.prompt_list,
                "prompt_hash": prompt_hash([prompt for prompt in study.prompts if prompt in metric.by_prompt]),
                "mean": metric.summary.mean,
                "low": low,
                "high": high,
                "median": metric.summary.median,
                "worst": metric.summary.worst,
                "worst_prompt": metric.worst_prompt,
                "fifth_percentile": metric.summary.fifth,
                "compared_with": metric.compared_with,
                "difference": difference and difference.difference,
                "difference_low": difference_low,
                "difference_high": difference_high,
                "p": difference.p_value if difference and difference.count > 1 else None,
            }


def _facts(study: Study) -> dict[str, Any]:
    names = ("run", "model", "setting", "size", "steps", "guidance", "prompt_list", "prompt_hash", "seeds", "machine")
    return {name: getattr(study, name) for name in names}


def _method(method: MethodSummary, study: Study) -> dict[str, Any]:
    spreads = {"speed_up": method.speed_up, "speed_up_over_fastest": method.speed_up_fastest}
    return {
        "label": method.label,
        "role": method.role,
        "samples": len(method.row.samples),
        "densities": method.densities,
        **{name: spread and dataclasses.asdict(spread) for name, spread in spreads.items()},
        "bound": method.bound,
        "to_floor": method.to_floor,
        "metrics": {name: _metric(metric, study) for name, metric in method.metrics.items()},
    }


def _metric(metric: MetricSummary, study: Study) -> dict[str, Any]:
    """With the scores in the order of the study's prompts, null where there is none."""
    return {
        "by_prompt": [metric.by_prompt.get(prompt) for prompt in study.prompts],
        "summary": _as_dict(metric.summary),
        "identical": metric.identical,
        "worst_prompt": metric.worst_prompt,
        "compared_with": metric.compared_with,
        "difference": metric.difference and _as_dict(metric.difference),
    }


def _as_dict(found: Summary | Paired) -> dict[str, Any]:
    """Without interval and test of a single prompt."""
    void = {} if found.count > 1 else dict.fromkeys({"interval", "p_value"} & vars(found).keys())
    return dataclasses.asdict(found) | void


def _ends(found: Summary | Paired | None) -> tuple[float | None, float | None]:
    """Of the interval; none of a single prompt."""
    return (found.interval.low, found.interval.high) if found and found.count > 1 else (None, None)


def _of_several(method: MethodSummary, which: str) -> str:
    """The worst PSNR, or the fifth percentile; of one prompt nothing."""
    if "psnr" not in method.metrics or method.metrics["psnr"].summary.count == 1:
        return MISSING
    return number(getattr(method.metrics["psnr"].summary, which), ".1f", " dB")


def _mean(method: MethodSummary, metric: str) -> float | None:
    return method.metrics[metric].summary.mean if metric in method.metrics else None


def _difference(method: MethodSummary, metric: str) -> Paired | None:
    return method.metrics[metric].difference if metric in method.metrics else None
