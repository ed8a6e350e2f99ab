"""Neighborhood attention: each token sees a window of the grid around itself, shifted inwards at the borders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import AxisWindows, TileGrid, Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import WindowMethod, check_triple
from dit_accel.plan import best_boxes, windows_density

AXES = ("frame", "row", "column")


@dataclass(frozen=True, kw_only=True)
class NeighborhoodAttnProcessor(WindowMethod):
    """Sliding, strided, dilated or causal windows per axis, exactly as NATTEN defines them (arXiv 2204.07143,
    2209.15001, 2403.04690, 2504.16922).

    A pair is kept when every axis keeps it. On an axis of n tokens with window w, stride t and dilation 1, query x has
    the leader min(floor(x / t) * t + floor(t / 2), n - 1), shared by its stride group, and sees the w keys from

        clamp(leader - floor(w / 2), 0, n - w)   on,

    so that every query keeps exactly w keys, borders included. On a causal axis the leader is
    min(floor(x / t) * t + t - 1, n - 1), and x sees the keys y <= x with leader - y < w: fewer at the start. With
    dilation d the tokens of equal x mod d form a class, and the rule holds in each class with x // d and the size of
    the class in place of x and n.

    Axes come in the order (frame, row, column); an image has one frame. The rule is exact for each token.

    Args:
        window: keys per axis; 1 is the token's own coordinate only, -1 all that the axis allows. Default None: half of
            each axis, rounded up.
        stride: queries per axis that share a window, from 1 (sliding, default) to the window (blocked).
        dilation: step between the keys of a window per axis. Default 1.
        causal: axes on which later keys are hidden. Default none.
        tile: tokens per box and axis; default None takes the box of 128 tokens that touches the fewest pairs of boxes.
        density: replaces ``window`` and ``stride``: the stride is the box, and the window grows from one box by two
            boxes at a time, or to the whole axis, on the axis that sees the smallest share of itself and still fits,
            so that what is computed is nearly what is kept. It cannot be combined with dilation or causal axes, which
            never keep every pair.

    Raises:
        ValueError: an option out of its range; from ``plan``, a window (times its dilation) larger than its axis.
    """

    name: ClassVar[str] = "neighborhood"

    window: Triple | None = None
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)
    tile: Triple | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_triple("stride", self.stride)
        check_triple("dilation", self.dilation)
        if self.window is not None:
            check_triple("window", self.window, also=-1)
        if self.tile is not None:
            check_triple("tile", self.tile)
        if not (isinstance(self.causal, tuple) and len(self.causal) == 3 and set(self.causal) <= {True, False}):
            raise ValueError(f"causal must be three booleans (frame, row, column), got {self.causal!r}.")
        if self.density is not None and (max(self.dilation) > 1 or any(self.causal)):
            raise ValueError(
                "density needs dilation 1 and no causal axis, "
                f"got dilation={self.dilation} and causal={self.causal}; set window instead."
            )

    def windows(self, layout: TokenLayout) -> AxisWindows:
        if self.density is None:
            return self._bounds(layout, self._window(layout), self.stride)
        density, boxes = self.density, self.boxes(layout)

        def fits(window: Triple) -> bool:
            return windows_density(boxes, self._bounds(layout, window, box)) <= density + 1e-12

        t, h, w = (min(axis) for axis in zip(boxes.tile, layout.grid, strict=True))
        box = window = (t, h, w)
        fitting: Triple | None = window
        while fitting is not None:  # a larger density takes each step that a smaller one takes, or a larger one
            window = fitting
            fitting = next((wider for wider in _wider(window, box, layout.grid) if fits(wider)), None)
        return self._bounds(layout, window, box)

    def boxes(self, layout: TokenLayout) -> TileGrid:
        """With ``density``, one cut for all targets, so that larger windows never touch fewer pairs."""
        if self.tile is not None:
            return layout.boxes(self.tile)
        if self.density is not None:
            return best_boxes(layout, self._bounds(layout, _share(layout.grid, 1, 2), stride=(1, 1, 1)))
        return best_boxes(layout, self.windows(layout))

    def _window(self, layout: TokenLayout) -> Triple:
        """``window`` with its defaults filled in."""
        t, h, w = (max(1, size // step) for size, step in zip(layout.grid, self.dilation, strict=True))
        if self.window is None:
            return _share((t, h, w), 1, 2, least=self.stride)
        t, h, w = (whole if given == -1 else given for given, whole in zip(self.window, (t, h, w), strict=True))
        return t, h, w

    def _bounds(self, layout: TokenLayout, window: Triple, stride: Triple) -> AxisWindows:
        axes = []
        for name, size, width, shared, step, causal in zip(
            AXES, layout.grid, window, stride, self.dilation, self.causal, strict=True
        ):
            if width * step > size:
                raise ValueError(
                    f"window {width} with dilation {step} does not fit the {name} axis of {size} tokens; "
                    "make window * dilation (and stride * dilation) at most its size."
                )
            if shared > width:
                raise ValueError(
                    f"stride must be at most the window, got stride {shared} and window {width} on the {name} axis; "
                    "use a smaller stride."
                )
            axes.append(_axis_bounds(size, width, shared, step, causal))
        return AxisWindows(torch.cat(axes).int(), self.dilation)


def _share(sizes: Triple, part: int, parts: int, least: Triple = (1, 1, 1)) -> Triple:
    """part / parts of each size, rounded half up, but no less than ``least``."""
    t, h, w = ((2 * part * size + parts) // (2 * parts) for size in sizes)
    return max(t, least[0]), max(h, least[1]), max(w, least[2])


def _wider(window: Triple, box: Triple, grid: Triple) -> Iterator[Triple]:
    """The window grown by two boxes on one axis, or to all of it; the axis that sees the smallest share first.

    With the box as stride, odd numbers of boxes start on box borders: what is computed is what is kept.
    """
    for axis in sorted(range(3), key=lambda axis: window[axis] / grid[axis]):
        if window[axis] < grid[axis]:
            width = window[axis] + 2 * box[axis]
            grown = list(window)
            grown[axis] = width if width <= grid[axis] else grid[axis]
            yield grown[0], grown[1], grown[2]


def _axis_bounds(size: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """First and last key of each query coordinate, int64 [size, 2]."""
    token = torch.arange(size)
    offset, query = token % dilation, token // dilation
    count = (size - offset + dilation - 1) // dilation  # tokens of the query's class
    shift = stride - 1 if causal else stride // 2
    leader = torch.minimum(query // stride * stride + shift, count - 1)
    if causal:
        first, last = (leader - window + 1).clamp(min=0), query
    else:
        first = torch.minimum((leader - window // 2).clamp(min=0), count - window)
        last = first + window - 1
    return torch.stack([first, last], 1) * dilation + offset[:, None]
