"""`dit-accel score`: pictures or clips on disk against those that they should equal, pair by pair."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_accel.commands.judges import make_metrics
from dit_accel.commands.models import target_device
from dit_accel.eval.quality import METRICS, Metric, Score, SetMetric
from dit_accel.eval.quality.files import is_lossy
from dit_accel.eval.quality.folders import (
    MetricSummary,
    Pair,
    check_sizes,
    judge_pairs,
    list_hash,
    others,
    pair_files,
    summarise_metric,
)
from dit_accel.eval.quality.metrics import SetScore, missing_packages
from dit_accel.eval.records import to_json
from dit_accel.eval.report.tables import MISSING, format_table, number
from dit_accel.methods import parse_method_call

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """What was found over all pairs.

    Args:
        pairs: how many.
        identical: how many of them are the same in every value.
        metrics: of single clips, by name.
        sets: of all clips together, by name.
    """

    pairs: int
    identical: int
    metrics: Mapping[str, MetricSummary]
    sets: Mapping[str, Score]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, help="folder (or file) of pictures or clips, such as those of dense")
    parser.add_argument("test", type=Path, help="folder (or file) of the same names, sizes and frame counts")
    parser.add_argument(
        "--metric",
        action="append",
        help=f"name or name(option=value, ...), repeat for several (default {', '.join(METRICS)})",
    )
    parser.add_argument("--device", default="cpu", help="where metrics are computed (default cpu)")
    parser.add_argument("--output", type=Path, help="JSON lines: one of each pair, the summary last; replaced")


def run(options: argparse.Namespace) -> int:
    chosen = make_metrics(parse_method_call(text, "metric") for text in options.metric or METRICS)
    names = [metric.name for metric in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"--metric must name each metric once, got {', '.join(names)}.")
    device = target_device(options.device)
    pairs = pair_files(options.reference, options.test)
    for remark in _remarks(options.reference, options.test, pairs):
        print(remark)
    check_sizes(pairs)
    with _lines(options.output) as write:
        outcome = _judge(pairs, chosen, device, write)
        write({"summary": dataclasses.asdict(outcome) | {"list_hash": list_hash(pairs)}})
    print(f"{outcome.pairs} pairs, {outcome.identical} of them identical; file list {list_hash(pairs)}")
    print(format_table([_row(metric, outcome) for metric in chosen]))
    for reason, count in _reasons(outcome).items():
        print(f"skipped in {count} of {outcome.pairs} pairs: {reason}")
    return 0


def _judge(pairs: Sequence[Pair], chosen: Sequence[Metric | SetMetric], device: torch.device, write: Write) -> Outcome:
    metrics = [metric for metric in chosen if isinstance(metric, Metric)]
    sets = [metric for metric in chosen if isinstance(metric, SetMetric)]
    lacks = {metric.name: missing_packages(metric.name, metric.dependencies) for metric in sets}
    running = {metric.name: metric.start() for metric in sets if not lacks[metric.name]}
    scores: dict[str, list[Score]] = {metric.name: [] for metric in metrics}
    identical = 0
    for judged in tqdm(judge_pairs(pairs, metrics, [*running.values()], device), total=len(pairs), unit="pair"):
        write(dataclasses.asdict(judged))
        identical += judged.identical
        for name, score in judged.scores.items():
            scores[name].append(dataclasses.replace(score, values=()))  # a number a pair is all that is kept
    names = [pair.name for pair in pairs]
    return Outcome(
        pairs=len(pairs),
        identical=identical,
        metrics={metric.name: summarise_metric(metric, names, scores[metric.name]) for metric in metrics},
        sets={name: running[name].result() if name in running else Score(None, skipped=lacks[name]) for name in lacks},
    )


@contextmanager
def _lines(path: Path | None) -> Iterator[Write]:
    """Writes JSON lines to a file, or nowhere."""
    if path is None:
        yield lambda item: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield lambda item: print(json.dumps(to_json(item), allow_nan=False, ensure_ascii=False), file=file, flush=True)


def _remarks(reference: Path, test: Path, pairs: Sequence[Pair]) -> Iterator[str]:
    """What a reader of the scores has to know of the files."""
    lossy = {path.suffix.lower() for pair in pairs for path in (pair.reference, pair.test) if is_lossy(path)}
    if lossy:
        kinds = " and ".join(sorted(lossy))
        yield f"{kinds} files may be compressed with a loss, which the scores contain; keep raw frames as .npz or .png."
    for folder in (reference, test):
        left_out = others(folder) if folder.is_dir() else []
        if left_out:
            names = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
            yield f"left out of {folder}, neither pictures nor clips: {len(left_out)} ({names})."


def _row(metric: Metric | SetMetric, outcome: Outcome) -> dict[str, str]:
    label = f"{metric.name} [{metric.unit}]" if metric.unit else metric.name
    if isinstance(metric, SetMetric):
        score = outcome.sets[metric.name]
        samples = f"all ({score.samples} samples)" if isinstance(score, SetScore) else "all"
        return _cells(label, samples, number(score.value, ".4g"), MISSING, MISSING, MISSING, MISSING)
    found = outcome.metrics[metric.name]
    interval = f" [{found.interval.low:.4g}, {found.interval.high:.4g}]" if found.interval else ""
    return _cells(
        label,
        f"{found.count} ({found.infinite} infinite)" if found.infinite else str(found.count),
        number(found.mean, ".4g") + interval,
        _figure(found.median),
        _figure(found.fifth),
        _figure(found.worst),
        found.worst_name or MISSING,
    )


def _cells(*cells: str) -> dict[str, str]:
    heads = ("metric", "pairs", "mean of finite [95 %]", "median", "5th percentile", "worst", "worst pair")
    return dict(zip(heads, cells, strict=True))


def _figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _reasons(outcome: Outcome) -> dict[str, int]:
    """Pairs without a score, by reason."""
    by_pair = {reason: count for found in outcome.metrics.values() for reason, count in found.skipped.items()}
    return by_pair | {score.skipped: outcome.pairs for score in outcome.sets.values() if score.skipped}
