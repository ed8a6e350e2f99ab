"""torch's FlexAttention: compiled on a GPU, eager (every score in memory) on the CPU."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dit_accel.kernels.block_sparse.blocks import Blocks, Lists, blocks_of
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, in_disc

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch item, head, query, key -> kept
KERNEL_TILE = 128  # the compiled kernel's own tiles divide this
RECOMPILES = 64  # one per shape; torch gives up after 8 and would compute every score

_MASKS: weakref.WeakKeyDictionary[BlockPlan, dict[tuple[int, bool], BlockMask]] = weakref.WeakKeyDictionary()


def needs(inputs: Inputs) -> str | None:
    q, tile = inputs.q, inputs.plan.tiles.tile_size
    if inputs.pooled is not None:
        return "a plan without pooled keys"
    if inputs.precision != "native":
        return f"precision='native', got {inputs.precision!r}"
    if inputs.gradients and not q.is_cuda:
        return f"a GPU for gradients, got tensors on {q.device}"
    if q.is_cuda and tile % KERNEL_TILE:
        return f"tiles of a multiple of {KERNEL_TILE} tokens on a GPU, got {tile}"
    if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"float16, bfloat16 or float32, got {q.dtype}"
    return None


def forward(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Output [B, L, H, D] and LSE [B, H, L] in float32 (float64 for float64 inputs)."""
    blocks = blocks_of(inputs.plan)
    q, k, v = (blocks.pack(x).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    mask = _mask(inputs, blocks, differentiable)
    attend = _compiled() if q.is_cuda else _eager
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        out, extra = attend(q, k, v, block_mask=mask, scale=inputs.scale, return_aux=AuxRequest(lse=True))
    return blocks.unpack(out.transpose(1, 2), 1), blocks.unpack(extra.lse, 2)


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _eager(*arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # meant for GPUs
        return flex_attention(*arguments, **options)


def _mask(inputs: Inputs, blocks: Blocks, differentiable: bool) -> BlockMask:
    """The plan's block mask, kept as long as the plan lives where text lengths do not make it this call's own."""
    if inputs.text_lengths is not None:
        return block_mask(inputs, blocks, differentiable)
    kept_masks, key = _MASKS.setdefault(inputs.plan, {}), (inputs.q.shape[0], differentiable)
    if key not in kept_masks:
        kept_masks[key] = block_mask(inputs, blocks, differentiable)
    return kept_masks[key]


def block_mask(inputs: Inputs, blocks: Blocks, differentiable: bool) -> BlockMask:
    """The plan's lists as they are; lists of query blocks are made only where a backward will walk them."""
    length, tile = len(blocks.valid), inputs.plan.tiles.tile_size
    rule = kept(inputs, blocks)
    return BlockMask.from_kv_blocks(
        blocks.masked.counts,
        _full_width(blocks.masked),
        blocks.whole.counts,
        _full_width(blocks.whole),
        BLOCK_SIZE=(tile, tile),
        mask_mod=rule if inputs.q.is_cuda else _listed(blocks, tile, rule),
        seq_lengths=(length, length),
        compute_q_blocks=differentiable,
    )


def kept(inputs: Inputs, blocks: Blocks) -> MaskMod:
    """Which pairs of masked blocks are kept."""
    keys, text, window = blocks.keys(inputs).contiguous(), blocks.text, inputs.plan.window

    def is_key(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return keys[b, k]

    if window is None or blocks.bounds is None:
        return is_key
    bounds, coordinates = blocks.bounds, blocks.coordinates
    dilation, radius, joined = window.dilation, window.radius, _rule(window)

    def in_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        axes = []
        for axis in range(3):
            key = coordinates[axis, k]
            inside = (bounds[2 * axis, q] <= key) & (key <= bounds[2 * axis + 1, q])
            if dilation[axis] > 1:
                inside = inside & ((key - coordinates[axis, q]) % dilation[axis] == 0)
            axes.append(inside)
        inside = joined(axes)
        if radius is not None:
            rows, columns = (coordinates[axis, q] - coordinates[axis, k] for axis in (1, 2))
            inside = inside & in_disc(rows, columns, radius)
        return keys[b, k] & (text[q] | text[k] | inside)

    return in_window


def _rule(window: AxisWindows) -> Callable[[list[Tensor]], Tensor]:
    if window.union:
        return lambda axes: axes[0] | axes[1] | axes[2]
    return lambda axes: axes[0] & axes[1] & axes[2]


def _listed(blocks: Blocks, tile: int, rule: MaskMod) -> MaskMod:
    """The whole truth in one rule: eager FlexAttention does not look at the lists."""
    masked, whole = _table(blocks.masked), _table(blocks.whole)
    shared = torch.tensor(masked.shape[:2], device=masked.device) == 1

    def listed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        where = (torch.where(shared[0], 0, b), torch.where(shared[1], 0, h), q // tile, k // tile)
        return whole[where] | (masked[where] & rule(b, h, q, k))

    return listed


def _table(lists: Lists) -> Tensor:
    """Which blocks are listed, bool [B or 1, H or 1, N, N]."""
    slots = torch.arange(lists.indices.shape[-1], device=lists.indices.device)
    count = lists.counts.shape[-1]
    seen = torch.zeros(*lists.counts.shape, count, dtype=torch.int32, device=lists.indices.device)
    return seen.scatter_add_(-1, lists.indices.long(), (slots < lists.counts[..., None]).int()) > 0


def _full_width(lists: Lists) -> Tensor:
    """Indices of one width for every plan of a shape: a compiled kernel is good for one."""
    return F.pad(lists.indices, (0, lists.counts.shape[-1] - lists.indices.shape[-1]))
