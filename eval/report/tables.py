"""Figures of records as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dit_accel.eval.records import Record

MISSING = "–"


def speed_up(record: Record, baseline: Record) -> float | None:
    """Denoise time of the baseline over this record's, None where one of them is missing."""
    ours, theirs = record["timings"].get("denoise"), baseline["timings"].get("denoise")
    return None if ours is None or theirs is None else theirs / ours


def summary(record: Record, baseline: Record, label: str | None = None) -> dict[str, str]:
    """One row of the comparison table, column heading -> text.

    Args:
        record: the row's result.
        baseline: the dense result that the speed-up is against.
        label: the first cell. Default: the method's name.
    """
    timings, densities = record["timings"], record["densities"]
    return {
        "method": label or record["method"],
        "denoise": number(timings.get("denoise"), ".2f", " s"),
        "attention": number(timings.get("attention"), ".2f", " s"),
        "speed-up": number(speed_up(record, baseline), ".2f", "×"),
        "density": number(densities.get("executed"), ".1%"),
        "PSNR": _quality(record, "psnr", ".1f", " dB"),
        "SSIM": _quality(record, "ssim", ".3f"),
        "prompt accuracy": _quality(record, "prompt_accuracy", ".0%"),
    }


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as an aligned Markdown table, which a terminal shows well too; "" without rows.

    Columns are those of the first row, the first one flush left and the others flush right.

    Raises:
        ValueError: when a row has other columns than the first.
    """
    if not rows:
        return ""
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise ValueError(f"row {number} must have the columns {columns}, got {list(row)}.")
    cells = [columns, *([row[column].replace("|", "\\|") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths) for row in cells]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], _line(rule, widths), *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.rjust(width) if number else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join([first, *rest])} |"


def _quality(record: Record, metric: str, style: str, unit: str = "") -> str:
    return number(record["quality"].get(metric, {}).get("value"), style, unit)


def number(value: float | None, style: str, unit: str = "") -> str:
    """A figure as text: missing where there is none, infinity as "identical", which a PSNR without error is."""
    if value is None:
        return MISSING
    return "identical" if math.isinf(value) else f"{value:{style}}{unit}"
