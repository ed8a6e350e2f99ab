"""`dit-accel bench training`: rates as the journal tells them, against the fastest dense run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_accel.cli import main
from dit_accel.commands import bench_training, train
from dit_accel.commands.bench_training import Setting
from dit_accel.eval.bench.training import Journal, TrainingCase, TrainingRow, training_table
from dit_accel.eval.bench.training import bench_training as measure
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dense import kernel_of
from dit_accel.plugin import apply

CPU = torch.device("cpu")


def journal(*rates: float) -> Journal:
    return [
        {"step": 5 * number, "seconds": float(number), "loss": 1 / number, "tokens_per_second": rate}
        for number, rate in enumerate(rates, start=1)
    ]


def crash() -> Journal:
    raise RuntimeError("no such kernel\nand a long trace")


def measured(**runs: Journal) -> dict[str, TrainingRow]:
    waiting = {name: lambda found=found: found for name, found in runs.items()}
    case = TrainingCase("a case", 16, "eager", 2, 256, waiting, frozenset({"dense", "slow"}))
    return {row["method"]: row for row in measure(case, CPU)}


def test_rates_are_medians_without_the_first_line_and_speed_ups_of_the_fastest_dense_run() -> None:
    rows = measured(slow=journal(1, 50), dense=journal(1, 90, 100, 500), sparse=journal(9, 300, 300))
    assert rows["dense"]["tokens_per_second"] == 100 and rows["dense"]["steps"] == 15
    assert rows["dense"]["step_seconds"] == pytest.approx(2 * 256 / 100)
    assert rows["dense"]["warmup_seconds"] == 1 and rows["dense"]["loss"] == 1 / 4
    assert rows["sparse"]["speedup"] == 3 and rows["slow"]["speedup"] == 0.5
    assert {row["best_dense"] for row in rows.values()} == {"dense"}
    assert "3.00" in training_table([*rows.values()])


def test_a_crash_is_recorded_in_one_line_and_the_others_are_measured() -> None:
    case = TrainingCase("a case", 16, "eager", 1, 256, {"dense": crash, "sparse": lambda: journal(1, 5)})
    failed, sparse = measure(case, CPU)
    assert failed["refused"] == "it failed with RuntimeError: no such kernel" and failed["tokens_per_second"] is None
    assert sparse["tokens_per_second"] == 5 and sparse["speedup"] is None


def test_names_are_unique() -> None:
    names = [setting.name for setting in bench_training.GPU_SETTINGS]
    assert len(set(names)) == len(names)


def test_the_command_trains_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting(8, "eager", 1, ("dense", "dense(kernel='_native_math')"), ("log_linear(top_k=2)",))
    monkeypatch.setattr(bench_training, "LINES", 3)
    monkeypatch.setattr(bench_training, "CPU_SETTINGS", (setting,))
    path = tmp_path / "training.jsonl"
    applied: list[AttnMethod] = []

    def noted(denoiser: nn.Module, method: AttnMethod, **options: Any) -> object:
        applied.append(method)
        return apply(denoiser, method, **options)

    monkeypatch.setattr(train, "apply", noted)
    assert main(["bench", "training", "--output", str(path)]) == 0
    dense, by_kernel, sparse = rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert dense["method"] == "dense" and [row["dense"] for row in rows] == [True, True, False]
    assert [kernel_of(method) for method in applied] == ["_native_math", None], "plain dense is the denoiser's own"
    for row in rows:
        assert row["steps"] == 2 and row["tokens"] == 64 and row["commit"] and row["machine"]
        assert row["tokens_per_second"] > 0 and row["loss"] < 10
    rivals = [row["tokens_per_second"] for row in (dense, by_kernel)]
    assert sparse["speedup"] == pytest.approx(sparse["tokens_per_second"] / max(rivals))
    assert setting.name in capsys.readouterr().out
    assert main(["bench", "training", "--output", str(path)]) == 0
    assert len(path.read_text().splitlines()) == len(rows)


def test_a_resumed_run_answers_for_its_own_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_training, "LINES", 3)
    monkeypatch.setattr(bench_training, "CPU_SETTINGS", (Setting(8, "eager", 1, ("dense",), ("log_linear(top_k=0)",)),))
    path = tmp_path / "training.jsonl"
    assert main(["bench", "training", "--output", str(path)]) == 1
    refused = [json.loads(line)["refused"] for line in path.read_text().splitlines()]
    assert refused[0] is None and refused[1].startswith("it failed with ValueError")
    assert main(["bench", "training", "--output", str(path)]) == 0
