"""One program writes a run of entries for some query blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.pyramid.lists import WORD
from dit_accel.kernels.pyramid.log_linear_lists import Run

_TILE = 1024  # entries of one program


@triton.jit(do_not_specialize=["queries", "width", "column", "first", "entries", "rows", "parent_tokens",
                               "covered_tokens", "num_parents", "num_covered"])  # fmt: skip
def write_run(
    indices_ptr, hidden_ptr, parents_ptr, covered_ptr,
    queries, width, column, first, entries, rows, parent_tokens, covered_tokens, num_parents, num_covered,
    HAS_PARENTS: tl.constexpr, COVERED: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, QUERIES)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    query = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    entry = tl.arange(0, ENTRIES)
    inside = (query < queries)[:, None] & (entry < entries)[None, :]
    parent = tl.broadcast_to(entry[None, :], [QUERIES, ENTRIES])
    if HAS_PARENTS:
        family = head * num_parents + query * rows // parent_tokens
        parent = tl.load(parents_ptr + family[:, None] * entries + entry[None, :], mask=inside, other=0)
    places = (head * queries + query)[:, None] * width + column + entry[None, :]
    tl.store(indices_ptr + places, first + parent, mask=inside)
    if COVERED > 0:
        covered_ptr += (head * num_covered + query * rows // covered_tokens) * COVERED
        for word in tl.static_range(WORDS):
            hidden = tl.zeros([QUERIES, ENTRIES], tl.int32)
            for i in range(COVERED):
                covered = tl.load(covered_ptr + i, mask=query < queries, other=0)
                key = covered % BLOCK
                bit = tl.where(key // BITS == word, 1 << key % BITS, 0)
                hidden |= tl.where(parent == (covered // BLOCK)[:, None], bit[:, None], 0)
            tl.store(hidden_ptr + places * WORDS + word, hidden, mask=inside)


def triton_write(run: Run, indices: Tensor, hidden: Tensor | None, column: int, block: int, rows: int) -> None:
    """The entries of a run and the means they leave out, into contiguous lists from ``column`` on."""
    batch, heads, queries, width = indices.shape
    entries = triton.next_power_of_2(run.entries)
    tile = min(max(1, _TILE // entries), triton.next_power_of_2(queries))
    parents = indices if run.parents is None else run.parents
    covered = indices if run.covered is None else run.covered
    write_run[(triton.cdiv(queries, tile) * batch * heads,)](
        indices, indices if hidden is None else hidden, parents, covered,
        queries, width, column, run.first, run.entries, rows, run.parent_tokens, run.covered_tokens,
        parents.shape[2], covered.shape[2],
        run.parents is not None, 0 if run.covered is None else covered.shape[-1], block, -(-block // WORD), WORD,
        tile, entries, num_warps=4,
    )  # fmt: skip
