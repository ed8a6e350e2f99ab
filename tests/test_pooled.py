"""Pooled keys against a walk over the lists, key by key, and against the keys they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import BlockPlan, PooledKeys, TileGrid, block_sparse_attention

BACKENDS = ("reference", "torch", "triton")
TILES = TileGrid((1, 3, 5), (1, 2, 4))  # tiles of 8, 2, 4 and 1 tokens
POOLED, TEXT, DIM = 11, 2, 6  # 11 pooled keys are a tile of 8 and one of 3
# Key tiles of each query tile, pooled tiles 4 and 5 first, then those that stick out, then tile 0.
LISTS = [[5, 1, 0], [4, 5, 3], [2], []]
MASKED = [2, 3, 1, 0]


def build(batch: int, heads: int) -> BlockPlan:
    indices = torch.tensor([row + [0] * (3 - len(row)) for row in LISTS], dtype=torch.int32)
    counts = torch.tensor([len(row) for row in LISTS], dtype=torch.int32)
    plan = BlockPlan(
        TILES,
        counts.expand(batch, heads, -1).contiguous(),
        torch.tensor(MASKED, dtype=torch.int32).expand(batch, heads, -1).contiguous(),
        indices.expand(batch, heads, -1, -1).contiguous(),
        suffix=TEXT,
        pooled=POOLED,
    )
    assert plan.num_key_tiles == 6
    return plan


def rows(length: int, batch: int = 2, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return list(torch.randn(3, batch, length, heads, DIM, generator=generator))


def hidden_weights(*shape: int) -> Tensor:
    """Random log weights, a third of them -inf."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(*shape, POOLED, generator=generator)
    return weights.masked_fill(torch.rand(weights.shape, generator=generator) < 0.3, -torch.inf)


def walked(q: Tensor, k: Tensor, v: Tensor, pooled: PooledKeys) -> tuple[Tensor, Tensor]:
    """Output and LSE from the definition, one query at a time."""
    batch, length, heads, _ = q.shape
    weights = pooled.log_weights.expand(batch, heads, TILES.num_tiles, -1)
    tile_of = TILES.token_tile().tolist()
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((batch, heads, length), -math.inf).double()
    for item in range(batch):
        for head in range(heads):
            for query in range(length):
                text = list(range(TILES.num_tokens, length))
                seen = [(k, v, key, 0.0) for key in text]
                listed = range(TILES.num_tiles) if query >= TILES.num_tokens else LISTS[tile_of[query]]
                for tile in listed:
                    if tile < TILES.num_tiles:
                        seen += [(k, v, key, 0.0) for key, of in enumerate(tile_of) if of == tile]
                    else:
                        first = (tile - TILES.num_tiles) * 8
                        for key in range(first, min(first + 8, POOLED)):
                            seen.append((pooled.k, pooled.v, key, float(weights[item, head, tile_of[query], key])))
                scores = torch.stack(
                    [
                        q[item, query, head].double() @ of[item, key, head].double() * 0.5 + bias
                        for of, _, key, bias in seen
                    ]
                )
                values = torch.stack([of[item, key, head].double() for _, of, key, _ in seen])
                out[item, query, head] = scores.softmax(0) @ values
                lse[item, head, query] = scores.logsumexp(0)
    return out, lse


SHAPES = {"per query tile": (2, 2, 4), "per head": (1, 2, 1), "one for all": (1, 1, 1), "per item": (2, 1, 1)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pooled_keys_count_with_their_weights(shape: str, backend: str, poisoned_memory: None) -> None:
    q, k, v = rows(TILES.num_tokens + TEXT)
    pooled = PooledKeys(*rows(POOLED)[:2], hidden_weights(*SHAPES[shape]))
    out, lse = block_sparse_attention(  # type: ignore[call-overload]
        q, k, v, build(2, 2), scale=0.5, pooled=pooled, backend=backend, return_lse=True
    )
    want, want_lse = walked(q, k, v, pooled)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_of_weight_eight_is_eight_equal_keys(backend: str) -> None:
    """Tiles whose eight keys are all alike: the tile, or one pooled key of weight 8 in its place."""
    tiles = TileGrid((1, 1, 32), (1, 1, 8))
    q, k, v = rows(32, 1, 1)
    pooled_k, pooled_v = k[:, ::8], v[:, ::8]
    k, v = pooled_k.repeat_interleave(8, 1), pooled_v.repeat_interleave(8, 1)
    ones = torch.ones(1, 1, 4, dtype=torch.int32)
    every = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    fine = block_sparse_attention(q, k, v, BlockPlan(tiles, 4 * ones, 0 * ones, every), backend=backend)  # type: ignore[call-overload]
    plan = BlockPlan(tiles, ones, ones, torch.full((1, 1, 4, 1), 4, dtype=torch.int32), pooled=4)
    keys = PooledKeys(pooled_k, pooled_v, torch.full((1, 1, 1, 4), math.log(8)))
    coarse = block_sparse_attention(q, k, v, plan, pooled=keys, backend=backend)  # type: ignore[call-overload]
    torch.testing.assert_close(coarse, fine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_whose_pooled_keys_are_all_hidden_has_no_keys(backend: str, poisoned_memory: None) -> None:
    tiles = TileGrid((1, 1, 9), (1, 1, 4))
    ones = torch.ones(1, 1, 3, dtype=torch.int32)
    plan = BlockPlan(tiles, ones, ones, torch.full((1, 1, 3, 1), 3, dtype=torch.int32), pooled=3)
    weights = torch.zeros(1, 1, 3, 3)
    weights[:, :, 1] = -torch.inf
    q, k, v = rows(9, 1, 1)
    keys = PooledKeys(k[:, :3], v[:, :3], weights)
    out, lse = block_sparse_attention(q, k, v, plan, pooled=keys, backend=backend, return_lse=True)  # type: ignore[call-overload]
    empty = torch.arange(9) // 4 == 1
    assert not out[:, empty].any() and bool((lse[..., empty] == -torch.inf).all())
    assert bool(lse[..., ~empty].isfinite().all())
