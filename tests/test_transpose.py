"""Key-major lists against a walk over the query-major ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_accel.kernels.block_sparse.transpose import transpose_lists

Lists = tuple[Tensor, Tensor, Tensor]


def random_lists(batch: int, heads: int, queries: int, num_keys: int, kept: int, seed: int = 0) -> Lists:
    """Lists of 0 to ``kept`` distinct key tiles, the first few partial, garbage in range after them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, queries)
    counts = torch.randint(kept + 1, shape, generator=generator)
    partial = (torch.rand(shape, generator=generator) * (counts + 1)).long()
    indices = torch.rand(*shape, num_keys, generator=generator).argsort(-1)[..., :kept]
    return counts.int(), partial.int(), indices.int()


def walked(lists: Lists, num_keys: int) -> list[list[list[tuple[list[int], list[int]]]]]:
    """[item][head][key tile] -> (query tiles for which it is partial, those for which it is whole)."""
    counts, partial, indices = (part.tolist() for part in lists)
    result = []
    for item_counts, item_partial, item_indices in zip(counts, partial, indices, strict=True):
        result.append([])
        for rows in zip(item_counts, item_partial, item_indices, strict=True):
            keys: list[tuple[list[int], list[int]]] = [([], []) for _ in range(num_keys)]
            for query, (count, cut, row) in enumerate(zip(*rows, strict=True)):
                for slot in range(count):
                    keys[row[slot]][slot >= cut].append(query)
            result[-1].append(keys)
    return result


def read(transposed: Lists) -> list[list[list[tuple[list[int], list[int]]]]]:
    starts, partial, queries = (part.tolist() for part in transposed)
    return [
        [
            [
                (row[begin : begin + cut], row[begin + cut : end])
                for begin, end, cut in zip(edges, edges[1:], cuts, strict=False)
            ]
            for edges, cuts, row in zip(item_starts, item_partial, item_queries, strict=True)
        ]
        for item_starts, item_partial, item_queries in zip(starts, partial, queries, strict=True)
    ]


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "num_keys", "kept"),
    [(2, 3, 13, 17, 9), (1, 1, 5, 5, 5), (1, 2, 1, 7, 3), (3, 1, 11, 1, 1)],
    ids=["per item and head", "all kept", "one query tile", "one key tile"],
)
def test_each_key_tile_lists_its_query_tiles_partial_first_and_ascending(
    batch: int, heads: int, queries: int, num_keys: int, kept: int
) -> None:
    lists = random_lists(batch, heads, queries, num_keys, kept)
    assert read(transpose_lists(*lists, num_keys)) == walked(lists, num_keys)


def test_entries_beyond_the_counts_change_nothing_and_stay_in_range() -> None:
    counts, partial, indices = random_lists(2, 2, 7, 11, 6)
    beyond = torch.arange(6) >= counts[..., None]
    other = torch.where(beyond, 10 - indices, indices)
    got, twin = transpose_lists(counts, partial, indices, 11), transpose_lists(counts, partial, other, 11)
    assert all(torch.equal(a, b) for a, b in zip(got, twin, strict=True))
    assert got[2].min() >= 0 and got[2].max() < 7
    assert torch.equal(got[0][..., -1], counts.sum(-1).int())


def test_empty_lists_give_empty_lists() -> None:
    counts = torch.zeros(1, 2, 4, dtype=torch.int32)
    indices = torch.zeros(1, 2, 4, 3, dtype=torch.int32)
    starts, partial, queries = transpose_lists(counts, counts, indices, 5)
    assert not starts.any() and not partial.any()
    assert starts.shape == (1, 2, 6) and queries.shape == (1, 2, 12)


def test_lists_are_int32_on_their_device_and_never_read_by_the_host() -> None:
    lists = random_lists(1, 2, 4, 5, 3)
    with FakeTensorMode() as mode:  # raises on a value that decides a shape or a branch
        got = transpose_lists(*(mode.from_tensor(part) for part in lists), 5)
    assert [part.dtype for part in got] == [torch.int32] * 3
    assert [list(part.shape) for part in got] == [[1, 2, 6], [1, 2, 5], [1, 2, 12]]
