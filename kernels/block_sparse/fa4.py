"""FlashAttention-4 (package flash-attn-4) on Hopper: its block sparsity, its dense kernel where no pair is left out."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.blocks import Blocks, blocks_of, keeps_everything
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import Triple

TILE = 128


def needs(inputs: Inputs) -> str | None:
    q, tile = inputs.q, inputs.plan.tiles.tile_size
    if importlib.util.find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4, got a flash_attn without its module cute"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return f"a Hopper GPU, got tensors on {torch.cuda.get_device_name(q.device) if q.is_cuda else q.device}"
    if inputs.pooled is not None:
        return "a plan without pooled keys"
    if inputs.plan.window is not None and inputs.plan.window.radius is not None:
        return f"a plan without a disc, got radius {inputs.plan.window.radius}"
    if inputs.precision != "native":
        return f"precision='native', got {inputs.precision!r}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"a head dim of at most 128 that 8 divides, got {q.shape[-1]}"
    if tile != TILE:
        return f"tiles of {TILE} tokens, got {tile}"
    return None


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, L] in float32."""
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v, plan = inputs.q, inputs.k, inputs.v, inputs.plan
    if inputs.text_lengths is None and keeps_everything(plan):
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=inputs.scale, return_lse=True)
        return out, lse
    blocks = blocks_of(plan)
    out, lse, *_ = _flash_attn_fwd(
        *(blocks.pack(x) for x in (q, k, v)),
        softmax_scale=inputs.scale,
        return_lse=True,
        block_sparse_tensors=block_lists(blocks),
        **mask_arguments(inputs, blocks),
    )
    return blocks.unpack(out, 1), blocks.unpack(lse, 2)


def block_lists(blocks: Blocks) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    masked, whole = blocks.masked, blocks.whole
    return BlockSparseTensorsTorch(masked.counts, masked.indices, whole.counts, whole.indices, block_size=(TILE, TILE))


def mask_arguments(inputs: Inputs, blocks: Blocks) -> dict[str, Any]:
    """The rule inside masked blocks and the tables it reads; nothing where the end of the sequence is all there is."""
    window = inputs.plan.window
    if window is None and not blocks.padded and inputs.text_lengths is None:
        return {}
    tables = [blocks.keys(inputs).int().contiguous()]
    if window is None or blocks.bounds is None:
        return {"mask_mod": _key_rule(), "aux_tensors": tables}
    tables += [blocks.text.int(), blocks.coordinates, blocks.bounds]
    return {"mask_mod": _window_rule(window.dilation, window.union), "aux_tensors": tables}


@functools.cache
def _key_rule() -> Any:
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def is_key(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tables: Any) -> Any:
        return scalar_to_ssa(tables[0][batch[0], key[0]] != 0, cutlass.Boolean)

    return is_key


@functools.cache
def _window_rule(dilation: Triple, union: bool) -> Any:
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def admits(axis: cutlass.Constexpr, query: Any, key: Any, coordinates: Any, bounds: Any) -> Any:
        position = coordinates[axis, key]
        inside = (bounds[2 * axis, query] <= position) & (position <= bounds[2 * axis + 1, query])
        if cutlass.const_expr(dilation[axis] > 1):
            inside = inside & ((position - coordinates[axis, query]) % dilation[axis] == 0)
        return inside

    @cute.jit
    def in_window(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tables: Any) -> Any:
        keys, text, coordinates, bounds = tables[0], tables[1], tables[2], tables[3]
        q, k = query[0], key[0]
        frame = admits(0, q, k, coordinates, bounds)
        row = admits(1, q, k, coordinates, bounds)
        column = admits(2, q, k, coordinates, bounds)
        inside = frame & row & column
        if cutlass.const_expr(union):
            inside = frame | row | column
        kept = (keys[batch[0], k] != 0) & ((text[q] != 0) | (text[k] != 0) | inside)
        return scalar_to_ssa(kept, cutlass.Boolean)

    return in_window
