"""Tables of the docs that stand on benchmark records: from the folder of the records to Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.eval.report.tables import MISSING, format_table

Row = Mapping[str, Any]
Cells = Mapping[str, str]

OPERATORS = ("gluon", "gluon fp8", "fa4", "fa4 dense", "cudnn")
OURS = "gluon"  # what the ratios of the operator's table are of


def not_measured(stage: str) -> str:
    """What stands where a table has no records."""
    return f"*Not measured yet; `dit-accel reproduce --only {stage}` does.*"


@dataclass(frozen=True)
class BenchTable:
    """A table of one benchmark: from the folder of the records to Markdown.

    Args:
        records: file in that folder.
        stage: of ``dit-accel reproduce``, which makes it.
        cells: from the newest row of each case and operator to those of the table.
    """

    records: str
    stage: str
    cells: Callable[[Sequence[Row]], list[Cells]]

    def __call__(self, results: Path) -> str:
        path = results / self.records
        rows = _newest(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
        if not rows:
            return not_measured(self.stage)
        machines = ", ".join(sorted({row["machine"].get("gpu", row["machine"]["cpu"]) for row in rows}))
        failed = [f"- {row['case']}, {_name(row)}: no speed, {row['refused']}" for row in rows if row["refused"]]
        return "\n".join([format_table(self.cells(rows)), "", f"{machines}; `eval/results/{self.records}`.", *failed])


def _newest(lines: Sequence[str]) -> list[Row]:
    """One row for each case and operator: a benchmark appends, and the last one counts."""
    rows = [json.loads(line) for line in lines]
    return [*{(row["case"], _name(row)): row for row in rows}.values()]


def _name(row: Row) -> str:
    return f"`{row['operator'] if 'operator' in row else row['action']}`"


def _of_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Case -> operator -> row, as recorded."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["operator"]] = row
    return found


def _kernels(rows: Sequence[Row]) -> list[Cells]:
    """Useful TFLOP/s of every operator, and what the 16-bit kernel gains over dense attention."""
    return [
        {
            "case": case.removeprefix("random lists, "),
            "density": f"{by[OURS]['density']:.1%}",
            **{f"`{name}`": _number(by.get(name, {}).get("tflops"), ".0f") for name in OPERATORS},
            f"`{OURS}` over best dense": _number(by[OURS]["speedup"], ".2f", " ×"),
            "over cuDNN": _ratio(by.get("cudnn"), by[OURS]),
        }
        for case, by in _of_case(rows).items()
    ]


def _methods(rows: Sequence[Row]) -> list[Cells]:
    """Whole calls of methods, those that make a curve left out."""
    return [
        {
            "case": row["case"],
            "method": f"`{row['operator']}`",
            "density": f"{row['density']:.1%}",
            "one by one": _milliseconds(row["seconds"]),
            "replayed": _milliseconds(row["graph_seconds"]),
            "best dense": _milliseconds(row["seconds"] * row["speedup"]),
            "× best dense": _number(row["speedup"], ".1f"),
            "replayed ×": _number(
                row["graph_seconds"] and row["seconds"] * row["speedup"] / row["graph_seconds"], ".1f"
            ),
        }
        for row in rows
        if not row["dense"] and not row["group"] and row["speedup"] is not None
    ]


def _actions(rows: Sequence[Row]) -> list[Cells]:
    """Time of actions replayed from graphs, as a share of the stock module's, beside the published one."""
    names = list(dict.fromkeys(row["action"] for row in rows if row["published_seconds"] is not None))
    by_size: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_size.setdefault(row["tokens"], {})[row["action"]] = row
    return [
        {"tokens": f"{tokens:,}"}
        | {
            heading: text
            for name in names
            for heading, text in (
                (name, _number(by[name]["graph_share"], ".0%")),
                (f"{name}, published", f"{by[name]['published_seconds']}%"),
            )
        }
        for tokens, by in by_size.items()
    ]


def _steps(rows: Sequence[Row]) -> list[Cells]:
    """Every way of attention in every model."""
    return [
        {
            "model": row["case"],
            "attention": f"`{row['operator']}`",
            "step": _milliseconds(row["seconds"]),
            "of it attention": _milliseconds(row["attention_seconds"]),
            "density": _number(row["density"], ".1%"),
            "× best dense": _number(row["speedup"], ".2f"),
            "bound": _number(row["bound"], ".2f"),
            "runs": str(row["rounds"]),
        }
        for row in rows
        if row["seconds"] is not None
    ]


def _ratio(slow: Row | None, fast: Row) -> str:
    if slow is None or slow["seconds"] is None or fast["seconds"] is None:
        return MISSING
    return f"{slow['seconds'] / fast['seconds']:.2f} ×"


def _number(value: float | None, style: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{style}}{unit}"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


kernels_table = BenchTable("bench-h200.jsonl", "kernels", _kernels)
methods_table = BenchTable("methods-h200.jsonl", "methods", _methods)
actions_table = BenchTable("actions-h200.jsonl", "actions", _actions)
steps_table = BenchTable("steps-h200.jsonl", "steps", _steps)
