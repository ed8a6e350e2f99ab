"""`dit-accel bench steps`: whole forwards, a speed only for what is finite, counted against the fastest dense run."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_accel.cli import main
from dit_accel.commands import bench_steps
from dit_accel.commands.bench_steps import GPU_SETTINGS, Setting, make_case, settings, shortened
from dit_accel.eval.bench.steps import (
    Candidate,
    Forwards,
    Rounds,
    StepCase,
    StepRow,
    bench_step,
    step_table,
    upper_bound,
)
from dit_accel.pipelines.specs import SPECS
from dit_accel.plugin import apply

CPU = torch.device("cpu")
ONCE = Rounds(fewest=1, most=1, seconds=0.0)
SETTING = Setting("shapes", 96, 128, 9, ("radial(density=1.0)", "radial(density=0.3)", "dit_fast_attn(every=2)"), 2)
NATIVE = "dense(kernel='native')"


@dataclass(frozen=True)
class Told:
    attention_seconds: float
    density: float


def candidate(
    name: str, attention: float = 0.0, density: float = 1.0, value: float = 1.0, **changes: object
) -> Candidate:
    def run() -> Forwards:
        return Forwards(torch.full((4,), value), Told(attention, density))

    return replace(Candidate(name, name.startswith("dense"), run, run), **changes)  # type: ignore[arg-type]


def crash() -> Forwards:
    raise RuntimeError("no such kernel\nand a long trace")


def case(*candidates: Candidate) -> StepCase:
    return StepCase("tiny", "a model", 1, 96, 0, 2, 16, torch.float32, 4, 4, 1000, 0.5, candidates)


def measured(*candidates: Candidate) -> dict[str, StepRow]:
    return {row["operator"]: row for row in bench_step(case(*candidates), CPU, ONCE)}


@pytest.mark.parametrize(
    ("attention", "density", "bound"),
    [(0.8, 0.25, 2.5), (0.5, 1.0, 1.0), (0.0, 0.1, 1.0), (1.0, 0.1, 10.0)],
)
def test_the_bound_is_the_time_that_a_perfect_kernel_leaves(attention: float, density: float, bound: float) -> None:
    assert upper_bound(attention, density) == pytest.approx(bound)
    dense_seconds = 3.0
    rest, products = dense_seconds * (1 - attention), dense_seconds * attention
    assert upper_bound(attention, density) == pytest.approx(dense_seconds / (rest + density * products))


def test_speed_ups_and_bounds_are_against_the_fastest_dense_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.eval.bench import steps

    seconds = {"dense slow": 4.0, "dense fast": 2.0, "sparse": 1.0, "plan": 1.0}
    real = steps.measure_in_turns

    def timed(fns: dict[str, Callable[[], object]], **options: object) -> object:
        found = real(fns, **options)  # type: ignore[arg-type]
        return {name: replace(timing, median=seconds[name]) for name, timing in found.items()}

    monkeypatch.setattr(steps, "measure_in_turns", timed)
    rows = measured(
        candidate("dense slow", attention=3.0),
        candidate("dense fast", attention=1.5),
        candidate("sparse", attention=0.6, density=0.2),
        candidate("plan", attention=0.5, density=0.5, forwards=4, attention_only=False),
    )
    assert {row["best_dense"] for row in rows.values()} == {"dense fast"}
    assert rows["sparse"]["speedup"] == 2.0 and rows["dense slow"]["speedup"] == 0.5
    assert rows["sparse"]["bound"] == pytest.approx(1 / (0.25 + 0.75 * 0.2))
    assert rows["dense fast"]["bound"] == 1.0
    assert rows["sparse"]["rest_seconds"] == pytest.approx(0.4)
    assert rows["plan"]["seconds"] == 0.25 and rows["plan"]["attention_seconds"] == 0.125
    assert rows["plan"]["bound"] is None, "it saves projections too"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_output_that_is_not_finite_has_no_speed(value: float) -> None:
    rows = measured(candidate("dense"), candidate("broken", value=value))
    assert rows["broken"]["refused"] == "its output is not finite"
    assert rows["broken"]["seconds"] is rows["broken"]["speedup"] is None
    assert "broken: no speed, its output is not finite" in step_table([*rows.values()])


@pytest.mark.parametrize("when", ["warm", "run"])
def test_a_crash_is_recorded_in_one_line_and_the_others_are_measured(when: str) -> None:
    rows = measured(candidate("dense", **{when: crash}), candidate("sparse", density=0.5))
    assert rows["dense"]["refused"] == "it failed with RuntimeError: no such kernel"
    assert rows["sparse"]["seconds"] is not None and rows["sparse"]["speedup"] is None


@pytest.mark.parametrize("seconds", [0.0, 40.0])
def test_a_case_in_which_everything_crashes_has_its_reasons(seconds: float) -> None:
    broken = case(candidate("dense", warm=crash), candidate("sparse", warm=crash))
    rows = bench_step(broken, CPU, Rounds(fewest=1, most=3, seconds=seconds))
    assert [(row["operator"], row["refused"]) for row in rows] == [
        (name, "it failed with RuntimeError: no such kernel") for name in ("dense", "sparse")
    ]
    assert all(row["seconds"] is row["speedup"] is None for row in rows)


def test_the_difference_is_relative_to_the_first_candidate_s_output() -> None:
    rows = measured(candidate("dense", value=2.0), candidate("sparse", value=3.0))
    assert rows["dense"]["output_difference"] == 0 and rows["sparse"]["output_difference"] == pytest.approx(0.5)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 9), (8.0, 5), (20.0, 3), (500.0, 3)])
def test_rounds_fit_the_time_but_are_never_fewer_than_three(seconds: float, rounds: int) -> None:
    assert Rounds(fewest=3, most=9, seconds=40.0).of(seconds) == rounds


@pytest.fixture(scope="module")
def rows() -> dict[str, StepRow]:
    return {row["operator"]: row for row in bench_step(make_case(SETTING, CPU, torch.float32), CPU, ONCE)}


def test_every_figure_of_a_real_forward_is_finite(rows: dict[str, StepRow]) -> None:
    assert len(rows) >= 4 and next(iter(rows)) == NATIVE
    for row in rows.values():
        figures = {name: value for name, value in row.items() if isinstance(value, int | float)}
        assert row["refused"] is None and all(abs(value) < float("inf") for value in figures.values()), row
        assert 0 < (row["attention_seconds"] or 0) < (row["seconds"] or 0)
        assert row["blocks"] == 2 and row["model_blocks"] == 8


def test_a_density_of_one_is_dense(rows: dict[str, StepRow]) -> None:
    whole, sparse = rows["radial(density=1.0)"], rows["radial(density=0.3)"]
    assert rows[NATIVE]["output_difference"] == 0
    assert whole["density"] == 1.0 and whole["bound"] == pytest.approx(1.0)
    assert whole["output_difference"] is not None and whole["output_difference"] < 1e-5
    assert sparse["density"] is not None and sparse["density"] < 1
    assert sparse["output_difference"] is not None and sparse["output_difference"] > 1e-4


def test_a_plan_is_timed_over_a_full_step_and_those_that_live_on_it(rows: dict[str, StepRow]) -> None:
    plan = rows["dit_fast_attn(every=2)"]
    assert plan["forwards"] == 2 and plan["bound"] is None
    assert 0 < (plan["density"] or 0) < 1.5


def test_candidates_share_their_weights_and_the_model_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[nn.Module] = []

    def watched(run: Any, method: Any) -> Any:
        models.append(run.transformer)
        return apply(run, method)

    monkeypatch.setattr(bench_steps, "apply", watched)
    found = make_case(replace(SETTING, methods=("radial(density=0.3)", "draft(density=0.3)")), CPU, torch.float32)
    assert len(models) == len(found.candidates) >= 3
    addresses = {tuple(parameter.data_ptr() for parameter in model.parameters()) for model in models}
    assert len(addresses) == 1
    assert found.model_bytes == sum(parameter.nbytes for parameter in models[0].parameters())
    bench_step(found, CPU, ONCE)
    weights = [weakref.ref(parameter) for parameter in models[0].parameters()]
    del found
    models.clear()
    gc.collect()
    assert all(weight() is None for weight in weights)


@pytest.mark.parametrize(
    "model", ["hunyuanvideo", "flux.1-dev", "sd3.5-medium", "pixart-sigma-1k", "dit-xl-2-512", "pixel-dit-s"]
)
def test_denoisers_of_every_family_are_measured(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPECS[model], heads=2, head_dim=16, ffn_dim=48)
    monkeypatch.setitem(SPECS, model, spec)
    side, frames = (12, 1) if spec.family == "pixel_dit" else (128, 1 if spec.num_frames == 1 else 9)
    methods = ("radial(density=1.0)", "draft(density=0.3, region=(1, 2, 2))", "dit_fast_attn(every=2)")
    case = make_case(Setting(model, side, side, frames, methods, blocks=2), CPU, torch.float32)
    rows = bench_step(case, CPU, ONCE)
    assert [row["refused"] for row in rows] == [None] * len(rows)
    radial, draft, plan = rows[-3:]
    assert radial["output_difference"] is not None and radial["output_difference"] < 1e-4
    assert draft["density"] is not None and 0 < draft["density"] < 1
    assert plan["forwards"] == 2 and plan["seconds"] is not None
    assert {row["text_tokens"] for row in rows} == {spec.text_tokens}
    assert {row["batch"] for row in rows} == {1 if model in ("hunyuanvideo", "flux.1-dev") else 2}


def test_a_shortened_model_has_the_ends_of_each_kind_and_is_whole_again() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(5))
    model.others = nn.ModuleList([nn.Linear(1, 1)])
    before = model.blocks
    with shortened(model):
        assert [*model.blocks] == [before[0], before[4]] and len(model.others) == 1
    assert model.blocks is before and len(before) == 5


@pytest.mark.parametrize("setting", GPU_SETTINGS, ids=lambda setting: setting.name)
def test_every_method_serves_its_size(setting: Setting) -> None:
    for method in bench_steps._sparse(setting):
        attention = method.attention(setting.layout)
        assert attention is not None and method.start_percent == 0
        assert 0 < attention.density <= 1


def test_cases_have_names_of_their_own_and_quick_ones_two_blocks() -> None:
    names = [setting.name for quick in (False, True) for setting in settings(torch.device("cuda"), quick)]
    assert len(set(names)) == len(names) == 2 * len(GPU_SETTINGS)
    quick = {setting.model: setting.spec for setting in settings(torch.device("cuda"), True)}
    assert (quick["hunyuanvideo"].blocks, quick["hunyuanvideo"].single_blocks) == (2, 2)
    assert (quick["wan2.1-14b"].blocks, quick["wan2.1-14b"].single_blocks) == (2, 0)


def test_the_command_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (replace(SETTING, methods=("radial(density=0.3)",), height=48, width=width) for width in (64, 80))
    monkeypatch.setattr(bench_steps, "CPU_SETTINGS", tuple(sizes))
    path = tmp_path / "steps.jsonl"
    arguments = ["bench", "steps", "--quick", "--output", str(path)]
    assert main(arguments) == 0
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row["commit"] and row["machine"] and row["matmul_tflops"] > 0 for row in rows)
    first = [line for line, row in zip(lines, rows, strict=True) if row["case"] == rows[0]["case"]]
    path.write_text("\n".join(first) + "\n")
    capsys.readouterr()
    assert main(arguments) == 0
    again = path.read_text().splitlines()
    assert again[: len(first)] == first and len(again) == len(lines)
    assert rows[0]["case"] not in capsys.readouterr().out
    assert main(arguments) == 0 and path.read_text().splitlines() == again


def test_a_model_without_room_is_told_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> StepCase:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB. GPU 0 has less.")

    monkeypatch.setattr(bench_steps, "cases", lambda *_: {"large": too_large, "tiny": lambda: case(candidate("dense"))})
    path = tmp_path / "steps.jsonl"
    main(["bench", "steps", "--quick", "--output", str(path)])
    shown = capsys.readouterr().out
    assert "large\n  no speed, there is no room for the model: CUDA out of memory\n" in shown
    assert {json.loads(line)["case"] for line in path.read_text().splitlines()} == {"tiny"}


def test_the_command_fails_when_a_method_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_steps, "CPU_SETTINGS", (replace(SETTING, methods=("neighborhood(window=(1, 99, 1))",)),))
    assert main(["bench", "steps"]) == 1
    assert "no speed, it failed with ValueError: window 99" in capsys.readouterr().out
    assert main(["bench", "steps", "--cases", "nothing"]) == 2
