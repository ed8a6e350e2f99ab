"""Which keys one query sees, as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_accel.eval.colours import colour_map

_PAPER, _INK, _MARK = "#10141a", "#c9d1db", "#3fe0c5"
_GAP, _LABEL, _WIDTH = 12, 24, 390  # pixels: between panels, of a label line, of a row of square panels at least


def tile_picture(
    seen: np.ndarray[Any, Any],  # [F, H, W]
    query: tuple[int, int, int],
    columns: int = 3,
) -> Image.Image:
    """One panel per latent frame: bright tokens are seen by the query, dark ones are not; the query is outlined.

    Args:
        seen: share of each key token that the query sees, in [0, 1]: 0 or 1 for one head, between for a mean of
            heads.
        query: its (frame, row, column).
        columns: panels per row, wrapped into more rows where there are more frames. Default 3.

    Raises:
        ValueError: for another shape, values outside [0, 1], or a query outside the grid.
    """
    share = np.asarray(seen, dtype=np.float64)
    if share.ndim != 3 or share.size == 0:
        raise ValueError(f"seen must have shape [frames, rows, columns], got {list(share.shape)}.")
    if not (share.min() >= 0 and share.max() <= 1):
        raise ValueError(f"seen must lie in [0, 1], got values from {share.min():.4g} to {share.max():.4g}.")
    if not all(0 <= at < size for at, size in zip(query, share.shape, strict=True)):
        raise ValueError(f"query must lie in the grid {share.shape}, got {tuple(query)}.")
    frames, height, width = share.shape
    columns = min(columns, frames)
    scale = max(2, -(-_WIDTH // (columns * max(height, width))))
    rows = -(-frames // columns)
    # A narrow panel still has room for its label.
    cell_width, cell_height = max(width * scale, 72), height * scale + _LABEL
    picture = Image.new("RGB", (_GAP + columns * (cell_width + _GAP), _GAP + rows * (cell_height + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    colours = colour_map(0.12 + 0.8 * share)  # unseen tokens stay apart from the paper
    for frame in range(frames):
        left = _GAP + frame % columns * (cell_width + _GAP)
        top = _GAP + frame // columns * (cell_height + _GAP)
        draw.text((left, top), f"frame {frame}", font=font, fill=_MARK if frame == query[0] else _INK)
        panel = Image.fromarray(colours[frame]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        picture.paste(panel, (left, top + _LABEL))
        if frame == query[0]:
            _mark(draw, left + query[2] * scale, top + _LABEL + query[1] * scale, scale)
    return picture


def _mark(draw: ImageDraw.ImageDraw, left: int, top: int, scale: int) -> None:
    """Outlines the query's token from outside, with a dark rim that keeps it visible on bright tiles."""
    for reach, colour in ((4, _PAPER), (3, _MARK), (2, _MARK), (1, _PAPER)):
        draw.rectangle((left - reach, top - reach, left + scale - 1 + reach, top + scale - 1 + reach), outline=colour)
