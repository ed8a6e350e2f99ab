"""Fidelity of attention in a run: pooling calls, records, and the heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_accel.eval import fidelity
from dit_accel.eval.colours import colour_map
from dit_accel.eval.fidelity import COSINE, ENTRIES, ERROR, MASS, MEASURES, Fidelity, Profile, average, fidelity_of
from dit_accel.eval.records import Job, RecordWriter, make_record, read_records
from dit_accel.eval.report import heat_map, heat_map_scales
from dit_accel.methods.fidelity import OutputSums, ProbedCall, output_sums

BLOCKS, STEPS, HEADS, BATCH, GROUPS = 3, 4, 2, 2, 5


@dataclass(frozen=True)
class Call:
    """What a probed call was measured on: mass [B, H, groups] and outputs [B, groups, H, D]."""

    step: int
    block: int
    mass: Tensor
    sparse: Tensor
    dense: Tensor


def gather(calls: Sequence[Call], steps: int = STEPS, blocks: int = BLOCKS, batch: int = BATCH) -> list[Fidelity]:
    probed = [
        ProbedCall(call.step, call.block, None, call.mass, output_sums(call.sparse, call.dense)) for call in calls
    ]
    return fidelity.gather(probed, blocks=blocks, steps=steps, batch=batch)


@pytest.fixture
def calls() -> list[Call]:
    """Two branches of every block but the first, at every step but the first; steps differ in size."""
    make = torch.Generator().manual_seed(0)
    found = []
    for step in range(1, STEPS):
        for block in range(1, BLOCKS):
            for _ in range(2):
                mass = torch.rand(BATCH, HEADS, GROUPS, generator=make)
                sparse, dense = 10.0**step * torch.randn(2, BATCH, GROUPS, HEADS, 3, generator=make)
                found.append(Call(step, block, mass, sparse, dense))
    return found


def direct(calls: list[Call], sample: int, head: int) -> dict[str, float]:
    """The measures of one head from their definitions, over all queries of the calls at once; NaN without calls."""
    if not calls:
        return dict.fromkeys(MEASURES, math.nan)
    s = torch.cat([call.sparse[sample, :, head] for call in calls]).double()
    d = torch.cat([call.dense[sample, :, head] for call in calls]).double()
    return {
        MASS: torch.cat([call.mass[sample, head] for call in calls]).mean().item(),
        ERROR: ((s - d).norm() / d.norm()).item(),
        COSINE: torch.cosine_similarity(s.flatten(), d.flatten(), dim=0).item(),
    }


def test_a_head_is_measured_over_the_queries_of_all_its_calls(calls: list[Call]) -> None:
    for sample, run in enumerate(gather(calls)):
        for block in range(BLOCKS):
            for head in range(HEADS):
                want = direct([call for call in calls if call.block == block], sample, head)
                for name in MEASURES:
                    assert run[name].by_head[block, head] == pytest.approx(want[name], rel=1e-5, nan_ok=True)


def test_a_step_is_the_mean_over_its_blocks_and_heads(calls: list[Call]) -> None:
    for sample, run in enumerate(gather(calls)):
        for step in range(STEPS):
            cells = [
                direct([call for call in calls if (call.step, call.block) == (step, block)], sample, head)
                for block in range(1, BLOCKS)
                for head in range(HEADS)
            ]
            for name in MEASURES:
                want = np.mean([cell[name] for cell in cells])
                assert run[name].by_step[step] == pytest.approx(want, rel=1e-5, nan_ok=True)


def test_worst_is_the_most_error_and_the_least_cosine(calls: list[Call]) -> None:
    run = gather(calls)[0]
    assert run[MASS].by_head[run.worst(MASS)] == np.nanmax(run[MASS].by_head)
    assert run[ERROR].by_head[run.worst(ERROR)] == np.nanmax(run[ERROR].by_head)
    assert run[COSINE].by_head[run.worst(COSINE)] == np.nanmin(run[COSINE].by_head)


def test_guidance_branches_in_one_call_are_those_of_each_sample(calls: list[Call]) -> None:
    batched = [
        Call(
            one.step,
            one.block,
            torch.cat([one.mass, two.mass]),
            torch.cat([one.sparse, two.sparse]),
            torch.cat([one.dense, two.dense]),
        )
        for one, two in zip(calls[::2], calls[1::2], strict=True)
    ]
    apart = gather(calls)
    for run, want in zip(gather(batched), apart, strict=True):
        for name in MEASURES:
            np.testing.assert_allclose(run[name].by_head, want[name].by_head, rtol=1e-5)
            np.testing.assert_allclose(run[name].by_step, want[name].by_step, rtol=1e-5)


def test_a_run_without_sparse_calls_has_none_and_extra_steps_have_room() -> None:
    assert gather([]) == []
    out = torch.ones(1, 2, 1, 3)
    (run,) = gather([Call(5, 0, torch.full((1, 1, 2), 0.25), out, out)], steps=3, blocks=1, batch=1)
    assert [run[name].by_step[5] for name in (MASS, ERROR, COSINE)] == pytest.approx([0.25, 0, 1])


@pytest.mark.parametrize(
    ("sparse", "dense", "error", "cosine"),
    [
        pytest.param(0.0, 0.0, 0.0, 1.0, id="both zero"),
        pytest.param(0.0, 2.0, 1.0, 0.0, id="sparse zero"),
        pytest.param(2.0, 0.0, math.inf, 0.0, id="dense zero"),
        pytest.param(2.0, -2.0, 2.0, -1.0, id="opposite"),
        pytest.param(math.nan, 1.0, math.nan, math.nan, id="not a number"),
    ],
)
def test_every_pair_of_outputs_has_defined_values(sparse: float, dense: float, error: float, cosine: float) -> None:
    sums = output_sums(torch.full((1, 3, 1, 4), sparse), torch.full((1, 3, 1, 4), dense))
    assert sums.error.item() == pytest.approx(error, nan_ok=True)
    assert sums.error_l1.item() == pytest.approx(error, nan_ok=True)
    assert sums.cosine.item() == pytest.approx(cosine, nan_ok=True)


def test_sums_of_halves_add_up() -> None:
    sparse, dense = torch.randn(2, 2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = output_sums(sparse, dense)
    halves = zip(output_sums(sparse[:, :3], dense[:, :3]), output_sums(sparse[:, 3:], dense[:, 3:]), strict=True)
    joined = OutputSums(*(one + two for one, two in halves))
    torch.testing.assert_close(joined.error, whole.error)
    torch.testing.assert_close(joined.cosine, whole.cosine)


def profiles(by_head: list[list[float]], by_step: list[float], *names: str) -> Fidelity:
    return Fidelity({name: Profile(np.array(by_head), np.array(by_step)) for name in names or MEASURES})


def test_average_over_prompts_keeps_what_is_dense() -> None:
    first = profiles([[math.nan], [0.2]], [math.nan, 0.2])
    second = profiles([[math.nan], [0.4]], [math.nan, 0.4])
    both = average([first, second])
    for name in MEASURES:
        assert both[name].by_head.tolist()[1] == pytest.approx([0.3])
        assert math.isnan(both[name].by_head[0, 0])
    assert str(both) == (
        "softmax mass left out 30.0%, most 30.0% in block 1, head 0; "
        "relative error of the output 30.0%, most 30.0% in block 1, head 0; "
        "cosine to the dense output 0.3000, least 0.3000 in block 1, head 0"
    )
    assert average([first, profiles([[0.1], [0.2]], [0.1, 0.2], MASS)]).profiles.keys() == {MASS}


def test_records_keep_it(tmp_path: Path) -> None:
    run = profiles([[math.nan, math.nan], [0.125, 0.5], [0.25, 0]], [math.nan, 0.25])
    job = Job(method="radial", model="shapes", prompt="a", seed=0, size=(1, 8, 8), steps=2, guidance=1.0)
    RecordWriter(tmp_path / "r.jsonl").append(make_record(job, timings={}, quality=run.scores(), densities={}))
    (record,) = read_records(tmp_path / "r.jsonl")
    assert record["quality"].keys() == ENTRIES
    read = fidelity_of(record["quality"], heads=2)
    assert read is not None
    for name in MEASURES:
        np.testing.assert_array_equal(read[name].by_head, run[name].by_head)
        np.testing.assert_array_equal(read[name].by_step, run[name].by_step)
        assert record["quality"][name]["value"] == run[name].mean == 0.21875


@pytest.mark.parametrize(
    ("quality", "names"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param({"discarded_mass": {"value": 0.5}}, None, id="the mean alone"),
        pytest.param(
            {"discarded_mass": {"values": [0.5]}, "discarded_mass_by_step": {"values": [0.5]}}, {MASS}, id="mass alone"
        ),
    ],
)
def test_records_with_less_are_read(quality: dict[str, Any], names: set[str] | None) -> None:
    found = fidelity_of(quality, heads=1)
    assert (found and found.profiles.keys()) == names


def test_recorded_results_are_read() -> None:
    path = Path(__file__).parents[1] / "eval" / "results" / "attention-level-cpu.jsonl"
    found = {record["method"]: fidelity_of(record["quality"], heads=4) for record in read_records(path)}
    assert found.pop("dense") is None
    assert len(found) > 1
    assert all(run and run.profiles.keys() == MEASURES.keys() for run in found.values())


def test_scales_are_the_farthest_of_any_method_rounded_up() -> None:
    runs = [profiles([[most, math.nan]], [0.001], MASS, ERROR) for most in (0.03, 0.11)]
    assert heat_map_scales(runs) == {MASS: 0.2, ERROR: 0.2}
    assert heat_map_scales(runs[:1]) == {MASS: 0.05, ERROR: 0.05}
    assert heat_map_scales([profiles([[math.inf]], [0.7], ERROR)]) == {ERROR: 10}
    assert heat_map_scales([profiles([[0.97]], [0.99], COSINE)]) == {COSINE: 0.05}


def test_heat_map_shows_each_cell_in_its_colour() -> None:
    by_head = np.array([[1.0, 0.9, 0.8], [0.7, 0.6, math.nan]])
    run = Fidelity({COSINE: Profile(by_head, np.array([0.6, math.nan, 1.0]))})
    picture = np.asarray(heat_map(run, {COSINE: 0.4}))
    left, width, top, row = 42, 120, 36, 16
    for block in range(2):
        for head in range(3):
            pixel = picture[top + row * block + row // 2, left + width * head + width // 2]
            want = (44, 52, 62) if math.isnan(by_head[block, head]) else colour_map((1 - by_head[block, head]) / 0.4)
            np.testing.assert_array_equal(pixel, want)
    steps = picture[top + 2 * row + 12 + 24 + row // 2, [left + 60, left + 180, left + 300]]
    np.testing.assert_array_equal(steps, [colour_map(np.array(1.0)), (44, 52, 62), colour_map(np.array(0.0))])


@pytest.mark.parametrize("blocks", [1, 8, 60], ids=str)
@pytest.mark.parametrize("heads", [1, 40], ids=str)
def test_heat_map_fits_any_model(blocks: int, heads: int) -> None:
    picture = heat_map(profiles(np.full((blocks, heads), 0.5).tolist(), [0.5] * 50))
    assert picture.width == 414
    assert picture.height <= 12 + 3 * (240 + 36 + 16 + 36) + 16 + 36


def test_heat_map_refuses_a_scale_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="scale of discarded_mass must be positive, got 0"):
        heat_map(profiles([[0.0]], [0.0], MASS), {MASS: 0})
