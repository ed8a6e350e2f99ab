"""A perceptual colour map: lightness rises evenly from near black to pale yellow, through violet and orange."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Oklab to linear sRGB (Ottosson 2020): the cone responses' cube roots, then the primaries.
_LAB_TO_CONES = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@cache
def _table() -> Array:
    """The map's 256 colours, uint8 [256, 3]."""
    position = np.linspace(0, 1, 256)
    lightness = 0.13 + 0.83 * position
    chroma = 0.015 + 0.145 * np.sin(np.pi * position)
    hue = np.deg2rad(-75 + 180 * position)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = np.clip((lab @ _LAB_TO_CONES.T) ** 3 @ _CONES_TO_RGB.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray((encoded * 255).round(), dtype=np.uint8)


def colour_map(values: Array) -> Array:
    """Colours of values in [0, 1] (clipped to it), uint8 [..., 3]."""
    return np.asarray(_table()[(np.clip(values, 0, 1) * 255).round().astype(np.intp)])
