"""The Hopper backend: descriptors, launch, and whether the kernel of ``gluon_kernel.py`` can run."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Inputs, Precision
from dit_accel.kernels.block_sparse.plan import TileGrid, Triple

if TYPE_CHECKING:
    from dit_accel.kernels.block_sparse.gluon_tools import Spec

LOG2_E = 1.4426950408889634
TILE = 128
# Scores are hidden by -2^100 times the scale, which has to stay a normal number far below any real score.
SCALES = (2.0**-20, 2.0**20)
# Head dim -> queries in registers or in shared memory, the faster by measurement; both are checked on an H200.
HOLD_QUERIES = {64: True, 128: False}
TRITONS = ((3, 6), (3, 9))  # releases whose Gluon compiles the kernels; they have run on the first

_LOG = logging.getLogger(__name__)


def needs(inputs: Inputs) -> str | None:
    q, tiles = inputs.q, inputs.plan.tiles
    if not q.is_cuda or torch.version.hip or torch.cuda.get_device_capability(q.device)[0] != 9:
        return f"a Hopper GPU, got tensors on {_name(q.device)}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"a head dim of 64 or 128, got {q.shape[-1]}"
    if tiles.tile_size != TILE or any(side & (side - 1) for side in tiles.tile):
        return f"tiles of {TILE} tokens with sides that are powers of two, got {tiles.tile}"
    if not SCALES[0] <= inputs.scale <= SCALES[1]:
        return f"a scale from {SCALES[0]:.1e} to {SCALES[1]:.1e}, got {inputs.scale}"
    if inputs.precision not in get_args(Precision):
        return f"a precision of {', '.join(get_args(Precision))}, got {inputs.precision!r}"
    return _gluon()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@functools.cache
def _gluon() -> str | None:
    """Gluon is young: a Triton in which its names have moved is left to the triton backend, with one notice."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    problem: object = "it is not among those it was compiled with"
    if TRITONS[0] <= version <= TRITONS[1]:
        try:
            importlib.import_module("dit_accel.kernels.block_sparse.gluon_kernel")
            return None
        except (ImportError, AttributeError) as error:
            problem = error
    _LOG.warning("triton %s does not run the gluon kernels (%s); the triton backend does.", triton.__version__, problem)
    return f"triton {'.'.join(map(str, TRITONS[0]))} to {'.'.join(map(str, TRITONS[1]))}, got {triton.__version__}"


def forward(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Output [B, L, H, D] and LSE [B, H, L] in float32; None for it in 8 bits where nobody wants it."""
    if inputs.precision != "native":
        from dit_accel.kernels.block_sparse import eight_bit

        return eight_bit.forward(inputs)
    from dit_accel.kernels.block_sparse.gluon_kernel import block_sparse_forward

    plan, pooled = inputs.plan, inputs.pooled
    batch, length, heads, _ = inputs.q.shape
    device = inputs.q.device
    tensors = [inputs.q, inputs.k, inputs.v, *([pooled.k, pooled.v] if pooled else [])]
    inside = all(_readable(x, heads_inside=True) for x in tensors)
    if not inside and not all(_readable(x, heads_inside=False) for x in tensors):
        # Not contiguous(), which leaves a dense tensor at an address that is no multiple of 16 where it is.
        tensors = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
        inside = True
    q, k, v = tensors[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=device)

    tiles = plan.tiles
    _, half_box = half_of(tiles.tile)
    spec = spec_of(inputs, inside)
    start = plan.prefix
    grids = [
        grid_descriptor(x, tiles, box, start, spec.flat, inside)
        for x, box in ((q, half_box), (k, tiles.tile), (v, tiles.tile))
    ]
    grids.append(grid_descriptor(out, tiles, half_box, start, spec.flat, True))
    spans: list[object] = [None] * 4
    if inputs.text:
        text = (inputs.text_start, inputs.text)
        spans = [span_descriptor(x, *text, rows, inside) for x, rows in ((q, 64), (k, TILE), (v, TILE))]
        spans.append(span_descriptor(out, *text, 64, True))
        if inputs.text_lengths is not None:
            spans[2] = span_descriptor(_unpadded(inputs, v, inside), 0, inputs.text, TILE, inside)
    pooled_spans: list[object] = [None] * 2
    if pooled is not None:
        pooled_spans = [span_descriptor(x, 0, plan.pooled, TILE, inside) for x in tensors[3:]]

    with torch.cuda.device(device):
        launch, arguments = arguments_of(inputs, lse)
        block_sparse_forward[launch](*grids, *spans, *pooled_spans, *arguments, S=spec, num_warps=4, maxnreg=168)
    return out, lse


def spec_of(inputs: Inputs, heads_inside: bool) -> Spec:
    from dit_accel.kernels.block_sparse.gluon_tools import Spec

    tiles, window = inputs.plan.tiles, inputs.plan.window
    return Spec(
        tile=tiles.tile,
        half=half_of(tiles.tile)[0],
        flat=tiles.tile[2] == TILE and tiles.grid[0] * tiles.grid[1] == 1,
        dim=inputs.q.shape[-1],
        hold_queries=HOLD_QUERIES[inputs.q.shape[-1]],
        heads_inside=heads_inside,
        ragged=any(size % side for size, side in zip(tiles.grid, tiles.tile, strict=True)),
        window=window is not None,
        union=window is not None and window.union,
        dilated=window is not None and max(window.dilation) > 1,
        disc=window is not None and window.radius is not None,
        text=inputs.text > 0,
        text_lengths=inputs.text_lengths is not None,
        pooled=inputs.pooled is not None,
    )


def arguments_of(inputs: Inputs, lse: Tensor) -> tuple[tuple[int], tuple[Any, ...]]:
    """Programs to launch, and what both Hopper kernels take after their descriptors, from ``lse`` on."""
    plan, window, tiles = inputs.plan, inputs.plan.window, inputs.plan.tiles
    batch, length, heads, _ = inputs.q.shape
    device = inputs.q.device
    log_weights, weight_strides = lse, (0, 0, 0)
    if inputs.pooled is not None:
        log_weights = inputs.pooled.log_weights.contiguous()
        weight_strides = _broadcast_strides(log_weights)
    text_tiles = -(-inputs.text // TILE)
    text_items = text_tiles * batch * heads
    items = text_items + tiles.num_tiles * batch * heads
    list_item, list_head, _ = _broadcast_strides(plan.counts)
    _, tiles_h, tiles_w = tiles.tiles
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    queue = torch.zeros(1, dtype=torch.int32, device=device)
    arguments = (
        lse, plan.counts, plan.partial, plan.indices,
        plan.counts if inputs.text_lengths is None else inputs.text_lengths,
        plan.counts if window is None else window.bounds, log_weights, queue,
        inputs.scale * LOG2_E, 1.0 / (tiles_h * tiles_w), 1.0 / tiles_w,
        heads, tiles.num_tiles, text_tiles, text_items, items, inputs.text, inputs.text_start, plan.prefix, length,
        *tiles.grid, tiles_h, tiles_w, plan.indices.shape[-1], list_item, list_head, 0, plan.pooled,
        *weight_strides, *((*window.dilation, window.radius or 0) if window else (1, 1, 1, 0)),
    )  # fmt: skip
    return (min(processors, items),), arguments


def _unpadded(inputs: Inputs, v: Tensor, heads_inside: bool) -> Tensor:
    """The text's values with zeros for padding, whose probability of 0 would not silence a NaN."""
    assert inputs.text_lengths is not None
    text = v[:, inputs.text_start : inputs.text_start + inputs.text]
    valid = torch.arange(inputs.text, device=v.device) < inputs.text_lengths[:, None]
    text = torch.where(valid[:, :, None, None], text, 0.0)
    return text.contiguous() if heads_inside else text.transpose(1, 2).contiguous().transpose(1, 2)


def half_of(tile: Triple) -> tuple[Triple, Triple]:
    """Where the second half of a tile starts, and the box of a half; tokens keep their order."""
    axis = next(axis for axis in range(3) if tile[axis] > 1)
    start, box = [0, 0, 0], list(tile)
    start[axis] = box[axis] = tile[axis] // 2
    return (start[0], start[1], start[2]), (box[0], box[1], box[2])


def _broadcast_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of the first three dimensions, 0 where they are broadcast."""
    first, second, third = (stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape[:3], strict=False))
    return first, second, third


def _readable(x: Tensor, *, heads_inside: bool) -> bool:
    """Whether a descriptor can read x [B, L, H, D] in place, the heads in its last or its first dimension."""
    batch, _, heads, dim = x.shape
    strides = [(x.stride(axis), x.shape[axis]) for axis in (0, 1)]
    aligned = all(size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0) for stride, size in strides)
    if x.stride(3) != 1 or not aligned or x.data_ptr() % 16:
        return False
    if heads_inside:
        return heads == 1 or x.stride(2) == dim
    if heads > 1 and (x.stride(2) <= 0 or x.stride(2) * x.element_size() % 16):
        return False
    return batch == 1 or x.stride(0) == heads * x.stride(2)


def _outer(x: Tensor, heads_inside: bool) -> tuple[int, int, int, int]:
    """Size and stride of the descriptor's first dimension, token stride, and channels of its last dimension."""
    batch, length, heads, dim = x.shape
    token = x.stride(1) if length > 1 else heads * dim
    if heads_inside:
        return batch, x.stride(0) if batch > 1 else length * token, token, heads * dim
    head = x.stride(2) if heads > 1 else length * token
    return batch * heads, head, token, dim


def grid_descriptor(x: Tensor, tiles: TileGrid, box: Triple, start: int, flat: bool, heads_inside: bool) -> object:
    """Descriptor of boxes of the grid, 64 channels at a time."""
    outer, stride, token, channels = _outer(x, heads_inside)
    _, rows, columns = tiles.grid
    if flat:
        return _descriptor(x, start, [outer, columns, channels], [stride, token, 1], [1, box[2], 64])
    strides = [stride, rows * columns * token, columns * token, token, 1]
    return _descriptor(x, start, [outer, *tiles.grid, channels], strides, [1, *box, 64])


def span_descriptor(x: Tensor, start: int, length: int, rows: int, heads_inside: bool) -> object:
    """Descriptor of runs of ``rows`` consecutive tokens."""
    outer, stride, token, channels = _outer(x, heads_inside)
    return _descriptor(x, start, [outer, length, channels], [stride, token, 1], [1, rows, 64])


def _descriptor(x: Tensor, start: int, shape: list[int], strides: list[int], box: list[int]) -> object:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(shape))
    return TensorDescriptor(x[:, start:], shape, strides, box, layout)
