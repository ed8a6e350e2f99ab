"""The cheapest choice at every price of an error: a separable problem, solved exactly on its lower hull."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Move:
    """One cell changes its choice to a faster one with more error.

    Args:
        cell: flat index of the cell.
        choice: what it takes from then on.
        seconds: saved.
        error: added.
    """

    cell: int
    choice: int
    seconds: float
    error: float

    @property
    def multiplier(self) -> float:
        """Seconds that a unit of error buys."""
        return self.seconds / self.error if self.error else torch.inf


class Frontier:
    """Choices that minimise seconds + multiplier * error, from a high multiplier to 0.

    Position 0 is the choice of least error; each position makes one more move, of those left the one that saves most
    for its error. No choice at all has both less error and fewer seconds than one of these.

    Args:
        seconds, error: of each candidate in each cell, float64 [..., candidates]; infinite where one is not allowed.
    """

    def __init__(self, seconds: Tensor, error: Tensor) -> None:
        self._shape = seconds.shape[:-1]
        rows = zip(
            seconds.reshape(-1, seconds.shape[-1]).tolist(), error.reshape(-1, error.shape[-1]).tolist(), strict=True
        )
        hulls = [_hull(row_seconds, row_error) for row_seconds, row_error in rows]
        self._start = [hull[0][2] for hull in hulls]
        moves = [
            Move(cell, choice, before[1] - after, error - before[0])
            for cell, hull in enumerate(hulls)
            for before, (error, after, choice) in pairwise(hull)
        ]
        # Within a cell the multiplier falls, so that a stable sort keeps its moves in order.
        self.moves = sorted(moves, key=lambda move: -move.multiplier)
        self.seconds = list(
            accumulate((-move.seconds for move in self.moves), initial=sum(hull[0][1] for hull in hulls))
        )
        self.error = list(accumulate((move.error for move in self.moves), initial=sum(hull[0][0] for hull in hulls)))

    @property
    def last(self) -> int:
        """The fastest position."""
        return len(self.moves)

    def choice(self, position: int) -> Tensor:
        """The candidate of each cell, int64 [...]."""
        chosen = list(self._start)
        for move in self.moves[:position]:
            chosen[move.cell] = move.choice
        return torch.tensor(chosen).reshape(self._shape)

    def multiplier(self, position: int) -> float:
        """Seconds that a unit of error has to save from this position on; 0 at the last."""
        return self.moves[position].multiplier if position < self.last else 0.0

    def within_error(self, budget: float) -> int:
        """The fastest position whose error stays within a budget; 0 where none does."""
        return max(0, bisect_right(self.error, budget) - 1)

    def within_seconds(self, budget: float) -> int:
        """The position of least error within a budget of seconds; the last where none is."""
        return min(self.last, bisect_left(self.seconds, -budget, key=lambda seconds: -seconds))


def _hull(seconds: list[float], error: list[float]) -> list[tuple[float, float, int]]:
    """The lower convex hull of one cell's candidates as (error, seconds, index), error rising and seconds falling."""
    points = sorted(
        (err, sec, index)
        for index, (sec, err) in enumerate(zip(seconds, error, strict=True))
        if sec < torch.inf and err < torch.inf
    )
    hull: list[tuple[float, float, int]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # no less error and no faster
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(left: tuple[float, float, int], middle: tuple[float, float, int], right: tuple[float, float, int]) -> bool:
    """Whether ``middle`` lies on or above the line from ``left`` to ``right``."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])
