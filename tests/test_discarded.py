"""Discarded softmax mass: averaging calls, records, and the heat map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_accel.eval.colours import colour_map
from dit_accel.eval.discarded import DiscardedMass, average, discarded_of, gather
from dit_accel.eval.records import Job, RecordWriter, make_record, read_records
from dit_accel.eval.report import heat_map, heat_map_scale

BLOCKS, STEPS, HEADS, BATCH, GROUPS = 3, 4, 2, 2, 5


@dataclass(frozen=True)
class Call:
    step: int
    block: int
    mass: Tensor


@pytest.fixture
def calls() -> list[Call]:
    """Two branches of every block but the first, at every step but the first."""
    make = torch.Generator().manual_seed(0)
    return [
        Call(step, block, torch.rand(BATCH, HEADS, GROUPS, generator=make))
        for step in range(1, STEPS)
        for block in range(1, BLOCKS)
        for _ in range(2)
    ]


def test_means_are_those_of_the_calls(calls: list[Call]) -> None:
    for sample, mass in enumerate(gather(calls, blocks=BLOCKS, steps=STEPS, batch=BATCH)):
        for block in range(BLOCKS):
            for head in range(HEADS):
                own = [call.mass[sample, head].mean().item() for call in calls if call.block == block]
                assert mass.by_head[block, head] == pytest.approx(np.mean(own) if own else math.nan, nan_ok=True)
        for step in range(STEPS):
            own = [call.mass[sample].mean().item() for call in calls if call.step == step]
            assert mass.by_step[step] == pytest.approx(np.mean(own) if own else math.nan, nan_ok=True)
        assert mass.mean == pytest.approx(np.mean([call.mass[sample].mean().item() for call in calls]))
        assert mass.by_head[mass.worst] == np.nanmax(mass.by_head)


def test_guidance_branches_in_one_call_are_those_of_each_sample(calls: list[Call]) -> None:
    pairs = zip(calls[::2], calls[1::2], strict=True)
    batched = [Call(one.step, one.block, torch.cat([one.mass, two.mass])) for one, two in pairs]
    apart = gather(calls, blocks=BLOCKS, steps=STEPS, batch=BATCH)
    for mass, want in zip(gather(batched, blocks=BLOCKS, steps=STEPS, batch=BATCH), apart, strict=True):
        np.testing.assert_allclose(mass.by_head, want.by_head)
        np.testing.assert_allclose(mass.by_step, want.by_step)


def test_a_run_without_sparse_calls_has_none_and_extra_steps_have_room() -> None:
    assert gather([], blocks=1, steps=1) == []
    (mass,) = gather([Call(5, 0, torch.full((1, 1, 2), 0.25))], blocks=1, steps=3)
    assert mass.by_step.tolist()[5] == 0.25


def test_average_over_prompts_keeps_what_is_dense() -> None:
    first = DiscardedMass(np.array([[math.nan], [0.2]]), np.array([math.nan, 0.2]))
    second = DiscardedMass(np.array([[math.nan], [0.4]]), np.array([math.nan, 0.4]))
    both = average([first, second])
    assert both.by_head.tolist()[1] == pytest.approx([0.3])
    assert math.isnan(both.by_head[0, 0])
    assert str(both) == "mean 30.0%, most 30.0% in block 1, head 0"


def test_records_keep_it(tmp_path: Path) -> None:
    mass = DiscardedMass(np.array([[math.nan, math.nan], [0.125, 0.5], [0.25, 0]]), np.array([math.nan, 0.25]))
    job = Job(method="radial", model="shapes", prompt="a", seed=0, size=(1, 8, 8), steps=2, guidance=1.0)
    RecordWriter(tmp_path / "r.jsonl").append(make_record(job, timings={}, quality=mass.scores(), densities={}))
    (record,) = read_records(tmp_path / "r.jsonl")
    read = discarded_of(record["quality"], heads=2)
    assert read is not None
    np.testing.assert_array_equal(read.by_head, mass.by_head)
    np.testing.assert_array_equal(read.by_step, mass.by_step)
    assert record["quality"]["discarded_mass"]["value"] == mass.mean == 0.21875
    assert discarded_of({}, heads=2) is None


def test_scale_is_the_most_of_any_method_rounded_up() -> None:
    masses = [DiscardedMass(np.array([[most, math.nan]]), np.array([0.001])) for most in (0.03, 0.11)]
    assert heat_map_scale(masses) == 0.2
    assert heat_map_scale(masses[:1]) == 0.05
    assert heat_map_scale([DiscardedMass(np.array([[0.7]]), np.array([0.7]))]) == 1.0


def test_heat_map_shows_each_cell_in_its_colour() -> None:
    by_head = np.array([[0.0, 0.1, 0.2], [0.3, 0.4, math.nan]])
    picture = np.asarray(heat_map(DiscardedMass(by_head, np.array([0.4, math.nan, 0.0])), scale=0.4))
    left, width, top, row = 42, 120, 36, 24
    for block in range(2):
        for head in range(3):
            pixel = picture[top + row * block + row // 2, left + width * head + width // 2]
            want = (44, 52, 62) if math.isnan(by_head[block, head]) else colour_map(by_head[block, head] / 0.4)
            np.testing.assert_array_equal(pixel, want)
    steps = picture[top + 2 * row + 12 + 24 + row // 2, [left + 60, left + 180, left + 300]]
    np.testing.assert_array_equal(steps, [colour_map(np.array(1.0)), (44, 52, 62), colour_map(np.array(0.0))])


@pytest.mark.parametrize("blocks", [1, 8, 60], ids=str)
@pytest.mark.parametrize("heads", [1, 40], ids=str)
def test_heat_map_fits_any_model(blocks: int, heads: int) -> None:
    picture = heat_map(DiscardedMass(np.full((blocks, heads), 0.5), np.full(50, 0.5)))
    assert picture.width == 414
    assert picture.height <= 12 + 480 + 3 * 36 + 48


def test_heat_map_refuses_a_scale_outside_shares() -> None:
    with pytest.raises(ValueError, match=r"scale must be in \(0, 1\], got 0"):
        heat_map(DiscardedMass(np.zeros((1, 1)), np.zeros(1)), scale=0)
