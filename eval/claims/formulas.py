"""From a record to the figure that stands beside a published one: a table of named functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dit_accel.eval.bench.steps import upper_bound

Row = Mapping[str, Any]
Better = Literal["higher", "lower", "same"]
Depends = Literal["GPU", "architecture", "nothing"]

UNITS: dict[str, str] = {  # how a figure of that unit is written
    "times": "{} ×",
    "ms": "{} ms",
    "s": "{} s",
    "min": "{} min",
    "%": "{} %",
    "dB": "{} dB",
    "tokens/s": "{} tokens/s",
    "images/s": "{} images/s",
    "TFLOP/s": "{} TFLOP/s",
    "PFLOP": "{} PFLOP",
    "score": "{}",
}


def figure(value: float, unit: str) -> str:
    """Three digits or, of a large figure, all before the point."""
    digits = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return UNITS[unit].format(digits)


@dataclass(frozen=True)
class Found:
    """What a formula is given.

    Args:
        row: that was selected.
        rows: all of its run.
        baseline: the paper's dense kernel as the record calls it; "" where that is not known.
        steps, dense_steps: of the published run; None where it is no run.
    """

    row: Row
    rows: Sequence[Row]
    baseline: str = ""
    steps: int | None = None
    dense_steps: float | None = None


@dataclass(frozen=True)
class Answer:
    """Our figure.

    Args:
        value: in the formula's unit.
        detail: what was measured.
        count: how often, or on how many.
        dense: the fastest dense baseline of the same run and its figure.
        bound: the value that a kernel as fast as that baseline would reach; None where none follows.
        beside_paper: the value against the paper's own dense kernel; None where that was not run.
        only: the dense kernel, where no other was tried; "" where several were.
    """

    value: float
    detail: str
    count: str
    dense: str
    bound: float | None = None
    beside_paper: float | None = None
    only: str = ""


@dataclass(frozen=True)
class Formula:
    """A function of a record.

    Args:
        unit: of its value.
        better: which values are better.
        depends: what two values must share to be compared: the GPU, its architecture, or nothing.
        compute: the function; text says why there is no value.
        needs: fields of the row that may be empty, and then there is no value.
    """

    unit: str
    better: Better
    depends: Depends
    compute: Callable[[Found], Answer | str]
    needs: tuple[str, ...] = ()


_DENSE_TRAINING = {
    "dense": "torch's choice",
    "dense:_native_cudnn": "cuDNN",
}  # what a record calls it -> how it is said


def milliseconds(seconds: float) -> str:
    return figure(1e3 * seconds, "ms")


def _call(found: Found, seconds: float, detail: str) -> Answer:
    row = found.row
    dense = row["speedup"] * row["seconds"]
    same = (other for other in found.rows if other["case"] == row["case"])
    papers = next((other["seconds"] for other in same if other["operator"] == found.baseline), None)
    return Answer(
        value=dense / seconds,
        detail=detail,
        count=f"{row['rounds']} turns",
        dense=f"{row['best_dense']}, {milliseconds(dense)}",
        bound=1 / row["density"],
        beside_paper=None if papers is None else papers / seconds,
    )


def _speedup(found: Found) -> Answer:
    seconds = found.row["seconds"]
    return _call(found, seconds, milliseconds(seconds))


def _graph_speedup(found: Found) -> Answer:
    seconds = found.row["graph_seconds"]
    return _call(found, seconds, f"{milliseconds(seconds)}, replayed from a CUDA graph")


def _sparsity(found: Found) -> Answer:
    return Answer(100 * (1 - found.row["density"]), "", "exact count", "")


def _action_time(found: Found) -> Answer:
    row = found.row
    stock = row["graph_seconds"] / row["graph_share"]
    return Answer(
        value=100 * row["graph_share"],
        detail=f"{milliseconds(row['graph_seconds'])} replayed from a CUDA graph; called one by one {row['share']:.0%}",
        count=f"{row['rounds']} turns",
        dense=f"diffusers' own module, {milliseconds(stock)}",
        bound=100 * row["tile_share"],
    )


def _action_operations(found: Found) -> Answer:
    return Answer(100 * found.row["rule_share"], "", "exact count", "")


def _dense_training(found: Found) -> list[Row]:
    """Dense runs of the same size and mode that have a rate, the fastest one first."""
    same = ("side", "batch", "tokens", "mode")
    dense = [
        row for row in found.rows if row["method"].startswith("dense") and row.get("tokens_per_second") is not None
    ]
    rivals = [row for row in dense if all(row.get(key) == found.row[key] for key in same)]
    return sorted(rivals, key=lambda row: -float(row["tokens_per_second"]))


def _training_speedup(found: Found) -> Answer | str:
    row, dense = found.row, _dense_training(found)
    if not dense:
        return "no dense run of this case has a rate"
    best, method = dense[0], str(dense[0]["method"])
    name = _DENSE_TRAINING.get(method, method)
    return Answer(
        value=row["tokens_per_second"] / best["tokens_per_second"],
        detail=f"{figure(row['tokens_per_second'], 'tokens/s')}, {row['mode']}",
        count=f"{row['steps']} steps",
        dense=f"{name}, {figure(best['tokens_per_second'], 'tokens/s')}",
        only=name if len(dense) == 1 else "",
    )


def _training_rate(found: Found) -> Answer:
    row, ratio = found.row, _training_speedup(found)
    dense = "" if isinstance(ratio, str) else ratio.dense
    return Answer(row["tokens_per_second"], row["mode"], f"{row['steps']} steps", dense)


def _step_speedup(found: Found) -> Answer:
    """Against the fastest row of the case that computes every pair, by a dense kernel or by a method at density 1."""
    row = found.row
    same = [other for other in found.rows if other["case"] == row["case"] and other["seconds"] is not None]
    exact = [other for other in same if other["dense"] or (other["density"] == 1.0 and other["forwards"] == 1)]
    best = min(exact, key=lambda other: float(other["seconds"]))
    part = "" if row["blocks"] == row["model_blocks"] else f", {row['blocks']} of {row['model_blocks']} layers"
    bounded = row["bound"] is not None
    return Answer(
        value=best["seconds"] / row["seconds"],
        detail=f"{milliseconds(row['seconds'])} a step{part}",
        count=f"{row['rounds']} rounds",
        dense=f"{best['operator']}, {milliseconds(best['seconds'])}",
        bound=upper_bound(best["attention_seconds"] / best["seconds"], row["density"]) if bounded else None,
    )


def _run_speedup(found: Found) -> Answer:
    """Of a run whose first steps are dense: seconds add up."""
    assert found.steps is not None and found.dense_steps is not None, "of a run, says the schema"
    step, dense_share = _step_speedup(found), found.dense_steps / found.steps

    def of_run(speedup: float) -> float:
        return 1 / (dense_share + (1 - dense_share) / speedup)

    return replace(step, value=of_run(step.value), bound=None if step.bound is None else of_run(step.bound))


FORMULAS: dict[str, Formula] = {
    "speedup": Formula("times", "higher", "architecture", _speedup, ("speedup",)),
    "graph_speedup": Formula("times", "higher", "architecture", _graph_speedup, ("speedup", "graph_seconds")),
    "sparsity": Formula("%", "same", "nothing", _sparsity),
    "run_speedup": Formula("times", "higher", "architecture", _run_speedup, ("speedup",)),
    "action_time": Formula("%", "lower", "architecture", _action_time, ("graph_share",)),
    "action_operations": Formula("%", "same", "nothing", _action_operations),
    "training_speedup": Formula("times", "higher", "architecture", _training_speedup, ("tokens_per_second",)),
    "training_rate": Formula("tokens/s", "higher", "GPU", _training_rate, ("tokens_per_second",)),
}
