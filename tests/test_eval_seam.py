"""Metrics of where the error lies: noise without borders, errors at borders, content that only looks like them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.eval.quality import Metric, Score, measure
from dit_accel.eval.quality.seam import border, seam, seam_step

SIZE = (12, 70, 101)  # no multiple of the tile
TILE = (4, 16, 16)
NAMES = {"seam": seam(TILE), "seam_step": seam_step(TILE), "border": border()}
each_metric = pytest.mark.parametrize("metric", NAMES.values(), ids=NAMES)


def score(metric: Metric, error: Tensor) -> Score:
    """Of a grey clip with this error, [T, H, W] or what expands to it."""
    target = torch.full((*SIZE, 3), 0.5)
    return measure(target + error.expand(SIZE)[..., None], target, [metric])[metric.name]


def noise(amount: float = 0.1) -> Tensor:
    return amount * (torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) - 0.5)


def beside_borders(axis: int) -> Tensor:
    """Which positions of an axis are next to a border inside it, as a mask that expands to the clip."""
    size, side = SIZE[axis], TILE[axis]
    mask = torch.zeros(size, dtype=torch.bool)
    mask[[place - before for place in range(side, size, side) for before in (0, 1)]] = True
    return mask.view([-1 if number == axis else 1 for number in range(3)])


@each_metric
def test_noise_everywhere_has_no_border(metric: Metric) -> None:
    found = score(metric, noise())
    assert all(value == pytest.approx(1, abs=0.06) for value in found.values)
    assert found.value == max(found.values)


@each_metric
def test_the_size_of_the_error_does_not_matter(metric: Metric) -> None:
    assert score(metric, noise(0.01)).value == pytest.approx(score(metric, noise(0.2)).value or 0, rel=1e-3)


@each_metric
def test_a_trend_across_the_picture_is_no_border(metric: Metric) -> None:
    growing = noise() * torch.linspace(0.5, 1, SIZE[2])
    assert max(score(metric, growing).values[:2]) < 1.06  # along frames and rows, at the top and the bottom
    if metric.name != "border":
        assert score(metric, growing).values[2] == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["frames", "rows", "columns"])
def test_errors_beside_borders_are_found_on_their_axis(axis: int) -> None:
    error = noise() * torch.where(beside_borders(axis), 1.0, 0.1)
    found = score(seam(TILE), error)
    assert found.values[axis] == pytest.approx(100, rel=0.1)
    assert found.value == found.values[axis]
    others = [value for number, value in enumerate(found.values) if number != axis]
    assert others == pytest.approx([1, 1], abs=0.15)
    assert (score(seam_step(TILE), error).value or 0) > 1.9


def test_errors_beside_borders_alone_are_infinitely_worse_than_elsewhere() -> None:
    assert score(seam(TILE), noise() * beside_borders(1)).value == math.inf


def test_tiles_of_another_brightness_are_found_by_the_step_alone() -> None:
    rows, columns = (torch.arange(size) // 16 % 2 for size in SIZE[1:])
    blocks = 0.05 * (rows[:, None] ^ columns) + noise(0.02)
    assert (score(seam_step(TILE), blocks).value or 0) > 10
    assert score(seam(TILE), blocks).value == pytest.approx(1, abs=0.06)


def test_an_edge_of_content_at_one_border_weighs_less_than_a_seam_at_all() -> None:
    edge = noise(0.02)
    edge[:, :, 48:] += 0.05  # an object whose edge happens to lie there
    one = score(seam_step(TILE), edge).values[2]
    seams = 0.05 * (torch.arange(SIZE[2]) // 16 % 2) + noise(0.02)
    assert score(seam_step(TILE), seams).values[2] > 3 * one


def test_edges_of_the_frame_are_no_tile_border() -> None:
    strip = noise(0.01)
    strip[:, :4] = strip[:, :, -3:] = 0.4
    for metric in (seam(TILE), seam_step(TILE)):
        assert score(metric, strip).value == pytest.approx(1, abs=0.06)


def test_a_shifted_grid_is_looked_at_where_it_lies() -> None:
    shifted = noise() * torch.where(beside_borders(0), 1.0, 0.1)[torch.arange(SIZE[0]).add(3) % SIZE[0]]
    assert score(seam(TILE, shift=(3, 0, 0)), shifted).values[0] > 50
    assert score(seam(TILE), shifted).values[0] < 1


@pytest.mark.parametrize(
    ("place", "side"),
    [((slice(None), slice(0, 4)), 0), ((0, slice(-6, None)), 1), ((..., slice(0, 2)), 2), ((..., slice(-9, None)), 3)],
    ids=["top", "bottom of one frame", "left", "right, wider than the band"],
)
def test_a_strip_of_garbage_is_found_on_its_side(place: tuple[object, ...], side: int) -> None:
    strip = noise(0.02)
    strip[place] = 0.4
    found = score(border(), strip)
    assert found.value == found.values[side]
    assert found.values[side] > 10


def test_the_band_has_the_width_asked_for() -> None:
    error = torch.full(SIZE, 0.1)
    error[:, :3] = 0.2
    error[:, -3:] = error[..., :3] = error[..., -3:] = 0.2
    assert score(border(width=3), error).values == pytest.approx([4] * 4, rel=1e-5)


@each_metric
def test_identical_clips_have_no_error_to_locate(metric: Metric) -> None:
    assert score(metric, torch.zeros(1)).skipped == f"{metric.name} needs clips that differ, these are identical."


def test_axes_without_a_border_are_nan_and_do_not_count() -> None:
    found = score(seam((12, 16, 3)), noise() * torch.where(beside_borders(1), 1.0, 0.1))
    assert math.isnan(found.values[0])  # one tile
    assert math.isnan(found.values[2])  # too thin for an inside
    assert found.value == found.values[1] > 50


def test_clips_that_no_border_crosses_are_skipped() -> None:
    needs = "seam needs a border of tiles of 12x64x128 with half a tile on either side"
    assert score(seam((12, 64, 128)), noise()).skipped == f"{needs}, got a clip of 12x70x101."


@pytest.mark.parametrize(
    ("tile", "shift"),
    [
        ((0, 8, 8), (0, 0, 0)),
        ((4, 8, 8), (4, 0, 0)),
        ((4, 8, 8), (0, -1, 0)),
        ((8, 8), (0, 0, 0)),
        ("1x8x8", (0, 0, 0)),
    ],
    ids=str,
)
def test_impossible_grids_are_refused(tile: tuple[int, int, int], shift: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="seam needs a tile of three sides of at least 1 and three shifts from 0 to"):
        seam(tile, shift)
