"""How differently two clips move, by optical flow without weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

MIN_SIDE = 16
_LEVELS = 3
_ROUNDS = 2
_WINDOW = 9
_PRIOR = 1e-3  # squared gradient, all channels, of a window that is half believed: 2 % of the range per pixel


def motion_gap(clip: Tensor, target: Tensor) -> Tensor:
    """Mean distance between the optical flow of a clip and of its reference, pixels per frame, [T - 1].

    The error measure is the endpoint error of Baker et al. (2011). The flow v of a pair of frames is that of Lucas and
    Kanade (1981), coarse to fine as Bouguet (2001), the colour channels c together: in a window around each pixel

        (G + prior) v = -Σ_c ∇I_c ∂I_c/∂t,   G = Σ_c ∇I_c ∇I_cᵀ,   then v · tr G / (tr G + 2 prior).

    The prior makes it defined everywhere: where nothing is to be seen that could move, v is 0 in both clips. Flow is
    computed at half the resolution, where noise between pixels is averaged out, and follows steps of up to about 12
    pixels per frame.

    Args:
        clip: float [T, H, W, 3] in [0, 1], sides of at least 16.
        target: the same shape.
    """
    gaps = []
    before = _pyramid(torch.stack([clip[0], target[0]]))
    for frames in zip(clip[1:], target[1:], strict=True):
        after = _pyramid(torch.stack(frames))
        ours, theirs = flow(before, after)
        gaps.append((ours - theirs).norm(dim=0).double().mean())
        before = after
    return torch.stack(gaps)


def flow(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Optical flow between pyramids of frames, coarsest level first.

    Returns:
        [N, 2, H, W] of the finest level, along columns and rows, in pixels of the frame itself.
    """
    velocity = before[0].new_zeros(len(before[0]), 2, *before[0].shape[2:])
    for level, (first, second) in enumerate(zip(before, after, strict=True)):
        if level:
            velocity = 2 * interpolate(velocity, first.shape[2:], mode="bilinear", align_corners=False)
        by_column, by_row = _gradients(first)
        xx, yy, xy = _windowed(by_column * by_column, by_row * by_row, by_column * by_row)
        xx, yy = xx + _PRIOR, yy + _PRIOR
        determinant = xx * yy - xy * xy
        for _ in range(_ROUNDS):
            change = _warped(second, velocity) - first
            x, y = _windowed(by_column * change, by_row * change)
            velocity = velocity - torch.stack([yy * x - xy * y, xx * y - xy * x], 1) / determinant[:, None]
    seen = (xx + yy - 2 * _PRIOR) / (xx + yy)
    believed: Tensor = seen[:, None] * velocity
    return believed * 2


def _pyramid(frames: Tensor) -> list[Tensor]:
    """[N, H, W, 3] -> [N, 3, h, w] at a half, a quarter and an eighth of the size, the smallest first."""
    levels = [avg_pool2d(frames.movedim(-1, 1), 2)]
    while len(levels) < _LEVELS and min(levels[0].shape[2:]) >= MIN_SIDE:
        levels.insert(0, avg_pool2d(levels[0], 2))
    return levels


def _gradients(frames: Tensor) -> tuple[Tensor, Tensor]:
    by_row, by_column = torch.gradient(frames, dim=(2, 3))
    return by_column, by_row


def _windowed(*products: Tensor) -> Tensor:
    """Each product, [N, 3, h, w], summed over channels and averaged over the window: [K, N, h, w]."""
    summed = torch.stack([product.sum(1) for product in products])
    return avg_pool2d(summed, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)


def _warped(frames: Tensor, velocity: Tensor) -> Tensor:
    """Each frame read where its pixels went; beyond the edge, its outermost pixels."""
    height, width = frames.shape[2:]
    rows = torch.arange(height, device=frames.device).view(-1, 1) + velocity[:, 1]
    columns = torch.arange(width, device=frames.device) + velocity[:, 0]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    return grid_sample(frames, grid, padding_mode="border", align_corners=False)
