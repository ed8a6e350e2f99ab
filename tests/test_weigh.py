"""Choosing by score within a budget of weights, against its definition written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.selection.triton_weigh import CHUNK, triton_best_within
from dit_accel.kernels.selection.weigh import best_within

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton is not interpreted, it compiles


def kept(implementation: str, scores: Tensor, weights: Tensor, budget: int) -> Tensor:
    if implementation == "torch":
        return best_within(scores, weights, budget)
    return triton_best_within(scores.to(DEVICE), weights.int().to(DEVICE), budget).cpu()


def by_hand(row: list[float], weights: list[int], budget: int) -> list[bool]:
    chosen = [False] * len(row)
    for place in sorted(range(len(row)), key=lambda i: (math.inf if math.isnan(row[i]) else -row[i], i)):
        budget -= weights[place]
        if budget < 0:
            break
        chosen[place] = True
    return chosen


def awkward(length: int) -> tuple[Tensor, Tensor]:
    """Few distinct scores, extremes among them, and weights as of tiles that stick out of a grid."""
    make = torch.Generator().manual_seed(length)
    scores = torch.randint(-2, 3, (3, length), generator=make).float()
    scores[0] = torch.randn(length, generator=make)
    for extreme in (torch.nan, -torch.inf, torch.inf, -0.0):
        scores[1:, torch.rand(length, generator=make) < 0.1] = extreme
    return scores, torch.tensor([128, 80, 48, 0])[torch.randint(0, 4, (length,), generator=make)]


@pytest.mark.parametrize("length", [1, 19, CHUNK + 37])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_best_in_order_for_as_long_as_they_fit(implementation: str, length: int) -> None:
    scores, weights = awkward(length)
    whole = int(weights.sum())
    for budget in (0, whole // 3, whole - 1, whole):
        expected = [by_hand(row, weights.tolist(), budget) for row in scores.tolist()]
        assert kept(implementation, scores, weights, budget).tolist() == expected


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_weights_may_add_up_beyond_32_bits(implementation: str) -> None:
    scores, weights = torch.arange(5.0)[None], torch.full((5,), 2**31 - 1)
    assert kept(implementation, scores, weights, 3 * (2**31 - 1)).tolist() == [[False, False, True, True, True]]
    assert not kept(implementation, scores, weights, 2**31 - 2).any()


def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps() -> None:
    scores, weights = awkward(50)
    masks = torch.stack([best_within(scores, weights, budget) for budget in range(0, int(weights.sum()) + 1, 16)])
    assert not (masks[:-1] & ~masks[1:]).any()
    assert masks[-1].all()
