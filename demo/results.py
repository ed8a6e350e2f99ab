"""Runs on this machine, and their report with some of the methods."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_accel.commands.report import heads_of
from dit_accel.eval.records import Record
from dit_accel.eval.report.run import Run, load_run
from dit_accel.eval.report.run_page import write_run_report

ROOTS = ("runs", "outputs", "eval/results")  # below the working directory
_MOST = 200  # runs that are listed


def find_runs(roots: Iterable[Path]) -> list[Path]:
    """Run folders and files of records below some folders, the latest first; what is neither is left out."""
    found = [
        path if path.name != "records.jsonl" and not path.name.startswith("records-") else path.parent
        for root in roots
        for path in root.rglob("*.jsonl")
        if not path.name.startswith(("failures", "sets"))
    ]
    latest = sorted(dict.fromkeys(found), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in latest[:_MOST] if _is_run(path)]


def methods_of(paths: Sequence[Path]) -> list[str]:
    """Names of the sparse methods in some runs."""
    records = (record for path in paths for record in load_run(path).records)
    return sorted({record["method"] for record in records if record["method"] != "dense"})


def write_report(paths: Sequence[Path], methods: Sequence[str], folder: Path, token: str) -> dict[str, Path]:
    """The report of some runs with some methods and dense attention, as files whose names begin with ``token``.

    Args:
        paths: of the runs.
        methods: names; none: all.
        folder: to write in.
        token: first part of the names.

    Returns:
        The page, the table and the records: "page", "table", "records".

    Raises:
        ValueError: no run, or what the report refuses.
    """
    runs = [_only(load_run(path), methods) for path in paths]
    report = folder / "report"
    write_run_report(report, runs, heads_of)
    names = {"page": "index.html", "table": "summary.csv", "records": "records.jsonl"}
    with (report / names["records"]).open("wb") as joined:
        for path in paths:
            for file in [path] if path.is_file() else sorted(path.glob("records*.jsonl")):
                with file.open("rb") as records:
                    shutil.copyfileobj(records, joined)
    return {kind: (report / name).replace(folder / f"{token}-{name}") for kind, name in names.items()}


def _only(run: Run, methods: Sequence[str]) -> Run:
    """The run with dense attention and these methods."""

    def shown(record: Record) -> bool:
        return not methods or record["method"] in (*methods, "dense")

    return dataclasses.replace(run, records=[record for record in run.records if shown(record)])


def _is_run(path: Path) -> bool:
    try:
        return bool(load_run(path).records)
    except ValueError:  # records of something else, such as a benchmark
        return False
