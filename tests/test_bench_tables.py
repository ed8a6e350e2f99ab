"""Tables of the docs that stand on benchmark records: every figure is a record's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_accel.eval.bench.doc_tables import actions_table, kernels_table, methods_table, steps_table

GPU = {"machine": {"gpu": "1 x A GPU", "cpu": "a processor"}, "refused": None}


def written(folder: Path, file: str, *rows: dict[str, Any]) -> Path:
    (folder / file).write_text("".join(json.dumps(GPU | row) + "\n" for row in rows))
    return folder


def cells(table: str) -> list[list[str]]:
    """The rows below the heading, cell by cell."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def kernel(operator: str, seconds: float | None, **changes: Any) -> dict[str, Any]:
    tflops = None if seconds is None else 100 / seconds
    row = {"case": "random lists, a case", "operator": operator, "density": 0.25, "seconds": seconds, "tflops": tflops}
    return row | {"speedup": None if seconds is None else 0.8 / seconds} | changes


def test_kernels_are_compared_in_one_line_per_case(tmp_path: Path) -> None:
    refused = kernel("fa4", None, refused="its error is 1")
    folder = written(
        tmp_path, "bench-h200.jsonl", kernel("gluon", 0.2), refused, kernel("fa4 dense", 0.8), kernel("cudnn", 1.0)
    )
    text = kernels_table(folder)
    assert cells(text) == [["a case", "25.0%", "500", "–", "–", "125", "100", "4.00 ×", "5.00 ×"]]
    assert text.endswith(
        "1 x A GPU; `eval/results/bench-h200.jsonl`.\n- random lists, a case, `fa4`: no speed, its error is 1"
    )


def test_a_kernel_that_was_refused_has_no_ratio(tmp_path: Path) -> None:
    rows = [kernel("gluon", None, refused="it needs Hopper"), kernel("fa4 dense", 0.8), kernel("cudnn", 1.0)]
    text = kernels_table(written(tmp_path, "bench-h200.jsonl", *rows))
    assert cells(text) == [["a case", "25.0%", "–", "–", "–", "125", "100", "–", "–"]]


def test_of_a_case_measured_twice_the_newest_row_counts(tmp_path: Path) -> None:
    row = {"case": "a model", "operator": "draft", "seconds": 1.5, "attention_seconds": 0.05, "density": 0.25}
    row |= {"speedup": 2.0, "bound": 2.5, "rounds": 3}
    failed = row | {"refused": "no room"}
    text = steps_table(
        written(tmp_path, "steps-h200.jsonl", failed, row | {"operator": "dense"}, row | {"seconds": 1.0})
    )
    assert [line[1:3] for line in cells(text)] == [["`draft`", "1,000 ms"], ["`dense`", "1,500 ms"]]
    assert "no room" not in text


def test_methods_stand_beside_their_best_dense_time(tmp_path: Path) -> None:
    row = {"case": "a case", "operator": "draft", "group": "", "dense": False, "density": 0.1, "speedup": 5.0}
    row |= {"seconds": 0.02, "graph_seconds": 0.01}
    curve, dense = row | {"case": "of a curve", "group": "growth"}, row | {"operator": "cudnn", "dense": True}
    trained = row | {"operator": "log_linear", "graph_seconds": None}
    table = cells(methods_table(written(tmp_path, "methods-h200.jsonl", row, curve, dense, trained)))
    assert table == [
        ["a case", "`draft`", "10.0%", "20 ms", "10 ms", "100 ms", "5.0", "10.0"],
        ["a case", "`log_linear`", "10.0%", "20 ms", "–", "100 ms", "5.0", "–"],
    ]


def test_actions_stand_beside_the_published_share(tmp_path: Path) -> None:
    rows = [
        {"case": "a", "tokens": 1024, "action": "full", "graph_share": 1.0, "published_seconds": None},
        {"case": "a", "tokens": 1024, "action": "ASC", "graph_share": 0.6, "published_seconds": 59},
    ]
    assert cells(actions_table(written(tmp_path, "actions-h200.jsonl", *rows))) == [["1,024", "60%", "59%"]]


def test_steps_are_told_with_their_bound(tmp_path: Path) -> None:
    row = {"case": "a model", "operator": "draft", "seconds": 1.5, "attention_seconds": 0.05, "density": 0.25}
    row |= {"speedup": 2.0, "bound": 2.5, "rounds": 3}
    refused = dict.fromkeys(row) | {"case": "a model", "operator": "fa4", "refused": "no mask"}
    text = steps_table(written(tmp_path, "steps-h200.jsonl", row, refused))
    assert cells(text) == [["a model", "`draft`", "1,500 ms", "50 ms", "25.0%", "2.00", "2.50", "3"]]
    assert text.endswith("- a model, `fa4`: no speed, no mask")


@pytest.mark.parametrize("table", [kernels_table, methods_table, actions_table, steps_table])
def test_without_records_a_table_says_how_to_make_them(table: Callable[[Path], str], tmp_path: Path) -> None:
    assert table(tmp_path).startswith("*Not measured yet; `dit-accel reproduce --only ")
