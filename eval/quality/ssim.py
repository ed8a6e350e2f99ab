"""Structural similarity of single frames (Wang, Bovik, Sheikh, Simoncelli 2004), at one scale and at five."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

WINDOW = 11
_SIGMA = 1.5
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the paper, from full size down
_C1, _C2 = 0.01**2, 0.03**2  # (K1 * data range)^2 and (K2 * data range)^2, data range 1


def ssim(frames: Tensor, reference: Tensor) -> Tensor:
    """Mean SSIM of each frame, [T].

    Gaussian window 11 x 11 with sigma 1.5, data range 1, population covariance, the three channels averaged, and
    only windows that lie wholly inside the frame: scikit-image's ``structural_similarity`` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1``.

    Args:
        frames: float [T, H, W, 3] in [0, 1].
        reference: the same shape.

    Raises:
        ValueError: when a side of the frame is shorter than the window.
    """
    height, width = frames.shape[1:3]
    if min(height, width) < WINDOW:
        raise ValueError(f"ssim needs frames of at least {WINDOW}x{WINDOW} pixels, got {height}x{width}.")
    return torch.stack([_ssim_frame(x, y) for x, y in zip(frames, reference, strict=True)])


def ms_ssim(frames: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale SSIM (Wang, Simoncelli, Bovik 2003) of each frame, [T].

    The product over five scales, each half the size of the one before, of the mean contrast and structure, to the power
    of the scale's weight; luminance joins at the last one, which may be hardly larger than the window and is reflected
    at its edges, as torchmetrics does it. A negative mean counts as 0.

    Args:
        frames: float [T, H, W, 3] in [0, 1], sides of at least 176: the window has to fit the last scale.
        reference: the same shape.
    """
    return torch.stack([_ms_ssim_frame(x, y) for x, y in zip(frames, reference, strict=True)])


def _ssim_frame(
    x: Tensor,  # [H, W, 3]
    y: Tensor,  # [H, W, 3]
) -> Tensor:
    luminance, structure = _terms(_planes(x), _planes(y))
    return (luminance * structure).mean()


def _ms_ssim_frame(
    x: Tensor,  # [H, W, 3]
    y: Tensor,  # [H, W, 3]
) -> Tensor:
    x, y = _planes(x), _planes(y)
    product = x.new_ones(())
    for weight in _SCALES[:-1]:
        product = product * _terms(x, y)[1].mean().relu() ** weight
        x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
    around = (WINDOW // 2,) * 4
    luminance, structure = _terms(pad(x, around, mode="reflect"), pad(y, around, mode="reflect"))
    return product * (luminance * structure).mean().relu() ** _SCALES[-1]


def _planes(frame: Tensor) -> Tensor:
    """[H, W, 3] -> [3, H, W], in double: variances are differences of close numbers, and in float32 flat regions would
    lose the digits that 1e-4 needs."""
    return frame.movedim(-1, 0).double()


def _terms(
    x: Tensor,  # [3, H, W]
    y: Tensor,  # [3, H, W]
) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, of every window, [3, H - 10, W - 10]."""
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * cov + _C2) / (var_x + var_y + _C2)
    return luminance, structure


def _blur(maps: Tensor) -> Tensor:
    """Gaussian of the last two axes without padding, [..., H, W] -> [..., H - 10, W - 10]."""
    offset = torch.arange(WINDOW, dtype=maps.dtype) - WINDOW // 2
    weights = torch.softmax(-(offset**2) / (2 * _SIGMA**2), dim=0).tolist()
    for axis in (-1, -2):
        # A sum of shifted views: torch's CPU convolution is many times slower in float64.
        size = maps.shape[axis] - WINDOW + 1
        shifted = [maps.narrow(axis, start, size) for start in range(WINDOW)]
        maps = shifted[0] * weights[0]
        for view, weight in zip(shifted[1:], weights[1:], strict=True):
            maps.add_(view, alpha=weight)
    return maps
