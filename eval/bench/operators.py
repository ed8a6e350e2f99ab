"""Who is measured: every backend of the operator, and dense attention by the kernels that a user can install today."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.eval.row_check import Attend
from dit_accel.kernels import BACKENDS, BlockPlan, TileGrid, block_sparse_attention
from dit_accel.kernels.block_sparse import backends
from dit_accel.kernels.block_sparse.inputs import Inputs, Precision

E4M3_LARGEST = 448.0


@dataclass(frozen=True)
class Operator:
    """One implementation.

    Args:
        name: in tables and records.
        needs: why it cannot run a call, one clause; None if it can.
        attend: the call.
        dense: computes every pair, whatever the plan says.
        precision: "fp8" where it rounds queries, keys and values on the way in.
    """

    name: str
    needs: Callable[[Inputs], str | None]
    attend: Attend
    dense: bool = False
    precision: Precision = "native"

    def inputs(self, inputs: Inputs) -> Inputs:
        """The call as this operator takes it, for its reference too."""
        if not self.dense:
            return replace(inputs, precision=self.precision)
        return replace(inputs, plan=every_pair(inputs.plan.num_tokens, inputs.q.device), text_lengths=None)

    def measuring_stick(self, inputs: Inputs) -> Inputs:
        """What torch's dense attention is given to measure the error by: rounded operands for an 8-bit operator."""
        if self.precision == "native":
            return inputs
        q, k, v = (e4m3_rounded(x) for x in (inputs.q, inputs.k, inputs.v))
        return replace(inputs, q=q, k=k, v=v)


def every_pair(tokens: int, device: torch.device) -> BlockPlan:
    """A plan of one tile."""
    one = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    tile = TileGrid((1, 1, tokens), (1, 1, tokens))
    return BlockPlan(tile, counts=one, partial=one - 1, indices=one[..., None] - 1)


def e4m3_rounded(x: Tensor) -> Tensor:
    """The values that 8-bit floats (e4m3) with one scale per batch item and head hold."""
    scale = x.abs().amax((1, 3), keepdim=True).float() / E4M3_LARGEST
    return ((x / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def ours(backend: str, precision: Precision = "native") -> Operator:
    def attend(inputs: Inputs) -> Tensor:
        q, k, v, plan, scale = inputs.q, inputs.k, inputs.v, inputs.plan, inputs.scale
        out: Tensor = block_sparse_attention(  # type: ignore[call-overload]
            q, k, v, plan, scale=scale, text_lengths=inputs.text_lengths, precision=precision, backend=backend
        )
        return out

    def needs(inputs: Inputs) -> str | None:
        return backends.missing(backend, replace(inputs, precision=precision))

    name = backend if precision == "native" else f"{backend} {precision}"
    return Operator(name, needs, attend, precision=precision)


def library(backend: str) -> Operator:
    """Another library's block-sparse attention, called without the operator around it."""

    def attend(inputs: Inputs) -> Tensor:
        out: Tensor = backends.load(backend).forward(inputs)[0]
        return out

    return Operator(backend, functools.partial(backends.missing, backend), attend)


def sdpa(name: str, kernel: SDPBackend, on_gpu: bool) -> Operator:
    def attend(inputs: Inputs) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, scale=inputs.scale).transpose(1, 2)

    def needs(inputs: Inputs) -> str | None:
        return None if inputs.q.is_cuda is on_gpu else f"a {'GPU' if on_gpu else 'CPU'}, got {inputs.q.device}"

    return Operator(name, needs, attend, dense=True)


def _fa4_attend(inputs: Inputs) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out: Tensor = flash_attn_func(inputs.q, inputs.k, inputs.v, softmax_scale=inputs.scale)[0]
    return out


def _fa4_needs(inputs: Inputs) -> str | None:
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4, which is not installed"
    return None if inputs.q.is_cuda else f"a GPU, got {inputs.q.device}"


LIBRARIES = ("flex", "fa4", "xformers")
OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        *(library(name) if name in LIBRARIES else ours(name) for name in BACKENDS),
        ours("gluon", "fp8"),
        Operator("fa4 dense", _fa4_needs, _fa4_attend, dense=True),
        sdpa("cudnn", SDPBackend.CUDNN_ATTENTION, on_gpu=True),
        sdpa("fa2", SDPBackend.FLASH_ATTENTION, on_gpu=True),
        sdpa("sdpa", SDPBackend.FLASH_ATTENTION, on_gpu=False),
    )
}
# The torch backend gathers its keys and the reference holds every score: neither fits the cases of a GPU.
DEFAULT = {
    "cuda": ("gluon", "gluon fp8", "triton", "fa4", "flex", "fa4 dense", "cudnn", "fa2"),
    "cpu": ("torch", "sdpa"),
}
