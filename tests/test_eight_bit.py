"""Rounding to 8 bits: which bytes and scales the Hopper kernel is given, against eager torch."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse.inputs import Inputs, Precision
from dit_accel.kernels.block_sparse.plan import BlockPlan, PooledKeys, TileGrid
from dit_accel.kernels.block_sparse.tiling import key_tiles, query_tiles

triton_quantise = pytest.importorskip("dit_accel.kernels.block_sparse.triton_quantise", reason="needs Triton")

LOG2_E = 1.4426950408889634
BATCH, HEADS = 2, 2
# (grid, tile, prefix, suffix, pooled keys, text lengths, head dim, layout)
CASES = {
    "raster, last tile short": ((1, 1, 300), (1, 1, 128), 0, 0, 0, None, 128, "blhd"),
    "boxes out of the grid on two axes": ((3, 8, 10), (2, 8, 8), 0, 0, 0, None, 64, "bhld"),
    "text before, padded": ((2, 6, 18), (4, 4, 8), 150, 0, 0, [20, 150], 64, "blhd"),
    "text behind, pooled": ((1, 20, 17), (1, 8, 16), 0, 7, 130, [0, 7], 64, "fused"),
}


def plan_of(grid: tuple[int, int, int], tile: tuple[int, int, int], prefix: int, suffix: int, pooled: int) -> BlockPlan:
    """A plan without listed tiles: rounding does not read the lists."""
    tiles = TileGrid(grid, tile)
    counts = torch.zeros(1, 1, tiles.num_tiles, dtype=torch.int32)
    return BlockPlan(tiles, counts, counts, counts[..., None], prefix, suffix, pooled=pooled)


def tensors(plan: BlockPlan, batch: int, heads: int, dim: int, layout: str) -> list[Tensor]:
    length = plan.num_tokens
    if layout == "fused":
        return list(torch.randn(batch, length, 3, heads, dim).unbind(2))
    if layout == "bhld":
        return list(torch.randn(3, batch, heads, length, dim).transpose(2, 3).unbind(0))
    return list(torch.randn(3, batch, length, heads, dim).unbind(0))


def inputs_of(case: str, precision: Precision) -> Inputs:
    grid, tile, prefix, suffix, pooled, lengths, dim, layout = CASES[case]
    torch.manual_seed(0)
    plan = plan_of(grid, tile, prefix, suffix, pooled)
    q, k, v = tensors(plan, BATCH, HEADS, dim, layout)
    keys = None
    if pooled:
        keys = PooledKeys(*torch.randn(2, BATCH, pooled, HEADS, dim), torch.zeros(1, 1, 1, pooled))
    text_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return Inputs(q, k + 3, v, plan, 0.25, text_lengths, keys, precision=precision)


def item(inputs: Inputs, b: int) -> Inputs:
    """One batch item."""
    pooled = inputs.pooled and PooledKeys(
        inputs.pooled.k[b : b + 1], inputs.pooled.v[b : b + 1], inputs.pooled.log_weights
    )
    lengths = None if inputs.text_lengths is None else inputs.text_lengths[b : b + 1]
    q, k, v = (x[b : b + 1] for x in (inputs.q, inputs.k, inputs.v))
    return replace(inputs, q=q, k=k, v=v, text_lengths=lengths, pooled=pooled)


def gathered(inputs: Inputs, which: str) -> Tensor:
    """Queries, keys, values, or 1 for each key that exists, in float32 tiles [B, H, tiles, 128, D]."""
    parts = []
    for one in (item(inputs, b) for b in range(inputs.q.shape[0])):
        if which == "q":
            parts.append(query_tiles(one))
        elif which == "v":
            parts.append(key_tiles(one, one.v, one.pooled and one.pooled.v))
        elif which == "k":
            parts.append(key_tiles(one, one.k, one.pooled and one.pooled.k))
        else:
            parts.append(key_tiles(one, torch.ones_like(one.k), one.pooled and torch.ones_like(one.pooled.k)))
    return torch.stack(parts)


def key_order() -> Tensor:
    """The key that each of a tile's 128 places holds."""
    sixteen = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    return (torch.arange(0, 128, 16)[:, None] + sixteen).flatten()


def restored(inputs: Inputs, tiles: triton_quantise.Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys less their mean, and values from the bytes and scales, [B, H, tiles, 128, D]."""
    batch, _, heads, dim = inputs.q.shape
    q_scale = tiles.q_scales[:, 0].view(batch, heads, -1, 1, 1) / (inputs.scale * LOG2_E)
    k_scale, v_scale, v_inverse = (tiles.scales[:, i].view(batch, heads, -1, 1, 1) for i in range(3))
    torch.testing.assert_close(v_scale * v_inverse, torch.ones_like(v_scale))
    values = torch.empty(batch, heads, v_scale.shape[2], 128, dim)
    stored = tiles.v.float().view(batch, heads, -1, dim, 128).transpose(3, 4)
    values[:, :, :, key_order()] = stored
    q, k = (x.float().view(batch, heads, -1, 128, dim) for x in (tiles.q, tiles.k))
    return q * q_scale, k * k_scale, values * v_scale


@functools.cache
def int8(case: str) -> tuple[Inputs, triton_quantise.Tiles]:
    inputs = inputs_of(case, "int8")
    return inputs, triton_quantise.quantise(inputs)


@pytest.mark.parametrize("case", CASES)
def test_int8_tiles_hold_the_tokens_less_one_vector_per_head(case: str) -> None:
    inputs, tiles = int8(case)
    q, k, _ = restored(inputs, tiles)
    mean = triton_quantise._key_mean(inputs).view(BATCH, HEADS, 1, 1, -1)
    for got, wanted in ((q, gathered(inputs, "q")), (k, gathered(inputs, "k") - mean * gathered(inputs, "ones"))):
        step = wanted.abs().amax((3, 4), keepdim=True) / 127
        assert ((got - wanted).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("case", CASES)
def test_the_shift_is_what_the_scores_lose_with_the_mean(case: str) -> None:
    inputs, tiles = int8(case)
    mean = triton_quantise._key_mean(inputs).view(BATCH, HEADS, -1)
    torch.testing.assert_close(tiles.shift, torch.einsum("blhd,bhd->bhl", inputs.q, mean) * inputs.scale)


@pytest.mark.parametrize("case", CASES)
def test_float8_keeps_what_it_can_represent(case: str) -> None:
    # powers of two, with the largest in every token, and each key's opposite for a mean of zero: nothing is rounded
    inputs = inputs_of(case, "fp8")
    powers = [torch.exp2(-torch.randint(0, 8, x.shape).float()) * x.sign() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = (torch.where(torch.arange(x.shape[-1]) == 0, 1.0, x) for x in powers)
    k = k * torch.where(torch.arange(inputs.plan.num_tokens) % 2 == 0, 1.0, -1.0)[:, None, None]
    k[:, inputs.plan.prefix + 1 :: 2] = -k[:, inputs.plan.prefix : -1 : 2][
        :, : k[:, inputs.plan.prefix + 1 :: 2].shape[1]
    ]
    pooled = inputs.pooled and inputs.pooled._replace(
        k=torch.where(inputs.pooled.k > 0, 1.0, -0.5), v=torch.where(inputs.pooled.v > 0, 1.0, 0.25)
    )
    inputs = replace(inputs, q=q * 4, k=k * 2, v=v * 448, pooled=pooled)
    wanted = gathered(inputs, "q"), gathered(inputs, "k"), gathered(inputs, "v")
    for got, want in zip(restored(inputs, triton_quantise.quantise(inputs)), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_any_vector_in_place_of_the_mean_keeps_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_quantise, "SAMPLE", 16)  # every 18th key
    inputs = inputs_of("raster, last tile short", "int8")
    mean = triton_quantise._key_mean(inputs).view(BATCH, HEADS, 1, 1, -1)
    sample = inputs.k[:, ::18].mean(1)[:, :, None, None]
    torch.testing.assert_close(mean, sample)
    _, k, _ = restored(inputs, triton_quantise.quantise(inputs))
    wanted = gathered(inputs, "k")
    assert ((k + mean * gathered(inputs, "ones") - wanted).abs() < 0.04).all()


def test_padded_text_is_never_read() -> None:
    inputs = inputs_of("text before, padded", "fp8")
    clean = triton_quantise.quantise(inputs)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[0, 20:150], v[0, 20:150] = torch.nan, torch.inf
    dirty = triton_quantise.quantise(replace(inputs, k=k, v=v))
    for a, b in zip(clean[1:3], dirty[1:3], strict=True):
        assert torch.equal(a.view(torch.int8), b.view(torch.int8))
    assert torch.equal(clean.scales[:, :3], dirty.scales[:, :3])


def test_a_tile_of_zeros_has_finite_scales() -> None:
    inputs = inputs_of("raster, last tile short", "fp8")
    zeros = torch.zeros_like(inputs.q)
    tiles = triton_quantise.quantise(replace(inputs, q=zeros, k=zeros, v=zeros))
    assert tiles.scales[:, :3].isfinite().all() and tiles.q_scales[:, 0].isfinite().all()
    assert not tiles.q.view(torch.int8).any() and not tiles.v.view(torch.int8).any()


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a Hopper GPU may run it")
def test_8_bits_are_refused_off_the_gpu(precision: Precision) -> None:
    plan = plan_of((1, 1, 128), (1, 1, 128), 0, 0, 0)
    q = torch.zeros(1, 128, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="a Hopper GPU"):
        block_sparse_attention(q, q, q, plan, precision=precision)
