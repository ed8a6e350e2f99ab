"""Where the error lies: at the borders of attention tiles, or at the edges of the frame, against elsewhere.

All three metrics are ratios of mean squares, 1 for an error that knows no borders, whatever its size. They are infinite
where the error lies at the borders alone, and 1 where there is none on either side of the division.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dit_accel.eval.quality.metrics import Metric, paired

Triple = tuple[int, int, int]
Profiles = Iterator[Tensor]  # along frames, rows and columns


def seam(tile: Triple, shift: Triple = (0, 0, 0)) -> Metric:
    """The squared error of the pixels on both sides of a tile border, over that of the pixels between borders.

    Finds errors that gather at borders: key lists or masks that are wrong for the outermost tokens of a tile. Each
    border is compared with half a tile on either side of it and no further: a linear trend across the picture cancels,
    and the edges of the frame, which have reasons of their own (``border``), stay out. A border nearer to the edge than
    that is left out. Content that happens to change at one border is averaged over all of them.

    Args:
        tile: sides of the tile in frames and pixels: those of the attention tile in tokens × patch × stride of the VAE.
        shift: how far the borders lie before the multiples of the sides; (3, 0, 0) for a VAE that makes one frame of
            the first latent and four of each other. Default: borders at the multiples.

    Returns:
        a metric whose value is the worst of the axes; ``values`` are those along frames, rows and columns, NaN where
        no border crosses the axis, or tiles are thinner than 4 and have no inside.

    Raises:
        ValueError: other than three sides of at least 1, or a shift outside its side.
    """
    return _tile_metric("seam", tile, shift, _errors, reach=1)


def seam_step(tile: Triple, shift: Triple = (0, 0, 0)) -> Metric:
    """The squared step of the error across a tile border, over its steps between other neighbouring pixels.

    Finds tiles that are each a little brighter, redder or further along than their neighbours, which a viewer sees as
    blocks: the error is then as large inside as at the border (``seam`` is 1), but it jumps there.

    Args and Returns: those of ``seam``.

    Raises:
        ValueError: other than three sides of at least 1, or a shift outside its side.
    """
    return _tile_metric("seam_step", tile, shift, _steps, reach=0)


def border(width: int = 8) -> Metric:
    """The squared error of the outermost band of the frame, over that of the frame without its four bands.

    Finds strips of garbage at the edges, such as tokens that a padded last tile never computed. What moves in or out of
    the frame has its errors there too: read it beside the value of the noise floor.

    Args:
        width: of the band in pixels. Default 8, one latent pixel of most VAEs.

    Returns:
        a metric whose value is the worst of the sides; ``values`` are top, bottom, left and right.

    Raises:
        ValueError: a width below 1.
    """
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"border needs a band of at least 1 pixel, got {width}.")

    def compute(clip: Tensor, target: Tensor) -> Tensor:
        bands = torch.stack([_bands(x - y, width) for x, y in zip(clip, target, strict=True)]).mean(0)
        return _ratio(bands[:4], bands[4])

    return _ratio_metric("border", compute, min_side=2 * width + 1)


def _tile_metric(name: str, tile: Triple, shift: Triple, profiles: Callable[[Tensor], Profiles], reach: int) -> Metric:
    """Args: reach: entries of a profile before the border's own that belong to the border too."""
    if not _is_grid(tile, shift):
        raise ValueError(
            f"{name} needs a tile of three sides of at least 1 and three shifts from 0 to below the side, "
            f"got {tile} and {shift}."
        )

    def compute(clip: Tensor, target: Tensor) -> Tensor:
        along = zip(profiles(clip - target), tile, shift, strict=True)
        return torch.stack([_border_ratio(profile, side, offset, reach) for profile, side, offset in along])

    def needs(clip: Tensor, target: Tensor | None) -> str | None:
        axes = zip(clip.shape, tile, shift, strict=False)
        if not any(_borders(size, side, offset) for size, side, offset in axes):
            sides, size = ("x".join(map(str, lengths)) for lengths in (tile, clip.shape[:3]))
            return f"a border of tiles of {sides} with half a tile on either side, got a clip of {size}"
        return _error(clip, target)

    return _ratio_metric(name, compute, needs=needs)


def _is_grid(tile: object, shift: object) -> bool:
    match tile, shift:
        case [int(frames), int(rows), int(columns)], [int(first), int(top), int(left)]:
            return 0 <= first < frames and 0 <= top < rows and 0 <= left < columns
    return False


def _bands(error: Tensor, width: int) -> Tensor:
    """Mean squared error of a frame [H, W, 3] at the top, the bottom, the left and the right, and inside, [5]."""
    squared = error.square()
    sides = (squared[:width], squared[-width:], squared[:, :width], squared[:, -width:])
    return torch.stack([_mean(part) for part in (*sides, squared[width:-width, width:-width])])


def _errors(error: Tensor) -> Profiles:
    """Mean squared error of each frame, each row and each column."""
    squared = error.square()
    return (_mean(squared.transpose(0, axis).flatten(1), 1) for axis in range(3))


def _steps(error: Tensor) -> Profiles:
    """Mean squared step of the error into each frame, row and column from the one before; the first has none."""
    for axis in range(3):
        steps = error.diff(dim=axis).square()
        yield torch.cat([steps.new_full((1,), math.nan), _mean(steps.transpose(0, axis).flatten(1), 1)])


def _borders(size: int, side: int, offset: int) -> list[int]:
    """First position after each border that has half a tile on either side of it, and an inside there."""
    half = side // 2
    return [place for place in range(side - offset, size - half + 1, side) if place >= half > 1]


def _border_ratio(profile: Tensor, side: int, offset: int, reach: int) -> Tensor:
    half, at, beside = side // 2, list[int](), list[int]()
    for place in _borders(len(profile), side, offset):
        at += range(place - reach, place + 1)
        beside += range(place - half + 1 - reach, place - reach)
        beside += range(place + 1, place + half)
    return _ratio(profile[at].mean(), profile[beside].mean())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """1 for zero over zero; NaN stays."""
    return torch.where((numerator == 0) & (denominator == 0), 1.0, numerator / denominator)


def _mean(values: Tensor, axis: int | None = None) -> Tensor:
    return values.mean(dim=axis, dtype=torch.float64)


def _worst(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=-math.inf, posinf=math.inf).max()


def _error(clip: Tensor, target: Tensor | None) -> str | None:
    assert target is not None, "measure() skips metrics whose reference is missing"
    return "clips that differ, these are identical" if torch.equal(clip, target) else None


def _ratio_metric(
    name: str,
    compute: Callable[[Tensor, Tensor], Tensor],
    min_side: int = 1,
    needs: Callable[[Tensor, Tensor | None], str | None] = _error,
) -> Metric:
    return Metric(
        name,
        needs_reference=True,
        higher_is_better=False,
        unit="",
        compute=paired(compute),
        pool=_worst,
        scope="clip",
        min_side=min_side,
        needs=needs,
    )
