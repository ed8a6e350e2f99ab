"""`dit-accel bench methods`: whole calls, a speed only for what another backend confirms, and the picture of growth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_accel.cli import main
from dit_accel.commands import bench_methods
from dit_accel.commands.bench_methods import GPU_SETTINGS, Setting
from dit_accel.eval.bench.calls import CallCase, CallRow, bench_call, call_table, plot_growth
from dit_accel.eval.bench.operators import OPERATORS
from dit_accel.eval.bench.run import Effort
from dit_accel.layout import TokenLayout

CPU = torch.device("cpu")
ONCE = Effort(rounds=1, turn_seconds=0.0)
SETTING = Setting("small", "radial", TokenLayout((3, 8, 9)), 2, 16, {"density": 0.5, "tile": 32})


def rows(case: CallCase) -> list[CallRow]:
    return bench_call(case, [OPERATORS["sdpa"], OPERATORS["cudnn"]], CPU, torch.float32, ONCE)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_method_is_timed_beside_dense_attention_that_the_machine_has(training: bool) -> None:
    case = replace(SETTING, training=training).case(CPU)
    method, *dense = rows(case)
    assert [row["operator"] for row in dense] == ["sdpa"]
    assert method["operator"] == "radial(density=0.5, tile=32)"
    assert method["density"] == pytest.approx(case.density)
    assert method["error"] is not None and method["error"] < 1e-6
    assert method["seconds"] and dense[0]["seconds"]
    assert method["speedup"] == pytest.approx(dense[0]["seconds"] / method["seconds"])
    assert "× dense" in call_table([method, *dense])


def test_a_method_that_another_backend_contradicts_has_no_speed() -> None:
    right = SETTING.case(CPU)

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right.attend(q, k, v) * 1.001

    method, dense = rows(replace(right, attend=wrong))
    assert method["seconds"] is None
    assert method["refused"] is not None and "away from another backend's" in method["refused"]
    assert "no speed" in call_table([method, dense])


def test_a_crash_is_written_down_and_the_others_are_timed() -> None:
    def crash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand a long trace")

    method, dense = rows(replace(SETTING.case(CPU), attend=crash))
    assert method["refused"] == "it failed with RuntimeError: no such kernel"
    assert dense["seconds"] is not None


def test_all_methods_of_one_case_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(SETTING, options={"density": 0.5})
    assert changed.name == SETTING.name and changed.operator != SETTING.operator
    monkeypatch.setattr(bench_methods, "CPU_SETTINGS", (SETTING, changed))
    path = tmp_path / "methods.jsonl"
    assert main(["bench", "methods", "--quick", "--output", str(path)]) == 0
    operators = [json.loads(line)["operator"] for line in path.read_text().splitlines()]
    assert {SETTING.operator, changed.operator} < {*operators}


def test_every_setting_for_gpus_names_a_method_that_serves_its_layout() -> None:
    for setting in GPU_SETTINGS:
        if setting.layout.num_tokens < 100_000:
            assert 0 < setting.case(CPU).density < 1, setting


def test_records_and_the_picture_of_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [TokenLayout((1, 8, columns)) for columns in (16, 32)]
    monkeypatch.setattr(
        bench_methods, "CPU_SETTINGS", tuple(replace(SETTING, layout=layout, group="curve") for layout in sizes)
    )
    path = tmp_path / "methods.jsonl"
    assert main(["bench", "methods", "--quick", "--output", str(path)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [128, 128, 256, 256]
    assert all(line["commit"] and line["machine"] for line in lines)
    assert main(["bench", "plot", str(path)]) == 0
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no group of two sizes"):
        plot_growth(lines[:2], tmp_path / "none.png")
