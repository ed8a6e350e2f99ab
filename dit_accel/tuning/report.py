"""What a search found: words, a table, records and a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_accel.eval.records import to_json
from dit_accel.eval.report.tables import format_table, number
from dit_accel.methods.actions import Assignment
from dit_accel.tuning.meter import Point


def in_words(assignment: Assignment) -> list[str]:
    """One line per action: its share of the attention calls, and the steps and blocks where some head takes it."""
    lines = []
    for index, action in enumerate(assignment.actions):
        taken = assignment.table == index
        share = float(taken.double().mean())
        if share:
            steps, blocks = (taken.any(-1).any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            lines.append(f"{share:6.1%}  {action}, steps {ranges(steps)}, blocks {ranges(blocks)}")
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as ``0-3, 7``."""
    parts: list[list[int]] = []
    for value in numbers:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def table(curve: Sequence[Point], best: Point, dense_seconds: float) -> str:
    """The points of a curve, predicted and measured; the plan's is marked."""
    return format_table([_row(point, point is best, dense_seconds) for point in curve])


def _row(point: Point, chosen: bool, dense_seconds: float) -> dict[str, str]:
    measured, predicted = point.measured, point.predicted
    frames = measured.psnr is not None
    quality = None if predicted is None else predicted.quality(frames)
    style = (".1f", " dB") if frames else (".4f", "")
    return {
        "": "plan" if chosen else "",
        "predicted speed-up": number(None if predicted is None else dense_seconds / predicted.seconds, ".2f", "×"),
        "measured": number(measured.speedup, ".2f", "×"),
        "denoise": number(measured.seconds, ".2f", " s"),
        "predicted PSNR" if frames else "predicted error": number(quality, *style),
        "measured PSNR" if frames else "measured error": number(
            measured.psnr if frames else measured.relative_error, *style
        ),
        "density": number(measured.density, ".1%"),
    }


def write_curve(path: Path, curve: Sequence[Point], best: Point, facts: Mapping[str, Any]) -> None:
    """One JSON line per point, the mildest first, each with the facts of the search."""
    lines = [
        {
            "plan": point is best,
            "multiplier": point.multiplier,
            "predicted": None if point.predicted is None else dataclasses.asdict(point.predicted),
            "measured": dataclasses.asdict(point.measured),
            "actions": {str(action): share for action, share in _shares(point.assignment).items()},
            **facts,
        }
        for point in curve
    ]
    path.write_text("".join(json.dumps(to_json(line), ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _shares(assignment: Assignment) -> dict[object, float]:
    """Share of the calls that take each action."""
    counts = torch.bincount(assignment.table.flatten().long(), minlength=len(assignment.actions))
    return dict(zip(assignment.actions, (counts / assignment.table.numel()).tolist(), strict=True))


def plot(path: Path, curve: Sequence[Point], best: Point, dense_seconds: float, title: str) -> bool:
    """Quality against speed-up, predicted and measured; False where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    frames = best.measured.psnr is not None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.add_subplot()
    measured = sorted((p.measured.speedup, _quality(p)) for p in curve)
    predicted = sorted(
        (dense_seconds / p.predicted.seconds, quality)
        for p in curve
        if p.predicted is not None and (quality := p.predicted.quality(frames)) is not None
    )
    panel.plot(*zip(*measured, strict=True), marker="o", label="measured")
    if predicted:
        panel.plot(*zip(*predicted, strict=True), marker="x", linestyle="--", label="predicted")
    panel.plot(best.measured.speedup, _quality(best), marker="*", markersize=16, linestyle="none", label="the plan")
    panel.axvline(1, color="0.4", linestyle=":")
    panel.set_xlabel("times as fast as dense attention (denoising loop)")
    panel.set_ylabel("PSNR against dense attention, dB" if frames else "relative error of the latents")
    panel.set_title(title, fontsize=9)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def _quality(point: Point) -> float:
    measured = point.measured
    return measured.relative_error if measured.psnr is None else measured.psnr
