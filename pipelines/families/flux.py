"""Flux.1: joint attention over the text and, after it, the image."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.families.family import Family
from dit_accel.state import CallTokens

# A run passes one tensor of positions at every step, and reading it waits for the device.
_GRIDS: MutableMapping[Tensor, Triple | str] = WeakTensorKeyDictionary()


def read(arguments: Mapping[str, Any], config: Any) -> CallTokens:
    """Packed latents [B, rows * columns, C]; the grid is told by img_ids [tokens, 3] of (reference, row, column)."""
    batch = arguments["hidden_states"].shape[0]
    ids = arguments["img_ids"]
    if ids not in _GRIDS:
        _GRIDS[ids] = _grid(ids)
    grid = _GRIDS[ids]
    if isinstance(grid, str):
        return CallTokens(None, batch, irregular=grid)
    return CallTokens(TokenLayout(grid, arguments["encoder_hidden_states"].shape[1], "prefix"), batch)


def _grid(ids: Tensor) -> Triple | str:
    """(1, rows, columns), or why there is none; low precision rounds large positions, so none is read as a number."""
    reference, row, column = (ids[0] if ids.ndim == 3 else ids).cpu().unbind(1)
    if reference.any():
        return "reference image tokens follow the image"
    columns = int((row == row[0]).sum())
    rows, rest = divmod(len(row), columns)
    if rest or _varies(row.view(rows, columns), 1) or _varies(column.view(rows, columns), 0):
        return "its position ids are no regular grid of rows and columns"
    return 1, rows, columns


def _varies(values: Tensor, axis: int) -> bool:
    return bool((values != values.narrow(axis, 0, 1)).any())


FLUX = Family(
    name="flux",
    models=("FluxTransformer2DModel",),
    targets=(r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"),
    read=read,
    shape=lambda config: {
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "blocks": config.num_layers,
        "single_blocks": config.num_single_layers,
        "ffn_dim": 4 * config.num_attention_heads * config.attention_head_dim,
        "patch": (1, 2, 2),  # packed by the pipeline
    },
    guidance="separate",
    timestep_scale=1000.0,
)
