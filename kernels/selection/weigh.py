"""From scores of tiles of different sizes to the best ones that a budget allows."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.selection.backend import runs_triton


def best_within(scores: Tensor, weights: Tensor, budget: int) -> Tensor:
    """The best of each row, in order, for as long as their weights add up to at most ``budget``.

    The order is that of every choice here: higher score first, then lower index, NaN as -inf. A larger budget keeps all
    that a smaller one keeps. Nothing is read back to the host.

    Args:
        scores: [..., N], compared in float32.
        weights: of the N places, integers of at least 0 below 2^31.
        budget: the most that a row may weigh; a row whose best is heavier keeps nothing.

    Returns:
        bool [..., N].
    """
    if runs_triton(scores):
        from dit_accel.kernels.selection.triton_weigh import triton_best_within

        return triton_best_within(scores.float().contiguous(), weights.int().contiguous(), budget)
    scores = scores.float()
    order = scores.masked_fill(scores.isnan(), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    fits = weights.long()[order].cumsum(-1) <= budget
    return torch.zeros_like(fits).scatter_(-1, order, fits)
