"""Which implementation of this room runs a call."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

ROW_LIMIT = 16384  # scores of a row that one program of a Triton kernel holds


def runs_triton(x: Tensor) -> bool:
    """GPUs run the Triton kernels, everything else the torch code beside them; both follow the same rules."""
    return x.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
