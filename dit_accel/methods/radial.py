"""Radial attention: the further apart two frames are, the narrower the band of keys, and the fewer the frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import StaticMethod, largest_within
from dit_accel.plan import pairs_within, plan_from_tile_mask

# Frames are thinned out where the length scale falls below this many tokens, whatever the tile.
DECIMATION = 128


@dataclass(frozen=True, kw_only=True)
class RadialAttnProcessor(StaticMethod):
    """Static video mask whose width halves each time the distance between frames doubles (arXiv 2506.19852).

    With s tokens per frame, d = |i - j| the distance of query frame i and key frame j, k and l positions in their
    frames (row-major), bl(x) the bits of x, P = 2^bl(s) and the length scale ell(d) = P / 2^bl(d), a pair is kept when

        |k - l| <= w(d)   and   d mod max(1, 128 / ell(d)) = 0,

    where w(0) = s, w(1) = s (or s // 2) and w(d) = max(decay * ell(d), tile) from d = 2 on. Tiles are runs of ``tile``
    consecutive tokens of the flattened grid. On an image (one frame) every pair is kept, unless ``density`` is given.

    ``density=`` replaces ``decay``, ``first_distance`` and ``tile_rule`` by the family w(d) = c * ell(d) for all
    d >= 0, without dropping frames; c is solved for on the tiles that are computed (rule "any"). Where c = 0, the
    tiles that hold k = l, is still too dense, distances are dropped, those with the largest 2^bl(d) / (largest power
    of two dividing d) first. Masks of this family are nested, from the diagonal tiles (and the sink) to every pair.

    Args:
        decay: rho, the factor on the length scale, above 0. Default 1.0; 0.2 and 0.95 are published settings.
        first_distance: neighbouring frames see the "full" frame (released code since 2025-11-11, default) or "half" of
            it to each side (before).
        sink: every query sees all of the first frame of a video. Default True; released HunyuanVideo settings: False.
        tile_rule: "any" (default) computes each tile that holds a kept pair, so that no pair is lost. "strict" is the
            released judgement per pair of frames: a tile counts when, of its key columns with a kept pair, more than
            0.6 have more than tile / 3 kept rows; frames that do not start on a tile lose pairs at their borders. The
            diagonal tiles are added to it, and the last tile, if it is ragged, follows "any".
        tile: tokens per tile, also the least half-width. Default 128.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "radial"

    decay: float = 1.0
    first_distance: Literal["full", "half"] = "full"
    sink: bool = True
    tile_rule: Literal["any", "strict"] = "any"
    tile: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay > 0:
            raise ValueError(f"decay must be above 0, got {self.decay}.")
        if self.first_distance not in ("full", "half"):
            raise ValueError(f"first_distance must be full or half, got {self.first_distance!r}.")
        if self.tile_rule not in ("any", "strict"):
            raise ValueError(f"tile_rule must be any or strict, got {self.tile_rule!r}.")
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1 token, got {self.tile}.")

    def plan(self, layout: TokenLayout) -> BlockPlan:
        """The kept tiles of the flattened grid; a kept tile is computed whole."""
        parts = _cut(layout, self.tile)
        widths = self._half_widths(layout, parts)
        sink = self._sink(layout)
        keep = _least(_gap(parts) - _width(parts, widths, sink), parts) <= 0
        if self.tile_rule == "strict" and self.density is None:
            judged = _strict(parts, widths, sink, self.tile)
            judged.fill_diagonal_(True)
            if layout.visual_tokens % self.tile:
                judged[-1], judged[:, -1] = keep[-1], keep[:, -1]
            keep = judged
        return plan_from_tile_mask(layout, layout.raster(self.tile), keep)

    def ideal_density(self, layout: TokenLayout) -> float:
        """Share of the grid's pairs that the token rule keeps."""
        frames, size = _frames(layout)
        widths = self._half_widths(layout, _cut(layout, self.tile)).clamp(max=size - 1)
        banded = torch.where(widths < 0, 0, pairs_within(size, widths))  # pairs with |k - l| <= w
        distance = torch.arange(frames)
        frame_pairs = torch.where(distance == 0, frames, 2 * (frames - distance))
        pairs = int((frame_pairs * banded).sum())
        if self._sink(layout):
            pairs += int((size**2 - banded).sum())  # key frame 0 lies at each distance from one query frame
        return pairs / layout.visual_tokens**2

    def _sink(self, layout: TokenLayout) -> bool:
        """The only frame of an image is no sink."""
        return self.sink and layout.grid[0] > 1

    def _half_widths(self, layout: TokenLayout, parts: _Parts) -> Tensor:
        """Half-width of the band at each distance of frames, int64 [frames]; -1 where frames are dropped."""
        frames, size = _frames(layout)
        distance = torch.arange(frames)
        bits = _bits(distance)
        period = 1 << size.bit_length()
        if self.density is not None:
            scale = self._solve(layout, parts)
            return torch.where(_least_scale(distance) <= scale, max(scale, 0) >> bits, -1)
        widths = (self.decay * period / (1 << bits).double()).long().clamp(min=self.tile)
        widths[0] = size
        widths[1:2] = size if self.first_distance == "full" else size // 2
        every = ((DECIMATION << bits) // period).clamp(min=1)
        return torch.where(distance % every == 0, widths, -1)

    def _solve(self, layout: TokenLayout, parts: _Parts) -> int:
        """c * P of the densest mask within ``density``, negative where distances are dropped.

        Every mask of the family is reached by an integer.
        """
        assert self.density is not None
        frames, size = _frames(layout)
        bits, least = _bits(torch.arange(frames)), _least_scale(torch.arange(frames))
        lowest, everything = int(least.min()), int((size - 1 << bits).max())
        distance = (parts.frame[:, None] - parts.frame).abs()
        gap = _gap(parts)
        needed = torch.where(gap > 0, gap << bits[distance], least[distance])
        if self._sink(layout):
            needed[:, parts.frame == 0] = lowest
        needed = _least(needed, parts)
        tokens = layout.raster(self.tile).tile_tokens().double()

        def density_of(step: int) -> float:
            return float(tokens @ ((needed <= lowest + step).double() @ tokens)) / layout.visual_tokens**2

        return lowest + largest_within(self.density, everything - lowest + 1, density_of)


class _Parts(NamedTuple):
    """The sequence cut at every frame and every tile: frame, tile, first and last position in the frame, [parts]."""

    frame: Tensor
    tile: Tensor
    first: Tensor
    last: Tensor


def _frames(layout: TokenLayout) -> tuple[int, int]:
    """Frames, and tokens per frame."""
    return layout.grid[0], layout.grid[1] * layout.grid[2]


def _cut(layout: TokenLayout, tile: int) -> _Parts:
    _, size = _frames(layout)
    tokens = layout.visual_tokens
    starts = torch.cat([torch.arange(0, tokens, size), torch.arange(0, tokens, tile)]).unique()
    ends = torch.cat([starts[1:], torch.tensor([tokens])])
    frame = starts // size
    return _Parts(frame=frame, tile=starts // tile, first=starts - frame * size, last=ends - 1 - frame * size)


def _bits(distance: Tensor) -> Tensor:
    """Number of bits of each integer, int64."""
    return torch.frexp(distance.double()).exponent.long()


def _least_scale(distance: Tensor) -> Tensor:
    """The least c * P, 0 or below, at which frames at this distance are not dropped: log2 of 2^bl(d) / 2^n, shifted."""
    power = (distance & -distance).clamp(min=1)
    thinning = torch.where(distance == 0, 0, _bits(distance) + 1 - _bits(power))
    return thinning - thinning.max()


def _gap(parts: _Parts) -> Tensor:
    """Least |k - l| of each pair of parts, int64 [parts, parts]."""
    ahead = parts.first[None, :] - parts.last[:, None]
    return torch.maximum(ahead, parts.first[:, None] - parts.last[None, :]).clamp(min=0)


def _width(parts: _Parts, widths: Tensor, sink: bool) -> Tensor:
    """Half-width between each pair of parts, int64 [parts, parts]."""
    width = widths[(parts.frame[:, None] - parts.frame).abs()]
    if sink:
        width[:, parts.frame == 0] = int(parts.last.max()) + 1
    return width


def _strict(parts: _Parts, widths: Tensor, sink: bool, tile: int) -> Tensor:
    """The released judgement of each tile per pair of frames, bool [tiles, tiles]."""
    width = _width(parts, widths, sink)
    rows = (parts.last - parts.first + 1)[:, None]

    def columns(least: int) -> Tensor:
        """Key columns of each pair of parts with at least ``least`` kept rows: in a band they are an interval."""
        first = torch.maximum(parts.first, parts.first[:, None] + least - 1 - width)
        last = torch.minimum(parts.last, parts.last[:, None] - least + 1 + width)
        possible = (rows >= least) & (2 * width + 1 >= least)
        return (last - first + 1).clamp(min=0) * possible

    share_of_columns = 5 * columns(tile // 3 + 1) > 3 * columns(1)
    size = int(parts.last.max()) + 1
    placed = parts.tile - parts.frame * size // tile < -(-size // tile)  # a frame is given no more tiles than it fills
    return _least((~(share_of_columns & placed & placed[:, None])).int(), parts) == 0


def _least(values: Tensor, parts: _Parts) -> Tensor:
    """The least value among the parts of each pair of tiles, [tiles, tiles]."""
    tiles, number = int(parts.tile[-1]) + 1, len(parts.tile)
    most = torch.iinfo(values.dtype).max
    rows = values.new_full((tiles, number), most)
    rows.scatter_reduce_(0, parts.tile[:, None].expand_as(values), values, "amin")
    both = values.new_full((tiles, tiles), most)
    return both.scatter_reduce_(1, parts.tile.expand_as(rows), rows, "amin")
