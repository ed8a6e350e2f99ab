"""A space-filling order of a token grid: tokens that follow each other on the curve lie close to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import Triple

_TIES = (1, 2, 0)  # of equally long sides the row axis is halved first, then the column axis, then the frame axis


def curve_order(grid: Triple) -> Tensor:
    """The tokens of a grid in the order of a curve that fills it box by box.

    The grid is halved along its longest side, each half again, down to single tokens; the first half of every box comes
    before the second. Halves start at multiples of four tokens where the side is longer than four, of two where it is
    longer than two, so that runs of 16 are boxes like 4×4 or 2×2×4. On square images whose side is a power of two this
    is the Morton (Z) order.

    Args:
        grid: tokens per axis, (frame, row, column), any sizes.

    Returns:
        int32 [N], the place in (frame, row, column) order of the n-th token on the curve.
    """
    steps = (grid[1] * grid[2], grid[2], 1)
    known = {(1, 1, 1): torch.zeros(1, dtype=torch.int32)}

    def walk(box: Triple) -> Tensor:  # boxes of one size are walked alike, and there are few sizes
        if box not in known:
            axis = max(_TIES, key=lambda side: box[side])  # the first of the longest
            first = _first_half(box[axis])
            known[box] = torch.cat(
                [walk(_resized(box, axis, first)), walk(_resized(box, axis, box[axis] - first)) + first * steps[axis]]
            )
        return known[box]

    return walk(grid)


def _first_half(side: int) -> int:
    """The multiple of 4, 2 or 1 nearest to half of ``side``, the greater one of two."""
    unit = 4 if side > 4 else 2 if side > 2 else 1
    return max(unit, (side + unit) // (2 * unit) * unit)


def _resized(box: Triple, axis: int, side: int) -> Triple:
    t, h, w = (side if i == axis else size for i, size in enumerate(box))
    return t, h, w
