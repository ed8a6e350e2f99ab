"""The tuner's choice: optimal at every position, monotone, and within what it is asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dit_accel.tuning.choose import Frontier

SHAPES = {"one cell": (1, 1, 4), "six cells": (2, 3, 3), "two candidates": (1, 7, 2)}


def tables(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    seconds, error = torch.rand(2, *shape, dtype=torch.float64, generator=make)
    return seconds, error


def every_choice(seconds: Tensor, error: Tensor) -> Tensor:
    """Seconds and error of all choices there are, [choices, 2]."""
    cells = seconds[..., 0].numel()
    rows = torch.tensor(list(itertools.product(range(seconds.shape[-1]), repeat=cells)))
    return torch.stack([table.reshape(cells, -1).T.gather(0, rows).sum(1) for table in (seconds, error)], 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_no_choice_beats_one_of_the_frontier(shape: tuple[int, ...], seed: int) -> None:
    seconds, error = tables(shape, seed)
    frontier, all_of_them = Frontier(seconds, error), every_choice(seconds, error)
    for position in range(frontier.last + 1):
        multiplier = frontier.multiplier(position)
        lagrangian = all_of_them[:, 0] + multiplier * all_of_them[:, 1]
        own = frontier.seconds[position] + multiplier * frontier.error[position]
        assert own == pytest.approx(float(lagrangian.min()))
        faster = all_of_them[all_of_them[:, 0] < frontier.seconds[position] - 1e-9]
        assert not (faster[:, 1] < frontier.error[position] - 1e-9).any()


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_adds_up_to_its_figures_and_the_curve_is_monotone(seed: int) -> None:
    seconds, error = tables((3, 4, 5), seed)
    frontier = Frontier(seconds, error)
    for position in range(frontier.last + 1):
        choice = frontier.choice(position)[..., None]
        assert float(seconds.gather(-1, choice).sum()) == pytest.approx(frontier.seconds[position])
        assert float(error.gather(-1, choice).sum()) == pytest.approx(frontier.error[position])
    assert frontier.seconds == sorted(frontier.seconds, reverse=True)
    assert frontier.error == sorted(frontier.error)
    multipliers = [frontier.multiplier(position) for position in range(frontier.last + 1)]
    assert multipliers == sorted(multipliers, reverse=True)
    assert multipliers[-1] == 0
    assert float(error.min(-1).values.sum()) == pytest.approx(frontier.error[0])
    assert float(seconds.min(-1).values.sum()) == pytest.approx(frontier.seconds[-1])


def test_budgets_are_used_up_and_not_exceeded() -> None:
    frontier = Frontier(*tables((2, 3, 4), 7))
    for position in range(frontier.last + 1):
        assert frontier.within_error(frontier.error[position] + 1e-12) == position
        assert frontier.within_seconds(frontier.seconds[position] + 1e-12) == position
    assert frontier.within_error(frontier.error[0] - 1) == 0
    assert frontier.within_seconds(frontier.seconds[-1] - 1) == frontier.last


def test_what_is_not_allowed_or_gains_nothing_is_not_chosen() -> None:
    seconds = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    error = torch.tensor([[0.0, torch.inf, 0.5, 0.2]])
    frontier = Frontier(seconds, error)
    assert [frontier.choice(position).tolist() for position in range(frontier.last + 1)] == [[0], [2]]
