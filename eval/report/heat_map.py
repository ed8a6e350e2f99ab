"""Discarded softmax mass as a picture: blocks by heads, and step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_accel.eval.colours import Array, colour_map
from dit_accel.eval.discarded import DiscardedMass

_PAPER, _INK, _NOT_SPARSE = "#10141a", "#c9d1db", (44, 52, 62)
_GAP, _LINE, _LEFT, _WIDTH = 12, 24, 30, 360  # pixels: around panels, of a line of text, of row numbers, of a panel
_ROW, _PANEL = (8, 24), 320  # pixels: height of a row at least and at most, of all rows if they fit
_SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def heat_map_scale(masses: Sequence[DiscardedMass]) -> float:
    """What the brightest colour stands for in pictures to be compared: the most in any of them, rounded up."""
    most = max((float(np.nanmax(part)) for mass in masses for part in (mass.by_head, mass.by_step)), default=1.0)
    return next((scale for scale in _SCALES if most <= scale), 1.0)


def heat_map(mass: DiscardedMass, scale: float = 1.0) -> Image.Image:
    """Three panels: a row per block and a column per head, a column per denoising step, and the colours' meaning.

    Where no call was sparse a cell is grey.

    Args:
        mass: of one method.
        scale: the brightest colour's share; more is shown as bright. Default 1.

    Raises:
        ValueError: a scale outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {scale}.")
    legend = np.linspace(0, scale, 256)[None]
    panels = (
        ("heads, by block", mass.by_head, [str(block) for block in range(len(mass.by_head))]),
        (f"steps 0 to {len(mass.by_step) - 1}", mass.by_step[None], [""]),
        (f"softmax mass left out, 0 to {scale:.0%}", legend, [""]),
    )
    heights = [_row_height(len(values)) * len(values) for _, values, _ in panels]
    size = (_GAP + _LEFT + _WIDTH + _GAP, _GAP + sum(height + _LINE + _GAP for height in heights))
    picture = Image.new("RGB", size, _PAPER)
    draw, font, top = ImageDraw.Draw(picture), ImageFont.load_default(14), _GAP
    for (title, values, labels), height in zip(panels, heights, strict=True):
        draw.text((_GAP + _LEFT, top), title, font=font, fill=_INK)
        top += _LINE
        cells = Image.fromarray(_colours(values / scale))
        picture.paste(cells.resize((_WIDTH, height), Image.Resampling.NEAREST), (_GAP + _LEFT, top))
        row = height // len(values)
        for number in range(0, len(values), -(-_LINE // (2 * row))):  # as many as do not touch
            draw.text((_GAP, top + number * row + row / 2), labels[number], font=font, fill=_INK, anchor="lm")
        top += height + _GAP
    return picture


def _row_height(rows: int) -> int:
    least, most = _ROW
    return min(most, max(least, _PANEL // rows))


def _colours(shares: Array) -> Array:
    colours = colour_map(np.nan_to_num(shares))
    colours[np.isnan(shares)] = _NOT_SPARSE
    return colours
