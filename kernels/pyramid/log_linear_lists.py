"""From the blocks chosen on every level to the lists of log-linear attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.pyramid.lists import WORD, BlockLists
from dit_accel.kernels.pyramid.means import Levels
from dit_accel.kernels.selection.backend import runs_triton

SHARED_ROWS = 128  # queries that share the coarse keys


class Run(NamedTuple):
    """Consecutive entries of a list: blocks of means of one level.

    Args:
        first: number of the level's block 0.
        entries: how many are listed, from ``first`` on where there are no parents.
        parents: whose children are listed, the choice of the level above [B, H, n, entries]; None: of all.
        covered: means left out, the choice of this level [B, H, m, K]; None: none are.
        parent_tokens: tokens of a row of ``parents``.
        covered_tokens: tokens of a row of ``covered``.
    """

    first: int
    entries: int
    parents: Tensor | None
    covered: Tensor | None
    parent_tokens: int
    covered_tokens: int


def log_linear_lists(chosen: Sequence[Tensor], levels: Levels, exclude_covered: bool) -> tuple[BlockLists, ...]:
    """The passes of log-linear attention: coarse keys, that 128 queries share, then what each query block sees alone.

    Text keys are listed with the top level, whose blocks they follow. With ``exclude_covered`` the means of level 1
    differ from query block to query block, and move to the second pass.

    Args:
        chosen: int32 [B, H, n_l, K_l] for level 1 and on, ascending rows, as ``hierarchical_top_k`` gives them.
        levels: where means and text keys lie.
        exclude_covered: hide the means that chosen blocks replace.
    """
    runs = [_run(level, chosen, levels, exclude_covered) for level in range(levels.depth, 0, -1)]
    fine = chosen[0]
    if not exclude_covered:
        return _lists(runs, fine[..., :0], levels, SHARED_ROWS), _lists([], fine, levels, levels.block)
    near = _lists(runs[-1:], fine, levels, levels.block)
    return (near,) if levels.depth == 1 else (_lists(runs[:-1], fine[..., :0], levels, SHARED_ROWS), near)


def _run(level: int, chosen: Sequence[Tensor], levels: Levels, exclude_covered: bool) -> Run:
    parents = None if level == levels.depth else chosen[level]
    start = levels.start(level)
    return Run(
        first=levels.size(1) + start // levels.block,
        entries=(levels.rows - start) // levels.block if parents is None else parents.shape[-1],
        parents=parents,
        covered=chosen[level - 1] if exclude_covered else None,
        parent_tokens=levels.block ** (level + 1),
        covered_tokens=levels.block**level,
    )


def _lists(runs: Sequence[Run], fine: Tensor, levels: Levels, rows: int) -> BlockLists:
    """The means of ``runs``, then blocks of tokens."""
    entries = sum(run.entries for run in runs)
    indices, hidden = _written(runs, fine, levels, rows) if runs else (fine, None)
    counts, pooled = (_constant(x, indices.shape[:3], fine.device) for x in (indices.shape[-1], entries))
    return BlockLists(rows, levels.block, counts, pooled, indices, hidden)


def _written(runs: Sequence[Run], fine: Tensor, levels: Levels, rows: int) -> tuple[Tensor, Tensor | None]:
    entries = sum(run.entries for run in runs)
    indices = fine.new_empty(*fine.shape[:2], -(-levels.tokens // rows), entries + fine.shape[-1])
    hidden = None if runs[0].covered is None else indices.new_empty(*indices.shape, -(-levels.block // WORD))
    if runs_triton(fine):
        from dit_accel.kernels.pyramid.triton_log_linear_lists import triton_write as write
    else:
        write = _write
    column = 0
    for run in runs:
        write(run, indices, hidden, column, levels.block, rows)
        column += run.entries
    if fine.shape[-1]:
        indices[..., entries:] = fine
    return indices, hidden


def _write(run: Run, indices: Tensor, hidden: Tensor | None, column: int, block: int, rows: int) -> None:
    """The entries of a run and the means they leave out, from ``column`` on."""
    first_token = torch.arange(indices.shape[2], device=indices.device) * rows
    if run.parents is None:
        parents = torch.arange(run.entries, dtype=torch.int32, device=indices.device).expand(*indices.shape[:3], -1)
    else:
        parents = run.parents[:, :, first_token // run.parent_tokens]
    entries = slice(column, column + run.entries)
    indices[..., entries] = parents + run.first
    if hidden is not None and run.covered is not None:
        covered = run.covered[:, :, first_token // run.covered_tokens]
        within = parents[..., :, None] == covered[..., None, :] // block  # [B, H, Q, entries, K]
        key = covered % block
        for word in range(hidden.shape[-1]):
            bits = torch.where(key // WORD == word, 1 << (key % WORD).long(), 0)
            hidden[..., entries, word] = (within * bits[..., None, :]).sum(-1).int()


@functools.lru_cache(maxsize=64)
def _constant(value: int, shape: torch.Size, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for calls that have gradients
        return torch.full(shape, value, dtype=torch.int32, device=device)
