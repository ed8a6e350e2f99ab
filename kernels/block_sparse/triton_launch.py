"""How the Triton kernels are launched: lanes per program and step, warps, stages."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import TileGrid
from dit_accel.kernels.block_sparse.triton_tiles import padded

Chosen = TypeVar("Chosen")


class Launch(NamedTuple):
    """Rows that a program owns, lanes of the other side per step, warps, stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def fit(launch: Launch, tiles: TileGrid) -> tuple[int, Launch]:
    """Lanes of a padded tile, and the launch with at most that many rows and columns and warps in proportion."""
    block = padded(tiles.tile_size)
    rows = min(launch.rows, block)
    warps = max(1, launch.num_warps * rows // launch.rows)
    return block, Launch(rows, min(launch.columns, block), warps, launch.num_stages)


def choose(checked: dict[tuple[int, int], Chosen], default: dict[int, Chosen], q: Tensor) -> Chosen:
    """From ``checked``, for 16-bit inputs, by (compute capability major, padded head dim), or by an element's bytes.

    Rows of a head dim that is no multiple of 16 are read in narrow pieces, which takes registers: they get the default.
    """
    bytes_each, dim = q.element_size(), q.shape[-1]
    if q.device.type != "cuda" or bytes_each != 2 or dim % 16:
        return default[bytes_each]
    major, _ = torch.cuda.get_device_capability(q.device)
    return checked.get((major, padded(dim)), default[bytes_each])
