"""Random calls of list attention and of log-linear attention, each a function of its seed: what ``list_check`` runs.

Cases come in families of ``FAMILY`` seeds that share what the kernels are compiled for, two of lists to one of
log-linear attention.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.eval.kernel_cases import LOUD, STYLES, views
from dit_accel.kernels import PooledKeys
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.kernels.pyramid.lists import SIZES, BlockLists, ListInputs
from dit_accel.kernels.pyramid.log_linear import depth_of
from dit_accel.kernels.pyramid.order import curve_order

FAMILY = 10
HEAD_DIMS = (64, 128, 32, 64, 40, 80, 128, 96, 16, 33, 256)
DTYPES = ("bfloat16", "float16", "bfloat16", "float16", "float32")
ROWS = ((128, 16), (64, 16), (16,), (128, 16), (64,), (64, 32), (128,), (32, 128), (16, 16))  # of each pass
TOKENS = (1, 15, 16, 17, 63, 65, 127, 129, 257, 500, 777, 1024)
TEXTS = (0, 0, 3, 77)
LARGE_GRIDS: tuple[Triple, ...] = ((1, 64, 65), (5, 26, 32), (1, 1, 4099))
LARGEST = 4200  # tokens whose full float64 autograd is affordable, one item and one head at a time
SMALL = 1200  # tokens of which several are
NOT_READ = 1 << 30  # what lists hold beyond their counts


@dataclass(frozen=True)
class ListCase:
    """A call of ``list_attention``."""

    seed: int
    head_dim: int
    dtype: str
    block: int
    rows: tuple[int, ...]  # of each pass
    hidden: bool
    pooled: int  # blocks of pooled keys
    batch: int
    heads: int
    tokens: int  # on the curve
    off_curve: int
    scattered: bool  # the curve visits positions at random
    list_shape: tuple[bool, bool]  # own lists for each batch item, for each head
    kept: float
    style: str
    scale: float
    gradients: bool
    operator: str = "lists"


@dataclass(frozen=True)
class LogLinearCase:
    """A call of ``log_linear_attention``."""

    seed: int
    head_dim: int
    dtype: str
    block: int
    levels: int
    top_k: int
    exclude_covered: bool
    batch: int
    heads: int
    grid: Triple
    prefix: int
    suffix: int
    text_lengths: bool
    style: str
    gradients: bool
    operator: str = "log-linear"

    @property
    def tokens(self) -> int:
        """On the curve."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True, eq=False)
class LogLinearCall:
    """Arguments of ``log_linear_attention``; the case has the others."""

    q: Tensor
    k: Tensor
    v: Tensor
    order: Tensor
    text_lengths: Tensor | None


def case_of(seed: int, largest: int = LARGEST) -> ListCase | LogLinearCase:
    """The case of a seed, of ``largest`` tokens at most on its curve."""
    family = seed // FAMILY
    return _log_linear_case(seed, family // 3, largest) if family % 3 == 2 else _list_case(seed, family, largest)


def _list_case(seed: int, family: int, largest: int) -> ListCase:
    own, shared = random.Random(f"list case {seed}"), random.Random(f"list family {family}")
    turn = family - family // 3  # among the families of lists
    dim = HEAD_DIMS[turn % len(HEAD_DIMS)]
    pooled = shared.random() < 0.8
    tokens = 4099 if own.random() < 0.05 else own.choice((*TOKENS, own.randint(1, 1100)))
    tokens = min(largest, tokens)
    return ListCase(
        seed=seed,
        head_dim=dim,
        dtype=DTYPES[turn % len(DTYPES)],
        block=shared.choice((16, *SIZES)) if dim <= 128 else 16,
        rows=ROWS[turn % len(ROWS)],
        hidden=shared.random() < 0.6,
        pooled=own.randint(1, 3) if pooled else 0,
        batch=own.choice((1, 2)) if tokens <= SMALL else 1,
        heads=own.choice((1, 2, 3)) if tokens <= SMALL else 1,
        tokens=tokens,
        off_curve=own.choice(TEXTS),
        scattered=own.random() < 0.8,
        list_shape=(own.random() < 0.5, own.random() < 0.5),
        kept=own.choice((0.1, 0.4, 0.8, 1.0)),
        style=STYLES[turn % len(STYLES)],
        scale=own.choice((dim**-0.5, dim**-0.5, 2 * dim**-0.5)),
        gradients=own.random() < 0.5,
    )


def _log_linear_case(seed: int, turn: int, largest: int) -> LogLinearCase:
    own, shared = random.Random(f"log-linear case {seed}"), random.Random(f"log-linear family {turn}")
    block = shared.choice((16, *SIZES))
    grid = _grid(own, largest)
    tokens = grid[0] * grid[1] * grid[2]
    most = _most_levels(tokens, block)
    return LogLinearCase(
        seed=seed,
        head_dim=HEAD_DIMS[turn % (len(HEAD_DIMS) - 1)],
        dtype=DTYPES[turn % len(DTYPES)],
        block=block,
        levels=own.choice((most, own.randint(1, most))),
        top_k=own.choice((1, 3, 8, 20, 100)),
        exclude_covered=own.random() < 0.5,
        batch=own.choice((1, 2)) if tokens <= SMALL else 1,
        heads=own.choice((1, 2, 3)) if tokens <= SMALL else 1,
        grid=grid,
        prefix=own.choice(TEXTS),
        suffix=own.choice(TEXTS),
        text_lengths=own.random() < 0.6,
        style=STYLES[turn % len(STYLES)],
        gradients=own.random() < 0.5,
    )


def _grid(own: random.Random, largest: int) -> Triple:
    """Of one, two or three axes."""
    while True:
        axes = own.choice((1, 2, 3))
        t, h, w = ((1, 1, 1100), (1, 33, 33), (5, 13, 17))[axes - 1]
        grid = (own.randint(1, t), own.randint(1, h), own.randint(1, w))
        if own.random() < 0.05:
            grid = own.choice(LARGE_GRIDS)
        if grid[0] * grid[1] * grid[2] <= largest:
            return grid


def _most_levels(tokens: int, block: int) -> int:
    """Levels up to the first of a single block, at most three."""
    depth = 1
    while depth < 3 and tokens > block**depth:
        depth += 1
    return depth_of(tokens, block, depth)


def build_lists_call(case: ListCase, device: str) -> ListInputs:
    """The call: views into memory that is NaN elsewhere, positions off the curve too."""
    cpu, generator = torch.Generator().manual_seed(case.seed), torch.Generator(device).manual_seed(case.seed)
    length = case.tokens + case.off_curve
    places = torch.randperm(length, generator=cpu) if case.scattered else torch.arange(length)
    q, k, v = views(case.style, (case.batch, length, case.heads, case.head_dim), _dtype(case), generator)
    for x in (q, k, v):
        for item in x:  # one after the other, as they may share their memory
            item[places[case.tokens :].to(device)] = torch.nan
    lists = tuple(_to(_block_lists(case, rows, cpu), device) for rows in case.rows)
    pooled = _pooled(case, generator) if case.pooled else None
    return ListInputs(q, k, v, lists, places[: case.tokens].int().to(device), pooled, case.scale)


def _block_lists(case: ListCase, rows: int, generator: torch.Generator) -> BlockLists:
    """Pooled and own blocks in any order, pooled ones first; the first of several query blocks sees nothing."""
    own, lead = -(-case.tokens // case.block), _lead(case)
    keep = torch.rand(*lead, -(-case.tokens // rows), own + case.pooled, generator=generator) < case.kept
    keep[0, 0, : keep.shape[2] > 1] = False
    group = torch.ones(own + case.pooled).index_fill(0, torch.arange(own, own + case.pooled), 0)
    rank = torch.where(keep, group + torch.rand(keep.shape, generator=generator), 2)
    counts = keep.sum(-1).int()
    indices = rank.argsort(-1)[..., : max(1, int(counts.max()))].int()
    indices = indices.masked_fill(torch.arange(indices.shape[-1]) >= counts[..., None], NOT_READ)
    words = (*indices.shape, -(-case.block // 32))
    hidden = torch.randint(-(2**31), 2**31, words, generator=generator).int() if case.hidden else None
    return BlockLists(rows, case.block, counts, keep[..., own:].sum(-1).int(), indices, hidden)


def _to(lists: BlockLists, device: str) -> BlockLists:
    hidden = None if lists.hidden is None else lists.hidden.to(device)
    counts, pooled, indices = (x.to(device) for x in (lists.counts, lists.pooled, lists.indices))
    return BlockLists(lists.rows, lists.block, counts, pooled, indices, hidden)


def _pooled(case: ListCase, generator: torch.Generator) -> PooledKeys:
    """Some log weights are -inf, the last few as those of padding."""
    shape = (case.batch, case.pooled * case.block, case.heads, case.head_dim)
    k, v = (torch.randn(shape, generator=generator, device=generator.device).to(_dtype(case)) for _ in range(2))
    weights = torch.randn(*_lead(case), 1, shape[1], generator=generator, device=generator.device)
    weights = weights.masked_fill(weights > 1.5, -torch.inf)
    weights[..., -5:] = -torch.inf
    return PooledKeys(k, v, weights)


def _lead(case: ListCase) -> tuple[int, int]:
    return case.batch if case.list_shape[0] else 1, case.heads if case.list_shape[1] else 1


def build_log_linear_call(case: LogLinearCase, device: str) -> LogLinearCall:
    """The call: views into memory that is NaN elsewhere; the keys and values of the text's padding are loud."""
    generator = torch.Generator(device).manual_seed(case.seed)
    text = case.prefix + case.suffix
    shape = (case.batch, case.tokens + text, case.heads, case.head_dim)
    q, k, v = views(case.style, shape, _dtype(case), generator)
    lengths = None
    if case.text_lengths:
        own = random.Random(f"lengths {case.seed}")
        lengths = torch.tensor([own.randint(0, text) for _ in range(case.batch)], dtype=torch.int32, device=device)
        position = torch.arange(shape[1], device=device)
        of_text = torch.cat([position[: case.prefix], position[case.prefix + case.tokens :]])
        shared = int(lengths.max()) if case.style == "one item" else 0  # items whose memory is the same
        for x in (k, v):
            for item, valid in zip(x, lengths.tolist(), strict=True):
                item[of_text[max(shared, valid) :]] = LOUD
    order = (curve_order(case.grid) + case.prefix).to(device)
    return LogLinearCall(q, k, v, order, lengths)


def _dtype(case: ListCase | LogLinearCase) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, case.dtype)
    return dtype
