"""What the operator is measured on. Cases are data; plans that come from methods are handed in from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dit_accel.kernels.block_sparse.plan import BlockPlan, TileGrid, Triple
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask

MakePlan = Callable[[torch.device], BlockPlan]


@dataclass(frozen=True)
class Case:
    """One shape and one plan.

    Args:
        name: unique among the cases.
        group: cases of one group differ in density only and make one curve of the picture; "" for a case by itself.
        layout: the sequence.
        heads: heads.
        head_dim: channels per head.
        make_plan: the plan, on a device.
        density: share of all pairs that the exact rule keeps, for a plan with a window.
        training: forward and backward instead of forward.
        quick: part of the short run.
    """

    name: str
    group: str
    layout: TokenLayout
    heads: int
    head_dim: int
    make_plan: MakePlan
    density: float | None = None
    training: bool = False
    quick: bool = False


def random_lists(layout: TokenLayout, tiles: TileGrid, heads: int, density: float) -> MakePlan:
    """Each query tile of each head sees as many key tiles as any other, drawn anew."""

    def make(device: torch.device) -> BlockPlan:
        count = tiles.num_tiles
        generator = torch.Generator(device).manual_seed(0)
        draw = torch.rand(heads, count, count, generator=generator, device=device)
        kept = draw.argsort(dim=-1)[..., : max(1, round(density * count))]
        keep = torch.zeros(heads, count, count, dtype=torch.bool, device=device).scatter_(-1, kept, True)
        return plan_from_tile_mask(layout, tiles, keep)

    return make


@dataclass(frozen=True)
class RandomLists:
    """A group of cases with random lists; ``box`` None means raster tiles of 128 tokens."""

    grid: Triple
    heads: int
    head_dim: int
    densities: tuple[float, ...]
    box: Triple | None = None
    text_tokens: int = 0
    training: bool = False
    quick: tuple[float, ...] = ()

    def cases(self) -> Iterable[Case]:
        layout = TokenLayout(self.grid, self.text_tokens, "suffix" if self.text_tokens else "none")
        tiles = layout.boxes(self.box) if self.box else layout.raster(128)
        kind = "boxes {}x{}x{}".format(*self.box) if self.box else "raster"
        group = f"random lists, {kind}, {layout.num_tokens:,} tokens, {self.heads} heads, D={self.head_dim}"
        group += ", training" if self.training else ""
        for density in self.densities:
            yield Case(
                name=f"{group}, density {density:g}",
                group=group,
                layout=layout,
                heads=self.heads,
                head_dim=self.head_dim,
                make_plan=random_lists(layout, tiles, self.heads, density),
                training=self.training,
                quick=density in self.quick,
            )


GPU_LISTS = (
    RandomLists((21, 45, 80), 40, 128, (1.0, 0.5, 0.25, 0.1, 0.05), quick=(0.25, 0.1, 0.05)),
    RandomLists((21, 45, 80), 40, 128, (0.25, 0.1, 0.05), box=(4, 4, 8)),  # boxes that stick out
    RandomLists((30, 48, 80), 24, 128, (0.25, 0.1, 0.05), box=(2, 8, 8), quick=(0.25, 0.1, 0.05)),  # boxes that fit
    RandomLists((1, 1, 17_776), 48, 64, (1.0, 0.25, 0.1, 0.05), quick=(0.25, 0.1, 0.05)),
    RandomLists((1, 1, 32_760), 12, 128, (0.25,), training=True),
    RandomLists((1, 1, 65_536), 6, 64, (0.1,), training=True),
)
CPU_LISTS = (
    RandomLists((1, 1, 4_096), 8, 64, (0.5, 0.3, 0.1)),
    RandomLists((1, 1, 8_192), 8, 128, (0.3,)),
    RandomLists((1, 1, 1_000), 2, 32, (1.0, 0.5, 0.25), quick=(0.25,)),
    RandomLists((3, 14, 22), 2, 32, (0.5, 0.25), box=(1, 8, 16), text_tokens=21, quick=(0.25,)),
)


def random_cases(device: torch.device) -> list[Case]:
    """The cases with random lists that fit the device."""
    table = GPU_LISTS if device.type == "cuda" else CPU_LISTS
    return [case for lists in table for case in lists.cases()]
