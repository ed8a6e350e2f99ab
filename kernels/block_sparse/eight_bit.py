"""The Hopper backend in 8 bits: rounds queries, keys and values, and launches the kernel of ``gluon_eight_bit.py``.

precision="fp8": float8 e4m3 throughout. precision="int8": int8 queries and keys, float8 probabilities and values.
Scales are per tile of 128 tokens; for inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.gluon_forward import (
    arguments_of,
    grid_descriptor,
    half_of,
    span_descriptor,
    spec_of,
)
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.triton_quantise import SCALES, TILE, Tiles, quantise


def forward(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Output [B, L, H, D]; LSE [B, H, L] in float32 if wanted."""
    with torch.cuda.device(inputs.q.device):
        return attend(inputs, quantise(inputs))


def attend(inputs: Inputs, data: Tiles) -> tuple[Tensor, Tensor | None]:
    """The same from tiles made before."""
    from dit_accel.kernels.block_sparse.gluon_eight_bit import eight_bit_forward

    plan, tiles = inputs.plan, inputs.plan.tiles
    batch, length, heads, dim = inputs.q.shape
    out = torch.empty(inputs.q.shape, dtype=inputs.q.dtype, device=inputs.q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=inputs.q.device)
    spec = spec_of(inputs, heads_inside=True)
    _, half_box = half_of(tiles.tile)
    text_out = span_descriptor(out, inputs.text_start, inputs.text, TILE // 2, True) if inputs.text else None
    launch, arguments = arguments_of(inputs, lse)
    eight_bit_forward[launch](
        _rows(data.q, TILE // 2), _rows(data.k, TILE), _rows(data.v, dim),
        _rows(data.q_scales, 1), _rows(data.scales, 1),
        grid_descriptor(out, tiles, half_box, plan.prefix, spec.flat, True), text_out,
        *arguments, plan.num_key_tiles, S=spec, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out, lse.add_(data.shift) if inputs.with_lse else None


def _rows(x: Tensor, rows: int) -> object:
    """Descriptor of whole rows of x, so many at a time; those of scales are read as they lie."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    width, bits = x.shape[1], 8 * x.element_size()
    swizzle = 0 if width == SCALES else width
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)
    return TensorDescriptor(x, list(x.shape), [width, 1], [rows, width], layout)
