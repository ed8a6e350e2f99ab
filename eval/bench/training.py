"""Training with the attention of a method beside training with dense attention, by the journals of short runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch

from dit_accel.eval.report.tables import MISSING, format_table

Journal = Sequence[Mapping[str, Any]]
Mode = Literal["compiled", "eager"]


@dataclass(frozen=True)
class TrainingCase:
    """One model, size and mode.

    Args:
        name: unique among those measured.
        side: of the square image in pixels.
        mode: whether its blocks are compiled.
        batch, tokens: samples of a step, tokens of a sample.
        runs: method -> a short run, which returns its journal: lines with ``step``, ``seconds``, ``loss`` and
            ``tokens_per_second`` of the steps since the line before.
        dense: the runs that are baselines.
    """

    name: str
    side: int
    mode: Mode
    batch: int
    tokens: int
    runs: Mapping[str, Callable[[], Journal]]
    dense: frozenset[str] = frozenset({"dense"})


class TrainingRow(TypedDict):
    """One method in one case. A result that is not there is None."""

    case: str
    method: str
    dense: bool
    side: int
    mode: Mode
    batch: int
    tokens: int
    refused: str | None  # why there is no speed
    tokens_per_second: float | None  # median of the journal's lines but the first, in which compilation falls
    step_seconds: float | None
    steps: int | None  # behind that median
    warmup_seconds: float | None  # of the first line
    loss: float | None  # of the last line
    peak_bytes: int | None  # most that was allocated
    speedup: float | None  # against the fastest dense run of the case
    best_dense: str | None


def bench_training(case: TrainingCase, device: torch.device) -> list[TrainingRow]:
    """The rows of one case, in the order of its runs, one after another; one that fails has no speed."""
    rows = [_measured(case, method, run, device) for method, run in case.runs.items()]
    dense = [(row["tokens_per_second"], row["method"]) for row in rows if row["dense"] and row["tokens_per_second"]]
    if dense:
        fastest, name = max(dense)
        for row in rows:
            if row["tokens_per_second"] is not None:
                row["speedup"], row["best_dense"] = row["tokens_per_second"] / fastest, name
    return rows


def _measured(case: TrainingCase, method: str, run: Callable[[], Journal], device: torch.device) -> TrainingRow:
    row = TrainingRow(
        case=case.name,
        method=method,
        dense=method in case.dense,
        side=case.side,
        mode=case.mode,
        batch=case.batch,
        tokens=case.tokens,
        refused=None,
        tokens_per_second=None,
        step_seconds=None,
        steps=None,
        warmup_seconds=None,
        loss=None,
        peak_bytes=None,
        speedup=None,
        best_dense=None,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        first, *lines = run()
    except Exception as error:  # a kernel may raise anything, and the others are still to be measured
        row["refused"] = f"it failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return row
    rate = statistics.median(float(line["tokens_per_second"]) for line in lines)
    row["tokens_per_second"], row["step_seconds"] = rate, case.batch * case.tokens / rate
    row["steps"], row["loss"] = lines[-1]["step"] - first["step"], lines[-1]["loss"]
    row["warmup_seconds"] = first["seconds"]
    row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return row


def training_table(rows: Sequence[TrainingRow]) -> str:
    """The methods of one case; those without a speed are listed below with the reason."""
    without = [f"  {row['method']}: no speed, {row['refused']}" for row in rows if row["refused"] is not None]
    shown = [
        {
            "method": row["method"],
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "step ms": f"{1e3 * (row['step_seconds'] or 0):.1f}",
            "× dense": MISSING if row["speedup"] is None else f"{row['speedup']:.2f}",
            "steps": str(row["steps"]),
            "loss": f"{row['loss']:.3f}",
            "GiB": MISSING if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        }
        for row in rows
        if row["tokens_per_second"] is not None
    ]
    return "\n".join([*([format_table(shown)] if shown else []), *without])
