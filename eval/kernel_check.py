"""The block-sparse kernel against a float64 reference on this machine's GPU, one record per case.

    python -m dit_accel.eval.kernel_check --output eval/results/kernel-check.jsonl

A case passes when the kernel's error is at most twice that of torch's dense attention in the same dtype under the
same mask, on the same inputs: a measuring stick that scales with the problem, not a tolerance picked by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.eval.machine import machine
from dit_accel.kernels import AxisWindows, BlockPlan, TileGrid
from dit_accel.kernels.block_sparse.reference import reference_attention, visible
from dit_accel.kernels.block_sparse.triton_forward import Launch, launch_for, triton_attention
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.plan import plan_from_tile_mask, plan_from_windows

GRIDS = ((5, 9, 11), (13, 30, 45), (21, 45, 80), (33, 45, 80))
TEXTS: tuple[tuple[TextPosition, int], ...] = (
    ("none", 0), ("prefix", 1), ("prefix", 77), ("prefix", 226), ("prefix", 512),
    ("suffix", 1), ("suffix", 77), ("suffix", 226), ("suffix", 512),
)  # fmt: skip
KINDS = ("box lists", "raster lists", "window", "dilated window", "union")
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
ROWS = 192  # query rows judged per case where a full reference would not fit


@dataclass(frozen=True)
class Case:
    grid: tuple[int, int, int]
    text_position: TextPosition
    text_tokens: int
    kind: str
    dtype: torch.dtype
    head_dim: int
    batch: int = 1
    heads: int = 2

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.text_tokens, self.text_position)


@dataclass(frozen=True)
class Outcome:
    error: float
    dense_error: float
    lse_error: float
    empty_rows: int

    @property
    def passed(self) -> bool:
        return self.error <= 2 * self.dense_error and self.lse_error < 1e-3


def cases() -> Iterator[Case]:
    """Every grid with every text span, dtype and head dim; all kinds on the small grid, two in turn on the large."""
    turn = itertools.cycle(KINDS)
    for grid, (position, text), dtype, dim in itertools.product(GRIDS, TEXTS, DTYPES, HEAD_DIMS):
        small = grid == GRIDS[0]
        for kind in KINDS if small else (next(turn), next(turn)):
            yield Case(grid, position, text, kind, dtype, dim, batch=2 if small else 1, heads=3 if small else 2)
    for dim in (16, 40, 80, 96):
        yield Case(GRIDS[0], "suffix", 7, "window", torch.bfloat16, dim, batch=2)


def build_plan(case: Case, generator: torch.Generator) -> BlockPlan:
    layout = case.layout
    if case.kind.endswith("lists"):
        tiles = layout.raster(128) if case.kind.startswith("raster") else layout.boxes((4, 4, 8))
        return plan_from_tile_mask(layout, tiles, _random_tiles(tiles, case, generator))
    radius = (3, 5, 9)
    dilation = (2, 1, 3) if case.kind == "dilated window" else (1, 1, 1)
    bounds = []
    for size, reach in zip(case.grid, radius, strict=True):
        position = torch.arange(size)
        bounds.append(torch.stack([(position - reach).clamp(0), (position + reach).clamp(max=size - 1)], 1))
    windows = AxisWindows(torch.cat(bounds).int(), dilation, union=case.kind == "union")
    return plan_from_windows(layout, layout.boxes((1, 8, 16)), windows)


def _random_tiles(tiles: TileGrid, case: Case, generator: torch.Generator) -> Tensor:
    """Lists per batch item and head, uneven: a few rows see every tile, one row none."""
    count = tiles.num_tiles
    keep = torch.rand(case.batch, case.heads, count, count, generator=generator) < 0.15
    keep |= torch.rand(count, 1, generator=generator) < 0.02
    keep[:, :, count // 2] = False
    return keep


def run_case(case: Case, device: str, seed: int, launch: Launch | None = None) -> Outcome:
    """The kernel on fresh inputs inside a larger buffer whose rest is NaN, outputs poisoned beforehand."""
    cpu = torch.Generator().manual_seed(seed)
    plan = build_plan(case, cpu).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    length, shape = plan.num_tokens, (case.batch, plan.num_tokens, 3, case.heads, case.head_dim)
    guard = torch.full((case.batch, length + 64, 3, case.heads, case.head_dim), torch.nan, device=device)
    guard[:, 32 : 32 + length] = torch.randn(shape, device=device, generator=generator)
    fused = guard.to(case.dtype)[:, 32 : 32 + length]
    q, k, v = fused.unbind(2)  # strided views of a fused projection
    text_lengths = None
    if case.text_tokens and case.kind != "union":
        text_lengths = torch.randint(
            0, case.text_tokens + 1, (case.batch,), device=device, generator=generator, dtype=torch.int32
        )
    scale = case.head_dim**-0.5
    poison = torch.full((case.batch, length, case.heads, case.head_dim), torch.nan, device=device, dtype=case.dtype)
    del poison  # the allocator hands this block to the output
    out, lse = triton_attention(q, k, v, plan, scale, text_lengths, launch)

    rows = _rows(length, plan, cpu).to(device)
    exact, exact_lse = reference_attention(q.double(), k.double(), v.double(), plan, scale, text_lengths, rows)
    mask = visible(plan, rows, text_lengths)
    query, key, value = (x.transpose(1, 2) for x in (q[:, rows], k, v))
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
    seen = mask.any(-1).expand(case.batch, case.heads, -1)  # [B, H, rows]
    dense = torch.where(seen.transpose(1, 2)[..., None], dense, 0.0)
    empty = ~seen
    got_lse = lse[:, :, rows].double()
    if not bool((got_lse[empty] == -torch.inf).all()):
        return Outcome(torch.nan, torch.nan, torch.nan, int(empty.sum()))
    return Outcome(
        error=_relative(out[:, rows], exact),
        dense_error=_relative(dense, exact),
        lse_error=float((got_lse - exact_lse)[seen].abs().max()) if bool(seen.any()) else 0.0,
        empty_rows=int(empty.sum()),
    )


def _rows(length: int, plan: BlockPlan, generator: torch.Generator) -> Tensor:
    """All rows of a small case; of a large one both ends, both ends of the grid, and a random sample."""
    if length <= 2048:
        return torch.arange(length)
    end = plan.prefix + plan.tiles.num_tokens
    ends = [range(8), range(plan.prefix, plan.prefix + 8), range(end - 8, end), range(length - 8, length)]
    sample = torch.randint(0, length, (ROWS - 32,), generator=generator)
    rows: Tensor = torch.cat([sample, *(torch.tensor(list(part)) for part in ends)]).unique()
    return rows


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def record(case: Case, outcome: Outcome, launch: Launch, facts: dict[str, str]) -> dict[str, object]:
    row = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch."), "tokens": case.layout.num_tokens}
    return {**row, **launch._asdict(), **asdict(outcome), "passed": outcome.passed, "machine": facts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one per case; rewritten")
    parser.add_argument("--shard", default="0/1", help="run every n-th case, as index/n")
    parser.add_argument("--limit", type=int, default=None, help="only the first n cases of the shard")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernel_check needs an NVIDIA GPU, and torch sees none; the CPU tests run the kernel's interpreter.")
        return 2
    index, shards = map(int, options.shard.split("/"))
    facts = machine()
    failed = 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w") as file:
        for number, case in enumerate(list(cases())[index::shards][: options.limit]):
            block_d = max(16, 1 << (case.head_dim - 1).bit_length())
            outcome = run_case(case, "cuda", seed=1000 * index + number)
            row = record(case, outcome, launch_for(torch.device("cuda"), block_d), facts)
            file.write(json.dumps(row) + "\n")
            file.flush()
            failed += not outcome.passed
            if not outcome.passed:
                print("FAILED", row)
    print(f"{number + 1 - failed} cases passed, {failed} failed, written to {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
