"""Formulas of the metrics of pixels: float [T, H, W, 3] in [0, 1] -> one value per frame or pair of frames."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def squared_error(clip: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each frame, [T]."""
    # Frame by frame: a double copy of a long clip would cost gigabytes.
    return torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(clip, target, strict=True)])


def decibels(error: Tensor) -> Tensor:
    """PSNR for data range 1 of a mean squared error; infinite where that is exactly zero."""
    return -10 * torch.log10(error)


def pool_decibels(values: Tensor) -> Tensor:
    """PSNR of the whole clip's mean squared error: infinite only if every frame is identical."""
    return decibels((10 ** (-values / 10)).mean())


def flicker(clip: Tensor) -> Tensor:
    """Mean absolute difference of successive frames, [T - 1]."""
    return torch.stack([(after - before).abs().double().mean() for before, after in pairwise(clip)])


def flicker_gap(clip: Tensor, target: Tensor) -> Tensor:
    """Absolute difference of the two clips' flicker, [T - 1]."""
    return (flicker(clip) - flicker(target)).abs()
