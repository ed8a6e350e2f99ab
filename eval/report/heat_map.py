"""Where attention is far from dense, as a picture: blocks by heads, and step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_accel.eval.colours import Array, colour_map
from dit_accel.eval.fidelity import MEASURES, Fidelity

_PAPER, _INK, _NOT_SPARSE = "#10141a", "#c9d1db", (44, 52, 62)
_GAP, _LINE, _LEFT, _WIDTH = 12, 24, 30, 360  # pixels: around panels, of a line of text, of row numbers, of a panel
_ROW, _PANEL = (4, 16), 160  # pixels: height of a row at least and at most, of all rows if they fit
_SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def heat_map_scales(runs: Sequence[Fidelity]) -> dict[str, float]:
    """What the brightest colour of each measure stands for in pictures to be compared: the most in any, rounded up."""
    most: dict[str, float] = {}
    for name, profile in (pair for run in runs for pair in run.profiles.items()):
        parts = (MEASURES[name].distance(part) for part in (profile.by_head, profile.by_step))
        most[name] = max(most.get(name, 0.0), *(float(np.nanmax(part)) for part in parts))
    return {name: next((scale for scale in _SCALES if value <= scale), _SCALES[-1]) for name, value in most.items()}


def heat_map(run: Fidelity, scales: Mapping[str, float] | None = None) -> Image.Image:
    """Two panels per measure, a row per block with a column per head and a column per step; then what colours mean.

    Bright is far from dense attention: of a cosine its distance from 1 is shown. Where no call was sparse a cell is
    grey.

    Args:
        run: of one method.
        scales: what the brightest colour of each measure stands for; more is shown as bright. Default: the run's own.

    Raises:
        ValueError: a scale that is not positive.
    """
    panels = list(_panels(run, heat_map_scales([run]) if scales is None else scales))
    heights = [_row_height(len(values)) * len(values) for _, values, _ in panels]
    size = (_GAP + _LEFT + _WIDTH + _GAP, _GAP + sum(height + _LINE + _GAP for height in heights))
    picture = Image.new("RGB", size, _PAPER)
    draw, font, top = ImageDraw.Draw(picture), ImageFont.load_default(14), _GAP
    for (title, values, labels), height in zip(panels, heights, strict=True):
        draw.text((_GAP + _LEFT, top), title, font=font, fill=_INK)
        top += _LINE
        cells = Image.fromarray(_colours(values))
        picture.paste(cells.resize((_WIDTH, height), Image.Resampling.NEAREST), (_GAP + _LEFT, top))
        row = height // len(values)
        for number in range(0, len(values), -(-_LINE // (2 * row))):  # as many as do not touch
            draw.text((_GAP, top + number * row + row / 2), labels[number], font=font, fill=_INK, anchor="lm")
        top += height + _GAP
    return picture


def _panels(run: Fidelity, scales: Mapping[str, float]) -> Iterator[tuple[str, Array, Sequence[str]]]:
    """Titles, shares of the scale [rows, columns] and names of the rows."""
    for name, profile in run.profiles.items():
        scale, measure = scales[name], MEASURES[name]
        if not scale > 0:
            raise ValueError(f"the scale of {name} must be positive, got {scale}.")
        by_head, by_step = (measure.distance(part) / scale for part in (profile.by_head, profile.by_step))
        title, blocks = f"{measure.distance_title}, 0 to {scale:g}: heads by block", range(len(by_head))
        yield title, by_head, [str(block) for block in blocks]
        yield f"by step, 0 to {len(by_step) - 1}", by_step[None], [""]
    yield "colours, from 0 to the end of each range", np.linspace(0, 1, 256)[None], [""]


def _row_height(rows: int) -> int:
    least, most = _ROW
    return min(most, max(least, _PANEL // rows))


def _colours(shares: Array) -> Array:
    colours = colour_map(np.nan_to_num(shares))
    colours[np.isnan(shares)] = _NOT_SPARSE
    return colours
