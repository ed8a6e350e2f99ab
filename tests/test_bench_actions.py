"""`dit-accel bench actions`: each action on one attention module, a speed only for an output that is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_accel.cli import main
from dit_accel.commands import bench_actions
from dit_accel.eval.bench import actions
from dit_accel.eval.bench.actions import ActionRow, Module, Published, action_table
from dit_accel.eval.bench.run import Effort

CPU = torch.device("cpu")
NAMES = ["stock", "full", "ASC", "WA-RS", "WA-RS+ASC", "AST"]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    for name, value in {"HEADS": 2, "HEAD_DIM": 8, "SIDES": {"cpu": (20,)}}.items():
        monkeypatch.setattr(bench_actions, name, value)
    return bench_actions.module(20, CPU, torch.float32)


def measured(module: Module) -> dict[str, ActionRow]:
    rows = actions.bench_actions(module, CPU, Effort(rounds=1, turn_seconds=0.0))
    return {row["action"]: row for row in rows}


def test_every_action_is_right_and_timed(module: Module) -> None:
    rows = measured(module)
    assert list(rows) == NAMES
    assert all(row["seconds"] and row["refused"] is None for row in rows.values())
    assert all(row["error"] is not None and row["error"] < 1e-6 for row in rows.values() if row["action"] != "stock")
    assert rows["stock"]["share"] == 1.0
    assert rows["ASC"]["rule_share"] == rows["ASC"]["tile_share"] == 0.5
    assert [rows[name]["kept_bytes"] for name in ("full", "ASC")] == [0, 0]
    assert rows["WA-RS"]["kept_bytes"] == rows["AST"]["kept_bytes"] == 2 * 400 * 16 * 4
    assert "paper's time" in action_table([*rows.values()])


def test_on_the_input_of_the_full_step_actions_repeat_it_and_sharing_one_half_of_it(module: Module) -> None:
    outputs = {case.name: case.step() for case in module.cases}
    stock = module.stock()
    torch.testing.assert_close(outputs["full"], stock)
    torch.testing.assert_close(outputs["AST"], stock)
    torch.testing.assert_close(outputs["WA-RS"], stock)
    for shared in ("ASC", "WA-RS+ASC"):
        torch.testing.assert_close(outputs[shared], stock[:1].repeat(2, 1, 1))


def test_an_action_whose_output_is_wrong_has_no_speed(module: Module) -> None:
    first, *others = module.cases

    def wrong() -> Tensor:
        return first.step() * 1.001

    def crash() -> Tensor:
        raise RuntimeError("no such kernel\nand a long trace")

    rows = measured(replace(module, cases=[replace(first, step=wrong), replace(others[0], step=crash), *others[1:]]))
    assert rows["full"]["seconds"] is None and "away from the stock module's" in str(rows["full"]["refused"])
    assert rows["ASC"]["refused"] == "it failed with no such kernel"
    assert rows["AST"]["seconds"] is not None
    assert action_table([*rows.values()]).count("no speed") == 2


def test_published_figures_are_of_the_sizes_measured_on_gpus() -> None:
    sizes = {tokens for tokens, _ in bench_actions.PUBLISHED}
    assert sizes == {side**2 for side in bench_actions.SIDES["cuda"]}
    assert bench_actions.PUBLISHED[4096, "WA-RS"] == Published(flops=51, seconds=54)
    assert {name for _, name in bench_actions.PUBLISHED} <= set(bench_actions.ACTIONS)


def test_the_command_writes_records(module: Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "actions.jsonl"
    assert main(["bench", "actions", "--quick", "--output", str(path)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["action"] for line in lines] == NAMES
    assert all(line["commit"] and line["machine"] and line["versions"] for line in lines)
    assert module.name in capsys.readouterr().out
    assert main(["bench", "actions", "--cases", "nothing"]) == 2
