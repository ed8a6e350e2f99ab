"""Public operators."""

from dit_accel.kernels.block_sparse.api import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse.backends import BACKENDS
from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, PooledKeys, TileGrid

__all__ = ["BACKENDS", "AxisWindows", "BlockPlan", "PooledKeys", "TileGrid", "block_sparse_attention", "can_run"]
