"""One batch item's tokens as tiles that lie one after the other in memory, and the lists over them.

Tiles of T tokens are numbered grid tiles first, then pooled tiles (keys only), then text tiles. A tile that is not
full is filled up with zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import TileGrid


class TileLists(NamedTuple):
    """Key tiles seen by query tiles, text included. Int64 tensors whose first dimension is the lists.

    Args:
        queries: [lists, same], the query tiles that a list holds for.
        heads: [lists, heads], the heads it holds for.
        counts: [lists], its key tiles.
        biased: [lists], how many of them, first in the list, need a bias on their scores.
        tiles: [lists, M], the key tiles; entries from ``counts`` on are unspecified.
    """

    queries: Tensor
    heads: Tensor
    counts: Tensor
    biased: Tensor
    tiles: Tensor


def tile_lists(inputs: Inputs) -> list[TileLists]:
    """The lists of grid tiles and, where there is text, of text tiles; text tiles stand first in each."""
    plan, device = inputs.plan, inputs.q.device
    size, grid, text = plan.tiles.tile_size, plan.tiles.num_tiles, _text_tiles(inputs)
    text_tiles = torch.arange(plan.num_key_tiles, plan.num_key_tiles + text, device=device)
    counts, partial, indices = (x[0].flatten(0, 1).long() for x in (plan.counts, plan.partial, plan.indices))
    per_head = plan.counts.shape[1]
    heads = torch.arange(inputs.q.shape[2], device=device)
    full_text = _valid_text(inputs) == text * size
    lists = TileLists(
        queries=torch.arange(grid, device=device).repeat(per_head)[:, None],
        heads=heads.reshape(per_head, -1).repeat_interleave(grid, 0),
        counts=counts + text,
        biased=torch.where(partial > 0, partial + text, 0 if full_text else text),
        tiles=torch.cat([text_tiles.expand(len(indices), -1), indices], 1),
    )
    if not text:
        return [lists]
    everything = torch.cat([text_tiles, torch.arange(grid, device=device)]).expand(text, -1)
    counts = torch.full((text,), text + grid, device=device)
    queries = torch.arange(grid, grid + text, device=device)[:, None]
    return [lists, TileLists(queries, heads.expand(text, -1), counts, counts, everything)]


def equal_lists(lists: TileLists, tile_pairs: int, *, merge: bool) -> Iterator[TileLists]:
    """Lists of one length each, at most ``tile_pairs`` pairs of tiles together; empty lists are left out.

    With ``merge`` equal lists become one, whose keys are then gathered once for several query tiles.
    """
    order = (lists.counts * (lists.counts.max() + 1) + lists.biased).argsort()
    counts, runs = lists.counts[order].unique_consecutive(return_counts=True)
    for count, run in zip(counts.tolist(), order.split(runs.tolist()), strict=True):
        if count:
            picked = TileLists(*(x[run] for x in lists))
            picked = picked._replace(tiles=picked.tiles[:, :count])
            for same in _merged(picked, max(1, tile_pairs // count)) if merge else [picked]:
                pairs = count * same.heads.shape[1] * same.queries.shape[1]
                for part in torch.arange(len(same.counts)).split(max(1, tile_pairs // pairs)):
                    yield TileLists(*(x[part] for x in same))


def _merged(lists: TileLists, most: int) -> Iterator[TileLists]:
    """Equal lists as one with at most ``most`` query tiles; those with equally many together."""
    rows = torch.cat([lists.tiles, lists.biased[:, None]], 1)
    _, number, sizes = rows.unique(dim=0, return_inverse=True, return_counts=True)
    groups = number.argsort(stable=True).split(sizes.tolist())
    pieces = sorted((piece for group in groups for piece in group.split(most)), key=len)
    for _, alike in itertools.groupby(pieces, key=len):
        members = torch.stack(list(alike))
        first = TileLists(*(x[members[:, 0]] for x in lists))
        yield first._replace(queries=lists.queries[members, 0])


def _valid_text(inputs: Inputs) -> int:
    """Text tokens that are keys."""
    return inputs.text if inputs.text_lengths is None else int(inputs.text_lengths)


def query_tiles(inputs: Inputs) -> Tensor:
    """[heads, grid and text tiles, T, D] in float32, or float64 for float64 inputs."""
    tiles = _empty(inputs, inputs.plan.tiles.num_tiles)
    _put_grid(tiles, inputs, inputs.q)
    _put(tiles, inputs.plan.tiles.num_tiles, _text(inputs, inputs.q))
    return tiles


def key_tiles(inputs: Inputs, tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """Keys or values, [heads, key tiles, T, D] in float32 or float64; text padding is left out, it may be NaN."""
    tiles = _empty(inputs, inputs.plan.num_key_tiles)
    _put_grid(tiles, inputs, tokens)
    if pooled is not None:
        _put(tiles, inputs.plan.tiles.num_tiles, pooled[0])
    _put(tiles, inputs.plan.num_key_tiles, _text(inputs, tokens)[: _valid_text(inputs)])
    return tiles


def untile(inputs: Inputs, tiles: Tensor, target: Tensor) -> None:
    """Write query tiles, [heads, query tiles, T, X], to their tokens in ``target``, [L, heads, X]."""
    plan, cut = inputs.plan, inputs.plan.tiles
    grid = tiles[:, : cut.num_tiles].unflatten(2, cut.tile).unflatten(1, cut.tiles).permute(1, 4, 2, 5, 3, 6, 0, 7)
    frames, rows, columns = cut.grid
    grid = grid.flatten(4, 5).flatten(2, 3).flatten(0, 1)[:frames, :rows, :columns]
    target[plan.prefix : plan.prefix + cut.num_tokens].unflatten(0, cut.grid).copy_(grid)
    text = tiles[:, cut.num_tiles :].flatten(1, 2)[:, : inputs.text]
    target[inputs.text_start : inputs.text_start + inputs.text].copy_(text.transpose(0, 1))


def boxes(grid: Tensor, cut: TileGrid) -> Tensor:
    """Values of grid tokens, [tokens, ...], box by box: [tiles per axis, tile per axis, ...], zeros beyond the grid."""
    beyond = [(0, tiles * step - size) for tiles, step, size in zip(cut.tiles, cut.tile, cut.grid, strict=True)]
    grid = grid.unflatten(0, cut.grid)
    grid = F.pad(grid, [0, 0] * (grid.ndim - 3) + [pad for axis in reversed(beyond) for pad in axis])
    for axis in (2, 1, 0):
        grid = grid.unflatten(axis, (cut.tiles[axis], cut.tile[axis]))
    return grid.movedim((2, 4), (1, 2))


def _text_tiles(inputs: Inputs) -> int:
    return -(-inputs.text // inputs.plan.tiles.tile_size)


def _text(inputs: Inputs, tokens: Tensor) -> Tensor:
    return tokens[0, inputs.text_start : inputs.text_start + inputs.text]


def _empty(inputs: Inputs, tiles: int) -> Tensor:
    """Room for so many tiles and the text's."""
    _, _, heads, dim = inputs.q.shape
    compute = torch.promote_types(inputs.q.dtype, torch.float32)
    return inputs.q.new_empty(heads, tiles + _text_tiles(inputs), inputs.plan.tiles.tile_size, dim, dtype=compute)


def _put_grid(tiles: Tensor, inputs: Inputs, tokens: Tensor) -> None:
    plan, cut = inputs.plan, inputs.plan.tiles
    grid = boxes(tokens[0, plan.prefix : plan.prefix + cut.num_tokens], cut)
    tiles[:, : cut.num_tiles].unflatten(2, cut.tile).unflatten(1, cut.tiles).copy_(grid.movedim(6, 0))


def _put(tiles: Tensor, first: int, tokens: Tensor) -> None:
    """Put ``tokens``, [tokens, heads, D], into the tiles from number ``first`` on, and zeros behind them."""
    room = tiles[:, first:].flatten(1, 2)
    room[:, : len(tokens)] = tokens.transpose(0, 1)
    room[:, len(tokens) :] = 0
