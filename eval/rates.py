"""How fast this machine multiplies matrices and attends: a short measurement that predictions start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.eval.speed import measure, measure_in_turns

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> output, each [B, L, H, D]


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second, a multiply-add counted as two.

    Args:
        matmul: of a square matrix product.
        dense: of dense attention (torch SDPA), the softmax not counted.
        sparse: of block-sparse attention, counting only the query-key pairs its plan computes.
        tokens: sequence length that both attentions were measured on.
        density: share of query-key pairs of the sparse measurement.
    """

    matmul: float
    dense: float
    sparse: float
    tokens: int
    density: float

    def seconds(self, *, matmul: float = 0.0, dense: float = 0.0, sparse: float = 0.0) -> float:
        """Predicted seconds of so many floating-point operations of each kind."""
        return matmul / self.matmul + dense / self.dense + sparse / self.sparse


@dataclass(frozen=True)
class _Probe:
    """Sizes large enough to be typical of the device and small enough for a second or two."""

    matmul_size: int
    tokens: int
    heads: int


_PROBES = {"cpu": _Probe(768, 4096, 2), "cuda": _Probe(8192, 16384, 16)}


def attention_flops(tokens: int, heads: int, head_dim: int, density: float = 1.0) -> float:
    """Floating-point operations of one attention call for batch 1: two products of 2 L^2 D per head."""
    return 4.0 * heads * tokens**2 * head_dim * density


def rates(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    make_sparse: Callable[[int], tuple[Attention, float]],
) -> Rates:
    """Measures the three rates; about two seconds on two CPU cores, less on a GPU.

    Args:
        device: where to measure, a CPU or a CUDA device.
        dtype: of the operands.
        head_dim: channels per head.
        make_sparse: number of tokens -> the sparse operator bound to a plan on ``device``, and the plan's density.

    Raises:
        ValueError: for a device that is neither a CPU nor CUDA.
    """
    device = torch.device(device)
    if device.type not in _PROBES:
        raise ValueError(f"rates can be measured on cpu and cuda devices, got {device.type}.")
    probe = _PROBES[device.type]
    qkv = torch.randn(3, 1, probe.tokens, probe.heads, head_dim, device=device, dtype=dtype)
    q, k, v = qkv.unbind()
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    sparse, density = make_sparse(probe.tokens)
    times = measure_in_turns(
        {"dense": lambda: scaled_dot_product_attention(query, key, value), "sparse": lambda: sparse(q, k, v)},
        rounds=3,
        device=device,
    )
    flops = attention_flops(probe.tokens, probe.heads, head_dim)
    return Rates(
        matmul=matmul_rate(device, dtype),
        dense=flops / times["dense"].median,
        sparse=flops * density / times["sparse"].median,
        tokens=probe.tokens,
        density=density,
    )


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the ceiling of what attention can reach."""
    device = torch.device(device)
    size = _PROBES[device.type].matmul_size
    side = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / measure(lambda: side @ side, warmup=1, runs=5, device=device).median
