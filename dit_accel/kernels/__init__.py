"""Public operators."""

from dit_accel.kernels.block_sparse.api import BACKENDS, block_sparse_attention, can_run_triton
from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, TileGrid

__all__ = ["BACKENDS", "AxisWindows", "BlockPlan", "TileGrid", "block_sparse_attention", "can_run_triton"]
