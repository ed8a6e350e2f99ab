"""Rows of a benchmark on disk, as a table, and as a picture of rate against density."""

from __future__ import annotations

import importlib.util
import json
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dit_accel.eval.bench.run import Row
from dit_accel.eval.machine import machine, source_version, versions
from dit_accel.eval.report.tables import MISSING, format_table

PEERS = ("flash-attn-4", "xformers")
PANELS_PER_LINE = 2
LABEL_WIDTH = 36


def facts(command: str, matmul_tflops: float) -> dict[str, Any]:
    """What every line of a run repeats: where, from what source, by which command, and the ceiling measured there."""
    found = versions()
    for package in PEERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "matmul_tflops": matmul_tflops,
        "command": command,
        "machine": machine(),
        "versions": found,
        "commit": source_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(path: Path, rows: Iterable[Mapping[str, Any]], shared: Mapping[str, Any]) -> None:
    """One JSON line per row, at the end of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({**row, **shared}) + "\n" for row in rows)
    with path.open("a") as file:  # at once: a run that is stopped leaves whole lines
        file.write(lines)


def read(path: Path, keys: frozenset[str] = Row.__required_keys__) -> list[dict[str, Any]]:
    """The lines of a file that ``append`` wrote, of rows that have ``keys``.

    Raises:
        ValueError: when a line is not a row of a benchmark.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not keys <= row.keys():
            raise ValueError(f"line {number} of {path} is not a benchmark row, got {line[:60]!r}; remove that line.")
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The operators of one case under its densities; those without a speed are listed below with the reason."""
    shown = [_cells(row) for row in rows if row["refused"] is None]
    without = [f"  {row['operator']}: no speed, {row['refused']}" for row in rows if row["refused"] is not None]
    densities = [
        f"{rows[0]['listed_density']:.1%} of all pairs in listed tiles of {'x'.join(map(str, rows[0]['tile']))}"
    ]
    densities += {f"{row['density']:.1%} counted by the exact rule" for row in rows if row["counted"] == "exact rule"}
    return "\n".join([", ".join(densities), *([format_table(shown)] if shown else []), *without])


def _cells(row: Row) -> dict[str, str]:
    seconds, iqr, error, dense_error = row["seconds"], row["seconds_iqr"], row["error"], row["dense_error"]
    assert seconds is not None and iqr is not None and error is not None and dense_error is not None
    return {
        "operator": row["operator"],
        "ms": f"{seconds * 1e3:.2f}",
        "± %": f"{50 * iqr / seconds:.1f}",
        "TFLOP/s": _text(row["tflops"], ".0f" if (row["tflops"] or 0) >= 10 else ".3f"),
        "× dense": _text(row["speedup"], ".2f"),
        "error × dense's": f"{error / dense_error:.2f}" if dense_error else MISSING,
        "MHz": _text(row["clock_mhz"], ".0f"),
        "W": _text(row["power_w"], ".0f"),
        "GiB": _text(None if row["working_bytes"] is None else row["working_bytes"] / 2**30, ".2f"),
    }


def _text(value: float | None, style: str) -> str:
    return MISSING if value is None else f"{value:{style}}"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Useful TFLOP/s against density, one panel per group of cases; below, speed-ups of cases that make no curve.

    Raises:
        ValueError: when no row has a speed, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the picture needs the package matplotlib; pip install 'dit-accel[eval]'.")
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["tflops"] is not None]
    if not timed:
        raise ValueError("the records hold no row with a speed; run `dit-accel bench kernels` first.")
    colours = {name: f"C{number % 10}" for number, name in enumerate(dict.fromkeys(row["operator"] for row in timed))}
    cases_of: dict[str, set[str]] = {}
    for row in timed:
        cases_of.setdefault(row["group"], set()).add(row["case"])
    groups = [group for group, cases in cases_of.items() if group and len(cases) > 1]
    single = [row for row in timed if row["group"] not in groups and not row["dense"] and row["speedup"] is not None]
    lines = -(-len(groups) // PANELS_PER_LINE)
    figure = Figure(figsize=(13, 4.2 * (lines + bool(single))), layout="constrained")
    grid = figure.add_gridspec(lines + bool(single), PANELS_PER_LINE)
    for number, group in enumerate(groups):
        panel = figure.add_subplot(grid[divmod(number, PANELS_PER_LINE)])
        _curves(panel, [row for row in timed if row["group"] == group], colours)
        panel.set_title(group, fontsize=9)
    if single:
        _bars(figure.add_subplot(grid[lines, :]), single, colours)
    figure.suptitle(timed[0]["machine"].get("gpu", timed[0]["machine"]["cpu"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _curves(panel: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    panel.axhline(rows[0]["matmul_tflops"], color="0.4", linestyle=":", label="matrix product")
    for name in dict.fromkeys(row["operator"] for row in rows):
        own = sorted((row["density"], row["tflops"]) for row in rows if row["operator"] == name)
        if any(row["dense"] for row in rows if row["operator"] == name):
            panel.axhline(statistics.median(rate for _, rate in own), color=colours[name], linestyle="--", label=name)
        else:
            panel.plot(*zip(*own, strict=True), color=colours[name], marker="o", label=name)
    panel.set_xscale("log")
    panel.set_xlim(0.03, 1.2)
    ticks = sorted({round(row["density"], 2) for row in rows if not row["dense"]})
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("density")
    panel.set_ylabel("useful TFLOP/s")
    panel.legend(fontsize=7, ncols=2)


def _bars(panel: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["operator"] for row in rows))
    labels = ["\n".join(textwrap.wrap(case, LABEL_WIDTH)) for case in cases]
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        own = [row for row in rows if row["operator"] == name]
        places = [cases.index(row["case"]) + number * height for row in own]
        panel.barh(places, [row["speedup"] for row in own], height, color=colours[name], label=name)
    panel.axvline(1, color="0.4", linestyle="--")
    panel.set_yticks([place + 0.4 - height / 2 for place in range(len(cases))], labels, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("times as fast as the fastest dense kernel")
    panel.legend(fontsize=7)
