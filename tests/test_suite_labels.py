"""What tables call a tuned plan: the file it came from, and which plan that file held."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dit_accel.commands.suite_plan import Entry, _method_entry
from dit_accel.eval.report.part import short_names
from dit_accel.eval.suite.schema import Setting
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import FULL, REUSE, Assignment
from dit_accel.tuned_plan import Guidance, Metric, TunedModel, TunedPlan

GRID = (1, 8, 8)
MODEL: Any = SimpleNamespace(name="tiny", layout=lambda request: TokenLayout(GRID))


def entry(path: Path, steps: list[int]) -> Entry:
    """What a suite makes of a plan of one block that is written to the path."""
    TunedPlan(
        assignment=Assignment((FULL, REUSE), torch.tensor(steps, dtype=torch.int16).view(-1, 1, 1)),
        model=TunedModel("SomeTransformer", "0123456789abcdef"),
        scheduler="SomeScheduler",
        guidance=Guidance("batched", 4.5),
        grids=(GRID, GRID),
        metric=Metric("relative error", 0.05),
        measured={},
    ).save(path)
    return _method_entry(str(path), MODEL, Setting(name="small"), MODEL)


def test_a_plan_tuned_again_at_the_same_place_has_a_label_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    first, again, same = (entry(path, steps) for steps in ([0, 1], [0, 0], [0, 1]))
    assert first.label == same.label != again.label
    assert first.label.startswith(f"{path}(") and first.method.options()["plan"][:8] in first.label
    assert short_names([first.label]) == {first.label: str(path)}
    assert short_names([first.label, again.label]) == {label: label for label in (first.label, again.label)}
