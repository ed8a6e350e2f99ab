"""DraftAttention: a draft of the attention map between regions of a frame says which of them attend to which."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import BlockPlan, TileGrid, Triple
from dit_accel.kernels.selection.choose import head_percentile, row_top_k, row_top_p
from dit_accel.kernels.selection.lists import lists_from_mask
from dit_accel.kernels.selection.pool import tile_means
from dit_accel.kernels.selection.weigh import best_within
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import DynamicMethod, check_triple

SelectBy = Literal["head", "row", "mass"]


@dataclass(frozen=True, kw_only=True)
class DraftAttnProcessor(DynamicMethod):
    """Attention between regions that a low-resolution draft finds important (arXiv 2505.14708), in every call anew.

    The grid is cut into regions; with q' and k' the means of each region's queries and keys, every head's draft is

        A = softmax(q' k'^T / sqrt(head dim))        over regions, in float32.

    The pairs of regions with the highest draft are computed whole, the others not at all. Ties go to the lower query,
    then the lower key. Each region keeps at least its best key region, where the published choice may leave a region
    without any. Sizes that do not divide leave smaller regions at the end of an axis; no token is moved.

    Pairs that are kept in any case (the best of each region, ``sink``, ``same_frame``) are part of the share asked for;
    they all stay where they alone exceed it. To what "mass" keeps they are added.

    ``density=`` replaces ``keep``: the best pairs, in order, for as long as their tokens stay within ``density`` of the
    head's pairs, or of each region's keys for "row"; counted exactly where regions differ in size.

    Args:
        region: tokens of a region per axis (frame, row, column). Default None: (1, 8, 16), or (1, 16, 8) where the
            frame is taller than wide. Regions of 128 tokens run fastest.
        select_by: what competes: "head" (default, published) all pairs of a head's draft, so that regions keep
            different numbers of keys; "row" the keys of each region, equally many; "mass" the keys of each region, the
            fewest that hold ``mass`` of its draft.
        keep: share of the pairs of regions, in (0, 1], rounded up. Default 0.25, published for Wan 2.1; HunyuanVideo:
            0.1.
        mass: share of the draft that "mass" keeps, in (0, 1]. Default 0.9.
        sink: every query sees the first layer of regions, that of the first frame. Default False, as published.
        same_frame: every query sees its own layer of regions, that of its frame. Default False, as published.

    A grid with a single layer of regions, as an image, has neither sink nor same frame.

    Raises:
        ValueError: an option out of its range, or ``density`` with "mass", which decides by itself how much it keeps.
    """

    name: ClassVar[str] = "draft"

    region: Triple | None = None
    select_by: SelectBy = "head"
    keep: float = 0.25
    mass: float = 0.9
    sink: bool = False
    same_frame: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.region is not None:
            check_triple("region", self.region)
        if self.select_by not in get_args(SelectBy):
            raise ValueError(f"select_by must be head, row or mass, got {self.select_by!r}.")
        for share in ("keep", "mass"):
            if not 0 < getattr(self, share) <= 1:
                raise ValueError(f"{share} must be in (0, 1], got {getattr(self, share)}.")
        if self.density is not None and self.select_by == "mass":
            raise ValueError(
                f"density does not go with select_by='mass', got density={self.density}; "
                "set mass, or select by head or row."
            )

    def tiles(self, layout: TokenLayout) -> TileGrid:
        """The grid cut into regions."""
        _, rows, columns = layout.grid
        return layout.boxes(self.region or ((1, 16, 8) if rows > columns else (1, 8, 16)))

    def select(self, layout: TokenLayout, q: Tensor, k: Tensor) -> BlockPlan:
        """The regions that the draft of one call keeps."""
        tiles = self.tiles(layout)
        queries, keys = (tile_means(x, tiles, layout.prefix) for x in (q, k))
        scores = (queries * q.shape[-1] ** -0.5) @ keys.mT
        always = row_top_k(scores, 1)
        if self.sink or self.same_frame:
            always = always | self._given(tiles, q.device)
        keep = self._choose(scores, always, tiles) | always
        lists = lists_from_mask(keep, tiles.tile_tokens(q.device) < tiles.tile_size)
        return BlockPlan(tiles, *lists, prefix=layout.prefix, suffix=layout.suffix)

    def ideal_density(self, layout: TokenLayout) -> float:
        """The share of the grid's pairs to expect; for "mass" about the most, what a flat draft keeps.

        What is chosen by score is taken to fall on regions of all sizes alike.
        """
        tiles = self.tiles(layout)
        regions, sizes, given = tiles.num_tiles, tiles.tile_tokens().double(), self._given(tiles)
        given_share = float(sizes @ (given.double() @ sizes)) / tiles.num_tokens**2
        if self.select_by == "mass":
            return min(1.0, given_share + _ceil(self.mass * regions) / regions)
        least = max(given_share, 1 / regions)
        if self.density is not None:
            return max(self.density, least)
        kept = _ceil(self.keep * regions**2) if self.select_by == "head" else _ceil(self.keep * regions) * regions
        given_pairs = int(given.sum())
        chosen = max(0, kept - given_pairs) / max(1, regions**2 - given_pairs)
        return max(given_share + (1 - given_share) * chosen, least)

    def _given(self, tiles: TileGrid, device: torch.device | None = None) -> Tensor:
        """The pairs kept whatever the draft says, bool [regions, regions]."""
        layers = tiles.tiles[0]
        layer = torch.arange(tiles.num_tiles, device=device) // (tiles.num_tiles // layers)
        sink, same_frame = (wanted and layers > 1 for wanted in (self.sink, self.same_frame))
        return ((layer == 0) & sink) | ((layer[:, None] == layer) & same_frame)

    def _choose(self, scores: Tensor, always: Tensor, tiles: TileGrid) -> Tensor:
        """bool [B, H, regions, regions]; ``always`` comes first, so that it is part of what is kept."""
        if self.select_by == "mass":
            return row_top_p(scores, self.mass)
        if self.select_by == "head":
            scores = scores.log_softmax(-1)  # rows compete; the logarithm tells apart what the softmax rounds to 0
        scores = scores.masked_fill(always, torch.inf)
        if self.density is None:
            if self.select_by == "head":
                return head_percentile(scores, self.keep)
            return row_top_k(scores, _ceil(self.keep * tiles.num_tiles))
        sizes = tiles.tile_tokens(scores.device)
        if self.select_by == "row":
            return best_within(scores, sizes, _budget(self.density, tiles.num_tokens))
        kept = best_within(
            scores.flatten(-2), (sizes[:, None] * sizes).flatten(), _budget(self.density, tiles.num_tokens**2)
        )
        return kept.reshape(scores.shape)


def _ceil(number: float) -> int:
    return math.ceil(round(number, 6))  # 0.07 * 100 is a little more than 7


def _budget(share: float, whole: int) -> int:
    return math.floor(round(share * whole, 6))
