"""Random calls of the block-sparse operator, each a function of its seed: what ``kernel_check`` runs.

Cases come in families of ``FAMILY`` seeds that share all that a kernel is compiled for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import AxisWindows, BlockPlan, PooledKeys, TileGrid
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.kernels.selection.lists import lists_from_mask
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.plan import BOXES, plan_from_tile_mask, plan_from_windows

FAMILY = 25
BACKENDS = ("gluon", "triton")
HEAD_DIMS = {"gluon": (64, 128), "triton": (8, 16, 24, 33, 40, 56, 64, 72, 80, 88, 96, 112, 120, 127, 128)}
DTYPES = {"gluon": ("bfloat16", "float16"), "triton": ("bfloat16", "float16", "float32")}
ODD_TILES: tuple[Triple, ...] = ((1, 3, 5), (2, 3, 7), (1, 1, 1), (3, 5, 7), (1, 1, 37))
KINDS = (
    "random lists", "window", "isolated tiles", "union window", "random lists", "every tile", "dilated window",
    "no tile", "window",
)  # fmt: skip
STYLES = ("fused", "heads outside", "contiguous", "odd offset", "padded channels", "strided channels", "one item")
GRIDS: tuple[Triple, ...] = (
    (1, 1, 1), (1, 1, 257), (1, 31, 37), (3, 1, 53), (13, 1, 1), (2, 29, 1), (8, 8, 16), (1, 32, 32), (2, 37, 16),
)  # fmt: skip
LARGE_GRIDS: tuple[Triple, ...] = ((13, 30, 45), (21, 45, 80), (33, 45, 80))
TEXTS = (1, 7, 64, 77, 128, 226, 300, 512)
POOLED = (1, 5, 128, 130, 256)
MOST_IN_SMALL_TILES = 1400  # tokens of a grid whose tiles may hold a single one
JUDGED_WITH_GRADIENTS = 1500  # tokens whose full float64 autograd is affordable
NAN_PADDING = ("gluon", "triton")  # backends that never read the text's padding; hostile_check tries it on all
LOUD = 1000.0  # what the text's padding holds otherwise
GUARD = 64  # elements of NaN around what a view may read


@dataclass(frozen=True)
class Case:
    """What a record says of a case; with its seed enough to make the call again."""

    seed: int
    backend: str
    head_dim: int
    dtype: str
    batch: int
    heads: int
    grid: Triple
    tile: Triple
    text_position: TextPosition
    text_tokens: int
    text_lengths: bool
    nan_padding: bool  # keys and values of the text's padding are NaN
    kind: str
    list_shape: tuple[bool, bool]  # own lists for each batch item, for each head
    kept: float  # share of tiles in random lists
    pooled: int
    style: str
    scale: float
    gradients: bool

    @property
    def layout(self) -> TokenLayout:
        """The sequence; a raster cut lies on a grid of one row."""
        return TokenLayout(self.grid, self.text_tokens, self.text_position)


def case_of(seed: int, largest: int | None = None) -> Case:
    """The case of a seed; ``largest`` tokens at most on its grid."""
    family, own = seed // FAMILY, random.Random(f"case {seed}")
    shared = random.Random(f"family {family}")
    backend = BACKENDS[family % len(BACKENDS)]
    turn = family // len(BACKENDS)  # each kind, layout and head dim comes as often as any other
    kind, style = KINDS[turn % len(KINDS)], STYLES[(turn + turn // len(KINDS)) % len(STYLES)]
    dim, dtype = HEAD_DIMS[backend][turn % len(HEAD_DIMS[backend])], shared.choice(DTYPES[backend])
    raster = shared.random() < 0.25 and "window" not in kind
    tile = shared.choice(BOXES if backend == "gluon" or shared.random() < 0.7 else ODD_TILES)
    has_text, has_lengths, nan_padding = (shared.random() < 0.7 for _ in range(3))
    has_pooled, gradients = shared.random() < 0.35, shared.random() < 0.5

    if tile in ODD_TILES and not raster:  # so small that a large grid would have too many
        largest = min(largest or MOST_IN_SMALL_TILES, MOST_IN_SMALL_TILES)
    grid = _grid(own, largest)
    if raster:
        grid, tile = (1, 1, grid[0] * grid[1] * grid[2]), (1, 1, 128)
    text = own.choice(TEXTS) if has_text else 0
    tokens = grid[0] * grid[1] * grid[2] + text
    small = tokens <= JUDGED_WITH_GRADIENTS
    return Case(
        seed=seed,
        backend=backend,
        head_dim=dim,
        dtype=dtype,
        batch=own.choice((1, 1, 2, 3)) if small else 1,
        heads=own.choice((1, 2, 3, 5)) if small else 2,
        grid=grid,
        tile=tile,
        text_position=own.choice(("prefix", "suffix")) if text else "none",
        text_tokens=text,
        text_lengths=has_text and has_lengths,
        nan_padding=backend in NAN_PADDING and has_text and has_lengths and nan_padding and style != "one item",
        kind=kind,
        list_shape=(own.random() < 0.5, own.random() < 0.5),
        kept=own.choice((0.05, 0.2, 0.5)),
        pooled=own.choice(POOLED) if has_pooled else 0,
        style=style,
        scale=own.choice((dim**-0.5, dim**-0.5, 1.0, 0.3) if dtype != "float32" else (dim**-0.5, 2 * dim**-0.5)),
        gradients=gradients and small,
    )


def _grid(own: random.Random, largest: int | None) -> Triple:
    t, h, w = (9, 20, 24) if largest is None else (4, 6, 9)
    while True:
        draw = own.random()
        grid = (own.randint(1, t), own.randint(1, h), own.randint(1, w))
        if draw < 0.03:
            grid = own.choice(LARGE_GRIDS)
        elif draw < 0.3:
            grid = own.choice(GRIDS)
        if largest is None or grid[0] * grid[1] * grid[2] <= largest:
            return grid


def build(case: Case, device: str) -> Inputs:
    """The call: views into memory that is NaN elsewhere."""
    cpu = torch.Generator().manual_seed(case.seed)
    generator = torch.Generator(device).manual_seed(case.seed)
    plan = _plan(case, cpu)
    shape = (case.batch, plan.num_tokens, case.heads, case.head_dim)
    dtype = getattr(torch, case.dtype)
    q, k, v = views(case.style, shape, dtype, generator)
    lengths = None
    if case.text_lengths:
        lengths = torch.randint(0, case.text_tokens + 1, (case.batch,), generator=cpu, dtype=torch.int32)
        if case.style != "one item":  # whose items share memory
            start = 0 if plan.prefix else plan.tiles.num_tokens
            for x, item in ((x, item) for x in (k, v) for item in range(case.batch)):
                padding = slice(start + int(lengths[item]), start + case.text_tokens)
                x[item, padding] = torch.nan if case.nan_padding else LOUD
    pooled = None
    if case.pooled:
        pooled_k, pooled_v, _ = views("fused", (case.batch, case.pooled, *shape[2:]), dtype, generator)
        pooled = PooledKeys(pooled_k, pooled_v, _log_weights(case, plan, cpu).to(device))
    lengths = None if lengths is None else lengths.to(device)
    return Inputs(q, k, v, plan.to(device), case.scale, lengths, pooled, gradients=case.gradients)


def _plan(case: Case, generator: torch.Generator) -> BlockPlan:
    layout, tiles = case.layout, TileGrid(case.grid, case.tile)
    if "window" in case.kind:
        plan = plan_from_windows(layout, tiles, _windows(case))
    else:
        plan = plan_from_tile_mask(layout, tiles, _kept(case, tiles.num_tiles, generator))
    return _with_pooled(plan, case, generator) if case.pooled else plan


def _windows(case: Case) -> AxisWindows:
    own = random.Random(f"windows {case.seed}")
    bounds = []
    for size, most in zip(case.grid, (3, 6, 9), strict=True):
        before, after = own.randint(0, most), own.randint(0, most)
        position = torch.arange(size)
        bounds.append(torch.stack([(position - before).clamp(0), (position + after).clamp(max=size - 1)], 1))
    dilation = (2, 1, 3) if case.kind == "dilated window" else (1, 1, 1)
    return AxisWindows(torch.cat(bounds).int(), dilation, case.kind == "union window")


def _kept(case: Case, tiles: int, generator: torch.Generator) -> Tensor:
    lead = (case.batch if case.list_shape[0] else 1, case.heads if case.list_shape[1] else 1)
    if case.kind == "every tile":
        return torch.ones(*lead, tiles, tiles, dtype=torch.bool)
    keep = torch.zeros(*lead, tiles, tiles, dtype=torch.bool)
    if case.kind == "isolated tiles":  # one key tile for each query tile, the ragged last one often
        only = torch.randint(0, tiles, (*lead, tiles, 1), generator=generator)
        only[torch.rand(only.shape, generator=generator) < 0.3] = tiles - 1
        return keep.scatter_(-1, only, True)
    if case.kind == "random lists":  # uneven: a few rows see every tile, one row none
        keep = torch.rand(keep.shape, generator=generator) < case.kept
        keep |= torch.rand(tiles, 1, generator=generator) < 0.02
        keep[..., tiles // 2, :] = False
    return keep


def _with_pooled(plan: BlockPlan, case: Case, generator: torch.Generator) -> BlockPlan:
    """The plan with each pooled tile in most of its lists."""
    count = -(-case.pooled // plan.tiles.tile_size)
    seen = torch.rand(*plan.counts.shape, count, generator=generator) < 0.7
    keep, partial = (torch.cat([mask, seen], -1) for mask in (plan.tile_mask(), plan.partial_mask()))
    counts, cut, indices = lists_from_mask(keep, partial, max(1, int(keep.sum(-1).max())), count)
    return replace(plan, counts=counts, partial=cut, indices=indices, pooled=case.pooled)


def _log_weights(case: Case, plan: BlockPlan, generator: torch.Generator) -> Tensor:
    """A fifth of them -inf; the others are numbers that bfloat16 and float16 hold too."""
    own = random.Random(f"weights {case.seed}")
    shape = [size if own.random() < 0.5 else 1 for size in (case.batch, case.heads, plan.tiles.num_tiles)]
    weights = (4 * torch.randn(*shape, case.pooled, generator=generator)).round() / 4
    weights = weights.masked_fill(torch.rand(weights.shape, generator=generator) < 0.2, -torch.inf)
    return weights.expand(case.batch, -1, -1, -1) if own.random() < 0.5 else weights


def views(
    style: str, shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k and v [B, L, H, D], laid out as ``style`` says, in memory that is NaN elsewhere."""
    batch, length, heads, dim = shape
    around: dict[str, Any] = {"dtype": dtype, "device": generator.device}

    def nan(*size: int) -> Tensor:
        return torch.full(size, torch.nan, **around)

    if style == "fused":  # a projection to q, k and v at once
        q, k, v = nan(batch, length + 8, 3, heads, dim)[:, 4:-4].unbind(2)
    elif style == "heads outside":
        q, k, v = nan(3, batch, heads, length + 8, dim)[:, :, :, 4:-4].transpose(2, 3).unbind(0)
    elif style in ("contiguous", "odd offset"):  # an odd offset is not aligned to what a wide load reads
        first = GUARD + (5 if style == "odd offset" else 0)
        size = batch * length * heads * dim
        q, k, v = (nan(size + 2 * GUARD)[first : first + size].view(shape) for _ in range(3))
    elif style == "padded channels":
        q, k, v = nan(3, batch, length, heads, dim + 8)[..., :dim].unbind(0)
    elif style == "strided channels":
        q, k, v = nan(3, batch, length, heads, dim, 2)[..., 1].unbind(0)
    elif style == "one item":  # the same memory for every batch item
        q, k, v = nan(3, 1, length, heads, dim).unbind(0)
    else:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}.")
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, device=generator.device, generator=generator))
    return q.expand(shape), k.expand(shape), v.expand(shape)
