"""The benchmark: a speed only for what is right, the same for all, and counted as it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_accel.cli import main
from dit_accel.commands import bench
from dit_accel.eval.bench import operators as peers
from dit_accel.eval.bench.cases import Case, RandomLists, random_lists
from dit_accel.eval.bench.operators import OPERATORS, Operator, e4m3_rounded, every_pair
from dit_accel.eval.bench.report import append, plot, read, table
from dit_accel.eval.bench.run import TRAINING_FACTOR, Effort, Row, bench_case
from dit_accel.eval.power import Sample, during, parse
from dit_accel.eval.speed import measure_in_turns
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.reference import token_mask
from dit_accel.layout import TokenLayout
from dit_accel.methods.neighborhood import NeighborhoodAttnProcessor

CPU = torch.device("cpu")
ONCE = Effort(rounds=1, turn_seconds=0.0)
LISTS = RandomLists((1, 1, 300), heads=2, head_dim=16, densities=(0.5,))
CASE = next(iter(LISTS.cases()))
TRAINING = next(iter(replace(LISTS, training=True).cases()))


def right(inputs: Inputs) -> Tensor:
    return block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.plan, backend="torch")


def one_key_tile_short(inputs: Inputs) -> Tensor:
    return right(replace(inputs, plan=replace(inputs.plan, counts=inputs.plan.counts - 1)))


def unwritten_last_row(inputs: Inputs) -> Tensor:
    out = right(inputs).clone()
    out[:, -1] = torch.nan
    return out


def crash(inputs: Inputs) -> Tensor:
    raise RuntimeError("no such kernel\nand a long trace")


class HalvedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient / 2


def wrong_gradient(inputs: Inputs) -> Tensor:
    return right(replace(inputs, v=HalvedGradient.apply(inputs.v)))


def operator(attend: object, name: str = "under test") -> Operator:
    return Operator(name, lambda inputs: None, attend)  # type: ignore[arg-type]


def run(case: Case, *operators: Operator) -> list[Row]:
    return bench_case(case, operators, CPU, torch.float32, ONCE)


@pytest.mark.parametrize(
    ("case", "attend"),
    [
        (CASE, one_key_tile_short),
        (CASE, unwritten_last_row),
        (TRAINING, one_key_tile_short),
        (TRAINING, wrong_gradient),
    ],
    ids=["a key tile too few", "NaN", "training, a key tile too few", "training, a wrong gradient"],
)
def test_an_operator_that_is_wrong_has_no_speed(case: Case, attend: object) -> None:
    wrong, good = run(case, operator(attend), operator(right, "right"))
    assert wrong["refused"] is not None and wrong["refused"].startswith("its error is")
    assert wrong["seconds"] is wrong["tflops"] is wrong["speedup"] is None
    assert good["refused"] is None and good["seconds"] is not None
    printed = table([wrong, good])
    assert "under test: no speed, its error is" in printed and "| under test" not in printed


def test_a_crash_is_recorded_in_one_line_and_the_others_are_measured() -> None:
    crashed, good = run(CASE, operator(crash), operator(right, "right"))
    assert crashed["refused"] == "it failed with RuntimeError: no such kernel"
    assert good["tflops"] is not None


def test_an_operator_that_cannot_run_says_what_it_needs() -> None:
    refused, _ = run(CASE, Operator("picky", lambda inputs: "a GPU", crash), operator(right))
    assert refused["refused"] == "it needs a GPU" and refused["error"] is None


def test_rates_count_useful_pairs_and_speed_ups_are_against_the_fastest_dense() -> None:
    slow = replace(OPERATORS["sdpa"], name="slow dense", attend=lambda inputs: OPERATORS["sdpa"].attend(inputs) + 0)
    rows = {row["operator"]: row for row in run(CASE, operator(right), OPERATORS["sdpa"], slow)}
    flops = 4.0 * CASE.heads * CASE.layout.num_tokens**2 * CASE.head_dim
    plan = CASE.make_plan(CPU)
    assert rows["under test"]["counted"] == "listed tiles"
    assert rows["sdpa"]["counted"] == "every pair" and rows["sdpa"]["density"] == 1
    fastest = min(rows["sdpa"]["seconds"] or 0, rows["slow dense"]["seconds"] or 0)
    for name, density in (("under test", plan.density), ("sdpa", 1.0)):
        seconds, tflops, speedup = rows[name]["seconds"], rows[name]["tflops"], rows[name]["speedup"]
        assert seconds and tflops == pytest.approx(flops * density / seconds / 1e12)
        assert speedup == pytest.approx(fastest / seconds)


def test_training_counts_the_backward_s_products_too() -> None:
    (row,) = run(TRAINING, operator(right))
    assert row["refused"] is None and row["seconds"] and row["tflops"]
    flops = TRAINING_FACTOR * 4.0 * TRAINING.heads * TRAINING.layout.num_tokens**2 * TRAINING.head_dim
    assert row["tflops"] == pytest.approx(flops * row["density"] / row["seconds"] / 1e12)


def test_windows_count_the_pairs_of_the_exact_rule() -> None:
    layout = TokenLayout((3, 10, 12), 7, "prefix")
    method = NeighborhoodAttnProcessor(window=(3, 5, 5))
    plan = method.plan(layout)
    assert plan is not None
    case = replace(CASE, layout=layout, make_plan=lambda device: plan)
    case = replace(case, density=layout.joint_density(method.ideal_density(layout)))
    (row,) = run(case, operator(right))
    assert row["refused"] is None and row["counted"] == "exact rule"
    assert row["density"] == pytest.approx(float(token_mask(plan).double().mean()))
    assert row["density"] < row["listed_density"] == plan.density


def test_eight_bit_operators_are_measured_with_an_eight_bit_stick() -> None:
    def rounding(inputs: Inputs) -> Tensor:
        return right(replace(inputs, q=e4m3_rounded(inputs.q), k=e4m3_rounded(inputs.k), v=e4m3_rounded(inputs.v)))

    as_native, as_fp8 = run(CASE, operator(rounding), replace(operator(rounding, "8-bit"), precision="fp8"))
    assert as_native["refused"] is not None and as_fp8["refused"] is None
    assert as_fp8["error"] is not None and 0.01 < as_fp8["error"] < 0.2


@pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("box", [None, (1, 4, 8)], ids=["raster", "boxes"])
def test_random_lists_are_even_and_differ_by_head(density: float, box: tuple[int, int, int] | None) -> None:
    layout = TokenLayout((2, 13, 20))
    tiles = layout.boxes(box) if box else layout.raster(32)
    plan = random_lists(layout, tiles, 3, density)(CPU)
    assert plan.counts.unique().tolist() == [max(1, round(density * tiles.num_tiles))]
    assert plan.counts.shape[1] == 3
    mask = plan.tile_mask()
    assert density == 1 or not torch.equal(mask[:, 0], mask[:, 1])
    assert torch.equal(mask, random_lists(layout, tiles, 3, density)(CPU).tile_mask())


def test_one_tile_of_every_pair_keeps_every_pair() -> None:
    plan = every_pair(37, CPU)
    assert bool(token_mask(plan).all()) and plan.density == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own_and_both_runs_have_some(device: str) -> None:
    cases = bench.all_cases(torch.device(device))
    assert len({case.name for case in cases}) == len(cases)
    assert 0 < sum(case.quick for case in cases) < len(cases)
    assert set(peers.DEFAULT[device]) <= OPERATORS.keys()


def test_turns_alternate_and_are_reported() -> None:
    order: list[str] = []
    turns: list[str] = []
    times = measure_in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=3,
        on_turn=lambda name, begin, end: turns.append(name),
    )
    assert order == ["a", "a", "b", "b", *"abbaab"]
    assert turns == [*"abbaab"]
    assert [len(timing.runs) for timing in times.values()] == [3, 3]
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure_in_turns({}, rounds=0)


def test_clock_and_power_are_those_of_an_operator_s_own_turns() -> None:
    lines = ["2026/11/22 19:35:32.500, 1500, 690.25", "2026/11/22 19:35:33.000, 1980, [N/A]", "2026/11/22 19:3"]
    first, cut, unfinished = map(parse, lines)
    assert cut is None and unfinished is None
    assert first is not None and first[1:] == (1500, 690.25)
    samples = [first, Sample(first.time + 1, 1700, 500), Sample(first.time + 2, 1600, 600)]
    spans = [(first.time - 0.1, first.time + 0.1), (first.time + 1.9, first.time + 2.1)]
    assert during(samples, spans) == (1550, 645.125)
    assert during(samples, [(0, 1)]) is None


def test_records_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.jsonl"
    rows = run(CASE, operator(right), operator(crash, "crash"))
    append(path, rows[:1], {"matmul_tflops": 1.0})
    append(path, rows[1:], {"matmul_tflops": 1.0})
    assert read(path) == [{**row, "matmul_tflops": 1.0} for row in rows]
    path.write_text(path.read_text() + '{"case": 1}\n')
    with pytest.raises(ValueError, match=r"line 3 of .* is not a benchmark row"):
        read(path)


def test_the_command_checks_times_records_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.jsonl"
    arguments = ["bench", "kernels", "--quick", "--operators", "torch,sdpa", "--output", str(path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "no speed" not in printed
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["operator"] for record in records} == {"torch", "sdpa"}
    assert all(record["matmul_tflops"] > 0 and record["versions"]["torch"] for record in records)
    assert any(record["group"] == "" for record in records)  # a method, drawn as a bar
    assert main(["bench", "plot", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_when_an_operator_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OPERATORS, "torch", operator(one_key_tile_short, "torch"))
    assert main(["bench", "kernels", "--quick", "--cases", "raster", "--operators", "torch,sdpa"]) == 1
    assert "torch: no speed, its error is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--operators", "cudann"], "there is no operator 'cudann'"),
        (["kernels", "--cases", "nothing"], "no case matches --cases 'nothing'"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row with a speed"):
        plot(list(run(CASE, operator(crash))), tmp_path / "picture.png")
