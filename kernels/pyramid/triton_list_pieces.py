"""Block lists the other way round, in pieces of bounded length: what the backward over keys walks.

Entries are sorted by the key block that they name, all heads of all passes in one sort, which keeps the order of
queries: results repeat bit for bit. Shapes depend on the lists' shapes alone, and nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.pyramid.lists import BlockLists

_LANES = 256


class Pass(NamedTuple):
    """A list's share of what all passes have together.

    Args:
        items, heads: batch items and heads that have lists of their own.
        first_row: number of its first row.
        first_entry: number of its first entry.
        pieces: as many as its shape allows for.
        longest: entries of a piece.
    """

    items: int
    heads: int
    first_row: int
    first_entry: int
    pieces: int
    longest: int


class Pieces(NamedTuple):
    """Rows are the key blocks of each list head, one after the other, pass after pass; R in all, E entries.

    Args:
        passes: where each pass's rows, entries and pieces lie.
        entries: int64 [E], numbers of the entries, row after row; those that are not listed come last.
        starts: int32 [R + 1], of each row's entries.
        first: int32 [R + 1], of each row's pieces.
        owners: int32 [pieces], the row of each; unspecified from ``first[R]`` on.
    """

    passes: list[Pass]
    entries: Tensor
    starts: Tensor
    first: Tensor
    owners: Tensor


@triton.jit(do_not_specialize=["entries", "per_head", "kept", "blocks", "first_row", "first_entry", "rows"])
def _entry_rows(
    counts_ptr, indices_ptr, named_ptr, entries, per_head, kept, blocks, first_row, first_entry, rows,
    LANES: tl.constexpr,
):  # fmt: skip
    """The row that each entry of a list names; ``rows``, beyond all of them, for what is not listed."""
    entry = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = entry < entries
    query = entry // kept
    listed = entry - query * kept < tl.load(counts_ptr + query, mask=valid, other=0)
    block = tl.load(indices_ptr + entry, mask=valid & listed, other=0)
    row = first_row + entry // per_head * blocks + block
    tl.store(named_ptr + first_entry + entry, tl.where(listed, row, rows), mask=valid)


@triton.jit
def _entries_before(named_ptr, row, entries, halvings):
    """How many of the sorted ``named`` are less than each of ``row``."""
    low = tl.zeros_like(row)
    high = low + entries
    for _ in range(halvings):
        middle = (low + high) // 2
        less = (low < high) & (tl.load(named_ptr + middle, mask=middle < entries, other=0) < row)
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return low


@triton.jit(do_not_specialize=["entries", "halvings", "rows", "second_row", "longest", "second_longest"])
def _row_starts(
    named_ptr, starts_ptr, needed_ptr, entries, halvings, rows, second_row, longest, second_longest,
    LANES: tl.constexpr,
):  # fmt: skip
    """Where each row's entries start, and how many pieces the row before it needs."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    start = _entries_before(named_ptr, row, entries, halvings)
    before = _entries_before(named_ptr, row - 1, entries, halvings)
    length = tl.where(row - 1 < second_row, longest, second_longest)
    tl.store(starts_ptr + row, start, mask=row <= rows)
    tl.store(needed_ptr + row, (start - before + length - 1) // length, mask=row <= rows)


@triton.jit(do_not_specialize=["rows"])
def _write_owners(first_ptr, owners_ptr, rows, LANES: tl.constexpr):
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    first = tl.load(first_ptr + row, mask=row < rows, other=0)
    pieces = tl.load(first_ptr + row + 1, mask=row < rows, other=0) - first
    for number in range(tl.max(pieces, 0)):
        tl.store(owners_ptr + first + number, row, mask=number < pieces)


def pieces_of(all_lists: Sequence[BlockLists], blocks: int, piece_rows: int) -> Pieces:
    """Each key block's entries in pieces of ``piece_rows`` query rows at most, ``blocks`` key blocks a head."""
    passes, rows, entries = [], 0, 0
    for lists in all_lists:
        items, heads = lists.counts.shape[:2]
        longest = piece_rows // lists.rows
        pieces = items * heads * blocks + lists.indices.numel() // longest
        passes.append(Pass(items, heads, rows, entries, pieces, longest))
        rows += items * heads * blocks
        entries += lists.indices.numel()
    device = all_lists[0].indices.device
    named = torch.empty(entries, dtype=torch.int32, device=device)
    for lists, each in zip(all_lists, passes, strict=True):
        size, kept = lists.indices.numel(), max(1, lists.indices.shape[-1])
        _entry_rows[(max(1, triton.cdiv(size, _LANES)),)](
            lists.counts, lists.indices, named, size, lists.counts.shape[2] * kept, kept, blocks,
            each.first_row, each.first_entry, rows, _LANES,
        )  # fmt: skip
    named, order = named.sort(stable=True)
    starts, needed = torch.empty(2, rows + 1, dtype=torch.int32, device=device)
    programs = (triton.cdiv(rows + 1, _LANES),)
    _row_starts[programs](
        named, starts, needed, entries, entries.bit_length(), rows, passes[-1].first_row or rows,
        passes[0].longest, passes[-1].longest, _LANES,
    )  # fmt: skip
    first = needed.cumsum(0, dtype=torch.int32)
    owners = torch.empty(sum(each.pieces for each in passes), dtype=torch.int32, device=device)
    _write_owners[programs](first, owners, rows, _LANES)
    return Pieces(passes, order, starts, first, owners)
